//! The protocol in seeded worlds of every kind, bit for bit against the oracle; with refused operations among
//! the good ones; and with lost signals, each of which must end in a report that names it.
//!
//! A failure prints its seed: `RAILHOP_SEED=<seed>` replays that world alone. `RAILHOP_WORLDS=<number>` runs
//! that many, for longer campaigns.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use half::bf16;
use railhop::error::{Kind, Reason, Role, Started, Wait};
use railhop::fabric::sim::{Rng, Sim, Stuck};
use railhop::numeric::{dequantise, round_bf16};
use railhop::proto::plan::{Plan, Routing};
use railhop::proto::{Buffer, OpSpec};
use railhop::reference::experts::factor;
use railhop::reference::oracle::{Oracle, RankTokens, Received};
use railhop::wire::region::{Lane, WordId};
use railhop::wire::shape::RecvLayout;
use railhop::wire::word::Index;
use railhop::{Config, ConfigBuilder, Error, ExpertPlacement, RowFormat, RowShape, ScaleFormat, Topology};

/// The last but one index before the wrap.
const LATE: u64 = (1 << 48) - 2;
/// What buffers hold before an operation may write them, and after it.
const UNTOUCHED: u8 = 0xa5;

/// What worlds are made of.
#[derive(Clone, Copy, PartialEq)]
enum Recipe {
    Good,
    WithRefusals,
    /// Every rank sends twelve tokens to all nodes.
    AllToAll,
}

/// One operation of the program that every rank runs.
struct Action {
    kind: Kind,
    /// Index of the tokens that are planned, sent, or combined.
    tokens: usize,
    /// Combine: with weights.
    weights: bool,
    /// The action that must be over at a rank before it starts this one.
    after: Option<usize>,
    bad: Option<Bad>,
}

/// Why an action fails on all ranks.
enum Bad {
    Poisoned(Vec<usize>),
    TooSmall(usize),
    OutOfStep(usize),
}

/// What all ranks send at a time, and what must come of it.
struct Tokens {
    /// Tokens of one step go the same way: they share plans.
    step: usize,
    shape: RowShape,
    ranks: Vec<RankTokens<'static>>,
    received: Vec<Received>,
    combined: Vec<Vec<bf16>>,
}

/// Where a rank is in the program, and what it has so far.
#[derive(Default)]
struct Script {
    next: usize,
    over: BTreeSet<usize>,
    /// By step.
    plans: BTreeMap<usize, Arc<Plan>>,
    /// By action: the receive buffer.
    buffers: BTreeMap<usize, Lent>,
    /// By tokens: the experts' outputs.
    outputs: BTreeMap<usize, Lent>,
}

#[derive(Clone, Copy)]
struct Lent {
    buffer: Buffer,
    layout: RecvLayout,
}

impl Lent {
    fn new(sim: &mut Sim, rank: usize, shape: RowShape, capacity: usize) -> Self {
        let lent =
            Self { buffer: sim.buffer(rank, shape, capacity), layout: RecvLayout::new(shape, capacity) };
        lent.wipe(sim, rank);
        lent
    }

    /// Offset in the region: that of the first part.
    fn offset(&self) -> usize {
        self.buffer.parts.x as usize
    }

    fn range(&self) -> std::ops::Range<usize> {
        self.offset()..self.offset() + self.layout.bytes
    }

    fn wipe(&self, sim: &mut Sim, rank: usize) {
        sim.region_mut(rank)[self.range()].fill(UNTOUCHED);
    }

    fn is_untouched(&self, sim: &Sim, rank: usize) -> bool {
        sim.region(rank)[self.range()].iter().all(|&byte| byte == UNTOUCHED)
    }
}

struct World {
    config: Config,
    rng: Rng,
    recipe: Recipe,
    tokens: Vec<Tokens>,
    actions: Vec<Action>,
    /// The order in which every rank starts the actions.
    order: Vec<usize>,
    scripts: Vec<Script>,
    /// By operation of the simulator: rank and action.
    started: BTreeMap<usize, (usize, usize)>,
    /// By action: what the first rank got.
    results: BTreeMap<usize, Result<(), Error>>,
}

fn builder(nodes: usize, ranks_per_node: usize) -> ConfigBuilder {
    let topology = Topology::new(nodes, ranks_per_node).unwrap();
    Config::builder(topology).max_hidden(144).max_topk(6).pool_bytes(1 << 20)
}

fn random_config(rng: &mut Rng) -> Config {
    let (nodes, ranks_per_node) = (1 + rng.below(4) as usize, 1 + rng.below(4) as usize);
    let world = nodes * ranks_per_node;
    let experts = 1 + rng.below(3 * world as u64) as usize;
    let table: Vec<_> = (0..experts).map(|_| rng.below(world as u64) as usize).collect();
    let chunk = 1 + rng.below(4) as usize;
    let config = builder(nodes, ranks_per_node)
        .channels(1 + rng.below(3) as usize)
        .chunk_tokens(chunk)
        .ring_slots(chunk.next_power_of_two() << rng.below(3))
        .first_index([0, LATE - rng.below(8)][rng.below(2) as usize]);
    let config = match rng.below(2) {
        0 => config.experts(experts),
        _ => config.placement(ExpertPlacement::table(&table, world).unwrap()),
    };
    config.build().unwrap()
}

fn random_value(rng: &mut Rng) -> bf16 {
    match rng.below(256) {
        0 => [bf16::NAN, bf16::INFINITY, bf16::NEG_ZERO, bf16::MIN_POSITIVE][rng.below(4) as usize],
        _ => bf16::from_f32(rng.below(2000) as f32 / 250.0 - 4.0),
    }
}

// What is run.
impl World {
    /// Without actions yet.
    fn new(config: Config, rng: Rng, recipe: Recipe) -> Self {
        let scripts = (0..config.topology().world_size()).map(|_| Script::default()).collect();
        let (tokens, actions, order, started, results) = Default::default();
        Self { config, rng, recipe, tokens, actions, order, scripts, started, results }
    }

    fn ranks(&self) -> usize {
        self.scripts.len()
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.rng.below(n) == 0
    }

    /// Plan, dispatch (maybe once more, in another shape), combine.
    fn add_step(&mut self, step: usize) {
        let topk = 1 + self.rng.below(6) as usize;
        let ranks: Vec<_> = (0..self.ranks()).map(|_| self.random_routing(topk)).collect();
        let mut tokens = self.add_tokens(step, topk, ranks.clone());
        let first = self.order.len();
        let mut last = match self.one_in(2) {
            true => self.add(Kind::PlanDispatch, tokens, None),
            false => {
                let plan = self.add(Kind::Plan, tokens, None);
                self.add(Kind::Dispatch, tokens, Some(plan))
            }
        };
        if self.one_in(3) {
            tokens = self.add_tokens(step, topk, ranks);
            last = self.add(Kind::Dispatch, tokens, Some(last));
        }
        // The combine of the step before may start behind the first operation of this one.
        if first > 0 && self.one_in(2) {
            self.order.swap(first - 1, first);
        }
        self.add(Kind::Combine, tokens, Some(last));
    }

    /// Adds an action, maybe behind one like it that fails.
    fn add(&mut self, kind: Kind, tokens: usize, after: Option<usize>) -> usize {
        let weights = kind == Kind::Combine && self.one_in(2);
        let failing = self.recipe == Recipe::WithRefusals && self.one_in(3);
        let bad = failing.then(|| self.random_bad(kind, tokens));
        for bad in bad.map(Some).into_iter().chain([None]) {
            self.order.push(self.actions.len());
            self.actions.push(Action { kind, tokens, weights, after, bad });
        }
        self.actions.len() - 1
    }

    fn random_bad(&mut self, kind: Kind, tokens: usize) -> Bad {
        let mut random_rank = || self.rng.below(self.scripts.len() as u64) as usize;
        let (rank, other) = (random_rank(), random_rank());
        let receives = kind != Kind::Plan && !self.tokens[tokens].received[rank].sources.is_empty();
        match self.rng.below(3) {
            0 if receives => Bad::TooSmall(rank),
            1 if self.ranks() > 1 => Bad::OutOfStep(rank),
            2 => Bad::Poisoned(vec![rank, other]),
            _ => Bad::Poisoned(vec![rank]),
        }
    }

    fn random_routing(&mut self, topk: usize) -> RankTokens<'static> {
        let (rng, experts) = (&mut self.rng, self.config.placement().num_experts() as u64);
        let all = self.recipe == Recipe::AllToAll;
        let tokens = if all { 12 } else { rng.below(13) * rng.below(4).min(1) };
        let (only, is_skewed) = (rng.below(experts), rng.below(4) == 0);
        let masked = [u64::MAX, 8, 2][rng.below(3) as usize];
        let topk_idx: Vec<i64> = (0..tokens * topk as u64)
            .map(|entry| match entry {
                _ if all => (entry % experts) as i64,
                _ if rng.below(masked) == 0 => -1,
                _ if is_skewed => only as i64,
                _ => rng.below(experts) as i64,
            })
            .collect();
        let topk_weights: Vec<f32> = topk_idx.iter().map(|_| (1 + rng.below(100)) as f32 / 100.0).collect();
        RankTokens { topk_idx: topk_idx.into(), topk_weights: topk_weights.into(), ..Default::default() }
    }

    fn add_tokens(&mut self, step: usize, topk: usize, mut ranks: Vec<RankTokens<'static>>) -> usize {
        let format = match self.rng.below(4) {
            0 => RowFormat::Fp8(ScaleFormat::F32),
            1 => RowFormat::Fp8(ScaleFormat::Ue8m0),
            _ => RowFormat::Bf16,
        };
        let hidden = [16, 16, 32, 144][self.rng.below(4) as usize];
        for rank in &mut ranks {
            let elements = rank.topk_idx.len() / topk * hidden;
            rank.x = (0..elements).map(|_| random_value(&mut self.rng)).collect();
        }
        let oracle = Oracle { config: &self.config, hidden, topk, format, ranks: ranks.clone() };
        let received = (0..self.ranks()).map(|rank| oracle.received(rank)).collect();
        let combined = (0..self.ranks()).map(|rank| oracle.combined(rank)).collect();
        let shape = RowShape { hidden, topk, format };
        self.tokens.push(Tokens { step, shape, ranks, received, combined });
        self.tokens.len() - 1
    }
}

// How it is run.
impl World {
    /// Runs the program on all ranks and checks everything that comes of it.
    fn run(&mut self, sim: &mut Sim) -> Result<(), Vec<Stuck>> {
        (0..self.ranks()).for_each(|rank| self.advance(sim, rank));
        sim.run(|sim, operation| self.over(sim, operation))?;
        for (rank, script) in self.scripts.iter().enumerate() {
            assert_eq!(script.over.len(), self.actions.len(), "rank {rank} did not end");
            let mut buffers = script.buffers.values();
            assert!(buffers.all(|lent| lent.is_untouched(sim, rank)), "late write at rank {rank}");
        }
        Ok(())
    }

    /// Starts whatever `rank` may start now.
    fn advance(&mut self, sim: &mut Sim, rank: usize) {
        while let Some(&action) = self.order.get(self.scripts[rank].next) {
            if self.actions[action].after.is_some_and(|after| !self.scripts[rank].over.contains(&after)) {
                break;
            }
            let operation = self.start(sim, rank, action);
            self.started.insert(operation, (rank, action));
            self.scripts[rank].next += 1;
        }
    }

    fn start(&mut self, sim: &mut Sim, rank: usize, index: usize) -> usize {
        let action = &self.actions[index];
        let poison = match &action.bad {
            Some(Bad::Poisoned(ranks)) if ranks.contains(&rank) => Some(Reason::Foreign),
            _ => None,
        };
        let too_small = matches!(action.bad, Some(Bad::TooSmall(at)) if at == rank);
        let out_of_step = matches!(action.bad, Some(Bad::OutOfStep(at)) if at == rank);
        // Either another kind of the same lane, or with another plan.
        let kind = match action.kind {
            Kind::Dispatch | Kind::PlanDispatch if out_of_step && self.rng.below(2) == 0 => Kind::Plan,
            kind => kind,
        };
        let tokens = &self.tokens[action.tokens];
        let (topk, rows) = (tokens.shape.topk, tokens.received[rank].sources.len());
        let script = &mut self.scripts[rank];
        let (mut shape, mut buffer, mut input) = (tokens.shape, Buffer::none(), None);
        match kind {
            Kind::Plan => shape = RowShape { hidden: 0, topk, format: RowFormat::Bf16 },
            Kind::Dispatch | Kind::PlanDispatch => {
                let capacity = if too_small { rows - 1 } else { rows + self.rng.below(3) as usize };
                let lent = Lent::new(sim, rank, shape, capacity);
                script.buffers.insert(index, lent);
                (buffer, input) = (lent.buffer, Some(tokens.ranks[rank].x.as_ref().into()));
            }
            Kind::Combine => {
                let lent = script.outputs[&action.tokens];
                shape = lent.layout.shape;
                buffer = Buffer { capacity: rows - usize::from(too_small), ..lent.buffer };
            }
        }
        if poison.is_some() {
            (buffer, input) = (Buffer::none(), None);
        }
        let plan = match kind {
            Kind::Dispatch | Kind::Combine => script.plans[&tokens.step].clone(),
            Kind::Plan | Kind::PlanDispatch => {
                let routing = routing(&self.config, topk, &tokens.ranks[rank], poison.is_some());
                let plan = sim.plan(rank, routing);
                if action.bad.is_none() {
                    script.plans.insert(tokens.step, plan.clone());
                }
                plan
            }
        };
        let format = shape.format.code() | u32::from(action.weights) << 8;
        let started = Started {
            kind,
            epoch: 0,
            hidden: shape.hidden as u32,
            topk: topk as u32,
            format,
            plan: plan.epoch ^ u64::from(out_of_step) << 40,
            config: 0,
        };
        let weights = if action.weights { topk } else { 0 };
        sim.start(rank, OpSpec { started, shape, weights, poison, buffer, plan }, input)
    }

    /// Checks what came of an operation that is over, takes its buffers back, and goes on.
    fn over(&mut self, sim: &mut Sim, operation: usize) {
        let (rank, index) = self.started[&operation];
        let action = &self.actions[index];
        let result = sim.result(operation).expect("an operation that is over has a result");
        check_result(action.bad.as_ref(), result);
        assert_eq!(self.results.entry(index).or_insert(result.clone()), result, "ranks disagree");
        if let Some(&lent) = self.scripts[rank].buffers.get(&index) {
            if action.bad.is_none() {
                let outputs = self.check_received(sim, rank, action.tokens, lent);
                self.scripts[rank].outputs.insert(action.tokens, outputs);
            } else if self.is_refused(action, rank) {
                assert!(lent.is_untouched(sim, rank), "a row at rank {rank} in spite of the verdict");
            }
            lent.wipe(sim, rank);
        } else if action.kind == Kind::Combine && action.bad.is_none() {
            self.check_combined(sim, rank, action, operation);
            self.scripts[rank].outputs[&action.tokens].wipe(sim, rank);
        }
        self.scripts[rank].over.insert(index);
        self.advance(sim, rank);
    }

    /// Whether the node of `rank` must have a bad verdict on `action`.
    fn is_refused(&self, action: &Action, rank: usize) -> bool {
        let topology = self.config.topology();
        let here = |other: &usize| topology.node_of(*other) == topology.node_of(rank);
        match &action.bad {
            None => false,
            Some(Bad::Poisoned(ranks)) => ranks.iter().any(here),
            Some(Bad::TooSmall(rank)) => here(rank),
            Some(Bad::OutOfStep(rank)) => here(rank) && topology.ranks_per_node() > 1,
        }
    }

    /// Compares the rows that `rank` received with the oracle, and runs its experts on them.
    fn check_received(&self, sim: &mut Sim, rank: usize, tokens: usize, lent: Lent) -> Lent {
        let Tokens { shape, received, .. } = &self.tokens[tokens];
        let (received, rows, layout) = (&received[rank], received[rank].sources.len(), lent.layout);
        let part = |at: usize, pitch: usize| &sim.region(rank)[lent.offset() + at..][..rows * pitch];
        let topk_idx: Vec<i32> = bytemuck::pod_collect_to_vec(part(layout.topk_idx, 4 * shape.topk));
        let topk_weights: Vec<u32> = bytemuck::pod_collect_to_vec(part(layout.topk_weights, 4 * shape.topk));
        let sources = part(layout.source, 8).chunks_exact(8).map(bytemuck::pod_read_unaligned::<[u32; 2]>);
        let x = part(layout.x, shape.row_bytes());
        let (codes, scales, values) = match shape.format {
            RowFormat::Bf16 => {
                let x: Vec<bf16> = bytemuck::pod_collect_to_vec(x);
                (bits(&x), Vec::new(), x.iter().map(|x| x.to_f32()).collect())
            }
            RowFormat::Fp8(format) => {
                let scales = part(layout.scales, shape.scale_pitch());
                let mut values = vec![0.0; rows * shape.hidden];
                let scale_rows = scales.chunks_exact(shape.scale_pitch());
                let rows = x.chunks_exact(shape.hidden).zip(scale_rows.clone());
                for ((x, scales), values) in rows.zip(values.chunks_exact_mut(shape.hidden)) {
                    dequantise(x, format, scales, values);
                }
                let groups = 0..shape.hidden.div_ceil(128);
                let scales = scale_rows.flat_map(|row| groups.clone().map(|g| format.read(row, g).to_bits()));
                (x.iter().map(|&code| code.into()).collect(), scales.collect(), values)
            }
        };
        let tokens_per_expert = received.tokens_per_expert.clone();
        let sources = sources.map(|[rank, token]| (rank, token)).collect();
        let got = Received { x: codes, scales, topk_idx, topk_weights, sources, tokens_per_expert };
        assert!(got == *received, "rank {rank} received\n{got:?} instead of\n{received:?}");

        let y = self.experts(rank, shape, &values, received);
        let outputs = Lent::new(sim, rank, RowShape { format: RowFormat::Bf16, ..*shape }, rows);
        let mut write = |part: usize, bytes: &[u8]| {
            sim.region_mut(rank)[outputs.offset() + part..][..bytes.len()].copy_from_slice(bytes);
        };
        write(outputs.layout.x, bytemuck::cast_slice(&y));
        write(outputs.layout.topk_weights, bytemuck::cast_slice(&received.topk_weights));
        outputs
    }

    /// The outputs of the test experts of `rank`.
    fn experts(&self, rank: usize, shape: &RowShape, x: &[f32], received: &Received) -> Vec<bf16> {
        let owned = self.config.placement().experts_of(rank);
        let entries = received.topk_idx.chunks(shape.topk).zip(received.topk_weights.chunks(shape.topk));
        let rows = x.chunks(shape.hidden).zip(entries).flat_map(|(x, (experts, weights))| {
            let mut sum = vec![0f32; shape.hidden];
            for (&expert, &weight) in experts.iter().zip(weights).filter(|(expert, _)| **expert >= 0) {
                let factor = factor(f32::from_bits(weight), owned[expert as usize]);
                sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += factor * x);
            }
            sum
        });
        rows.map(round_bf16).collect()
    }

    fn check_combined(&self, sim: &Sim, rank: usize, action: &Action, operation: usize) {
        let tokens = &self.tokens[action.tokens];
        let (rows, weights) = sim.combined(operation);
        assert_eq!(bits(&rows), bits(&tokens.combined[rank]), "combined at rank {rank}");
        if action.weights {
            let RankTokens { topk_idx, topk_weights, .. } = &tokens.ranks[rank];
            let entries = topk_idx.iter().zip(topk_weights.as_ref());
            let kept = entries.map(|(&expert, &weight)| if expert < 0 { 0.0 } else { weight });
            assert_eq!(weights, kept.collect::<Vec<_>>(), "combined weights at rank {rank}");
        }
    }
}

/// What a rank plans for; nothing if it is poisoned.
fn routing(config: &Config, topk: usize, tokens: &RankTokens<'_>, poisoned: bool) -> Routing {
    match poisoned {
        true => Routing::empty(topk),
        false => Routing::new(config, topk, &tokens.topk_idx, tokens.topk_weights.as_ref().into()).unwrap(),
    }
}

fn check_result(bad: Option<&Bad>, result: &Result<(), Error>) {
    let expected = match (bad, result) {
        (None, Ok(())) | (Some(Bad::OutOfStep(_)), Err(Error::OutOfStep { .. })) => true,
        (Some(Bad::Poisoned(ranks)), Err(Error::Refused { rank, reason: Reason::Foreign })) => {
            ranks.iter().min() == Some(rank)
        }
        (Some(Bad::TooSmall(at)), Err(Error::Refused { rank, reason: Reason::BufferTooSmall { .. } })) => {
            rank == at
        }
        _ => false,
    };
    assert!(expected, "{result:?}");
}

fn bits(row: &[bf16]) -> Vec<u16> {
    row.iter().map(|x| x.to_bits()).collect()
}

/// Names the seed of the world that fails.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("RAILHOP_SEED={} replays this world", self.0);
        }
    }
}

fn for_seeds(worlds: u64, run: impl Fn(u64)) {
    let setting = |name| std::env::var(name).ok().map(|value| value.parse::<u64>().expect("a number"));
    let worlds = setting("RAILHOP_WORLDS").unwrap_or(worlds);
    for seed in setting("RAILHOP_SEED").map_or(0..worlds, |seed| seed..seed + 1) {
        let _seed = Seed(seed);
        run(seed);
    }
}

fn random_world(seed: u64, recipe: Recipe) {
    let mut rng = Rng::new(seed);
    let config = random_config(&mut rng);
    let mut world = World::new(config.clone(), rng, recipe);
    (0..3).for_each(|step| world.add_step(step));
    assert_eq!(world.run(&mut Sim::new(config, seed)), Ok(()));
}

#[test]
fn every_row_arrives_and_comes_back() {
    for_seeds(1500, |seed| random_world(seed, Recipe::Good));
}

#[test]
fn refusals_are_the_same_everywhere_and_leave_nothing_behind() {
    for_seeds(1500, |seed| random_world(seed, Recipe::WithRefusals));
}

/// F1 waits for H1's credit, H1 for F2's partial sum, F2 for H2's credit, H2 for F1: with rings of one slot
/// everybody is in such a cycle all the time.
#[test]
fn cycles_of_full_rings_turn() {
    for_seeds(100, |seed| {
        let (nodes, ranks) = [(2, 1), (2, 2), (3, 1), (4, 2)][seed as usize % 4];
        let config = builder(nodes, ranks).experts(nodes * ranks).chunk_tokens(1).ring_slots(1);
        let config = config.channels(1 + seed as usize / 4 % 2).build().unwrap();
        let mut world = World::new(config.clone(), Rng::new(seed), Recipe::AllToAll);
        (0..2).for_each(|step| world.add_step(step));
        assert_eq!(world.run(&mut Sim::new(config, seed)), Ok(()));
    });
}

/// Loses all signals of one word: the world must end, with a report that says who misses what from whom.
/// After a reset it works again.
fn check_lost(lost: (usize, Lane, WordId), role: Role, channel: Option<usize>, peer: usize) {
    for_seeds(20, |seed| {
        let config = builder(2, 2).experts(4).channels(2).chunk_tokens(1).ring_slots(2).first_index(LATE);
        let config = config.build().unwrap();
        let mut sim = Sim::new(config.clone(), seed);
        let (rank, lane, word) = lost;
        sim.lose(rank, lane, word);
        let run = |sim: &mut Sim| {
            let mut world = World::new(config.clone(), Rng::new(seed), Recipe::AllToAll);
            let ranks: Vec<_> = (0..4).map(|_| world.random_routing(4)).collect();
            let tokens = world.add_tokens(0, 4, ranks);
            let dispatch = world.add(Kind::PlanDispatch, tokens, None);
            world.add(Kind::Combine, tokens, Some(dispatch));
            world.run(sim)
        };
        let first = Index::new(LATE);
        let (what, expected, seen) = (word.name(), first.advance(1).get(), first.get());
        let wait = Some(Wait { role, channel, peer, what, expected, seen });
        let stuck = run(&mut sim).expect_err("somebody must miss the signal");
        let is_named = |stuck: &Stuck| {
            let combines = stuck.started.kind == Kind::Combine;
            stuck.rank == rank && stuck.wait == wait && combines == (lane == Lane::Combine)
        };
        assert!(stuck.iter().any(is_named), "no {wait:?} of rank {rank} in {stuck:#?}");
        sim.reset();
        assert_eq!(run(&mut sim), Ok(()));
    });
}

#[test]
fn every_lost_signal_is_named() {
    use Lane::{Combine, Dispatch};
    use Role::{Forwarder, Receiver, Reducer, Sender};
    // Ranks 0 and 2 are one rail, 1 and 3 the other.
    for lane in [Dispatch, Combine] {
        check_lost((1, lane, WordId::Enter { local: 0 }), Receiver, None, 0);
        check_lost((1, lane, WordId::Rail { node: 1 }), Receiver, None, 3);
        check_lost((0, lane, WordId::Verdict { node: 1 }), Receiver, None, 2);
        check_lost((3, lane, WordId::Done { local: 0, channel: 1 }), Receiver, Some(1), 2);
    }
    check_lost((2, Dispatch, WordId::Gathered { local: 1 }), Receiver, None, 3);
    check_lost((2, Dispatch, WordId::Tail { channel: 0, node: 0 }), Forwarder, Some(0), 0);
    check_lost((0, Dispatch, WordId::Head { channel: 1, node: 1 }), Sender, Some(1), 2);
    check_lost((0, Combine, WordId::Tail { channel: 0, node: 1 }), Reducer, Some(0), 2);
    check_lost((3, Combine, WordId::Head { channel: 1, node: 0 }), Forwarder, Some(1), 1);
}
