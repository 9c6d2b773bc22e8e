//! Worlds whose ranks are threads of one process.

#![allow(unsafe_code)] // `with_fabric` has a contract.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::communicator::Communicator;
use crate::config::Config;
use crate::engine::host::Engine;
use crate::error::ConfigError;
use crate::fabric::Fabric;

/// Tells communicators of different worlds apart, so that handles and buffers can't be mixed up.
static NEXT_WORLD: AtomicU64 = AtomicU64::new(1);

/// All ranks of an in-process world, several "nodes" included. Any number of worlds coexist in a process.
pub struct LocalWorld {
    communicators: Vec<Communicator>,
}

impl LocalWorld {
    /// Maps the memory of all ranks and starts the engine.
    ///
    /// # Errors
    /// The system refuses the memory or the threads.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        Self::build(config, |fabric| fabric)
    }

    /// As [`LocalWorld::new`], with another fabric around the local one: for fault injection.
    ///
    /// # Safety
    /// The fabric writes nothing but what it is told to: it may delay or lose puts and signals, and panic.
    ///
    /// # Errors
    /// As [`LocalWorld::new`].
    pub unsafe fn with_fabric(
        config: Config,
        wrap: impl FnOnce(Arc<dyn Fabric>) -> Arc<dyn Fabric>,
    ) -> Result<Self, ConfigError> {
        Self::build(config, wrap)
    }

    fn build(
        config: Config,
        wrap: impl FnOnce(Arc<dyn Fabric>) -> Arc<dyn Fabric>,
    ) -> Result<Self, ConfigError> {
        let world_size = config.topology().world_size();
        let engine = Arc::new(Engine::new(config, wrap)?);
        let id = NEXT_WORLD.fetch_add(1, Ordering::Relaxed);
        Ok(Self { communicators: (0..world_size).map(|rank| Communicator::new(&engine, id, rank)).collect() })
    }

    /// The communicators, in rank order, to be moved to the threads that use them.
    pub fn into_communicators(self) -> Vec<Communicator> {
        self.communicators
    }

    /// Runs `rank_main` on a thread per rank and returns what each came to, in rank order.
    ///
    /// # Panics
    /// If one of them panics, after all have ended.
    pub fn run<T: Send>(self, rank_main: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
        let rank_main = &rank_main;
        thread::scope(|scope| {
            let spawn = |communicator| scope.spawn(move || rank_main(communicator));
            let threads: Vec<_> = self.communicators.into_iter().map(spawn).collect();
            threads.into_iter().map(|thread| thread.join().expect("a rank panicked")).collect()
        })
    }
}
