//! The plan: from every rank's routing to every row's final place, by counting. No sort, no atomics: the order
//! at a rank is by (source rank, source token).

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::config::Config;
use crate::error::{Reason, Tensor};
use crate::wire::record::CountBlock;
use crate::wire::shape::{Header, check_topk};

/// "No rank" in [`Routing`], "no row" in [`Placed`].
const NONE: u32 = u32::MAX;

/// The number of tokens whose `topk_idx` has so many entries, and `topk_weights` so many weights.
pub fn check_sizes(config: &Config, topk: usize, entries: usize, weights: usize) -> Result<usize, Reason> {
    check_topk(topk, config)?;
    let tokens = entries / topk;
    Tensor::TopkIdx.check_size(tokens * topk, entries)?;
    Tensor::TopkWeights.check_size(entries, weights)?;
    Ok(tokens)
}

/// A rank's routing, checked: which experts each of its tokens goes to, with which weights.
#[derive(Debug)]
pub struct Routing {
    tokens: usize,
    topk: usize,
    experts: Vec<i32>,
    weights: Arc<[f32]>,
}

impl Routing {
    /// Checks `topk_idx` [T, K] (−1 = masked) and `topk_weights` [T, K].
    pub fn new(config: &Config, topk: usize, topk_idx: &[i64], weights: Arc<[f32]>) -> Result<Self, Reason> {
        let tokens = check_sizes(config, topk, topk_idx.len(), weights.len())?;
        let num_experts = config.placement.num_experts() as i64;
        if let Some(at) = topk_idx.iter().position(|&expert| !(-1..num_experts).contains(&expert)) {
            let (token, k) = ((at / topk) as u64, (at % topk) as u64);
            let num_experts = num_experts as u64;
            return Err(Reason::ExpertOutOfRange { token, k, expert: topk_idx[at], num_experts });
        }
        Ok(Self { tokens, topk, experts: topk_idx.iter().map(|&expert| expert as i32).collect(), weights })
    }

    /// A routing of no tokens: what a poisoned rank enters with.
    pub fn empty(topk: usize) -> Self {
        Self { tokens: 0, topk, experts: Vec::new(), weights: Arc::new([]) }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Entries per token.
    pub fn topk(&self) -> usize {
        self.topk
    }

    fn of(&self, token: usize) -> (&[i32], &[f32]) {
        let entries = token * self.topk..(token + 1) * self.topk;
        (&self.experts[entries.clone()], &self.weights[entries])
    }
}

/// What a rank knows of its own tokens: which node wants which, and the counts to tell them.
#[derive(Debug)]
pub struct Sends {
    /// By `channel * nodes + node`: the channel's tokens that the node wants, ascending.
    targets: Vec<Vec<u32>>,
    /// By node: the count block for it.
    counts: Vec<Vec<u32>>,
}

impl Sends {
    fn new(config: &Config, layout: &CountBlock, routing: &Routing) -> Self {
        let nodes = config.topology.nodes();
        let mut sends = Self {
            targets: vec![Vec::new(); config.channels * nodes],
            counts: vec![vec![0; layout.words]; nodes],
        };
        let experts = ExpertSlots::new(config);
        for channel in 0..config.channels {
            for token in config.channel_range(channel, routing.tokens) {
                sends.count(config, layout, &experts, channel, token, routing.of(token).0);
            }
        }
        sends.targets.iter_mut().for_each(Vec::shrink_to_fit);
        for (index, targets) in sends.targets.iter().enumerate() {
            sends.counts[index % nodes][layout.tokens(index / nodes)] = targets.len() as u32;
        }
        sends
    }

    fn count(
        &mut self,
        config: &Config,
        layout: &CountBlock,
        slots: &ExpertSlots,
        channel: usize,
        token: usize,
        experts: &[i32],
    ) {
        let nodes = config.topology.nodes();
        let mut ranks = [NONE; crate::config::MAX_TOPK];
        for (k, &expert) in experts.iter().enumerate().filter(|(_, expert)| **expert >= 0) {
            let rank = config.placement.rank_of(expert as usize);
            let (node, local) = (config.topology.node_of(rank), config.topology.local_of(rank));
            self.counts[node][layout.experts() + slots.0[expert as usize] as usize] += 1;
            if !ranks[..k].contains(&(rank as u32)) {
                self.counts[node][layout.rows(channel, local)] += 1;
            }
            ranks[k] = rank as u32;
            let targets = &mut self.targets[channel * nodes + node];
            if targets.last() != Some(&(token as u32)) {
                targets.push(token as u32);
            }
        }
    }

    /// The channel's tokens that `node` wants, ascending.
    pub fn targets(&self, config: &Config, channel: usize, node: usize) -> &[u32] {
        &self.targets[channel * config.topology.nodes() + node]
    }

    /// The count block for `node`.
    pub fn counts(&self, node: usize) -> &[u32] {
        &self.counts[node]
    }
}

/// Position of each expert in the expert part of its node's count block.
struct ExpertSlots(Vec<u32>);

impl ExpertSlots {
    fn new(config: &Config) -> Self {
        let mut slots = vec![0; config.placement.num_experts()];
        for node in 0..config.topology.nodes() {
            let ranks = (0..config.topology.ranks_per_node()).map(|local| config.topology.rank(node, local));
            let experts = ranks.flat_map(|rank| config.placement.experts_of(rank));
            experts.enumerate().for_each(|(slot, &expert)| slots[expert as usize] = slot as u32);
        }
        Self(slots)
    }

    /// The experts of `rank` in its node's block.
    fn of_rank(config: &Config, rank: usize) -> Range<usize> {
        let first_of_node = config.topology.node_of(rank) * config.topology.ranks_per_node();
        let start = (first_of_node..rank).map(|rank| config.placement.experts_of(rank).len()).sum();
        start..start + config.placement.experts_of(rank).len()
    }
}

/// What a rank knows of what its node will receive.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Arrivals {
    /// By `(source node * channels + channel)`: tokens that come along the own rail.
    tokens: Vec<u32>,
    /// By `(source node * channels + channel) * ranks_per_node + local`: first row, at that local rank, of
    /// the run that comes from the own rail's rank on that node by that channel.
    base: Vec<u32>,
    /// By local rank: rows it will receive.
    rows: Vec<u64>,
    /// Entries for each expert of the own rank.
    experts: Vec<u32>,
}

impl Arrivals {
    /// From the count blocks of all ranks, in rank order, for this node; `None` for ranks that send nothing.
    pub fn new<'a>(
        config: &Config,
        layout: &CountBlock,
        rank: usize,
        blocks: impl Iterator<Item = Option<&'a [u32]>>,
    ) -> Self {
        let (topology, channels) = (config.topology, config.channels);
        let ranks = topology.ranks_per_node();
        let mine = ExpertSlots::of_rank(config, rank);
        let mut arrivals = Self {
            tokens: vec![0; topology.nodes() * channels],
            base: vec![0; topology.nodes() * channels * ranks],
            rows: vec![0; ranks],
            experts: vec![0; mine.len()],
        };
        for (source, block) in blocks.enumerate() {
            let Some(block) = block else { continue };
            let counts = &block[layout.experts()..][mine.clone()];
            arrivals.experts.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            let on_rail = topology.local_of(source) == topology.local_of(rank);
            for channel in 0..channels {
                let run = topology.node_of(source) * channels + channel;
                if on_rail {
                    arrivals.tokens[run] = block[layout.tokens(channel)];
                }
                for local in 0..ranks {
                    if on_rail {
                        arrivals.base[run * ranks + local] = arrivals.rows[local] as u32;
                    }
                    arrivals.rows[local] += u64::from(block[layout.rows(channel, local)]);
                }
            }
        }
        arrivals
    }

    /// Tokens of `channel` that come from the own rail's rank on `node`.
    pub fn tokens(&self, config: &Config, node: usize, channel: usize) -> usize {
        self.tokens[node * config.channels + channel] as usize
    }

    /// By local rank, the first row of the run from `node` by `channel`.
    pub fn bases(&self, config: &Config, node: usize, channel: usize) -> &[u32] {
        let ranks = config.topology.ranks_per_node();
        &self.base[(node * config.channels + channel) * ranks..][..ranks]
    }

    /// Rows that local rank `local` receives.
    pub fn rows(&self, local: usize) -> u64 {
        self.rows[local]
    }

    /// Entries for each expert of the own rank, ascending ids.
    pub fn experts(&self) -> &[u32] {
        &self.experts
    }
}

/// A row of a token at a rank of the own node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FinalRow {
    /// The local rank.
    pub local: u32,
    /// The row in its receive buffer.
    pub row: u32,
}

/// The final rows of the tokens that one channel forwarded from one node, token by token in arrival order.
#[derive(Debug)]
pub struct Placed {
    /// Rows kept per token: a token has at most min(topk, ranks per node) on a node.
    fan: usize,
    rows: Vec<FinalRow>,
}

impl Placed {
    /// Room for `tokens` tokens.
    pub fn with_capacity(config: &Config, topk: usize, tokens: usize) -> Self {
        let fan = topk.min(config.topology.ranks_per_node());
        Self { fan, rows: Vec::with_capacity(tokens * fan) }
    }

    /// Adds the next token's rows, ascending local rank.
    pub fn push(&mut self, rows: impl Iterator<Item = FinalRow>) {
        let end = self.rows.len() + self.fan;
        self.rows.extend(rows);
        debug_assert!(self.rows.len() <= end);
        self.rows.resize(end, FinalRow { local: NONE, row: NONE });
    }

    /// The rows of the `index`th token, ascending local rank: the order of the sum.
    pub fn rows(&self, index: usize) -> &[FinalRow] {
        let rows = &self.rows[index * self.fan..][..self.fan];
        let len = rows.iter().position(|row| row.local == NONE).unwrap_or(self.fan);
        &rows[..len]
    }
}

/// A plan. `arrivals` are known once counts have been exchanged, `placed` once rows have been dispatched.
#[derive(Debug)]
pub struct Plan {
    /// The communicator it belongs to.
    pub communicator: u64,
    /// The generation it was made in.
    pub generation: u16,
    /// The epoch of the operation that made it.
    pub epoch: u64,
    /// The rank's routing.
    pub routing: Routing,
    /// What the rank sends.
    pub sends: Sends,
    /// What the node receives.
    pub arrivals: OnceLock<Arrivals>,
    /// By channel, then source node: where the rows went.
    pub placed: Vec<OnceLock<Vec<Placed>>>,
}

impl Plan {
    /// Counts `routing`.
    pub fn new(config: &Config, layout: &CountBlock, id: (u64, u16, u64), routing: Routing) -> Self {
        let (communicator, generation, epoch) = id;
        let sends = Sends::new(config, layout, &routing);
        let placed = (0..config.channels).map(|_| OnceLock::new()).collect();
        Self { communicator, generation, epoch, routing, sends, arrivals: OnceLock::new(), placed }
    }

    /// Whether every channel's rows have been dispatched, so that combine knows where they are.
    pub fn is_dispatched(&self) -> bool {
        self.placed.iter().all(|placed| placed.get().is_some())
    }
}

/// Rows seen so far in each (source, channel, destination) run of one node; gives the offsets of headers.
#[derive(Debug)]
pub struct RunOffsets {
    node: usize,
    seen: Vec<u32>,
}

impl RunOffsets {
    /// The start of a channel's runs to `node`.
    pub fn new(config: &Config, node: usize) -> Self {
        Self { node, seen: vec![0; config.topology.ranks_per_node()] }
    }

    /// Writes the header of the run's next token.
    pub fn write(&mut self, config: &Config, routing: &Routing, token: usize, header: &mut [u32]) {
        let mut header = Header::new(header, routing.topk);
        header.set_token(token as u32);
        let (experts, weights) = routing.of(token);
        let mut here = 0u64;
        for (k, (&expert, weight)) in experts.iter().zip(weights).enumerate() {
            let local = local_on(config, self.node, expert);
            header.set_entry(k, expert, weight.to_bits(), local.map_or(0, |local| self.seen[local]));
            here |= local.map_or(0, |local| 1 << local);
        }
        locals(here).for_each(|local| self.seen[local] += 1);
    }
}

/// The local rank that owns `expert`, if it is on `node`.
pub fn local_on(config: &Config, node: usize, expert: i32) -> Option<usize> {
    let rank = config.placement.rank_of(usize::try_from(expert).ok()?);
    (config.topology.node_of(rank) == node).then(|| config.topology.local_of(rank))
}

/// The set bits of a mask of local ranks, ascending. 64 bits are enough: `MAX_RANKS_PER_NODE`.
pub fn locals(mask: u64) -> impl Iterator<Item = usize> {
    let next = |&rest: &u64| (rest & (rest - 1) != 0).then_some(rest & rest.wrapping_sub(1));
    std::iter::successors((mask != 0).then_some(mask), next).map(|rest| rest.trailing_zeros() as usize)
}

const _: () = assert!(crate::topology::MAX_RANKS_PER_NODE == u64::BITS as usize);

impl Config {
    /// Bytes of metadata that a handle keeps at a rank for `tokens` tokens of its own with `topk` entries, of
    /// which `forwarded` (over all source nodes, its own included) pass this rank on hop 1 or leave it for
    /// its own node: O(tokens), beside the region.
    pub fn handle_bytes(&self, tokens: usize, topk: usize, forwarded: usize) -> usize {
        let fan = topk.min(self.topology.ranks_per_node());
        let targets = tokens * topk.min(self.topology.nodes()) * size_of::<u32>();
        tokens * topk * 2 * size_of::<u32>() + targets + forwarded * fan * size_of::<FinalRow>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locals_are_the_set_bits() {
        assert_eq!(locals(0).count(), 0);
        assert_eq!(locals(1 | 1 << 5 | 1 << 63).collect::<Vec<_>>(), [0, 5, 63]);
    }
}
