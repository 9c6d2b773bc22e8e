//! The shim as a driver: ranks of one live machine, each behind [`Driver`].

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::HashMap;
use std::ptr::{NonNull, copy_nonoverlapping, write_bytes};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use railhop::device::{Driver, Grid, Kernel, Limits, Place, RawEvent, RawMemory, RawStream};
use railhop::error::DeviceError;

use super::library::{Grid as ShimGrid, LiveShim};

/// What a CUDA driver promises of every address.
const ALIGNMENT: usize = 256;
/// Freed memory is full of this.
const POISON: u8 = 0xDD;
/// Streams that take longer hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// The drivers of a world's ranks, on one machine with a thread of its own (named after the seed), which ends with the
/// last of them.
pub fn drivers(world_size: usize, ranks_per_node: usize, seed: u64) -> Vec<Arc<dyn Driver>> {
    drivers_with(limits(), world_size, ranks_per_node, seed)
}

/// What the simulated device has.
pub fn limits() -> Limits {
    Limits { name: "CPU shim".into(), device: 0, sms: 1 << 10, shared: 227 << 10, connections: 1 << 10 }
}

/// The same, on a device that has something else.
pub fn drivers_with(
    limits: Limits,
    world_size: usize,
    ranks_per_node: usize,
    seed: u64,
) -> Vec<Arc<dyn Driver>> {
    let machine = Arc::new(Machine::start(ranks_per_node, seed));
    let driver = |rank| ShimDriver::new(machine.clone(), rank, limits.clone());
    (0..world_size).map(|rank| Arc::new(driver(rank)) as Arc<dyn Driver>).collect()
}

/// What is said to a mutex that a failed test has poisoned: tests fail one by one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// ---- the machine

/// What the machine's thread shares with the drivers.
struct Running {
    shim: LiveShim,
    /// The check that failed.
    failure: OnceLock<String>,
}

/// A machine and its thread. Memory is dropped last: kernels that were abandoned are gone by then.
struct Machine {
    running: Arc<Running>,
    thread: Option<JoinHandle<()>>,
    /// By number; a point that was not recorded yet is none.
    events: Mutex<HashMap<u64, Option<Point>>>,
    next_event: AtomicU64,
    allocations: Mutex<Vec<Allocation>>,
}

/// So many entries of a stream.
#[derive(Debug, Clone, Copy)]
struct Point {
    rank: usize,
    stream: u64,
    entries: u64,
}

impl Machine {
    fn start(ranks_per_node: usize, seed: u64) -> Self {
        let running =
            Arc::new(Running { shim: LiveShim::new(seed, ranks_per_node), failure: OnceLock::new() });
        let shared = running.clone();
        let run = move || {
            if let Err(report) = shared.shim.run() {
                let _ = shared.failure.set(report);
            }
        };
        let thread = thread::Builder::new().name(format!("shim {seed:x}")).spawn(run).expect("a thread");
        Self {
            running,
            thread: Some(thread),
            events: Mutex::default(),
            next_event: AtomicU64::new(1),
            allocations: Mutex::default(),
        }
    }

    fn shim(&self) -> &LiveShim {
        &self.running.shim
    }

    fn check(&self) -> Result<(), DeviceError> {
        self.running.failure.get().map_or(Ok(()), |report| Err(failed(report.clone())))
    }

    fn ended(&self, rank: usize, stream: u64) -> u64 {
        self.shim().ended(rank, stream as usize)
    }

    fn point(&self, event: RawEvent) -> Option<Point> {
        *lock(&self.events).get(&event.0).expect("the event is alive")
    }

    /// What an event still stands for.
    fn under_way(&self, event: RawEvent) -> Option<Point> {
        self.point(event).filter(|point| self.ended(point.rank, point.stream) < point.entries)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shim().stop();
        let ended = self.thread.take().expect("joined once").join();
        assert!(ended.is_ok() || thread::panicking(), "the machine's thread never panics");
    }
}

fn failed(reason: String) -> DeviceError {
    DeviceError::Call { call: "shim", reason }
}

/// Memory that stays as long as the machine, which knows it by its address for ever.
struct Allocation {
    memory: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it is an address, and nobody else's to free.
unsafe impl Send for Allocation {}

impl Allocation {
    fn new(bytes: usize) -> Option<Self> {
        let layout = Layout::from_size_align(bytes.max(1), ALIGNMENT).ok()?;
        // SAFETY: the layout is not empty.
        let Some(memory) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        Some(Self { memory, layout })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, freed once.
        unsafe { dealloc(self.memory.as_ptr(), self.layout) }
    }
}

// ---- a rank

struct ShimDriver {
    machine: Arc<Machine>,
    rank: usize,
    limits: Limits,
    /// Entries launched so far, by stream. The lock is held around launches: counts are in their order.
    streams: Mutex<HashMap<u64, u64>>,
    next_stream: AtomicU64,
}

impl ShimDriver {
    fn new(machine: Arc<Machine>, rank: usize, limits: Limits) -> Self {
        // Stream 0 is there without being made, as a CUDA driver's.
        let streams = Mutex::new(HashMap::from([(0, 0)]));
        Self { machine, rank, limits, streams, next_stream: AtomicU64::new(1) }
    }

    fn launched(&self, stream: RawStream) -> u64 {
        *lock(&self.streams).get(&stream.0).expect("the stream is alive")
    }

    fn is_idle(&self, stream: RawStream) -> bool {
        self.machine.ended(self.rank, stream.0) >= self.launched(stream)
    }

    fn all_idle(&self) -> bool {
        lock(&self.streams).iter().all(|(&stream, &count)| self.machine.ended(self.rank, stream) >= count)
    }

    /// Queues an entry on a stream, if `queue` does.
    fn enqueue(&self, stream: RawStream, queue: impl FnOnce(&LiveShim) -> bool) -> bool {
        let mut streams = lock(&self.streams);
        let launched = streams.get_mut(&stream.0).expect("the stream is alive");
        let queued = queue(self.machine.shim());
        *launched += u64::from(queued);
        queued
    }
}

// SAFETY: memory stays mapped as long as the machine lives, and that is at least as long as any driver. The shim runs
// the entries of a stream in order. A point has ended when the shim counts as many entries of its stream as were
// launched before it, and it counts them in order, after all that they did.
unsafe impl Driver for ShimDriver {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn allocate(&self, place: Place, bytes: usize) -> Result<RawMemory, DeviceError> {
        self.machine.check()?;
        let allocation = Allocation::new(bytes).ok_or(DeviceError::OutOfMemory { bytes, place: "shim" })?;
        let address = allocation.memory.as_ptr() as u64;
        let shared = place != Place::Device;
        self.machine.shim().memory(self.rank, address, bytes, shared);
        lock(&self.machine.allocations).push(allocation);
        Ok(RawMemory { address, bytes, place })
    }

    unsafe fn free(&self, memory: RawMemory) {
        // Whoever uses it all the same finds that out. But a test that has failed leaves kernels behind, and they had
        // better not stumble.
        if self.machine.check().is_ok() && !thread::panicking() && self.all_idle() {
            // SAFETY: it is kept until the machine is gone, and nobody uses it.
            unsafe { write_bytes(memory.address as *mut u8, POISON, memory.bytes) }
        }
    }

    fn reach(&self, _: &dyn Driver, memory: &RawMemory) -> Result<u64, DeviceError> {
        Ok(memory.address)
    }

    fn new_stream(&self) -> Result<RawStream, DeviceError> {
        self.machine.check()?;
        let stream = self.next_stream.fetch_add(1, Ordering::Relaxed);
        lock(&self.streams).insert(stream, 0);
        Ok(RawStream(stream))
    }

    unsafe fn free_stream(&self, stream: RawStream) {
        let idle = self.is_idle(stream) || self.machine.check().is_err() || thread::panicking();
        assert!(idle, "nothing of the stream is under way");
        lock(&self.streams).remove(&stream.0);
    }

    fn new_event(&self) -> Result<RawEvent, DeviceError> {
        self.machine.check()?;
        let event = self.machine.next_event.fetch_add(1, Ordering::Relaxed);
        lock(&self.machine.events).insert(event, None);
        Ok(RawEvent(event))
    }

    unsafe fn free_event(&self, event: RawEvent) {
        lock(&self.machine.events).remove(&event.0).expect("the event is alive");
    }

    unsafe fn record(&self, event: RawEvent, stream: RawStream) -> Result<(), DeviceError> {
        self.machine.check()?;
        let point = Point { rank: self.rank, stream: stream.0, entries: self.launched(stream) };
        *lock(&self.machine.events).get_mut(&event.0).expect("the event is alive") = Some(point);
        Ok(())
    }

    unsafe fn wait(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError> {
        self.machine.check()?;
        if let Some(point) = self.machine.under_way(event) {
            self.enqueue(stream, |shim| {
                let other = (point.rank, point.stream as usize);
                shim.wait((self.rank, stream.0 as usize), other, point.entries);
                true
            });
        }
        Ok(())
    }

    unsafe fn is_done(&self, event: RawEvent) -> Result<bool, DeviceError> {
        self.machine.check()?;
        Ok(self.machine.under_way(event).is_none())
    }

    fn prepare(&self, kernel: Kernel, grid: Grid) -> Result<usize, DeviceError> {
        if (1..=16).contains(&grid.warps) && grid.shared <= self.limits.shared {
            // A block fills a multiprocessor here.
            return Ok(self.limits.sms);
        }
        Err(DeviceError::Unsupported {
            device: self.limits.name.clone(),
            what: format!("{kernel:?} as {grid:?}"),
        })
    }

    unsafe fn launch(
        &self,
        stream: RawStream,
        kernel: Kernel,
        grid: Grid,
        params: &[u8],
    ) -> Result<(), DeviceError> {
        self.machine.check()?;
        self.prepare(kernel, grid)?;
        let Grid { blocks, warps, shared } = grid;
        let shape = ShimGrid { blocks, warps, shared };
        let queue = |shim: &LiveShim| shim.launch(self.rank, stream.0 as usize, kernel.name(), shape, params);
        match self.enqueue(stream, queue) {
            true => Ok(()),
            false => Err(failed(format!("{kernel:?} can't be launched as {grid:?}"))),
        }
    }

    unsafe fn copy(&self, stream: RawStream, to: u64, from: u64, bytes: usize) -> Result<(), DeviceError> {
        self.machine.check()?;
        assert!(self.is_idle(stream), "here a copy is made at once: nothing may come before it");
        // SAFETY: both are there, do not overlap, and nobody else writes them, by the caller.
        unsafe { copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        fence(Ordering::Release);
        Ok(())
    }

    unsafe fn store(&self, stream: RawStream, to: u64, value: u64) -> Result<(), DeviceError> {
        self.machine.check()?;
        assert!(self.is_idle(stream), "here a store is made at once: nothing may come before it");
        // SAFETY: a word that is there, by the caller.
        unsafe { AtomicU64::from_ptr(to as *mut u64) }.store(value, Ordering::Release);
        Ok(())
    }

    unsafe fn synchronize(&self, stream: RawStream) -> Result<(), DeviceError> {
        let deadline = Instant::now() + PATIENCE;
        for round in 0_u32.. {
            self.machine.check()?;
            if self.is_idle(stream) {
                break;
            }
            if Instant::now() > deadline {
                return Err(failed(format!("stream {} hangs", stream.0)));
            }
            match round {
                0..16 => thread::yield_now(),
                _ => thread::sleep(Duration::from_micros(100)),
            }
        }
        Ok(())
    }
}
