//! The host engine: a fixed pool of threads, the worker budget, drives the roles of all ranks of the process.
//!
//! A worker takes a doorbell ticket, steps every task it can lock, and sleeps on the ticket when nothing moved.
//! Nobody spins: ranks may outnumber cores many times, and ranks without an operation cost nothing.

mod port;
mod process;
mod run;
mod watch;

pub use port::{CallerBuffers, HostPort};
pub use run::Run;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::FAREWELL;
use super::blame::Inquiry;
use super::completion::lock;
use super::control::{Control, Counted};
use super::mesh::{Answer, Host, LaneWaits, MeshThread};
use crate::config::Config;
use crate::error::{Cause, ConfigError, Error, Fault, Wait, panic_message};
use crate::fabric::Fabric;
use crate::fabric::doorbell::{Bell, Doorbell};
use crate::fabric::local::LocalFabric;
use crate::fabric::memory::{Region, Regions};
use crate::fabric::rail::{Listener, RailError};
use crate::proto::{Progress, Step};
use crate::wire::region::{LANES, RegionMap};
use run::Slot;

/// Passes without progress before a worker sleeps; it yields in between, for another worker's step may end.
const IDLE_PASSES: u32 = 4;

/// The longest sleep while operations are in flight: how late an expired deadline may be noticed.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);

/// Of a world that has had no run.
const FIRST_VERSION: u64 = 1;

/// Everything the ranks of a process share.
pub struct World {
    /// The configuration, equal on all ranks.
    pub config: Arc<Config>,
    /// The map of every region.
    pub map: Arc<RegionMap>,
    /// Those that this process reaches.
    pub regions: Arc<Regions>,
    /// The control channel.
    pub control: Arc<Control>,
    fabric: Arc<dyn Fabric>,
    doorbell: Arc<dyn Bell>,
    /// Runs whose tasks are stepped, in the order they were submitted.
    active: Mutex<Vec<Arc<Run>>>,
    /// Raised with every change of `active`: workers keep a copy.
    version: AtomicU64,
    /// By rank and lane: the active run and those queued behind it. Operations of a lane are sequential.
    lanes: Vec<Mutex<VecDeque<Arc<Run>>>>,
    started: Instant,
    stop: AtomicBool,
}

/// The threads of a world. Dropping it stops them; runs still active are abandoned.
pub struct Engine {
    world: Arc<World>,
    workers: Vec<JoinHandle<()>>,
    /// Where some ranks are in other processes.
    mesh: Option<MeshThread>,
}

/// What a world is made of.
pub struct Parts {
    /// The configuration, equal on all ranks.
    pub config: Arc<Config>,
    /// The map of every region.
    pub map: Arc<RegionMap>,
    /// Those that this process reaches.
    pub regions: Arc<Regions>,
    /// The control channel.
    pub control: Arc<Control>,
    /// Wakes the workers.
    pub doorbell: Arc<dyn Bell>,
}

impl Parts {
    /// Those of a world in one process, without its regions.
    fn here(config: Config, regions: Regions) -> Self {
        let world_size = config.topology().world_size();
        Self {
            map: Arc::new(RegionMap::new(&config)),
            config: Arc::new(config),
            regions: Arc::new(regions),
            control: Arc::new(Control::new(world_size)),
            doorbell: Arc::new(Doorbell::default()),
        }
    }
}

impl Engine {
    /// Maps the regions of all ranks and starts the workers. `wrap` may put another fabric around the local
    /// one.
    ///
    /// # Errors
    /// The system refuses the memory or a thread.
    pub fn new(
        config: Config,
        wrap: impl FnOnce(Arc<dyn Fabric>) -> Arc<dyn Fabric>,
    ) -> Result<Self, ConfigError> {
        let bytes = RegionMap::new(&config).memory.region;
        let region =
            |_| Region::new(bytes).map_err(|error| ConfigError::refused("region bytes", bytes, error));
        let regions = (0..config.topology().world_size()).map(|rank| region(rank).map(Some));
        let regions = regions.collect::<Result<_, _>>()?;
        let parts = Parts::here(config, regions);
        let local = LocalFabric::new(parts.regions.clone(), parts.doorbell.clone());
        let workers = parts.config.worker_budget();
        Self::start(Arc::new(World::new(parts, |_| wrap(Arc::new(local)))), workers)
    }

    /// Starts so many workers on `world`.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start(world: Arc<World>, workers: usize) -> Result<Self, ConfigError> {
        let mut engine = Self { world: world.clone(), workers: Vec::new(), mesh: None };
        if let Some(mesh) = world.control.mesh() {
            let host: Weak<dyn Host> = Arc::downgrade(&(world.clone() as Arc<dyn Host>));
            let thread = MeshThread::spawn(mesh.clone(), host);
            engine.mesh =
                Some(thread.map_err(|error| ConfigError::refused("mesh", mesh.world_size(), error))?);
        }
        for index in 0..workers {
            let (world, name) = (world.clone(), format!("railhop-{index}"));
            let work = move || {
                Worker { world: &world, first: (index, workers), version: 0, runs: Vec::new() }.work()
            };
            let worker = thread::Builder::new().name(name).spawn(work);
            engine.workers.push(worker.map_err(|error| ConfigError::refused("worker_budget", index, error))?);
        }
        Ok(engine)
    }

    /// What the ranks share.
    pub fn world(&self) -> &Arc<World> {
        &self.world
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.world.stop.store(true, Ordering::Release);
        self.world.doorbell.ring();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
        self.mesh = None;
        // Breaks the cycle of a run that is never taken: its buffers hold the world.
        lock(&self.world.active).clear();
        self.world.lanes.iter().for_each(|lane| lock(lane).clear());
    }
}

impl World {
    /// A world of these parts. `fabric` makes what carries its puts and signals, which tells the world what it hears.
    pub fn new(parts: Parts, fabric: impl FnOnce(Arc<dyn Listener>) -> Arc<dyn Fabric>) -> Self {
        let Parts { config, map, regions, control, doorbell } = parts;
        let world_size = config.topology().world_size();
        let ears = Ears { control: control.clone(), doorbell: doorbell.clone() };
        Self {
            fabric: fabric(Arc::new(ears)),
            config,
            map,
            regions,
            control,
            doorbell,
            active: Mutex::default(),
            version: AtomicU64::new(FIRST_VERSION),
            lanes: (0..world_size * LANES.len()).map(|_| Mutex::default()).collect(),
            started: Instant::now(),
            stop: AtomicBool::new(false),
        }
    }

    fn lane(&self, run: &Run) -> &Mutex<VecDeque<Arc<Run>>> {
        &self.lanes[run.rank * LANES.len() + run.op.lane() as usize]
    }

    /// Starts `run` when the earlier runs of its rank and lane are over.
    pub fn submit(&self, run: Arc<Run>) {
        let started = run.op.started();
        tracing::debug!(rank = run.rank, kind = %started.kind, epoch = started.epoch, "operation started");
        let mut lane = lock(self.lane(&run));
        lane.push_back(run);
        if lane.len() == 1 {
            self.activate(&lane[0]);
        }
    }

    fn activate(&self, run: &Arc<Run>) {
        run.moved_at.store(self.micros(), Ordering::Relaxed);
        lock(&self.active).push(run.clone());
        self.version.fetch_add(1, Ordering::Release);
        self.doorbell.ring();
    }

    fn finish(&self, run: &Arc<Run>) {
        let result = match (run.op.result(), self.control.fault()) {
            // Every task ended of itself: the operation is complete, whatever happened since.
            (Some(result), _) if !run.was_stopped() => result.clone(),
            (_, Some(fault)) => Err(Error::Fault(fault)),
            (result, None) => result.expect("tasks end of themselves or by a fault").clone(),
        };
        let started = run.op.started();
        tracing::debug!(rank = run.rank, kind = %started.kind, epoch = started.epoch, ok = result.is_ok(), "operation over");
        lock(&self.active).retain(|other| !Arc::ptr_eq(other, run));
        self.version.fetch_add(1, Ordering::Release);
        run.completion.finish(result);
        let mut lane = lock(self.lane(run));
        lane.pop_front();
        if let Some(next) = lane.front() {
            self.activate(next);
        }
        drop(lane);
    }

    /// Whether `rank` has no run left.
    fn is_idle(&self, rank: usize) -> bool {
        LANES.iter().all(|&lane| lock(&self.lanes[rank * LANES.len() + lane as usize]).is_empty())
    }

    /// `rank` is gone: whoever still waits for it gets a fault.
    pub fn depart(&self, rank: usize) {
        // First, for whoever hears that it has left believes that nothing more comes.
        self.leave_fabric();
        // Nobody asks what was started: here every wait names its rank.
        self.control.leave(rank, Counted::default());
        self.doorbell.ring();
    }

    /// What was sent arrives before this rank is gone, unless something is amiss anyway. Without a run there was nothing:
    /// a rank that has failed to join does not wait for others.
    fn leave_fabric(&self) {
        let has_run = self.version.load(Ordering::Acquire) > FIRST_VERSION;
        if has_run && self.control.fault().is_none() {
            let late = self.fabric.drain(Instant::now() + FAREWELL.min(self.config.deadline));
            if !late.is_empty() {
                tracing::warn!(ranks = ?late, "left before these ranks were known to have everything");
            }
        }
    }

    /// Collective: ends the rank's runs, meets all ranks, raises the generation.
    ///
    /// # Errors
    /// Not all ranks come within the deadline.
    pub fn reset(&self, rank: usize) -> Result<(), Error> {
        // Runs have an end: they complete, or a wait of theirs expires.
        while !self.is_idle(rank) {
            thread::sleep(Duration::from_millis(1));
        }
        // Nothing of this generation may arrive in the next.
        let (started, deadline) = (Instant::now(), self.config.deadline);
        let missing = self.fabric.drain(started + deadline);
        if !missing.is_empty() {
            return Err(Error::ResetIncomplete { missing, after: started.elapsed() });
        }
        self.control.reset(rank, deadline)
    }

    fn micros(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    fn broadcast(&self, run: &Run, fault: Fault) {
        self.control.broadcast(fault, run.op.generation);
        self.doorbell.ring();
    }
}

impl Host for World {
    fn adopt(&self, fault: &Fault, generation: u16) {
        self.control.adopt(fault, generation);
        self.doorbell.ring();
    }

    fn closed(&self, rank: usize, _: Option<Counted>) {
        self.control.close(rank);
        self.doorbell.ring();
    }

    fn fault(&self) -> Option<(u16, Arc<Fault>)> {
        Some((self.control.generation(), self.control.fault()?))
    }

    fn waits(&self) -> Option<LaneWaits> {
        let active = lock(&self.active).clone();
        Some(watch::waits(active.iter()))
    }
}

/// What a rail tells this process's rank.
struct Ears {
    control: Arc<Control>,
    doorbell: Arc<dyn Bell>,
}

impl Listener for Ears {
    fn signalled(&self) {
        self.doorbell.ring();
    }

    fn lost(&self, peer: usize, failure: Option<RailError>) {
        self.control.lose(peer, failure.map(Cause::from));
        self.doorbell.ring();
    }
}

struct Worker<'a> {
    world: &'a World,
    /// Its index, of how many.
    first: (usize, usize),
    version: u64,
    runs: Vec<Arc<Run>>,
}

impl Worker<'_> {
    fn work(&mut self) {
        let mut idle = 0;
        loop {
            // Taken before anything is looked at, `stop` included: a ring after that ends the sleep below.
            let ticket = self.world.doorbell.ticket();
            if self.world.stop.load(Ordering::Acquire) {
                return;
            }
            self.refresh();
            let moved = self.pass();
            self.world.fabric.flush();
            if moved {
                idle = 0;
            } else if idle < IDLE_PASSES {
                idle += 1;
                thread::yield_now();
            } else {
                let longest = if self.runs.is_empty() { Duration::from_secs(3600) } else { WATCH_INTERVAL };
                self.world.doorbell.wait(ticket, longest.min(self.world.config.deadline));
            }
        }
    }

    fn refresh(&mut self) {
        let version = self.world.version.load(Ordering::Acquire);
        if version != self.version {
            self.version = version;
            self.runs.clone_from(&lock(&self.world.active));
        }
    }

    /// Steps every task once that no other worker has; whether anything moved.
    fn pass(&self) -> bool {
        let (now, micros) = (Instant::now(), self.world.micros());
        // Workers start at different ranks, so as not to meet at the same tasks.
        let (index, workers) = self.first;
        let first = index * self.runs.len() / workers;
        let (tail, head) = self.runs.split_at(first);
        let mut moved = false;
        for run in head.iter().chain(tail) {
            let fault = self.world.control.fault();
            for slot in &run.tasks {
                let Ok(mut slot) = slot.try_lock() else { continue };
                if slot.task.is_none() {
                    continue;
                }
                if fault.is_some() {
                    run.stop();
                    self.retire(run, &mut slot);
                    moved = true;
                    continue;
                }
                match self.step(run, &mut slot) {
                    Ok(Progress::Moved) => {
                        slot.blocked = None;
                        run.moved_at.store(micros, Ordering::Relaxed);
                        moved = true;
                    }
                    Ok(Progress::Done) => {
                        self.retire(run, &mut slot);
                        moved = true;
                    }
                    Ok(Progress::Pending) => slot.blocked = None,
                    Ok(Progress::Blocked(wait)) => {
                        let since = slot.blocked.map_or_else(Instant::now, |(since, _)| since);
                        slot.blocked = Some((since, wait));
                        drop(slot);
                        self.watch(run, wait, now.saturating_duration_since(since), micros);
                    }
                    Err(fault) => self.world.broadcast(run, fault),
                }
            }
        }
        moved
    }

    /// Takes a task out of its run; the last one ends the run.
    fn retire(&self, run: &Arc<Run>, slot: &mut Slot) {
        slot.task = None;
        slot.blocked = None;
        if run.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.world.finish(run);
        }
    }

    fn step(&self, run: &Run, slot: &mut Slot) -> Result<Progress, Fault> {
        let port = HostPort { world: self.world, rank: run.rank, buffers: &run.buffers };
        let task = slot.task.as_mut().expect("checked by the caller");
        let mut step = || task.step(&port);
        let stepped = catch_unwind(AssertUnwindSafe(|| match step() {
            // A peer may have signalled and left after the wait was seen: what it signalled before it left
            // is visible to a step after that.
            Progress::Blocked(wait) if self.world.control.has_departed(wait.peer) => match step() {
                Progress::Blocked(still) if still.peer == wait.peer => Err(still),
                progress => Ok(progress),
            },
            progress => Ok(progress),
        }));
        match stepped {
            Ok(Ok(progress)) => Ok(progress),
            Ok(Err(wait)) => Err(watch::fault(run, wait, self.world.control.why_departed(wait.peer))),
            Err(panic) => {
                let (rank, started) = (run.rank, run.op.started());
                let (kind, epoch, cause) =
                    (started.kind, started.epoch, Cause::Panicked(panic_message(&*panic)));
                Err(Fault { rank, cause, reporter: rank, kind, epoch, wait: None })
            }
        }
    }

    /// Ends the world's operations if a wait has outlived the deadline and nothing else of its run moved.
    fn watch(&self, run: &Run, wait: Wait, waited: Duration, micros: u64) {
        let deadline = self.world.config.deadline;
        let still = Duration::from_micros(micros.saturating_sub(run.moved_at.load(Ordering::Relaxed)));
        // Another task's wait may have ended in a fault while this pass was at its questions.
        if waited.min(still) > deadline && self.world.control.fault().is_none() {
            let waits =
                |rank| Answer::Waits(watch::waits(self.runs.iter().filter(|other| other.rank == rank)));
            let (control, rank, lane) = (&*self.world.control, run.rank, run.op.lane());
            let moved = run.moved_at.load(Ordering::Relaxed);
            let wait = Inquiry { control, rank, lane, wait, waits: &waits }.last().wait;
            // Questions take a while, in which what was awaited may have come: then nobody is to blame, and this rank,
            // which waits no more, least of all.
            if run.moved_at.load(Ordering::Relaxed) == moved {
                self.world.broadcast(run, watch::fault(run, wait, Cause::Deadline(deadline)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Topology;

    #[test]
    fn what_is_mapped_is_what_the_configuration_says() {
        for (nodes, ranks_per_node) in [(1, 1), (1, 8), (4, 2)] {
            let topology = Topology::new(nodes, ranks_per_node).unwrap();
            let config = Config::builder(topology).experts(8).pool_bytes(12345).build().unwrap();
            let memory = config.memory();
            let engine = Engine::new(config, |fabric| fabric).unwrap();
            let regions = &engine.world().regions;
            assert!((0..topology.world_size()).all(|rank| regions[rank].bytes() == memory.region));
        }
    }
}
