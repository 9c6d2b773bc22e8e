//! Recorded routing through dispatch, experts and combine, against the oracle.

mod common;

use common::{data, has_queues, local_world};
use half::bf16;
use railhop::reference::oracle::Oracle;
use railhop::reference::trace::Trace;
use railhop::reference::{experts, verify::verify};
use railhop::{Combine, Config, Routing, RowFormat, RowShape, ScaleFormat, Topology};

fn replay(nodes: usize, ranks_per_node: usize, tokens: usize, format: RowFormat) {
    let trace = Trace::read(data("small.safetensors")).unwrap();
    let topology = Topology::new(nodes, ranks_per_node).unwrap();
    if !has_queues(topology.world_size()) {
        return println!("{nodes}x{ranks_per_node} has more ranks than there are queues for");
    }
    let config =
        Config::builder(topology).experts(trace.num_experts).max_hidden(trace.hidden).build().unwrap();
    let world = topology.world_size();
    let oracles: Vec<_> = (0..trace.steps(world, tokens))
        .map(|step| Oracle {
            config: &config,
            hidden: trace.hidden,
            topk: trace.topk,
            format,
            ranks: trace.step(step, world, tokens),
        })
        .collect();
    local_world(&config).run(|mut comm| {
        let shape = RowShape { hidden: trace.hidden, topk: trace.topk, format };
        for oracle in &oracles {
            let own = &oracle.ranks[comm.rank()];
            let routing =
                Routing { topk: trace.topk, topk_idx: &own.topk_idx, topk_weights: &own.topk_weights };
            let handle = comm.plan(routing).unwrap();
            let buffer = comm.recv_buffer(handle.num_recv_tokens(), shape).unwrap();
            let done = comm.dispatch(&handle, own.x.to_vec(), buffer).unwrap();
            let outputs = RowShape { format: RowFormat::Bf16, ..shape };
            let mut y = comm.recv_buffer(handle.num_recv_tokens(), outputs).unwrap();
            y.set_rows(handle.num_recv_tokens());
            experts::run(&done.buffer, config.placement().experts_of(comm.rank()), y.bf16_mut());
            let combined = comm.combine(&handle, Combine::new(y)).unwrap();
            verify(oracle, comm.rank(), &handle, &done.buffer, &combined.x).unwrap();
            assert!(combined.x.iter().any(|x| *x != bf16::ZERO) || own.x.is_empty());
        }
    });
}

#[test]
fn bf16_on_every_shape() {
    for (nodes, ranks) in [(1, 8), (2, 4), (4, 2), (8, 2), (3, 5), (1, 1)] {
        replay(nodes, ranks, 64, RowFormat::Bf16);
    }
}

#[test]
fn fp8_on_every_shape() {
    for (nodes, ranks) in [(1, 8), (2, 4), (4, 2), (8, 2), (3, 5), (1, 1)] {
        replay(nodes, ranks, 60, RowFormat::Fp8(ScaleFormat::F32));
        replay(nodes, ranks, 60, RowFormat::Fp8(ScaleFormat::Ue8m0));
    }
}
