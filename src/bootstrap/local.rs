//! The ranks of one process.

use std::sync::Arc;
use std::time::Duration;

use super::error::Operation;
use super::hub::Hub;
use super::{Bootstrap, BootstrapError};

/// A rank of a world whose ranks are threads of one process.
#[derive(Debug)]
pub struct LocalBootstrap {
    rank: usize,
    hub: Arc<Hub>,
}

impl LocalBootstrap {
    /// All ranks of a world, in order.
    pub fn world(world_size: usize) -> Vec<Self> {
        let hub = Arc::new(Hub::new(world_size));
        (0..world_size).map(|rank| Self { rank, hub: hub.clone() }).collect()
    }
}

impl Bootstrap for LocalBootstrap {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.hub.world_size()
    }

    fn all_gather(&mut self, mine: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>, BootstrapError> {
        self.hub.meet(self.rank, Operation::Gather, mine, deadline)
    }

    fn barrier(&mut self, deadline: Duration) -> Result<(), BootstrapError> {
        self.hub.meet(self.rank, Operation::Barrier, &[], deadline).map(drop)
    }
}

impl Drop for LocalBootstrap {
    fn drop(&mut self) {
        self.hub.leave(self.rank);
    }
}
