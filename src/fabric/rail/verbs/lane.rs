//! What goes to one peer over one queue pair: in order, and never more at once than the queue pair has room for.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::c_int;

use super::chain::{Chain, Piece, Place};
use super::pair::{QueuePair, Room};
use crate::fabric::rail::Completion;
use crate::wire::posting::Posting;

/// Data that waits for one signal at most, which then says all of it: of peers that poll, and of those that sleep. The
/// cost of a message no longer shows in one as large as the first, and more would only hold back a signal. To be woken
/// takes as long as the second takes on fast networks, and costs a core's time.
const POLLED_BYTES: usize = 64 << 10;
const WOKEN_BYTES: usize = 256 << 10;

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
        while let Some(run) = Run::build(&self.outbox, ends, ends.room.requests - self.used, chain) {
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

/// Postings at the front of an outbox that go with one signal, for the last index covers the ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    postings: usize,
    /// Those of the data, and the signal.
    requests: usize,
}

/// Postings whose data goes by one write, for it lies one behind the other at the peer; or one posting, by as many writes
/// as it takes.
#[derive(Debug, Clone, Copy)]
struct Write {
    first: usize,
    postings: usize,
    bytes: usize,
}

impl Write {
    /// From the posting `first` on, of one word; no more than `most` bytes if there are several.
    fn at(outbox: &VecDeque<Posting>, first: usize, most: usize, ends: &Ends) -> Self {
        let Posting { target, word, bytes, .. } = outbox[first];
        let mut write = Self { first, postings: 1, bytes };
        for next in outbox.range(first + 1..) {
            let bytes = write.bytes + next.bytes;
            let has_data = write.bytes > 0 && next.bytes > 0;
            let is_behind = has_data && next.word == word && next.target == target + write.bytes;
            let fits = write.postings < ends.room.pieces && bytes <= most.min(ends.max_message);
            if !(is_behind && fits) {
                break;
            }
            write = Self { first, postings: write.postings + 1, bytes };
        }
        write
    }

    fn build(self, outbox: &VecDeque<Posting>, ends: &Ends, chain: &mut Chain) {
        let Posting { source, target, .. } = outbox[self.first];
        let piece = |source: usize, bytes: usize| {
            let Place { address, key } = ends.source.at(source);
            Piece { address, bytes: bytes as u32, key }
        };
        if self.postings > 1 {
            let postings = outbox.range(self.first..self.first + self.postings);
            let pieces = postings.map(|posting| piece(posting.source, posting.bytes));
            return chain.put(pieces, ends.target.at(target));
        }
        for done in (0..self.bytes).step_by(ends.max_message) {
            let bytes = ends.max_message.min(self.bytes - done);
            chain.put(std::iter::once(piece(source + done, bytes)), ends.target.at(target + done));
        }
    }
}

impl Run {
    /// The first run of which `room` requests are enough for something, appended to `chain`.
    fn build(outbox: &VecDeque<Posting>, ends: &Ends, room: usize, chain: &mut Chain) -> Option<Self> {
        let word = outbox.front()?.word;
        let mut left = if ends.wakes { WOKEN_BYTES } else { POLLED_BYTES };
        let mut run = Self { postings: 0, requests: 1 };
        while outbox.get(run.postings).is_some_and(|next| next.word == word) {
            let write = Write::at(outbox, run.postings, left, ends);
            let requests = run.requests + write.bytes.div_ceil(ends.max_message);
            if requests > room || (run.postings > 0 && write.bytes > left) {
                break;
            }
            write.build(outbox, ends, chain);
            run = Self { postings: run.postings + write.postings, requests };
            left = left.saturating_sub(write.bytes);
        }
        let last = outbox[run.postings.checked_sub(1)?];
        chain.signal(last.value.0, ends.target.at(last.word), ends.wakes);
        Some(run)
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

    /// What goes first of `outbox`: how many postings, by how many requests.
    fn first(ends: &Ends, outbox: &[Posting]) -> (usize, usize) {
        let mut chain = Chain::new(ends.room.requests);
        let outbox = outbox.iter().copied().collect();
        let run = Run::build(&outbox, ends, ends.room.requests, &mut chain);
        assert_eq!(run.map_or(0, |run| run.requests), chain.len());
        run.map_or((0, 0), |run| (run.postings, run.requests))
    }

    #[test]
    fn what_lies_one_behind_the_other_at_the_peer_goes_by_one_write() {
        let first = |outbox: &[Posting]| first(&ENDS, outbox);
        assert_eq!(first(&[put(0, 100, 8), put(100, 200, 8), put(300, 1, 8)]), (3, 2));
        assert_eq!(
            first(&[put(0, 100, 8), put(100, 1, 8), put(101, 1, 8), put(102, 1, 8)]),
            (4, 3),
            "pieces"
        );
        assert_eq!(first(&[put(0, 600, 8), put(600, 401, 8)]), (2, 3), "too large");
        assert_eq!(first(&[put(0, 100, 8), put(100, 200, 16)]), (1, 2), "another word");
        assert_eq!(first(&[put(0, 100, 8), put(200, 200, 8)]), (2, 3), "not behind");
        assert_eq!(first(&[put(0, 100, 8), put(100, 0, 8)]), (2, 2), "no data");
        assert_eq!(
            first(&[put(0, 0, 8), put(0, 100, 8), put(100, 100, 8)]),
            (3, 2),
            "no data, and then some"
        );
        assert_eq!(first(&[put(0, 2000, 8), put(2000, 100, 8)]), (2, 4), "cut, and behind");
        assert_eq!(first(&[put(0, 0, 8); 7]), (7, 1), "the last index says it all");
        assert_eq!(first(&[put(0, 2001, 8)]), (1, 4), "cut");
        assert_eq!(first(&[]), (0, 0));
    }

    #[test]
    fn a_signal_waits_for_so_much_data_and_no_more() {
        let ends = Ends { max_message: 1 << 30, ..ENDS };
        let apart: Vec<_> = (0..6).map(|i| put(i << 20, 60_000, 8)).collect();
        assert_eq!(first(&ends, &apart), (1, 2));
        assert_eq!(first(&Ends { wakes: true, ..ends }, &apart), (4, 5));
        assert_eq!(first(&ends, &[put(0, 1 << 20, 8), put(1 << 20, 1, 8)]), (1, 2), "more than that at once");
        let room = Room { requests: 3, pieces: 3 };
        assert_eq!(first(&Ends { wakes: true, room, ..ends }, &apart), (2, 3), "as far as there is room");
        assert_eq!(first(&Ends { room: Room { requests: 1, pieces: 3 }, ..ends }, &apart), (0, 0));
    }
}
