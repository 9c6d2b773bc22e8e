//! The forwarder of dispatch: from the rail (or the own input) to the final rows (D2–D4).

use std::sync::Arc;

use super::encoder::Encoder;
use super::plan::{FinalRow, Placed, RunOffsets, local_on, locals};
use super::{Op, Port, Progress, RecvRing, both};
use crate::config::MAX_TOPK;
use crate::error::Role;
use crate::topology::MAX_RANKS_PER_NODE;
use crate::wire::ROW_ALIGN;
use crate::wire::shape::{DispatchSlot, Header, MAX_HEADER_WORDS, header_words};

/// Forwards one channel's tokens from all ranks of its rail.
pub struct Forwarder {
    op: Arc<Op>,
    channel: usize,
    incoming: Option<Vec<Incoming>>,
    finished: bool,
}

struct Incoming {
    node: usize,
    source: Source,
    /// Tokens forwarded, and how many there are.
    next: usize,
    count: usize,
    placed: Placed,
}

enum Source {
    Ring(RecvRing),
    /// Tokens for the own node skip hop 1.
    Own(RunOffsets),
    /// The pair is not open: nothing comes.
    Closed,
}

impl Forwarder {
    pub(super) fn new(op: Arc<Op>, channel: usize) -> Self {
        Self { op, channel, incoming: None, finished: false }
    }

    pub(super) fn op(&self) -> &Op {
        &self.op
    }

    pub(super) fn channel(&self) -> usize {
        self.channel
    }

    pub(super) fn step(&mut self, port: &impl Port, encoder: &mut Encoder) -> Progress {
        let (op, channel) = (&self.op, self.channel);
        let (Some(open), Some(node)) = (op.open.get(), op.node.get()) else { return Progress::Pending };
        let incoming = self.incoming.get_or_insert_with(|| {
            (0..op.nodes()).map(|source| Incoming::new(op, channel, source, open[source], port)).collect()
        });
        let rows = Rows::new(op, node.good, &node.buffers);
        let mut progress = Progress::Done;
        for source in incoming.iter_mut() {
            progress = both(progress, source.step(op, channel, &rows, port, encoder));
        }
        if progress == Progress::Done && !self.finished {
            self.finished = true;
            // What did not come from a source whose pair is closed would be missing from the plan for ever.
            if node.good && open.iter().all(|&open| open) {
                let placed = self.incoming.take().unwrap_or_default().into_iter().map(|source| source.placed);
                // A cached dispatch finds the same rows there already.
                let _ = op.plan.placed[channel].set(placed.collect());
                self.incoming = Some(Vec::new());
            }
        }
        progress
    }
}

impl Incoming {
    fn new(op: &Op, channel: usize, node: usize, open: bool, port: &impl Port) -> Self {
        let count = match (open, op.plan.arrivals.get()) {
            (true, Some(arrivals)) => arrivals.tokens(&op.config, node, channel),
            _ => 0,
        };
        let source = match (open, node == op.node_index()) {
            (false, _) => Source::Closed,
            (true, true) => Source::Own(RunOffsets::new(&op.config, node)),
            (true, false) => Source::Ring(op.recv_ring(port, channel, node)),
        };
        let placed = Placed::with_capacity(&op.config, op.shape.topk, count);
        Self { node, source, next: 0, count, placed }
    }

    /// Forwards at most a chunk.
    fn step(
        &mut self,
        op: &Op,
        channel: usize,
        rows: &Rows<'_>,
        port: &impl Port,
        encoder: &mut Encoder,
    ) -> Progress {
        let mut n = op.config.chunk_tokens.min(self.count - self.next);
        if n == 0 {
            return Progress::Done;
        }
        let run = (self.node, channel);
        match &mut self.source {
            Source::Closed => return Progress::Done,
            Source::Own(_) if !rows.good => {}
            Source::Own(offsets) => {
                let targets = op.plan.sends.targets(&op.config, channel, self.node);
                for &token in &targets[self.next..self.next + n] {
                    let mut words = [0; MAX_HEADER_WORDS];
                    let words = &mut words[..header_words(op.shape.topk)];
                    offsets.write(&op.config, &op.plan.routing, token as usize, words);
                    let (row, scales) = encoder.encode(port, token as usize);
                    let header = Header::new(&*words, op.shape.topk);
                    self.placed.push(rows.place(port, run, &Token { header, row, scales }));
                }
            }
            Source::Ring(ring) => {
                n = match ring.available(port, n, Role::Forwarder) {
                    Ok(n) => n,
                    Err(wait) => return Progress::Blocked(wait),
                };
                for _ in 0..n {
                    if rows.good {
                        let slot = port.own(ring.slot(), rows.slot.pitch);
                        let header = Header::new(bytemuck::cast_slice(&slot[..rows.slot.row]), op.shape.topk);
                        let (row, scales) =
                            (&slot[rows.slot.row..rows.slot.scales], &slot[rows.slot.scales..]);
                        self.placed.push(rows.place(port, run, &Token { header, row, scales }));
                    }
                    ring.take(1);
                }
                ring.release(port);
            }
        }
        self.next += n;
        Progress::Moved
    }
}

/// A token as it lies in a slot, or comes from the own input.
struct Token<'a> {
    header: Header<&'a [u32]>,
    row: &'a [u8],
    scales: &'a [u8],
}

/// The receive buffers of the node, by local rank.
struct Rows<'a> {
    op: &'a Op,
    good: bool,
    slot: DispatchSlot,
    buffers: &'a [super::Buffer],
}

impl<'a> Rows<'a> {
    fn new(op: &'a Op, good: bool, buffers: &'a [super::Buffer]) -> Self {
        Self { op, good, slot: op.dispatch_slot(), buffers }
    }

    /// Writes a token of the runs from (node, channel) to its final row at every local rank that wants it;
    /// those rows, ascending.
    fn place(
        &self,
        port: &impl Port,
        run: (usize, usize),
        token: &Token<'_>,
    ) -> impl Iterator<Item = FinalRow> {
        let op = self.op;
        let mut offsets = [0; MAX_RANKS_PER_NODE];
        let mut here = 0u64;
        for (&expert, &offset) in token.header.experts().iter().zip(token.header.offsets()) {
            if let Some(local) = local_on(&op.config, op.node_index(), expert) {
                offsets[local] = offset;
                here |= 1 << local;
            }
        }
        let bases = op.plan.arrivals.get().expect("E3 precedes D2").bases(&op.config, run.0, run.1);
        for local in locals(here) {
            offsets[local] += bases[local];
            self.store(port, run.0, local, offsets[local] as usize, token);
        }
        locals(here).map(move |local| FinalRow { local: local as u32, row: offsets[local] })
    }

    /// Writes a token from the own rail's rank on `node` to row `at` of `local`.
    fn store(&self, port: &impl Port, node: usize, local: usize, at: usize, token: &Token<'_>) {
        let (op, topk) = (self.op, self.op.shape.topk);
        let rank = op.node_peer(local);
        let parts = &self.buffers[local].parts;
        let store = |part: u64, bytes: &[u8]| port.store(rank, part as usize + at * bytes.len(), bytes);
        store(parts.x, token.row);
        if !token.scales.is_empty() {
            store(parts.scales, token.scales);
        }
        let (experts, weights) = self.at_rank(&token.header, rank);
        store(parts.topk_idx, bytemuck::cast_slice(&experts[..topk]));
        store(parts.topk_weights, bytemuck::cast_slice(&weights[..topk]));
        store(parts.source, bytemuck::bytes_of(&[op.rail_peer(node) as u32, token.header.token()]));
    }

    /// The token's entries as `rank` sees them: local indices and weights, −1 and 0 for experts elsewhere.
    fn at_rank(&self, header: &Header<&[u32]>, rank: usize) -> ([i32; MAX_TOPK], [u32; MAX_TOPK]) {
        let placement = &self.op.config.placement;
        let (mut experts, mut weights) = ([-1; MAX_TOPK], [0; MAX_TOPK]);
        for (k, (&expert, &weight)) in header.experts().iter().zip(header.weights()).enumerate() {
            if expert >= 0 && placement.rank_of(expert as usize) == rank {
                (experts[k], weights[k]) = (placement.local_index(expert as usize) as i32, weight);
            }
        }
        (experts, weights)
    }
}

const _: () = assert!(ROW_ALIGN.is_multiple_of(align_of::<u32>()), "headers are read as 32-bit words");
