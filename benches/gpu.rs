//! Dispatch and combine on one GPU that is shared by all ranks of a world: which part of the device's copy bandwidth
//! they reach with how many multiprocessors.
//!
//! Every operation is recorded, on rows in device memory. A measurement enqueues `--iterations` executions of all
//! ranks, each rank on a stream of its own, between two events per stream; its time is that of the slowest rank, by
//! execution. Beside it, in the same round, stands the kernel `copy`: as many blocks per rank copy as many bytes. And
//! once per round the device's own copy (`cuMemcpyAsync`, 1 GiB).
//!
//! - bytes: what a rank receives in a dispatch, rows and their scales, without experts, weights and headers; in the
//!   mean of all ranks. For combine the same rows in BF16: what it reads of the ranks' outputs.
//! - GB/s: 10^9 of these bytes, per rank and second.
//! - of copy: the kernel copy's time by this one. Both read and write the bytes once at least.
//! - of memcpy: GB/s of all ranks together, by the device's copy of as many bytes in its own way.
//!
//! Every figure is the median of `--rounds` rounds. On several "nodes" hop 1 is a copy by the device, which takes bandwidth
//! too: these figures inform, and are no target. Dispatch is that of a plan that is there; FP8 is quantised on the way.
//!
//! Options: `--worlds 1x4,1x8,2x2,2x4 --blocks 2,4,8,16,32 --tokens 4096 --hidden 7168 --topk 8 --experts 64 --rounds 5
//! --iterations 20 --memcpy BYTES --date TEXT --json FILE`; `--test` is all of it very small. Needs
//! `CUDA_DEVICE_MAX_CONNECTIONS=32`.
#![allow(unsafe_code, reason = "rows in device memory and streams have contracts")]

use std::env;
use std::error::Error as AnyError;
use std::fs;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytemuck::{Pod, bytes_of};
use cudarc::driver::sys::{self, CUevent, CUresult};
use half::bf16;
use railhop::budget::{Budget, Hardware, MAX_WARPS, Overrides, Workload};
use railhop::device::cuda::CudaDriver;
use railhop::device::{Driver, Grid, Kernel, Memory, Place, Stream};
use railhop::numeric::scale_groups;
use railhop::wire::local::CopyParams;
use railhop::wire::shape::RecvLayout;
use railhop::{
    Combine, Communicator, Config, Cuda, DeviceSlice, Error, ExpertPlacement, Handle, LocalWorld, Recorded,
    RecvBuffer, Routing, RowFormat, RowShape, ScaleFormat, StreamRef, Topology,
};
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn AnyError>>;

// ---- options

#[derive(Debug, Clone)]
struct Options {
    worlds: Vec<(usize, usize)>,
    blocks: Vec<usize>,
    tokens: usize,
    hidden: usize,
    topk: usize,
    experts: usize,
    rounds: usize,
    iterations: usize,
    memcpy: usize,
    date: String,
    json: Option<String>,
}

impl Options {
    fn parse(arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self {
            worlds: vec![(1, 4), (1, 8), (2, 2), (2, 4)],
            blocks: vec![2, 4, 8, 16, 32],
            tokens: 4096,
            hidden: 7168,
            topk: 8,
            experts: 64,
            rounds: 5,
            iterations: 20,
            memcpy: 1 << 30,
            date: "unknown".to_string(),
            json: None,
        };
        let mut arguments = arguments;
        while let Some(name) = arguments.next() {
            if name == "--bench" {
                continue; // cargo's
            }
            if name == "--test" {
                let small = Self {
                    worlds: vec![(1, 4), (2, 2)],
                    blocks: vec![2],
                    tokens: 16,
                    hidden: 256,
                    ..options
                };
                options = Self { rounds: 2, iterations: 2, memcpy: 1 << 16, ..small };
                continue;
            }
            let value = arguments.next().ok_or(format!("{name} needs a value"))?;
            match name.as_str() {
                "--worlds" => options.worlds = list(&value, world)?,
                "--blocks" => options.blocks = list(&value, |text| Ok(text.parse()?))?,
                "--tokens" => options.tokens = value.parse()?,
                "--hidden" => options.hidden = value.parse()?,
                "--topk" => options.topk = value.parse()?,
                "--experts" => options.experts = value.parse()?,
                "--rounds" => options.rounds = value.parse()?,
                "--iterations" => options.iterations = value.parse()?,
                "--memcpy" => options.memcpy = value.parse()?,
                "--date" => options.date = value,
                "--json" => options.json = Some(value),
                _ => return Err(format!("there is no option {name}").into()),
            }
        }
        if options.rounds == 0 || options.iterations == 0 {
            return Err("nothing would be measured".into());
        }
        Ok(options)
    }
}

fn list<T>(text: &str, parse: impl Fn(&str) -> Result<T>) -> Result<Vec<T>> {
    text.split(',').map(parse).collect()
}

fn world(text: &str) -> Result<(usize, usize)> {
    let (nodes, ranks) = text.split_once('x').ok_or("a world is NODESxRANKS")?;
    Ok((nodes.parse()?, ranks.parse()?))
}

// ---- calls of the driver

/// `cuda!(cuInit(0))` calls the driver. Unsafe as the call is.
macro_rules! cuda {
    ($name:ident($($argument:expr),* $(,)?)) => {
        match sys::$name($($argument),*) {
            CUresult::CUDA_SUCCESS => Ok(()),
            result => Err(format!("{}: {result:?}", stringify!($name))),
        }
    };
}

/// Two points in a stream, and the time between them. A driver that has no such time (one that simulates a device)
/// leaves it to the host's clock.
struct Timer {
    events: [CUevent; 2],
    started: Instant,
}

impl Timer {
    fn new() -> Result<Self> {
        let mut events = [ptr::null_mut(); 2];
        for event in &mut events {
            // SAFETY: the call writes a handle.
            unsafe { cuda!(cuEventCreate(event, 0)) }?;
        }
        Ok(Self { events, started: Instant::now() })
    }

    fn start(&mut self, stream: &Stream) -> Result<()> {
        self.started = Instant::now();
        // SAFETY: both are alive.
        Ok(unsafe { cuda!(cuEventRecord(self.events[0], stream.raw().0 as sys::CUstream)) }?)
    }

    fn stop(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both are alive.
        Ok(unsafe { cuda!(cuEventRecord(self.events[1], stream.raw().0 as sys::CUstream)) }?)
    }

    /// Seconds; after the stream has been waited for.
    fn seconds(&self) -> Result<f64> {
        if !has_event_times() {
            return Ok(self.started.elapsed().as_secs_f64());
        }
        let mut milliseconds = 0.0;
        // SAFETY: the call writes a number; both are alive and were recorded.
        unsafe { cuda!(cuEventElapsedTime_v2(&mut milliseconds, self.events[0], self.events[1])) }?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        for event in self.events {
            // SAFETY: made in `new`, destroyed once.
            unsafe { sys::cuEventDestroy_v2(event) };
        }
    }
}

fn has_event_times() -> bool {
    // SAFETY: the driver is open, so there is a library; the call is looked up and not made.
    unsafe { sys::culib().get::<unsafe extern "C" fn()>(b"cuEventElapsedTime_v2\0").is_ok() }
}

fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: the call writes an integer.
    unsafe { cuda!(cuDriverGetVersion(&mut version)) }?;
    Ok(version)
}

// ---- a world

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    DispatchBf16,
    DispatchFp8,
    CombineBf16,
}

impl Phase {
    const ALL: [Self; 3] = [Self::DispatchBf16, Self::DispatchFp8, Self::CombineBf16];

    fn name(self) -> &'static str {
        match self {
            Self::DispatchBf16 => "dispatch bf16",
            Self::DispatchFp8 => "dispatch fp8",
            Self::CombineBf16 => "combine bf16",
        }
    }

    fn format(self) -> RowFormat {
        match self {
            Self::DispatchFp8 => RowFormat::Fp8(ScaleFormat::F32),
            Self::DispatchBf16 | Self::CombineBf16 => RowFormat::Bf16,
        }
    }
}

/// What a rank executes.
struct Rank {
    /// In BF16 and in FP8.
    dispatch: [Recorded<(DeviceSlice<bf16>, RecvBuffer)>; 2],
    combine: Recorded<Combine<RecvBuffer>>,
    /// Received rows, and room for as many.
    copied: [u64; 2],
    rows: usize,
    hidden: usize,
    timer: Timer,
    stream: Stream,
    _comm: Communicator,
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }
}

/// Uniform routing: for each token `topk` distinct experts.
fn routing(options: &Options, random: &mut Random) -> Vec<i64> {
    let mut experts: Vec<i64> = (0..options.experts as i64).collect();
    let mut chosen = Vec::with_capacity(options.tokens * options.topk);
    for _ in 0..options.tokens {
        for k in 0..options.topk {
            let other = k + (random.next() % (experts.len() - k) as u64) as usize;
            experts.swap(k, other);
        }
        chosen.extend_from_slice(&experts[..options.topk]);
    }
    chosen
}

/// Memory of the device that holds values.
fn on_device<T: Pod>(driver: &Arc<dyn Driver>, stream: &Stream, values: &[T]) -> Result<DeviceSlice<T>> {
    let memory = Memory::new(driver, Place::Device, size_of_val(values))?;
    // SAFETY: as many bytes on both sides, which nobody else knows; the slice owns the memory.
    unsafe {
        stream.copy_now(memory.address(), values.as_ptr() as u64, size_of_val(values))?;
        Ok(DeviceSlice::from_raw(memory.address(), values.len(), memory))
    }
}

fn shape(options: &Options, format: RowFormat) -> RowShape {
    RowShape { hidden: options.hidden, topk: options.topk, format }
}

struct World {
    config: Config,
    driver: Arc<dyn Driver>,
    ranks: Vec<Rank>,
    blocks: usize,
}

impl World {
    fn new(options: &Options, driver: &Arc<dyn Driver>, topology: Topology, blocks: usize) -> Result<Self> {
        let world = topology.world_size();
        let limits = driver.limits();
        let mut random = Random(1);
        let chosen: Vec<_> = (0..world).map(|_| routing(options, &mut random)).collect();

        // What the busiest rank receives.
        let placement = ExpertPlacement::contiguous(options.experts, world);
        let mut rows = vec![0; world];
        for token in chosen.iter().flat_map(|chosen| chosen.chunks_exact(options.topk)) {
            let mut ranks: Vec<_> = token.iter().map(|&expert| placement.rank_of(expert as usize)).collect();
            ranks.sort_unstable();
            ranks.dedup();
            ranks.into_iter().for_each(|rank| rows[rank] += 1);
        }
        let most = rows.into_iter().max().unwrap_or(0);
        let bytes = |format| RecvLayout::new(shape(options, format), most).bytes;
        let buffers = 2 * bytes(RowFormat::Bf16) + bytes(RowFormat::Fp8(ScaleFormat::F32));

        let workload =
            Workload::new(topology, shape(options, RowFormat::Bf16), options.experts, options.tokens);
        // Each warp may hold the scales of two rows.
        let scales = 2 * MAX_WARPS * shape(options, RowFormat::Fp8(ScaleFormat::F32)).scale_pitch();
        let shared_bytes = limits.shared.saturating_sub(scales);
        let hardware = Hardware { sms: limits.sms, shared_bytes, ..Hardware::default() };
        let given = Overrides { blocks: Some(blocks), ..Overrides::default() };
        let budget = Budget::new(&workload, &hardware, &given)?;
        // Plans take some bytes an entry.
        let pool = buffers + (64 << 20) + 64 * options.tokens * world * options.topk;
        let builder = budget.config_builder().max_tokens(options.tokens).pool_bytes(pool);
        // Dispatch and combine are timed one after the other.
        let cuda = Cuda { overlap: false, ..budget.cuda(vec![0]) };
        let config = builder.deadline(Duration::from_secs(20)).cuda(cuda).build()?;
        let drivers = vec![driver.clone(); world];
        let mut comms = LocalWorld::on_drivers(config.clone(), drivers)?.into_communicators();
        // One after the other, so that a driver which deals its queues round robin gives each one of its own.
        let streams =
            comms.iter().map(|_| Stream::new(driver)).collect::<std::result::Result<Vec<_>, _>>()?;
        let topk_weights = vec![1.0 / options.topk as f32; options.tokens * options.topk];
        let planned: Vec<_> = comms
            .iter_mut()
            .zip(&chosen)
            .map(|(comm, topk_idx)| {
                comm.start_plan(Routing { topk: options.topk, topk_idx, topk_weights: &topk_weights })
            })
            .collect();
        let handles = planned.into_iter().map(|plan| plan.wait().map_err(Error::from));
        let handles = handles.collect::<std::result::Result<Vec<_>, _>>()?;
        let make = |((comm, stream), handle)| Rank::new(options, driver, comm, stream, &handle, &mut random);
        let ranks = comms.into_iter().zip(streams).zip(handles).map(make).collect::<Result<Vec<_>>>()?;
        let mut this = Self { config, driver: driver.clone(), ranks, blocks };
        this.prepare()?;
        Ok(this)
    }

    /// Has every operation executed once; outputs are what was received.
    fn prepare(&mut self) -> Result<()> {
        let bytes = |phase| self.bytes(phase);
        println!(
            "  {:.1} MB a rank in BF16, {:.1} in FP8; {} channels",
            bytes(Phase::DispatchBf16) / 1e6,
            bytes(Phase::DispatchFp8) / 1e6,
            self.config.channels()
        );
        for phase in Phase::ALL {
            self.enqueue(phase)?;
            if phase == Phase::DispatchBf16 {
                self.enqueue_copies(phase)?;
            }
        }
        self.wait()?;
        self.check()
    }

    /// Waits for every stream, also behind one that has failed.
    fn wait(&self) -> Result<()> {
        let wait = |rank: &Rank| {
            // SAFETY: it is alive.
            unsafe { self.driver.synchronize(rank.stream.raw()) }
        };
        let waited: Vec<_> = self.ranks.iter().map(wait).collect();
        Ok(waited.into_iter().collect::<std::result::Result<(), _>>()?)
    }

    /// One execution by every rank.
    fn enqueue(&self, phase: Phase) -> Result<()> {
        for rank in &self.ranks {
            let stream = rank.stream_ref();
            // SAFETY: streams and recordings live until all has been waited for; every rank does the same.
            unsafe {
                match phase {
                    Phase::DispatchBf16 => rank.dispatch[0].enqueue(stream)?,
                    Phase::DispatchFp8 => rank.dispatch[1].enqueue(stream)?,
                    Phase::CombineBf16 => rank.combine.enqueue(stream)?,
                }
            }
        }
        Ok(())
    }

    /// As many bytes by the kernel copy, of as many blocks.
    fn enqueue_copies(&self, phase: Phase) -> Result<()> {
        let grid = Grid { blocks: self.blocks, warps: 16, shared: 0 };
        for rank in &self.ranks {
            let [from, to] = rank.copied;
            let params = CopyParams { from, to, bytes: rank.bytes(phase) as u64 / 16 * 16 };
            // SAFETY: both are parts of buffers that hold as many bytes, and nothing else is on the stream meanwhile.
            unsafe { self.driver.launch(rank.stream.raw(), Kernel::Copy, grid, bytes_of(&params))? };
        }
        Ok(())
    }

    /// Seconds of what `enqueue` does, each time, at the slowest rank.
    fn time(&mut self, iterations: usize, enqueue: impl Fn(&Self) -> Result<()>) -> Result<f64> {
        for rank in &mut self.ranks {
            rank.timer.start(&rank.stream)?;
        }
        for _ in 0..iterations {
            enqueue(self)?;
        }
        for rank in &self.ranks {
            rank.timer.stop(&rank.stream)?;
        }
        self.wait()?;
        self.check()?;
        let times = self.ranks.iter().map(|rank| rank.timer.seconds()).collect::<Result<Vec<_>>>()?;
        Ok(times.into_iter().fold(0.0, f64::max) / iterations as f64)
    }

    /// Whether the last execution of everything was good.
    fn check(&self) -> Result<()> {
        for rank in &self.ranks {
            let outcomes = rank.dispatch.iter().map(Recorded::outcome).chain([rank.combine.outcome()]);
            outcomes.flatten().try_for_each(|outcome| outcome.map(drop))?;
        }
        Ok(())
    }

    /// Bytes of a rank in the mean.
    fn bytes(&self, phase: Phase) -> f64 {
        self.ranks.iter().map(|rank| rank.bytes(phase) as f64).sum::<f64>() / self.ranks.len() as f64
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Where something has failed, kernels may still wait for peers: they go before what they use. They end by
        // the deadline.
        let _ = self.wait();
    }
}

impl Rank {
    fn new(
        options: &Options,
        driver: &Arc<dyn Driver>,
        mut comm: Communicator,
        stream: Stream,
        handle: &Handle,
        random: &mut Random,
    ) -> Result<Self> {
        let elements = options.tokens * options.hidden;
        let x: Vec<_> =
            (0..elements).map(|_| bf16::from_f32((random.next() % 4001) as f32 / 512.0 - 3.9)).collect();
        let x = on_device(driver, &stream, &x)?;
        let out = on_device(driver, &stream, &vec![bf16::ZERO; elements])?;
        let rows = handle.num_recv_tokens();
        let buffer = |comm: &Communicator, format| comm.recv_buffer(rows, shape(options, format));
        let mut received = buffer(&comm, RowFormat::Bf16)?;
        let quantised = buffer(&comm, RowFormat::Fp8(ScaleFormat::F32))?;
        let mut outputs = buffer(&comm, RowFormat::Bf16)?;
        let copied = [&mut received, &mut outputs].map(|buffer| buffer.device().map_or(0, |parts| parts.x));
        let dispatch =
            [comm.record_dispatch(handle, x.clone(), received)?, comm.record_dispatch(handle, x, quantised)?];
        let combine = comm.record_combine(handle, Combine::new(outputs).device_out(out))?;
        let (timer, hidden) = (Timer::new()?, options.hidden);
        Ok(Self { dispatch, combine, copied, rows, hidden, timer, stream, _comm: comm })
    }

    fn stream_ref(&self) -> StreamRef {
        // SAFETY: it belongs to the rank's device, and lives until all has been waited for.
        unsafe { StreamRef::from_raw(self.stream.raw().0) }
    }

    fn bytes(&self, phase: Phase) -> usize {
        self.rows
            * match phase.format() {
                RowFormat::Bf16 => 2 * self.hidden,
                RowFormat::Fp8(format) => self.hidden + scale_groups(self.hidden) * format.bytes(),
            }
    }
}

// ---- measurements

/// One round of one phase, in seconds.
struct Round {
    time: f64,
    copy: f64,
    memcpy: f64,
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
    (low + high) / 2.0
}

/// Seconds of the device's own copy.
struct Memcpy {
    from: Memory,
    to: Memory,
    stream: Stream,
    timer: Timer,
}

impl Memcpy {
    fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self> {
        let memory = || Memory::new(driver, Place::Device, bytes);
        Ok(Self { from: memory()?, to: memory()?, stream: Stream::new(driver)?, timer: Timer::new()? })
    }

    fn time(&mut self, driver: &dyn Driver) -> Result<f64> {
        const TIMES: usize = 4;
        self.timer.start(&self.stream)?;
        for _ in 0..TIMES {
            // The driver's `copy` finds out by itself that both are on the device.
            // SAFETY: as many bytes on both sides, which nobody else knows.
            unsafe {
                driver.copy(self.stream.raw(), self.to.address(), self.from.address(), self.from.bytes())?;
            }
        }
        self.timer.stop(&self.stream)?;
        // SAFETY: it is alive.
        unsafe { driver.synchronize(self.stream.raw())? };
        Ok(self.timer.seconds()? / TIMES as f64)
    }
}

/// All phases of a world, each as JSON.
fn measure(
    options: &Options,
    driver: &Arc<dyn Driver>,
    memcpy: &mut Memcpy,
    topology: Topology,
    blocks: usize,
) -> Result<Vec<Value>> {
    let mut world = World::new(options, driver, topology, blocks)?;
    let mut rounds = [const { Vec::new() }; Phase::ALL.len()];
    // The first warms up.
    for round in 0..=options.rounds {
        let device = memcpy.time(&**driver)? / memcpy.from.bytes() as f64;
        for (phase, rounds) in Phase::ALL.into_iter().zip(&mut rounds) {
            let time = world.time(options.iterations, |world| world.enqueue(phase))?;
            let copy = world.time(options.iterations, |world| world.enqueue_copies(phase))?;
            if round > 0 {
                rounds.push(Round { time, copy, memcpy: device });
            }
        }
    }
    let ranks = topology.world_size() as f64;
    let figures = Phase::ALL.into_iter().zip(&rounds).map(|(phase, rounds)| {
        let bytes = world.bytes(phase);
        let of = |figure: &dyn Fn(&Round) -> f64| median(rounds.iter().map(figure));
        json!({
            "nodes": topology.nodes(),
            "ranks_per_node": topology.ranks_per_node(),
            "blocks": blocks,
            "phase": phase.name(),
            "channels": world.config.channels(),
            "bytes": bytes,
            "microseconds": of(&|round| 1e6 * round.time),
            "gbs": of(&|round| bytes / round.time / 1e9),
            "copy_gbs": of(&|round| bytes / round.copy / 1e9),
            "memcpy_gbs": of(&|round| 1e-9 / round.memcpy),
            "of_copy": of(&|round| round.copy / round.time),
            "of_memcpy": of(&|round| ranks * bytes * round.memcpy / round.time),
            "rounds_microseconds": rounds.iter().map(|round| 1e6 * round.time).collect::<Vec<_>>(),
        })
    });
    Ok(figures.collect())
}

fn main() -> Result<()> {
    let options = Options::parse(env::args().skip(1))?;
    let driver: Arc<dyn Driver> = match CudaDriver::open(0) {
        Ok(driver) => driver,
        // So that benchmarks can be run on any machine.
        Err(error) if options.json.is_none() => {
            println!("no figures: {error}");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let (limits, version) = (driver.limits().clone(), driver_version()?);
    let clock = if has_event_times() { "the device's" } else { "the host's: no figures of a device" };
    println!(
        "{}, {} multiprocessors, CUDA {version}, {} queues",
        limits.name, limits.sms, limits.connections
    );
    println!(
        "{} tokens x {}, top-{} of {}; times by {clock}",
        options.tokens, options.hidden, options.topk, options.experts
    );
    let mut memcpy = Memcpy::new(&driver, options.memcpy)?;
    let (mut figures, mut refused) = (Vec::new(), Vec::new());
    for &(nodes, ranks_per_node) in &options.worlds {
        for &blocks in &options.blocks {
            println!("{nodes}x{ranks_per_node}, {blocks} blocks a rank");
            let topology = Topology::new(nodes, ranks_per_node)?;
            match measure(&options, &driver, &mut memcpy, topology, blocks) {
                Ok(phases) => {
                    phases.iter().for_each(print);
                    figures.extend(phases);
                }
                Err(error) => {
                    println!("  not measured: {error}");
                    refused.push(json!({
                        "nodes": nodes, "ranks_per_node": ranks_per_node, "blocks": blocks,
                        "reason": error.to_string(),
                    }));
                }
            }
        }
    }
    let report = json!({
        "date": options.date,
        "device": limits.name,
        "multiprocessors": limits.sms,
        "driver": version,
        "clock": clock,
        "command": env::args().collect::<Vec<_>>().join(" "),
        "tokens": options.tokens, "hidden": options.hidden, "topk": options.topk, "experts": options.experts,
        "rounds": options.rounds, "iterations": options.iterations, "memcpy_bytes": options.memcpy,
        "figures": figures,
        "not_measured": refused,
    });
    if let Some(path) = &options.json {
        fs::write(path, format!("{report:#}\n"))?;
    }
    match figures.is_empty() {
        true => Err("nothing could be measured".into()),
        false => Ok(()),
    }
}

fn print(figure: &Value) {
    let number = |name: &str| figure[name].as_f64().unwrap_or(f64::NAN);
    println!(
        "  {:<14} {:>10.1} us {:>8.1} GB/s a rank   {:>5.2} of copy ({:.1} GB/s)   {:>5.2} of memcpy ({:.0} GB/s)",
        figure["phase"].as_str().unwrap_or("?"),
        number("microseconds"),
        number("gbs"),
        number("of_copy"),
        number("copy_gbs"),
        number("of_memcpy"),
        number("memcpy_gbs"),
    );
}
