//! What a proxy costs: commands drained, the bandwidth that chunks of them stand for, and how long a command
//! waits.
//!
//! The rail builds a NIC's work requests and carries nothing, so this is the part that is the proxy's.

#![allow(unsafe_code)]

#[path = "../tests/common/queue.rs"]
mod queue;

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use queue::Rank;
use railhop::fabric::proxy::{MERGE_BYTES, Patience, Proxy, ProxyThread};
use railhop::fabric::rail::{Completion, NullRail, Rail, RailError};
use railhop::wire::command::{Command, opcode};
use railhop::wire::device::QUEUE_CAPACITY;
use railhop::wire::posting::Posting;
use railhop::wire::region::Lane;
use railhop::wire::shape::DispatchSlot;
use railhop::wire::word::Index;
use railhop::{Config, RowFormat, RowShape, ScaleFormat, Topology};

const NODES: usize = 8;
const CHANNELS: usize = 8;
const SLOTS: usize = 16;
const HIDDEN: usize = 7168;
const TOPK: usize = 8;

/// Work requests under way at most.
const REQUESTS: usize = 4096;

/// The largest put that a work request carries here.
const MAX_MESSAGE: usize = 1 << 20;

/// Every proxy goes on where the last one stopped.
static RANK: LazyLock<&Rank> = LazyLock::new(|| {
    let builder =
        Config::builder(Topology::new(NODES, 1).unwrap()).experts(NODES).max_hidden(HIDDEN).max_topk(TOPK);
    let config = builder.channels(CHANNELS).ring_slots(SLOTS).pool_bytes(0).build().unwrap();
    Rank::leaked(&config, 0)
});

fn rail() -> NullRail {
    NullRail::new(REQUESTS, MAX_MESSAGE, 1)
}

/// FP8 chunks of `tokens` tokens, as a kernel pushes them: `run` to one ring, then the next ring's.
struct Chunks {
    tokens: usize,
    pitch: usize,
    run: usize,
    pushed: usize,
    tails: Vec<u64>,
}

impl Chunks {
    fn new(tokens: usize, hidden: usize, run: usize) -> Self {
        let format = RowFormat::Fp8(ScaleFormat::F32);
        let pitch = DispatchSlot::new(&RowShape { hidden, topk: TOPK, format }).pitch;
        Self { tokens, pitch, run, pushed: 0, tails: vec![0; CHANNELS * (NODES - 1)] }
    }

    fn bytes(&self) -> u64 {
        (self.tokens * self.pitch) as u64
    }

    fn next(&mut self) -> Command {
        let ring = self.pushed / self.run % self.tails.len();
        self.pushed += 1;
        self.tails[ring] += self.tokens as u64;
        Command {
            opcode: opcode::CHUNK,
            lane: Lane::Dispatch,
            node: 1 + ring % (NODES - 1),
            channel: ring / (NODES - 1),
            count: self.tokens,
            pitch: self.pitch,
            index: Index::new(self.tails[ring]),
        }
    }
}

/// The time one thread takes to drain `laps` full queues.
fn drain(proxy: &mut Proxy<NullRail>, laps: u64, mut next: impl FnMut() -> Command) -> Duration {
    let mut total = Duration::ZERO;
    for _ in 0..laps {
        (0..QUEUE_CAPACITY).for_each(|_| RANK.push(&next()));
        let start = Instant::now();
        while proxy.step().expect("commands make sense").moved() {}
        total += start.elapsed();
    }
    black_box(proxy.rail().requests());
    total
}

fn credits(c: &mut Criterion) {
    let mut group = c.benchmark_group("proxy/drain");
    group.throughput(Throughput::Elements(QUEUE_CAPACITY as u64));
    let (mut proxy, mut chunks) = (RANK.proxy(rail()), Chunks::new(1, HIDDEN, 1));
    let mut next = || Command { opcode: opcode::CREDIT, count: 0, ..chunks.next() };
    group.bench_function("credits", |b| b.iter_custom(|laps| drain(&mut proxy, laps, &mut next)));
    group.finish();
}

/// Four small chunks of a ring follow each other, as they do when kernels run ahead.
fn small_chunks(c: &mut Criterion) {
    let mut group = c.benchmark_group("proxy/drain");
    group.throughput(Throughput::Elements(QUEUE_CAPACITY as u64));
    for merge in [0, MERGE_BYTES] {
        let (mut proxy, mut chunks) = (RANK.proxy(rail()).merge_up_to(merge), Chunks::new(1, 2048, 4));
        group.bench_function(BenchmarkId::new("small chunks, merged up to", merge), |b| {
            b.iter_custom(|laps| drain(&mut proxy, laps, || chunks.next()));
        });
    }
    group.finish();
}

fn large_chunks(c: &mut Criterion) {
    let mut group = c.benchmark_group("proxy/drain");
    for message in [4 << 10, MAX_MESSAGE] {
        let mut chunks = Chunks::new(8, HIDDEN, 1);
        let mut proxy = RANK.proxy(NullRail::new(REQUESTS, message, 1));
        group.throughput(Throughput::Bytes(chunks.bytes() * QUEUE_CAPACITY as u64));
        group.bench_function(BenchmarkId::new("8-token FP8 chunks, messages of", message), |b| {
            b.iter_custom(|laps| drain(&mut proxy, laps, || chunks.next()));
        });
    }
    group.finish();
}

/// A producer and a proxy, each on a thread of its own.
fn threaded(c: &mut Criterion) {
    let mut chunks = Chunks::new(8, HIDDEN, 1);
    let mut group = c.benchmark_group("proxy/threads");
    group.throughput(Throughput::Bytes(chunks.bytes()));
    let _proxy = ProxyThread::spawn(RANK.proxy(rail()), Patience::default(), None).unwrap();
    let mut pushed = RANK.taken();
    group.bench_function("8-token FP8 chunks", |b| {
        b.iter_custom(|commands| {
            let start = Instant::now();
            (0..commands).for_each(|_| RANK.push(&chunks.next()));
            pushed += commands;
            while RANK.taken() < pushed {
                thread::yield_now();
            }
            start.elapsed()
        });
    });
    group.finish();
}

/// Says when the last put was posted.
struct Clock {
    start: Instant,
    posted: Arc<AtomicU64>,
}

impl Rail for Clock {
    fn post(&mut self, postings: &[Posting]) -> Result<usize, RailError> {
        self.posted.store(self.start.elapsed().as_nanos() as u64, Ordering::Release);
        Ok(postings.len())
    }

    fn poll(&mut self, _: &mut Vec<Completion>) -> Result<(), RailError> {
        Ok(())
    }

    fn is_idle(&self) -> bool {
        true
    }
}

/// From push to put, one command every few microseconds.
fn latency(c: &mut Criterion) {
    let (start, posted) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let clock = Clock { start, posted: posted.clone() };
    let _proxy = ProxyThread::spawn(RANK.proxy(clock), Patience::default(), None).unwrap();
    let mut chunks = Chunks::new(8, HIDDEN, 1);
    let (nanos, pause) = (|| start.elapsed().as_nanos() as u64, Duration::from_micros(5));
    let mut push_to_put = || {
        let (command, rest) = (chunks.next(), Instant::now());
        while rest.elapsed() < pause {
            spin_loop();
        }
        let (before, pushed) = (posted.load(Ordering::Acquire), nanos());
        RANK.push(&command);
        loop {
            let at = posted.load(Ordering::Acquire);
            if at != before {
                return at.saturating_sub(pushed);
            }
            // A device takes no core from the proxy; neither may its stand-in for long.
            if nanos() - pushed < 10_000 { spin_loop() } else { thread::yield_now() }
        }
    };
    let mut all = Vec::new();
    c.bench_function("proxy/push to put", |b| {
        b.iter_custom(|commands| {
            let waits: Vec<u64> = (0..commands).map(|_| push_to_put()).collect();
            let total = waits.iter().sum();
            all.extend(waits);
            Duration::from_nanos(total)
        });
    });
    all.sort_unstable();
    let quantile = |q: usize| all[(all.len() - 1) * q / 100];
    let [median, p90, p99] = [50, 90, 99].map(quantile);
    println!("proxy/push to put: median {median} ns, p90 {p90} ns, p99 {p99} ns of {} commands", all.len());
}

criterion_group!(benches, credits, small_chunks, large_chunks, threaded, latency);
criterion_main!(benches);
