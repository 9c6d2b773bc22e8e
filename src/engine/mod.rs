//! What runs the roles.
//!
//! - [`host`]: CPU threads drive the state machines of `proto`.
//! - [`cuda`]: kernels on devices.
//! - [`control`], [`blame`], [`completion`], [`pool`]: what both have of a world: faults and resets, who is to blame,
//!   how operations end, memory to lend.
//! - [`join`]: how a rank joins a world of processes; [`mesh`]: the control channel between them.

pub mod blame;
pub mod completion;
pub mod control;
pub mod cuda;
pub mod host;
pub mod join;
pub mod mesh;
pub mod pool;

use std::sync::Arc;
use std::time::Duration;

use crate::config::Config;
use crate::error::Error;
use crate::wire::region::RegionMap;
use control::Control;

/// How long a rank that leaves waits for what it has sent to arrive.
const FAREWELL: Duration = Duration::from_secs(5);

/// The engine of a world, with its threads.
pub enum Engine {
    /// On the host.
    Host(host::Engine),
    /// On devices.
    Cuda(cuda::Engine),
}

/// What its ranks share; it lives as long as anything that lies in their memory.
#[derive(Clone)]
pub enum World {
    /// On the host.
    Host(Arc<host::World>),
    /// On devices.
    Cuda(Arc<cuda::World>),
}

impl Engine {
    /// What its ranks share.
    pub fn world(&self) -> World {
        match self {
            Self::Host(engine) => World::Host(engine.world().clone()),
            Self::Cuda(engine) => World::Cuda(engine.world().clone()),
        }
    }
}

impl World {
    /// The configuration, equal on all ranks.
    pub fn config(&self) -> &Arc<Config> {
        match self {
            Self::Host(world) => &world.config,
            Self::Cuda(world) => &world.config,
        }
    }

    /// The map of every region.
    pub fn map(&self) -> &Arc<RegionMap> {
        match self {
            Self::Host(world) => &world.map,
            Self::Cuda(world) => &world.map,
        }
    }

    /// The control channel.
    pub fn control(&self) -> &Arc<Control> {
        match self {
            Self::Host(world) => &world.control,
            Self::Cuda(world) => &world.control,
        }
    }

    /// `rank` is gone: whoever still waits for it gets a fault.
    pub fn depart(&self, rank: usize) {
        match self {
            Self::Host(world) => world.depart(rank),
            Self::Cuda(world) => world.depart(rank),
        }
    }

    /// Collective: ends the rank's operations, meets all ranks, raises the generation.
    ///
    /// # Errors
    /// Not all ranks come within the deadline, or a device has failed.
    pub fn reset(&self, rank: usize) -> Result<(), Error> {
        match self {
            Self::Host(world) => world.reset(rank),
            Self::Cuda(world) => world.reset(rank),
        }
    }
}
