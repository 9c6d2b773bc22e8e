//! What goes wrong at one rank, and what every rank then gets: a typed error, the same one, in time.

mod common;

use std::collections::HashSet;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{BF16, Case, LIMIT, Ranks, config, local_world, within};
use half::bf16;
use railhop::error::{Cause, Error, Fault, Kind, Reason, Role, Tensor};
use railhop::fabric::Fabric;
use railhop::wire::region::{Lane, RegionMap, WordId};
use railhop::{
    Combine, Communicator, Config, Failed, Fp8Tokens, Handle, RecvBuffer, Routing, RowFormat, RowShape, Rows,
    ScaleData, ScaleFormat, ScaleOrder, Scales, Topology,
};

/// For tests in which a wait runs out.
const SHORT: Duration = Duration::from_millis(300);

/// What a wait comes to, whatever the operation returns.
macro_rules! outcome {
    ($pending:expr) => {{
        let pending = $pending;
        Box::new(move || pending.wait().map(drop).map_err(Error::from)) as Outcome
    }};
}

type Outcome = Box<dyn FnOnce() -> Result<(), Error>>;

fn outcomes(pending: Vec<Outcome>) -> Vec<Result<(), Error>> {
    pending.into_iter().map(|wait| wait()).collect()
}

fn world(nodes: usize, ranks_per_node: usize) -> (Config, Case, Ranks) {
    let config = config(nodes, ranks_per_node).build().unwrap();
    (config.clone(), Case::regular(&config, BF16, 6), Ranks::new(&config))
}

fn hasty(nodes: usize, ranks_per_node: usize) -> (Config, Case, Ranks) {
    let config = config(nodes, ranks_per_node).deadline(SHORT).build().unwrap();
    (config.clone(), Case::regular(&config, BF16, 6), Ranks::new(&config))
}

/// Worlds, and the rank that goes wrong in them.
const WORLDS: [(usize, usize, usize); 4] = [(2, 2, 2), (2, 2, 1), (1, 3, 1), (3, 1, 0)];

/// Every rank got the same refusal; returns what each had handed in.
fn refused<T, I>(results: Vec<Result<T, Failed<I>>>, rank: usize, reason: Reason) -> Vec<I> {
    let refusal = |result: Result<T, Failed<I>>| {
        let Err(Failed { error, input }) = result else { panic!("Ok, in spite of: {reason}") };
        assert_eq!(error, Error::Refused { rank, reason });
        input
    };
    results.into_iter().map(refusal).collect()
}

#[test]
fn routing_is_refused_on_every_rank() {
    within(LIMIT, || {
        type Flaw = fn(&mut usize, &mut Vec<i64>, &mut Vec<f32>);
        let outside = |k, expert| Reason::ExpertOutOfRange { token: 1, k, expert, num_experts: 8 };
        let flaws: [(Flaw, Reason); 8] = [
            (|_, idx, _| idx[6] = 8, outside(2, 8)),
            (|_, idx, _| idx[6] = -2, outside(2, -2)),
            (|_, idx, _| idx[4] = i64::MIN, outside(0, i64::MIN)),
            (|_, idx, _| idx.truncate(23), wrong_size(Tensor::TopkIdx, 20, 23)),
            (|_, _, weights| weights.push(0.0), wrong_size(Tensor::TopkWeights, 24, 25)),
            (|topk, _, _| *topk = 0, Reason::TopkOutOfRange { topk: 0, max: 8 }),
            (|topk, _, _| *topk = 12, Reason::TopkOutOfRange { topk: 12, max: 8 }),
            (|topk, _, _| *topk = 4000, Reason::TopkOutOfRange { topk: 4000, max: 8 }),
        ];
        for (nodes, ranks_per_node, culprit) in WORLDS {
            let config = config(nodes, ranks_per_node).experts(8).build().unwrap();
            let (case, mut ranks) = (Case::regular(&config, BF16, 6), Ranks::new(&config));
            for (flaw, reason) in flaws {
                let own = &case.ranks[culprit];
                let (mut topk, mut idx, mut weights) =
                    (BF16.topk, own.topk_idx.to_vec(), own.topk_weights.to_vec());
                flaw(&mut topk, &mut idx, &mut weights);
                let routing = |rank: usize| match rank == culprit {
                    true => Routing { topk, topk_idx: &idx, topk_weights: &weights },
                    false => case.routing(rank),
                };
                let plans = ranks.each(|comm| comm.start_plan(routing(comm.rank())));
                refused(plans.into_iter().map(|plan| plan.wait()).collect(), culprit, reason);
                let fused = ranks.each(|comm| {
                    let buffer = comm.recv_buffer(100, BF16).unwrap();
                    comm.start_plan_dispatch(routing(comm.rank()), case.x(comm.rank()), buffer)
                });
                let back = refused(fused.into_iter().map(|fused| fused.wait()).collect(), culprit, reason);
                for (rank, (x, buffer)) in back.into_iter().enumerate() {
                    assert_eq!(common::bits(&x), common::bits(&case.ranks[rank].x));
                    assert_eq!(buffer.unwrap().capacity(), 100);
                }
            }
            ranks.round_trip(&case);
        }
    });
}

/// Dispatch by `handles`, experts, combine; everything as the oracle says.
fn works(ranks: &mut Ranks, case: &Case, handles: &[Handle]) {
    let received = ranks.dispatch(handles, case.shape, |rank| case.x(rank));
    let y = ranks.experts(case, &received);
    let home = ranks.combine(handles, y.into_iter().map(Combine::new));
    for (rank, home) in home.iter().enumerate() {
        case.verify(rank, &handles[rank], &received[rank].buffer, &home.x);
    }
}

/// Another world's handle and buffer.
fn foreign(case: &Case) -> (Handle, RecvBuffer) {
    let mut other = Ranks::new(&case.config);
    let mut handles = other.plan(case);
    let mut buffers = other.buffers(&handles, case.shape);
    (handles.remove(0), buffers.remove(0))
}

fn wrong_size(tensor: Tensor, expected: usize, got: usize) -> Reason {
    Reason::WrongSize { tensor, expected: expected as u64, got: got as u64 }
}

/// What one rank hands in, to be spoilt.
struct Given<'a, I> {
    case: &'a Case,
    ranks: &'a Ranks,
    handles: &'a [Handle],
    rank: usize,
    handle: Handle,
    input: I,
}

impl<I> Given<'_, I> {
    fn rows(&self) -> usize {
        self.handle.num_recv_tokens()
    }

    fn other(&self) -> usize {
        (self.rank + 1) % self.handles.len()
    }

    fn handle_of_another_rank(&mut self) -> Reason {
        self.handle = self.handles[self.other()].clone();
        Reason::Foreign
    }

    fn handle_of_another_world(&mut self) -> Reason {
        self.handle = foreign(self.case).0;
        Reason::Foreign
    }

    fn buffer(&self, rank: usize, rows: usize, shape: RowShape) -> RecvBuffer {
        self.ranks.comms[rank].recv_buffer(rows, shape).unwrap()
    }
}

type Flaws<I> = &'static [fn(&mut Given<'_, I>) -> Reason];

const BAD_DISPATCHES: Flaws<(Vec<bf16>, RecvBuffer)> = &[
    |given| {
        given.input.0.pop();
        wrong_size(Tensor::X, 384, 383)
    },
    |given| {
        given.input.0.clear();
        wrong_size(Tensor::X, 384, 0)
    },
    |given| {
        given.input.1 = given.buffer(given.rank, given.rows() - 1, BF16);
        Reason::BufferTooSmall { needed: given.rows() as u64, capacity: given.rows() as u64 - 1 }
    },
    |given| {
        given.input.1 = given.buffer(given.rank, given.rows(), RowShape { topk: 5, ..BF16 });
        wrong_size(Tensor::TopkIdx, 4, 5)
    },
    |given| {
        given.input.1 = given.buffer(given.rank, given.rows(), RowShape { hidden: 128, ..BF16 });
        wrong_size(Tensor::X, 6 * 128, 384)
    },
    |given| {
        given.input.1 = given.buffer(given.other(), given.rows(), BF16);
        Reason::Foreign
    },
    |given| {
        given.input.1 = foreign(given.case).1;
        Reason::Foreign
    },
    |given| given.handle_of_another_rank(),
    |given| given.handle_of_another_world(),
];

/// Every rank's handle and input, one of them spoilt, and why it must be refused.
fn spoilt<I>(
    (ranks, case, handles): (&Ranks, &Case, &[Handle]),
    rank: usize,
    mut inputs: Vec<I>,
    flaw: fn(&mut Given<'_, I>) -> Reason,
) -> (impl Iterator<Item = (Handle, I)> + use<I>, Reason) {
    let (handle, input) = (handles[rank].clone(), inputs.remove(rank));
    let mut given = Given { case, ranks, handles, rank, handle, input };
    let reason = flaw(&mut given);
    let Given { handle, input, .. } = given;
    inputs.insert(rank, input);
    let mut handles = handles.to_vec();
    handles[rank] = handle;
    (handles.into_iter().zip(inputs), reason)
}

#[test]
fn dispatches_are_refused_on_every_rank() {
    within(LIMIT, || {
        for (nodes, ranks_per_node, culprit) in WORLDS {
            let (_, case, mut ranks) = world(nodes, ranks_per_node);
            let handles = ranks.plan(&case);
            for &flaw in BAD_DISPATCHES {
                let inputs = ranks.buffers(&handles, BF16).into_iter().enumerate();
                let inputs = inputs.map(|(rank, buffer)| (case.x(rank), buffer)).collect();
                let (inputs, reason) = spoilt((&ranks, &case, &handles), culprit, inputs, flaw);
                let inputs: Vec<_> = inputs.collect();
                let sizes = inputs.iter().map(|(_, (x, buffer))| (x.len(), buffer.capacity()));
                let (sizes, mut inputs) = (sizes.collect::<Vec<_>>(), inputs.into_iter());
                let pending = ranks.each(|comm| {
                    let (handle, (x, buffer)) = inputs.next().unwrap();
                    comm.start_dispatch(&handle, x, buffer)
                });
                let back = refused(pending.into_iter().map(|p| p.wait()).collect(), culprit, reason);
                let back = back.iter().map(|(x, buffer)| (x.len(), buffer.as_ref().unwrap().capacity()));
                assert_eq!(back.collect::<Vec<_>>(), sizes);
                works(&mut ranks, &case, &handles);
            }
        }
    });
}

const BAD_FP8: Flaws<(Fp8Tokens<Vec<u8>>, RecvBuffer)> = &[
    |given| {
        given.input.1 = given.buffer(given.rank, given.rows(), BF16);
        Reason::FormatMismatch
    },
    |given| {
        given.input.0.scales.data = ScaleData::Ue8m0([0; 6].into());
        Reason::FormatMismatch
    },
    |given| {
        given.input.0.codes.pop();
        wrong_size(Tensor::X, 384, 383)
    },
    |given| {
        given.input.0.scales.data = ScaleData::F32([1.0; 5].into());
        wrong_size(Tensor::Scales, 6, 5)
    },
    |given| {
        given.input.0.scales.order = ScaleOrder::ColumnMajor { pitch: 5 };
        wrong_size(Tensor::Scales, 6, 5)
    },
];

#[test]
fn ready_tokens_are_refused_on_every_rank() {
    within(LIMIT, || {
        let shape = RowShape { format: RowFormat::Fp8(ScaleFormat::F32), ..BF16 };
        let (_, case, mut ranks) = world(2, 2);
        let case = Case { shape, ..case };
        let handles = ranks.plan(&case);
        for &flaw in BAD_FP8 {
            let order = ScaleOrder::RowMajor { pitch: 1 };
            let scales = Scales { data: ScaleData::F32([1.0; 6].into()), order };
            let tokens = Fp8Tokens { codes: vec![0; 6 * BF16.hidden], scales };
            let buffers = ranks.buffers(&handles, shape).into_iter();
            let inputs = buffers.map(|buffer| (tokens.clone(), buffer)).collect();
            let (mut inputs, reason) = spoilt((&ranks, &case, &handles), 1, inputs, flaw);
            let pending = ranks.each(|comm| {
                let (handle, (x, buffer)) = inputs.next().unwrap();
                comm.start_dispatch(&handle, x, buffer)
            });
            let back = refused(pending.into_iter().map(|p| p.wait()).collect(), 1, reason);
            assert!(back.into_iter().all(|(x, buffer)| x.codes.len() >= 383 && buffer.is_some()));
            works(&mut ranks, &case, &handles);
        }
    });
}

/// No token, no scale: whatever the pitch.
#[test]
fn scales_of_no_tokens_may_have_any_pitch() {
    within(LIMIT, || {
        let shape = RowShape { format: RowFormat::Fp8(ScaleFormat::F32), ..BF16 };
        let (config, _, mut ranks) = world(2, 1);
        let case = Case::regular(&config, shape, 0);
        let handles = ranks.plan(&case);
        for order in [ScaleOrder::RowMajor { pitch: 0 }, ScaleOrder::ColumnMajor { pitch: 0 }] {
            let scales = Scales { data: ScaleData::F32([].into()), order };
            let received =
                ranks.dispatch(&handles, shape, |_| Fp8Tokens { codes: vec![], scales: scales.clone() });
            assert!(received.iter().all(|received| received.buffer.rows() == 0));
        }
    });
}

const BAD_COMBINES: Flaws<(RecvBuffer, Arc<[bf16]>)> = &[
    |given| {
        given.input.0.set_rows(given.rows() - 1);
        wrong_size(Tensor::ExpertOutputs, given.rows() * 64, (given.rows() - 1) * 64)
    },
    |given| {
        given.input.1 = [bf16::ONE; 383].into();
        wrong_size(Tensor::Bias, 384, 383)
    },
    |given| {
        let format = RowFormat::Fp8(ScaleFormat::F32);
        given.input.0 = given.buffer(given.rank, given.rows(), RowShape { format, ..BF16 });
        Reason::FormatMismatch
    },
    |given| {
        given.input.0 = given.buffer(given.rank, given.rows(), RowShape { topk: 3, ..BF16 });
        wrong_size(Tensor::TopkIdx, 4, 3)
    },
    |given| {
        given.input.0 = given.buffer(given.other(), given.rows(), BF16);
        Reason::Foreign
    },
    |given| {
        given.input.0 = foreign(given.case).1;
        Reason::Foreign
    },
    |given| given.handle_of_another_rank(),
    |given| given.handle_of_another_world(),
];

const BAD_ROWS: Flaws<Rows<Vec<bf16>>> = &[
    |given| {
        given.input.rows.truncate(64 * (given.rows() - 1));
        wrong_size(Tensor::ExpertOutputs, given.rows() * 64, (given.rows() - 1) * 64)
    },
    |given| {
        given.input.rows.pop();
        wrong_size(Tensor::ExpertOutputs, (given.rows() - 1) * 64, given.rows() * 64 - 1)
    },
    |given| {
        given.input.hidden = 60;
        Reason::HiddenNotAligned { hidden: 60, multiple: 8 }
    },
    |given| {
        given.input.hidden = 0;
        Reason::HiddenNotAligned { hidden: 0, multiple: 8 }
    },
    |given| {
        given.input.hidden = 520;
        Reason::HiddenTooLarge { hidden: 520, max: 512 }
    },
    |given| {
        given.input.topk_weights = Some(vec![0.0; 3]);
        wrong_size(Tensor::TopkWeights, given.rows() * 4, 3)
    },
    |given| {
        given.input.rows = vec![bf16::ZERO; 64 << 16];
        match given.ranks.comms[given.rank].recv_buffer(1 << 16, BF16).unwrap_err() {
            Error::PoolExhausted { needed, largest } => {
                Reason::PoolExhausted { needed: needed as u64, largest: largest as u64 }
            }
            other => panic!("{other}"),
        }
    },
    |given| {
        given.handle = foreign(given.case).0;
        Reason::Foreign
    },
];

#[test]
fn combines_are_refused_on_every_rank() {
    within(LIMIT, || {
        for (nodes, ranks_per_node, culprit) in WORLDS {
            let (_, case, mut ranks) = world(nodes, ranks_per_node);
            let handles = ranks.plan(&case);
            works(&mut ranks, &case, &handles);
            for &flaw in BAD_COMBINES {
                let full = |(mut y, rows): (RecvBuffer, usize)| {
                    y.set_rows(rows);
                    (y, vec![bf16::ONE; 384].into())
                };
                let rows = handles.iter().map(Handle::num_recv_tokens);
                let inputs = ranks.buffers(&handles, BF16).into_iter().zip(rows).map(full).collect();
                let (mut inputs, reason) = spoilt((&ranks, &case, &handles), culprit, inputs, flaw);
                let pending = ranks.each(|comm| {
                    let (handle, (y, bias)) = inputs.next().unwrap();
                    comm.start_combine(&handle, Combine::new(y).bias(bias).out(vec![bf16::NAN; 3]))
                });
                let back = refused(pending.into_iter().map(|p| p.wait()).collect(), culprit, reason);
                for back in back {
                    let (y, bias, _) = back.unwrap().into_parts();
                    assert!(y.capacity() > 0 && bias.is_some());
                }
                works(&mut ranks, &case, &handles);
            }
            for &flaw in BAD_ROWS {
                let rows = |handle: &Handle| vec![bf16::ONE; handle.num_recv_tokens() * 64];
                let rows = |handle| Rows { rows: rows(handle), hidden: 64, topk_weights: None };
                let inputs = handles.iter().map(rows).collect();
                let (mut inputs, reason) = spoilt((&ranks, &case, &handles), culprit, inputs, flaw);
                let pending = ranks.each(|comm| {
                    let (handle, rows) = inputs.next().unwrap();
                    comm.start_combine(&handle, Combine::new(rows))
                });
                let back = refused(pending.into_iter().map(|p| p.wait()).collect(), culprit, reason);
                assert!(back.into_iter().all(|back| !back.unwrap().into_parts().0.rows.is_empty()));
                works(&mut ranks, &case, &handles);
            }
        }
    });
}

#[test]
fn handles_must_be_dispatched_and_of_this_generation() {
    within(LIMIT, || {
        let (_, case, mut ranks) = world(2, 2);
        let old = ranks.plan(&case);
        works(&mut ranks, &case, &old);
        let combine = |ranks: &mut Ranks, handles: &[Handle]| {
            let y = |handle: &Handle| vec![bf16::ONE; 64 * handle.num_recv_tokens()];
            let pending = ranks.each(|comm| {
                let handle = &handles[comm.rank()];
                let rows = Rows { rows: y(handle), hidden: 64, topk_weights: None };
                comm.start_combine(handle, Combine::new(rows))
            });
            pending.into_iter().map(|pending| pending.wait()).collect::<Vec<_>>()
        };
        // Rank 2 alone, then all ranks: the first is named.
        let mut handles = old.clone();
        let planned = ranks.plan(&case);
        handles[2] = planned[2].clone();
        refused(combine(&mut ranks, &handles), 2, Reason::NotDispatched);
        refused(combine(&mut ranks, &planned), 0, Reason::NotDispatched);
        works(&mut ranks, &case, &planned);

        assert!(ranks.at_once(|comm| comm.reset()).iter().all(Result::is_ok));
        let new = ranks.plan(&case);
        works(&mut ranks, &case, &new);
        let mut handles = new.clone();
        handles[2] = old[2].clone();
        refused(combine(&mut ranks, &handles), 2, Reason::StaleHandle);
        let mut buffers = ranks.buffers(&new, BF16).into_iter();
        let pending = ranks.each(|comm| {
            let rank = comm.rank();
            comm.start_dispatch(&handles[rank], case.x(rank), buffers.next().unwrap())
        });
        refused(pending.into_iter().map(|pending| pending.wait()).collect(), 2, Reason::StaleHandle);
        works(&mut ranks, &case, &new);
    });
}

#[test]
fn buffers_of_impossible_shapes_are_refused() {
    let (_, _, ranks) = world(1, 2);
    let fp8 = RowFormat::Fp8(ScaleFormat::F32);
    for (shape, reason) in [
        (RowShape { hidden: 0, ..BF16 }, Reason::HiddenNotAligned { hidden: 0, multiple: 8 }),
        (RowShape { hidden: 12, ..BF16 }, Reason::HiddenNotAligned { hidden: 12, multiple: 8 }),
        (RowShape { hidden: 24, format: fp8, ..BF16 }, Reason::HiddenNotAligned { hidden: 24, multiple: 16 }),
        (RowShape { hidden: 520, ..BF16 }, Reason::HiddenTooLarge { hidden: 520, max: 512 }),
        (RowShape { topk: 0, ..BF16 }, Reason::TopkOutOfRange { topk: 0, max: 8 }),
        (RowShape { topk: 9, ..BF16 }, Reason::TopkOutOfRange { topk: 9, max: 8 }),
    ] {
        assert_eq!(ranks.comms[1].recv_buffer(1, shape).unwrap_err(), Error::Refused { rank: 1, reason });
    }
}

#[test]
fn an_exhausted_pool_says_what_is_left() {
    let (config, _, ranks) = world(1, 2);
    let comm = &ranks.comms[0];
    let rows = config.memory().pool / 1024;
    let shape = RowShape { hidden: 512, ..BF16 };
    let half = comm.recv_buffer(rows / 2, shape).unwrap();
    let Error::PoolExhausted { needed, largest } = comm.recv_buffer(rows, shape).unwrap_err() else {
        panic!("another error")
    };
    assert!(largest < needed && largest < config.memory().pool);
    drop(half);
    assert!(comm.recv_buffer(rows * 9 / 10, shape).is_ok());
    for rows in [usize::MAX / 1024, usize::MAX] {
        assert!(matches!(comm.recv_buffer(rows, shape), Err(Error::PoolExhausted { .. })));
    }
}

/// Starts an operation, the one all ranks but one start, or another; with either of two dispatched handles.
type Start = fn(&mut Communicator, &Case, [&Handle; 2], bool) -> Outcome;

fn start_dispatch(comm: &mut Communicator, handle: &Handle, shape: RowShape) -> Outcome {
    let buffer = comm.recv_buffer(handle.num_recv_tokens(), shape).unwrap();
    outcome!(comm.start_dispatch(handle, vec![bf16::ONE; 6 * shape.hidden], buffer))
}

fn start_combine(comm: &mut Communicator, handle: &Handle, hidden: usize, weights: bool) -> Outcome {
    let rows = vec![bf16::ONE; handle.num_recv_tokens() * hidden];
    let combine = Combine::new(Rows { rows, hidden, topk_weights: None });
    outcome!(comm.start_combine(handle, if weights { combine.with_topk_weights() } else { combine }))
}

const DISAGREEMENTS: [(&str, Start); 10] = [
    ("plan, plan+dispatch", |comm, case, [handle, _], wrong| match wrong {
        false => outcome!(comm.start_plan(case.routing(comm.rank()))),
        true => {
            let buffer = comm.recv_buffer(handle.num_recv_tokens(), BF16).unwrap();
            outcome!(comm.start_plan_dispatch(case.routing(comm.rank()), case.x(comm.rank()), buffer))
        }
    }),
    ("dispatch, plan", |comm, case, [handle, _], wrong| match wrong {
        false => start_dispatch(comm, handle, BF16),
        true => outcome!(comm.start_plan(case.routing(comm.rank()))),
    }),
    ("plan, dispatch", |comm, case, [handle, _], wrong| match wrong {
        false => outcome!(comm.start_plan(case.routing(comm.rank()))),
        true => start_dispatch(comm, handle, BF16),
    }),
    ("topk of a plan", |comm, case, _, wrong| {
        let topk = if wrong { 2 } else { 4 };
        outcome!(comm.start_plan(Routing { topk, ..case.routing(comm.rank()) }))
    }),
    ("hidden of a dispatch", |comm, _, [handle, _], wrong| {
        start_dispatch(comm, handle, RowShape { hidden: if wrong { 128 } else { 64 }, ..BF16 })
    }),
    ("format of a dispatch", |comm, _, [handle, _], wrong| {
        let format = RowFormat::Fp8(if wrong { ScaleFormat::Ue8m0 } else { ScaleFormat::F32 });
        start_dispatch(comm, handle, RowShape { format, ..BF16 })
    }),
    ("handle of a dispatch", |comm, _, handles, wrong| {
        start_dispatch(comm, handles[usize::from(wrong)], BF16)
    }),
    ("handle of a combine", |comm, _, handles, wrong| {
        start_combine(comm, handles[usize::from(wrong)], 64, false)
    }),
    ("hidden of a combine", |comm, _, [handle, _], wrong| {
        start_combine(comm, handle, if wrong { 128 } else { 64 }, false)
    }),
    ("weights of a combine", |comm, _, [handle, _], wrong| start_combine(comm, handle, 64, wrong)),
];

#[test]
fn ranks_out_of_step_are_named() {
    for (what, start) in DISAGREEMENTS {
        within(LIMIT, move || {
            for culprit in [1, 3] {
                let (_, case, mut ranks) = world(2, 2);
                let [one, other] = [(); 2].map(|()| ranks.plan(&case));
                works(&mut ranks, &case, &one);
                works(&mut ranks, &case, &other);
                let started = ranks.each(|comm| {
                    let rank = comm.rank();
                    start(comm, &case, [&one[rank], &other[rank]], rank == culprit)
                });
                let errors: HashSet<_> =
                    outcomes(started).into_iter().map(|error| format!("{:?}", error.unwrap_err())).collect();
                assert_eq!(errors.len(), 1, "{what}: {errors:?}");
                let error = errors.into_iter().next().unwrap();
                assert!(error.starts_with(&format!("OutOfStep {{ rank: {culprit},")), "{what}: {error}");
                works(&mut ranks, &case, &one);
                works(&mut ranks, &case, &other);
            }
        });
    }
}

/// The one fault of a world's `results`; some ranks may have been done before it. Ranks that are apart may come upon it
/// at the same time, each with a wait of its own: they name the same rank, and why.
fn fault(results: &[Result<(), Error>]) -> Arc<Fault> {
    let faults = results.iter().filter_map(|result| match result {
        Ok(()) => None,
        Err(Error::Fault(fault)) => Some(fault),
        Err(other) => panic!("{other}"),
    });
    let faults: Vec<_> = faults.collect();
    let alike = |fault: &&Arc<Fault>| match apart() {
        true => (fault.rank, &fault.cause) == (faults[0].rank, &faults[0].cause),
        false => **fault == *faults[0],
    };
    assert!(!faults.is_empty() && faults.iter().all(alike), "{faults:?}");
    faults[0].clone()
}

/// Whether ranks have engines of their own.
fn apart() -> bool {
    std::env::var("RAILHOP_ENGINE").is_ok_and(|engine| engine == "apart")
}

/// Poisoned: every operation fails at once with `fault`. After a reset everything works again.
fn recovers(ranks: &mut Ranks, case: &Case, fault: &Arc<Fault>) {
    for comm in &mut ranks.comms {
        // `within` ends it.
        while comm.fault().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let poisoned = comm.plan(case.routing(comm.rank())).unwrap_err();
        assert_eq!(self::fault(&[Err(poisoned.clone())]).rank, fault.rank);
        assert!(apart() || poisoned == Error::Fault(fault.clone()));
        let buffer = comm.recv_buffer(0, BF16).unwrap();
        let failed = comm.plan_dispatch(case.routing(comm.rank()), case.x(comm.rank()), buffer).unwrap_err();
        assert_eq!(failed.error, poisoned);
        assert!(!failed.input.0.is_empty() && failed.input.1.is_none());
    }
    assert!(ranks.at_once(|comm| comm.reset()).iter().all(Result::is_ok));
    ranks.round_trip(case);
}

fn start(kind: Kind, comm: &mut Communicator, case: &Case, handle: &Handle) -> Outcome {
    match kind {
        Kind::Plan => outcome!(comm.start_plan(case.routing(comm.rank()))),
        Kind::Dispatch => {
            let buffer = comm.recv_buffer(handle.num_recv_tokens(), case.shape).unwrap();
            outcome!(comm.start_dispatch(handle, case.x(comm.rank()), buffer))
        }
        Kind::PlanDispatch => {
            let buffer = comm.recv_buffer(handle.num_recv_tokens(), case.shape).unwrap();
            outcome!(comm.start_plan_dispatch(case.routing(comm.rank()), case.x(comm.rank()), buffer))
        }
        Kind::Combine => start_combine(comm, handle, case.shape.hidden, false),
    }
}

const KINDS: [Kind; 4] = [Kind::Plan, Kind::Dispatch, Kind::PlanDispatch, Kind::Combine];

/// Healthy ranks wait for others that wait for the absent one; it alone is blamed.
#[test]
fn a_rank_that_never_enters_is_named() {
    for (nodes, ranks_per_node, absent) in [(2, 2, 3), (1, 3, 1), (3, 1, 0), (3, 2, 4)] {
        within(LIMIT, move || {
            for kind in KINDS {
                let (_, case, mut ranks) = hasty(nodes, ranks_per_node);
                let handles = ranks.plan(&case);
                works(&mut ranks, &case, &handles);
                let begun = Instant::now();
                let start = |comm: &mut Communicator| {
                    let rank = comm.rank();
                    (rank != absent).then(|| start(kind, comm, &case, &handles[rank]))
                };
                let started = ranks.each(start).into_iter().flatten().collect();
                let results = outcomes(started);
                assert!(results.iter().all(Result::is_err));
                let fault = fault(&results);
                assert_eq!((fault.rank, &fault.cause), (absent, &Cause::Deadline(SHORT)), "{fault}");
                let wait = fault.wait.unwrap();
                assert_eq!((wait.role, wait.peer, fault.kind), (Role::Receiver, absent, kind), "{fault}");
                assert!(begun.elapsed() >= SHORT && begun.elapsed() < 20 * SHORT);
                recovers(&mut ranks, &case, &fault);
            }
        });
    }
}

#[test]
fn a_rank_that_left_is_named_at_once() {
    for (nodes, ranks_per_node, culprit) in WORLDS {
        within(LIMIT, move || {
            for kind in KINDS {
                // The deadline is 100 s.
                let (_, case, mut ranks) = world(nodes, ranks_per_node);
                let handles = ranks.plan(&case);
                works(&mut ranks, &case, &handles);
                let leaver = ranks.comms.remove(culprit);
                let started = ranks.each(|comm| start(kind, comm, &case, &handles[comm.rank()]));
                drop(leaver);
                let results = outcomes(started);
                assert!(results.iter().all(Result::is_err));
                let fault = fault(&results);
                assert_eq!((fault.rank, &fault.cause), (culprit, &Cause::Departed), "{fault}");
            }
        });
    }
}

/// A dispatch and a combine run on lanes of their own, so that nobody learns of the other's start.
#[test]
fn crossed_lanes_end_with_the_deadline() {
    within(LIMIT, || {
        let (_, case, mut ranks) = hasty(2, 2);
        let handles = ranks.plan(&case);
        works(&mut ranks, &case, &handles);
        let started = ranks.each(|comm| {
            let kind = if comm.rank() == 2 { Kind::Combine } else { Kind::Dispatch };
            start(kind, comm, &case, &handles[comm.rank()])
        });
        let fault = fault(&outcomes(started));
        assert_eq!(fault.cause, Cause::Deadline(SHORT));
        recovers(&mut ranks, &case, &fault);
    });
}

#[test]
fn a_reset_names_who_did_not_come() {
    within(LIMIT, || {
        let (_, case, mut ranks) = hasty(2, 2);
        let incomplete = ranks.at_once(|comm| match comm.rank() {
            2 => None,
            rank => {
                // Not all give up at the same moment.
                std::thread::sleep(SHORT / 6 * rank as u32);
                Some(comm.reset().unwrap_err())
            }
        });
        for error in incomplete.into_iter().flatten() {
            assert_eq!(error, Error::ResetIncomplete { missing: vec![2], after: SHORT });
        }
        assert!(ranks.at_once(|comm| comm.reset()).iter().all(Result::is_ok));
        ranks.round_trip(&case);
    });
}

/// Memory that peers may still touch is not lent again before a reset.
#[test]
fn a_fault_retires_buffers_until_the_reset() {
    within(LIMIT, || {
        let (config, case, mut ranks) = hasty(2, 1);
        let shape = RowShape { hidden: 512, ..BF16 };
        let most = config.memory().pool / 1200;
        let handles = ranks.plan(&case);
        let buffer = ranks.comms[0].recv_buffer(most, shape).unwrap();
        let x = vec![bf16::ONE; 6 * 512];
        let failed = ranks.comms[0].dispatch(&handles[0], x, buffer).unwrap_err();
        let Error::Fault(fault) = failed.error else { panic!("{}", failed.error) };
        assert!(failed.input.1.is_none() && failed.input.0.len() == 6 * 512);
        assert!(matches!(ranks.comms[0].recv_buffer(most, shape), Err(Error::PoolExhausted { .. })));
        recovers(&mut ranks, &case, &fault);
        assert!(ranks.comms[0].recv_buffer(most, shape).is_ok());
    });
}

/// Loses, while armed, what goes from one rank to a word of another.
struct Lossy {
    inner: Arc<dyn Fabric>,
    lost: (usize, usize, usize),
    armed: Arc<AtomicBool>,
}

impl Fabric for Lossy {
    fn put(&self, from: usize, to: usize, offset: usize, parts: &[&[u8]]) {
        self.inner.put(from, to, offset, parts);
    }

    fn signal(&self, from: usize, to: usize, word: usize, value: u64) {
        if (from, to, word) != self.lost || !self.armed.load(Ordering::Relaxed) {
            self.inner.signal(from, to, word, value);
        }
    }
}

/// A signal to lose, the operation it belongs to, and the waits that may end that one. A full ring and a lost
/// credit make a cycle of two: either is its end.
type Loss = (Kind, WordId, (usize, usize), &'static [(Role, &'static str, usize)]);

/// In a world of 2 × 2 ranks, with rings of 2 slots for the credits and of 16 otherwise.
const LOSSES: [Loss; 11] = {
    use Kind::{Combine, Dispatch, Plan};
    use Role::{Forwarder, Receiver, Reducer, Sender};
    [
        (
            Dispatch,
            WordId::Head { channel: 0, node: 1 },
            (2, 0),
            &[(Sender, "credit", 2), (Forwarder, "tail", 0)],
        ),
        (Dispatch, WordId::Tail { channel: 0, node: 0 }, (0, 2), &[(Forwarder, "tail", 0)]),
        (
            Combine,
            WordId::Head { channel: 0, node: 1 },
            (2, 0),
            &[(Forwarder, "credit", 2), (Reducer, "tail", 0)],
        ),
        (Combine, WordId::Tail { channel: 0, node: 0 }, (0, 2), &[(Reducer, "tail", 0)]),
        (Plan, WordId::Enter { local: 1 }, (1, 0), &[(Receiver, "enter record", 1)]),
        (Dispatch, WordId::Rail { node: 1 }, (2, 0), &[(Receiver, "rail record", 2)]),
        (Plan, WordId::Gathered { local: 1 }, (1, 0), &[(Receiver, "gathered counts", 1)]),
        (Dispatch, WordId::Verdict { node: 1 }, (2, 0), &[(Receiver, "verdict", 2)]),
        (Combine, WordId::Verdict { node: 0 }, (1, 3), &[(Receiver, "verdict", 1)]),
        (Dispatch, WordId::Done { local: 1, channel: 0 }, (1, 0), &[(Receiver, "arrivals", 1)]),
        (Combine, WordId::Done { local: 0, channel: 0 }, (2, 3), &[(Receiver, "arrivals", 2)]),
    ]
};

#[test]
fn every_wait_of_every_role_ends() {
    let run = |(kind, lost, (from, to), expected): Loss| {
        let slots = if matches!(lost, WordId::Head { .. }) { 2 } else { 16 };
        let builder = config(2, 2).deadline(SHORT).channels(1).chunk_tokens(1).ring_slots(slots);
        let config = builder.build().unwrap();
        let word = RegionMap::new(&config).word(Lane::of(kind), lost);
        let armed = Arc::new(AtomicBool::new(false));
        let lossy = |inner| Arc::new(Lossy { inner, lost: (from, to, word), armed: armed.clone() }) as _;
        let mut ranks = Ranks::with_fabric(&config, lossy);
        let case = Case::regular(&config, BF16, 12);
        let handles = ranks.plan(&case);
        works(&mut ranks, &case, &handles);
        armed.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        let started = ranks.each(|comm| start(kind, comm, &case, &handles[comm.rank()]));
        let fault = fault(&outcomes(started));
        assert!(begun.elapsed() < 20 * SHORT);
        let wait = fault.wait.unwrap();
        assert_eq!((fault.rank, &fault.cause), (wait.peer, &Cause::Deadline(SHORT)), "{fault}");
        assert!(expected.contains(&(wait.role, wait.what, wait.peer)), "{lost:?} was lost, but: {fault}");
        assert_ne!(wait.expected, wait.seen);
        armed.store(false, Ordering::Relaxed);
        recovers(&mut ranks, &case, &fault);
    };
    within(LIMIT, move || {
        // Every loss is tried before any is reported.
        let failed = LOSSES.map(|loss| std::panic::catch_unwind(|| run(loss)).is_err());
        assert!(!failed.contains(&true), "{failed:?}");
    });
}

/// Panics once, in a put of rank 1.
struct Panicking(Arc<dyn Fabric>, AtomicBool);

impl Fabric for Panicking {
    fn put(&self, from: usize, to: usize, offset: usize, parts: &[&[u8]]) {
        assert!(from != 1 || self.1.swap(true, Ordering::Relaxed), "out of cables");
        self.0.put(from, to, offset, parts);
    }

    fn signal(&self, from: usize, to: usize, word: usize, value: u64) {
        self.0.signal(from, to, word, value);
    }
}

#[test]
fn a_panic_is_a_fault_of_all() {
    within(LIMIT, || {
        let (config, case, _) = world(2, 2);
        let mut ranks =
            Ranks::with_fabric(&config, |fabric| Arc::new(Panicking(fabric, AtomicBool::new(false))));
        let plans = ranks.each(|comm| outcome!(comm.start_plan(case.routing(comm.rank()))));
        let results = outcomes(plans);
        assert!(results.iter().all(Result::is_err));
        let fault = fault(&results);
        assert_eq!((fault.rank, &fault.cause), (1, &Cause::Panicked("out of cables".into())));
        recovers(&mut ranks, &case, &fault);
    });
}

/// What a careless caller does with a value.
#[derive(Debug, Clone, Copy)]
enum Carelessness {
    Drop,
    Forget,
}

impl Carelessness {
    fn lose<T>(self, value: T) {
        match self {
            Self::Drop => drop(value),
            Self::Forget => mem::forget(value),
        }
    }
}

const CARELESSNESS: [Carelessness; 2] = [Carelessness::Drop, Carelessness::Forget];

#[test]
fn lost_operations_go_on() {
    within(LIMIT, || {
        for (careless, kind) in CARELESSNESS.into_iter().flat_map(|lose| KINDS.map(|kind| (lose, kind))) {
            for first in [false, true] {
                let (_, case, mut ranks) = world(2, 2);
                let handles = ranks.plan(&case);
                works(&mut ranks, &case, &handles);
                // Rank 2 loses its operation before anybody else starts, or while all are at it.
                let mut started = Vec::new();
                let order = if first { [2, 0, 1, 3] } else { [0, 1, 3, 2] };
                for rank in order {
                    let operation = start(kind, &mut ranks.comms[rank], &case, &handles[rank]);
                    match rank {
                        2 => careless.lose(operation),
                        _ => started.push(operation),
                    }
                }
                assert!(outcomes(started).iter().all(Result::is_ok), "{careless:?} {kind}");
                works(&mut ranks, &case, &handles);
                ranks.round_trip(&case);
            }
        }
    });
}

#[test]
fn lost_results_cost_nobody_else_anything() {
    within(LIMIT, || {
        for careless in CARELESSNESS {
            let (_, case, mut ranks) = world(2, 2);
            for _ in 0..3 {
                let mut handles = ranks.plan(&case);
                let mut received = ranks.dispatch(&handles, BF16, |rank| case.x(rank));
                let y = ranks.experts(&case, &received);
                careless.lose(received.remove(2));
                careless.lose(ranks.comms[2].recv_buffer(7, BF16).unwrap());
                let mut home = ranks.combine(&handles, y.into_iter().map(Combine::new));
                careless.lose(home.remove(2));
                careless.lose(handles.remove(2));
                case.verify(3, &handles[2], &received[2].buffer, &home[2].x);
            }
            ranks.round_trip(&case);
        }
    });
}

/// What a rank leaves behind while its operation is under way: whoever still needs it gets a fault.
#[test]
fn lost_communicators_end_operations() {
    within(LIMIT, || {
        for (careless, kind) in CARELESSNESS.into_iter().flat_map(|lose| KINDS.map(|kind| (lose, kind))) {
            for (keeps_operation, first) in [(true, false), (true, true), (false, false), (false, true)] {
                let (_, case, mut ranks) = hasty(2, 2);
                let handles = ranks.plan(&case);
                works(&mut ranks, &case, &handles);
                let mut lost = ranks.comms.remove(2);
                let operation = first.then(|| start(kind, &mut lost, &case, &handles[2]));
                let others = ranks.each(|comm| start(kind, comm, &case, &handles[comm.rank()]));
                let operation = operation.unwrap_or_else(|| start(kind, &mut lost, &case, &handles[2]));
                careless.lose(lost);
                let results = match keeps_operation {
                    true => outcomes(others.into_iter().chain([operation]).collect()),
                    false => {
                        careless.lose(operation);
                        outcomes(others)
                    }
                };
                match keeps_operation {
                    true => assert!(results.iter().all(Result::is_ok), "{results:?}"),
                    false if results.iter().all(Result::is_ok) => {}
                    false => assert_eq!(fault(&results).rank, 2),
                }
                let next = ranks.each(|comm| outcome!(comm.start_plan(case.routing(comm.rank()))));
                assert_eq!(fault(&outcomes(next)).rank, 2);
            }
        }
    });
}

/// Blocks come back to the pool when lost operations are over.
#[test]
fn dropped_operations_return_their_buffers() {
    within(LIMIT, || {
        let (config, case, mut ranks) = world(1, 2);
        let whole = config.memory().pool / 1200;
        let shape = RowShape { hidden: 512, ..BF16 };
        for _ in 0..3 {
            let handles = ranks.plan(&case);
            for comm in &mut ranks.comms {
                let buffer = comm.recv_buffer(whole, shape).unwrap();
                drop(comm.start_dispatch(&handles[comm.rank()], vec![bf16::ONE; 6 * 512], buffer));
            }
            // Over, as the next operation of the lane is.
            ranks.plan(&case);
        }
        ranks.round_trip(&case);
    });
}

#[test]
fn a_reset_does_not_wait_for_a_rank_that_has_left() {
    within(LIMIT, || {
        let config = Config::builder(Topology::new(1, 3).unwrap()).experts(3).build().unwrap();
        let results = local_world(&config).run(|mut comm| match comm.rank() {
            2 => None,
            // Kept until all are back: it must not leave as well.
            _ => Some((comm.reset(), comm)),
        });
        for (result, _) in results.iter().flatten() {
            let Err(Error::ResetIncomplete { missing, .. }) = result else { panic!("{result:?}") };
            assert_eq!(*missing, [2]);
        }
    });
}
