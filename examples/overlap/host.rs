//! On the host: `start_dispatch` and `start_combine` return a `Pending`, the engine moves rows, and the rank's own
//! thread multiplies a matrix meanwhile (a shared expert, say, that needs no rows from elsewhere). On every rank the
//! results of both ways must be equal bit for bit.
//!
//! The rails of an in-process world are copies by the very cores that compute, and cores that are busy anyway
//! have nothing to gain. So here each rail takes the time that a network would: [`SlowRails`].

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use half::bf16;
use railhop::error::DeviceError;
use railhop::fabric::Fabric;
use railhop::{Combine, Communicator, Config, LocalWorld, Routing, RowFormat, RowShape, Topology};

use super::{Failure, Row, compare};

const RANKS: usize = 4;
const TOKENS: usize = 512;
const HIDDEN: usize = 2048;
const TOPK: usize = 8;
const EXPERTS: usize = 32;
/// The matrix product of each of the two computations is [ROWS, WIDTH] · [WIDTH, WIDTH].
const ROWS: usize = 512;
const WIDTH: usize = 384;
/// The first round touches fresh memory; the fastest of all counts.
const ROUNDS: usize = 4;
/// Bytes per second of each rail: slow, so that the copies themselves hardly count.
const BANDWIDTH: f64 = 100e6;
/// How far a rail may be ahead or behind: sleeping is not exact for shorter.
const SLACK: Duration = Duration::from_millis(4);

/// Runs both ways; `why` there are no devices.
pub fn run(why: &DeviceError) -> Result<(), Failure> {
    println!("host engine ({why})");
    let config = Config::builder(Topology::new(2, RANKS / 2)?).experts(EXPERTS).max_hidden(HIDDEN);
    let config = config.max_topk(TOPK).worker_budget(RANKS).build()?;
    println!("{RANKS} ranks, {TOKENS} tokens of {HIDDEN} elements each, rails of {} MB/s", BANDWIDTH / 1e6);

    // SAFETY: it passes on what it is told to, and writes nothing else.
    let world = unsafe { LocalWorld::with_fabric(config, |fabric| Arc::new(SlowRails::new(fabric)))? };
    let ranks: Vec<_> = world.run(rank_main).into_iter().collect::<Result<_, _>>()?;
    let round = |i: usize| ranks.iter().map(move |rounds| &rounds[i]);
    let best = |way: usize| {
        // From the start of the first rank to the end of the last.
        let start = |i| round(i).flatten().map(|span| span.start).min();
        let end = |i| round(i).flatten().map(|span| span.end).max();
        let total = |i| Some((milliseconds(start(i)?, end(i)?), i));
        (0..ROUNDS).filter_map(|n| total(2 * n + way)).min_by(|a, b| a.0.total_cmp(&b.0))
    };
    let (sequential, overlapped) = best(0).zip(best(1)).ok_or("no round was run")?;

    let rows = [sequential, overlapped].map(|(_, i)| rows(&ranks[0][i]));
    compare([(sequential.0, &rows[0]), (overlapped.0, &rows[1])]);
    println!("results of both ways, on every rank and in every round: equal bit for bit");
    Ok(())
}

/// A fabric whose puts take time without taking a core.
struct SlowRails {
    fabric: Arc<dyn Fabric>,
    /// When each rank's rail will have carried what was put.
    free: [Mutex<Instant>; RANKS],
}

impl SlowRails {
    fn new(fabric: Arc<dyn Fabric>) -> Self {
        Self { fabric, free: std::array::from_fn(|_| Mutex::new(Instant::now())) }
    }
}

impl Fabric for SlowRails {
    fn put(&self, from: usize, to: usize, offset: usize, parts: &[&[u8]]) {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let ahead = {
            let mut free = self.free[from].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            // Who woke up late catches up.
            *free = (*free).max(Instant::now() - SLACK) + Duration::from_secs_f64(bytes as f64 / BANDWIDTH);
            free.saturating_duration_since(Instant::now())
        };
        if ahead > SLACK {
            thread::sleep(ahead);
        }
        self.fabric.put(from, to, offset, parts);
    }

    fn signal(&self, from: usize, to: usize, word: usize, value: u64) {
        self.fabric.signal(from, to, word, value);
    }
}

/// What a rank did, and when.
struct Span {
    name: &'static str,
    start: Instant,
    end: Instant,
}

impl Span {
    /// It ended at `end`, or now.
    fn new(name: &'static str, start: Instant, end: Option<Instant>) -> Self {
        Self { name, start, end: end.unwrap_or_else(Instant::now) }
    }
}

/// One rank's rounds, by turns sequential and overlapped.
fn rank_main(mut comm: Communicator) -> Result<Vec<Vec<Span>>, String> {
    let mut rounds: Vec<Vec<Span>> = Vec::new();
    let mut expected = None;
    for i in 0..2 * ROUNDS {
        let (spans, results) = layer(&mut comm, i % 2 == 1).map_err(|error| error.to_string())?;
        rounds.push(spans);
        if *expected.get_or_insert_with(|| results.clone()) != results {
            return Err(format!("rank {}: round {i} has another result than the first", comm.rank()));
        }
    }
    Ok(rounds)
}

/// The bits of the combined rows, and of the two matrix products.
type Results = (Vec<u16>, [Vec<u32>; 2]);

/// One layer: dispatch and a product, the experts, combine and a product.
fn layer(comm: &mut Communicator, overlap: bool) -> Result<(Vec<Span>, Results), railhop::Error> {
    let rank = comm.rank();
    let topk_idx: Vec<i64> =
        (0..TOKENS * TOPK).map(|i| ((rank + i / TOPK * 7 + i % TOPK * 5) % EXPERTS) as i64).collect();
    let routing = Routing { topk: TOPK, topk_idx: &topk_idx, topk_weights: &[0.125; TOKENS * TOPK] };
    let x: Arc<[bf16]> = (0..TOKENS * HIDDEN).map(|i| bf16::from_f32((i * 31 % 97) as f32 / 97.0)).collect();
    let (mut before, mut after) = (Product::new(rank), Product::new(rank + 100));
    let shape = RowShape { hidden: HIDDEN, topk: TOPK, format: RowFormat::Bf16 };
    let mut spans = Vec::new();

    // The plan comes to its end on all ranks at about the same time: the timelines start here.
    let handle = comm.plan(routing)?;
    let buffer = comm.recv_buffer(handle.num_recv_tokens(), shape)?;
    let begin = Instant::now();
    let pending = comm.start_dispatch(&handle, x, buffer);
    let done = if overlap { before.run(|| pending.is_done(), &mut spans) } else { None };
    let mut received = pending.wait()?.buffer;
    spans.push(Span::new("dispatch", begin, done));
    before.run(|| false, &mut spans); // what is left of it: all, or nothing

    // The experts need what came: nothing to overlap within one batch.
    let begin = Instant::now();
    received.bf16_mut().iter_mut().for_each(|x| *x = bf16::from_f32(0.75 * x.to_f32()));
    spans.push(Span::new("experts", begin, None));

    let begin = Instant::now();
    let pending = comm.start_combine(&handle, Combine::new(received));
    let done = if overlap { after.run(|| pending.is_done(), &mut spans) } else { None };
    let combined = pending.wait()?.x;
    spans.push(Span::new("combine", begin, done));
    after.run(|| false, &mut spans);

    let bits = |product: Product| product.out.iter().map(|x| x.to_bits()).collect();
    Ok((spans, (combined.iter().map(|x| x.to_bits()).collect(), [bits(before), bits(after)])))
}

/// A dense matrix product in f32, row by row.
struct Product {
    a: Vec<f32>,
    b: Vec<f32>,
    out: Vec<f32>,
    next: usize,
}

impl Product {
    fn new(seed: usize) -> Self {
        let matrix = |rows: usize, factor: usize| {
            (0..rows * WIDTH).map(|i| ((i + seed) * factor % 1009) as f32 / 1009.0 - 0.5).collect()
        };
        Self { a: matrix(ROWS, 37), b: matrix(WIDTH, 53), out: vec![0.0; ROWS * WIDTH], next: 0 }
    }

    /// Computes what is left, and returns when `is_done` was first seen to hold. The engine works by itself:
    /// nobody needs to ask, this only measures.
    fn run(&mut self, is_done: impl Fn() -> bool, spans: &mut Vec<Span>) -> Option<Instant> {
        if self.next == ROWS {
            return None;
        }
        let (begin, mut done) = (Instant::now(), None);
        while self.next < ROWS {
            let out = &mut self.out[self.next * WIDTH..][..WIDTH];
            for (a, b) in self.a[self.next * WIDTH..][..WIDTH].iter().zip(self.b.chunks_exact(WIDTH)) {
                out.iter_mut().zip(b).for_each(|(out, b)| *out += a * b);
            }
            self.next += 1;
            if done.is_none() && is_done() {
                done = Some(Instant::now());
            }
        }
        spans.push(Span::new("compute", begin, None));
        done
    }
}

fn milliseconds(start: Instant, end: Instant) -> f64 {
    1e3 * (end - start).as_secs_f64()
}

/// A row for each span, by start.
fn rows(spans: &[Span]) -> Vec<Row> {
    let Some(first) = spans.iter().map(|span| span.start).min() else { return Vec::new() };
    let since = |at| milliseconds(first, at);
    let row = |span: &Span| Row { name: span.name, start: since(span.start), end: since(span.end) };
    let mut rows: Vec<_> = spans.iter().map(row).collect();
    rows.sort_by(|a, b| a.start.total_cmp(&b.start));
    rows
}
