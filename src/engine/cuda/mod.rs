//! The engine of ranks on devices: launches kernels whose roles mirror `proto`, behind the seam of
//! [`Driver`](crate::device::Driver).
//!
//! Host threads do little: whoever starts an operation fills its parameters and enqueues its kernels; a *monitor*
//! looks at the reports in pinned memory and ends what has ended; a proxy per rank drains its commands where there
//! are rails. Nothing here waits for a kernel but the caller of `wait`. A world has all its ranks in one process, or each
//! in one of its own (`process`).

mod monitor;
mod plan;
mod process;
mod rank;
mod recording;
mod report;
mod request;
mod start;

pub use plan::{Counts, DevicePlan};
pub use recording::Recording;
pub use request::{Request, Sink, Source};
pub use start::Run;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::FAREWELL;
use super::completion::lock;
use super::control::{Control, Counted};
use super::mesh::{Host, LaneWaits, MeshThread};
use crate::config::{Config, Cuda, EngineKind};
use crate::device::Driver;
use crate::device::cuda::ImportedMemory;
use crate::error::{ConfigError, Error, Fault};
use crate::wire::region::{LANES, RegionMap};
use monitor::Monitor;
use process::Network;
use rank::Rank;

/// What the ranks of a process share.
pub struct World {
    /// The configuration, equal on all ranks.
    pub config: Arc<Config>,
    /// The map of every region.
    pub map: Arc<RegionMap>,
    /// The control channel.
    pub control: Arc<Control>,
    cuda: Cuda,
    /// Hop 1 between processes; none where there is none. Dropped before the rank that it serves.
    network: Option<Network>,
    /// Those of this process, by rank: all of them, or one.
    ranks: BTreeMap<usize, Rank>,
    /// What its kernels reach of other processes.
    _neighbours: Vec<ImportedMemory>,
    stop: AtomicBool,
    /// Recordings that may be executed at any time.
    recordings: AtomicUsize,
    /// Whether there was one: then ranks may have started operations that the host did not count.
    uncounted: AtomicBool,
    bell: Arc<MonitorBell>,
}

/// Wakes the monitor, once there is one.
#[derive(Default)]
struct MonitorBell(OnceLock<thread::Thread>);

impl MonitorBell {
    fn ring(&self) {
        if let Some(monitor) = self.0.get() {
            monitor.unpark();
        }
    }
}

/// What a world is made of.
struct Parts {
    config: Arc<Config>,
    map: Arc<RegionMap>,
    control: Arc<Control>,
    cuda: Cuda,
    network: Option<Network>,
    ranks: BTreeMap<usize, Rank>,
    neighbours: Vec<ImportedMemory>,
    bell: Arc<MonitorBell>,
}

/// The threads of a world. Dropping it ends what is under way, and stops them.
pub struct Engine {
    world: Arc<World>,
    monitor: Option<JoinHandle<()>>,
    /// Where the other ranks are in other processes.
    mesh: Option<MeshThread>,
}

impl Engine {
    /// The engine of a world whose ranks are on the devices of `drivers`, in rank order.
    ///
    /// # Errors
    /// The configuration asks for more than the devices have, or one of them refuses.
    pub fn new(config: Config, drivers: Vec<Arc<dyn Driver>>) -> Result<Self, Error> {
        let cuda = settings(&config)?;
        let world_size = config.topology().world_size();
        let others = "each rank needs a driver";
        ConfigError::check(drivers.len() == world_size, "drivers", drivers.len(), others, Some(world_size))?;
        let map = Arc::new(RegionMap::new(&config));
        let config = Arc::new(config);
        rank::check_devices(&config, &cuda, &drivers)?;
        let make = |(rank, driver)| Ok((rank, Rank::new(&config, &map, rank, driver)?));
        let ranks = drivers.into_iter().enumerate().map(make).collect::<Result<BTreeMap<_, _>, Error>>()?;
        for rank in ranks.values() {
            rank.connect_to(&ranks)?;
        }
        let control = Arc::new(Control::new(world_size));
        let (neighbours, bell) = (Vec::new(), Arc::default());
        Self::start(Parts { config, map, control, cuda, network: None, ranks, neighbours, bell })
    }

    /// Starts the threads of a world whose ranks are connected.
    fn start(parts: Parts) -> Result<Self, Error> {
        let world = Arc::new(World::new(parts));
        let mut engine = Self { world: world.clone(), monitor: None, mesh: None };
        world.ranks.values().try_for_each(|rank| world.open(rank))?;
        if let Some(mesh) = world.control.mesh() {
            let host: Weak<dyn Host> = Arc::downgrade(&(world.clone() as Arc<dyn Host>));
            let thread = MeshThread::spawn(mesh.clone(), host);
            let refused = |error| ConfigError::refused("mesh", mesh.world_size(), error);
            engine.mesh = Some(thread.map_err(refused)?);
        }
        let run = move || Monitor::new(&world).run();
        let thread = thread::Builder::new().name("railhop-monitor".into()).spawn(run);
        let thread = thread.map_err(|error| ConfigError::refused("monitor", 0, error))?;
        let _ = engine.world.bell.0.set(thread.thread().clone());
        engine.monitor = Some(thread);
        Ok(engine)
    }

    /// What the ranks share.
    pub fn world(&self) -> &Arc<World> {
        &self.world
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Kernels that wait are told to return; the monitor ends what they were in.
        if !self.world.is_idle() {
            self.world.abort();
        }
        self.world.stop.store(true, Ordering::Release);
        self.world.bell.ring();
        if let Some(monitor) = self.monitor.take() {
            let _ = monitor.join();
        }
        self.world.leave_network();
        for rank in self.world.ranks.values() {
            // A proxy that has failed has said so in a fault.
            let _ = rank.close(Duration::ZERO);
            rank.forget_runs();
        }
        self.mesh = None;
    }
}

/// What the configuration says of devices.
fn settings(config: &Config) -> Result<Cuda, ConfigError> {
    let EngineKind::Cuda(cuda) = config.engine.clone() else {
        let reason = "the configuration asks for the host engine".into();
        return Err(ConfigError { field: "engine", value: 0, reason, nearest: None });
    };
    check(&cuda)?;
    Ok(cuda)
}

fn check(cuda: &Cuda) -> Result<(), ConfigError> {
    let check =
        |ok, field, value, reason, nearest| ConfigError::check(ok, field, value, reason, Some(nearest));
    check(!cuda.devices.is_empty(), "devices", 0, "ranks need a device", 1)?;
    let warps = "a block has 1 to 16 warps";
    check((1..=16).contains(&cuda.warps), "warps", cuda.warps, warps, cuda.warps.clamp(1, 16))?;
    check((1..=16).contains(&cuda.plan_warps), "plan_warps", cuda.plan_warps, warps, 16)?;
    check(cuda.blocks > 0, "blocks", 0, "no block would run", 1)?;
    let two = "one warp can't serve the two roles of an operation";
    check(cuda.blocks * cuda.warps >= 2, "warps", cuda.warps, two, 2)?;
    for staging in [cuda.dispatch, cuda.combine] {
        let (bytes, stages) = (staging.stage_bytes, staging.stages);
        let units = "a stage is a positive multiple of 256 bytes";
        check(
            bytes > 0 && bytes.is_multiple_of(256),
            "stage_bytes",
            bytes,
            units,
            bytes.next_multiple_of(256).max(256),
        )?;
        let power = "a warp has a power-of-two number of stages, at least 2";
        check(
            stages >= 2 && stages.is_power_of_two(),
            "stages",
            stages,
            power,
            stages.next_power_of_two().max(2),
        )?;
    }
    Ok(())
}

impl World {
    fn new(parts: Parts) -> Self {
        let Parts { config, map, control, cuda, network, ranks, neighbours, bell } = parts;
        Self {
            config,
            map,
            control,
            cuda,
            network,
            ranks,
            _neighbours: neighbours,
            stop: AtomicBool::new(false),
            recordings: AtomicUsize::new(0),
            uncounted: AtomicBool::new(false),
            bell,
        }
    }

    /// A rank of this process.
    fn rank(&self, rank: usize) -> &Rank {
        &self.ranks[&rank]
    }

    /// `rank` is gone: whoever still waits for it gets a fault.
    pub fn depart(&self, rank: usize) {
        self.control.leave(rank, self.rank(rank).started());
        self.bell.ring();
    }

    /// Collective: ends the rank's operations, meets all ranks, raises the generation and starts anew.
    ///
    /// # Errors
    /// Not all ranks come within the deadline, or a device has failed.
    pub fn reset(&self, rank: usize) -> Result<(), Error> {
        let (this, deadline) = (self.rank(rank), self.config.deadline);
        // Operations have an end: they complete, or a wait of theirs expires.
        while !this.is_idle() {
            thread::sleep(Duration::from_millis(1));
        }
        // Before anybody starts anew nothing of the old generation may be on its way. A proxy that has failed carries
        // nothing any more.
        let _ = this.close(deadline);
        if let Some(network) = &self.network {
            let started = Instant::now();
            let missing = network.drain(started + deadline);
            if !missing.is_empty() {
                return Err(Error::ResetIncomplete { missing, after: started.elapsed() });
            }
        }
        self.control.reset(rank, deadline)?;
        // All have drained: whatever comes of the old generation has come to this process.
        self.network.as_ref().map_or(Ok(()), Network::settle)?;
        self.open(this)
    }

    /// Starts a generation of `rank`.
    fn open(&self, rank: &Rank) -> Result<(), Error> {
        let rail = match &self.network {
            _ if self.config.topology().nodes() == 1 => None,
            Some(network) => Some(network.rail()),
            None => Some(rank.rail(&self.ranks, self.cuda.rails)?),
        };
        rank.open(self.control.generation(), rail, &self.cuda.proxy_cores)
    }

    /// What was sent to other processes arrives before this one is gone, unless something is amiss anyway.
    fn leave_network(&self) {
        let Some(network) = self.network.as_ref().filter(|_| self.control.fault().is_none()) else { return };
        let limit = FAREWELL.min(self.config.deadline);
        let end = Instant::now() + limit;
        let closed = self.ranks.values().try_for_each(|rank| rank.close(limit));
        let late = network.drain(end);
        if closed.is_err() || !late.is_empty() {
            tracing::warn!(ranks = ?late, ?closed, "left before these ranks were known to have everything");
        }
    }

    /// The address of an offset in the region of `rank`, for its own kernels.
    pub fn address(&self, rank: usize, offset: usize) -> u64 {
        self.rank(rank).addresses.region + offset as u64
    }

    fn is_idle(&self) -> bool {
        self.ranks.values().all(Rank::is_idle)
    }

    /// Tells the kernels of this process to return.
    fn abort(&self) {
        self.ranks.values().for_each(Rank::abort);
    }

    /// The runs under way in this process, by rank and lane.
    fn runs(&self) -> impl Iterator<Item = Arc<start::Run>> {
        let lanes = self.ranks.values().flat_map(|rank| LANES.map(|lane| (rank, lane)));
        lanes.flat_map(|(rank, lane)| lock(rank.lane(lane)).runs.iter().cloned().collect::<Vec<_>>())
    }
}

impl Host for World {
    fn adopt(&self, fault: &Fault, generation: u16) {
        if self.control.adopt(fault, generation) {
            self.abort();
            self.bell.ring();
        }
    }

    fn closed(&self, rank: usize, farewell: Option<Counted>) {
        if let Some(started) = farewell {
            self.control.note_farewell(rank, started);
        }
        self.control.close(rank);
        self.bell.ring();
    }

    fn fault(&self) -> Option<(u16, Arc<Fault>)> {
        Some((self.control.generation(), self.control.fault()?))
    }

    fn waits(&self) -> Option<LaneWaits> {
        // Where the mesh asks there is one rank.
        self.ranks.values().next().and_then(Rank::waits)
    }
}

/// Polls until `done`, giving the core away; whether it came in time.
fn poll(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    while !done() {
        if started.elapsed() > limit {
            return false;
        }
        thread::sleep(Duration::from_micros(50));
    }
    true
}
