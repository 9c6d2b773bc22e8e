//! On GPUs: tokens in device memory, a dispatch on the engine's stream, and a kernel of the caller's on its own.
//!
//! One after the other is what a stream does: the engine enqueues the dispatch on the caller's, and the computation
//! comes behind it. Overlapped, the dispatch is on the engine's stream and has the multiprocessors that its blocks ask
//! for; the computation has the others. All times are those of events on the device.
//!
//! Kernels of the engine wait for those of other ranks, so nothing here may wait for the device while ranks are at work:
//! what may (loading a kernel, taking memory) is done before, in [`Gpu::new`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaSlice, CudaStream, DevicePtr, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use railhop::device::cuda::CudaDriver;
use railhop::device::{Driver, Limits};
use railhop::{
    Communicator, Config, Cuda, DeviceSlice, LocalWorld, RecvBuffer, Routing, RowFormat, RowShape, StreamRef,
    Topology,
};

use super::{Failure, Row, compare};

const RANKS: usize = 4;
const TOKENS: usize = 2048;
const HIDDEN: usize = 4096;
const TOPK: usize = 8;
const EXPERTS: usize = 32;
const SHAPE: RowShape = RowShape { hidden: HIDDEN, topk: TOPK, format: RowFormat::Bf16 };
/// Blocks of each rank's dispatch: the multiprocessors that are not the computation's.
const BLOCKS: usize = 8;
/// Streams of a rank that must not wait for another's: two lanes, transfers and the rail, and two of this program's.
const STREAMS: usize = 6;
/// The fastest of all counts.
const TIMES: usize = 4;
/// Threads of a block that computes.
const THREADS: u32 = 512;
/// Rounds of the computation that is timed to find out how many take as long as a dispatch.
const TRIAL: u32 = 1 << 17;

/// Runs both ways on the devices of these names.
pub fn run(names: &[String]) -> Result<(), Failure> {
    let devices: Vec<_> = (0..names.len().min(RANKS)).collect();
    println!("CUDA engine: {RANKS} ranks on {}", names[..devices.len()].join(", "));
    // Kept: the world uses the same ones.
    let drivers = devices.iter().map(|&device| CudaDriver::open(device)).collect::<Result<Vec<_>, _>>()?;
    let mut gpus = (0..RANKS).map(|rank| Gpu::new(rank, &drivers)).collect::<Result<Vec<_>, _>>()?;
    println!(
        "{TOKENS} tokens of {HIDDEN} elements each; {BLOCKS} SMs of each rank for a dispatch, {} for the computation",
        gpus[0].blocks
    );
    let config = Config::builder(Topology::new(2, RANKS / 2)?).experts(EXPERTS).max_hidden(HIDDEN);
    let config = config.max_topk(TOPK).max_tokens(TOKENS);
    let config = config.cuda(Cuda { devices, blocks: BLOCKS, ..Cuda::default() }).build()?;
    let communicators = LocalWorld::new(config)?.into_communicators();
    let ranks: Vec<[Vec<Spans>; 2]> = thread::scope(|scope| {
        let ranks = communicators.into_iter().zip(&mut gpus);
        let spawn = |(comm, gpu)| scope.spawn(move || Rank { comm, gpu }.measure());
        let threads: Vec<_> = ranks.map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank panicked")).collect::<Result<_, _>>()
    })?;

    let slowest = |way: usize, n: usize| ranks.iter().map(|rank| rank[way][n].total()).fold(0.0, f64::max);
    let best = |way| (0..TIMES).map(|n| (slowest(way, n), n)).min_by(|a, b| a.0.total_cmp(&b.0));
    let (sequential, overlapped) = best(0).zip(best(1)).ok_or("nothing was timed")?;
    let rows = [ranks[0][0][sequential.1].rows(), ranks[0][1][overlapped.1].rows()];
    compare([(sequential.0, &rows[0]), (overlapped.0, &rows[1])]);
    println!(
        "rows and computed numbers of both ways, on every rank and every time: as they must be, bit for bit"
    );
    Ok(())
}

/// What a rank has on its device.
struct Gpu {
    /// Where it computes.
    stream: Arc<CudaStream>,
    /// Where it waits for the engine, to see when.
    watch: Arc<CudaStream>,
    compute: CudaFunction,
    /// Blocks of the computation.
    blocks: usize,
    tokens: DeviceSlice<bf16>,
    out: CudaSlice<f32>,
    events: Events,
}

struct Events {
    begin: CudaEvent,
    dispatched: CudaEvent,
    compute: CudaEvent,
    computed: CudaEvent,
}

impl Gpu {
    /// Of `rank`, on one of these devices.
    fn new(rank: usize, drivers: &[Arc<CudaDriver>]) -> Result<Self, Failure> {
        let ordinal = rank % drivers.len();
        let blocks = blocks_left(drivers[ordinal].limits(), RANKS.div_ceil(drivers.len()))?;
        let context = CudaContext::new(ordinal)?;
        // SAFETY: what is on the device is one rank's, and all its work is ordered by its stream, or waited for.
        unsafe { context.disable_event_tracking() };
        let compute = context.load_module(Ptx::from_src(include_str!("compute.ptx")))?;
        let compute = compute.load_function("compute")?;
        let (stream, watch) = (context.new_stream()?, context.new_stream()?);
        let tokens = stream.clone_htod(&tokens(rank))?;
        let out = stream.alloc_zeros(blocks * THREADS as usize)?;
        let event = || context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let events = Events { begin: event()?, dispatched: event()?, compute: event()?, computed: event()? };
        let tokens = on_device(tokens, &stream);
        let mut gpu = Self { stream, watch, compute, blocks, tokens, out, events };
        // The first launch loads the kernel.
        gpu.compute(1)?;
        gpu.stream.synchronize()?;
        Ok(gpu)
    }

    /// Enqueues the computation, between its events.
    fn compute(&mut self, rounds: u32) -> Result<(), Failure> {
        self.events.compute.record(&self.stream)?;
        let mut launch = self.stream.launch_builder(&self.compute);
        launch.arg(&mut self.out).arg(&rounds);
        let blocks = self.blocks as u32;
        let shape =
            LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the kernel takes an address and a u32, and writes an element per thread: `out` has as many.
        unsafe { launch.launch(shape) }?;
        self.events.computed.record(&self.stream)?;
        Ok(())
    }
}

/// Multiprocessors for the computation of each of the `sharing` ranks on a device, when all of them dispatch.
fn blocks_left(limits: &Limits, sharing: usize) -> Result<usize, Failure> {
    // Streams that share a queue wait for each other, and ranks that wait for each other can't.
    let (streams, queues) = (STREAMS * sharing, limits.connections);
    if sharing > 1 && queues < streams {
        let advice = "set CUDA_DEVICE_MAX_CONNECTIONS=32 and run it again";
        return Err(format!(
            "{sharing} ranks on a device have {streams} streams for {queues} queues: {advice}"
        )
        .into());
    }
    match limits.sms.saturating_sub(BLOCKS * sharing) / sharing {
        0 => Err(format!("{} has no multiprocessor left for a computation", limits.name).into()),
        blocks => Ok(blocks),
    }
}

/// Rows of a rank that were copied by `stream`, for the engine.
fn on_device(tokens: CudaSlice<u16>, stream: &CudaStream) -> DeviceSlice<bf16> {
    let (address, len) = (tokens.device_ptr(stream).0, tokens.len());
    // SAFETY: a bf16 is its bits; they lie at `address` as long as the owner lives, in memory of the rank's device, and
    // nobody writes them any more: the copy is waited for in `Gpu::new`.
    unsafe { DeviceSlice::from_raw(address, len, tokens) }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Sequential,
    Overlapped,
}

/// When a dispatch and a computation were under way, in milliseconds: start and end.
struct Spans {
    dispatch: [f64; 2],
    compute: [f64; 2],
}

impl Spans {
    fn total(&self) -> f64 {
        self.dispatch[1].max(self.compute[1])
    }

    fn rows(&self) -> [Row; 2] {
        let row = |name, [start, end]: [f64; 2]| Row { name, start, end };
        [row("dispatch", self.dispatch), row("compute", self.compute)]
    }
}

struct Rank<'a> {
    comm: Communicator,
    gpu: &'a mut Gpu,
}

impl Rank<'_> {
    /// Times both ways, sequential and overlapped by turns.
    fn measure(mut self) -> Result<[Vec<Spans>; 2], Failure> {
        // The first time warms up.
        self.layer(Way::Overlapped, TRIAL)?;
        let Spans { dispatch, compute } = self.layer(Way::Sequential, TRIAL)?;
        let ratio = (dispatch[1] - dispatch[0]) / (compute[1] - compute[0]);
        let rounds = (f64::from(TRIAL) * ratio) as u32;
        let mut spans = [Vec::new(), Vec::new()];
        for _ in 0..TIMES {
            spans[0].push(self.layer(Way::Sequential, rounds)?);
            spans[1].push(self.layer(Way::Overlapped, rounds)?);
        }
        Ok(spans)
    }

    /// A dispatch and `rounds` rounds of the computation.
    fn layer(&mut self, way: Way, rounds: u32) -> Result<Spans, Failure> {
        let topk_idx: Vec<_> = (0..TOKENS).flat_map(|token| experts(self.comm.rank(), token)).collect();
        let routing = Routing { topk: TOPK, topk_idx: &topk_idx, topk_weights: &[0.125; TOKENS * TOPK] };
        // The plan comes to its end on all ranks at about the same time: the timelines start here.
        let handle = self.comm.plan(routing)?;
        let buffer = self.comm.recv_buffer(handle.num_recv_tokens(), SHAPE)?;

        let [own, watch] = [&self.gpu.stream, &self.gpu.watch].map(|stream| {
            // SAFETY: streams of the rank's device; they outlive the communicator, hence its operations.
            unsafe { StreamRef::from_raw(stream.cu_stream() as u64) }
        });
        self.gpu.events.begin.record(&self.gpu.stream)?;
        self.comm.use_stream((way == Way::Sequential).then_some(own));
        self.comm.after(own)?;
        let pending = self.comm.start_dispatch(&handle, self.gpu.tokens.clone(), buffer);
        pending.before(watch)?;
        self.gpu.events.dispatched.record(&self.gpu.watch)?;
        self.gpu.compute(rounds)?;

        let received = pending.wait().map_err(railhop::Error::from)?.buffer;
        self.gpu.stream.synchronize()?;
        self.check(&received, rounds)?;
        self.spans()
    }

    /// What the events say. An event of the caller's stream before the computation is one after the dispatch, if that is
    /// on the same stream.
    fn spans(&self) -> Result<Spans, Failure> {
        let Events { begin, dispatched, compute, computed } = &self.gpu.events;
        let at = |event: &CudaEvent| begin.elapsed_ms(event).map(f64::from);
        Ok(Spans { dispatch: [0.0, at(dispatched)?], compute: [at(compute)?, at(computed)?] })
    }

    /// The rows are all tokens that name an expert of this rank, and the numbers what the host computes.
    fn check(&self, received: &RecvBuffer, rounds: u32) -> Result<(), Failure> {
        let (rank, placement) = (self.comm.rank(), self.comm.config().placement());
        let comes = |&(home, token): &(usize, usize)| {
            let ranks: BTreeSet<_> =
                experts(home, token).map(|expert| placement.rank_of(expert as usize)).collect();
            ranks.contains(&rank)
        };
        let all = (0..RANKS).flat_map(|home| (0..TOKENS).map(move |token| (home, token)));
        let sources = received.sources().iter().map(|source| (source.rank as usize, source.token as usize));
        if !sources.clone().eq(all.filter(comes)) {
            return Err(format!("rank {rank}: other tokens came than were sent").into());
        }
        let (bits, pattern) = (received.bf16().reinterpret_cast(), pattern());
        let mut rows = bits.chunks_exact(HIDDEN).zip(sources);
        if let Some((_, (home, token))) =
            rows.find(|(row, (home, token))| *row != &pattern[place(*home, *token)..][..HIDDEN])
        {
            return Err(
                format!("rank {rank}: token {token} of rank {home} is another row than was sent").into()
            );
        }
        let out = self.gpu.stream.clone_dtoh(&self.gpu.out)?;
        let wrong = (0..out.len())
            .step_by(out.len() / 7)
            .find(|&i| out[i].to_bits() != computed(i, rounds).to_bits());
        match wrong {
            Some(i) => Err(format!("rank {rank}: thread {i} computed another number than the host").into()),
            None => Ok(()),
        }
    }
}

/// The experts of a token.
fn experts(rank: usize, token: usize) -> impl Iterator<Item = i64> {
    (0..TOPK).map(move |k| ((rank + token * 7 + k * 5) % EXPERTS) as i64)
}

/// The bits of all rows: a token's row begins at its [`place`].
fn pattern() -> Vec<u16> {
    // Neither infinite nor NaN, which would do no harm but look odd.
    let bits = |i: usize| ((i as u32).wrapping_mul(0x9e37_79b9) >> 16) as u16 & 0xbfff;
    (0..place(RANKS, 0) + HIDDEN).map(bits).collect()
}

fn place(rank: usize, token: usize) -> usize {
    rank * TOKENS + token
}

/// The rows of a rank's tokens [T, hidden], as bits.
fn tokens(rank: usize) -> Vec<u16> {
    let pattern = pattern();
    (0..TOKENS).flat_map(|token| pattern[place(rank, token)..][..HIDDEN].iter().copied()).collect()
}

/// What thread `i` of the kernel comes to.
fn computed(i: usize, rounds: u32) -> f32 {
    (0..rounds).fold(i as f32 / 131_072.0, |x, _| (x * -1.9).mul_add(x, 1.0))
}
