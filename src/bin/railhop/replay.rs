//! `railhop replay`: recorded routing through plan, dispatch, test experts and combine, checked bit for bit.

use std::error::Error;
use std::fmt::Display;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, Table, presets};
use half::bf16;
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use railhop::reference::oracle::{Oracle, RankTokens};
use railhop::reference::trace::Trace;
use railhop::reference::{dump, experts, verify};
use railhop::wire::shape::{CombineSlot, DispatchSlot, RecvLayout};
use railhop::{
    Combine, Communicator, Config, ConfigBuilder, Cuda, Dispatched, Error as OpError, RecvBuffer, Routing,
    RowFormat, RowShape, Topology,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::meeting::Meeting;
use crate::options::{self, Format, Tuning};
use crate::world::{Place, Work, WorldArgs};

/// The most ranks that are tried: in one process, each is a thread with a region of its own.
const MAX_RANKS: usize = 1024;

/// The timed phases of a step.
const PHASES: [&str; 3] = ["plan", "dispatch", "combine"];

/// The most ranks on a line of the table.
const RANKS_PER_LINE: usize = 8;

type Failure = Box<dyn Error + Send + Sync>;

/// Recorded routing on a world of threads, or of processes that a launcher has started.
#[derive(Debug, clap::Args)]
pub struct ReplayArgs {
    /// The trace, a safetensors file
    trace: PathBuf,
    #[command(flatten)]
    world: WorldArgs,
    /// Tokens of each rank in each step
    #[arg(long)]
    tokens_per_rank: usize,
    #[command(flatten)]
    format: Format,
    /// Replay steps A to B, B excluded; either may be left out
    #[arg(long, value_name = "A:B", default_value = ":")]
    steps: Steps,
    /// Write what every rank received and combined, a file for each step and rank
    #[arg(long, value_name = "DIR")]
    dump: Option<PathBuf>,
    #[command(flatten)]
    engine: options::Engine,
    #[command(flatten)]
    tuning: Tuning,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// A half-open range of steps, open where it says nothing.
#[derive(Debug, Clone, Copy)]
struct Steps {
    from: Option<usize>,
    to: Option<usize>,
}

impl FromStr for Steps {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bound = |text: &str| match text {
            "" => Ok(None),
            number => number.parse().map(Some).map_err(|_| format!("{number:?} is no step")),
        };
        let (from, to) = text.split_once(':').ok_or("A:B, A: or :B expected")?;
        Ok(Self { from: bound(from)?, to: bound(to)? })
    }
}

impl Steps {
    /// The steps of a trace that has `count`.
    fn of(self, count: usize) -> Result<Range<usize>, String> {
        let range = self.from.unwrap_or(0)..self.to.unwrap_or(count);
        match !range.is_empty() && range.end <= count {
            true => Ok(range),
            false => Err(format!(
                "steps {}:{}: A < B <= {count} expected, for the trace has {count} steps in this world",
                range.start, range.end
            )),
        }
    }
}

/// Replays the trace, checks it and prints the report.
pub fn run(args: &ReplayArgs) -> Result<(), Failure> {
    let world = args.world.world(args.tuning.deadline())?;
    let Some((replay, ranks)) = world.run(|place| Replay::new(args, &place))? else { return Ok(()) };
    let report = Report { replay: &replay, ranks };
    let text = if args.json { report.json().to_string() } else { report.tables() };
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

/// Refuses what can't be replayed.
fn check(args: &ReplayArgs, topology: Topology) -> Result<(), Failure> {
    args.engine.require_cuda_for_devices()?;
    match topology.world_size() {
        world if world > MAX_RANKS => {
            Err(format!("a world of {world} ranks: at most {MAX_RANKS} are replayed").into())
        }
        _ if args.tokens_per_rank == 0 => {
            Err("tokens_per_rank = 0: nothing would be sent; 1 would work".into())
        }
        _ => Ok(()),
    }
}

/// What the configuration starts from, for steps of `tokens` tokens a rank.
fn builder(args: &ReplayArgs, place: &Place, trace: &Trace, tokens: usize) -> Result<ConfigBuilder, Failure> {
    let builder = place.builder().experts(trace.num_experts).max_topk(trace.topk);
    let builder = args.tuning.apply(builder.max_hidden(trace.hidden).max_tokens(tokens));
    let Some(devices) = args.engine.cuda() else { return Ok(builder) };
    place.require_threads("--engine cuda")?;
    Ok(builder.cuda(Cuda { devices, ..Cuda::default() }))
}

/// Puts the path before an error.
fn about<E: Display>(path: &Path) -> impl Fn(E) -> String {
    move |error| format!("{}: {error}", path.display())
}

/// Steps done; invisible unless stderr is a terminal.
fn progress_bar(steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} step {pos} of {len}, {eta} left");
    ProgressBar::new(steps as u64).with_style(style.expect("the template is valid"))
}

/// What the routing of a step asks for, counted straight from the trace.
struct Routed {
    /// By rank: tokens that name one of its experts.
    rows: Vec<usize>,
    /// (token, rank on another node) pairs: what would cross hop 1 if nodes were not deduplicated.
    remote: usize,
}

impl Routed {
    fn count(config: &Config, topk: usize, ranks: &[RankTokens<'_>]) -> Self {
        let (topology, placement) = (config.topology(), config.placement());
        let mut routed = Self { rows: vec![0; ranks.len()], remote: 0 };
        for (home, tokens) in ranks.iter().enumerate() {
            for entries in tokens.topk_idx.chunks_exact(topk) {
                let experts = entries.iter().filter_map(|&expert| usize::try_from(expert).ok());
                // What is out of range is refused by the plan, with its place.
                let known = experts.filter(|&expert| expert < placement.num_experts());
                let mut targets: Vec<_> = known.map(|expert| placement.rank_of(expert)).collect();
                targets.sort_unstable();
                targets.dedup();
                let remote = |rank: &&usize| topology.node_of(**rank) != topology.node_of(home);
                routed.remote += targets.iter().filter(remote).count();
                targets.into_iter().for_each(|rank| routed.rows[rank] += 1);
            }
        }
        routed
    }
}

/// Room for the fullest rank's receive buffer and its experts' outputs.
fn pool_bytes(shape: RowShape, routed: &[Routed]) -> usize {
    let rows = routed.iter().flat_map(|step| &step.rows).copied().max().unwrap_or(0);
    let outputs = RowShape { format: RowFormat::Bf16, ..shape };
    RecvLayout::new(shape, rows).bytes + RecvLayout::new(outputs, rows).bytes
}

/// What a rank measured in a step.
#[derive(Serialize, Deserialize)]
struct Measured {
    /// As [`PHASES`].
    times: [Duration; 3],
    /// Tokens that crossed hop 1.
    hop1: usize,
}

/// A replay that can start.
struct Replay<'a> {
    args: &'a ReplayArgs,
    trace: Trace,
    config: Config,
    shape: RowShape,
    /// Of each rank in each step.
    tokens: usize,
    steps: Range<usize>,
    /// By step.
    routed: Vec<Routed>,
}

impl<'a> Replay<'a> {
    fn new(args: &'a ReplayArgs, place: &Place) -> Result<Self, Failure> {
        let trace = Trace::read(&args.trace).map_err(about(&args.trace))?;
        let shape = RowShape { hidden: trace.hidden, topk: trace.topk, format: args.format.row_format() };
        check(args, place.topology)?;
        let world = place.topology.world_size();
        // More tokens than the trace has change nothing.
        let tokens = args.tokens_per_rank.min(trace.rows());
        let steps = args.steps.of(trace.steps(world, tokens))?;
        let builder = builder(args, place, &trace, tokens)?;
        let config = builder.clone().build()?;
        shape.check(&config).map_err(about(&args.trace))?;
        let routed = |step| Routed::count(&config, shape.topk, &trace.step(step, world, tokens));
        let routed: Vec<_> = steps.clone().map(routed).collect();
        let pool = pool_bytes(shape, &routed) + options::pool_for_operations(&config, shape, tokens);
        let config = builder.pool_bytes(pool).build()?;
        if let Some(dir) = &args.dump {
            std::fs::create_dir_all(dir).map_err(about(dir))?;
        }
        Ok(Self { args, trace, config, shape, tokens, steps, routed })
    }

    fn oracle(&self, step: usize) -> Oracle<'_> {
        Oracle {
            config: &self.config,
            hidden: self.shape.hidden,
            topk: self.shape.topk,
            format: self.shape.format,
            ranks: self.trace.step(step, self.config.topology().world_size(), self.tokens),
        }
    }
}

impl Work for Replay<'_> {
    type Outcome = Vec<Measured>;

    fn agreement(&self) -> String {
        let topology = self.config.topology();
        format!(
            "{}x{} ranks, trace {:016x} of hidden {}, top-{} of {}, steps {}:{} of {} tokens, {}",
            topology.nodes(),
            topology.ranks_per_node(),
            self.trace.fingerprint(),
            self.trace.hidden,
            self.trace.topk,
            self.trace.num_experts,
            self.steps.start,
            self.steps.end,
            self.tokens,
            format_name(self.shape.format),
        )
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn rank(&self, mut communicator: Communicator, meeting: &mut Meeting) -> Result<Vec<Measured>, Failure> {
        let shown = communicator.rank() == 0;
        let progress = if shown { progress_bar(self.steps.len()) } else { ProgressBar::hidden() };
        let step = |number| {
            let measured = self.step(&mut communicator, Step { number, meeting });
            progress.inc(1);
            measured
        };
        let measured = self.steps.clone().map(step).collect::<Result<_, _>>();
        progress.finish_and_clear();
        Ok(measured?)
    }
}

impl Replay<'_> {
    /// One step of one rank. Nothing but the operations themselves is inside the times.
    fn step(&self, communicator: &mut Communicator, mut step: Step<'_>) -> Result<Measured, String> {
        let (rank, oracle) = (communicator.rank(), self.oracle(step.number));
        let own = &oracle.ranks[rank];
        let routing = Routing { topk: oracle.topk, topk_idx: &own.topk_idx, topk_weights: &own.topk_weights };
        let x = own.x.to_vec();
        step.meet(Ok::<_, OpError>(()))?;
        let (handle, plan) = step.meet(timed(|| communicator.plan(routing)))?;
        let buffer = step.meet(communicator.recv_buffer(handle.num_recv_tokens(), self.shape))?;
        let (done, dispatch) =
            step.meet(timed(|| communicator.dispatch(&handle, x, buffer).map_err(OpError::from)))?;
        let y = step.meet(self.outputs(communicator, &done.buffer))?;
        let (combined, combine) =
            step.meet(timed(|| communicator.combine(&handle, Combine::new(y)).map_err(OpError::from)))?;
        step.meet(self.check(step.number, rank, &oracle, &done, &combined.x))?;
        Ok(Measured { times: [plan, dispatch, combine], hop1: handle.num_hop1_tokens() })
    }

    /// What the test experts make of the received rows.
    fn outputs(&self, communicator: &Communicator, received: &RecvBuffer) -> Result<RecvBuffer, OpError> {
        let shape = RowShape { format: RowFormat::Bf16, ..self.shape };
        let mut outputs = communicator.recv_buffer(received.rows(), shape)?;
        outputs.set_rows(received.rows());
        let experts = communicator.config().placement().experts_of(communicator.rank());
        experts::run(received, experts, outputs.bf16_mut());
        Ok(outputs)
    }

    /// Writes the dump, so that others see what differs, then compares with the oracle.
    fn check(
        &self,
        step: usize,
        rank: usize,
        oracle: &Oracle<'_>,
        Dispatched { handle, buffer, .. }: &Dispatched<Vec<bf16>>,
        combined: &[bf16],
    ) -> Result<(), String> {
        if let Some(dir) = &self.args.dump {
            dump::write(dir, step, rank, handle, buffer, combined).map_err(about(dir))?;
        }
        verify::verify(oracle, rank, handle, buffer, combined)
            .map_err(|difference| format!("what it got differs from the oracle: {difference}"))
    }
}

/// A rank in a step, for its meetings.
struct Step<'a> {
    number: usize,
    meeting: &'a mut Meeting,
}

impl Step<'_> {
    fn meet<T, E: Display>(&mut self, result: Result<T, E>) -> Result<T, String> {
        self.meeting.join(result.map_err(|error| format!("step {}: {error}", self.number)))
    }
}

fn timed<T, E>(operation: impl FnOnce() -> Result<T, E>) -> Result<(T, Duration), E> {
    let started = Instant::now();
    let value = operation()?;
    Ok((value, started.elapsed()))
}

/// What the replay came to.
struct Report<'a> {
    replay: &'a Replay<'a>,
    ranks: Vec<Vec<Measured>>,
}

/// What moves on one hop, in all steps.
struct Hop {
    name: &'static str,
    rows: usize,
    /// Elements and scales.
    logical: usize,
    /// With headers: whole slots.
    physical: Option<usize>,
    /// Whole slots, if each destination rank got its own.
    without_deduplication: Option<usize>,
}

impl Report<'_> {
    fn topology(&self) -> Topology {
        self.replay.config.topology()
    }

    /// By rank, the rows it received.
    fn rows(&self) -> Vec<usize> {
        (0..self.ranks.len())
            .map(|rank| self.replay.routed.iter().map(|step| step.rows[rank]).sum())
            .collect()
    }

    /// Rows of the fullest rank over those of the mean one; 1 where there are no rows.
    fn skew(&self) -> f64 {
        let rows = self.rows();
        let (most, all) = (rows.iter().copied().max().unwrap_or(0), rows.iter().sum::<usize>());
        if all == 0 { 1.0 } else { (most * rows.len()) as f64 / all as f64 }
    }

    fn hops(&self) -> [Hop; 4] {
        let hop1: usize = self.ranks.iter().flatten().map(|measured| measured.hop1).sum();
        let remote: usize = self.replay.routed.iter().map(|step| step.remote).sum();
        let rows = self.rows().into_iter().sum();
        let (row, output) =
            (self.replay.shape.row_bytes() + self.replay.shape.scale_pitch(), 2 * self.replay.shape.hidden);
        let rail = |name, row, slot| Hop {
            name,
            rows: hop1,
            logical: hop1 * row,
            physical: Some(hop1 * slot),
            without_deduplication: Some(remote * slot),
        };
        let node =
            |name, row| Hop { name, rows, logical: rows * row, physical: None, without_deduplication: None };
        [
            rail("dispatch_hop1", row, DispatchSlot::new(&self.replay.shape).pitch),
            node("dispatch_hop2", row),
            rail("combine_hop1", output, CombineSlot::new(self.replay.shape.hidden, 0).pitch),
            node("combine_hop2", output),
        ]
    }

    /// The slowest rank's time in `phase`: the sum over the steps, and the median step.
    fn slowest(&self, phase: usize) -> (Duration, Duration) {
        let slowest = |step: usize| self.ranks.iter().map(|steps| steps[step].times[phase]).max();
        let mut times: Vec<_> = (0..self.replay.steps.len()).filter_map(slowest).collect();
        times.sort_unstable();
        (times.iter().sum(), times[times.len() / 2])
    }

    fn json(&self) -> Value {
        let hop = |hop: Hop| {
            let facts = json!({
                "rows": hop.rows,
                "logical_bytes": hop.logical,
                "physical_bytes": hop.physical,
                "physical_bytes_without_deduplication": hop.without_deduplication,
            });
            (hop.name.to_string(), facts)
        };
        let phase = |(phase, name): (usize, &&str)| {
            let (sum, median) = self.slowest(phase);
            (name.to_string(), json!({ "sum_s": sum.as_secs_f64(), "median_s": median.as_secs_f64() }))
        };
        json!({
            "trace": self.replay.args.trace.display().to_string(),
            "hidden": self.replay.shape.hidden,
            "topk": self.replay.shape.topk,
            "experts": self.replay.trace.num_experts,
            "format": format_name(self.replay.shape.format),
            "nodes": self.topology().nodes(),
            "ranks_per_node": self.topology().ranks_per_node(),
            "tokens_per_rank": self.replay.args.tokens_per_rank,
            "steps": [self.replay.steps.start, self.replay.steps.end],
            "verified": true,
            "rows_per_rank": self.rows(),
            "skew": self.skew(),
            "hops": self.hops().into_iter().map(hop).collect::<serde_json::Map<_, _>>(),
            "slowest_rank": PHASES.iter().enumerate().map(phase).collect::<serde_json::Map<_, _>>(),
            "workers": self.replay.config.worker_budget(),
        })
    }

    fn tables(&self) -> String {
        let Range { start, end } = self.replay.steps.clone();
        format!(
            "rows received, steps {start}:{end}, {}\n{}\nskew (most rows over mean): {:.3}\n\n{}\n\n{}\n\n{}",
            format_name(self.replay.shape.format),
            self.rank_table(),
            self.skew(),
            self.hop_table(),
            self.phase_table(),
            "Every rank and step agrees with the oracle, bit for bit.",
        )
    }

    /// Lines hold whole nodes; a node with many ranks takes several.
    fn rank_table(&self) -> Table {
        let (rows, node) = (self.rows(), self.topology().ranks_per_node());
        let mut table = table(&[]);
        let mut first = 0;
        let nodes = rows.chunks(node * (RANKS_PER_LINE / node).max(1));
        for line in nodes.flat_map(|rows| rows.chunks(RANKS_PER_LINE)) {
            let label = format!("ranks {first}..{}", first + line.len());
            table.add_row(std::iter::once(label).chain(line.iter().map(|&rows| count(rows))));
            first += line.len();
        }
        align(table)
    }

    fn hop_table(&self) -> Table {
        let mut table = table(&["hop", "rows", "logical", "physical", "without deduplication"]);
        let bytes = |bytes: usize| HumanBytes(bytes as u64).to_string();
        for hop in self.hops() {
            let optional = [hop.physical, hop.without_deduplication].map(|b| b.map_or("".into(), bytes));
            let [physical, without] = optional;
            let name = hop.name.replace("_hop", ", hop ");
            table.add_row([name, count(hop.rows), bytes(hop.logical), physical, without]);
        }
        align(table)
    }

    fn phase_table(&self) -> Table {
        let mut table = table(&["slowest rank", "all steps", "median step"]);
        for (phase, name) in PHASES.iter().enumerate() {
            let (sum, median) = self.slowest(phase);
            table.add_row([name.to_string(), format!("{sum:.3?}"), format!("{median:.3?}")]);
        }
        align(table)
    }
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    if !header.is_empty() {
        table.set_header(header);
    }
    table
}

/// Numbers to the right.
fn align(mut table: Table) -> Table {
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}

fn count(n: usize) -> String {
    HumanCount(n as u64).to_string()
}

fn format_name(format: RowFormat) -> &'static str {
    use railhop::ScaleFormat::{F32, Ue8m0};
    match format {
        RowFormat::Bf16 => "bf16",
        RowFormat::Fp8(F32) => "fp8 with f32 scales",
        RowFormat::Fp8(Ue8m0) => "fp8 with ue8m0 scales",
    }
}
