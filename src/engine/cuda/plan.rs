//! A plan in device memory.

use std::sync::{Arc, OnceLock};

use crate::config::Config;
use crate::engine::pool::{Block, Pool};
use crate::error::Error;
use crate::wire::device::HandleMap;

/// What the host learns of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts {
    /// Rows the rank receives.
    pub rows: usize,
    /// Entries for each of its experts.
    pub experts: Vec<u32>,
    /// Tokens it puts on the rail, once per remote node.
    pub sent: usize,
}

/// A plan of one rank: its tables, and its counts once they are known.
pub struct DevicePlan {
    /// The communicator it belongs to.
    pub communicator: u64,
    /// The generation it was made in.
    pub generation: u16,
    /// Tokens of the rank.
    pub tokens: usize,
    /// Entries per token.
    pub topk: usize,
    /// Where its tables are.
    pub map: HandleMap,
    /// What is known once the plan is complete.
    pub counts: OnceLock<Counts>,
    block: Block,
}

impl DevicePlan {
    /// A plan for `tokens` tokens of `topk` entries.
    ///
    /// # Errors
    /// [`Error::PoolExhausted`].
    pub fn new(
        config: &Config,
        pool: &Arc<Pool>,
        (communicator, generation): (u64, u16),
        tokens: usize,
        topk: usize,
    ) -> Result<Self, Error> {
        let forwarded = config.max_tokens * (config.topology().nodes() - 1);
        let map = HandleMap::new(config, tokens, topk, forwarded);
        let block = pool.lend(map.bytes)?;
        Ok(Self { communicator, generation, tokens, topk, map, counts: OnceLock::new(), block })
    }

    /// Where it lies in the region.
    pub fn offset(&self) -> usize {
        self.block.offset
    }
}

impl std::fmt::Debug for DevicePlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tokens, topk, counts, .. } = self;
        f.debug_struct("DevicePlan")
            .field("tokens", tokens)
            .field("topk", topk)
            .field("counts", counts)
            .finish()
    }
}
