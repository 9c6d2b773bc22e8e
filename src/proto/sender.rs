//! The sender of dispatch: hop 1 (D1).

use std::sync::Arc;

use super::encoder::Encoder;
use super::plan::RunOffsets;
use super::{Op, Port, Progress, SendRing, both};
use crate::error::Role;
use crate::wire::shape::{MAX_HEADER_WORDS, header_words};

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
        Self { node, ring, offsets: RunOffsets::new(&op.config, node), next: 0 }
    }

    fn step(&mut self, op: &Op, channel: usize, port: &impl Port, encoder: &mut Encoder) -> Progress {
        let targets = op.plan.sends.targets(&op.config, channel, self.node);
        let n = self.ring.contiguous(op.config.chunk_tokens.min(targets.len() - self.next));
        if n == 0 {
            return Progress::Done;
        }
        if let Err(wait) = self.ring.credit(port, n, Role::Sender) {
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
