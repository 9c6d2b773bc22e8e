//! The forwarder of combine: a node's sum for each token of its rail, on its way home (C1).

use std::sync::Arc;

use half::bf16;

use super::plan::FinalRow;
use super::{Buffer, Op, Port, Progress, SendRing, both};
use crate::config::MAX_TOPK;
use crate::error::Role;
use crate::numeric::{Reduction, reduce};

/// Sums and puts one channel's tokens for all home ranks of its rail.
pub struct CombineForwarder {
    op: Arc<Op>,
    channel: usize,
    homes: Option<Vec<Home>>,
    sum: Vec<bf16>,
}

struct Home {
    node: usize,
    ring: SendRing,
    /// Tokens sent, and how many there are.
    next: usize,
    count: usize,
}

impl CombineForwarder {
    pub(super) fn new(op: Arc<Op>, channel: usize) -> Self {
        let sum = vec![bf16::ZERO; op.shape.hidden];
        Self { op, channel, homes: None, sum }
    }

    pub(super) fn op(&self) -> &Op {
        &self.op
    }

    pub(super) fn channel(&self) -> usize {
        self.channel
    }

    pub(super) fn step(&mut self, port: &impl Port) -> Progress {
        let (op, channel) = (&self.op, self.channel);
        let (Some(open), Some(node)) = (op.open.get(), op.node.get()) else { return Progress::Pending };
        if !node.good {
            return Progress::Done;
        }
        let homes = self.homes.get_or_insert_with(|| {
            let homes = op.remote_nodes().filter(|&home| open[home]);
            homes.filter_map(|home| Home::new(op, channel, home, port)).collect()
        });
        let outputs = Outputs::new(op, &node.buffers);
        let mut progress = Progress::Done;
        for home in homes {
            progress = both(progress, home.step(op, channel, &outputs, port, &mut self.sum));
        }
        progress
    }
}

impl Home {
    fn new(op: &Op, channel: usize, node: usize, port: &impl Port) -> Option<Self> {
        let count = op.plan.arrivals.get()?.tokens(&op.config, node, channel);
        let ring = || op.send_ring(port, channel, node);
        (count > 0).then(|| Self { node, ring: ring(), next: 0, count })
    }

    /// Sends at most a chunk.
    fn step(
        &mut self,
        op: &Op,
        channel: usize,
        outputs: &Outputs<'_>,
        port: &impl Port,
        sum: &mut [bf16],
    ) -> Progress {
        let n = self.ring.contiguous(op.config.chunk_tokens.min(self.count - self.next));
        if n == 0 {
            return Progress::Done;
        }
        if let Err(wait) = self.ring.credit(port, n, Role::Forwarder) {
            return Progress::Blocked(wait);
        }
        let placed = &op.plan.placed[channel].get().expect("checked when the operation starts")[self.node];
        let padding = [0; 4];
        for ahead in 0..n {
            let places = placed.rows(self.next + ahead);
            let mut rows: [&[bf16]; MAX_TOPK] = [&[]; MAX_TOPK];
            let rows = outputs.rows(port, places, &mut rows);
            reduce(&Reduction { before: &[], own: rows, after: &[], bias: None }, sum);
            let mut weights = [0f32; MAX_TOPK];
            let weights = &mut weights[..op.weights];
            outputs.add_weights(port, places, weights);
            let padding = &padding[..(op.combine_slot().row - size_of_val(weights)) / 4];
            let parts: [&[u8]; 3] =
                [bytemuck::cast_slice(weights), bytemuck::cast_slice(padding), bytemuck::cast_slice(sum)];
            port.put(self.ring.peer(), self.ring.slot(ahead), &parts);
        }
        self.ring.publish(port, n);
        self.next += n;
        Progress::Moved
    }
}

/// The experts' outputs at the ranks of the node, read in place.
pub(super) struct Outputs<'a> {
    op: &'a Op,
    buffers: &'a [Buffer],
}

impl<'a> Outputs<'a> {
    pub(super) fn new(op: &'a Op, buffers: &'a [Buffer]) -> Self {
        Self { op, buffers }
    }

    /// The rows at `places`, in their order.
    pub(super) fn rows<'r, 'p>(
        &self,
        port: &'p impl Port,
        places: &[FinalRow],
        rows: &'r mut [&'p [bf16]; MAX_TOPK],
    ) -> &'r [&'p [bf16]] {
        let bytes = self.op.shape.row_bytes();
        for (row, place) in rows.iter_mut().zip(places) {
            let buffer = &self.buffers[place.local as usize];
            let at = buffer.parts.x as usize + place.row as usize * bytes;
            *row = bytemuck::cast_slice(port.peer(self.op.node_peer(place.local as usize), at, bytes));
        }
        &rows[..places.len()]
    }

    /// Adds the weights at `places`, in their order, to `sums` (empty where none were asked for).
    pub(super) fn add_weights(&self, port: &impl Port, places: &[FinalRow], sums: &mut [f32]) {
        if sums.is_empty() {
            return;
        }
        let bytes = size_of_val(sums);
        for place in places {
            let buffer = &self.buffers[place.local as usize];
            let at = buffer.parts.topk_weights as usize + place.row as usize * bytes;
            let weights = port.peer(self.op.node_peer(place.local as usize), at, bytes);
            sums.iter_mut()
                .zip(bytemuck::cast_slice::<u8, f32>(weights))
                .for_each(|(sum, weight)| *sum += weight);
        }
    }
}
