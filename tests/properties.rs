//! Random worlds and shapes, several operations in sequence, against the oracle.

mod common;

use common::{Case, LIMIT, Random, contents, device_room, has_queues, local_world, within};
use proptest::prelude::*;
use railhop::{Combine, Communicator, Config, ExpertPlacement, RowFormat, RowShape, ScaleFormat, Topology};

const FORMATS: [RowFormat; 3] =
    [RowFormat::Bf16, RowFormat::Fp8(ScaleFormat::F32), RowFormat::Fp8(ScaleFormat::Ue8m0)];

#[derive(Debug, Clone)]
struct World {
    nodes: usize,
    ranks_per_node: usize,
    experts: usize,
    /// Experts lie where a table says, not in contiguous ranges.
    scattered: bool,
    channels: usize,
    chunk_tokens: usize,
    /// Ring slots beyond the least, as a power of two.
    spare_slots: u32,
    workers: usize,
    /// Steps before the 48-bit wrap at which indices start.
    before_wrap: u64,
    steps: Vec<Step>,
    seed: u64,
}

#[derive(Debug, Clone)]
struct Step {
    tokens: usize,
    topk: usize,
    /// Elements per row, in units of 16 bytes.
    hidden: usize,
    format: RowFormat,
}

impl World {
    fn config(&self, steps: &[RowShape], pool_bytes: usize) -> Config {
        let topology = Topology::new(self.nodes, self.ranks_per_node).unwrap();
        let world = topology.world_size();
        let mut random = Random(self.seed);
        let placement = match self.scattered {
            // Drawn from the lower half at times, so that ranks without experts are common.
            true => {
                let ranks = if random.one_in(2) { world } else { world.div_ceil(2) };
                let table: Vec<_> = (0..self.experts).map(|_| random.below(ranks)).collect();
                ExpertPlacement::table(&table, world).unwrap()
            }
            false => ExpertPlacement::contiguous(self.experts, world),
        };
        Config::builder(topology)
            .placement(placement)
            .channels(self.channels)
            .chunk_tokens(self.chunk_tokens)
            .ring_slots(self.chunk_tokens.next_power_of_two() << self.spare_slots)
            .worker_budget(self.workers)
            .first_index(u64::MAX - self.before_wrap)
            .max_hidden(steps.iter().map(|shape| shape.hidden).max().unwrap())
            .max_topk(steps.iter().map(|shape| shape.topk).max().unwrap())
            .max_tokens(14)
            .pool_bytes(pool_bytes + device_room())
            .build()
            .unwrap()
    }

    fn cases(&self) -> Vec<Case> {
        let shape = |step: &Step| RowShape {
            hidden: step.hidden * step.format.hidden_multiple(),
            topk: step.topk,
            format: step.format,
        };
        let shapes: Vec<_> = self.steps.iter().map(shape).collect();
        let cases = |config: &Config| -> Vec<_> {
            let seeded = self.steps.iter().zip(&shapes).zip(self.seed..);
            seeded.map(|((step, &shape), seed)| Case::random(config, shape, step.tokens, seed)).collect()
        };
        let bytes = cases(&self.config(&shapes, 0)).iter().map(Case::buffer_bytes).max().unwrap();
        // Three dispatches and one combine are alive at once.
        cases(&self.config(&shapes, 4 * bytes))
    }
}

fn world() -> impl Strategy<Value = World> {
    let topology = prop_oneof![
        8 => (1..=4usize, 1..=5usize),
        1 => Just((8, 1)),
        1 => Just((1, 9)),
        1 => Just((6, 2)),
    ];
    let topology = topology.prop_filter("enough queues", |(nodes, ranks)| has_queues(nodes * ranks));
    let rings = (1..=3usize, 1..=5usize, 0..=2u32, 1..=3usize);
    let format = prop::sample::select(&FORMATS[..]);
    let topk = prop_oneof![3 => 1..=8usize, 1 => 9..=32usize];
    let step = (0..=14usize, topk, 1..=25usize, format).prop_map(|(tokens, topk, hidden, format)| Step {
        tokens,
        topk,
        hidden,
        format,
    });
    let steps = prop::collection::vec(step, 1..=3);
    (topology, 1..=40usize, any::<bool>(), rings, 0..=40u64, steps, any::<u32>()).prop_map(
        |((nodes, ranks_per_node), experts, scattered, rings, before_wrap, steps, seed)| {
            let (channels, chunk_tokens, spare_slots, workers) = rings;
            World {
                nodes,
                ranks_per_node,
                experts,
                scattered,
                channels,
                chunk_tokens,
                spare_slots,
                workers,
                before_wrap,
                steps,
                seed: seed.into(),
            }
        },
    )
}

/// Planned, cached and fused dispatch give the same rows; what comes home is what the oracle says.
fn every_way(case: &Case, comm: &mut Communicator) {
    let rank = comm.rank();
    let handle = comm.plan(case.routing(rank)).unwrap();
    let buffer = |comm: &Communicator| comm.recv_buffer(handle.num_recv_tokens(), case.shape).unwrap();
    let (first, second, third) = (buffer(comm), buffer(comm), buffer(comm));
    let planned = comm.dispatch(&handle, case.x(rank), first).unwrap();
    let cached = comm.dispatch(&handle, planned.x, second).unwrap();
    let fused = comm.plan_dispatch(case.routing(rank), cached.x, third).unwrap();
    assert_eq!(contents(&planned.buffer), contents(&cached.buffer), "cached");
    assert_eq!(contents(&planned.buffer), contents(&fused.buffer), "fused");
    for handle in [&handle, &fused.handle] {
        let y = case.experts(comm, &fused.buffer);
        let combined = comm.combine(handle, Combine::new(y)).unwrap();
        case.verify(rank, handle, &planned.buffer, &combined.x);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        // The failing world is printed whole, and worlds are all there is to a case.
        failure_persistence: None,
        max_shrink_time: 60_000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_world_any_shape(world in world()) {
        let cases = world.cases();
        within(LIMIT, move || {
            let world = local_world(&cases[0].config);
            world.run(|mut comm| cases.iter().for_each(|case| every_way(case, &mut comm)));
        });
    }
}
