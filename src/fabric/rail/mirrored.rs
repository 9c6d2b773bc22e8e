//! Hop 1 of a device whose memory the network does not reach: between the two, at both ends, lies pinned memory of the
//! host.
//!
//! - [`MirroredRail`], outgoing: a posting's data is copied from private memory to its place in a mirror of that, and
//!   goes out from there.
//! - [`MirroredRegion`], incoming: data lands in its place in a mirror of the region, and is copied from there.
//!
//! Nobody hands out places of a mirror: each is free when the place that it mirrors is. A kernel writes a source again
//! only after its completion, which is passed on when the network has read the mirror. What lands in a place of the
//! region had been given back by the kernels there (a slot by credit, a record by the operation after), and they have
//! that only from the device, where it came by the copy from the mirror.
//!
//! A word is visible only after its data: outgoing, postings go on in their order, each after its copy. Incoming, the
//! connection of a queue keeps it, one thread publishes what lands, in order, and the stores of words take their turn
//! behind the copies on one stream.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::device::{Reached, broken};
use super::{Completion, Landed, Landing, NetworkRail, Rail, RailError};
use crate::device::{Driver, Event, Memory, Place, Stream};
use crate::error::DeviceError;
use crate::fabric::mapped::Mapped;
use crate::wire::posting::Posting;

/// Batches on their way from the device: each has an event.
const BATCHES: usize = 64;

/// Pauses of who waits for what is on its way from the device.
const PAUSE: Duration = Duration::from_micros(50);

/// Pinned memory, laid out as the beginning of a device's.
pub struct Mirror(Memory);

impl Mirror {
    /// A mirror of `bytes` bytes.
    ///
    /// # Errors
    /// The driver refuses the memory.
    pub fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self, DeviceError> {
        Memory::new(driver, Place::Host, bytes).map(Self)
    }

    /// The same memory.
    ///
    /// # Safety
    /// The mirror outlives the result and its copies.
    pub unsafe fn mapped(&self) -> Mapped {
        // SAFETY: pinned and zeroed, as long as the contract asks; who gets the result answers for races.
        unsafe { Mapped::new(self.0.address() as *mut u8, self.0.bytes()) }
    }

    fn address(&self, offset: usize) -> u64 {
        self.0.address() + offset as u64
    }
}

/// Brings what is posted to a mirror, and posts it from there.
pub struct MirroredRail {
    // Dropped first: the rail reads the mirror, and the stream writes it.
    rail: Box<dyn NetworkRail>,
    stream: Stream,
    driver: Arc<dyn Driver>,
    private: Reached,
    mirror: Mirror,
    events: Vec<Event>,
    coming: VecDeque<Batch>,
}

struct Batch {
    event: Event,
    postings: Vec<Posting>,
}

impl MirroredRail {
    /// The rail of a rank whose sources lie in `private`, over `rail`, whose sources lie in `mirror`, which is as large.
    ///
    /// # Errors
    /// The driver refuses a stream or an event.
    ///
    /// # Safety
    /// The private memory outlives the rail, and nobody writes a posting's source before its completion.
    pub unsafe fn new(
        driver: &Arc<dyn Driver>,
        private: Reached,
        mirror: Mirror,
        rail: Box<dyn NetworkRail>,
    ) -> Result<Self, DeviceError> {
        Ok(Self {
            rail,
            stream: Stream::new(driver)?,
            driver: driver.clone(),
            private,
            mirror,
            events: (0..BATCHES).map(|_| Event::new(driver)).collect::<Result<_, _>>()?,
            coming: VecDeque::with_capacity(BATCHES),
        })
    }

    /// Enqueues the copy of a posting's data.
    fn fetch(&self, posting: &Posting) -> Result<(), RailError> {
        let Posting { peer, source, bytes, .. } = *posting;
        let from = self.private.at(source, bytes).filter(|_| source + bytes <= self.mirror.0.bytes());
        let from = from.ok_or(RailError::OutOfRange { what: "the source", peer, offset: source, bytes })?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: in range on both sides; the source is undisturbed by the contract of `new`, and nobody else uses its
        // mirror before the completion.
        let copied = unsafe { self.driver.copy(self.stream.raw(), self.mirror.address(source), from, bytes) };
        copied.map_err(|error| broken(peer, &error))
    }

    /// Posts what has come.
    fn advance(&mut self) -> Result<(), RailError> {
        while let Some(Batch { event, postings }) = self.coming.front() {
            let peer = postings.first().map_or(0, |posting| posting.peer);
            if !event.is_done().map_err(|error| broken(peer, &error))? {
                break;
            }
            // Such a rail takes all.
            self.rail.post(postings)?;
            let batch = self.coming.pop_front().expect("just seen");
            self.events.push(batch.event);
        }
        Ok(())
    }

    /// Who has not got all, for want of what has not come.
    fn waiting(&self) -> Vec<usize> {
        let postings = self.coming.iter().flat_map(|batch| &batch.postings);
        let mut peers: Vec<usize> = postings.map(|posting| posting.peer).collect();
        peers.sort_unstable();
        peers.dedup();
        peers
    }
}

impl Rail for MirroredRail {
    fn post(&mut self, postings: &[Posting]) -> Result<usize, RailError> {
        let Some(last) = postings.last() else { return Ok(0) };
        if self.coming.is_empty() && postings.iter().all(|posting| posting.bytes == 0) {
            return self.rail.post(postings);
        }
        let Some(event) = self.events.pop() else { return Ok(0) };
        postings.iter().try_for_each(|posting| self.fetch(posting))?;
        // SAFETY: both are alive.
        let recorded = unsafe { self.driver.record(event.raw(), self.stream.raw()) };
        recorded.map_err(|error| broken(last.peer, &error))?;
        self.coming.push_back(Batch { event, postings: postings.to_vec() });
        Ok(postings.len())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), RailError> {
        self.advance()?;
        self.rail.poll(completions)
    }

    fn is_idle(&self) -> bool {
        self.coming.is_empty() && self.rail.is_idle()
    }
}

impl NetworkRail for MirroredRail {
    fn drain(&mut self, end: Instant) -> Vec<usize> {
        while self.advance().is_ok() && !self.coming.is_empty() && Instant::now() < end {
            thread::sleep(PAUSE);
        }
        match self.waiting() {
            waiting if waiting.is_empty() => self.rail.drain(end),
            waiting => waiting,
        }
    }
}

/// Where what comes for a device lands.
pub struct MirroredRegion {
    // Dropped first: it waits for what is under way.
    stream: Stream,
    driver: Arc<dyn Driver>,
    region: Reached,
    mirror: Mirror,
}

impl MirroredRegion {
    /// A mirror of the first `bytes` bytes of `region`: of all that rail peers write.
    ///
    /// # Errors
    /// The driver refuses the memory or a stream.
    ///
    /// # Safety
    /// The region outlives the result, and nobody touches a posting's target until its signal is there.
    pub unsafe fn new(driver: &Arc<dyn Driver>, region: Reached, bytes: usize) -> Result<Self, DeviceError> {
        let (stream, mirror) = (Stream::new(driver)?, Mirror::new(driver, bytes)?);
        Ok(Self { stream, driver: driver.clone(), region, mirror })
    }

    /// Waits until all that has landed is on the device.
    ///
    /// # Errors
    /// The device has failed.
    pub fn settle(&self) -> Result<(), DeviceError> {
        // SAFETY: alive as long as `self`.
        unsafe { self.driver.synchronize(self.stream.raw()) }
    }
}

impl Landing for MirroredRegion {
    fn memory(&self) -> Mapped {
        // SAFETY: whoever lands here keeps `self`.
        unsafe { self.mirror.mapped() }
    }

    fn publish(&self, landed: &Landed) -> Result<(), DeviceError> {
        let Landed { target, bytes, word, value } = *landed;
        let at =
            |offset, bytes| self.region.at(offset, bytes).expect("a mirror is no larger than its region");
        let (to, word, stream) = (at(target, bytes), at(word, 8), self.stream.raw());
        // SAFETY: in range on both sides, for it has landed in the mirror; undisturbed by the contract of `new`, and
        // the mirror by the protocol, as argued above.
        unsafe {
            if bytes > 0 {
                self.driver.copy(stream, to, self.mirror.address(target), bytes)?;
            }
            self.driver.store(stream, word, value)
        }
    }
}
