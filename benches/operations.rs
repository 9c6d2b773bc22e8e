//! Plan, dispatch and combine of one in-process world: 2×2 ranks, 128 tokens of 2048 elements, top-4 of 16.

use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use railhop::{
    Combine, Communicator, Config, Handle, LocalWorld, RecvBuffer, Routing, RowFormat, RowShape, ScaleFormat,
    Topology,
};

const TOKENS: usize = 128;
const HIDDEN: usize = 2048;
const TOPK: usize = 4;
const EXPERTS: usize = 16;

#[derive(Clone, Copy, Debug)]
enum Phase {
    Plan,
    Dispatch,
    Combine,
}

/// A rank that repeats one phase; the time of the slowest rank counts.
struct Rank {
    comm: Communicator,
    topk_idx: Vec<i64>,
    handle: Handle,
    x: Option<Vec<bf16>>,
    buffer: Option<RecvBuffer>,
    outputs: Option<RecvBuffer>,
    out: Vec<bf16>,
}

impl Rank {
    fn new(mut comm: Communicator, format: RowFormat) -> Self {
        let pick = |token: usize, k: usize| ((comm.rank() * 7 + token * 5 + k * 3) % EXPERTS) as i64;
        let topk_idx: Vec<i64> = (0..TOKENS * TOPK).map(|i| pick(i / TOPK, i % TOPK)).collect();
        let handle = comm.plan(routing(&topk_idx)).expect("valid routing");
        let shape = RowShape { hidden: HIDDEN, topk: TOPK, format };
        let rows = handle.num_recv_tokens();
        let buffer = comm.recv_buffer(rows, shape).expect("fits the pool");
        let x = vec![bf16::ONE; TOKENS * HIDDEN];
        let done = comm.dispatch(&handle, x, buffer).expect("valid input");
        let bf16 = RowShape { format: RowFormat::Bf16, ..shape };
        let mut outputs = comm.recv_buffer(rows, bf16).expect("fits the pool");
        outputs.set_rows(rows);
        Self {
            comm,
            topk_idx,
            handle,
            x: Some(done.x),
            buffer: Some(done.buffer),
            outputs: Some(outputs),
            out: Vec::new(),
        }
    }

    fn run(&mut self, phase: Phase) {
        match phase {
            Phase::Plan => self.handle = self.comm.plan(routing(&self.topk_idx)).expect("valid routing"),
            Phase::Dispatch => {
                let (x, buffer) = (self.x.take().expect("put back"), self.buffer.take().expect("put back"));
                let done = self.comm.dispatch(&self.handle, x, buffer).expect("valid input");
                (self.x, self.buffer) = (Some(done.x), Some(done.buffer));
            }
            Phase::Combine => {
                let input =
                    Combine::new(self.outputs.take().expect("put back")).out(std::mem::take(&mut self.out));
                let done = self.comm.combine(&self.handle, input).expect("valid input");
                (self.outputs, self.out) = (Some(done.outputs), done.x);
            }
        }
    }
}

fn routing(topk_idx: &[i64]) -> Routing<'_> {
    Routing { topk: TOPK, topk_idx, topk_weights: &[0.25; TOKENS * TOPK] }
}

/// The time of the slowest rank for `iterations` of `phase`.
fn time(phase: Phase, format: RowFormat, iterations: u64) -> Duration {
    let topology = Topology::new(2, 2).expect("valid topology");
    let config = Config::builder(topology).experts(EXPERTS).max_hidden(HIDDEN).max_topk(TOPK).build();
    let world = LocalWorld::new(config.expect("valid configuration")).expect("enough memory");
    let barrier = &Barrier::new(topology.world_size());
    let (times, slowest) = mpsc::channel();
    thread::scope(|scope| {
        for comm in world.into_communicators() {
            let times = times.clone();
            scope.spawn(move || {
                let mut rank = Rank::new(comm, format);
                barrier.wait();
                let started = Instant::now();
                (0..iterations).for_each(|_| rank.run(phase));
                times.send(started.elapsed()).expect("the receiver waits");
                // Plans of the timed loop have no rows: nobody leaves before all are done.
                barrier.wait();
            });
        }
    });
    drop(times);
    slowest.iter().max().expect("a rank at least")
}

fn operations(c: &mut Criterion) {
    let mut group = c.benchmark_group("operations");
    group.sample_size(20).throughput(Throughput::Elements((4 * TOKENS) as u64));
    for phase in [Phase::Plan, Phase::Dispatch, Phase::Combine] {
        group.bench_function(BenchmarkId::new(format!("{phase:?}"), "bf16"), |b| {
            b.iter_custom(|iterations| time(phase, RowFormat::Bf16, iterations));
        });
    }
    group.bench_function(BenchmarkId::new("Dispatch", "fp8"), |b| {
        b.iter_custom(|iterations| time(Phase::Dispatch, RowFormat::Fp8(ScaleFormat::F32), iterations));
    });
}

criterion_group!(benches, operations);
criterion_main!(benches);
