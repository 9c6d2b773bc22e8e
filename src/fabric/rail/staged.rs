//! The rail between ranks of one process whose devices don't reach each other: data goes through pinned memory of the
//! host. Its two halves are what any fabric needs that can't reach device memory: [`Outbox`] at home, [`Inbox`] at the
//! peer.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;

use super::device::{Reached, broken};
use super::{Completion, Rail, RailError};
use crate::device::{Driver, Event, Memory, Place, Stream};
use crate::error::DeviceError;
use crate::wire::posting::Posting;

/// Postings on their way from the device, or to it: each has an event.
const UNDER_WAY: usize = 64;

/// Where the data of a posting is: `bytes` pinned bytes at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Staged {
    /// What was posted.
    pub posting: Posting,
    /// Where its data lies.
    pub address: u64,
    /// Bytes of the outbox that it holds, what was skipped at the end included.
    held: usize,
}

/// Brings the data of a rank's postings to the host.
pub struct Outbox {
    // Dropped first: it waits for what is under way.
    stream: Stream,
    driver: Arc<dyn Driver>,
    private: Reached,
    room: Memory,
    /// Bytes taken and given back so far; the difference is in use.
    taken: usize,
    given: usize,
    events: Vec<Event>,
    coming: VecDeque<(Event, Staged)>,
}

impl Outbox {
    /// The outbox of a rank whose sources lie in `private`, with room for `bytes` bytes.
    ///
    /// # Errors
    /// The driver refuses memory, a stream or an event.
    ///
    /// # Safety
    /// The memory outlives the outbox, and nobody writes a posting's source before its completion.
    pub unsafe fn new(driver: &Arc<dyn Driver>, private: Reached, bytes: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            stream: Stream::new(driver)?,
            driver: driver.clone(),
            private,
            room: Memory::new(driver, Place::Host, bytes)?,
            taken: 0,
            given: 0,
            events: (0..UNDER_WAY).map(|_| Event::new(driver)).collect::<Result<_, _>>()?,
            coming: VecDeque::with_capacity(UNDER_WAY),
        })
    }

    /// Starts to bring a posting's data; whether there is room for it now.
    ///
    /// # Errors
    /// The source is outside the private memory, the outbox is smaller than it, or the device fails.
    pub fn put(&mut self, posting: &Posting) -> Result<bool, RailError> {
        let Posting { peer, source, bytes, .. } = *posting;
        let outside = |what| RailError::OutOfRange { what, peer, offset: source, bytes };
        let from = self.private.at(source, bytes).ok_or_else(|| outside("the source"))?;
        if bytes > self.room.bytes() {
            return Err(outside("the outbox"));
        }
        if self.taken == self.given {
            // Nothing to skip: what is as large as the room fits.
            (self.taken, self.given) = (0, 0);
        }
        let Some((at, held)) = self.place(bytes) else { return Ok(false) };
        let Some(event) = self.events.pop() else { return Ok(false) };
        let address = self.room.address() + at as u64;
        // SAFETY: the source is in range and undisturbed by the contract of `new`; the place is nobody else's until it
        // is given back.
        let copied = unsafe {
            let data = match bytes {
                0 => Ok(()),
                _ => self.driver.copy(self.stream.raw(), address, from, bytes),
            };
            data.and_then(|()| self.driver.record(event.raw(), self.stream.raw()))
        };
        copied.map_err(|error| broken(peer, &error))?;
        self.taken += held;
        self.coming.push_back((event, Staged { posting: *posting, address, held }));
        Ok(true)
    }

    /// A contiguous place, and what it takes of the room: a place does not wrap around.
    fn place(&self, bytes: usize) -> Option<(usize, usize)> {
        let (size, at) = (self.room.bytes(), self.taken % self.room.bytes());
        let skipped = if at + bytes > size { size - at } else { 0 };
        let held = skipped + bytes;
        (self.taken + held - self.given <= size).then_some(((at + skipped) % size, held))
    }

    /// The next posting whose data has come; its source may be written again.
    ///
    /// # Errors
    /// The device has failed.
    pub fn take(&mut self) -> Result<Option<Staged>, RailError> {
        let Some((event, staged)) = self.coming.front() else { return Ok(None) };
        if !event.is_done().map_err(|error| broken(staged.posting.peer, &error))? {
            return Ok(None);
        }
        let (event, staged) = self.coming.pop_front().expect("just seen");
        self.events.push(event);
        Ok(Some(staged))
    }

    /// Gives back the place of the posting taken first of those that still have theirs.
    pub fn give(&mut self, staged: &Staged) {
        self.given += staged.held;
    }
}

/// Brings arrived data to a rank's device.
pub struct Inbox {
    stream: Stream,
    driver: Arc<dyn Driver>,
    region: Reached,
    events: Vec<Event>,
}

impl Inbox {
    /// The inbox of a rank with this region.
    ///
    /// # Errors
    /// The driver refuses a stream or an event.
    ///
    /// # Safety
    /// The region outlives the inbox, and nobody touches a posting's target until its signal is there.
    pub unsafe fn new(driver: &Arc<dyn Driver>, region: Reached) -> Result<Self, DeviceError> {
        let events = (0..UNDER_WAY).map(|_| Event::new(driver)).collect::<Result<_, _>>()?;
        Ok(Self { stream: Stream::new(driver)?, driver: driver.clone(), region, events })
    }

    /// Starts to write the `bytes` bytes at `from` to `target`, and then `value` into `word`, after all before it. The
    /// event says when `from` is free again; none if there is no room now.
    ///
    /// # Errors
    /// The target or the word is outside the region, or the device fails.
    ///
    /// # Safety
    /// `from` is pinned memory that stays as it is until the event.
    pub unsafe fn put(&mut self, from: u64, posting: &Posting) -> Result<Option<Event>, RailError> {
        let Posting { peer, target, bytes, word, value, .. } = *posting;
        let outside = |what, offset, bytes| RailError::OutOfRange { what, peer, offset, bytes };
        let to = self.region.at(target, bytes).ok_or_else(|| outside("the target", target, bytes))?;
        let word_to = self.region.at(word, 8).ok_or_else(|| outside("the word", word, 8))?;
        let Some(event) = self.events.pop() else { return Ok(None) };
        let stream = self.stream.raw();
        // SAFETY: in range; undisturbed by the contracts of `new` and of this method.
        let written = unsafe {
            let data = if bytes > 0 { self.driver.copy(stream, to, from, bytes) } else { Ok(()) };
            data.and_then(|()| self.driver.store(stream, word_to, value.0))
                .and_then(|()| self.driver.record(event.raw(), stream))
        };
        written.map_err(|error| broken(peer, &error))?;
        Ok(Some(event))
    }

    /// Takes back an event that is done.
    pub fn give(&mut self, event: Event) {
        self.events.push(event);
    }
}

/// Carries between devices by way of the host.
pub struct StagedRail {
    outbox: Outbox,
    /// By rank; none where this rail does not go.
    inboxes: Vec<Option<Inbox>>,
    /// What the next inbox had no room for.
    waiting: Option<Staged>,
    arriving: VecDeque<(Event, Staged)>,
}

impl StagedRail {
    /// The rail from an outbox to inboxes, by rank.
    pub fn new(outbox: Outbox, inboxes: Vec<Option<Inbox>>) -> Self {
        Self { outbox, inboxes, waiting: None, arriving: VecDeque::new() }
    }

    fn inbox(&mut self, peer: usize) -> Result<&mut Inbox, RailError> {
        let outside = RailError::OutOfRange { what: "the region", peer, offset: 0, bytes: 0 };
        self.inboxes.get_mut(peer).and_then(Option::as_mut).ok_or(outside)
    }
}

impl Rail for StagedRail {
    fn post(&mut self, postings: &[Posting]) -> Result<usize, RailError> {
        for (taken, posting) in postings.iter().enumerate() {
            if !self.outbox.put(posting)? {
                return Ok(taken);
            }
        }
        Ok(postings.len())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), RailError> {
        loop {
            let staged = match self.waiting.take() {
                Some(staged) => staged,
                None => match self.outbox.take()? {
                    Some(staged) => {
                        completions.extend(Completion::of(&staged.posting));
                        staged
                    }
                    None => break,
                },
            };
            // SAFETY: the place is kept until the event, below.
            match unsafe { self.inbox(staged.posting.peer)?.put(staged.address, &staged.posting)? } {
                Some(event) => self.arriving.push_back((event, staged)),
                None => {
                    self.waiting = Some(staged);
                    break;
                }
            }
        }
        // Places are given back in the order in which they were taken, whichever inbox is ahead.
        while let Some((event, staged)) = self.arriving.front() {
            if !event.is_done().map_err(|error| broken(staged.posting.peer, &error))? {
                break;
            }
            let (event, staged) = self.arriving.pop_front().expect("just seen");
            self.outbox.give(&staged);
            self.inbox(staged.posting.peer)?.give(event);
        }
        Ok(())
    }

    fn is_idle(&self) -> bool {
        self.outbox.coming.is_empty() && self.waiting.is_none() && self.arriving.is_empty()
    }
}

impl Drop for StagedRail {
    fn drop(&mut self) {
        // Inboxes read the outbox: their streams end first.
        self.inboxes.clear();
    }
}
