//! The CUDA engine over the CPU shim: everything but the calls of the driver itself.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))] // What the shim runs on.

mod common;

use common::{BF16, Case, LIMIT, Ranks, config, contents, within};
use railhop::reference::oracle::RankTokens;
use railhop::reference::trace::Trace;
use railhop::{Combine, Combined, Dispatched, RecvBuffer, RowFormat, RowShape, ScaleFormat};

/// What an engine makes of a case: every received byte, and every sum.
fn outcome(mut ranks: Ranks, cases: &[Case]) -> Vec<impl PartialEq + std::fmt::Debug> {
    let step = |case: &Case| {
        let handles = ranks.plan(case);
        let received = ranks.dispatch(&handles, case.shape, |rank| case.x(rank));
        let outputs = ranks.experts(case, &received).into_iter().zip(&received).map(|(mut y, received)| {
            y.topk_weights_mut().copy_from_slice(received.buffer.topk_weights());
            Combine::new(y).with_topk_weights()
        });
        let combined: Vec<Combined<RecvBuffer>> = ranks.combine(&handles, outputs.collect::<Vec<_>>());
        let rank = |(received, combined): (&Dispatched<_>, &Combined<_>)| {
            let handle = &received.handle;
            let weights: Vec<u32> = combined.topk_weights.iter().map(|weight| weight.to_bits()).collect();
            let counts = (handle.num_recv_tokens_per_expert(1), handle.num_hop1_tokens());
            (contents(&received.buffer), counts, common::bits(&combined.x), weights)
        };
        received.iter().zip(&combined).map(rank).collect::<Vec<_>>()
    };
    cases.iter().map(step).collect()
}

#[test]
fn traces_are_the_host_engines() {
    let trace = Trace::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/small.safetensors")).unwrap();
    for (nodes, ranks) in [(1, 8), (2, 4), (4, 2)] {
        for format in [RowFormat::Bf16, RowFormat::Fp8(ScaleFormat::F32), RowFormat::Fp8(ScaleFormat::Ue8m0)]
        {
            let config = config(nodes, ranks).experts(trace.num_experts).max_hidden(trace.hidden).channels(2);
            let config = config.build().unwrap();
            let case = |step| {
                let owned = |rank: RankTokens<'_>| RankTokens {
                    topk_idx: rank.topk_idx.into_owned().into(),
                    topk_weights: rank.topk_weights.into_owned().into(),
                    x: rank.x.into_owned().into(),
                };
                let shape = RowShape { hidden: trace.hidden, topk: trace.topk, format };
                let ranks = trace.step(step, config.topology().world_size(), 64).into_iter().map(owned);
                Case { config: config.clone(), shape, ranks: ranks.collect() }
            };
            let cases = [case(0), case(1)];
            let kernels = outcome(Ranks::on_shim(&config), &cases);
            assert!(kernels == outcome(Ranks::new(&config), &cases), "{nodes}x{ranks} {format:?}");
        }
    }
}

#[test]
fn a_round_trip_works() {
    within(LIMIT, || {
        let config = config(1, 2).deadline(std::time::Duration::from_secs(3)).build().unwrap();
        Ranks::on_shim(&config).round_trip(&Case::regular(&config, BF16, 6));
    });
}
