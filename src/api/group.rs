//! Some of a world's ranks, as a way to build another world from them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::communicator::Communicator;
use crate::bootstrap::{Bootstrap, BootstrapError, Operation, Step};
use crate::engine::Engine;
use crate::engine::mesh::{Absent, Gather, Mesh};
use crate::error::ConfigError;

/// The longest wait there is; longer ones would overflow the clock.
const MAX_DEADLINE: Duration = Duration::from_secs(366 * 24 * 3600);

/// Some ranks of a world of processes, which exchange bytes over the connections they have: what a smaller world, or one
/// of several, is built from. It works whatever has become of the other ranks and of the world's operations.
pub struct Group {
    mesh: Arc<Mesh>,
    // Listens for it.
    _engine: Arc<Engine>,
    /// In the order of the group.
    ranks: Vec<usize>,
    rank: usize,
    id: u64,
    steps: u64,
}

impl Communicator {
    /// The group of `ranks`, this one among them; its own ranks are their places in that order. All of them make it,
    /// with the same order: the survivors of a fault, say, to build a world without the rank that the fault names.
    ///
    /// # Errors
    /// `ranks` lacks this rank, names one twice or one that is not in the world, or the world is not one of processes.
    pub fn group(&mut self, ranks: &[usize]) -> Result<Group, ConfigError> {
        let control = self.world.control();
        let check = |ok, value, reason| ConfigError::check(ok, "ranks", value, reason, None);
        check(control.mesh().is_some(), ranks.len(), "only a world of processes has groups")?;
        let mesh = control.mesh().expect("checked").clone();
        let mut sorted = ranks.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        check(sorted.len() == ranks.len(), ranks.len(), "a rank is named twice")?;
        let last = sorted.last().copied().unwrap_or(0);
        check(last < mesh.world_size(), last, "there is no such rank")?;
        let place = ranks.iter().position(|&rank| rank == self.rank());
        check(place.is_some(), self.rank(), "the group lacks this rank")?;
        let id = self.groups.next(ranks);
        let rank = place.unwrap_or_default();
        Ok(Group { mesh, _engine: self.engine().clone(), ranks: ranks.to_vec(), rank, id, steps: 0 })
    }
}

/// The groups made so far: each has a number of its own, the same on all its ranks.
#[derive(Debug, Default)]
pub(super) struct Groups(HashMap<Vec<usize>, u64>);

impl Groups {
    fn next(&mut self, ranks: &[usize]) -> u64 {
        let made = self.0.entry(ranks.to_vec()).or_default();
        *made += 1;
        let mut hasher = blake3::Hasher::new();
        for number in ranks.iter().map(|&rank| rank as u64).chain([*made]) {
            hasher.update(&number.to_le_bytes());
        }
        u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().expect("32 bytes"))
    }
}

impl Bootstrap for Group {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.ranks.len()
    }

    fn own_address(&self) -> Option<IpAddr> {
        self.mesh.own_address()
    }

    fn all_gather(&mut self, mine: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>, BootstrapError> {
        let gather = Gather { group: self.id, step: self.steps };
        self.steps += 1;
        let end = Instant::now() + deadline.min(MAX_DEADLINE);
        let place = |rank| self.ranks.iter().position(|&other| other == rank).unwrap_or_default();
        self.mesh.gather(gather, &self.ranks, mine, end).map_err(|absent| match absent {
            Absent::Lost(rank) => BootstrapError::Lost { rank: place(rank) },
            Absent::Late(ranks) => BootstrapError::Missing {
                ranks: ranks.into_iter().map(place).collect(),
                step: Step { operation: Operation::Gather, number: gather.step },
                after: deadline,
            },
        })
    }
}
