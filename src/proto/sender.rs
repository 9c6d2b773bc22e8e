//! The sender of dispatch: hop 1 (D1, D2).

use std::sync::Arc;

use super::encoder::Encoder;
use super::plan::RunOffsets;
use super::{Op, Port, Progress, SendRing, both};
use crate::error::{Role, Wait};
use crate::wire::region::{Lane, WordId};
use crate::wire::shape::{MAX_HEADER_WORDS, header_words};
use crate::wire::word::{Index, Word};

use super::ring::RingEnd;

/// Puts one channel's tokens on the rail. Each remote node has its own cursor: none waits for another.
pub struct Sender {
    op: Arc<Op>,
    channel: usize,
    outgoing: Option<Vec<Outgoing>>,
}

struct Outgoing {
    node: usize,
    ring: SendRing,
    offsets: RunOffsets,
    /// Index of the next token among those the node wants.
    next: usize,
    /// D2 holds.
    pitch_agreed: bool,
}

impl Sender {
    pub(super) fn new(op: Arc<Op>, channel: usize) -> Self {
        Self { op, channel, outgoing: None }
    }

    pub(super) fn step(&mut self, port: &impl Port, encoder: &mut Encoder) -> Progress {
        let Some(open) = self.op.open.get() else { return Progress::Pending };
        let (op, channel) = (&self.op, self.channel);
        let outgoing = self.outgoing.get_or_insert_with(|| {
            let wanted =
                |node: &usize| open[*node] && !op.plan.sends.targets(&op.config, channel, *node).is_empty();
            op.remote_nodes().filter(wanted).map(|node| Outgoing::new(op, channel, node, port)).collect()
        });
        let mut progress = Progress::Done;
        for peer in outgoing {
            progress = both(progress, peer.step(op, channel, port, encoder));
        }
        progress
    }
}

impl Outgoing {
    fn new(op: &Op, channel: usize, node: usize, port: &impl Port) -> Self {
        let ring = op.send_ring(port, channel, node);
        Self { node, ring, offsets: RunOffsets::new(&op.config, node), next: 0, pitch_agreed: false }
    }

    fn step(&mut self, op: &Op, channel: usize, port: &impl Port, encoder: &mut Encoder) -> Progress {
        let targets = op.plan.sends.targets(&op.config, channel, self.node);
        let n = op.config.chunk_tokens.min(targets.len() - self.next);
        if n == 0 {
            return Progress::Done;
        }
        let ready =
            op.agree_on_pitch(port, channel, self.node, &mut self.ring, &mut self.pitch_agreed, Role::Sender);
        if let Err(wait) = ready.and_then(|()| self.ring.credit(port, n, Role::Sender)) {
            return Progress::Blocked(wait);
        }
        for ahead in 0..n {
            let token = targets[self.next + ahead] as usize;
            let mut header = [0; MAX_HEADER_WORDS];
            let header = &mut header[..header_words(op.shape.topk)];
            self.offsets.write(&op.config, &op.plan.routing, token, header);
            let (row, scales) = encoder.encode(port, token);
            port.put(self.ring.peer(), self.ring.slot(ahead), &[bytemuck::cast_slice(header), row, scales]);
        }
        self.ring.publish(port, n);
        self.next += n;
        Progress::Moved
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
    pub(super) fn recv_ring(&self, port: &impl Port, channel: usize, node: usize) -> super::RecvRing {
        let own = self.node_index();
        let slots_at = self.map.ring(self.lane(), channel, node, own);
        let words = (
            WordId::Tail { channel, node },
            WordId::Head { channel, node: own },
            WordId::Taken { channel, node },
        );
        super::RecvRing::new(port, self.ring_end(channel, node, slots_at, words))
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

    /// D2: with another pitch, slots would overlap others that the receiver has not read yet.
    pub(super) fn agree_on_pitch(
        &self,
        port: &impl Port,
        channel: usize,
        node: usize,
        ring: &mut SendRing,
        agreed: &mut bool,
        role: Role,
    ) -> Result<(), Wait> {
        if *agreed {
            return Ok(());
        }
        let word = self.word(WordId::Pitch { channel, node });
        let pitch = Word::new(self.generation, Index::new(self.pitch() as u64)).0;
        if port.load(word) != pitch {
            ring.is_drained(port, role)?;
            port.set(word, pitch);
        }
        *agreed = true;
        Ok(())
    }
}

const _: () = assert!(Lane::Dispatch as usize == 0 && Lane::Combine as usize == 1);
