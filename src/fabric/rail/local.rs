//! The rail between ranks of one process: a put is a copy, a signal a release store.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Completion, Rail, RailError};
use crate::fabric::mapped::Mapped;
use crate::wire::posting::Posting;

/// Carries between memories that the host can address. A posting is delivered when `post` returns.
#[derive(Debug)]
pub struct LocalRail {
    private: Mapped,
    regions: Vec<Mapped>,
    /// What the next poll reports.
    completions: Vec<Completion>,
}

impl LocalRail {
    /// The rail of a rank whose sources lie in `private`, to ranks whose regions are `regions`.
    ///
    /// # Safety
    /// Whatever is posted keeps to the protocol: from the posting to its completion nobody writes its source,
    /// and nobody touches its target until the signal is there. Rings keep it by credit and completions,
    /// records by alternating between two places.
    pub unsafe fn new(private: Mapped, regions: Vec<Mapped>) -> Self {
        Self { private, regions, completions: Vec::new() }
    }

    /// The region and the index word that `posting` goes to, once all of it is known to be there.
    fn target(&self, posting: &Posting) -> Result<(&Mapped, &AtomicU64), RailError> {
        let Posting { peer, source, target, bytes, word, .. } = *posting;
        let outside = |what, offset, bytes| RailError::OutOfRange { what, peer, offset, bytes };
        let region = self.regions.get(peer).ok_or_else(|| outside("the region", 0, 0))?;
        if !self.private.holds(source, bytes) {
            return Err(outside("the source", source, bytes));
        }
        if !region.holds(target, bytes) {
            return Err(outside("the target", target, bytes));
        }
        let word = region.word(word).ok_or_else(|| outside("the word", word, size_of::<u64>()))?;
        Ok((region, word))
    }

    fn carry(&self, posting: &Posting) -> Result<(), RailError> {
        let (region, word) = self.target(posting)?;
        // SAFETY: both ranges have been checked; private memory and regions are different memories; nobody
        // disturbs them by the contract of `new`.
        unsafe { self.private.copy(posting.source, region, posting.target, posting.bytes) };
        word.store(posting.value.0, Ordering::Release);
        Ok(())
    }
}

impl Rail for LocalRail {
    fn post(&mut self, postings: &[Posting]) -> Result<usize, RailError> {
        for posting in postings {
            self.carry(posting)?;
            self.completions.extend(Completion::of(posting));
        }
        Ok(postings.len())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), RailError> {
        completions.append(&mut self.completions);
        Ok(())
    }

    fn is_idle(&self) -> bool {
        self.completions.is_empty()
    }
}
