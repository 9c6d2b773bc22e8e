//! The engine of ranks on devices: launches kernels whose roles mirror `proto`, behind the seam of
//! [`Driver`](crate::device::Driver).
//!
//! Host threads do little: whoever starts an operation fills its parameters and enqueues its kernels; a *monitor*
//! looks at the reports in pinned memory and ends what has ended; a proxy per rank drains its commands where there
//! are rails. Nothing here waits for a kernel but the caller of `wait`.

mod monitor;
mod plan;
mod rank;
mod recording;
mod report;
mod request;
mod start;

pub use plan::{Counts, DevicePlan};
pub use recording::Recording;
pub use request::{Request, Sink, Source};
pub use start::Run;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::completion::lock;
use super::control::Control;
use crate::config::{Config, Cuda, EngineKind};
use crate::device::Driver;
use crate::error::{ConfigError, Error};
use crate::wire::region::{LANES, RegionMap};
use monitor::Monitor;
use rank::Rank;

/// What the ranks of an in-process world share.
pub struct World {
    /// The configuration, equal on all ranks.
    pub config: Arc<Config>,
    /// The map of every region.
    pub map: Arc<RegionMap>,
    /// The control channel.
    pub control: Arc<Control>,
    cuda: Cuda,
    ranks: Vec<Rank>,
    stop: AtomicBool,
    /// Recordings that may be executed at any time.
    recordings: AtomicUsize,
    /// Whether there was one: then ranks may have started operations that the host did not count.
    uncounted: AtomicBool,
    monitor: std::sync::OnceLock<thread::Thread>,
}

/// The threads of a world. Dropping it ends what is under way, and stops them.
pub struct Engine {
    world: Arc<World>,
    monitor: Option<JoinHandle<()>>,
}

impl Engine {
    /// The engine of a world whose ranks are on the devices of `drivers`, in rank order.
    ///
    /// # Errors
    /// The configuration asks for more than the devices have, or one of them refuses.
    pub fn new(config: Config, drivers: Vec<Arc<dyn Driver>>) -> Result<Self, Error> {
        let EngineKind::Cuda(cuda) = config.engine.clone() else {
            let reason = "the configuration asks for the host engine".into();
            return Err(ConfigError { field: "engine", value: 0, reason, nearest: None }.into());
        };
        check(&cuda)?;
        let map = Arc::new(RegionMap::new(&config));
        let config = Arc::new(config);
        rank::check_devices(&config, &cuda, &drivers)?;
        let make = |(rank, driver)| Rank::new(&config, &map, rank, driver);
        let ranks = drivers.into_iter().enumerate().map(make).collect::<Result<Vec<_>, _>>()?;
        Rank::connect(&ranks)?;
        let world = Arc::new(World {
            control: Arc::new(Control::new(ranks.len())),
            config,
            map,
            cuda,
            ranks,
            stop: AtomicBool::new(false),
            recordings: AtomicUsize::new(0),
            uncounted: AtomicBool::new(false),
            monitor: std::sync::OnceLock::new(),
        });
        for rank in &world.ranks {
            rank.open(world.control.generation(), &world.ranks, &world.cuda)?;
        }
        let mut engine = Self { world: world.clone(), monitor: None };
        let run = move || Monitor::new(&world).run();
        let thread = thread::Builder::new().name("railhop-monitor".into()).spawn(run);
        let thread = thread.map_err(|error| ConfigError::refused("monitor", 0, error))?;
        let _ = engine.world.monitor.set(thread.thread().clone());
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
        self.world.wake_monitor();
        if let Some(monitor) = self.monitor.take() {
            let _ = monitor.join();
        }
        for rank in &self.world.ranks {
            // A proxy that has failed has said so in a fault.
            let _ = rank.close(Duration::ZERO);
            rank.forget_runs();
        }
    }
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
    /// `rank` is gone: whoever still waits for it gets a fault.
    pub fn depart(&self, rank: usize) {
        self.control.leave(rank);
        self.wake_monitor();
    }

    /// Collective: ends the rank's operations, meets all ranks, raises the generation and starts anew.
    ///
    /// # Errors
    /// Not all ranks come within the deadline, or a device has failed.
    pub fn reset(&self, rank: usize) -> Result<(), Error> {
        let this = &self.ranks[rank];
        // Operations have an end: they complete, or a wait of theirs expires.
        while !this.is_idle() {
            thread::sleep(Duration::from_millis(1));
        }
        // Before anybody starts anew nothing of the old generation may be on its way. A proxy that has failed carries
        // nothing any more.
        let _ = this.close(self.config.deadline);
        self.control.reset(rank, self.config.deadline)?;
        this.open(self.control.generation(), &self.ranks, &self.cuda)
    }

    /// The address of an offset in the region of `rank`, for its own kernels.
    pub fn address(&self, rank: usize, offset: usize) -> u64 {
        self.ranks[rank].addresses.region + offset as u64
    }

    fn is_idle(&self) -> bool {
        self.ranks.iter().all(Rank::is_idle)
    }

    /// Tells the kernels of all ranks to return.
    fn abort(&self) {
        self.ranks.iter().for_each(Rank::abort);
    }

    fn wake_monitor(&self) {
        if let Some(monitor) = self.monitor.get() {
            monitor.unpark();
        }
    }

    /// The runs under way at all ranks, by lane.
    fn runs(&self) -> impl Iterator<Item = Arc<start::Run>> {
        let lanes = self.ranks.iter().flat_map(|rank| LANES.map(|lane| (rank, lane)));
        lanes.flat_map(|(rank, lane)| lock(rank.lane(lane)).runs.iter().cloned().collect::<Vec<_>>())
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
