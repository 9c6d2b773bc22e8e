//! Rings of chunks between two ranks, worked on through the command queue as kernels do.

use std::sync::atomic::{AtomicU64, Ordering};

use railhop::fabric::sim::Rng;
use railhop::wire::command::{Command, opcode};
use railhop::wire::region::{Lane, WordId};
use railhop::wire::word::{Index, Word};

use super::queue::Rank;

/// Slots of a ring, where the configuration says so.
pub const SLOTS: usize = 8;
const PITCH: usize = 96;
/// Just before indices wrap.
pub const FIRST: u64 = (1 << 48) - 1000;

/// One end of one stream at one rank, in both directions, as sender and forwarder warps work on it.
pub struct Stream {
    rank: &'static Rank,
    lane: Lane,
    channel: usize,
    tokens: u64,
    sent: u64,
    received: u64,
    rng: Rng,
}

impl Stream {
    pub fn new(rank: &'static Rank, lane: Lane, channel: usize, tokens: u64) -> Self {
        let rng = Rng::new((rank.rank * 16 + channel * 2) as u64 + lane as u64);
        Self { rank, lane, channel, tokens, sent: 0, received: 0, rng }
    }

    fn index(&self, word: &AtomicU64) -> u64 {
        let index = Word(word.load(Ordering::Acquire)).index_in(1).unwrap_or(Index::new(FIRST));
        index.since(Index::new(FIRST))
    }

    fn own(&self, id: WordId) -> u64 {
        self.index(self.rank.region.word(self.rank.map.word(self.lane, id)))
    }

    /// What word `i` of a token's slot holds.
    fn word(&self, from: usize, token: u64, i: usize) -> u64 {
        (token << 16 | (from << 12 | (self.lane as usize) << 8 | self.channel << 4) as u64) * 31 + i as u64
    }

    fn slot(&self, token: u64) -> usize {
        Index::new(FIRST + token).get() as usize % SLOTS * PITCH
    }

    fn push(&self, opcode: u32, count: usize, index: u64) {
        let (node, index) = (1 - self.rank.rank, Index::new(FIRST + index));
        self.rank.push(&Command {
            opcode,
            lane: self.lane,
            node,
            channel: self.channel,
            count,
            pitch: PITCH,
            index,
        });
    }

    /// As `SendEnd::room` and `publish_slots`.
    pub fn send(&mut self) {
        let (rank, node) = (self.rank, 1 - self.rank.rank);
        let head = self.own(WordId::Head { channel: self.channel, node });
        let chunks = rank.mailbox_map.lanes[self.lane as usize].chunks;
        let completed = self.index(rank.mailbox.word(chunks + 8 * (self.channel * 2 + node)));
        let room = SLOTS as u64 - (self.sent - head).max(self.sent - completed);
        let tokens = room.min(self.tokens - self.sent).min(1 + self.rng.below(4));
        let mirror = rank.map.ring_place(self.lane, self.channel, 0) - rank.map.rings();
        for token in self.sent..self.sent + tokens {
            for i in 0..PITCH / 8 {
                let at = rank.private_map.send_rings + mirror + self.slot(token) + 8 * i;
                rank.private.word(at).store(self.word(rank.rank, token, i), Ordering::Relaxed);
            }
        }
        let mut left = tokens as usize;
        while left > 0 {
            let piece = left.min(SLOTS - self.slot(self.sent) / PITCH);
            self.sent += piece as u64;
            self.push(opcode::CHUNK, piece, self.sent);
            left -= piece;
        }
    }

    pub fn receive(&mut self) {
        let (rank, node) = (self.rank, 1 - self.rank.rank);
        let tail = self.own(WordId::Tail { channel: self.channel, node });
        let end = tail.min(self.received + 1 + self.rng.below(4));
        for token in self.received..end {
            for i in 0..PITCH / 8 {
                let at = rank.map.ring(self.lane, self.channel, node, rank.rank) + self.slot(token) + 8 * i;
                let there = rank.region.word(at).load(Ordering::Relaxed);
                assert_eq!(there, self.word(node, token, i), "word {i} of token {token} of {:?}", self.lane);
            }
        }
        if end > self.received {
            self.received = end;
            self.push(opcode::CREDIT, 0, end);
        }
    }

    pub fn is_over(&self) -> bool {
        self.sent == self.tokens && self.received == self.tokens
    }
}
