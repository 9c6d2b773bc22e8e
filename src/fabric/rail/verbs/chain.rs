//! Work requests under construction: a chain is posted with one ring of the device's doorbell.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::ptr::null_mut;

use super::pair::QueuePair;
use crate::sys::verbs::{self as sys, Sge};

/// Pieces that one request gathers at most.
pub(super) const PIECES: usize = 8;

/// A piece of the own memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) address: u64,
    pub(super) bytes: u32,
    pub(super) key: u32,
}

/// A place in a peer's memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) address: u64,
    pub(super) key: u32,
}

impl Place {
    /// The place so many bytes further on.
    pub(super) fn at(self, offset: usize) -> Self {
        Self { address: self.address + offset as u64, ..self }
    }
}

/// A request with all it points to.
struct Request {
    raw: sys::SendWr,
    pieces: [Sge; PIECES],
    /// What a signal writes.
    value: u64,
}

/// Requests that are posted together. Its places are used again by the next chain: the library has read a chain when
/// it has been posted.
pub(super) struct Chain {
    requests: Box<[Request]>,
    len: usize,
}

// SAFETY: pointers in it lead to itself, are set as it is posted, and are read during that alone.
unsafe impl Send for Chain {}

impl Chain {
    /// A chain of up to `most` requests.
    pub(super) fn new(most: usize) -> Self {
        let request =
            |_| Request { raw: write(), pieces: [Sge { addr: 0, length: 0, lkey: 0 }; PIECES], value: 0 };
        Self { requests: (0..most).map(request).collect(), len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    /// Appends a write of up to [`PIECES`] pieces, one behind the other.
    pub(super) fn put(&mut self, pieces: impl Iterator<Item = Piece>, to: Place) {
        let request = self.next(to);
        let mut count = 0;
        for (slot, Piece { address, bytes, key }) in request.pieces.iter_mut().zip(pieces) {
            *slot = Sge { addr: address, length: bytes, lkey: key };
            count += 1;
        }
        request.raw.num_sge = count;
    }

    /// Appends the write of an index word, with an immediate where that `wakes` the peer. NICs write 8 aligned bytes at
    /// once, and after all that came before on the queue pair.
    pub(super) fn signal(&mut self, value: u64, to: Place, wakes: bool) {
        let request = self.next(to);
        request.value = value;
        request.raw.num_sge = 1;
        request.raw.send_flags = sys::SEND_INLINE;
        if wakes {
            request.raw.opcode = sys::WR_RDMA_WRITE_WITH_IMM;
        }
    }

    /// Asks for a completion of the last request, by the number `id`.
    pub(super) fn complete(&mut self, id: u64) {
        let last = &mut self.requests[self.len - 1].raw;
        last.send_flags |= sys::SEND_SIGNALED;
        last.wr_id = id;
    }

    fn next(&mut self, to: Place) -> &mut Request {
        let request = &mut self.requests[self.len];
        self.len += 1;
        request.raw = sys::SendWr { remote_addr: to.address, rkey: to.key, ..write() };
        request
    }

    /// Posts all of it; the error number.
    ///
    /// # Safety
    /// Until their completion the pieces are in memory that is registered by their keys.
    pub(super) unsafe fn post(&mut self, pair: &QueuePair) -> c_int {
        let requests = &mut self.requests[..self.len];
        let mut next = null_mut();
        for request in requests.iter_mut().rev() {
            if request.raw.send_flags & sys::SEND_INLINE != 0 {
                let bytes = size_of::<u64>() as u32;
                request.pieces[0] = Sge { addr: &raw const request.value as u64, length: bytes, lkey: 0 };
            }
            request.raw.sg_list = request.pieces.as_mut_ptr();
            request.raw.next = next;
            next = &raw mut request.raw;
        }
        let mut bad = null_mut();
        // SAFETY: the chain leads through `requests`, which stay; their memory does by contract.
        unsafe { sys::post_send(pair.raw(), next, &mut bad) }
    }
}

/// A write of nothing.
fn write() -> sys::SendWr {
    sys::SendWr {
        wr_id: 0,
        next: null_mut(),
        sg_list: null_mut(),
        num_sge: 0,
        opcode: sys::WR_RDMA_WRITE,
        send_flags: 0,
        imm_data: 0,
        remote_addr: 0,
        rkey: 0,
        _unions: [0; 9],
    }
}
