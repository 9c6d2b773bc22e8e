//! `railhop bench`: plan, dispatch and combine on uniform random routing, against the speed of light, or on devices
//! against NCCL.

use std::error::Error;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use half::bf16;
use memmap2::{Advice, MmapMut};
use railhop::budget::{Budget, Hardware, Overrides, Workload};
use railhop::device::Driver;
use railhop::device::cuda::CudaDriver;
use railhop::wire::region::LANES;
use railhop::wire::shape::{CombineSlot, DispatchSlot, RecvLayout};
use railhop::{Communicator, Config, ConfigBuilder, Handle, RecvBuffer, Routing, RowFormat, RowShape};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::inputs::Inputs;
use crate::meeting::Meeting;
use crate::nccl;
use crate::options::{self, Format, Tuning};
use crate::world::{Place, Work, WorldArgs};

/// Bytes each copier copies at a time: so many that memcpy streams, for the bound is to be the best rate.
const COPY_BYTES: usize = 256 << 20;

/// Iterations before the timed ones.
const WARMUPS: usize = 2;

/// The timed phases; the last is the three others without a meeting between them.
const PHASES: [&str; 4] = ["plan", "dispatch", "combine", "total"];

type Failure = Box<dyn Error + Send + Sync>;

/// Uniform random routing on a world of threads, or of processes that a launcher has started.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    #[command(flatten)]
    world: WorldArgs,
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
    engine: options::Engine,
    /// Blocks of a dispatch, and of a combine, with --engine cuda [default: as `railhop plan` derives it]
    #[arg(long)]
    blocks: Option<usize>,
    /// Warps of a block, with --engine cuda [default: as `railhop plan` derives it]
    #[arg(long)]
    warps: Option<usize>,
    /// Measure a peer too: nccl is the packed all-to-all by grouped send and receive of BF16 rows. It needs NCCL and a
    /// GPU for each rank, those of --devices or else the first, whatever --engine is
    #[arg(long, value_enum)]
    baseline: Option<Baseline>,
    #[command(flatten)]
    tuning: Tuning,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Baseline {
    Nccl,
}

impl BenchArgs {
    /// Refuses options that contradict each other.
    fn check(&self) -> Result<(), String> {
        if self.topk > self.experts || self.tokens == 0 || self.iters == 0 {
            return Err("bench needs topk <= experts, and at least one token and one iteration".into());
        }
        if self.baseline.is_none() {
            self.engine.require_cuda_for_devices()?;
        } else if self.format.row_format() != RowFormat::Bf16 {
            return Err("--baseline nccl moves BF16 rows: it can't be compared with --dtype fp8".into());
        }
        match self.engine.cuda() {
            None if self.blocks.is_some() || self.warps.is_some() => {
                Err("--blocks and --warps are those of kernels: they need --engine cuda".into())
            }
            _ => Ok(()),
        }
    }

    /// What the configuration starts from, and by rank its device: none on the host.
    fn start(
        &self,
        place: &Place,
        shape: RowShape,
    ) -> Result<(ConfigBuilder, Vec<Arc<dyn Driver>>), Failure> {
        let builder = place.builder().experts(self.experts).max_tokens(self.tokens);
        let builder = builder.max_hidden(self.hidden).max_topk(self.topk);
        let Some(devices) = self.engine.cuda() else { return Ok((self.tuning.apply(builder), Vec::new())) };
        place.require_threads("--engine cuda")?;
        let topology = place.topology;
        let ranks = (0..topology.world_size()).zip(devices.iter().cycle());
        let open = |(_, &device): (usize, _)| Ok(CudaDriver::open(device)? as Arc<dyn Driver>);
        let drivers = ranks.map(open).collect::<Result<Vec<_>, railhop::Error>>()?;
        let workload = Workload::new(topology, shape, self.experts, self.tokens);
        let hardware = hardware(&drivers);
        let given = Overrides { blocks: self.blocks, warps: self.warps, ..self.tuning.overrides() };
        let budget = Budget::new(&workload, &hardware, &given)?;
        let builder = budget.apply(builder).cuda(budget.cuda(devices));
        Ok((self.tuning.apply(builder), drivers))
    }
}

/// What a rank has of its device. All blocks of all ranks that share one run at the same time, those of both lanes.
fn hardware(drivers: &[Arc<dyn Driver>]) -> Hardware {
    let usual = Hardware::default();
    let limits = || drivers.iter().map(|driver| driver.limits());
    let sharing = |device| limits().filter(|other| other.device == device).count();
    let sms = limits().map(|device| device.sms / (LANES.len() * sharing(device.device)));
    Hardware {
        sms: sms.min().unwrap_or(usual.sms).max(1),
        shared_bytes: limits().map(|device| device.shared).min().unwrap_or(usual.shared_bytes),
        ..usual
    }
}

/// Runs the benchmark and prints its report.
pub fn run(args: &BenchArgs) -> Result<(), Failure> {
    let world = args.world.world(args.tuning.deadline())?;
    let Some((bench, ranks)) = world.run(|place| Bench::new(args, &place))? else { return Ok(()) };
    let mut report = Measured::new(ranks).report(&bench);
    if let Some(baseline) = &bench.baseline {
        report["baseline"] = bench.compare(baseline, &report);
    }
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
    seed: u64,
    topk_idx: Vec<Vec<i64>>,
    topk_weights: Vec<Vec<f32>>,
    /// By rank, the rows it receives.
    rows: Vec<usize>,
    tokens: usize,
    /// By rank, its device; empty on the host.
    drivers: Vec<Arc<dyn Driver>>,
    /// Threads whose copies the bound is made of; none where there is no such bound.
    copiers: Option<usize>,
    /// What a peer takes, as [`PHASES`].
    baseline: Option<[Vec<Duration>; 4]>,
}

impl Bench {
    fn new(args: &BenchArgs, place: &Place) -> Result<Self, Failure> {
        args.check()?;
        let world = place.topology.world_size();
        let shape = RowShape { hidden: args.hidden, topk: args.topk, format: args.format.row_format() };
        let (builder, drivers) = args.start(place, shape)?;
        let (topk_idx, topk_weights) = (0..world).map(|rank| random_routing(args, rank)).unzip();
        let config = builder.clone().build()?;
        let mut bench = Self {
            copiers: place.workers(&config).filter(|_| drivers.is_empty()),
            config,
            shape,
            rows: vec![0; world],
            iters: args.iters,
            seed: args.seed,
            topk_idx,
            topk_weights,
            tokens: args.tokens,
            drivers,
            baseline: None,
        };
        let mut received = vec![0; world];
        bench.destinations().for_each(|(_, ranks)| ranks.into_iter().for_each(|rank| received[rank] += 1));
        bench.rows = received;
        let rows = bench.rows.iter().copied().max().unwrap_or(0);
        let bf16 = RowShape { format: RowFormat::Bf16, ..shape };
        let pool = RecvLayout::new(shape, rows).bytes + RecvLayout::new(bf16, rows).bytes;
        let pool = pool + options::pool_for_operations(&bench.config, shape, args.tokens);
        bench.config = builder.pool_bytes(pool).build()?;
        if let Some(Baseline::Nccl) = args.baseline {
            place.require_threads("--baseline nccl")?;
            // First: what it lacks is known at once.
            bench.baseline = Some(bench.nccl(args)?);
        }
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

    /// The tokens of a rank.
    fn x(&self) -> Vec<bf16> {
        let value = |i: usize| bf16::from_f32((i * 31 % 251) as f32 / 64.0 - 2.0);
        (0..self.tokens * self.shape.hidden).map(value).collect()
    }

    /// The same rows by NCCL.
    fn nccl(&self, args: &BenchArgs) -> Result<[Vec<Duration>; 4], Failure> {
        self.shape.check(&self.config)?;
        let placement = self.config.placement();
        let job = nccl::Job {
            devices: args.engine.named().to_vec(),
            owner: (0..placement.num_experts()).map(|expert| placement.rank_of(expert) as u32).collect(),
            ranks: self.config.topology().world_size(),
            hidden: self.shape.hidden,
            topk: self.shape.topk,
            topk_idx: &self.topk_idx,
            topk_weights: &self.topk_weights,
            x: self.x(),
            iters: WARMUPS + self.iters,
            deadline: self.config.deadline(),
        };
        Ok(slowest(&job.measure()?))
    }

    /// A baseline's part of the report: its times, and how many of railhop's they are.
    fn compare(&self, phases: &[Vec<Duration>; 4], report: &Value) -> Value {
        let mut part = json!({ "name": "nccl", "sums_on_device": true });
        for (name, times) in PHASES.iter().zip(phases) {
            let (figures, seconds) = figures(times);
            part[name] = figures;
            part["ratio"][name] =
                json!(seconds * 1e3 / report[name]["median_ms"].as_f64().unwrap_or(f64::NAN));
            if ["dispatch", "combine"].contains(name) {
                part["gbs_per_rank"][name] = json!(self.gbs_per_rank(2 * self.shape.hidden, seconds));
            }
        }
        part
    }

    /// Bytes of the rows that a rank receives on average, or gives back, per second.
    fn gbs_per_rank(&self, row: usize, seconds: f64) -> f64 {
        (self.rows.iter().sum::<usize>() * row) as f64 / self.rows.len() as f64 / seconds / 1e9
    }
}

impl Work for Bench {
    type Outcome = Timed;

    fn agreement(&self) -> String {
        let (topology, RowShape { hidden, topk, format }) = (self.config.topology(), self.shape);
        format!(
            "{}x{} ranks, {} tokens of hidden {hidden}, top-{topk} of {}, {format:?}, seed {}, {} iterations",
            topology.nodes(),
            topology.ranks_per_node(),
            self.tokens,
            self.config.placement().num_experts(),
            self.seed,
            self.iters,
        )
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn rank(&self, communicator: Communicator, meeting: &mut Meeting) -> Result<Timed, Failure> {
        let copiers = self.copiers.filter(|_| communicator.rank() == 0).map(Copiers::new).transpose();
        let mut copiers = meeting.join(copiers.map_err(|error| error.to_string()))?;
        let mut rank = Rank::new(self, communicator, meeting)?;
        let mut timed = Timed::default();
        for _ in 0..WARMUPS + self.iters {
            timed.copy_gbs.extend(copiers.as_mut().map(Copiers::rate));
            timed.phases.push(rank.iteration()?);
        }
        Ok(timed)
    }
}

/// What a rank measures.
#[derive(Default, Serialize, Deserialize)]
struct Timed {
    /// By iteration, as [`PHASES`].
    phases: Vec<[Duration; 4]>,
    /// Rates of copies, on the rank that copies.
    copy_gbs: Vec<f64>,
}

/// Per phase, the slowest rank's time of each iteration after the warm-up.
fn slowest(ranks: &[Vec<[Duration; 4]>]) -> [Vec<Duration>; 4] {
    let iterations = ranks.iter().map(Vec::len).min().unwrap_or(0);
    let slowest = |iteration: usize, phase: usize| ranks.iter().map(|times| times[iteration][phase]).max();
    [0, 1, 2, 3]
        .map(|phase| (WARMUPS..iterations).filter_map(|iteration| slowest(iteration, phase)).collect())
}

/// Median and tail of a phase for the report, and the median in seconds.
fn figures(times: &[Duration]) -> (Value, f64) {
    let times: Vec<_> = times.iter().map(Duration::as_secs_f64).collect();
    let seconds = median(times.clone());
    (json!({ "median_ms": seconds * 1e3, "p99_ms": quantile(times, 0.99) * 1e3 }), seconds)
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

/// One rank, and where it meets the others.
struct Rank<'a> {
    meeting: &'a mut Meeting,
    layer: Layer<'a>,
}

/// A layer with the buffers it uses again and again, as a training loop does.
struct Layer<'a> {
    communicator: Communicator,
    inputs: Inputs<'a>,
    buffers: Buffers,
}

/// Receive buffer, and the experts' outputs where rows are FP8; taken while in use.
struct Buffers {
    received: Option<RecvBuffer>,
    outputs: Option<RecvBuffer>,
}

impl<'a> Rank<'a> {
    fn new(bench: &'a Bench, communicator: Communicator, meeting: &'a mut Meeting) -> Result<Self, String> {
        let rank = communicator.rank();
        let buffers = Buffers::new(&communicator, bench.rows[rank], bench.shape);
        let buffers = meeting.join(buffers.map_err(|error| error.to_string()))?;
        let (topk_idx, topk_weights) = (&bench.topk_idx[rank], &bench.topk_weights[rank]);
        let routing = Routing { topk: bench.shape.topk, topk_idx, topk_weights };
        let inputs = Inputs::new(bench.drivers.get(rank), routing, bench.x());
        let inputs = meeting.join(inputs.map_err(|error| error.to_string()))?;
        Ok(Self { meeting, layer: Layer { communicator, inputs, buffers } })
    }

    /// As [`PHASES`]: one iteration with a meeting around each phase, and one without.
    fn iteration(&mut self) -> Result<[Duration; 4], String> {
        let Self { meeting, layer } = self;
        let (handle, plan) = meeting.timed(|| layer.plan())?;
        let ((), dispatch) = meeting.timed(|| layer.dispatch(&handle))?;
        let ((), combine) = meeting.timed(|| layer.combine(&handle))?;
        let ((), total) = meeting.timed(|| {
            let handle = layer.plan()?;
            layer.dispatch(&handle)?;
            layer.combine(&handle)
        })?;
        Ok([plan, dispatch, combine, total])
    }
}

impl Layer<'_> {
    fn plan(&mut self) -> Result<Handle, railhop::Error> {
        self.inputs.plan(&mut self.communicator)
    }

    fn dispatch(&mut self, handle: &Handle) -> Result<(), railhop::Error> {
        let buffer = self.buffers.received.take().expect("put back by every operation");
        self.buffers.received = Some(self.inputs.dispatch(&mut self.communicator, handle, buffer)?);
        Ok(())
    }

    fn combine(&mut self, handle: &Handle) -> Result<(), railhop::Error> {
        let Buffers { received, outputs } = &mut self.buffers;
        let place = if outputs.is_some() { outputs } else { received };
        let buffer = place.take().expect("put back by every operation");
        *place = Some(self.inputs.combine(&mut self.communicator, handle, buffer)?);
        Ok(())
    }
}

impl Buffers {
    fn new(comm: &Communicator, rows: usize, shape: RowShape) -> Result<Self, railhop::Error> {
        let received = Some(comm.recv_buffer(rows, shape)?);
        let mut outputs = None;
        if shape.format != RowFormat::Bf16 {
            let mut buffer = comm.recv_buffer(rows, RowShape { format: RowFormat::Bf16, ..shape })?;
            buffer.set_rows(rows);
            buffer.bf16_mut().fill(bf16::ONE);
            outputs = Some(buffer);
        }
        Ok(Self { received, outputs })
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

/// As [`PHASES`], the slowest rank's time of each iteration; and on the host the rate of copies.
struct Measured {
    phases: [Vec<Duration>; 4],
    copy_gbs: Option<f64>,
}

impl Measured {
    /// Of what each rank measured.
    fn new(ranks: Vec<Timed>) -> Self {
        let (phases, rates): (Vec<_>, Vec<_>) =
            ranks.into_iter().map(|rank| (rank.phases, rank.copy_gbs)).unzip();
        let rates = rates.concat();
        Self { phases: slowest(&phases), copy_gbs: (!rates.is_empty()).then(|| median(rates)) }
    }

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
        let [plan, dispatch, combine, total] = self.phases.each_ref().map(|times| figures(times));
        let gbs = |(_, seconds): &(Value, f64), row: usize| moved(row) as f64 / seconds / 1e9;
        let per_rank = |(_, seconds): &(Value, f64), row| bench.gbs_per_rank(row, *seconds);
        let light = |phase, row| self.copy_gbs.map(|copy_gbs| gbs(phase, row) / copy_gbs);
        json!({
            "nodes": topology.nodes(), "ranks_per_node": topology.ranks_per_node(), "tokens": bench.tokens,
            "hidden": shape.hidden, "experts": bench.config.placement().num_experts(), "topk": topk,
            "format": format!("{:?}", shape.format), "iters": bench.iters,
            "workers": bench.config.worker_budget(), "channels": bench.config.channels(),
            "chunk_tokens": bench.config.chunk_tokens(), "ring_slots": bench.config.ring_slots(),
            "engine": if bench.drivers.is_empty() { "host" } else { "cuda" },
            "plan": plan.0, "dispatch": dispatch.0, "combine": combine.0, "total": total.0,
            "tokens_per_s": tokens as f64 / total.1,
            "gbs": { "dispatch": gbs(&dispatch, row), "combine": gbs(&combine, out) },
            "gbs_per_rank": { "dispatch": per_rank(&dispatch, row), "combine": per_rank(&combine, out) },
            "memcpy_gbs": self.copy_gbs,
            "speed_of_light": { "dispatch": light(&dispatch, row), "combine": light(&combine, out) },
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
    let mut header = vec!["phase", "median ms", "p99 ms", "GB/s", "of the speed of light"];
    let baseline = report.get("baseline");
    if baseline.is_some() {
        header.extend(["GB/s per rank", "NCCL, ms", "GB/s per rank", "NCCL's time / railhop's"]);
    }
    table.set_header(header);
    for phase in PHASES {
        let number =
            |value: &Value, digits: usize| value.as_f64().map_or(String::new(), |v| format!("{v:.digits$}"));
        let mut row = vec![
            phase.to_string(),
            number(&report[phase]["median_ms"], 3),
            number(&report[phase]["p99_ms"], 3),
            number(&report["gbs"][phase], 2),
            number(&report["speed_of_light"][phase], 2),
        ];
        row.extend(baseline.into_iter().flat_map(|baseline| {
            [
                number(&report["gbs_per_rank"][phase], 2),
                number(&baseline[phase]["median_ms"], 3),
                number(&baseline["gbs_per_rank"][phase], 2),
                number(&baseline["ratio"][phase], 2),
            ]
        }));
        table.add_row(row);
    }
    println!("{table}");
    if baseline.is_some() {
        println!("NCCL: packing, the exchange of counts and the sums are on the devices and in its times");
    }
    let tokens_per_s = report["tokens_per_s"].as_f64().unwrap_or_default();
    match report["memcpy_gbs"].as_f64() {
        Some(gbs) => println!("{tokens_per_s:.0} tokens/s; memcpy {gbs:.1} GB/s (reads + writes)"),
        None => println!("{tokens_per_s:.0} tokens/s"),
    }
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
