//! The rail between ranks of one process on devices: puts and signals are copies on a stream of the rail's own, whose
//! order is the contract's.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Completion, Rail, RailError};
use crate::device::{Driver, Event, Memory, Stream};
use crate::error::DeviceError;
use crate::wire::posting::Posting;

/// Batches on their way: each has an event.
const BATCHES: usize = 64;

/// Memory as the rail's device reaches it.
#[derive(Debug, Clone, Copy)]
pub struct Reached {
    /// Its address.
    pub address: u64,
    /// Its size.
    pub bytes: usize,
}

/// By its own device.
impl From<&Memory> for Reached {
    fn from(memory: &Memory) -> Self {
        Self { address: memory.address(), bytes: memory.bytes() }
    }
}

impl Reached {
    pub(super) fn at(&self, offset: usize, bytes: usize) -> Option<u64> {
        let end = offset.checked_add(bytes)?;
        (end <= self.bytes).then_some(self.address + offset as u64)
    }
}

/// Carries between the memories of devices that reach each other.
pub struct DeviceRail {
    // Dropped first: it waits for what is under way.
    stream: Stream,
    driver: Arc<dyn Driver>,
    private: Reached,
    /// By rank; none where this rail does not go.
    regions: Vec<Option<Reached>>,
    events: Vec<Event>,
    under_way: VecDeque<Batch>,
}

struct Batch {
    event: Event,
    completions: Vec<Completion>,
}

impl DeviceRail {
    /// The rail of a rank whose sources lie in `private`, to ranks whose regions are `regions`.
    ///
    /// # Errors
    /// The driver refuses memory, a stream or an event.
    ///
    /// # Safety
    /// The memories outlive the rail, and what is posted keeps to the protocol: from the posting to its completion
    /// nobody writes its source, and nobody touches its target until the signal is there.
    pub unsafe fn new(
        driver: &Arc<dyn Driver>,
        private: Reached,
        regions: Vec<Option<Reached>>,
    ) -> Result<Self, DeviceError> {
        Ok(Self {
            stream: Stream::new(driver)?,
            driver: driver.clone(),
            private,
            regions,
            events: (0..BATCHES).map(|_| Event::new(driver)).collect::<Result<_, _>>()?,
            under_way: VecDeque::with_capacity(BATCHES),
        })
    }

    /// Enqueues a posting's copies.
    fn carry(&self, posting: &Posting) -> Result<(), RailError> {
        let Posting { peer, source, target, bytes, word, .. } = *posting;
        let outside = |what, offset, bytes| RailError::OutOfRange { what, peer, offset, bytes };
        let region = self.regions.get(peer).copied().flatten().ok_or_else(|| outside("the region", 0, 0))?;
        let from = self.private.at(source, bytes).ok_or_else(|| outside("the source", source, bytes))?;
        let to = region.at(target, bytes).ok_or_else(|| outside("the target", target, bytes))?;
        let word_to = region.at(word, 8).ok_or_else(|| outside("the word", word, 8))?;
        // SAFETY: both ranges and the word have been checked; they stay as they are by the contract of `new`.
        let copied = unsafe {
            let data = if bytes > 0 { self.driver.copy(self.stream.raw(), to, from, bytes) } else { Ok(()) };
            data.and_then(|()| self.driver.store(self.stream.raw(), word_to, posting.value.0))
        };
        copied.map_err(|error| broken(peer, &error))
    }
}

pub(super) fn broken(peer: usize, error: &DeviceError) -> RailError {
    RailError::Broken { peer, reason: error.to_string() }
}

impl Rail for DeviceRail {
    fn post(&mut self, postings: &[Posting]) -> Result<usize, RailError> {
        let Some(last) = postings.last() else { return Ok(0) };
        let Some(event) = self.events.pop() else { return Ok(0) };
        postings.iter().try_for_each(|posting| self.carry(posting))?;
        // SAFETY: both are alive.
        let recorded = unsafe { self.driver.record(event.raw(), self.stream.raw()) };
        recorded.map_err(|error| broken(last.peer, &error))?;
        let completions = postings.iter().filter_map(Completion::of).collect();
        self.under_way.push_back(Batch { event, completions });
        Ok(postings.len())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), RailError> {
        while let Some(batch) = self.under_way.front() {
            let peer = self.regions.iter().position(Option::is_some).unwrap_or(0);
            if !batch.event.is_done().map_err(|error| broken(peer, &error))? {
                break;
            }
            let batch = self.under_way.pop_front().expect("just seen");
            completions.extend(batch.completions);
            self.events.push(batch.event);
        }
        Ok(())
    }

    fn is_idle(&self) -> bool {
        self.under_way.is_empty()
    }
}
