//! A rail that carries nothing: it builds the work requests that a NIC would be given, so that the cost of
//! posting can be measured where there is no NIC.

use std::collections::VecDeque;

use super::{Completion, Rail, RailError};
use crate::wire::posting::Posting;

/// What a NIC is asked for, as large as a basic work queue entry of today's NICs.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub struct WorkRequest {
    /// Number of the request.
    pub id: u64,
    /// Where the data is, in the private memory.
    pub local: u64,
    /// Where it goes, in the peer's region.
    pub remote: u64,
    /// What a signal writes.
    pub value: u64,
    /// Bytes of data.
    pub bytes: u32,
    /// The peer's rank.
    pub peer: u32,
    /// The queue.
    pub queue: u32,
    /// See [`work`].
    pub flags: u32,
}

/// What a [`WorkRequest`] is.
pub mod work {
    /// A write of 8 bytes that come with the request, instead of a put of data.
    pub const SIGNAL: u32 = 1;
    /// Its completion is asked for.
    pub const COMPLETE: u32 = 2;
}

/// Builds work requests in a ring and completes them unseen.
#[derive(Debug)]
pub struct NullRail {
    requests: Box<[WorkRequest]>,
    /// Requests built so far.
    built: u64,
    /// Of those, the ones under way.
    used: usize,
    max_message: usize,
    bytes: u64,
    polls: u64,
    delay: u64,
    under_way: VecDeque<UnderWay>,
}

#[derive(Debug)]
struct UnderWay {
    requests: usize,
    /// The poll that ends it.
    due: u64,
    completion: Option<Completion>,
}

impl NullRail {
    /// A rail with room for `requests` work requests, whose puts carry at most `max_message` bytes each and
    /// are complete `polls` polls later (0 and 1: at the next).
    ///
    /// # Panics
    /// `requests` is not a power of two, or `max_message` is 0 or no 32-bit number.
    pub fn new(requests: usize, max_message: usize, polls: u64) -> Self {
        assert!(requests.is_power_of_two(), "a ring has a power-of-two number of places");
        assert!((1..=u32::MAX as usize).contains(&max_message), "{max_message} bytes are no message");
        Self {
            requests: vec![WorkRequest::default(); requests].into(),
            built: 0,
            used: 0,
            max_message,
            bytes: 0,
            polls: 0,
            delay: polls,
            under_way: VecDeque::with_capacity(requests),
        }
    }

    /// Work requests built so far.
    pub fn built(&self) -> u64 {
        self.built
    }

    /// Bytes of data they stand for.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The places of the ring: request `id` is at `id` modulo their number.
    pub fn requests(&self) -> &[WorkRequest] {
        &self.requests
    }

    fn push(&mut self, request: WorkRequest) {
        let place = self.built as usize & (self.requests.len() - 1);
        self.requests[place] = WorkRequest { id: self.built, ..request };
        self.built += 1;
    }

    fn build(&mut self, posting: &Posting) {
        let Posting { peer, queue, source, target, bytes, word, completion, value } = *posting;
        let (peer, queue) = (peer as u32, queue as u32);
        let mut at = 0;
        while at < bytes {
            let piece = self.max_message.min(bytes - at);
            let last = at + piece == bytes && completion.is_some();
            let flags = if last { work::COMPLETE } else { 0 };
            let (local, remote) = ((source + at) as u64, (target + at) as u64);
            self.push(WorkRequest {
                local,
                remote,
                bytes: piece as u32,
                peer,
                queue,
                flags,
                ..Default::default()
            });
            at += piece;
        }
        let (remote, flags) = (word as u64, work::SIGNAL);
        self.push(WorkRequest { remote, value: value.0, peer, queue, flags, ..Default::default() });
        self.bytes += bytes as u64;
    }
}

impl Rail for NullRail {
    fn post(&mut self, postings: &[Posting]) -> Result<usize, RailError> {
        for (taken, posting) in postings.iter().enumerate() {
            let requests = posting.bytes.div_ceil(self.max_message) + 1;
            // What the whole ring can't hold goes alone and overwrites itself, for nobody reads it.
            if self.used > 0 && self.used + requests > self.requests.len() {
                return Ok(taken);
            }
            self.build(posting);
            self.used += requests;
            let (due, completion) = (self.polls + self.delay, Completion::of(posting));
            self.under_way.push_back(UnderWay { requests, due, completion });
        }
        Ok(postings.len())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), RailError> {
        self.polls += 1;
        while let Some(first) = self.under_way.front().filter(|first| first.due <= self.polls) {
            self.used -= first.requests;
            completions.extend(first.completion);
            self.under_way.pop_front();
        }
        Ok(())
    }

    fn is_idle(&self) -> bool {
        self.under_way.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::word::Word;

    fn posting(bytes: usize, value: u64) -> Posting {
        let completion = (bytes > 0).then_some(8);
        Posting {
            peer: 1,
            queue: 2,
            source: 64,
            target: 128,
            bytes,
            word: 16,
            completion,
            value: Word(value),
        }
    }

    #[test]
    fn puts_are_cut_and_signals_follow() {
        let mut rail = NullRail::new(8, 100, 0);
        assert_eq!(rail.post(&[posting(250, 7), posting(0, 8)]), Ok(2));
        let built = |rail: &NullRail| {
            rail.requests()[..5].iter().map(|r| (r.local, r.bytes, r.flags)).collect::<Vec<_>>()
        };
        assert_eq!(built(&rail), [(64, 100, 0), (164, 100, 0), (264, 50, 2), (0, 0, 1), (0, 0, 1)]);
        assert_eq!(
            (rail.requests()[3].value, rail.requests()[4].value, rail.built(), rail.bytes()),
            (7, 8, 5, 250)
        );
    }

    #[test]
    fn room_comes_back_with_completions() {
        let mut rail = NullRail::new(4, 100, 2);
        let (postings, mut completions) = ([posting(100, 1), posting(100, 2), posting(100, 3)], Vec::new());
        assert_eq!(rail.post(&postings), Ok(2));
        assert_eq!(
            (rail.poll(&mut completions), completions.len(), rail.post(&postings[2..])),
            (Ok(()), 0, Ok(0))
        );
        assert_eq!((rail.poll(&mut completions), rail.is_idle()), (Ok(()), true));
        assert_eq!(completions, [1, 2].map(|value| Completion { offset: 8, value: Word(value) }));
        assert_eq!(rail.post(&postings[2..]), Ok(1));
    }
}
