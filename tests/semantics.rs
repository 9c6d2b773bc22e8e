//! What dispatch and combine mean, input form by input form.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{BF16, Case, LIMIT, Random, Ranks, bits, config, contents, has_queues, local_world, within};
use half::bf16;
use railhop::numeric::{quantise, scale_groups};
use railhop::{
    Combine, Dispatched, Fp8Tokens, RecvBuffer, RowFormat, RowShape, Rows, ScaleData, ScaleFormat,
    ScaleOrder, Scales,
};

/// The rank's tokens, quantised by hand, with scales in `order`.
fn ready(case: &Case, rank: usize, order: ScaleOrder) -> Fp8Tokens<Vec<u8>> {
    let RowFormat::Fp8(format) = case.shape.format else { panic!("FP8 cases only") };
    let (x, hidden) = (case.x(rank), case.shape.hidden);
    let elements = scale_groups(hidden).div_ceil(4 / format.bytes());
    let (token_stride, group_stride) = match order {
        ScaleOrder::RowMajor { pitch } => (pitch, 1),
        ScaleOrder::ColumnMajor { pitch } => (1, pitch),
    };
    let tokens = x.len() / hidden;
    let mut data = vec![0xDEAD_BEEFu32; (tokens + 16) * (elements + 16)];
    let mut codes = vec![0; x.len()];
    for (token, (x, codes)) in x.chunks(hidden).zip(codes.chunks_mut(hidden)).enumerate() {
        let mut scales = vec![0u32; elements];
        quantise(x, format, codes, bytemuck::cast_slice_mut(&mut scales));
        for (element, scale) in scales.into_iter().enumerate() {
            data[token * token_stride + element * group_stride] = scale;
        }
    }
    let data = match format {
        ScaleFormat::F32 => ScaleData::F32(data.into_iter().map(f32::from_bits).collect()),
        ScaleFormat::Ue8m0 => ScaleData::Ue8m0(data.into()),
    };
    Fp8Tokens { codes, scales: Scales { data, order } }
}

#[test]
fn ready_e4m3_tokens_arrive_as_those_quantised_on_the_way() {
    within(LIMIT, || {
        for format in [ScaleFormat::F32, ScaleFormat::Ue8m0] {
            // The last group is short, and the last word of packed scales has one byte to spare.
            let shape = RowShape { hidden: 6 * 128 + 48, topk: 4, format: RowFormat::Fp8(format) };
            let config = config(2, 2).max_hidden(shape.hidden).build().unwrap();
            let case = Case::random(&config, shape, 9, 1);
            let mut ranks = Ranks::new(&config);
            let handles = ranks.plan(&case);
            let expected = ranks.dispatch(&handles, shape, |rank| case.x(rank));
            for order in [7, 9].map(|pitch| ScaleOrder::RowMajor { pitch }).into_iter().chain(
                // Nine tokens at most.
                [9, 11].map(|pitch| ScaleOrder::ColumnMajor { pitch }),
            ) {
                let got = ranks.dispatch(&handles, shape, |rank| ready(&case, rank, order));
                for (got, expected) in got.iter().zip(&expected) {
                    assert_eq!(contents(&got.buffer), contents(&expected.buffer), "{order:?}");
                }
            }
        }
    });
}

/// Random rows for what each rank received.
fn outputs<X>(
    ranks: &mut Ranks,
    received: &[Dispatched<X>],
    element: impl Fn(&mut Random) -> bf16,
) -> Vec<RecvBuffer> {
    ranks.each(|comm| {
        let received = &received[comm.rank()].buffer;
        let shape = RowShape { format: RowFormat::Bf16, ..received.shape() };
        let mut y = comm.recv_buffer(received.rows(), shape).unwrap();
        y.set_rows(received.rows());
        let mut random = Random(comm.rank() as u64);
        y.bf16_mut().fill_with(|| element(&mut random));
        y
    })
}

/// The row that the ranks' `outputs` must come to at (`home`, `token`), straight from the definition.
fn combined<X>(
    case: &Case,
    received: &[Dispatched<X>],
    outputs: &[Vec<bf16>],
    (home, token): (usize, usize),
    bias: &[bf16],
) -> Vec<u16> {
    let (topology, hidden) = (case.config.topology(), case.shape.hidden);
    let round = |x: f32| if x.is_nan() { bf16::from_bits(0x7FC0) } else { bf16::from_f32(x) };
    let add = |sums: &mut [f32], terms: &mut dyn Iterator<Item = f32>| {
        sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
    };
    let mut total = vec![0f32; hidden];
    for node in 0..topology.nodes() {
        let mut partial = vec![0f32; hidden];
        let mut any = false;
        for rank in (0..topology.ranks_per_node()).map(|local| topology.rank(node, local)) {
            let own = |source: &railhop::Source| (source.rank, source.token) == (home as u32, token as u32);
            if let Some(row) = received[rank].buffer.sources().iter().position(own) {
                let row = &outputs[rank][row * hidden..][..hidden];
                add(&mut partial, &mut row.iter().map(|y| y.to_f32()));
                any = true;
            }
        }
        match node == topology.node_of(home) {
            _ if !any => {}
            true => add(&mut total, &mut partial.into_iter()),
            false => add(&mut total, &mut partial.into_iter().map(|sum| round(sum).to_f32())),
        }
    }
    add(&mut total, &mut bias.iter().map(|bias| bias.to_f32()));
    total.into_iter().map(|sum| round(sum).to_bits()).collect()
}

#[test]
fn the_bias_is_added_last_in_f32() {
    within(LIMIT, || {
        let config = config(3, 2).build().unwrap();
        let case = Case::random(&config, BF16, 12, 2);
        let mut ranks = Ranks::new(&config);
        let handles = ranks.plan(&case);
        let received = ranks.dispatch(&handles, case.shape, |rank| case.x(rank));
        let y = outputs(&mut ranks, &received, Random::element);
        let rows: Vec<_> = y.iter().map(|y| y.bf16().to_vec()).collect();
        let mut random = Random(3);
        let bias = |rank: usize| (0..case.x(rank).len()).map(|_| random.element()).collect::<Arc<[_]>>();
        let bias: Vec<_> = (0..6).map(bias).collect();
        let input = |(y, bias): (_, &Arc<_>)| Combine::new(y).bias(Arc::clone(bias));
        let done = ranks.combine(&handles, y.into_iter().zip(&bias).map(input));
        for (rank, done) in done.iter().enumerate() {
            for (token, got) in done.x.chunks(BF16.hidden).enumerate() {
                let bias = &bias[rank][token * BF16.hidden..][..BF16.hidden];
                assert_eq!(bits(got), combined(&case, &received, &rows, (rank, token), bias));
            }
        }
    });
}

fn dot(a: &[bf16], b: &[bf16]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32())).sum()
}

/// ⟨D x, y⟩ = ⟨x, C y⟩: combine is the backward of dispatch, and a cached dispatch that of combine. On small
/// integers every sum is exact.
#[test]
fn dispatch_and_combine_are_adjoint() {
    within(LIMIT, || {
        let config = config(2, 3).channels(3).build().unwrap();
        let case = Case::random(&config, BF16, 15, 4);
        let small = |seed: u64| {
            let (mut random, case) = (Random(seed), &case);
            move |rank: usize| case.x(rank).iter().map(|_| random.small()).collect::<Vec<_>>()
        };
        let x: Vec<_> = (0..6).map(small(5)).collect();
        let gradients: Vec<_> = (0..6).map(small(6)).collect();
        let mut ranks = Ranks::new(&config);
        let handles = ranks.plan(&case);
        let forward = ranks.dispatch(&handles, case.shape, |rank| x[rank].clone());
        let y = outputs(&mut ranks, &forward, Random::small);
        let home = ranks.combine(&handles, y.into_iter().map(Combine::new));
        let backward = ranks.dispatch(&handles, case.shape, |rank| gradients[rank].clone());
        let sum = |terms: &dyn Fn(usize) -> f64| (0..6).map(terms).sum::<f64>();
        let y = |rank: usize| home[rank].outputs.bf16();
        let dispatched = sum(&|rank| dot(forward[rank].buffer.bf16(), y(rank)));
        assert_eq!(dispatched, sum(&|rank| dot(&x[rank], &home[rank].x)));
        let combined = sum(&|rank| dot(&home[rank].x, &gradients[rank]));
        assert_eq!(combined, sum(&|rank| dot(y(rank), backward[rank].buffer.bf16())));
        assert!(dispatched != 0.0 && combined != 0.0);
    });
}

/// The gradient of a weight comes home from the one rank that has its expert.
#[test]
fn weights_come_home_as_they_were_sent() {
    within(LIMIT, || {
        let config = config(2, 2).build().unwrap();
        let case = Case::random(&config, BF16, 12, 7);
        let mut ranks = Ranks::new(&config);
        let handles = ranks.plan(&case);
        let received = ranks.dispatch(&handles, case.shape, |rank| case.x(rank));
        let in_place = received.into_iter().map(|received| Combine::new(received.buffer).with_topk_weights());
        let home = ranks.combine(&handles, in_place);
        for (rank, home) in home.iter().enumerate() {
            let sent = case.ranks[rank].topk_idx.iter().zip(case.ranks[rank].topk_weights.iter());
            for ((&expert, &sent), &got) in sent.zip(&home.topk_weights) {
                match expert {
                    // Sums start at +0.0 and make NaNs of their own.
                    -1 => assert_eq!(got.to_bits(), 0),
                    _ if sent.is_nan() => assert!(got.is_nan()),
                    _ => assert_eq!(got.to_bits(), (0.0 + sent).to_bits()),
                }
            }
        }
        let plain = home.into_iter().map(|home| Combine::new(home.outputs));
        assert!(ranks.combine(&handles, plain).iter().all(|home| home.topk_weights.is_empty()));
    });
}

#[test]
fn outputs_from_elsewhere_are_copied_and_the_bytes_reported() {
    within(LIMIT, || {
        let config = config(2, 2).build().unwrap();
        let case = Case::random(&config, BF16, 10, 8);
        let mut ranks = Ranks::new(&config);
        let handles = ranks.plan(&case);
        let received = ranks.dispatch(&handles, case.shape, |rank| -> Arc<[bf16]> { case.x(rank).into() });
        let y = ranks.experts(&case, &received);
        let rows = |y: &RecvBuffer| {
            let weights = Some(y.topk_weights().to_vec());
            Rows { rows: y.bf16().to_vec(), hidden: y.shape().hidden, topk_weights: weights }
        };
        let elsewhere: Vec<_> = y.iter().map(|y| Combine::new(rows(y)).with_topk_weights()).collect();
        let elsewhere = ranks.combine(&handles, elsewhere);
        let in_place = ranks.combine(&handles, y.into_iter().map(|y| Combine::new(y).with_topk_weights()));
        for (rank, (elsewhere, in_place)) in elsewhere.iter().zip(&in_place).enumerate() {
            let bytes = 2 * BF16.hidden * received[rank].buffer.rows();
            assert_eq!((elsewhere.copied_bytes, in_place.copied_bytes), (bytes, 0));
            assert_eq!(bits(&elsewhere.x), bits(&in_place.x));
            assert_eq!(elsewhere.topk_weights, in_place.topk_weights);
            case.verify(rank, &handles[rank], &received[rank].buffer, &in_place.x);
        }
    });
}

#[test]
fn a_result_buffer_is_used_again() {
    within(LIMIT, || {
        let config = config(2, 1).build().unwrap();
        let case = Case::regular(&config, BF16, 6);
        let mut ranks = Ranks::new(&config);
        let handles = ranks.plan(&case);
        let received = ranks.dispatch(&handles, case.shape, |rank| case.x(rank));
        let outs: Vec<_> = (0..2).map(|_| vec![bf16::NAN; 1000]).collect();
        let places: Vec<_> = outs.iter().map(|out| out.as_ptr()).collect();
        let y = ranks.experts(&case, &received);
        let input = y.into_iter().zip(outs).map(|(y, out)| Combine::new(y).out(out));
        for (rank, home) in ranks.combine(&handles, input).iter().enumerate() {
            assert_eq!(home.x.as_ptr(), places[rank]);
            case.verify(rank, &handles[rank], &received[rank].buffer, &home.x);
        }
    });
}

#[test]
fn a_dispatch_and_a_combine_are_under_way_together() {
    within(LIMIT, || {
        let config = config(2, 2).ring_slots(4).build().unwrap();
        local_world(&config).run(|mut comm| {
            let rank = comm.rank();
            let mut earlier = None;
            for step in 0..8 {
                let case = Case::random(&config, BF16, 20, step);
                let handle = comm.plan(case.routing(rank)).unwrap();
                let buffer = comm.recv_buffer(handle.num_recv_tokens(), case.shape).unwrap();
                let dispatch = comm.start_dispatch(&handle, case.x(rank), buffer);
                let combine = earlier.take().map(|(case, handle, received): (Case, _, RecvBuffer)| {
                    let y = case.experts(&comm, &received);
                    let combine = comm.start_combine(&handle, Combine::new(y));
                    (case, handle, received, combine)
                });
                let work: f64 = (0..10_000).map(f64::from).map(f64::sqrt).sum();
                assert!(work > 0.0);
                let received = dispatch.wait().unwrap();
                if let Some((case, handle, buffer, combine)) = combine {
                    case.verify(rank, &handle, &buffer, &combine.wait().unwrap().x);
                }
                earlier = Some((case, received.handle, received.buffer));
            }
        });
    });
}

#[test]
fn buffers_and_handles_are_kept_until_backward() {
    within(LIMIT, || {
        let config = config(2, 2).build().unwrap();
        local_world(&config).run(|mut comm| {
            let rank = comm.rank();
            let cases: Vec<_> = (0..50).map(|seed| Case::random(&config, BF16, 6, seed)).collect();
            let forward = cases.iter().map(|case| {
                let handle = comm.plan(case.routing(rank)).unwrap();
                let buffer = comm.recv_buffer(handle.num_recv_tokens(), case.shape).unwrap();
                comm.dispatch(&handle, case.x(rank), buffer).unwrap()
            });
            let kept: Vec<_> = forward.collect();
            for (case, kept) in cases.iter().zip(&kept).rev() {
                let y = case.experts(&comm, &kept.buffer);
                let home = comm.combine(&kept.handle, Combine::new(y)).unwrap();
                case.verify(rank, &kept.handle, &kept.buffer, &home.x);
            }
        });
    });
}

#[test]
fn rows_stand_by_source_and_are_counted_by_expert() {
    within(LIMIT, || {
        let config = config(2, 3).build().unwrap();
        let case = Case::random(&config, BF16, 30, 9);
        let mut ranks = Ranks::new(&config);
        let handles = ranks.plan(&case);
        let received = ranks.dispatch(&handles, case.shape, |rank| case.x(rank));
        for (rank, received) in received.iter().enumerate() {
            let sources: Vec<_> = received.buffer.sources().iter().map(|s| (s.rank, s.token)).collect();
            assert!(sources.is_sorted_by(|a, b| a < b));
            assert_eq!(received.handle.num_recv_tokens(), sources.len());
            let mut counts = vec![0; config.placement().experts_of(rank).len()];
            let local = received.buffer.topk_idx().iter().filter(|index| **index >= 0);
            local.for_each(|&index| counts[index as usize] += 1);
            for alignment in [1, 8, 128] {
                let aligned: Vec<_> = counts.iter().map(|n: &usize| n.next_multiple_of(alignment)).collect();
                assert_eq!(received.handle.num_recv_tokens_per_expert(alignment), aligned);
            }
        }
    });
}

#[test]
fn tokens_cross_hop_1_once_per_remote_node() {
    within(LIMIT, || {
        let config = config(3, 2).build().unwrap();
        let case = Case::random(&config, BF16, 30, 10);
        let (topology, placement) = (config.topology(), config.placement());
        for (rank, handle) in Ranks::new(&config).plan(&case).iter().enumerate() {
            let remote = |experts: &[i64]| {
                let owners = experts.iter().filter(|&&expert| expert >= 0);
                let nodes = owners.map(|&expert| topology.node_of(placement.rank_of(expert as usize)));
                let nodes: std::collections::HashSet<_> = nodes.collect();
                nodes.into_iter().filter(|&node| node != topology.node_of(rank)).count()
            };
            let expected: usize = case.ranks[rank].topk_idx.chunks(BF16.topk).map(remote).sum();
            assert_eq!(handle.num_hop1_tokens(), expected);
        }
    });
}

#[test]
fn worlds_coexist() {
    within(LIMIT, || {
        let configs = [("pipeline", config(2, 2)), ("expert", config(1, 4))]
            .map(|(name, builder)| builder.name(name).build().unwrap());
        let [one, other] = configs.clone().map(|config| Ranks::new(&config).comms);
        std::thread::scope(|scope| {
            for (mut one, mut other) in one.into_iter().zip(other) {
                let configs = &configs;
                scope.spawn(move || {
                    for seed in 0..5 {
                        Case::random(&configs[0], BF16, 10, seed).round_trip(&mut one);
                        Case::random(&configs[1], BF16, 10, seed).round_trip(&mut other);
                    }
                });
            }
        });
    });
}

#[test]
fn many_ranks_share_two_workers() {
    if !has_queues(64) {
        return println!("there are fewer queues than 64 ranks need");
    }
    within(LIMIT, || {
        let shape = RowShape { hidden: 16, topk: 8, format: RowFormat::Fp8(ScaleFormat::F32) };
        for (nodes, ranks_per_node) in [(8, 8), (1, 64), (64, 1)] {
            let config = config(nodes, ranks_per_node).max_hidden(16).pool_bytes(1 << 20).build().unwrap();
            let case = Case::random(&config, shape, 4, 11);
            local_world(&config).run(|mut comm| case.round_trip(&mut comm));
        }
    });
}

#[test]
fn rings_do_not_grow_with_the_batch() {
    let memory = [100, 200].map(|tokens| {
        let config = config(2, 2).build().unwrap();
        let bytes = Case::regular(&config, BF16, tokens).buffer_bytes();
        common::config(2, 2).pool_bytes(2 * bytes).build().unwrap().memory()
    });
    assert_eq!((memory[0].rings, memory[0].control), (memory[1].rings, memory[1].control));
    assert!(memory[0].pool < memory[1].pool && memory[0].rings > 0);
}

/// CPU time of this process's threads called `name`, in ticks (10 ms).
#[cfg(target_os = "linux")]
fn ticks_of(name: &str) -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten().map(|task| task.path());
    let stat = tasks.filter_map(|task| std::fs::read_to_string(task.join("stat")).ok());
    let of_thread = stat.filter_map(|stat| {
        let (head, tail) = stat.rsplit_once(") ")?;
        let named = head.split_once('(')?.1 == name;
        // utime and stime are the 14th and 15th field; the third comes first here.
        named.then(|| tail.split(' ').skip(11).take(2).flat_map(str::parse::<u64>).sum::<u64>())
    });
    of_thread.sum()
}

#[test]
#[cfg(target_os = "linux")]
fn who_has_nothing_to_do_burns_nothing() {
    within(LIMIT, || {
        // No other test has a worker of that number.
        let config = config(2, 2).worker_budget(42).build().unwrap();
        let case = Case::regular(&config, BF16, 4);
        let mut ranks = Ranks::new(&config);
        let burnt = || {
            let before = ticks_of("railhop-41");
            std::thread::sleep(Duration::from_millis(500));
            ticks_of("railhop-41") - before
        };
        ranks.plan(&case);
        assert!(burnt() <= 5, "idle");
        let mut waiting =
            ranks.each(|comm| (comm.rank() > 0).then(|| comm.start_plan(case.routing(comm.rank()))));
        assert!(burnt() <= 10, "waiting for rank 0");
        waiting[0] = Some(ranks.comms[0].start_plan(case.routing(0)));
        waiting.into_iter().flatten().for_each(|pending| drop(pending.wait().unwrap()));
    });
}
