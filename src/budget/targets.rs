//! Where tokens go: expected distinct target nodes and ranks, in closed form.

use super::Workload;

/// Nodes of a contiguous placement with equally many experts: `larger` of their ranks own one more than `share`.
#[derive(Debug, Clone, Copy)]
struct Group {
    nodes: usize,
    ranks: usize,
    larger: usize,
    share: usize,
}

impl Group {
    fn experts(&self) -> usize {
        self.ranks * self.share + self.larger
    }
}

/// The probability that `topk` distinct experts of `experts` hit one of the `owned`: 1 − C(E − e, k) / C(E, k).
fn hit(experts: usize, owned: usize, topk: usize) -> f64 {
    let missed = |i| experts.saturating_sub(owned + i) as f64 / (experts - i) as f64;
    if owned == 0 { 0.0 } else { 1.0 - (0..topk).map(missed).product::<f64>() }
}

/// ln C(n, k) for n up to `most`.
fn ln_choose(most: usize) -> impl Fn(usize, usize) -> f64 {
    let mut factorials = vec![0.0];
    (1..=most).for_each(|n| factorials.push(factorials[n - 1] + (n as f64).ln()));
    move |n, k| factorials[n] - factorials[k] - factorials[n - k]
}

/// Expected distinct targets of a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Targets {
    /// Nodes, the own one included.
    pub nodes: f64,
    /// Nodes that hop 1 leads to.
    pub remote_nodes: f64,
    /// Ranks, the own one included.
    pub ranks: f64,
}

impl Workload {
    /// Nodes with equally many experts, as contiguous placement leaves them; those without any are no targets.
    fn groups(&self) -> [Group; 3] {
        let (nodes, ranks) = (self.topology.nodes(), self.topology.ranks_per_node());
        let world = self.topology.world_size();
        let (share, more) = (self.experts / world, self.experts % world);
        let (full, rest) = (more / ranks, more % ranks);
        let partial = usize::from(rest > 0);
        let group = |nodes, larger| {
            let nodes = if ranks * share + larger > 0 { nodes } else { 0 };
            Group { nodes, ranks, larger, share }
        };
        [group(nodes - full - partial, 0), group(partial, rest), group(full, ranks)]
    }

    /// Experts of the `limit` nodes with the fewest.
    pub(super) fn fewest_experts(&self, mut limit: usize) -> usize {
        let mut experts = 0;
        for group in self.groups() {
            let taken = limit.min(group.nodes);
            experts += taken * group.experts();
            limit -= taken;
        }
        experts
    }

    /// Where a token goes, on average.
    pub fn targets(&self) -> Targets {
        let (groups, topk) = (self.groups(), self.shape.topk);
        let nodes = groups.iter().map(|group| group.nodes).sum();
        let limit = self.node_limit.unwrap_or(nodes).min(nodes);
        let ln_choose = ln_choose(nodes);
        let mut targets = Targets { nodes: 0.0, remote_nodes: 0.0, ranks: 0.0 };
        // A token's nodes: how many of each group, with the probability of that.
        for partial in 0..=groups[1].nodes.min(limit) {
            for full in 0..=groups[2].nodes.min(limit - partial) {
                let taken = [limit - partial - full, partial, full];
                if taken[0] > groups[0].nodes {
                    continue;
                }
                let ways: f64 = groups.iter().zip(taken).map(|(group, n)| ln_choose(group.nodes, n)).sum();
                let probability = (ways - ln_choose(nodes, limit)).exp();
                let experts = groups.iter().zip(taken).map(|(group, n)| n * group.experts()).sum();
                for (group, taken) in groups.iter().zip(taken).filter(|(_, taken)| *taken > 0) {
                    let hit = |owned| hit(experts, owned, topk);
                    let ranks = group.larger as f64 * hit(group.share + 1)
                        + (group.ranks - group.larger) as f64 * hit(group.share);
                    targets.nodes += probability * taken as f64 * hit(group.experts());
                    targets.ranks += probability * taken as f64 * ranks;
                }
            }
        }
        let nodes = self.topology.nodes() as f64;
        targets.remote_nodes = targets.nodes * (nodes - 1.0) / nodes;
        targets
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{ExpertPlacement, Topology};
    use crate::wire::shape::{RowFormat, RowShape};

    fn workload(
        [nodes, ranks]: [usize; 2],
        experts: usize,
        topk: usize,
        node_limit: Option<usize>,
    ) -> Workload {
        let shape = RowShape { hidden: 64, topk, format: RowFormat::Bf16 };
        let topology = Topology::new(nodes, ranks).unwrap();
        Workload { node_limit, ..Workload::new(topology, shape, experts, 1) }
    }

    /// Adds the targets of a token at home on each node that has `chosen` experts, with their `weight`.
    fn add(sums: &mut Targets, workload: &Workload, chosen: &[usize], weight: f64) {
        let topology = workload.topology;
        let placement = ExpertPlacement::contiguous(workload.experts, topology.world_size());
        let mut ranks: Vec<_> = chosen.iter().map(|&expert| placement.rank_of(expert)).collect();
        ranks.sort_unstable();
        ranks.dedup();
        sums.ranks += weight * ranks.len() as f64;
        let mut nodes: Vec<_> = ranks.into_iter().map(|rank| topology.node_of(rank)).collect();
        nodes.dedup();
        sums.nodes += weight * nodes.len() as f64;
        let homes = topology.nodes();
        let remote: usize = (0..homes).map(|home| nodes.iter().filter(|&&node| node != home).count()).sum();
        sums.remote_nodes += weight * remote as f64 / homes as f64;
    }

    #[track_caller]
    fn assert_near(a: Targets, b: Targets, error: f64, what: &Workload) {
        for (a, b) in [(a.nodes, b.nodes), (a.remote_nodes, b.remote_nodes), (a.ranks, b.ranks)] {
            assert!((a - b).abs() < error, "{a} is not {b}: {what:?}");
        }
    }

    /// All subsets of `size` of `of`.
    fn subsets(of: &[usize], size: usize) -> Vec<Vec<usize>> {
        let masks = (0_u32..1 << of.len()).filter(|mask| mask.count_ones() as usize == size);
        masks.map(|mask| (0..of.len()).filter(|i| mask >> i & 1 != 0).map(|i| of[i]).collect()).collect()
    }

    #[test]
    fn closed_forms_are_what_enumeration_counts() {
        let worlds = [[1, 1], [1, 3], [2, 2], [3, 2], [4, 1], [4, 3]];
        for (world, experts) in worlds.into_iter().flat_map(|world| (1..=12).map(move |e| (world, e))) {
            let nodes = world[0];
            for (topk, limit) in (1..=4).flat_map(|topk| (1..=nodes).map(move |limit| (topk, limit))) {
                let workload = workload(world, experts, topk, Some(limit));
                if workload.check().is_err() {
                    continue;
                }
                let placement = ExpertPlacement::contiguous(experts, workload.topology.world_size());
                let mut sums = Targets { nodes: 0.0, remote_nodes: 0.0, ranks: 0.0 };
                let node = |expert| workload.topology.node_of(placement.rank_of(expert));
                let owners: Vec<_> = (0..nodes).filter(|&n| (0..experts).any(|e| node(e) == n)).collect();
                let choices = subsets(&owners, limit.min(owners.len()));
                for chosen in &choices {
                    let candidates: Vec<_> = (0..experts).filter(|&e| chosen.contains(&node(e))).collect();
                    let tokens = subsets(&candidates, topk);
                    let weight = 1.0 / (choices.len() * tokens.len()) as f64;
                    tokens.iter().for_each(|token| add(&mut sums, &workload, token, weight));
                }
                assert_near(workload.targets(), sums, 1e-9, &workload);
            }
        }
    }

    #[test]
    fn closed_forms_are_what_random_tokens_have() {
        const TOKENS: usize = 20_000;
        let mut state = 1_u64;
        let mut below = |n: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % n
        };
        let mut draw = |mut from: Vec<usize>, n: usize| {
            for i in 0..n {
                let j = i + below(from.len() - i);
                from.swap(i, j);
            }
            from.truncate(n);
            from
        };
        for (world, experts, limit) in
            [([4, 8], 256, None), ([8, 8], 256, Some(4)), ([3, 5], 100, Some(2)), ([64, 8], 640, Some(4))]
        {
            let workload = workload(world, experts, 8, limit);
            let placement = ExpertPlacement::contiguous(experts, workload.topology.world_size());
            let node = |&expert: &usize| workload.topology.node_of(placement.rank_of(expert));
            let mut sums = Targets { nodes: 0.0, remote_nodes: 0.0, ranks: 0.0 };
            for _ in 0..TOKENS {
                let nodes = draw((0..world[0]).collect(), limit.unwrap_or(world[0]));
                let candidates = (0..experts).filter(|expert| nodes.contains(&node(expert))).collect();
                add(&mut sums, &workload, &draw(candidates, 8), 1.0 / TOKENS as f64);
            }
            assert_near(workload.targets(), sums, 0.03, &workload);
        }
    }

    #[test]
    fn a_limit_of_all_nodes_is_none() {
        for limit in [8, 9, usize::MAX] {
            let limited = workload([8, 8], 250, 8, Some(limit)).targets();
            assert_eq!(limited, workload([8, 8], 250, 8, None).targets());
        }
    }
}
