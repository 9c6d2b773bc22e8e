//! What goes to one peer over one queue pair: in order, and never more at once than the queue pair has room for.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::c_int;

use super::chain::{Chain, Piece, Place};
use super::pair::{QueuePair, Room};
use crate::fabric::rail::Completion;
use crate::wire::posting::Posting;

/// Up to this size, data that lies one behind the other at the peer goes as one write. The cost of a message no longer
/// shows in one as large, and to gather more would only hold back the first signal.
const GATHER_BYTES: usize = 64 << 10;

/// The two memories of a lane's writes, and what a request may hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    /// The source, by the address of its first byte.
    pub(super) source: Place,
    /// The peer's region, likewise.
    pub(super) target: Place,
    /// Whether signals wake the peer.
    pub(super) wakes: bool,
    pub(super) room: Room,
    /// Bytes of one write at most.
    pub(super) max_message: usize,
}

/// One queue pair's share of what goes to a peer.
pub(super) struct Lane {
    pub(super) pair: QueuePair,
    /// Its peer, as an index into the rail's peers.
    pub(super) peer: usize,
    /// Postings that there was no room for yet. Rings bound them: a rank posts no more slots than it has credit for,
    /// and a word's next value only when the one before has had its effect, or covers it.
    outbox: VecDeque<Posting>,
    /// Requests under way.
    used: usize,
    batches: VecDeque<Batch>,
    completions: VecDeque<Completion>,
}

/// Requests that are known to be done when the last of them is.
#[derive(Debug, Clone, Copy, Default)]
struct Batch {
    requests: usize,
    completions: usize,
}

impl Lane {
    pub(super) fn new(pair: QueuePair, peer: usize) -> Self {
        Self {
            pair,
            peer,
            outbox: VecDeque::new(),
            used: 0,
            batches: VecDeque::new(),
            completions: VecDeque::new(),
        }
    }

    pub(super) fn push(&mut self, posting: Posting) {
        self.outbox.push_back(posting);
    }

    /// Whether nothing waits and nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.outbox.is_empty() && self.used == 0
    }

    /// Whether postings wait for room.
    pub(super) fn is_full(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Whether completions will have to be reported.
    pub(super) fn owes(&self) -> bool {
        !self.completions.is_empty()
    }

    /// Posts what there is room for, as one chain whose completions carry `id`; the error number where that fails.
    ///
    /// # Safety
    /// The source stays registered, and as it is, until the completion; so does its address.
    pub(super) unsafe fn flush(&mut self, chain: &mut Chain, ends: &Ends, id: u64) -> Result<(), c_int> {
        chain.clear();
        let mut open = Batch::default();
        while let Some(run) = Run::first(&self.outbox, ends) {
            if self.used + run.requests > ends.room.requests {
                break;
            }
            run.build(&self.outbox, ends, chain);
            let completions =
                self.outbox.drain(..run.postings).filter_map(|posting| Completion::of(&posting));
            let before = self.completions.len();
            self.completions.extend(completions);
            self.used += run.requests;
            open.requests += run.requests;
            open.completions += self.completions.len() - before;
            // Room comes back in parts, so that the queue pair never runs dry while it does.
            if open.completions > 0 || open.requests >= ends.room.requests / 4 {
                chain.complete(id);
                self.batches.push_back(std::mem::take(&mut open));
            }
        }
        if chain.len() == 0 {
            return Ok(());
        }
        if open.requests > 0 {
            chain.complete(id);
            self.batches.push_back(open);
        }
        // SAFETY: by contract.
        match unsafe { chain.post(&self.pair) } {
            0 => Ok(()),
            error => Err(error),
        }
    }

    /// A completion has come: the oldest batch is done.
    pub(super) fn complete(&mut self, into: &mut Vec<Completion>) {
        let Some(batch) = self.batches.pop_front() else { return };
        self.used -= batch.requests;
        into.extend(self.completions.drain(..batch.completions));
    }

    /// Ends it: what is under way and what waits are gone, and count as done.
    pub(super) fn end(&mut self, into: &mut Vec<Completion>) {
        self.pair.end();
        into.extend(self.completions.drain(..));
        into.extend(self.outbox.drain(..).filter_map(|posting| Completion::of(&posting)));
        self.batches.clear();
        self.used = 0;
    }
}

/// Postings at the front of an outbox that go as one write and one signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    postings: usize,
    bytes: usize,
    requests: usize,
}

impl Run {
    /// The first run: postings of one word whose data lies one behind the other at the peer. The last index covers the
    /// ones before it.
    fn first(outbox: &VecDeque<Posting>, ends: &Ends) -> Option<Self> {
        let first = outbox.front()?;
        let (mut postings, mut bytes) = (1, first.bytes);
        let most = GATHER_BYTES.min(ends.max_message);
        for next in outbox.iter().skip(1) {
            let same = next.word == first.word && (next.bytes > 0) == (first.bytes > 0);
            let behind = first.bytes == 0 || next.target == first.target + bytes;
            let fits = first.bytes == 0 || (postings < ends.room.pieces && bytes + next.bytes <= most);
            if !(same && behind && fits) {
                break;
            }
            postings += 1;
            bytes += next.bytes;
        }
        Some(Self { postings, bytes, requests: requests(bytes, ends.max_message) })
    }

    fn build(&self, outbox: &VecDeque<Posting>, ends: &Ends, chain: &mut Chain) {
        let (first, last) = (&outbox[0], &outbox[self.postings - 1]);
        let at = |place: Place, offset: usize| Place { address: place.address + offset as u64, ..place };
        let piece = |source: usize, bytes: usize| {
            let Place { address, key } = at(ends.source, source);
            Piece { address, bytes: bytes as u32, key }
        };
        if self.postings > 1 && self.bytes > 0 {
            let pieces =
                outbox.iter().take(self.postings).map(|posting| piece(posting.source, posting.bytes));
            chain.put(pieces, at(ends.target, first.target));
        } else {
            for done in (0..self.bytes).step_by(ends.max_message) {
                let bytes = ends.max_message.min(self.bytes - done);
                let pieces = std::iter::once(piece(first.source + done, bytes));
                chain.put(pieces, at(ends.target, first.target + done));
            }
        }
        chain.signal(last.value.0, at(ends.target, last.word), ends.wakes);
    }
}

/// Requests that a posting of `bytes` bytes takes, its signal included.
pub(super) fn requests(bytes: usize, max_message: usize) -> usize {
    bytes.div_ceil(max_message) + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::word::Word;

    const ENDS: Ends = Ends {
        source: Place { address: 0, key: 0 },
        target: Place { address: 0, key: 0 },
        wakes: false,
        room: Room { requests: 8, pieces: 3 },
        max_message: 1000,
    };

    fn put(target: usize, bytes: usize, word: usize) -> Posting {
        Posting { peer: 1, queue: 0, source: 0, target, bytes, word, completion: None, value: Word(1) }
    }

    fn first(outbox: &[Posting]) -> (usize, usize, usize) {
        let run = Run::first(&outbox.iter().copied().collect(), &ENDS).unwrap();
        (run.postings, run.bytes, run.requests)
    }

    #[test]
    fn what_lies_one_behind_the_other_at_the_peer_is_gathered() {
        assert_eq!(first(&[put(0, 100, 8), put(100, 200, 8), put(300, 1, 8)]), (3, 301, 2));
        assert_eq!(first(&[put(0, 100, 8), put(100, 1, 8), put(101, 1, 8), put(102, 1, 8)]).0, 3, "pieces");
        assert_eq!(first(&[put(0, 600, 8), put(600, 401, 8)]).0, 1, "too large");
        assert_eq!(first(&[put(0, 100, 8), put(100, 200, 16)]).0, 1, "another word");
        assert_eq!(first(&[put(0, 100, 8), put(200, 200, 8)]).0, 1, "not behind");
        assert_eq!(first(&[put(0, 100, 8), put(0, 0, 8)]).0, 1, "no data");
        assert_eq!(first(&[put(0, 0, 8); 7]), (7, 0, 1), "the last index says it all");
        assert_eq!(first(&[put(0, 2001, 8)]), (1, 2001, 4), "cut");
    }
}
