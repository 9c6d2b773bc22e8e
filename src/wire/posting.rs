//! From a kernel's command to what its proxy posts: which bytes go where, and which words say so.

use super::command::{Command, opcode};
use super::device::COUNTS_AT;
use super::kernel::Maps;
use super::record::VerdictRecord;
use super::region::WordId;
use super::word::{Index, Word};

/// A put (of 0 bytes where there is only a signal), then a signal at the peer, and a completion at home once the put
/// has left its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Posting {
    /// The rank on the own rail that it goes to.
    pub peer: usize,
    /// Postings of one queue and peer stay in order; between queues nothing is promised.
    pub queue: usize,
    /// Offset of the data in the private memory.
    pub source: usize,
    /// Its place in the peer's region.
    pub target: usize,
    /// Its size.
    pub bytes: usize,
    /// Offset of the index word in the peer's region.
    pub word: usize,
    /// Offset of the completion in the mailbox, where there is data.
    pub completion: Option<usize>,
    /// What is written to both.
    pub value: Word,
}

impl Command {
    /// What `rank`'s proxy does for this command.
    pub fn posting(&self, maps: Maps<'_>, rank: usize, generation: u16) -> Posting {
        let (topology, lane) = (maps.config.topology(), self.lane);
        let (own, local) = (topology.node_of(rank), topology.local_of(rank));
        let (private, mailbox) = (&maps.private.lanes[lane as usize], &maps.mailbox.lanes[lane as usize]);
        let (node, channel) = (self.node, self.channel);
        let parity = self.index.since(Index::new(1)) as usize % 2;
        let (source, target, bytes, word, completion) = match self.opcode {
            opcode::CHUNK => {
                let first = self.index.since(Index::new(self.count as u64)) as usize;
                let slot = (first & (maps.config.ring_slots() - 1)) * self.pitch;
                let mirror = maps.region.ring_place(lane, channel, node - usize::from(node > own))
                    - maps.region.rings();
                let source = maps.private.send_rings + mirror + slot;
                let target = maps.region.ring(lane, channel, own, node) + slot;
                let completion = mailbox.chunks + 8 * (channel * topology.nodes() + node);
                (
                    source,
                    target,
                    self.count * self.pitch,
                    WordId::Tail { channel, node: own },
                    Some(completion),
                )
            }
            opcode::CREDIT => (0, 0, 0, WordId::Head { channel, node: own }, None),
            opcode::RAIL => {
                let counts = if self.count > 0 { 4 * maps.region.counts().words } else { 0 };
                let (source, target) =
                    (private.rails + node * maps.region.rail_bytes(), maps.region.rail(lane, parity, own));
                (
                    source,
                    target,
                    COUNTS_AT + counts,
                    WordId::Rail { node: own },
                    Some(mailbox.rails + 8 * node),
                )
            }
            _ => {
                let (target, bytes) = (maps.region.verdict(lane, parity, own), size_of::<VerdictRecord>());
                let completion = mailbox.sent_verdicts + 8 * node;
                (private.verdict, target, bytes, WordId::Verdict { node: own }, Some(completion))
            }
        };
        Posting {
            peer: topology.rank(node, local),
            queue: lane as usize * maps.config.channels() + channel,
            source,
            target,
            bytes,
            word: maps.region.word(lane, word),
            completion,
            value: Word::new(generation, self.index),
        }
    }
}
