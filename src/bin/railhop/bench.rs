//! `railhop bench`: plan, dispatch and combine on uniform random routing, against the speed of light.

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use half::bf16;
use memmap2::{Advice, MmapMut};
use railhop::wire::shape::{CombineSlot, DispatchSlot, RecvLayout};
use railhop::{
    Combine, Communicator, Config, Handle, LocalWorld, RecvBuffer, Routing, RowFormat, RowShape, Topology,
};
use serde_json::{Value, json};

use crate::meeting::Meeting;
use crate::options::{Format, Tuning};

/// Bytes each copier copies at a time: so many that memcpy streams, for the bound is to be the best rate.
const COPY_BYTES: usize = 256 << 20;

/// Iterations before the timed ones.
const WARMUPS: usize = 2;

/// Uniform random routing on an in-process world.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// Nodes of the world
    #[arg(long, default_value_t = 2)]
    nodes: usize,
    /// Ranks of each node
    #[arg(long, default_value_t = 4)]
    ranks_per_node: usize,
    /// Tokens of each rank
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    /// Elements per row
    #[arg(long, default_value_t = 7168)]
    hidden: usize,
    /// Experts of the world, placed contiguously
    #[arg(long, default_value_t = 64)]
    experts: usize,
    /// Experts per token
    #[arg(long, default_value_t = 8)]
    topk: usize,
    #[command(flatten)]
    format: Format,
    /// Timed iterations
    #[arg(long, default_value_t = 20)]
    iters: usize,
    /// Seed of the routing
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    tuning: Tuning,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// Runs the benchmark and prints its report.
pub fn run(args: &BenchArgs) -> Result<(), Box<dyn Error + Send + Sync>> {
    if args.topk > args.experts || args.tokens == 0 || args.iters == 0 {
        return Err("bench needs topk <= experts, and at least one token and one iteration".into());
    }
    let bench = Bench::new(args)?;
    let report = bench.measure()?.report(&bench);
    match args.json {
        true => println!("{report}"),
        false => print_table(&report),
    }
    Ok(())
}

struct Bench {
    config: Config,
    shape: RowShape,
    iters: usize,
    topk_idx: Vec<Vec<i64>>,
    topk_weights: Vec<Vec<f32>>,
    /// By rank, the rows it receives.
    rows: Vec<usize>,
    tokens: usize,
}

impl Bench {
    fn new(args: &BenchArgs) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let topology = Topology::new(args.nodes, args.ranks_per_node)?;
        let world = topology.world_size();
        let shape = RowShape { hidden: args.hidden, topk: args.topk, format: args.format.row_format() };
        let builder =
            Config::builder(topology).experts(args.experts).max_hidden(args.hidden).max_topk(args.topk);
        let builder = args.tuning.apply(builder);
        let (topk_idx, topk_weights) = (0..world).map(|rank| random_routing(args, rank)).unzip();
        let mut bench = Self {
            config: builder.clone().build()?,
            shape,
            rows: vec![0; world],
            iters: args.iters,
            topk_idx,
            topk_weights,
            tokens: args.tokens,
        };
        let mut received = vec![0; world];
        bench.destinations().for_each(|(_, ranks)| ranks.into_iter().for_each(|rank| received[rank] += 1));
        bench.rows = received;
        let rows = bench.rows.iter().copied().max().unwrap_or(0);
        let bf16 = RowShape { format: RowFormat::Bf16, ..shape };
        let pool = RecvLayout::new(shape, rows).bytes + RecvLayout::new(bf16, rows).bytes;
        bench.config = builder.pool_bytes(pool).build()?;
        Ok(bench)
    }

    /// By token of all ranks: the ranks it goes to, ascending.
    fn destinations(&self) -> impl Iterator<Item = (usize, Vec<usize>)> {
        let topk = self.shape.topk;
        self.topk_idx.iter().enumerate().flat_map(move |(rank, idx)| {
            idx.chunks_exact(topk).map(move |experts| {
                let mut ranks: Vec<_> =
                    experts.iter().map(|&e| self.config.placement().rank_of(e as usize)).collect();
                ranks.sort_unstable();
                ranks.dedup();
                (rank, ranks)
            })
        })
    }

    fn measure(&self) -> Result<Measured, Box<dyn Error + Send + Sync>> {
        let meeting = Meeting::new(self.config.topology().world_size());
        let copiers = Mutex::new((Copiers::new(self.config.worker_budget())?, Vec::new()));
        let ranks = LocalWorld::new(self.config.clone())?.run(|communicator| {
            let mut rank = Rank::new(self, communicator, &meeting)?;
            let iteration = |index| {
                if rank.communicator.rank() == 0 {
                    let (copiers, rates) = &mut *copiers.lock().expect("copying does not panic");
                    rates.push(copiers.rate());
                }
                let [plan, dispatch, combine] = rank.phases()?;
                Some((index, [plan, dispatch, combine, rank.total()?]))
            };
            let times: Option<Vec<_>> = (0..WARMUPS + self.iters).map(iteration).collect();
            Some(times?.into_iter().filter(|(index, _)| *index >= WARMUPS).map(|(_, times)| times).collect())
        });
        meeting.outcome()?;
        let ranks: Vec<Vec<_>> = ranks.into_iter().flatten().collect();
        let (_, copy_gbs) = copiers.into_inner().expect("copying does not panic");
        let slowest =
            |iteration: usize, phase: usize| ranks.iter().map(|times| times[iteration][phase]).max();
        let phase = |phase| (0..self.iters).filter_map(|iteration| slowest(iteration, phase)).collect();
        Ok(Measured { phases: [0, 1, 2, 3].map(phase), copy_gbs: median(copy_gbs) })
    }
}

/// Distinct uniform experts, as `benches/peer` draws them: each rank owns one splitmix64 stream.
fn random_routing(args: &BenchArgs, rank: usize) -> (Vec<i64>, Vec<f32>) {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    let mut state = args.seed ^ (rank as u64).wrapping_mul(GOLDEN);
    let mut next = || {
        state = state.wrapping_add(GOLDEN);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let (mut topk_idx, mut topk_weights) = (Vec::new(), Vec::new());
    for _ in 0..args.tokens {
        let mut pool: Vec<i64> = (0..args.experts as i64).collect();
        for j in 0..args.topk {
            pool.swap(j, j + (next() % (args.experts - j) as u64) as usize);
        }
        topk_idx.extend_from_slice(&pool[..args.topk]);
        let weights: Vec<f32> =
            (0..args.topk).map(|_| ((next() >> 40) + 1) as f32 * 2f32.powi(-24)).collect();
        let sum: f32 = weights.iter().sum();
        topk_weights.extend(weights.iter().map(|weight| weight / sum));
    }
    (topk_idx, topk_weights)
}

/// One rank with the buffers it uses again and again, as a training loop does.
struct Rank<'a> {
    communicator: Communicator,
    meeting: &'a Meeting,
    routing: Routing<'a>,
    x: Arc<[bf16]>,
    buffers: Buffers,
}

/// Receive buffer, the experts' outputs where rows are FP8, and the result; taken while in use.
struct Buffers {
    received: Option<RecvBuffer>,
    outputs: Option<RecvBuffer>,
    out: Vec<bf16>,
}

impl<'a> Rank<'a> {
    fn new(bench: &'a Bench, communicator: Communicator, meeting: &'a Meeting) -> Option<Self> {
        let rank = communicator.rank();
        let elements = bench.tokens * bench.shape.hidden;
        let buffers = Buffers::new(&communicator, bench.rows[rank], elements, bench.shape);
        let buffers = meeting.join(rank, buffers.map_err(|error| error.to_string()))?;
        let (topk_idx, topk_weights) = (&bench.topk_idx[rank], &bench.topk_weights[rank]);
        let value = |i: usize| bf16::from_f32((i * 31 % 251) as f32 / 64.0 - 2.0);
        let routing = Routing { topk: bench.shape.topk, topk_idx, topk_weights };
        Some(Self { communicator, meeting, routing, x: (0..elements).map(value).collect(), buffers })
    }

    /// One iteration with a meeting around each phase.
    fn phases(&mut self) -> Option<[Duration; 3]> {
        let (handle, plan) = self.timed(|rank| rank.communicator.plan(rank.routing))?;
        let ((), dispatch) = self.timed(|rank| rank.dispatch(&handle))?;
        let ((), combine) = self.timed(|rank| rank.combine(&handle))?;
        Some([plan, dispatch, combine])
    }

    /// One iteration without.
    fn total(&mut self) -> Option<Duration> {
        let whole = |rank: &mut Self| {
            let handle = rank.communicator.plan(rank.routing)?;
            rank.dispatch(&handle)?;
            rank.combine(&handle)
        };
        self.timed(whole).map(|((), time)| time)
    }

    /// Does `work` when all ranks are there; its time, if all did it.
    fn timed<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, railhop::Error>,
    ) -> Option<(T, Duration)> {
        let rank = self.communicator.rank();
        self.meeting.join(rank, Ok(()))?;
        let started = Instant::now();
        let result = work(self);
        let time = started.elapsed();
        let value = self.meeting.join(rank, result.map_err(|error| error.to_string()))?;
        Some((value, time))
    }

    fn dispatch(&mut self, handle: &Handle) -> Result<(), railhop::Error> {
        let buffer = self.buffers.received.take().expect("put back by every operation");
        self.buffers.received = Some(self.communicator.dispatch(handle, self.x.clone(), buffer)?.buffer);
        Ok(())
    }

    fn combine(&mut self, handle: &Handle) -> Result<(), railhop::Error> {
        let Buffers { received, outputs, out } = &mut self.buffers;
        let place = if outputs.is_some() { outputs } else { received };
        let input = Combine::new(place.take().expect("put back by every operation")).out(std::mem::take(out));
        let done = self.communicator.combine(handle, input)?;
        (*place, *out) = (Some(done.outputs), done.x);
        Ok(())
    }
}

impl Buffers {
    fn new(
        comm: &Communicator,
        rows: usize,
        elements: usize,
        shape: RowShape,
    ) -> Result<Self, railhop::Error> {
        let received = Some(comm.recv_buffer(rows, shape)?);
        let mut outputs = None;
        if shape.format != RowFormat::Bf16 {
            let mut buffer = comm.recv_buffer(rows, RowShape { format: RowFormat::Bf16, ..shape })?;
            buffer.set_rows(rows);
            buffer.bf16_mut().fill(bf16::ONE);
            outputs = Some(buffer);
        }
        Ok(Self { received, outputs, out: vec![bf16::ZERO; elements] })
    }
}

/// Threads that copy, one per worker: the bandwidth that the bound is made of.
struct Copiers(Vec<(MmapMut, MmapMut)>);

impl Copiers {
    fn new(threads: usize) -> std::io::Result<Self> {
        let map = || {
            let mut map = MmapMut::map_anon(COPY_BYTES)?;
            // As the regions are, so that the bound does not pay for TLB misses.
            let _ = map.advise(Advice::HugePage);
            map.fill(1);
            Ok::<_, std::io::Error>(map)
        };
        (0..threads).map(|_| Ok((map()?, map()?))).collect::<Result<_, _>>().map(Self)
    }

    /// GB/s of all together, reads plus writes.
    fn rate(&mut self) -> f64 {
        let started = Instant::now();
        let bytes = 2 * COPY_BYTES * self.0.len();
        thread::scope(|scope| {
            for (from, to) in &mut self.0 {
                scope.spawn(|| to.copy_from_slice(from));
            }
        });
        bytes as f64 / started.elapsed().as_secs_f64() / 1e9
    }
}

/// Per phase (plan, dispatch, combine, total), the slowest rank's time of each iteration.
struct Measured {
    phases: [Vec<Duration>; 4],
    copy_gbs: f64,
}

impl Measured {
    fn report(&self, bench: &Bench) -> Value {
        let topology = bench.config.topology();
        let (shape, topk) = (bench.shape, bench.shape.topk);
        let tokens = bench.tokens * topology.world_size();
        let (mut rows, mut hop1, mut hop1_without) = (0, 0, 0);
        for (home, ranks) in bench.destinations() {
            let mut nodes: Vec<_> = ranks.iter().map(|&rank| topology.node_of(rank)).collect();
            nodes.dedup();
            let remote = |node: &&usize| **node != topology.node_of(home);
            rows += ranks.len();
            hop1 += nodes.iter().filter(remote).count();
            hop1_without +=
                ranks.iter().filter(|&&rank| topology.node_of(rank) != topology.node_of(home)).count();
        }
        let row = shape.row_bytes() + shape.scale_pitch();
        let out = 2 * shape.hidden;
        let moved = |row: usize| (tokens + 2 * hop1 + rows) * row;
        let times =
            self.phases.each_ref().map(|times| times.iter().map(Duration::as_secs_f64).collect::<Vec<_>>());
        let seconds = times.each_ref().map(|times| median(times.clone()));
        let gbs = |phase: usize, row: usize| moved(row) as f64 / seconds[phase] / 1e9;
        let phase = |phase: usize| {
            json!({
                "median_ms": seconds[phase] * 1e3,
                "p99_ms": quantile(times[phase].clone(), 0.99) * 1e3,
            })
        };
        json!({
            "nodes": topology.nodes(), "ranks_per_node": topology.ranks_per_node(), "tokens": bench.tokens,
            "hidden": shape.hidden, "experts": bench.config.placement().num_experts(), "topk": topk,
            "format": format!("{:?}", shape.format), "iters": bench.iters,
            "workers": bench.config.worker_budget(), "channels": bench.config.channels(),
            "chunk_tokens": bench.config.chunk_tokens(), "ring_slots": bench.config.ring_slots(),
            "plan": phase(0), "dispatch": phase(1), "combine": phase(2), "total": phase(3),
            "tokens_per_s": tokens as f64 / seconds[3],
            "gbs": { "dispatch": gbs(1, row), "combine": gbs(2, out) },
            "memcpy_gbs": self.copy_gbs,
            "speed_of_light": { "dispatch": gbs(1, row) / self.copy_gbs, "combine": gbs(2, out) / self.copy_gbs },
            "destinations_per_token": rows as f64 / tokens as f64,
            "bytes": {
                "hop1_without_deduplication": hop1_without * row,
                "dispatch_hop1": hop1 * row,
                "dispatch_hop1_physical": hop1 * DispatchSlot::new(&shape).pitch,
                "dispatch_hop2": rows * row,
                "combine_hop1": hop1 * out,
                "combine_hop1_physical": hop1 * CombineSlot::new(shape.hidden, 0).pitch,
                "combine_hop2": rows * out,
            },
            "ring_bytes": bench.config.memory().rings,
            "region_bytes": bench.config.memory().region,
        })
    }
}

fn print_table(report: &Value) {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header(["phase", "median ms", "p99 ms", "GB/s", "of the speed of light"]);
    for phase in ["plan", "dispatch", "combine", "total"] {
        let number =
            |value: &Value, digits: usize| value.as_f64().map_or(String::new(), |v| format!("{v:.digits$}"));
        let times = &report[phase];
        table.add_row([
            phase.to_string(),
            number(&times["median_ms"], 3),
            number(&times["p99_ms"], 3),
            number(&report["gbs"][phase], 2),
            number(&report["speed_of_light"][phase], 2),
        ]);
    }
    println!("{table}");
    let number = |key: &str| report[key].as_f64().unwrap_or_default();
    println!(
        "{:.0} tokens/s; memcpy {:.1} GB/s (reads + writes)",
        number("tokens_per_s"),
        number("memcpy_gbs")
    );
    println!("rings: {} bytes per rank, region: {}", report["ring_bytes"], report["region_bytes"]);
    println!("bytes moved by all ranks: {}", report["bytes"]);
}

fn median(values: Vec<f64>) -> f64 {
    quantile(values, 0.5)
}

fn quantile(mut values: Vec<f64>, q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * q).ceil() as usize]
}
