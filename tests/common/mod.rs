//! What the API tests share: worlds with random tokens, the way through one of them, and a watchdog.

#![allow(dead_code, reason = "every test file takes what it needs")]

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "../shim/mod.rs"]
pub mod shim;

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use half::bf16;
use railhop::config::Staging;
use railhop::fabric::Fabric;
use railhop::reference::experts;
use railhop::reference::oracle::{Oracle, RankTokens};
use railhop::reference::verify::verify;
use railhop::wire::shape::RecvLayout;
use railhop::{
    Combine, Combined, Communicator, Config, ConfigBuilder, Cuda, Dispatched, EngineKind, ExpertOutputs,
    Handle, LocalWorld, RecvBuffer, Routing, RowFormat, RowShape, Tokens, Topology,
};

/// No test may take longer: it hangs.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Runs `body` on a thread of its own and fails when it does not end.
pub fn within<T: Send + 'static>(limit: Duration, body: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, outcome) = channel();
    let thread = thread::spawn(move || done.send(body()));
    match outcome.recv_timeout(limit) {
        Ok(value) => value,
        Err(RecvTimeoutError::Timeout) => panic!("still running after {limit:?}"),
        Err(RecvTimeoutError::Disconnected) => {
            resume_unwind(thread.join().expect_err("a body that ends well sends its value"))
        }
    }
}

/// SplitMix64.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// An element: mostly ordinary, now and then any bf16 at all, NaNs and infinities included.
    pub fn element(&mut self) -> bf16 {
        match self.below(64) {
            0 => bf16::from_bits(self.next() as u16),
            1 => [bf16::NEG_ZERO, bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY][self.below(4)],
            _ => bf16::from_f32((self.below(4001) as f32 - 2000.0) / 512.0),
        }
    }

    pub fn weight(&mut self) -> f32 {
        match self.below(32) {
            0 => [-0.0, f32::from_bits(0x7FC0_1234), f32::from_bits(0xFFA0_0001), 1e-40][self.below(4)],
            _ => self.below(1 << 20) as f32 / (1 << 20) as f32,
        }
    }

    /// An integer that sums of some dozens represent exactly in bf16.
    pub fn small(&mut self) -> bf16 {
        bf16::from_f32(self.below(7) as f32 - 3.0)
    }
}

/// A configuration for small tests.
pub fn config(nodes: usize, ranks_per_node: usize) -> ConfigBuilder {
    let topology = Topology::new(nodes, ranks_per_node).unwrap();
    Config::builder(topology)
        .experts(2 * topology.world_size())
        .max_hidden(512)
        .max_tokens(256)
        .worker_budget(2)
        .pool_bytes(8 << 20)
}

pub const BF16: RowShape = RowShape { hidden: 64, topk: 4, format: RowFormat::Bf16 };

/// One step of a world: every rank's tokens.
#[derive(Clone)]
pub struct Case {
    pub config: Config,
    pub shape: RowShape,
    pub ranks: Vec<RankTokens<'static>>,
}

impl Case {
    /// At most `tokens` random tokens for each rank.
    pub fn random(config: &Config, shape: RowShape, tokens: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let ranks = (0..config.topology().world_size())
            .map(|_| {
                let tokens = random.below(tokens + 1);
                Self::tokens(config, shape, tokens, &mut random)
            })
            .collect();
        Self { config: config.clone(), shape, ranks }
    }

    /// Exactly `tokens` tokens for each rank; token t names the experts t, t + 1, …
    pub fn regular(config: &Config, shape: RowShape, tokens: usize) -> Self {
        let mut random = Random(tokens as u64);
        let experts = config.placement().num_experts();
        let ranks = (0..config.topology().world_size())
            .map(|_| RankTokens {
                topk_idx: (0..tokens * shape.topk)
                    .map(|at| ((at / shape.topk + at % shape.topk) % experts) as i64)
                    .collect(),
                ..Self::tokens(config, shape, tokens, &mut random)
            })
            .collect();
        Self { config: config.clone(), shape, ranks }
    }

    fn tokens(config: &Config, shape: RowShape, tokens: usize, random: &mut Random) -> RankTokens<'static> {
        let experts = config.placement().num_experts();
        let topk_idx = (0..tokens).flat_map(|_| {
            // A third of the tokens have few experts, some of them none.
            let masked = if random.one_in(3) { random.below(shape.topk + 1) } else { 0 };
            let favourite = random.below(experts) as i64;
            let mut random = Random(random.next());
            (0..shape.topk).map(move |_| match random.below(shape.topk) < masked {
                true => -1,
                false if random.one_in(8) => favourite,
                false => random.below(experts) as i64,
            })
        });
        RankTokens {
            topk_idx: topk_idx.collect(),
            topk_weights: (0..tokens * shape.topk).map(|_| random.weight()).collect(),
            x: (0..tokens * shape.hidden).map(|_| random.element()).collect(),
        }
    }

    pub fn oracle(&self) -> Oracle<'_> {
        let RowShape { hidden, topk, format } = self.shape;
        Oracle { config: &self.config, hidden, topk, format, ranks: self.ranks.clone() }
    }

    pub fn routing(&self, rank: usize) -> Routing<'_> {
        let RankTokens { topk_idx, topk_weights, .. } = &self.ranks[rank];
        Routing { topk: self.shape.topk, topk_idx, topk_weights }
    }

    pub fn x(&self, rank: usize) -> Vec<bf16> {
        self.ranks[rank].x.to_vec()
    }

    /// The shape of the experts' outputs.
    pub fn outputs(&self) -> RowShape {
        RowShape { format: RowFormat::Bf16, ..self.shape }
    }

    /// Bytes of a buffer that holds whatever a rank may receive.
    pub fn buffer_bytes(&self) -> usize {
        let tokens = self.ranks.iter().map(|rank| rank.topk_weights.len() / self.shape.topk).sum();
        RecvLayout::new(self.outputs(), tokens).bytes.max(RecvLayout::new(self.shape, tokens).bytes).max(64)
    }

    /// The test experts' outputs for `received`.
    pub fn experts(&self, comm: &Communicator, received: &RecvBuffer) -> RecvBuffer {
        let mut y = comm.recv_buffer(received.rows(), self.outputs()).unwrap();
        y.set_rows(received.rows());
        experts::run(received, self.config.placement().experts_of(comm.rank()), y.bf16_mut());
        y
    }

    pub fn verify(&self, rank: usize, handle: &Handle, received: &RecvBuffer, combined: &[bf16]) {
        verify(&self.oracle(), rank, handle, received, combined).unwrap();
    }

    /// Plan, dispatch, experts, combine; everything as the oracle says.
    pub fn round_trip(&self, comm: &mut Communicator) {
        let rank = comm.rank();
        let handle = comm.plan(self.routing(rank)).unwrap();
        let buffer = comm.recv_buffer(handle.num_recv_tokens(), self.shape).unwrap();
        let received = comm.dispatch(&handle, self.x(rank), buffer).unwrap().buffer;
        let y = self.experts(comm, &received);
        let combined = comm.combine(&handle, Combine::new(y)).unwrap();
        self.verify(rank, &handle, &received, &combined.x);
    }
}

/// A world on the engine that RAILHOP_ENGINE names: `host` (the default), `apart` (the host engine as processes have
/// it), `shim` or `cuda`.
pub fn local_world(config: &Config) -> LocalWorld {
    match std::env::var("RAILHOP_ENGINE").as_deref() {
        Err(_) | Ok("host") => LocalWorld::new(config.clone()).unwrap(),
        Ok("apart") => LocalWorld::apart(config.clone()).unwrap(),
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        Ok("shim") => shim_world(config),
        Ok("cuda") => cuda_world(config),
        Ok(other) => panic!("RAILHOP_ENGINE = {other}: no such engine"),
    }
}

/// A world on the CUDA devices that are here, in turn.
pub fn cuda_world(config: &Config) -> LocalWorld {
    let devices = (0..railhop::device::cuda::devices().unwrap().len()).collect();
    let cuda = Cuda { devices, ..small_kernels() };
    LocalWorld::new(config.clone().on(EngineKind::Cuda(cuda))).unwrap()
}

/// Whether the devices that `RAILHOP_ENGINE` stands for have queues enough for a world of so many ranks: four for each.
pub fn has_queues(ranks: usize) -> bool {
    if std::env::var("RAILHOP_ENGINE").as_deref() != Ok("cuda") {
        return true;
    }
    let connections = std::env::var("CUDA_DEVICE_MAX_CONNECTIONS").ok();
    let connections = connections.and_then(|text| text.parse().ok()).unwrap_or(8);
    4 * ranks.div_ceil(railhop::device::cuda::devices().unwrap().len().max(1)) <= connections
}

/// A file of `tests/data`: in the folder `RAILHOP_DATA`, else where the sources were, else below the working directory.
pub fn data(name: &str) -> PathBuf {
    if let Some(folder) = std::env::var_os("RAILHOP_DATA") {
        return Path::new(&folder).join(name);
    }
    let sources = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data")).join(name);
    if sources.exists() { sources } else { Path::new("tests/data").join(name) }
}

/// What a rank's pool needs on a device beside buffers: plans, and rows on their way from and to the host.
pub fn device_room() -> usize {
    if std::env::var("RAILHOP_ENGINE").is_ok_and(|engine| ["shim", "cuda"].contains(&&*engine)) {
        4 << 20
    } else {
        0
    }
}

/// A world whose kernels run on the CPU shim.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub fn shim_world(config: &Config) -> LocalWorld {
    let (topology, config) = (config.topology(), config.clone().on(EngineKind::Cuda(small_kernels())));
    let drivers = shim::drivers(topology.world_size(), topology.ranks_per_node(), 1);
    LocalWorld::on_drivers(config, drivers).unwrap()
}

/// Kernels of few and small blocks: tests have many ranks and little to do.
pub fn small_kernels() -> Cuda {
    let dispatch = Staging { stage_bytes: 512, stages: 4 };
    let combine = Staging { stage_bytes: 1024, stages: 4 };
    Cuda { blocks: 2, warps: 2, plan_warps: 2, dispatch, combine, ..Cuda::default() }
}

/// All ranks of a world, driven by one thread through the split forms.
pub struct Ranks {
    pub comms: Vec<Communicator>,
}

impl Ranks {
    pub fn new(config: &Config) -> Self {
        Self { comms: local_world(config).into_communicators() }
    }

    /// On the host engine, whatever the environment says.
    pub fn on_host(config: &Config) -> Self {
        Self { comms: LocalWorld::new(config.clone().on(EngineKind::Host)).unwrap().into_communicators() }
    }

    /// On the CPU shim, whatever the environment says.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    pub fn on_shim(config: &Config) -> Self {
        Self { comms: shim_world(config).into_communicators() }
    }

    /// With another fabric around the local one.
    pub fn with_fabric(config: &Config, wrap: impl FnOnce(Arc<dyn Fabric>) -> Arc<dyn Fabric>) -> Self {
        // SAFETY: the tests' fabrics lose signals and panic, and pass on everything else as it is.
        #[allow(unsafe_code)]
        let world = unsafe { LocalWorld::with_fabric(config.clone(), wrap) };
        Self { comms: world.unwrap().into_communicators() }
    }

    /// `f` of every rank, in rank order: starts come here, waits after.
    pub fn each<T>(&mut self, f: impl FnMut(&mut Communicator) -> T) -> Vec<T> {
        self.comms.iter_mut().map(f).collect()
    }

    /// `f` of every rank on a thread each: for what blocks.
    pub fn at_once<T: Send>(&mut self, f: impl Fn(&mut Communicator) -> T + Sync) -> Vec<T> {
        thread::scope(|scope| {
            let f = &f;
            let threads: Vec<_> = self.comms.iter_mut().map(|comm| scope.spawn(move || f(comm))).collect();
            threads.into_iter().map(|thread| thread.join().expect("a rank panicked")).collect()
        })
    }

    /// The world works.
    pub fn round_trip(&mut self, case: &Case) {
        self.at_once(|comm| case.round_trip(comm));
    }

    pub fn plan(&mut self, case: &Case) -> Vec<Handle> {
        let pending = self.each(|comm| comm.start_plan(case.routing(comm.rank())));
        pending.into_iter().map(|pending| pending.wait().unwrap()).collect()
    }

    /// A buffer for what each rank receives.
    pub fn buffers(&mut self, handles: &[Handle], shape: RowShape) -> Vec<RecvBuffer> {
        self.each(|comm| comm.recv_buffer(handles[comm.rank()].num_recv_tokens(), shape).unwrap())
    }

    pub fn dispatch<X: Tokens>(
        &mut self,
        handles: &[Handle],
        shape: RowShape,
        x: impl Fn(usize) -> X,
    ) -> Vec<Dispatched<X>> {
        let mut buffers = self.buffers(handles, shape).into_iter();
        let pending = self
            .each(|comm| comm.start_dispatch(&handles[comm.rank()], x(comm.rank()), buffers.next().unwrap()));
        pending.into_iter().map(|pending| pending.wait().ok().unwrap()).collect()
    }

    pub fn combine<Y: ExpertOutputs>(
        &mut self,
        handles: &[Handle],
        inputs: impl IntoIterator<Item = Combine<Y>>,
    ) -> Vec<Combined<Y>> {
        let mut inputs = inputs.into_iter();
        let pending = self.each(|comm| comm.start_combine(&handles[comm.rank()], inputs.next().unwrap()));
        pending.into_iter().map(|pending| pending.wait().ok().unwrap()).collect()
    }

    /// The test experts' outputs for what was received.
    pub fn experts<X>(&mut self, case: &Case, received: &[Dispatched<X>]) -> Vec<RecvBuffer> {
        self.each(|comm| case.experts(comm, &received[comm.rank()].buffer))
    }
}

/// All that a receive buffer holds, as bits.
pub fn contents(buffer: &RecvBuffer) -> impl PartialEq + std::fmt::Debug + use<> {
    let weights: Vec<u32> = buffer.topk_weights().iter().map(|weight| weight.to_bits()).collect();
    let scales: Vec<u32> = buffer.scales().iter().map(|scale| scale.to_bits()).collect();
    let x = (bits(buffer.bf16()), buffer.e4m3().to_vec(), scales);
    (x, buffer.topk_idx().to_vec(), weights, buffer.sources().to_vec())
}

pub fn bits(x: &[bf16]) -> Vec<u16> {
    x.iter().map(|x| x.to_bits()).collect()
}
