//! Worlds: of ranks that are threads of one process, and of processes.

#![allow(unsafe_code)] // `with_fabric` has a contract.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::communicator::Communicator;
use crate::bootstrap::{Bootstrap, LocalBootstrap};
use crate::config::{Config, EngineKind};
use crate::device::Driver;
use crate::device::cuda::CudaDriver;
use crate::engine::join::JoinError;
use crate::engine::{Engine, cuda, host};
use crate::error::Error;
use crate::fabric::Fabric;

/// Tells communicators of different worlds apart, so that handles and buffers can't be mixed up.
static NEXT_WORLD: AtomicU64 = AtomicU64::new(1);

/// All ranks of an in-process world, several "nodes" included. Any number of worlds coexist in a process.
pub struct LocalWorld {
    communicators: Vec<Communicator>,
}

impl LocalWorld {
    /// Takes the memory of all ranks and starts the engine that the configuration names.
    ///
    /// # Errors
    /// The system refuses the memory or the threads; [`Error::Device`] where the devices can't be used.
    pub fn new(config: Config) -> Result<Self, Error> {
        let EngineKind::Cuda(cuda) = &config.engine else {
            return Ok(Self::of(Engine::Host(host::Engine::new(config, |fabric| fabric)?)));
        };
        let open = |rank| CudaDriver::open(cuda.device(rank)).map(|driver| driver as Arc<dyn Driver>);
        let drivers = (0..config.topology().world_size()).map(open).collect::<Result<_, _>>()?;
        Self::on_drivers(config, drivers)
    }

    /// As [`LocalWorld::new`], on the host with another fabric around the local one: for fault injection.
    ///
    /// # Safety
    /// The fabric writes nothing but what it is told to: it may delay or lose puts and signals, and panic.
    ///
    /// # Errors
    /// As [`LocalWorld::new`].
    pub unsafe fn with_fabric(
        config: Config,
        wrap: impl FnOnce(Arc<dyn Fabric>) -> Arc<dyn Fabric>,
    ) -> Result<Self, Error> {
        Ok(Self::of(Engine::Host(host::Engine::new(config, wrap)?)))
    }

    /// As [`LocalWorld::new`], on the CUDA engine over these drivers, in rank order: for devices that are not reached
    /// by the CUDA driver, such as a simulated one.
    ///
    /// # Errors
    /// As [`LocalWorld::new`].
    pub fn on_drivers(config: Config, drivers: Vec<Arc<dyn Driver>>) -> Result<Self, Error> {
        Ok(Self::of(Engine::Cuda(cuda::Engine::new(config, drivers)?)))
    }

    /// As [`LocalWorld::new`], but every rank has an engine of its own and reaches the others as it would reach other
    /// processes: to try out and to test, without any, what [`ProcessWorld`] does.
    ///
    /// # Errors
    /// See [`JoinError`].
    pub fn apart(config: Config) -> Result<Self, JoinError> {
        let ranks = LocalBootstrap::world(config.topology().world_size());
        let join = |mut rank: LocalBootstrap| ProcessWorld::join(&mut rank, config.clone());
        let communicators: Result<_, _> = thread::scope(|scope| {
            let ranks: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(|| join(rank))).collect();
            ranks.into_iter().map(|rank| rank.join().expect("a rank panicked")).collect()
        });
        Ok(Self { communicators: communicators? })
    }

    fn of(engine: Engine) -> Self {
        let world_size = engine.world().config().topology().world_size();
        let (engine, id) = (Arc::new(engine), next_world());
        Self { communicators: (0..world_size).map(|rank| Communicator::new(&engine, id, rank)).collect() }
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

/// A world whose ranks are processes, one rank each.
///
/// Ranks of a node share memory, without a name and gone with the last of them; on devices, that of the devices, of which
/// each rank should have one to itself. Hop 1 is carried by what
/// [`ConfigBuilder::network`](crate::ConfigBuilder::network) says. A process that dies, stops, or is cut off ends the
/// operations of all others within the deadline, with an error that names it.
pub struct ProcessWorld;

impl ProcessWorld {
    /// Joins a world as the rank that `bootstrap` says. All ranks do so, with equal configurations; `bootstrap` is of
    /// no more use to the world after that.
    ///
    /// # Errors
    /// See [`JoinError`]. A rank that fails for itself tells the others.
    pub fn join(bootstrap: &mut dyn Bootstrap, config: Config) -> Result<Communicator, JoinError> {
        let rank = bootstrap.rank();
        let engine = match config.engine {
            EngineKind::Host => Engine::Host(host::Engine::join(bootstrap, config)?),
            EngineKind::Cuda(_) => Engine::Cuda(cuda::Engine::join(bootstrap, config)?),
        };
        Ok(Communicator::new(&Arc::new(engine), next_world(), rank))
    }
}

fn next_world() -> u64 {
    NEXT_WORLD.fetch_add(1, Ordering::Relaxed)
}
