//! The reducer of combine: the nodes' partial sums become the token's row at its home rank (C2, C3).

use std::sync::Arc;

use half::bf16;

use super::combine_forwarder::Outputs;
use super::{Input, Op, Port, Progress, RecvRing};
use crate::config::MAX_TOPK;
use crate::error::{Role, Wait};
use crate::numeric::{Reduction, reduce};

/// Reduces one channel's tokens, in their order.
pub struct Reducer {
    op: Arc<Op>,
    channel: usize,
    nodes: Option<Vec<Contribution>>,
    /// The next token, and the end of the channel's.
    next: usize,
    end: usize,
    sum: Vec<bf16>,
}

/// What one node contributes, ascending nodes.
struct Contribution {
    node: usize,
    /// None for the own node, whose rows are read in place.
    ring: Option<RecvRing>,
    /// Index of the next token among those the node has.
    next: usize,
}

impl Reducer {
    pub(super) fn new(op: Arc<Op>, channel: usize) -> Self {
        let range = op.config.channel_range(channel, op.plan.routing.tokens());
        let sum = vec![bf16::ZERO; op.shape.hidden];
        Self { op, channel, nodes: None, next: range.start, end: range.end, sum }
    }

    pub(super) fn step(&mut self, port: &impl Port) -> Progress {
        let (op, channel) = (self.op.clone(), self.channel);
        let (Some(open), Some(world)) = (op.open.get(), op.world.get()) else { return Progress::Pending };
        let nodes = self.nodes.get_or_insert_with(|| {
            // A node that is not open or has a bad verdict sends nothing.
            let sends = (0..op.nodes()).filter(|&node| open[node] && world.good[node]);
            let ring = |node| (node != op.node_index()).then(|| op.recv_ring(port, channel, node));
            sends.map(|node| Contribution { node, ring: ring(node), next: 0 }).collect()
        });
        if world.result.is_err() {
            return drain(&op, channel, nodes, port);
        }
        let mut result = Ok(());
        let stop = self.end.min(self.next + op.config.chunk_tokens);
        let start = self.next;
        while self.next < stop && result.is_ok() {
            result = self.reduce(port, self.next);
            self.next += usize::from(result.is_ok());
        }
        for ring in self.nodes.iter_mut().flatten().filter_map(|node| node.ring.as_mut()) {
            ring.release(port);
        }
        match result {
            _ if self.next > start => Progress::Moved,
            Ok(()) => Progress::Done,
            Err(wait) => Progress::Blocked(wait),
        }
    }

    /// C2 for one token.
    fn reduce(&mut self, port: &impl Port, token: usize) -> Result<(), Wait> {
        let op = &*self.op;
        let nodes = self.nodes.as_mut().expect("set by step");
        let has = |node: &Contribution| {
            op.plan.sends.targets(&op.config, self.channel, node.node).get(node.next) == Some(&(token as u32))
        };
        for node in nodes.iter_mut().filter(|node| has(node)) {
            if let Some(ring) = &mut node.ring {
                ring.available(port, 1, Role::Reducer)?;
            }
        }
        let outputs = Outputs::new(op, &op.node.get().expect("E3 precedes E4").buffers);
        let slot = op.combine_slot();
        let mut own: [&[bf16]; MAX_TOPK] = [&[]; MAX_TOPK];
        let mut remote: [&[bf16]; MAX_TOPK] = [&[]; MAX_TOPK];
        let mut weights = [0f32; MAX_TOPK];
        let weights = &mut weights[..op.weights];
        let (mut own_rows, mut before, mut partials): (&[&[bf16]], _, _) = (&[], 0, 0);
        for node in nodes.iter_mut().filter(|node| has(node)) {
            match &mut node.ring {
                Some(ring) => {
                    let bytes = port.own(ring.slot(), slot.pitch);
                    let sums = bytemuck::cast_slice::<u8, f32>(&bytes[..4 * op.weights]);
                    weights.iter_mut().zip(sums).for_each(|(sum, partial)| *sum += partial);
                    remote[partials] = bytemuck::cast_slice(&bytes[slot.row..]);
                    partials += 1;
                    ring.take(1);
                }
                None => {
                    let placed =
                        op.plan.placed[self.channel].get().expect("checked when the operation starts");
                    let places = placed[node.node].rows(node.next);
                    let mut node_weights = [0f32; MAX_TOPK];
                    outputs.add_weights(port, places, &mut node_weights[..op.weights]);
                    weights.iter_mut().zip(&node_weights).for_each(|(sum, partial)| *sum += partial);
                    own_rows = outputs.rows(port, places, &mut own);
                    before = partials;
                }
            }
            node.next += 1;
        }
        let bias = match port.input() {
            Input::Bf16(bias) => Some(&bias[token * op.shape.hidden..][..op.shape.hidden]),
            _ => None,
        };
        let (before, after) = remote[..partials].split_at(before);
        reduce(&Reduction { before, own: own_rows, after, bias }, &mut self.sum);
        port.emit(token, &self.sum, weights);
        Ok(())
    }
}

/// C3.
fn drain(op: &Op, channel: usize, nodes: &mut [Contribution], port: &impl Port) -> Progress {
    let mut progress = Progress::Done;
    for node in nodes {
        let left = op.plan.sends.targets(&op.config, channel, node.node).len() - node.next;
        let Some(ring) = node.ring.as_mut().filter(|_| left > 0) else { continue };
        let step = match ring.available(port, left, Role::Reducer) {
            Ok(n) => {
                ring.take(n);
                ring.release(port);
                node.next += n;
                Progress::Moved
            }
            Err(wait) => Progress::Blocked(wait),
        };
        progress = super::both(progress, step);
    }
    progress
}
