//! Worlds of the CUDA engine with memory of the caller's on their devices, whatever the drivers; and what they must come
//! to.

#![allow(dead_code, reason = "every test file takes what it needs")]

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytemuck::Pod;
use half::bf16;
use railhop::device::{Driver, Memory, Place, Stream};
use railhop::error::Fault;
use railhop::reference::oracle::RankTokens;
use railhop::reference::trace::Trace;
use railhop::{
    Combine, Combined, Config, DeviceRouting, DeviceSlice, Dispatched, EngineKind, Error, Handle, LocalWorld,
    Recorded, RecvBuffer, RowFormat, RowShape, ScaleFormat, StreamRef,
};

use crate::common::{BF16, Case, Ranks, bits, config, contents, small_kernels};

/// All that a rank gets of a step: every received byte, and every sum.
#[derive(PartialEq)]
pub struct Seen {
    pub received: String,
    pub sums: Vec<u16>,
    pub weights: Vec<u32>,
}

pub fn seen(buffer: &RecvBuffer, handle: &Handle, x: &[bf16], weights: &[f32]) -> Seen {
    let counts = (handle.num_recv_tokens_per_expert(1), handle.num_hop1_tokens());
    let weights = weights.iter().map(|weight| weight.to_bits()).collect();
    Seen { received: format!("{:?}", (contents(buffer), counts)), sums: bits(x), weights }
}

/// What an engine makes of a case, by step and rank.
pub fn outcome(mut ranks: Ranks, cases: &[Case]) -> Vec<Vec<Seen>> {
    let step = |case: &Case| {
        let handles = ranks.plan(case);
        let received = ranks.dispatch(&handles, case.shape, |rank| case.x(rank));
        let outputs = ranks.experts(case, &received).into_iter().zip(&received).map(|(mut y, received)| {
            y.topk_weights_mut().copy_from_slice(received.buffer.topk_weights());
            Combine::new(y).with_topk_weights()
        });
        let combined: Vec<Combined<RecvBuffer>> = ranks.combine(&handles, outputs.collect::<Vec<_>>());
        let rank = |(received, combined): (&Dispatched<_>, &Combined<_>)| {
            seen(&received.buffer, &received.handle, &combined.x, &combined.topk_weights)
        };
        received.iter().zip(&combined).map(rank).collect::<Vec<_>>()
    };
    cases.iter().map(step).collect()
}

/// Steps of a trace on several shapes of world and in every format: the engine that `world` makes against the host's.
pub fn check_trace(path: &Path, tokens: usize, world: impl Fn(&Config) -> Ranks) {
    let trace = Trace::read(path).unwrap();
    for (nodes, ranks) in [(1, 8), (2, 4), (4, 2)] {
        for format in [RowFormat::Bf16, RowFormat::Fp8(ScaleFormat::F32), RowFormat::Fp8(ScaleFormat::Ue8m0)]
        {
            let shape = RowShape { hidden: trace.hidden, topk: trace.topk, format };
            let case = |config: &Config, step| {
                let owned = |rank: RankTokens<'_>| RankTokens {
                    topk_idx: rank.topk_idx.into_owned().into(),
                    topk_weights: rank.topk_weights.into_owned().into(),
                    x: rank.x.into_owned().into(),
                };
                let ranks = trace.step(step, config.topology().world_size(), tokens).into_iter().map(owned);
                Case { config: config.clone(), shape, ranks: ranks.collect() }
            };
            let with_pool = |bytes| {
                let config = config(nodes, ranks).experts(trace.num_experts).max_hidden(trace.hidden);
                let config = config.max_topk(trace.topk).max_tokens(tokens.max(256)).channels(2);
                config.pool_bytes(bytes).build().unwrap()
            };
            let plain = with_pool(0);
            let cases = [0, 1].map(|step| case(&plain, step));
            let most = cases.iter().map(Case::buffer_bytes).max().unwrap();
            // What was received, what comes back, and each on its way from and to the host.
            let config = with_pool((8 << 20) + 4 * most);
            let cases = [0, 1].map(|step| case(&config, step));
            let kernels = outcome(world(&config), &cases);
            assert!(kernels == outcome(Ranks::on_host(&config), &cases), "{nodes}x{ranks} {format:?}");
        }
    }
}

// ---- rows in device memory

/// A world on devices, and memory of the caller's there.
pub struct OnDevice {
    pub ranks: Ranks,
    pub drivers: Vec<Arc<dyn Driver>>,
    pub streams: Vec<Stream>,
}

impl OnDevice {
    /// A driver for each rank.
    pub fn new(config: &Config, drivers: Vec<Arc<dyn Driver>>) -> Self {
        let kernels = config.clone().on(EngineKind::Cuda(small_kernels()));
        let comms = LocalWorld::on_drivers(kernels, drivers.clone()).unwrap().into_communicators();
        let streams = drivers.iter().map(|driver| Stream::new(driver).unwrap()).collect();
        Self { ranks: Ranks { comms }, drivers, streams }
    }

    /// Memory for `len` elements.
    pub fn room<T>(&self, rank: usize, len: usize) -> DeviceSlice<T> {
        let bytes = (len * size_of::<T>()).max(1);
        let memory = Memory::new(&self.drivers[rank], Place::Device, bytes).unwrap();
        // SAFETY: the slice owns the memory, and the tests wait before they look.
        unsafe { DeviceSlice::from_raw(memory.address(), len, memory) }
    }

    pub fn write<T: Pod>(&self, rank: usize, to: &DeviceSlice<T>, values: &[T]) {
        assert!(values.len() <= to.len());
        // SAFETY: as long as that, and in no operation.
        unsafe {
            let from = values.as_ptr() as u64;
            self.streams[rank].copy_now(to.address(), from, size_of_val(values)).unwrap();
        }
    }

    pub fn of<T: Pod>(&self, rank: usize, values: &[T]) -> DeviceSlice<T> {
        let slice = self.room(rank, values.len());
        self.write(rank, &slice, values);
        slice
    }

    pub fn read<T: Pod>(&self, rank: usize, from: &DeviceSlice<T>) -> Vec<T> {
        let mut values = vec![T::zeroed(); from.len()];
        // SAFETY: as long as that, and in no operation.
        unsafe {
            let to = values.as_mut_ptr() as u64;
            self.streams[rank].copy_now(to, from.address(), size_of_val(&values[..])).unwrap();
        }
        values
    }

    /// The stream of a rank, for what the caller enqueues.
    pub fn stream(&self, rank: usize) -> StreamRef {
        // SAFETY: it lives as long as the world.
        unsafe { StreamRef::from_raw(self.streams[rank].raw().0) }
    }

    pub fn synchronize(&self) {
        for (driver, stream) in self.drivers.iter().zip(&self.streams) {
            // SAFETY: it is alive.
            unsafe { driver.synchronize(stream.raw()).unwrap() };
        }
    }

    pub fn routing(&self, case: &Case, rank: usize) -> DeviceRouting {
        let tokens = &case.ranks[rank];
        let (topk_idx, topk_weights) = (self.of(rank, &tokens.topk_idx), self.of(rank, &tokens.topk_weights));
        DeviceRouting { topk: case.shape.topk, topk_idx, topk_weights }
    }
}

// ---- recorded operations

/// A recorded layer of one rank: the experts are the identity.
pub struct Layer {
    pub dispatch: Recorded<(DeviceRouting, DeviceSlice<bf16>, RecvBuffer)>,
    pub combine: Recorded<Combine<RecvBuffer>>,
    pub routing: DeviceRouting,
    pub x: DeviceSlice<bf16>,
    pub out: DeviceSlice<bf16>,
}

/// Tokens of each rank.
pub const TOKENS: usize = 12;

pub fn layers(world: &mut OnDevice, shape: RowShape, capacity: usize) -> Vec<Layer> {
    let ranks = world.drivers.len();
    let mut layer = |rank: usize| {
        let routing = DeviceRouting {
            topk: shape.topk,
            topk_idx: world.room(rank, TOKENS * shape.topk),
            topk_weights: world.room(rank, TOKENS * shape.topk),
        };
        let (x, out) = (world.room(rank, TOKENS * shape.hidden), world.room(rank, TOKENS * shape.hidden));
        let comm = &mut world.ranks.comms[rank];
        let buffer = comm.recv_buffer(capacity, shape).unwrap();
        let dispatch = comm.record_plan_dispatch(routing.clone(), x.clone(), buffer).unwrap();
        let outputs = comm.recv_buffer(capacity, shape).unwrap();
        let combine = Combine::new(outputs).device_out(out.clone());
        let combine = comm.record_combine(dispatch.handle(), combine).unwrap();
        Layer { dispatch, combine, routing, x, out }
    };
    (0..ranks).map(&mut layer).collect()
}

pub fn fill(world: &OnDevice, layers: &[Layer], case: &Case) {
    for (rank, layer) in layers.iter().enumerate() {
        let tokens = &case.ranks[rank];
        world.write(rank, &layer.routing.topk_idx, &tokens.topk_idx);
        world.write(rank, &layer.routing.topk_weights, &tokens.topk_weights);
        world.write(rank, &layer.x, &tokens.x);
    }
}

pub fn dispatch(world: &OnDevice, layers: &[Layer]) -> Vec<Result<usize, Error>> {
    for (rank, layer) in layers.iter().enumerate() {
        // SAFETY: waited for below; every rank does the same.
        unsafe { layer.dispatch.enqueue(world.stream(rank)).unwrap() };
    }
    world.synchronize();
    layers.iter().map(|layer| layer.dispatch.outcome().unwrap()).collect()
}

/// Who is blamed when `missing` does not dispatch, and all others do.
pub fn blamed(world: &OnDevice, layers: &[Layer], missing: usize) -> Arc<Fault> {
    let others = || layers.iter().enumerate().filter(|(rank, _)| *rank != missing);
    for (rank, layer) in others() {
        // SAFETY: waited for below.
        unsafe { layer.dispatch.enqueue(world.stream(rank)).unwrap() };
    }
    world.synchronize();
    let (_, layer) = others().next().expect("others");
    let begun = Instant::now();
    loop {
        match layer.dispatch.outcome() {
            Some(Err(Error::Fault(fault))) => return fault,
            outcome => assert!(outcome.is_none(), "{outcome:?}"),
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "nobody is blamed");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Exactly [`TOKENS`] tokens for each rank.
pub fn full(config: &Config, seed: u64) -> Vec<RankTokens<'static>> {
    let longest = |case: &Case, rank: usize| case.ranks[rank].topk_weights.len() / BF16.topk;
    let rank = |rank: usize| {
        let cases = (0..).map(|i| Case::random(config, BF16, TOKENS, 1000 * seed + i));
        let mut full = cases.filter(|case| longest(case, rank) == TOKENS);
        full.next().expect("one in thirteen is full").ranks.swap_remove(rank)
    };
    (0..config.topology().world_size()).map(rank).collect()
}
