//! Where ranks stand: nodes, rails, and which rank owns which expert.

use std::sync::Arc;

use crate::error::ConfigError;

/// The largest number of ranks inside one node (one NVLink domain).
pub const MAX_RANKS_PER_NODE: usize = 64;

/// Nodes and ranks per node of a world. `rank = node * ranks_per_node + local_rank`; the ranks with equal
/// local rank on all nodes form a *rail*.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Topology {
    nodes: usize,
    ranks_per_node: usize,
}

impl Topology {
    /// A world of `nodes` × `ranks_per_node` ranks.
    ///
    /// # Errors
    /// Either size is zero, there are more than [`MAX_RANKS_PER_NODE`] ranks in a node, or the world does
    /// not fit 32-bit ranks.
    pub fn new(nodes: usize, ranks_per_node: usize) -> Result<Self, ConfigError> {
        let refuse = |field, value, reason: &str, smallest| ConfigError {
            field,
            value: value as u64,
            reason: reason.into(),
            nearest: smallest,
        };
        if nodes == 0 {
            return Err(refuse("nodes", nodes, "a world has at least one node", Some(1)));
        }
        if ranks_per_node == 0 {
            return Err(refuse("ranks_per_node", ranks_per_node, "a node has at least one rank", Some(1)));
        }
        if ranks_per_node > MAX_RANKS_PER_NODE {
            return Err(refuse(
                "ranks_per_node",
                ranks_per_node,
                "a node has at most 64 ranks",
                Some(MAX_RANKS_PER_NODE as u64),
            ));
        }
        if nodes > u32::MAX as usize / MAX_RANKS_PER_NODE {
            return Err(refuse("nodes", nodes, "ranks are 32-bit numbers", None));
        }
        Ok(Self { nodes, ranks_per_node })
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    /// Number of ranks in each node.
    pub fn ranks_per_node(&self) -> usize {
        self.ranks_per_node
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.nodes * self.ranks_per_node
    }

    /// The rank at `local` inside `node`.
    pub fn rank(&self, node: usize, local: usize) -> usize {
        debug_assert!(node < self.nodes && local < self.ranks_per_node);
        node * self.ranks_per_node + local
    }

    /// The node of `rank`.
    pub fn node_of(&self, rank: usize) -> usize {
        rank / self.ranks_per_node
    }

    /// The index of `rank` inside its node; equal for all ranks of a rail.
    pub fn local_of(&self, rank: usize) -> usize {
        rank % self.ranks_per_node
    }
}

/// Which rank owns each *physical* expert. The caller picks replicas: a redundant expert is one more
/// physical id. The local index of an expert is its position among its rank's experts by ascending id.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ExpertPlacement {
    rank_of: Arc<[u32]>,
    local_of: Arc<[u32]>,
    experts_of: Arc<[Box<[u32]>]>,
}

impl ExpertPlacement {
    /// Contiguous ranges in rank order; the first `num_experts % world_size` ranks own one more.
    pub fn contiguous(num_experts: usize, world_size: usize) -> Self {
        let (share, extra) = (num_experts / world_size, num_experts % world_size);
        let table: Vec<usize> = (0..world_size)
            .flat_map(|rank| std::iter::repeat_n(rank, share + usize::from(rank < extra)))
            .collect();
        Self::build(&table, world_size)
    }

    /// An explicit table: `ranks[e]` owns expert `e`. Ranks may own any number of experts, none included.
    ///
    /// # Errors
    /// An entry names a rank outside the world.
    pub fn table(ranks: &[usize], world_size: usize) -> Result<Self, ConfigError> {
        match ranks.iter().position(|&rank| rank >= world_size) {
            Some(expert) => Err(ConfigError {
                field: "placement",
                value: ranks[expert] as u64,
                reason: format!("expert {expert} is placed on a rank outside the world of {world_size}"),
                nearest: Some(world_size as u64 - 1),
            }),
            None => Ok(Self::build(ranks, world_size)),
        }
    }

    fn build(ranks: &[usize], world_size: usize) -> Self {
        let mut experts_of = vec![Vec::new(); world_size];
        let mut local_of = Vec::with_capacity(ranks.len());
        for (expert, &rank) in ranks.iter().enumerate() {
            local_of.push(experts_of[rank].len() as u32);
            experts_of[rank].push(expert as u32);
        }
        Self {
            rank_of: ranks.iter().map(|&rank| rank as u32).collect(),
            local_of: local_of.into(),
            experts_of: experts_of.into_iter().map(Vec::into_boxed_slice).collect(),
        }
    }

    /// Number of physical experts.
    pub fn num_experts(&self) -> usize {
        self.rank_of.len()
    }

    /// Number of ranks the table was made for.
    pub fn world_size(&self) -> usize {
        self.experts_of.len()
    }

    /// The rank that owns `expert`.
    pub fn rank_of(&self, expert: usize) -> usize {
        self.rank_of[expert] as usize
    }

    /// The index of `expert` among its rank's experts.
    pub fn local_index(&self, expert: usize) -> usize {
        self.local_of[expert] as usize
    }

    /// The experts of `rank`, ascending.
    pub fn experts_of(&self, rank: usize) -> &[u32] {
        &self.experts_of[rank]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_rails_and_nodes() {
        let topology = Topology::new(3, 5).unwrap();
        for rank in 0..topology.world_size() {
            assert_eq!(topology.rank(topology.node_of(rank), topology.local_of(rank)), rank);
        }
        assert!(
            Topology::new(0, 1).is_err() && Topology::new(1, 0).is_err() && Topology::new(1, 65).is_err()
        );
    }

    #[test]
    fn first_ranks_own_one_more() {
        let placement = ExpertPlacement::contiguous(10, 4);
        let owned: Vec<_> = (0..4).map(|rank| placement.experts_of(rank).to_vec()).collect();
        assert_eq!(owned, [vec![0, 1, 2], vec![3, 4, 5], vec![6, 7], vec![8, 9]]);
        assert_eq!((placement.rank_of(7), placement.local_index(7)), (2, 1));
    }

    #[test]
    fn tables_are_checked() {
        assert!(ExpertPlacement::table(&[0, 3], 3).is_err());
        let placement = ExpertPlacement::table(&[2, 0, 2], 3).unwrap();
        assert_eq!(placement.experts_of(2), [0, 2]);
        assert_eq!(placement.experts_of(1), [] as [u32; 0]);
    }
}
