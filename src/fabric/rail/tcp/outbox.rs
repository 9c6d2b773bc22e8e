//! What still has to go over one connection.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io::IoSlice;
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

use super::frame::{Frame, HEADER};
use crate::fabric::mapped::Mapped;
use crate::fabric::rail::Completion;
use crate::wire::posting::Posting;

/// Frames that one call hands to the system at most; each has a header and perhaps data.
const BATCH: usize = 64;

/// A frame on its way. Data stays in the source until the system takes it.
pub struct Outgoing {
    header: [u8; HEADER],
    source: usize,
    bytes: usize,
    completion: Option<Completion>,
}

impl Outgoing {
    fn len(&self) -> usize {
        HEADER + self.bytes
    }
}

impl From<&Posting> for Outgoing {
    fn from(posting: &Posting) -> Self {
        let Posting { source, target, bytes, word, value, .. } = *posting;
        let header = Frame::Posting { target, bytes, word, value: value.0 }.encode();
        Self { header, source, bytes, completion: Completion::of(posting) }
    }
}

impl From<Frame> for Outgoing {
    /// A frame without data.
    fn from(frame: Frame) -> Self {
        Self { header: frame.encode(), source: 0, bytes: 0, completion: None }
    }
}

/// What all outboxes of a rail have to say to who posts.
#[derive(Default)]
pub struct Departures {
    /// Frames that have not left. A completion is there before its frame is no longer counted.
    under_way: AtomicUsize,
    completions: Mutex<Vec<Completion>>,
}

impl Departures {
    fn depart(&self, frames: impl ExactSizeIterator<Item = Outgoing>) {
        let count = frames.len();
        let mut completions = self.completions.lock().unwrap_or_else(PoisonError::into_inner);
        completions.extend(frames.filter_map(|frame| frame.completion));
        drop(completions);
        self.under_way.fetch_sub(count, Ordering::Release);
    }

    /// Moves the completions that have come to the end of `to`.
    pub fn report(&self, to: &mut Vec<Completion>) {
        to.append(&mut self.completions.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Whether every frame has left.
    pub fn all_left(&self) -> bool {
        self.under_way.load(Ordering::Acquire) == 0
    }

    /// Whether every frame has left, and every completion has been reported.
    pub fn is_idle(&self) -> bool {
        self.all_left() && self.completions.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

/// What a connection's socket has not taken yet, in order: descriptors only. It has no limit of its own. Postings with
/// data take slots of rings or one of two places of a record, and have them until the peer gives them back; signals of
/// credit are as many as the slots that they free. So there are never more than all rings and records make up.
#[derive(Default)]
pub struct Outbox {
    frames: VecDeque<Outgoing>,
    /// Bytes of the first frame that are gone.
    sent: usize,
    /// Nothing can be sent any more: frames leave for nowhere.
    closed: bool,
}

impl Outbox {
    /// Appends a frame.
    pub fn push(&mut self, frame: Outgoing, departures: &Departures) {
        departures.under_way.fetch_add(1, Ordering::Relaxed);
        match self.closed {
            true => departures.depart([frame].into_iter()),
            false => self.frames.push_back(frame),
        }
    }

    /// Whether nothing is left to send.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Gives the socket what it takes without waiting.
    ///
    /// # Safety
    /// The data of what has been pushed lies in `source`, which is mapped, and nobody writes it.
    pub unsafe fn send(
        &mut self,
        stream: &TcpStream,
        source: &Mapped,
        departures: &Departures,
    ) -> Result<(), Errno> {
        while !self.frames.is_empty() {
            // SAFETY: as promised to this function.
            match unsafe { self.send_batch(stream, source) } {
                Ok(count) => self.advance(count, departures),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Bytes that one call has taken.
    ///
    /// # Safety
    /// As for [`Outbox::send`].
    unsafe fn send_batch(&self, stream: &TcpStream, source: &Mapped) -> Result<usize, Errno> {
        let mut slices = [IoSlice::new(&[]); 2 * BATCH];
        let mut used = 0;
        for frame in self.frames.iter().take(BATCH) {
            slices[used] = IoSlice::new(&frame.header);
            used += 1;
            if frame.bytes > 0 {
                // SAFETY: as promised to this function.
                slices[used] = IoSlice::new(unsafe { source.slice(frame.source, frame.bytes) });
                used += 1;
            }
        }
        let mut rest = &mut slices[..used];
        IoSlice::advance_slices(&mut rest, self.sent);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(stream, rest, &mut SendAncillaryBuffer::default(), flags)
    }

    /// The socket has taken `bytes` more.
    fn advance(&mut self, bytes: usize, departures: &Departures) {
        self.sent += bytes;
        let mut gone = 0;
        while let Some(frame) = self.frames.get(gone)
            && frame.len() <= self.sent
        {
            self.sent -= frame.len();
            gone += 1;
        }
        if gone > 0 {
            departures.depart(self.frames.drain(..gone));
        }
    }

    /// What is there, and all that comes, leaves for nowhere.
    pub fn close(&mut self, departures: &Departures) {
        self.closed = true;
        departures.depart(self.frames.drain(..));
    }
}
