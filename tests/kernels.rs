//! The kernels on the CPU shim against the host engine: the same bits, on recorded routing and on random worlds.

mod common;
mod shim;

use std::sync::Arc;

use common::{Case, LIMIT, Random, Ranks, bits, config, within};
use half::bf16;
use railhop::error::Kind;
use railhop::reference::trace::Trace;
use railhop::wire::device::status;
use railhop::wire::kernel::Input;
use railhop::wire::region::Lane;
use railhop::wire::shape::{RecvLayout, RecvParts};
use railhop::{Combine, Combined, Config, Dispatched, RowFormat, RowShape, ScaleFormat};
use shim::{Launch, Machine, Options, Plan, Start};

/// What the host engine makes of a case.
struct Expected {
    received: Vec<Dispatched<Vec<bf16>>>,
    /// By rank: the experts' outputs.
    outputs: Vec<Vec<bf16>>,
    combined: Vec<Combined<railhop::RecvBuffer>>,
    bias: Option<Arc<[bf16]>>,
    with_weights: bool,
}

impl Expected {
    fn new(case: &Case, bias: bool, with_weights: bool) -> Self {
        let mut ranks = Ranks::new(&case.config);
        let handles = ranks.plan(case);
        let received = ranks.dispatch(&handles, case.shape, |rank| case.x(rank));
        let outputs = ranks.experts(case, &received);
        let copies = outputs.iter().map(|y| y.bf16().to_vec()).collect();
        let most = case.ranks.iter().map(|rank| rank.x.len()).max().unwrap_or(0);
        let mut random = Random(7);
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
        Self { received, outputs: copies, combined, bias, with_weights }
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
        let buffers = (0..world).map(|rank| machine.buffer(rank, case.shape, rows(rank))).collect();
        let outputs = (0..world).map(|rank| machine.buffer(rank, case.outputs(), rows(rank))).collect();
        let mut out = |rank: usize| {
            let rows = machine.keep(rank, &vec![0u16; tokens(rank) * case.shape.hidden]);
            (rows, machine.keep(rank, &vec![0f32; tokens(rank) * case.shape.topk]))
        };
        let out = (0..world).map(&mut out).collect();
        Self { plans, buffers, outputs, out }
    }

    fn start_dispatch(&self, machine: &mut Machine, case: &Case, kind: Kind) {
        for (rank, plan) in self.plans.iter().enumerate() {
            let tokens = &case.ranks[rank];
            let routing = (machine.keep(rank, &tokens.topk_idx), machine.keep(rank, &tokens.topk_weights));
            let input = Input { x: machine.keep(rank, &bits(&tokens.x)), ..Input::default() };
            let (offset, layout) = &self.buffers[rank];
            let buffer = match kind {
                Kind::Plan => (0, RecvLayout::new(case.shape, 0).parts_at(0)),
                _ => (layout.capacity, layout.parts_at(*offset)),
            };
            let routing = (kind != Kind::Dispatch).then_some(routing);
            let start = Start { kind, shape: case.shape, plan, routing, input, weights: 0, poison: None, buffer };
            machine.start(rank, &start);
        }
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
            assert_eq!(weights, bytemuck::cast_slice::<f32, u32>(&host.topk_weights), "weights of rank {rank}");
        }
    }
}

fn run(machine: &Machine) {
    machine.run().unwrap_or_else(|report| panic!("{report}\n{}", machine.shim().stall()));
}

fn check_ended(machine: &Machine, lane: Lane, how: u32) {
    for rank in 0..machine.devices.len() {
        let fault = machine.fault(rank);
        assert_eq!(machine.report(rank, lane).status, how, "rank {rank}: {fault:?}\n{}", machine.shim().stall());
    }
}

/// Plan and dispatch in one, then combine.
fn check_case(machine: &mut Machine, case: &Case, expected: &Expected) {
    let round = Round::new(machine, case, expected);
    round.start_dispatch(machine, case, Kind::PlanDispatch);
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

#[test]
fn small_world() {
    for format in FORMATS {
        for (nodes, ranks) in [(1, 2), (2, 1), (2, 2)] {
            let config = config(nodes, ranks).channels(2).chunk_tokens(2).ring_slots(4).build().unwrap();
            let case = Case::random(&config, RowShape { hidden: 400, topk: 4, format }, 12, 3);
            let expected = Expected::new(&case, false, false);
            check_case(&mut Machine::new(&config, 1), &case, &expected);
        }
    }
}
