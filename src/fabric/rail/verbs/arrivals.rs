//! Signals that wake: each takes a receive, and its completion wakes the rail's thread.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::io;
use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::Arc;

use super::device::{Device, check};
use super::error::VerbsError;
use super::object::{Channel, Completions, Domain, Receives};
use crate::sys::verbs as sys;

/// Receives that are posted together.
const BATCH: usize = 256;

/// Batches that are posted in the beginning. A peer that finds no receive tries again until there is one.
const BATCHES: usize = 4;

/// Completions that are taken from the queue at once.
const TAKEN: usize = 64;

/// Where signals come in.
pub(super) struct Arrivals {
    pub(super) completions: Arc<Completions>,
    /// None where signals are not to wake anybody: then nothing completes here.
    pub(super) receives: Option<Arc<Receives>>,
    /// A chain of receives without memory, of which every batch is a copy.
    batch: Box<[sys::RecvWr]>,
    /// Receives that have been used since the last batch.
    used: usize,
}

// SAFETY: the chain's pointers lead to itself alone.
unsafe impl Send for Arrivals {}

/// What has come.
#[derive(Default)]
pub(super) struct Arrived {
    pub(super) signals: usize,
    /// Receives that failed: queue pair and status.
    pub(super) failures: Vec<(u32, u32)>,
}

impl Arrivals {
    pub(super) fn new(
        device: &Device,
        domain: &Arc<Domain>,
        channel: &Arc<Channel>,
        wakes: bool,
    ) -> Result<Self, VerbsError> {
        let most = device.limits.max_srq_wr.min(device.limits.max_cqe) as usize;
        let batch = if wakes { BATCH.min(most / BATCHES).max(1) } else { 0 };
        let completions = device.completions(channel, BATCHES * batch)?;
        let receives = if wakes { Some(device.receives(domain, BATCHES * batch)?) } else { None };
        let receive = |_| sys::RecvWr { wr_id: 0, next: null_mut(), sg_list: null_mut(), num_sge: 0 };
        let mut arrivals =
            Self { completions, receives, batch: (0..batch).map(receive).collect(), used: BATCHES * batch };
        check(&device.name, "ibv_post_srq_recv", arrivals.refill())?;
        Ok(arrivals)
    }

    /// Posts receives for those used; the error number.
    fn refill(&mut self) -> c_int {
        let Some(receives) = &self.receives else { return 0 };
        while self.used >= self.batch.len() {
            let mut next = null_mut();
            for receive in self.batch.iter_mut().rev() {
                receive.next = next;
                next = receive;
            }
            let mut bad = null_mut();
            // SAFETY: the queue is alive; the chain leads through `batch` and names no memory.
            let status = unsafe { sys::post_srq_recv(receives.raw(), next, &mut bad) };
            if status != 0 {
                return status;
            }
            self.used -= self.batch.len();
        }
        0
    }

    /// Takes what has come, and makes room for more.
    ///
    /// # Errors
    /// The device has failed.
    pub(super) fn take(&mut self) -> io::Result<Arrived> {
        let mut arrived = Arrived::default();
        // SAFETY: plain numbers, for which zeros do.
        let mut done = [unsafe { zeroed::<sys::Wc>() }; TAKEN];
        loop {
            // SAFETY: the queue is alive.
            let count = unsafe { sys::poll_cq(self.completions.raw(), &mut done) };
            let count = usize::try_from(count)
                .map_err(|_| io::Error::other("the queue of arrivals can't be read"))?;
            for done in &done[..count] {
                match done.status {
                    sys::WC_SUCCESS => arrived.signals += 1,
                    status => arrived.failures.push((done.qp_num, status)),
                }
            }
            self.used += count;
            match self.refill() {
                0 if count < TAKEN => return Ok(arrived),
                0 => {}
                error => return Err(io::Error::from_raw_os_error(error)),
            }
        }
    }

    /// Asks for an event with the next arrival.
    ///
    /// # Errors
    /// The device has failed.
    pub(super) fn arm(&self) -> io::Result<()> {
        // SAFETY: the queue is alive.
        match unsafe { sys::req_notify_cq(self.completions.raw()) } {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}
