//! What needs a CUDA device:
//! `CUDA_DEVICE_MAX_CONNECTIONS=32 cargo test --release --test gpu -- --ignored`, or `ci/gpu` on a machine without cargo.
//!
//! `RAILHOP_TRACES` names a folder of more traces to replay.
#![allow(unsafe_code, reason = "memory, streams and graphs of the caller's have contracts")]

mod common;
#[path = "common/device.rs"]
mod device;
#[path = "common/local.rs"]
mod local;

use std::env;
use std::ffi::CStr;
use std::path::PathBuf;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytemuck::{Pod, bytes_of};
use common::{BF16, Case, Random, Ranks, config, contents, data, small_kernels};
use cudarc::driver::sys::{self, CUgraphExec, CUstream, CUstreamCaptureMode};
use device::{Layer, OnDevice, Seen, TOKENS, blamed, check_trace, dispatch, fill, full, layers, outcome};
use half::bf16;
use local::Launch;
use proptest::prelude::*;
use railhop::device::cuda::CudaDriver;
use railhop::device::{Driver, Event, Grid, Kernel, Memory, Place, RawStream, Stream};
use railhop::error::Reason;
use railhop::reference::oracle::RankTokens;
use railhop::wire::local::CopyParams;
use railhop::{Combine, Config, EngineKind, Error, LocalWorld, RowFormat, RowShape, ScaleFormat};

/// Tests may have kernels compiled, and steps of whole traces to replay on the host.
const LIMIT: Duration = Duration::from_secs(300);

/// One at a time: kernels of two worlds could keep each other from the device, and wait for peers that never start.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    // A test that has failed has left nothing in it.
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a test, alone.
fn within(body: impl FnOnce() + Send + 'static) {
    let _alone = alone();
    driver();
    common::within(LIMIT, body);
}

/// The first device, open until the process ends.
fn driver() -> Arc<dyn Driver> {
    static DRIVER: OnceLock<Arc<CudaDriver>> = OnceLock::new();
    DRIVER.get_or_init(|| CudaDriver::open(0).unwrap_or_else(|error| panic!("{error}"))).clone()
}

/// Ranks on it.
fn on_cuda(config: &Config) -> Ranks {
    let kernels = config.clone().on(EngineKind::Cuda(small_kernels()));
    let drivers = vec![driver(); config.topology().world_size()];
    Ranks { comms: LocalWorld::on_drivers(kernels, drivers).unwrap().into_communicators() }
}

fn world(config: &Config) -> OnDevice {
    OnDevice::new(config, vec![driver(); config.topology().world_size()])
}

// ---- kernels of one rank

/// Memory of the device that holds values.
fn holding<T: Pod>(place: Place, values: &[T]) -> Memory {
    let memory = Memory::new(&driver(), place, size_of_val(values)).unwrap();
    let stream = Stream::new(&driver()).unwrap();
    // SAFETY: as many bytes on both sides, which nobody else knows.
    unsafe { stream.copy_now(memory.address(), values.as_ptr() as u64, size_of_val(values)).unwrap() };
    memory
}

/// What is in it.
fn held<T: Pod>(memory: &Memory) -> Vec<T> {
    let mut values = vec![T::zeroed(); memory.bytes() / size_of::<T>()];
    let stream = Stream::new(&driver()).unwrap();
    // SAFETY: as many bytes on both sides, which nobody writes.
    unsafe {
        let to = values.as_mut_ptr() as u64;
        stream.copy_now(to, memory.address(), size_of_val(&values[..])).unwrap();
    }
    values
}

/// Runs a kernel on copies of its memories, whose addresses take the place of theirs in its parameters.
fn run(launch: &Launch<'_>) {
    let driver = driver();
    let copies: Vec<_> =
        launch.memories.iter().map(|memory| holding(Place::Device, memory.bytes())).collect();
    let mut params = launch.params.to_vec();
    for word in params.chunks_exact_mut(8) {
        let named = u64::from_le_bytes((&*word).try_into().unwrap());
        let names = |memory: &&local::Memory| {
            (memory.address()..memory.address() + memory.bytes().len() as u64).contains(&named)
        };
        if let Some(found) = launch.memories.iter().position(names) {
            let moved = copies[found].address() + (named - launch.memories[found].address());
            word.copy_from_slice(&moved.to_le_bytes());
        }
    }
    let grid = Grid { blocks: launch.blocks, warps: launch.warps, shared: 0 };
    let stream = Stream::new(&driver).unwrap();
    // SAFETY: what the kernel takes, which stays until it has ended.
    unsafe {
        driver.launch(stream.raw(), launch.kernel, grid, &params).unwrap();
        driver.synchronize(stream.raw()).unwrap();
    }
    for (memory, copy) in launch.memories.iter().zip(&copies) {
        // SAFETY: as many bytes on both sides. The memory is the test's, which looks when this has returned.
        unsafe { stream.copy_now(memory.address(), copy.address(), copy.bytes()).unwrap() };
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(local::cases()))]

    #[test]
    #[ignore = "needs a CUDA device"]
    fn orders_and_expands_as_the_host(case in local::case()) {
        let _alone = alone();
        local::orders_and_expands(&case, run);
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn collapses_as_the_host(case in local::case()) {
        let _alone = alone();
        local::collapses(&case, run);
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn dequantises_as_the_host(case in local::case(), short in any::<bool>()) {
        let _alone = alone();
        local::dequantises(&case, short, run);
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn local_kernels_take_what_they_must_and_refuse_the_rest() {
    within(|| {
        local::takes_long_rows(run);
        local::orders_many_entries(run);
        local::refuses_what_makes_no_order(run);
    });
}

#[test]
#[ignore = "needs a CUDA device"]
fn copies_whatever_size() {
    within(|| local::copies(run));
}

// ---- memory, copies, events, stores

const PLACES: [Place; 3] = [Place::Shared, Place::Device, Place::Host];

#[test]
#[ignore = "needs a CUDA device"]
fn memory_is_zeroed_and_aligned_and_comes_back() {
    within(|| {
        for place in PLACES {
            for bytes in [1, 300, 4096, (2 << 20) + 8] {
                // The second time it may be what the first has left.
                for _ in 0..2 {
                    let memory = Memory::new(&driver(), place, bytes).unwrap();
                    assert_eq!((memory.address() % 256, memory.bytes()), (0, bytes));
                    assert!(held::<u8>(&memory).iter().all(|&byte| byte == 0), "{place:?} {bytes}");
                    let ones = vec![0xFFu8; bytes];
                    let stream = Stream::new(&driver()).unwrap();
                    // SAFETY: as many bytes on both sides.
                    unsafe { stream.copy_now(memory.address(), ones.as_ptr() as u64, bytes).unwrap() };
                    assert!(held::<u8>(&memory) == ones);
                }
            }
        }
        let shared = Memory::new(&driver(), Place::Shared, 4096).unwrap();
        assert_eq!(shared.reached_by(&*driver()), Ok(shared.address()));
    });
}

#[test]
#[ignore = "needs a CUDA device"]
fn copies_are_made_between_all_places() {
    within(|| {
        let mut random = Random(1);
        let values: Vec<u8> = (0..100_000).map(|_| random.next() as u8).collect();
        let stream = Stream::new(&driver()).unwrap();
        for (from, to) in PLACES.into_iter().flat_map(|from| PLACES.map(|to| (from, to))) {
            let (from, to) = (holding(from, &values), holding(to, &vec![0u8; values.len()]));
            let mut at = 0;
            for bytes in [1, 3, 8, 13, 4096, 65_535, values.len()] {
                let bytes = bytes.min(values.len() - at as usize);
                // SAFETY: within both memories; nothing else uses them.
                unsafe { stream.copy_now(to.address() + at, from.address() + at, bytes).unwrap() };
                at += bytes as u64;
            }
            assert!(held::<u8>(&to) == values);
        }
    });
}

/// Enqueues a copy by the kernel, between memories of the same size.
fn copy(stream: RawStream, from: &Memory, to: &Memory) {
    let params = CopyParams { from: from.address(), to: to.address(), bytes: from.bytes() as u64 };
    let grid = Grid { blocks: 2, warps: 4, shared: 0 };
    // SAFETY: what the kernel takes; the tests keep the memories until they have waited.
    unsafe { driver().launch(stream, Kernel::Copy, grid, bytes_of(&params)).unwrap() };
}

#[test]
#[ignore = "needs a CUDA device"]
fn streams_wait_for_events_of_others() {
    within(|| {
        let driver = driver();
        let streams = [(); 2].map(|()| Stream::new(&driver).unwrap());
        let values: Vec<u64> = (0..1 << 16).collect();
        let first = holding(Place::Device, &values);
        let stages: Vec<_> =
            (0..6).map(|_| Memory::new(&driver, Place::Device, first.bytes()).unwrap()).collect();
        let events: Vec<_> = stages.iter().map(|_| Event::new(&driver).unwrap()).collect();
        assert!(events[0].is_done().unwrap(), "done until it is recorded");
        for stage in 0..stages.len() {
            let stream = streams[stage % 2].raw();
            // SAFETY: streams and events are alive.
            unsafe {
                if stage > 0 {
                    driver.wait(stream, events[stage - 1].raw()).unwrap();
                }
                copy(stream, if stage == 0 { &first } else { &stages[stage - 1] }, &stages[stage]);
                driver.record(events[stage].raw(), stream).unwrap();
            }
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while !events[5].is_done().unwrap() {
            assert!(Instant::now() < deadline, "the event is never done");
        }
        assert!(held::<u64>(&stages[5]) == values);
        assert!(events.iter().all(|event| event.is_done().unwrap()));
        // SAFETY: they are alive.
        streams.iter().for_each(|stream| unsafe { driver.synchronize(stream.raw()).unwrap() });
    });
}

/// A store is seen after what came before it on its stream, also by a host that only looks.
#[test]
#[ignore = "needs a CUDA device"]
fn stores_come_after_copies() {
    within(|| {
        let driver = driver();
        let stream = Stream::new(&driver).unwrap();
        let there = Memory::new(&driver, Place::Host, 1 << 20).unwrap();
        let word = Memory::new(&driver, Place::Host, 8).unwrap();
        let shared = Memory::new(&driver, Place::Shared, 8).unwrap();
        // SAFETY: a word of pinned memory, which lives as long as the test.
        let seen = unsafe { AtomicU64::from_ptr(word.address() as *mut u64) };
        for turn in 1..100u64 {
            let from = holding(Place::Device, &vec![turn; there.bytes() / 8]);
            // SAFETY: as many bytes, and words, that live until all has ended.
            unsafe {
                driver.copy(stream.raw(), there.address(), from.address(), from.bytes()).unwrap();
                driver.store(stream.raw(), word.address(), turn << 40 | turn).unwrap();
                driver.store(stream.raw(), shared.address(), turn).unwrap();
            }
            let deadline = Instant::now() + Duration::from_secs(60);
            while seen.load(Ordering::Acquire) != turn << 40 | turn {
                assert!(Instant::now() < deadline, "the store never comes");
            }
            let words = there.address() as *const u64;
            // SAFETY: within the memory, which nothing writes by now.
            let came = (0..there.bytes() / 8).all(|i| unsafe { words.add(i).read_volatile() } == turn);
            assert!(came, "a store overtook a copy");
            // SAFETY: it is alive.
            unsafe { driver.synchronize(stream.raw()).unwrap() };
            assert_eq!(held::<u64>(&shared), [turn]);
        }
    });
}

// ---- graphs

/// `cuda!(cuInit(0))` calls the driver, which must succeed. Unsafe as the call is.
macro_rules! cuda {
    ($name:ident($($argument:expr),* $(,)?)) => {
        assert_eq!(sys::$name($($argument),*), sys::CUresult::CUDA_SUCCESS, stringify!($name))
    };
}

/// Whether the driver has a call: one that stands on the shim has not all.
fn has(call: &CStr) -> bool {
    // SAFETY: the driver is open, so there is a library; the call is looked up and not made.
    unsafe { sys::culib().get::<unsafe extern "C" fn()>(call.to_bytes_with_nul()).is_ok() }
}

/// Puts the calling thread in the device's context, as a program that uses CUDA would be.
fn enter_context() {
    let mut context = ptr::null_mut();
    // SAFETY: the calls write a handle and use it; the context is never given back.
    unsafe {
        cuda!(cuDevicePrimaryCtxRetain(&mut context, 0));
        cuda!(cuCtxSetCurrent(context));
    }
}

/// A graph, to be launched on one stream.
struct Graph {
    exec: CUgraphExec,
    stream: CUstream,
}

impl Graph {
    /// What `enqueue` does to `stream`.
    fn capture(stream: &Stream, mode: CUstreamCaptureMode, enqueue: impl FnOnce()) -> Self {
        let (mut graph, mut exec) = (ptr::null_mut(), ptr::null_mut());
        let stream = stream.raw().0 as CUstream;
        // SAFETY: the stream is alive, and the calls write handles. The graph is not needed once it is instantiated.
        unsafe {
            cuda!(cuStreamBeginCapture_v2(stream, mode));
            enqueue();
            cuda!(cuStreamEndCapture(stream, &mut graph));
            cuda!(cuGraphInstantiateWithFlags(&mut exec, graph, 0));
            cuda!(cuGraphDestroy(graph));
            // Otherwise the first launch does it, and may wait for kernels that wait for this one.
            cuda!(cuGraphUpload(exec, stream));
        }
        Self { exec, stream }
    }

    fn launch(&self) {
        // SAFETY: both are alive.
        unsafe { cuda!(cuGraphLaunch(self.exec, self.stream)) };
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated once; the tests have waited for every launch, unless they fail.
        unsafe { sys::cuGraphExecDestroy(self.exec) };
    }
}

/// Dispatch, experts (the identity, as a kernel between), and combine in one graph of each rank; routing, tokens and all
/// that follows from them differ with every replay, and the host's own operations come in between.
#[test]
#[ignore = "needs a CUDA device"]
fn graphs_are_replayed_with_other_routing() {
    within(|| {
        enter_context();
        let modes = [
            CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
            CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED,
        ];
        // Without graphs the same is enqueued again and again: the rest of the test holds.
        let modes = if has(c"cuStreamBeginCapture_v2") { modes.map(Some).to_vec() } else { vec![None] };
        for (mode, (nodes, ranks)) in modes.into_iter().flat_map(|mode| [(mode, (1, 4)), (mode, (2, 2))]) {
            println!("{nodes}x{ranks}, captured: {mode:?}");
            replay(&config(nodes, ranks).first_index((1 << 48) - 3).build().unwrap(), mode);
        }
    });
}

/// Enqueues all three.
fn enqueue(world: &OnDevice, rank: usize, layer: &Layer, experts: &CopyParams) {
    let grid = Grid { blocks: 1, warps: 4, shared: 0 };
    // SAFETY: rows and recordings outlive streams and graphs, and every rank enqueues the same.
    unsafe {
        layer.dispatch.enqueue(world.stream(rank)).unwrap();
        let stream = world.streams[rank].raw();
        world.drivers[rank].launch(stream, Kernel::Copy, grid, bytes_of(experts)).unwrap();
        layer.combine.enqueue(world.stream(rank)).unwrap();
    }
}

fn replay(config: &Config, mode: Option<CUstreamCaptureMode>) {
    let mut world = world(config);
    let mut layers = layers(&mut world, BF16, config.topology().world_size() * TOKENS);
    let experts = |layer: &mut Layer| {
        let (_, _, received) = layer.dispatch.kept();
        let bytes = (received.capacity() * received.shape().row_bytes()) as u64;
        let from = received.device().unwrap().x;
        CopyParams { from, to: layer.combine.kept().outputs_mut().device().unwrap().x, bytes }
    };
    let experts: Vec<_> = layers.iter_mut().map(experts).collect();
    let capture = |rank: usize| {
        let enqueue = || enqueue(&world, rank, &layers[rank], &experts[rank]);
        mode.map(|mode| Graph::capture(&world.streams[rank], mode, enqueue))
    };
    let graphs: Vec<_> = (0..layers.len()).map(capture).collect();
    world.synchronize();
    assert!(layers.iter().all(|layer| layer.dispatch.outcome().is_none()), "captured, and not executed");
    for seed in 0..8 {
        let case = Case { ranks: full(config, seed), ..Case::regular(config, BF16, TOKENS) };
        fill(&world, &layers, &case);
        for (rank, graph) in graphs.iter().enumerate() {
            match graph {
                Some(graph) => graph.launch(),
                None => enqueue(&world, rank, &layers[rank], &experts[rank]),
            }
        }
        world.synchronize();
        let mut host = Ranks::on_host(config);
        let handles = host.plan(&case);
        let received = host.dispatch(&handles, BF16, |rank| case.x(rank));
        for (rank, layer) in layers.iter_mut().enumerate() {
            let rows = handles[rank].num_recv_tokens();
            assert_eq!(layer.dispatch.outcome(), Some(Ok(rows)));
            let (_, _, buffer) = layer.dispatch.kept();
            buffer.refresh();
            buffer.set_rows(rows);
            assert!(contents(buffer) == contents(&received[rank].buffer), "rows of rank {rank}");
            buffer.set_rows(buffer.capacity());
        }
        let received = received.into_iter().map(|received| Combine::new(received.buffer));
        let combined = host.combine(&handles, received.collect::<Vec<_>>());
        for (rank, layer) in layers.iter().enumerate() {
            assert!(layer.combine.outcome().unwrap().is_ok());
            let sums = common::bits(&world.read(rank, &layer.out));
            assert!(sums == common::bits(&combined[rank].x), "sums of rank {rank}");
        }
        match seed % 3 {
            0 => world.ranks.round_trip(&case),
            // The same recording without its graph.
            1 => assert!(dispatch(&world, &layers).iter().all(Result::is_ok)),
            _ => {}
        }
    }
}

// ---- faults

#[test]
#[ignore = "needs a CUDA device"]
fn a_rank_that_never_sends_is_a_fault_and_the_device_works_on() {
    within(|| {
        let config = config(2, 2).deadline(Duration::from_millis(300)).build().unwrap();
        let mut world = world(&config);
        let layers = layers(&mut world, BF16, 4 * TOKENS);
        let case = Case { ranks: full(&config, 1), ..Case::regular(&config, BF16, TOKENS) };
        fill(&world, &layers, &case);
        for round in 0..2 {
            let begun = Instant::now();
            if round == 0 {
                let fault = blamed(&world, &layers, 2);
                assert_eq!(fault.rank, 2, "{fault}");
            } else {
                let absent = |comm: &mut railhop::Communicator| {
                    (comm.rank() != 2).then(|| comm.start_plan(case.routing(comm.rank())))
                };
                let started: Vec<_> = world.ranks.each(absent).into_iter().flatten().collect();
                for pending in started {
                    let error = pending.wait().map(drop).map_err(Error::from).unwrap_err();
                    assert!(matches!(&error, Error::Fault(fault) if fault.rank == 2), "{error}");
                }
            }
            assert!(begun.elapsed() >= Duration::from_millis(300));
            world.ranks.at_once(|comm| comm.reset().unwrap());
            let stale = Error::Refused { rank: 0, reason: Reason::StaleHandle };
            // SAFETY: nothing is enqueued.
            assert_eq!(unsafe { layers[0].dispatch.enqueue(world.stream(0)) }, Err(stale));
            world.ranks.round_trip(&case);
        }
        local::copies(run);
    });
}

// ---- numbers

const FORMATS: [RowFormat; 3] =
    [RowFormat::Bf16, RowFormat::Fp8(ScaleFormat::F32), RowFormat::Fp8(ScaleFormat::Ue8m0)];

/// A case whose rows or weights a function has changed, on both engines.
fn on_both(format: RowFormat, change: impl Fn(&mut Random, &mut RankTokens<'static>)) -> [Vec<Seen>; 2] {
    let config = config(2, 2).build().unwrap();
    let shape = RowShape { hidden: 256, topk: 4, format };
    let mut case = Case::random(&config, shape, 30, 77);
    let mut random = Random(7);
    case.ranks.iter_mut().for_each(|tokens| change(&mut random, tokens));
    let cases = [case];
    [on_cuda(&config), Ranks::on_host(&config)].map(|ranks| outcome(ranks, &cases).remove(0))
}

/// Fails with the first places where the two differ.
fn assert_same<T: PartialEq + std::fmt::LowerHex>(what: &str, device: &[T], host: &[T]) {
    let differ = device.iter().zip(host).enumerate().filter(|(_, (device, host))| device != host);
    let places: Vec<_> =
        differ.map(|(at, (device, host))| format!("{at}: {device:#x}, not {host:#x}")).collect();
    let some = &places[..places.len().min(8)];
    assert!(places.is_empty() && device.len() == host.len(), "{what}: {} differ: {some:?}", places.len());
}

fn assert_equal([device, host]: [Vec<Seen>; 2], format: RowFormat) {
    for (rank, (device, host)) in device.iter().zip(&host).enumerate() {
        assert!(device.received == host.received, "{format:?}: rows of rank {rank}");
        assert_same(&format!("{format:?}: sums of rank {rank}"), &device.sums, &host.sums);
        assert_same(&format!("{format:?}: weights of rank {rank}"), &device.weights, &host.weights);
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn rows_that_are_no_numbers_are_the_host_engines() {
    within(|| {
        for format in FORMATS {
            // Any bits at all, then a few of the worst among ordinary ones.
            let any = |random: &mut Random, tokens: &mut RankTokens<'static>| {
                tokens.x.to_mut().iter_mut().for_each(|x| *x = bf16::from_bits(random.next() as u16));
            };
            assert_equal(on_both(format, any), format);
            let worst = |random: &mut Random, tokens: &mut RankTokens<'static>| {
                for x in tokens.x.to_mut() {
                    if random.one_in(8) {
                        let bits =
                            [0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFFFF, 0x7F7F, 0xFF7F, 0x0001, 0x8000];
                        *x = bf16::from_bits(bits[random.below(bits.len())]);
                    }
                }
            };
            assert_equal(on_both(format, worst), format);
        }
    });
}

/// Weights are passed on as they are, and their sums come back: of one NaN, of several, of infinities of both signs.
#[test]
#[ignore = "needs a CUDA device"]
fn weights_that_are_no_numbers_are_the_host_engines() {
    within(|| {
        for format in FORMATS {
            let worst = |random: &mut Random, tokens: &mut RankTokens<'static>| {
                for weight in tokens.topk_weights.to_mut() {
                    if random.one_in(3) {
                        let bits =
                            [0x7F80_0000, 0xFF80_0000, 0x7FC0_1234, 0xFFA0_0001, 0x7F80_0001, 0x0000_0001];
                        *weight = f32::from_bits(bits[random.below(bits.len())]);
                    }
                }
            };
            assert_equal(on_both(format, worst), format);
        }
    });
}

// ---- processes

/// A rank that has the process to itself needs no queues beside the one that every program has.
#[test]
#[ignore = "needs a CUDA device"]
fn a_rank_alone_needs_one_queue() {
    const CHILD: &str = "RAILHOP_GPU_CHILD";
    if env::var_os(CHILD).is_some() {
        return within(|| {
            assert_eq!(driver().limits().connections, 1);
            let config = config(1, 1).build().unwrap();
            let mut world = world(&config);
            let layers = layers(&mut world, BF16, TOKENS);
            for seed in 0..4 {
                let case = Case { ranks: full(&config, seed), ..Case::regular(&config, BF16, TOKENS) };
                fill(&world, &layers, &case);
                world.ranks.round_trip(&case);
                assert!(dispatch(&world, &layers).iter().all(Result::is_ok));
            }
        });
    }
    let _alone = alone();
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--ignored", "--exact", "a_rank_alone_needs_one_queue"]);
    let output = child.env(CHILD, "1").env("CUDA_DEVICE_MAX_CONNECTIONS", "1").output().unwrap();
    let said =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

// ---- recorded routing

#[test]
#[ignore = "needs a CUDA device"]
fn traces_are_the_host_engines() {
    within(|| check_trace(&data("small.safetensors"), 64, on_cuda));
}

#[test]
#[ignore = "needs a CUDA device"]
fn more_traces_are_the_host_engines() {
    within(|| {
        let Some(folder) = env::var_os("RAILHOP_TRACES") else {
            return println!("RAILHOP_TRACES is not set");
        };
        let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
        let mut traces: Vec<PathBuf> =
            files.filter(|path| path.extension().is_some_and(|ext| ext == "safetensors")).collect();
        traces.sort();
        assert!(!traces.is_empty(), "there is no trace in the folder");
        for trace in traces {
            println!("{}", trace.display());
            check_trace(&trace, 64, on_cuda);
        }
    });
}
