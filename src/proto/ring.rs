//! The two ends of a ring: a power-of-two number of slots in the receiver's region.
//!
//! The ordering argument, half at each end. Sender: a slot is written only under credit, that is after a load
//! of the head that the receiver published when it had read the slot's last content; its tail is signalled after
//! the slot's data, which a port keeps in order. Receiver: slots below a loaded tail hold their data; its head is
//! signalled after it has read them.
//!
//! Between operations of a lane rings are empty: a rank is done with one only when its channels have read all
//! that came, and nobody sends for the next before the receiver has entered it (E2). So the slot pitch belongs
//! to the operation and may differ from the last one's.

use super::{Op, Port};
use crate::error::{Role, Wait};
use crate::wire::region::WordId;
use crate::wire::word::{Index, Word};

/// Where a ring lies and which words belong to it, as one end sees it.
#[derive(Debug, Clone, Copy)]
pub struct RingEnd {
    /// The rank at the other end.
    pub peer: usize,
    /// Channel, for faults.
    pub channel: usize,
    /// Offset of slot 0 in the receiver's region.
    pub slots_at: usize,
    /// Number of slots, a power of two.
    pub slots: usize,
    /// Bytes from slot to slot.
    pub pitch: usize,
    /// Own word that the peer publishes (head at the sender, tail at the receiver).
    pub theirs: usize,
    /// The peer's word that this end publishes (tail at the sender, head at the receiver).
    pub ours: usize,
    /// Own private word that keeps this end's cursor between operations.
    pub kept: usize,
    /// Generation of all words.
    pub generation: u16,
    /// Where cursors start in a generation.
    pub first: Index,
}

impl RingEnd {
    fn read(&self, port: &impl Port, word: usize) -> Index {
        Word(port.load(word)).index_in(self.generation).unwrap_or(self.first)
    }

    fn publish(&self, port: &impl Port, cursor: Index) {
        let word = Word::new(self.generation, cursor).0;
        port.signal(self.peer, self.ours, word);
        port.set(self.kept, word);
    }

    fn slot(&self, cursor: Index) -> usize {
        self.slots_at + (cursor.get() as usize & (self.slots - 1)) * self.pitch
    }
}

/// The sending end. `head` is the last credit seen: it is loaded again only when credit runs out.
#[derive(Debug)]
pub struct SendRing {
    end: RingEnd,
    tail: Index,
    head: Index,
}

impl SendRing {
    /// The end as the last operation left it.
    pub fn new(port: &impl Port, end: RingEnd) -> Self {
        let (tail, head) = (end.read(port, end.kept), end.read(port, end.theirs));
        Self { end, tail, head }
    }

    /// The rank at the other end.
    pub fn peer(&self) -> usize {
        self.end.peer
    }

    /// Whether `wanted` slots are free; the wait for them if not.
    pub fn credit(&mut self, port: &impl Port, wanted: usize, role: Role) -> Result<(), Wait> {
        let free = |ring: &Self| ring.end.slots - ring.tail.since(ring.head) as usize;
        if free(self) < wanted {
            self.head = self.end.read(port, self.end.theirs);
        }
        match free(self) >= wanted {
            true => Ok(()),
            false => {
                let expected = self.tail.advance(wanted).since(Index::new(self.end.slots as u64));
                Err(Wait {
                    role,
                    channel: Some(self.end.channel),
                    peer: self.end.peer,
                    what: "credit",
                    expected,
                    seen: self.head.get(),
                })
            }
        }
    }

    /// Offset, at the peer, of the `ahead`th slot after the tail. The caller holds credit for it.
    pub fn slot(&self, ahead: usize) -> usize {
        self.end.slot(self.tail.advance(ahead))
    }

    /// How many of `wanted` slots from the tail on lie one behind the other: a chunk does not wrap around.
    pub fn contiguous(&self, wanted: usize) -> usize {
        wanted.min(self.end.slots - (self.tail.get() as usize & (self.end.slots - 1)))
    }

    /// Publishes `n` slots that have been put.
    pub fn publish(&mut self, port: &impl Port, n: usize) {
        self.tail = self.tail.advance(n);
        self.end.publish(port, self.tail);
    }
}

/// The receiving end. Slots are read from `next` on and given back up to it by [`RecvRing::release`].
#[derive(Debug)]
pub struct RecvRing {
    end: RingEnd,
    next: Index,
    head: Index,
    tail: Index,
}

impl RecvRing {
    /// The end as the last operation left it.
    pub fn new(port: &impl Port, end: RingEnd) -> Self {
        let (head, tail) = (end.read(port, end.kept), end.read(port, end.theirs));
        Self { end, next: head, head, tail }
    }

    /// The rank at the other end.
    pub fn peer(&self) -> usize {
        self.end.peer
    }

    /// How many slots can be read, at most `wanted`; the wait for the first if there is none.
    pub fn available(&mut self, port: &impl Port, wanted: usize, role: Role) -> Result<usize, Wait> {
        if self.tail.since(self.next) < wanted as u64 {
            self.tail = self.end.read(port, self.end.theirs);
        }
        match self.tail.since(self.next) as usize {
            0 => Err(Wait {
                role,
                channel: Some(self.end.channel),
                peer: self.end.peer,
                what: "tail",
                expected: self.next.advance(1).get(),
                seen: self.tail.get(),
            }),
            ready => Ok(ready.min(wanted)),
        }
    }

    /// Offset of the next slot to read. The caller knows it is available.
    pub fn slot(&self) -> usize {
        self.end.slot(self.next)
    }

    /// Moves on by `n` slots that have been read.
    pub fn take(&mut self, n: usize) {
        self.next = self.next.advance(n);
    }

    /// Returns the credit for all slots taken.
    pub fn release(&mut self, port: &impl Port) {
        if self.head != self.next {
            self.head = self.next;
            self.end.publish(port, self.head);
        }
    }
}

impl Op {
    /// The sending end of the ring to `node`.
    pub(super) fn send_ring(&self, port: &impl Port, channel: usize, node: usize) -> SendRing {
        let own = self.node_index();
        let slots_at = self.map.ring(self.lane(), channel, own, node);
        let words = (
            WordId::Head { channel, node },
            WordId::Tail { channel, node: own },
            WordId::Sent { channel, node },
        );
        SendRing::new(port, self.ring_end(channel, node, slots_at, words))
    }

    /// The receiving end of the ring from `node`.
    pub(super) fn recv_ring(&self, port: &impl Port, channel: usize, node: usize) -> RecvRing {
        let own = self.node_index();
        let slots_at = self.map.ring(self.lane(), channel, node, own);
        let words = (
            WordId::Tail { channel, node },
            WordId::Head { channel, node: own },
            WordId::Taken { channel, node },
        );
        RecvRing::new(port, self.ring_end(channel, node, slots_at, words))
    }

    fn ring_end(
        &self,
        channel: usize,
        node: usize,
        slots_at: usize,
        words: (WordId, WordId, WordId),
    ) -> RingEnd {
        let (theirs, ours, kept) = words;
        RingEnd {
            peer: self.rail_peer(node),
            channel,
            slots_at,
            slots: self.config.ring_slots,
            pitch: self.pitch(),
            theirs: self.word(theirs),
            ours: self.word(ours),
            kept: self.word(kept),
            generation: self.generation,
            first: Index::new(self.config.first_index),
        }
    }
}
