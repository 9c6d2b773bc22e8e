//! The kernels on the CPU shim against the host engine: the same bits, on recorded routing and on random worlds.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))] // What the shim runs on.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::shim::{self, Launch, Machine, Options, Plan, Start, Traffic};
use common::{Case, Random, Ranks, bits, config};
use half::bf16;
use railhop::error::{Kind, Reason};
use railhop::numeric::{quantise, scale_groups};
use railhop::reference::oracle::RankTokens;
use railhop::reference::trace::Trace;
use railhop::wire::device::{FaultRecord, Staging, role, status, waits};
use railhop::wire::kernel::Input;
use railhop::wire::record::VerdictRecord;
use railhop::wire::region::{Lane, WordId};
use railhop::wire::shape::RecvLayout;
use railhop::{
    Combine, Combined, Config, Dispatched, Error, ExpertPlacement, Fp8Tokens, Handle, RecvBuffer, RowFormat,
    RowShape, ScaleData, ScaleFormat, ScaleOrder, Scales,
};

/// Tokens that are E4M3 rows already, with scales in some order.
struct Ready {
    tokens: Fp8Tokens<Vec<u8>>,
    /// Elements between tokens and between groups.
    strides: (usize, usize),
}

impl Ready {
    /// The rows of a rank, quantised by the caller.
    fn new(case: &Case, rank: usize, scales: ScaleFormat, column_major: bool) -> Self {
        let (x, hidden) = (&case.ranks[rank].x, case.shape.hidden);
        let (rows, groups) = (x.len() / hidden, scale_groups(hidden));
        let width = if scales == ScaleFormat::F32 { groups } else { groups.div_ceil(4) };
        let pitch = if column_major { rows + 3 } else { width + 1 };
        let strides = if column_major { (1, pitch) } else { (pitch, 1) };
        let mut codes = vec![0; x.len()];
        let mut words = vec![0u32; if column_major { width * pitch } else { rows * pitch }];
        for (row, (x, codes)) in x.chunks(hidden).zip(codes.chunks_mut(hidden)).enumerate() {
            let mut dense = vec![0u8; 4 * width];
            quantise(x, scales, codes, &mut dense);
            for (group, word) in dense.chunks(4).enumerate() {
                words[row * strides.0 + group * strides.1] = u32::from_le_bytes(word.try_into().unwrap());
            }
        }
        let data = match scales {
            ScaleFormat::F32 => ScaleData::F32(words.into_iter().map(f32::from_bits).collect()),
            ScaleFormat::Ue8m0 => ScaleData::Ue8m0(words.into()),
        };
        let order =
            if column_major { ScaleOrder::ColumnMajor { pitch } } else { ScaleOrder::RowMajor { pitch } };
        Self { tokens: Fp8Tokens { codes, scales: Scales { data, order } }, strides }
    }

    fn scale_bits(&self) -> Vec<u32> {
        match &self.tokens.scales.data {
            ScaleData::F32(data) => data.iter().map(|scale| scale.to_bits()).collect(),
            ScaleData::Ue8m0(data) => data.to_vec(),
        }
    }
}

/// What a rank received on the host engine.
struct Received {
    handle: Handle,
    buffer: RecvBuffer,
}

impl<X> From<Dispatched<X>> for Received {
    fn from(Dispatched { handle, buffer, .. }: Dispatched<X>) -> Self {
        Self { handle, buffer }
    }
}

/// How a case is run.
#[derive(Debug, Clone, Copy, Default)]
struct Style {
    bias: bool,
    with_weights: bool,
    /// The experts' outputs are of very different magnitudes: sums of a few BF16 values of like ones are exact in f32,
    /// and show no order.
    wide: bool,
    /// The rows come as E4M3, where the case is FP8; whether their scales are column-major.
    ready: Option<bool>,
}

impl Style {
    fn random(random: &mut Random) -> Self {
        let ready = random.one_in(2).then(|| random.one_in(2));
        let (bias, with_weights, wide) = (random.one_in(2), random.one_in(2), random.one_in(2));
        Self { bias, with_weights, wide, ready }
    }
}

/// What the host engine makes of a case.
struct Expected {
    received: Vec<Received>,
    /// By rank, where rows come as E4M3.
    ready: Option<Vec<Ready>>,
    /// By rank: the experts' outputs.
    outputs: Vec<Vec<bf16>>,
    combined: Vec<Combined<RecvBuffer>>,
    bias: Option<Arc<[bf16]>>,
    with_weights: bool,
}

impl Expected {
    fn new(case: &Case, Style { bias, with_weights, wide, ready }: Style) -> Self {
        let mut ranks = Ranks::new(&case.config);
        let handles = ranks.plan(case);
        let ready = match (case.shape.format, ready) {
            (RowFormat::Fp8(scales), Some(column_major)) => {
                let rows = (0..case.ranks.len()).map(|rank| Ready::new(case, rank, scales, column_major));
                Some(rows.collect::<Vec<_>>())
            }
            _ => None,
        };
        let received: Vec<Received> = match &ready {
            Some(ready) => {
                let received = ranks.dispatch(&handles, case.shape, |rank| ready[rank].tokens.clone());
                received.into_iter().map(Received::from).collect()
            }
            None => {
                let received = ranks.dispatch(&handles, case.shape, |rank| case.x(rank));
                received.into_iter().map(Received::from).collect()
            }
        };
        let mut outputs = ranks.each(|comm| case.experts(comm, &received[comm.rank()].buffer));
        let mut random = Random(7);
        for output in outputs.iter_mut().filter(|_| wide).flat_map(|y| y.bf16_mut()) {
            let exponent = 127 - 20 + random.below(40) as u16;
            *output = bf16::from_bits(exponent << 7 | random.next() as u16 & 0x807F);
        }
        let copies = outputs.iter().map(|y| y.bf16().to_vec()).collect();
        let most = case.ranks.iter().map(|rank| rank.x.len()).max().unwrap_or(0);
        let bias: Option<Arc<[bf16]>> = bias.then(|| (0..most).map(|_| random.element()).collect());
        let inputs = outputs.into_iter().enumerate().map(|(rank, mut y)| {
            if with_weights {
                y.topk_weights_mut().copy_from_slice(received[rank].buffer.topk_weights());
            }
            let combine = Combine::new(y);
            let combine = if with_weights { combine.with_topk_weights() } else { combine };
            match &bias {
                Some(bias) => combine.bias(bias[..case.ranks[rank].x.len()].into()),
                None => combine,
            }
        });
        let combined = ranks.combine(&handles, inputs.collect::<Vec<_>>());
        Self { received, ready, outputs: copies, combined, bias, with_weights }
    }
}

/// A case on a machine.
struct Round {
    plans: Vec<Plan>,
    buffers: Vec<(usize, RecvLayout)>,
    outputs: Vec<(usize, RecvLayout)>,
    out: Vec<(u64, u64)>,
}

impl Round {
    fn new(machine: &mut Machine, case: &Case, expected: &Expected) -> Self {
        let tokens = |rank: usize| case.ranks[rank].topk_weights.len() / case.shape.topk;
        let world = case.ranks.len();
        let all: usize = (0..world).map(tokens).sum();
        let plans = (0..world).map(|rank| machine.plan(rank, tokens(rank), case.shape.topk, all)).collect();
        let rows = |rank: usize| expected.received[rank].buffer.rows();
        let buffers = Self::buffers(machine, case, expected);
        let outputs = (0..world).map(|rank| machine.buffer(rank, case.outputs(), rows(rank))).collect();
        let mut out = |rank: usize| {
            let rows = machine.keep(rank, &vec![0u16; tokens(rank) * case.shape.hidden]);
            (rows, machine.keep(rank, &vec![0f32; tokens(rank) * case.shape.topk]))
        };
        let out = (0..world).map(&mut out).collect();
        Self { plans, buffers, outputs, out }
    }

    fn buffers(machine: &mut Machine, case: &Case, expected: &Expected) -> Vec<(usize, RecvLayout)> {
        let rows = expected.received.iter().map(|received| received.buffer.rows());
        rows.enumerate().map(|(rank, rows)| machine.buffer(rank, case.shape, rows)).collect()
    }

    /// Starts a dispatch at every rank; the shim's ids of the tokens.
    fn start_dispatch(
        &self,
        machine: &mut Machine,
        (case, expected): (&Case, &Expected),
        kind: Kind,
    ) -> Vec<u32> {
        self.start_dispatch_with(machine, (case, expected), kind, |_, _| {})
    }

    fn start_dispatch_with(
        &self,
        machine: &mut Machine,
        (case, expected): (&Case, &Expected),
        kind: Kind,
        mut change: impl FnMut(usize, &mut Start<'_>),
    ) -> Vec<u32> {
        self.start_dispatch_on(machine, (case, expected), kind, |rank, start| {
            change(rank, start);
            true
        })
    }

    /// Starts a dispatch at the ranks for which `change` says so, as it says.
    fn start_dispatch_on(
        &self,
        machine: &mut Machine,
        (case, expected): (&Case, &Expected),
        kind: Kind,
        mut change: impl FnMut(usize, &mut Start<'_>) -> bool,
    ) -> Vec<u32> {
        let mut ids = Vec::new();
        for (rank, plan) in self.plans.iter().enumerate() {
            let tokens = &case.ranks[rank];
            let routing = (machine.keep(rank, &tokens.topk_idx), machine.keep(rank, &tokens.topk_weights));
            let input = match &expected.ready {
                Some(ready) => Input {
                    x: machine.keep(rank, &ready[rank].tokens.codes),
                    scales: machine.keep(rank, &ready[rank].scale_bits()),
                    scale_strides: (ready[rank].strides.0 as u64, ready[rank].strides.1 as u64),
                    ..Input::default()
                },
                None => Input { x: machine.keep(rank, &bits(&tokens.x)), ..Input::default() },
            };
            ids.push(machine.id_of(input.x));
            let (offset, layout) = &self.buffers[rank];
            let buffer = match kind {
                Kind::Plan => (0, RecvLayout::new(case.shape, 0).parts_at(0)),
                _ => (layout.capacity, layout.parts_at(*offset)),
            };
            let routing = (kind != Kind::Dispatch).then_some(routing);
            let mut start =
                Start { kind, shape: case.shape, plan, routing, input, weights: 0, poison: None, buffer };
            if change(rank, &mut start) {
                machine.start(rank, &start);
            }
        }
        ids
    }

    fn start_combine(&self, machine: &mut Machine, case: &Case, expected: &Expected) {
        for (rank, plan) in self.plans.iter().enumerate() {
            let (offset, layout) = &self.outputs[rank];
            let weights = expected.received[rank].buffer.topk_weights();
            let region = &mut machine.devices[rank].region;
            region.write(offset + layout.x, &bits(&expected.outputs[rank]));
            region.write(offset + layout.topk_weights, weights);
            let bias = expected.bias.as_ref().map_or(0, |bias| {
                let elements = case.ranks[rank].x.len();
                machine.keep(rank, &bits(&bias[..elements]))
            });
            let (out, out_weights) = self.out[rank];
            let start = Start {
                kind: Kind::Combine,
                shape: case.outputs(),
                plan,
                routing: None,
                input: Input { bias, out, out_weights, ..Input::default() },
                weights: if expected.with_weights { case.shape.topk } else { 0 },
                poison: None,
                buffer: (layout.capacity, layout.parts_at(*offset)),
            };
            machine.start(rank, &start);
        }
    }

    /// Every byte that a rank received.
    fn check_received(&self, machine: &Machine, case: &Case, expected: &Expected) {
        for (rank, (offset, layout)) in self.buffers.iter().enumerate() {
            let (region, host) = (&machine.devices[rank].region, &expected.received[rank]);
            let (rows, topk, shape) = (host.buffer.rows(), case.shape.topk, case.shape);
            assert_eq!(machine.report(rank, Lane::Dispatch).rows as usize, rows, "rows of rank {rank}");
            let experts: Vec<_> = machine.experts(rank).into_iter().map(|n| n as usize).collect();
            assert_eq!(experts, host.handle.num_recv_tokens_per_expert(1), "experts of rank {rank}");
            let sources: Vec<[u32; 2]> = region.slice(offset + layout.source, rows);
            let host_sources: Vec<_> = host.buffer.sources().iter().map(|s| [s.rank, s.token]).collect();
            assert_eq!(sources, host_sources, "sources of rank {rank}");
            assert_eq!(region.slice::<i32>(offset + layout.topk_idx, rows * topk), host.buffer.topk_idx());
            let weights: &[u32] = bytemuck::cast_slice(host.buffer.topk_weights());
            assert_eq!(region.slice::<u32>(offset + layout.topk_weights, rows * topk), weights);
            let scales: Vec<u8> = region.slice(offset + layout.scales, rows * shape.scale_pitch());
            assert_eq!(scales, host.buffer.scale_rows(), "scales of rank {rank}");
            let x: Vec<u8> = region.slice(offset + layout.x, rows * shape.row_bytes());
            let host_x = match shape.format {
                RowFormat::Bf16 => bytemuck::cast_slice(host.buffer.bf16()),
                RowFormat::Fp8(_) => host.buffer.e4m3(),
            };
            assert!(x == host_x, "rows of rank {rank} differ");
        }
    }

    fn check_combined(&self, machine: &Machine, expected: &Expected) {
        for (rank, host) in expected.combined.iter().enumerate() {
            let (out, weights) = self.out[rank];
            assert!(machine.kept::<u16>(out, host.x.len()) == bits(&host.x), "sums of rank {rank} differ");
            let weights: Vec<u32> = machine.kept(weights, host.topk_weights.len());
            assert_eq!(
                weights,
                bytemuck::cast_slice::<f32, u32>(&host.topk_weights),
                "weights of rank {rank}"
            );
        }
    }
}

fn run(machine: &Machine) {
    machine.run().unwrap_or_else(|report| panic!("{report}\n{}", machine.shim().stall()));
}

fn check_ended(machine: &Machine, lane: Lane, how: u32) {
    for rank in 0..machine.devices.len() {
        let fault = machine.fault(rank);
        assert_eq!(
            machine.report(rank, lane).status,
            how,
            "rank {rank}: {fault:?}\n{}",
            machine.shim().stall()
        );
    }
}

/// Plan and dispatch in one, then combine.
fn check_case(machine: &mut Machine, case: &Case, expected: &Expected) {
    let round = Round::new(machine, case, expected);
    round.start_dispatch(machine, (case, expected), Kind::PlanDispatch);
    run(machine);
    check_ended(machine, Lane::Dispatch, status::OK);
    round.check_received(machine, case, expected);
    round.start_combine(machine, case, expected);
    run(machine);
    check_ended(machine, Lane::Combine, status::OK);
    round.check_combined(machine, expected);
}

const FORMATS: [RowFormat; 3] =
    [RowFormat::Bf16, RowFormat::Fp8(ScaleFormat::F32), RowFormat::Fp8(ScaleFormat::Ue8m0)];

/// The shapes of world that traces are replayed on.
const WORLDS: [(usize, usize); 3] = [(1, 8), (2, 4), (4, 2)];

/// The first two steps of a trace with 64 tokens a rank, on one machine.
fn replay(trace: &Trace, (nodes, ranks): (usize, usize), format: RowFormat) {
    let config = config(nodes, ranks).experts(trace.num_experts).max_hidden(trace.hidden).channels(2);
    let config = config.pool_bytes(4 << 20).build().unwrap();
    let mut machine = Machine::new(&config, 1);
    for step in 0..2 {
        let shape = RowShape { hidden: trace.hidden, topk: trace.topk, format };
        let ranks = trace.step(step, config.topology().world_size(), 64);
        let owned = |rank: RankTokens<'_>| RankTokens {
            topk_idx: rank.topk_idx.into_owned().into(),
            topk_weights: rank.topk_weights.into_owned().into(),
            x: rank.x.into_owned().into(),
        };
        let case = Case { config: config.clone(), shape, ranks: ranks.into_iter().map(owned).collect() };
        let expected = Expected::new(&case, Style { with_weights: true, ..Style::default() });
        check_case(&mut machine, &case, &expected);
    }
}

/// The trace in the repository, and those in the folder that RAILHOP_TRACES names.
fn traces() -> Vec<Trace> {
    let mut paths = vec!["tests/data/small.safetensors".into()];
    if let Some(folder) = std::env::var_os("RAILHOP_TRACES") {
        let files = Path::new(&folder).read_dir().unwrap();
        paths.extend(files.map(|file| file.unwrap().path()));
    }
    paths.iter().map(|path| Trace::read(path).unwrap()).collect()
}

#[test]
fn traces_are_the_host_engines() {
    for trace in traces() {
        for world in WORLDS {
            FORMATS.iter().for_each(|&format| replay(&trace, world, format));
        }
    }
}

/// A number from the environment: sanitizers take their time, and nightly runs have more of it.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect("a number"))
}

/// How many seeds a test of random worlds runs.
fn seeds(few: u64) -> std::ops::Range<u64> {
    0..setting("RAILHOP_SEEDS", few)
}

/// A world of 4 to 16 ranks on 1 to 4 nodes, its rings at their minimum as often as not, its indices near their wrap.
fn random_config(random: &mut Random) -> Config {
    let most = setting("RAILHOP_MOST_RANKS", 16) as usize;
    let nodes = 1 + random.below(4);
    let ranks = (1 + random.below(most / nodes)).max(4usize.div_ceil(nodes));
    let (slots_log2, experts) = (random.below(3), nodes * ranks + random.below(2 * nodes * ranks));
    let slots = if random.one_in(2) { 1 } else { 1 << slots_log2 };
    let placement = match random.one_in(3) {
        // Some ranks may own no expert, and experts of a rank need not be neighbours.
        true => {
            let owners: Vec<_> = (0..experts).map(|_| random.below(nodes * ranks)).collect();
            ExpertPlacement::table(&owners, nodes * ranks).unwrap()
        }
        false => ExpertPlacement::contiguous(experts, nodes * ranks),
    };
    let config = config(nodes, ranks).placement(placement).channels(1 + random.below(3)).ring_slots(slots);
    let config = config.chunk_tokens(1 + random.below(slots)).max_topk(32).max_hidden(1536);
    config.first_index((1 << 48) - 1 - random.below(8) as u64).build().unwrap()
}

fn random_launch(random: &mut Random) -> Launch {
    let dispatch = Staging { stage_bytes: 256 << random.below(3), stages: 2 << random.below(2) };
    let combine = Staging { stage_bytes: 1024, stages: 2 << random.below(3) };
    Launch { blocks: 1 + random.below(3), warps: 2 + random.below(3), dispatch, combine }
}

/// Rows that now and then go to one expert only, or nowhere, or from some ranks only.
fn random_case(config: &Config, random: &mut Random) -> Case {
    let format = FORMATS[random.below(3)];
    let most_topk = if random.one_in(6) { 32 } else { 8 };
    let shape = RowShape { hidden: 16 * (1 + random.below(96)), topk: 1 + random.below(most_topk), format };
    let mut case = Case::random(config, shape, 10, random.next());
    let special = random.below(8);
    for (rank, tokens) in case.ranks.iter_mut().enumerate() {
        match special {
            0 => tokens.topk_idx.to_mut().fill(random.below(config.placement().num_experts()) as i64),
            1 => tokens.topk_idx.to_mut().fill(0),
            2 => tokens.topk_idx.to_mut().fill(-1),
            3 if rank % 2 == 0 => *tokens = RankTokens::default(),
            _ => {}
        }
    }
    case
}

fn random_machine(config: &Config, random: &mut Random) -> Machine {
    let seed = random.next();
    let launch = random_launch(random);
    // Both lanes' kernels may have to be resident at once, and no more.
    let resident = if random.one_in(2) { 2 * launch.blocks as u32 } else { 0 };
    let mut machine = Machine::with_options(config, Options { seed, resident, ..Options::default() });
    machine.launch = launch;
    machine
}

/// Several operations on one machine, formats and so pitches alternating.
#[test]
fn random_worlds_are_the_host_engines() {
    for seed in seeds(24) {
        let mut random = Random(seed);
        let config = random_config(&mut random);
        let mut machine = random_machine(&config, &mut random);
        for _ in 0..3 {
            let case = random_case(&config, &mut random);
            let expected = Expected::new(&case, Style::random(&mut random));
            check_case(&mut machine, &case, &expected);
        }
    }
}

/// F1 waits for H1's credit, H1 for F2's partial sum, F2 for H2's credit, H2 for F1: with rings of one slot everybody
/// is in such a cycle all the time.
#[test]
fn cycles_of_full_rings_turn() {
    for seed in seeds(6) {
        let (nodes, ranks) = [(2, 1), (2, 2), (3, 1), (4, 2)][seed as usize % 4];
        let config = config(nodes, ranks)
            .channels(1 + seed as usize % 2)
            .chunk_tokens(1)
            .ring_slots(1)
            .build()
            .unwrap();
        let case = Case::regular(&config, RowShape { hidden: 64, topk: 8, format: RowFormat::Bf16 }, 12);
        let mut machine = Machine::new(&config, seed);
        machine.launch = Launch { blocks: 1, warps: 2, ..Launch::default() };
        check_case(&mut machine, &case, &Expected::new(&case, Style::default()));
    }
}

/// Nodes and local ranks are taken by lanes, 32 at a time.
#[test]
fn more_nodes_and_ranks_than_lanes() {
    for (nodes, ranks) in [(34, 1), (1, 40)] {
        let config = config(nodes, ranks).ring_slots(2).chunk_tokens(2).pool_bytes(1 << 20).build().unwrap();
        let shape = RowShape { hidden: 32, topk: 8, format: RowFormat::Fp8(ScaleFormat::F32) };
        let case = Case::random(&config, shape, 3, 4);
        let mut machine = Machine::new(&config, 1);
        machine.launch = Launch { blocks: 1, warps: 2, ..Launch::default() };
        check_case(&mut machine, &case, &Expected::new(&case, Style::default()));
    }
}

/// A plan on its own, then two dispatches with it, the second while the first rows' combine is under way.
#[test]
fn plans_are_used_again_and_lanes_overlap() {
    for seed in seeds(4) {
        let mut random = Random(seed);
        let config = random_config(&mut random);
        let mut machine = random_machine(&config, &mut random);
        let case = random_case(&config, &mut random);
        let expected = Expected::new(&case, Style { with_weights: true, ..Style::default() });
        let round = Round::new(&mut machine, &case, &expected);
        round.start_dispatch(&mut machine, (&case, &expected), Kind::Plan);
        round.start_dispatch(&mut machine, (&case, &expected), Kind::Dispatch);
        run(&machine);
        check_ended(&machine, Lane::Dispatch, status::OK);
        round.check_received(&machine, &case, &expected);
        let again = Round { buffers: Round::buffers(&mut machine, &case, &expected), ..round };
        again.start_combine(&mut machine, &case, &expected);
        again.start_dispatch(&mut machine, (&case, &expected), Kind::Dispatch);
        run(&machine);
        check_ended(&machine, Lane::Combine, status::OK);
        again.check_received(&machine, &case, &expected);
        again.check_combined(&machine, &expected);
    }
}

/// What is captured once runs again with other routing and other rows in the same memory, and eager operations run in
/// between: nothing in the parameters says which operation it is.
#[test]
fn captured_operations_replay() {
    let config = config(2, 2).channels(2).ring_slots(4).chunk_tokens(2).build().unwrap();
    let shape = RowShape { hidden: 128, topk: 4, format: RowFormat::Fp8(ScaleFormat::F32) };
    let mut machine = Machine::new(&config, 5);
    let cases: Vec<_> = (0..3)
        .map(|seed| {
            let tokens = Case::random(&config, shape, 64, seed);
            // Captured sizes are fixed.
            Case {
                ranks: tokens.ranks.into_iter().map(|rank| truncated(rank, &shape, 8)).collect(),
                ..tokens
            }
        })
        .collect();
    let expected: Vec<_> = cases.iter().map(|case| Expected::new(case, Style::default())).collect();
    let captured = Captured::new(&mut machine, &cases[0]);
    for (case, expected) in cases.iter().zip(&expected).chain(cases.iter().zip(&expected)) {
        captured.replay(&mut machine, case, expected);
        check_case(&mut machine, case, expected);
    }
}

/// The first `tokens` tokens, or as many with the last repeated.
fn truncated(rank: RankTokens<'static>, shape: &RowShape, tokens: usize) -> RankTokens<'static> {
    fn rows<T: Copy>(all: &[T], width: usize, tokens: usize, none: T) -> Vec<T> {
        let mut rows = all.to_vec();
        rows.resize(tokens * width, none);
        rows
    }
    RankTokens {
        topk_idx: rows(&rank.topk_idx, shape.topk, tokens, -1).into(),
        topk_weights: rows(&rank.topk_weights, shape.topk, tokens, 0.5).into(),
        x: rows(&rank.x, shape.hidden, tokens, bf16::ONE).into(),
    }
}

/// The kernels of a dispatch with fixed parameters, and the memory they read.
struct Captured {
    round: Round,
    params: Vec<railhop::wire::kernel::Params>,
    inputs: Vec<(u64, u64, u64)>,
}

impl Captured {
    fn new(machine: &mut Machine, case: &Case) -> Self {
        let world = case.ranks.len();
        let all = world * 8;
        let mut inputs = Vec::new();
        let (mut plans, mut buffers, mut params) = (Vec::new(), Vec::new(), Vec::new());
        for (rank, tokens) in case.ranks.iter().enumerate() {
            let routing = (machine.keep(rank, &tokens.topk_idx), machine.keep(rank, &tokens.topk_weights));
            let x = machine.keep(rank, &bits(&tokens.x));
            inputs.push((routing.0, routing.1, x));
            plans.push(machine.plan(rank, 8, case.shape.topk, all));
            buffers.push(machine.buffer(rank, case.shape, all));
            let (offset, layout) = &buffers[rank];
            let start = Start {
                kind: Kind::PlanDispatch,
                shape: case.shape,
                plan: &plans[rank],
                routing: Some(routing),
                input: Input { x, ..Input::default() },
                weights: 0,
                poison: None,
                buffer: (layout.capacity, layout.parts_at(*offset)),
            };
            params.push(machine.params(rank, &start));
        }
        let round = Round { plans, buffers, outputs: Vec::new(), out: Vec::new() };
        Self { round, params, inputs }
    }

    fn replay(&self, machine: &mut Machine, case: &Case, expected: &Expected) {
        for (rank, &(topk_idx, topk_weights, x)) in self.inputs.iter().enumerate() {
            machine.rewrite(topk_idx, &case.ranks[rank].topk_idx);
            machine.rewrite(topk_weights, &case.ranks[rank].topk_weights);
            machine.rewrite(x, &bits(&case.ranks[rank].x));
            machine.enqueue(rank, Kind::PlanDispatch, &self.params[rank]);
        }
        run(machine);
        check_ended(machine, Lane::Dispatch, status::OK);
        self.round.check_received(machine, case, expected);
    }
}

// ---- bad input

/// A world of two nodes with two ranks that exchange a few tokens.
fn square() -> (Config, Case) {
    let config = config(2, 2).experts(4).channels(2).chunk_tokens(1).ring_slots(2).build().unwrap();
    let case = Case::regular(&config, RowShape { hidden: 64, topk: 4, format: RowFormat::Bf16 }, 6);
    (config, case)
}

/// Every rank reports the same error, and the next operation works.
fn check_refused(mut break_it: impl FnMut(usize, &mut Start<'_>), bad_expert: bool, error: &Error) {
    let (_, case) = square();
    let mut broken = case.clone();
    if bad_expert {
        broken.ranks[2].topk_idx.to_mut()[7] = 99;
        broken.ranks[2].topk_idx.to_mut()[9] = -2;
    }
    let expected = Expected::new(&case, Style::default());
    let mut machine = Machine::new(&case.config, 3);
    let round = Round::new(&mut machine, &case, &expected);
    round.start_dispatch_with(&mut machine, (&broken, &expected), Kind::PlanDispatch, &mut break_it);
    run(&machine);
    check_ended(&machine, Lane::Dispatch, status::REFUSED);
    for rank in 0..4 {
        let verdicts = machine.verdicts(rank, Lane::Dispatch);
        let refusal = VerdictRecord::of_world(&verdicts).expect_err("a verdict was bad");
        assert_eq!(refusal, *error, "rank {rank}");
    }
    check_case(&mut machine, &case, &expected);
}

#[test]
fn an_expert_out_of_range_is_found_on_the_device() {
    let reason = Reason::ExpertOutOfRange { token: 1, k: 3, expert: 99, num_experts: 4 };
    check_refused(|_, _| {}, true, &Error::Refused { rank: 2, reason });
}

#[test]
fn a_poisoned_rank_refuses_for_all() {
    let reason = Reason::HiddenNotAligned { hidden: 7, multiple: 8 };
    let poison = |rank: usize, start: &mut Start<'_>| start.poison = (rank == 1).then_some(reason);
    check_refused(poison, false, &Error::Refused { rank: 1, reason });
}

#[test]
fn a_buffer_that_is_too_small_fails_all() {
    let reason = Reason::BufferTooSmall { needed: 24, capacity: 23 };
    let shrink = |rank: usize, start: &mut Start<'_>| start.buffer.0 -= usize::from(rank == 3);
    check_refused(shrink, false, &Error::Refused { rank: 3, reason });
}

#[test]
fn combine_needs_dispatched_rows() {
    let (_, case) = square();
    let expected = Expected::new(&case, Style::default());
    let mut machine = Machine::new(&case.config, 3);
    let round = Round::new(&mut machine, &case, &expected);
    round.start_dispatch(&mut machine, (&case, &expected), Kind::Plan);
    run(&machine);
    round.start_combine(&mut machine, &case, &expected);
    run(&machine);
    check_ended(&machine, Lane::Combine, status::REFUSED);
    let refusal = VerdictRecord::of_world(&machine.verdicts(1, Lane::Combine)).unwrap_err();
    assert_eq!(refusal, Error::Refused { rank: 0, reason: Reason::NotDispatched });
    check_case(&mut machine, &case, &expected);
}

#[test]
fn ranks_out_of_step_are_named() {
    let (_, case) = square();
    let expected = Expected::new(&case, Style::default());
    let mut machine = Machine::new(&case.config, 9);
    let round = Round::new(&mut machine, &case, &expected);
    let differ = |rank: usize, start: &mut Start<'_>| {
        if rank == 2 {
            start.kind = Kind::Plan;
        }
    };
    round.start_dispatch_with(&mut machine, (&case, &expected), Kind::PlanDispatch, differ);
    run(&machine);
    check_ended(&machine, Lane::Dispatch, status::REFUSED);
    for rank in 0..4 {
        let refusal = VerdictRecord::of_world(&machine.verdicts(rank, Lane::Dispatch)).unwrap_err();
        let is_named = |rank, reference| (rank, reference) == (3, 2) || (rank, reference) == (2, 0);
        assert!(
            matches!(refusal, Error::OutOfStep { rank, reference, .. } if is_named(rank, reference)),
            "{refusal}"
        );
    }
    check_case(&mut machine, &case, &expected);
}

// ---- faults

/// Loses all signals of one word: every rank ends, and one of them says who misses what from whom.
fn check_lost(
    (rank, lane, word): (usize, Lane, WordId),
    role: u32,
    what: u32,
    channel: Option<u32>,
    peer: u32,
) {
    let (_, case) = square();
    let expected = Expected::new(&case, Style::default());
    let mut machine = Machine::new(&case.config, 11);
    let round = Round::new(&mut machine, &case, &expected);
    if lane == Lane::Combine {
        round.start_dispatch(&mut machine, (&case, &expected), Kind::PlanDispatch);
        run(&machine);
    }
    machine.lose(rank, lane, word);
    match lane {
        Lane::Dispatch => drop(round.start_dispatch(&mut machine, (&case, &expected), Kind::PlanDispatch)),
        Lane::Combine => round.start_combine(&mut machine, &case, &expected),
    }
    run(&machine);
    let fault = machine
        .fault(rank)
        .unwrap_or_else(|| panic!("rank {rank} missed nothing; {}", machine.shim().stall()));
    let FaultRecord { expected, seen, .. } = fault;
    let named = (fault.lane, fault.role, fault.what, fault.channel, fault.peer);
    assert_eq!(named, (lane as u32, role, what, channel.unwrap_or(u32::MAX), peer), "{fault:?}");
    assert_eq!(expected, seen + 1, "{fault:?}");
    assert_eq!(machine.report(rank, lane).status, status::FAULT);
}

#[test]
fn every_lost_signal_is_named() {
    use Lane::{Combine, Dispatch};
    // Ranks 0 and 2 are one rail, 1 and 3 the other. Only what crosses the rail can be lost.
    for lane in [Dispatch, Combine] {
        check_lost((1, lane, WordId::Rail { node: 1 }), role::RECEIVER, waits::RAIL, None, 3);
        check_lost((0, lane, WordId::Verdict { node: 1 }), role::RECEIVER, waits::VERDICT, None, 2);
    }
    check_lost((2, Dispatch, WordId::Tail { channel: 0, node: 0 }), role::FORWARDER, waits::TAIL, Some(0), 0);
    check_lost((0, Dispatch, WordId::Head { channel: 1, node: 1 }), role::SENDER, waits::HEAD, Some(1), 2);
    check_lost((0, Combine, WordId::Tail { channel: 0, node: 1 }), role::REDUCER, waits::TAIL, Some(0), 2);
    check_lost((3, Combine, WordId::Head { channel: 1, node: 0 }), role::FORWARDER, waits::HEAD, Some(1), 1);
}

/// A rank that never starts leaves its peers waiting for its enter record, and the host's abort flag ends them at once.
#[test]
fn a_missing_rank_is_named_and_the_abort_flag_ends_waits() {
    for abort in [false, true] {
        let (_, case) = square();
        let expected = Expected::new(&case, Style::default());
        let mut machine = Machine::new(&case.config, 2);
        let round = Round::new(&mut machine, &case, &expected);
        if abort {
            for rank in 0..4 {
                let at = machine.mailbox_maps[rank].abort;
                machine.devices[rank].mailbox.write(at, &[1u32]);
            }
        }
        round.start_dispatch_on(&mut machine, (&case, &expected), Kind::PlanDispatch, |rank, _| rank != 1);
        run(&machine);
        for rank in [0, 2, 3] {
            assert_eq!(machine.report(rank, Lane::Dispatch).status, status::FAULT);
            assert_eq!(machine.fault(rank).is_some(), !abort);
        }
        if !abort {
            let named = |rank: usize| machine.fault(rank).map(|fault| (fault.what, fault.peer));
            assert_eq!((named(0), named(3)), (Some((waits::ENTER, 1)), Some((waits::RAIL, 1))));
        }
    }
}

// ---- cost

/// What rows cost in trips through device memory: the bound, and nothing above it.
#[test]
fn every_row_is_read_once_and_written_once_per_target() {
    for format in [RowFormat::Bf16, RowFormat::Fp8(ScaleFormat::Ue8m0)] {
        let config = config(4, 2).channels(2).chunk_tokens(4).ring_slots(16).build().unwrap();
        let shape = RowShape { hidden: 256, topk: 6, format };
        let case = Case::random(&config, shape, 16, 1);
        let expected = Expected::new(&case, Style::default());
        let mut machine = Machine::new(&config, 0);
        let round = Round::new(&mut machine, &case, &expected);
        let before = Costs::of(&machine);
        let inputs = round.start_dispatch(&mut machine, (&case, &expected), Kind::PlanDispatch);
        run(&machine);
        check_dispatch_costs(&machine, &case, &expected, &inputs, before);
        if format != RowFormat::Bf16 {
            continue;
        }
        let before = Costs::of(&machine);
        round.start_combine(&mut machine, &case, &expected);
        run(&machine);
        check_combine_costs(&machine, &case, &expected, &round, before);
    }
}

/// Bytes of bulk copies so far, over all ranks: (regions read, regions written, private written).
#[derive(Clone, Copy)]
struct Costs([usize; 3]);

impl Costs {
    fn of(machine: &Machine) -> Self {
        let sum = |id: fn(&shim::Device) -> u32, what| {
            machine.devices.iter().map(|device| machine.shim().traffic(id(device), what)).sum()
        };
        let (region, private) = (|d: &shim::Device| d.ids.0, |d: &shim::Device| d.ids.1);
        Self([
            sum(region, Traffic::BulkRead),
            sum(region, Traffic::BulkWritten),
            sum(private, Traffic::BulkWritten),
        ])
    }

    fn since(self, before: Self) -> [usize; 3] {
        std::array::from_fn(|i| self.0[i] - before.0[i])
    }
}

/// Tokens that cross the rail, once per remote node; tokens that their own node wants; tokens wanted by any other.
fn crossings(case: &Case) -> [usize; 3] {
    let (topology, topk) = (case.config.topology(), case.shape.topk);
    let mut counts = [0; 3];
    for (rank, tokens) in case.ranks.iter().enumerate() {
        for experts in tokens.topk_idx.chunks(topk) {
            let nodes: std::collections::BTreeSet<_> = experts
                .iter()
                .filter(|expert| **expert >= 0)
                .map(|&expert| topology.node_of(case.config.placement().rank_of(expert as usize)))
                .collect();
            let own = usize::from(nodes.contains(&topology.node_of(rank)));
            let remote = nodes.len() - own;
            counts = [counts[0] + remote, counts[1] + own, counts[2] + usize::from(remote > 0)];
        }
    }
    counts
}

fn check_dispatch_costs(machine: &Machine, case: &Case, expected: &Expected, inputs: &[u32], before: Costs) {
    let [crossing, own, sent] = crossings(case);
    let rows: usize = expected.received.iter().map(|rank| rank.buffer.rows()).sum();
    let (row, scales) = (case.shape.row_bytes(), case.shape.scale_pitch());
    let [read, written, put] = Costs::of(machine).since(before);
    assert_eq!(read, crossing * row, "slots are read once");
    assert_eq!(written, rows * (row + scales), "rows are written once per target rank");
    assert_eq!(put, crossing * (row + scales), "tokens are written once per remote node");
    let x: usize = inputs.iter().map(|&id| machine.shim().traffic(id, Traffic::BulkRead)).sum();
    assert_eq!(
        x,
        (sent + own) * 2 * case.shape.hidden,
        "a token is read once to be sent, and once for the own node"
    );
}

fn check_combine_costs(machine: &Machine, case: &Case, expected: &Expected, round: &Round, before: Costs) {
    let [crossing, ..] = crossings(case);
    let rows: usize = expected.received.iter().map(|rank| rank.buffer.rows()).sum();
    let row = 2 * case.shape.hidden;
    let [read, written, put] = Costs::of(machine).since(before);
    assert_eq!(read, (rows + crossing) * row, "contributions and partial sums are read once");
    assert_eq!(written, 0, "nothing goes to a region but along the rail");
    assert_eq!(put, crossing * row, "partial sums are written once");
    let out: usize = round.out.iter().map(|(rows, _)| machine.traffic_of(*rows, Traffic::BulkWritten)).sum();
    let tokens: usize = case.ranks.iter().map(|rank| rank.x.len() * 2).sum();
    assert_eq!(out, tokens, "sums are written once");
}
