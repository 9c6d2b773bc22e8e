//! The CUDA engine over the CPU shim: everything but the calls of the driver itself.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))] // What the shim runs on.
#![allow(unsafe_code, reason = "memory and streams of the caller's have contracts")]

mod common;
#[path = "common/device.rs"]
mod device;

use std::time::{Duration, Instant};

use common::{BF16, Case, LIMIT, Ranks, config, contents, data, within};
use device::{OnDevice, TOKENS, blamed, dispatch, fill, full, layers, outcome, seen};
use railhop::config::{Rails, Staging};
use railhop::device::Limits;
use railhop::error::{DeviceError, Reason};
use railhop::reference::oracle::RankTokens;
use railhop::wire::device::WarpMap;
use railhop::wire::region::Lane;
use railhop::{
    Combine, Communicator, Config, Cuda, Dispatched, EngineKind, Error, LocalWorld, RowFormat, RowShape,
    ScaleFormat,
};

#[test]
fn traces_are_the_host_engines() {
    device::check_trace(&data("small.safetensors"), 64, Ranks::on_shim);
}

/// A world on the shim.
fn on_shim(config: &Config) -> OnDevice {
    let topology = config.topology();
    OnDevice::new(config, common::shim::drivers(topology.world_size(), topology.ranks_per_node(), 2))
}

#[test]
fn a_round_trip_works() {
    within(LIMIT, || {
        let config = config(2, 2).build().unwrap();
        Ranks::on_shim(&config).round_trip(&Case::regular(&config, BF16, 6));
    });
}

// ---- rows in device memory

#[test]
fn rows_in_device_memory_are_used_where_they_are() {
    within(LIMIT, || {
        let config = config(2, 2).build().unwrap();
        let case = Case::random(&config, BF16, 20, 5);
        let expected = outcome(Ranks::on_host(&config), std::slice::from_ref(&case));
        let mut world = on_shim(&config);
        let mut results = Vec::new();
        for rank in 0..4 {
            let (routing, x) = (world.routing(&case, rank), world.of(rank, &case.ranks[rank].x));
            let stream = world.stream(rank);
            let comm = &mut world.ranks.comms[rank];
            comm.use_stream(Some(stream));
            comm.after(stream).unwrap();
            let buffer = comm.recv_buffer(80, case.shape).unwrap();
            results.push(comm.start_plan_dispatch(routing, x, buffer));
        }
        let received = results.into_iter().map(|pending| pending.wait().unwrap()).collect::<Vec<_>>();
        let outputs = world.ranks.experts(&case, &received);
        let mut pending = Vec::new();
        for (rank, mut y) in outputs.into_iter().enumerate() {
            y.topk_weights_mut().copy_from_slice(received[rank].buffer.topk_weights());
            let (tokens, shape) = (received[rank].handle.num_tokens(), case.shape);
            let (out, weights) =
                (world.room(rank, tokens * shape.hidden), world.room(rank, tokens * shape.topk));
            let combine = Combine::new(y).device_out(out.clone()).with_device_topk_weights(weights.clone());
            let stream = world.stream(rank);
            let started = world.ranks.comms[rank].start_combine(&received[rank].handle, combine);
            started.before(stream).unwrap();
            pending.push((started, out, weights));
        }
        for (rank, (started, out, weights)) in pending.into_iter().enumerate() {
            let combined = started.wait().unwrap();
            assert!(combined.x.is_empty() && combined.topk_weights.is_empty());
            world.synchronize();
            let Dispatched { buffer, handle, .. } = &received[rank];
            let got = seen(buffer, handle, &world.read(rank, &out), &world.read(rank, &weights));
            assert!(got == expected[0][rank]);
        }
    });
}

#[test]
fn a_host_engine_refuses_rows_in_device_memory() {
    within(LIMIT, || {
        let config = config(2, 2).build().unwrap();
        let case = Case::regular(&config, BF16, 6);
        let (device, mut ranks) = (on_shim(&config), Ranks::on_host(&config));
        let handles = ranks.plan(&case);
        let x = device.of(2, &case.ranks[2].x);
        let mut buffers = ranks.buffers(&handles, case.shape).into_iter();
        let pending: Vec<Box<dyn FnOnce() -> Option<Error>>> = ranks.each(|comm| {
            let (handle, buffer) = (&handles[comm.rank()], buffers.next().unwrap());
            match comm.rank() {
                2 => {
                    let pending = comm.start_dispatch(handle, x.clone(), buffer);
                    Box::new(|| pending.wait().err().map(Error::from)) as _
                }
                rank => {
                    let pending = comm.start_dispatch(handle, case.x(rank), buffer);
                    Box::new(|| pending.wait().err().map(Error::from)) as _
                }
            }
        });
        let wrong = Error::Refused { rank: 2, reason: Reason::WrongMemory };
        assert!(pending.into_iter().all(|wait| wait() == Some(wrong.clone())));
        ranks.round_trip(&case);
    });
}

// ---- recorded operations

#[test]
fn recorded_operations_follow_what_lies_in_memory() {
    within(LIMIT, || {
        let config = config(2, 2).first_index((1 << 48) - 3).build().unwrap();
        let mut world = on_shim(&config);
        let mut layers = layers(&mut world, BF16, 4 * TOKENS);
        for seed in 0..6 {
            let case = Case { ranks: full(&config, seed), ..Case::regular(&config, BF16, TOKENS) };
            fill(&world, &layers, &case);
            let rows = dispatch(&world, &layers);
            let mut host = Ranks::on_host(&config);
            let handles = host.plan(&case);
            let received = host.dispatch(&handles, BF16, |rank| case.x(rank));
            for (rank, layer) in layers.iter_mut().enumerate() {
                assert_eq!(rows[rank], Ok(handles[rank].num_recv_tokens()));
                let (_, _, buffer) = layer.dispatch.kept();
                buffer.refresh();
                buffer.set_rows(handles[rank].num_recv_tokens());
                assert!(contents(buffer) == contents(&received[rank].buffer));
                let (outputs, rows) = (layer.combine.kept().outputs_mut(), buffer.bf16().len());
                outputs.bf16_mut()[..rows].copy_from_slice(buffer.bf16());
                outputs.refresh();
                buffer.set_rows(buffer.capacity());
            }
            for (rank, layer) in layers.iter().enumerate() {
                // SAFETY: waited for below; every rank does the same.
                unsafe { layer.combine.enqueue(world.stream(rank)).unwrap() };
            }
            world.synchronize();
            let received = received.into_iter().map(|received| Combine::new(received.buffer));
            let combined = host.combine(&handles, received.collect::<Vec<_>>());
            for (rank, layer) in layers.iter().enumerate() {
                assert!(layer.combine.outcome().unwrap().is_ok());
                assert!(common::bits(&world.read(rank, &layer.out)) == common::bits(&combined[rank].x));
            }
            // Operations of the host's come in between.
            world.ranks.round_trip(&case);
        }
    });
}

#[test]
fn a_recorded_dispatch_says_when_its_buffer_is_too_small() {
    within(LIMIT, || {
        let config = config(2, 2).build().unwrap();
        let mut world = on_shim(&config);
        // Token t names the experts t to t + 3 of 8: ranks get 28 of the 48 tokens.
        let layers = layers(&mut world, BF16, 20);
        fill(&world, &layers, &Case::regular(&config, BF16, TOKENS));
        let outcomes = dispatch(&world, &layers);
        let Err(Error::Refused { reason: Reason::BufferTooSmall { needed, capacity }, .. }) = outcomes[0]
        else {
            panic!("{:?}", outcomes[0])
        };
        assert!(needed > capacity && outcomes.iter().all(|outcome| *outcome == outcomes[0]));
        let nobody = Case::regular(&config, BF16, TOKENS);
        let masked = |rank: RankTokens<'static>| RankTokens {
            topk_idx: rank.topk_idx.iter().enumerate().map(|(i, &e)| if i < 8 { e } else { -1 }).collect(),
            ..rank
        };
        fill(&world, &layers, &Case { ranks: nobody.ranks.into_iter().map(masked).collect(), ..nobody });
        assert!(dispatch(&world, &layers).iter().all(|outcome| outcome.is_ok()));
    });
}

#[test]
fn a_recorded_operation_that_a_rank_misses_is_a_fault_until_the_reset() {
    within(LIMIT, || {
        let config = config(2, 2).deadline(Duration::from_millis(300)).build().unwrap();
        let mut world = on_shim(&config);
        let layers = layers(&mut world, BF16, 4 * TOKENS);
        let case = Case::regular(&config, BF16, TOKENS);
        fill(&world, &layers, &case);
        let fault = blamed(&world, &layers, 2);
        assert_eq!(fault.rank, 2, "{fault}");
        world.ranks.at_once(|comm| comm.reset().unwrap());
        let stale = Error::Refused { rank: 0, reason: Reason::StaleHandle };
        // SAFETY: nothing is enqueued.
        assert_eq!(unsafe { layers[0].dispatch.enqueue(world.stream(0)) }, Err(stale));
        world.ranks.round_trip(&case);
    });
}

#[test]
fn what_lies_on_the_host_is_not_recorded() {
    let config = config(1, 2).build().unwrap();
    let case = Case::regular(&config, BF16, TOKENS);
    let mut world = on_shim(&config);
    let routing = world.routing(&case, 0);
    let comm = &mut world.ranks.comms[0];
    let wrong = Error::Refused { rank: 0, reason: Reason::WrongMemory };
    let buffer = comm.recv_buffer(24, BF16).unwrap();
    let recorded = comm.record_plan_dispatch(routing.clone(), case.x(0), buffer);
    assert_eq!(recorded.err(), Some(wrong.clone()));
    let mut host = Ranks::on_host(&config);
    let (comm, x) = (&mut host.comms[0], world.of(0, &case.ranks[0].x));
    let buffer = comm.recv_buffer(24, BF16).unwrap();
    assert_eq!(comm.record_plan_dispatch(routing, x, buffer).err(), Some(wrong));
}

// ---- limits

fn refused(config: &Config, kernels: Cuda, limits: Limits) -> Error {
    let topology = config.topology();
    let drivers = common::shim::drivers_with(limits, topology.world_size(), topology.ranks_per_node(), 3);
    let config = config.clone().on(EngineKind::Cuda(kernels));
    LocalWorld::on_drivers(config, drivers).err().expect("refused")
}

#[test]
fn what_the_device_can_not_run_is_refused_at_the_start() {
    let (config, limits) = (config(1, 4).build().unwrap(), common::shim::limits());
    let small = common::small_kernels;
    // Two lanes of two blocks, of four ranks.
    let error = refused(&config, small(), Limits { sms: 15, ..limits.clone() });
    assert!(
        matches!(error, Error::Device(DeviceError::NotResident { ranks: 4, blocks: 4, resident: 15, .. })),
        "{error}"
    );
    let error = refused(&config, Cuda { overlap: false, ..small() }, Limits { sms: 7, ..limits.clone() });
    assert!(matches!(error, Error::Device(DeviceError::NotResident { blocks: 2, .. })), "{error}");
    let error = refused(&config, small(), Limits { connections: 15, ..limits.clone() });
    assert!(error.to_string().contains("CUDA_DEVICE_MAX_CONNECTIONS to 16"), "{error}");
    let error = refused(&config, small(), Limits { shared: 8 << 10, ..limits.clone() });
    assert!(matches!(&error, Error::Config(error) if error.field == "warps"), "{error}");
    for (kernels, field, nearest) in [
        (Cuda { blocks: 0, ..small() }, "blocks", 1),
        (Cuda { warps: 17, ..small() }, "warps", 16),
        (Cuda { blocks: 1, warps: 1, ..small() }, "warps", 2),
        (Cuda { devices: Vec::new(), ..small() }, "devices", 1),
        (Cuda { combine: Staging { stage_bytes: 1024, stages: 3 }, ..small() }, "stages", 4),
        (Cuda { dispatch: Staging { stage_bytes: 300, stages: 4 }, ..small() }, "stage_bytes", 512),
    ] {
        let Error::Config(error) = refused(&config, kernels, limits.clone()) else { panic!("{field}") };
        assert_eq!((error.field, error.nearest), (field, Some(nearest)));
    }
}

#[test]
fn lanes_that_must_not_overlap_run_one_after_the_other() {
    within(LIMIT, || {
        let config = config(2, 2).build().unwrap();
        let kernels = Cuda { overlap: false, ..common::small_kernels() };
        let drivers = common::shim::drivers_with(Limits { sms: 8, ..common::shim::limits() }, 4, 2, 4);
        let world = LocalWorld::on_drivers(config.clone().on(EngineKind::Cuda(kernels)), drivers).unwrap();
        let mut ranks = Ranks { comms: world.into_communicators() };
        let case = Case::random(&config, BF16, 20, 8);
        let handles = ranks.plan(&case);
        let received = ranks.dispatch(&handles, BF16, |rank| case.x(rank));
        let outputs = ranks.experts(&case, &received);
        let buffers = ranks.buffers(&handles, BF16);
        let started =
            ranks.comms.iter_mut().zip(outputs.into_iter().zip(buffers)).map(|(comm, (y, buffer))| {
                let handle = &handles[comm.rank()];
                let combine = comm.start_combine(handle, Combine::new(y));
                (combine, comm.start_dispatch(handle, case.x(comm.rank()), buffer))
            });
        for (rank, (combine, dispatch)) in started.collect::<Vec<_>>().into_iter().enumerate() {
            let (combined, received) = (combine.wait().unwrap(), dispatch.wait().unwrap());
            case.verify(rank, &handles[rank], &received.buffer, &combined.x);
        }
    });
}

#[test]
fn rails_go_by_way_of_the_host_where_they_must() {
    within(LIMIT, || {
        let config = config(3, 2).ring_slots(4).build().unwrap();
        let case = Case::random(&config, BF16, 30, 8);
        let kernels = Cuda { rails: Rails::Staged, ..common::small_kernels() };
        let drivers = common::shim::drivers(6, 2, 5);
        let world = LocalWorld::on_drivers(config.clone().on(EngineKind::Cuda(kernels)), drivers).unwrap();
        let staged = outcome(Ranks { comms: world.into_communicators() }, std::slice::from_ref(&case));
        assert!(staged == outcome(Ranks::on_host(&config), std::slice::from_ref(&case)));
    });
}

#[test]
fn more_operations_than_reports_queue_up() {
    within(LIMIT, || {
        let config = config(1, 2).build().unwrap();
        let case = Case::regular(&config, BF16, 4);
        let mut ranks = Ranks::on_shim(&config);
        ranks.at_once(|comm| {
            let pending: Vec<_> = (0..100).map(|_| comm.start_plan(case.routing(comm.rank()))).collect();
            pending.into_iter().for_each(|pending| drop(pending.wait().unwrap()));
        });
        ranks.round_trip(&case);
    });
}

#[test]
fn too_many_tokens_are_refused_by_all() {
    within(LIMIT, || {
        let config = config(2, 1).max_tokens(5).build().unwrap();
        let (case, more) = (Case::regular(&config, BF16, 5), Case::regular(&config, BF16, 6));
        let mut ranks = Ranks::on_shim(&config);
        let pending = ranks.each(|comm| match comm.rank() {
            0 => comm.start_plan(case.routing(0)),
            rank => comm.start_plan(more.routing(rank)),
        });
        let wrong = Error::Refused { rank: 1, reason: Reason::TooManyTokens { tokens: 6, max: 5 } };
        assert!(pending.into_iter().all(|pending| Error::from(pending.wait().unwrap_err()) == wrong));
        ranks.round_trip(&case);
    });
}

#[test]
fn a_world_that_goes_ends_what_is_under_way() {
    within(LIMIT, || {
        let config = config(2, 2).build().unwrap();
        let case = Case::regular(&config, BF16, 4);
        let started = Instant::now();
        // The default deadline is longer than this test may take.
        let mut ranks = Ranks::on_shim(&config);
        let pending = ranks.comms[0].start_plan(case.routing(0));
        drop(pending);
        drop(ranks);
        assert!(started.elapsed() < LIMIT / 2);
    });
}

#[test]
fn rows_that_do_not_fit_shared_memory_are_refused_before_anything_is_enqueued() {
    within(LIMIT, || {
        let config = config(1, 2).max_hidden(4096).build().unwrap();
        let shape = RowShape { hidden: 4096, topk: 2, format: RowFormat::Fp8(ScaleFormat::F32) };
        let dispatch = Staging { stage_bytes: 1024, stages: 8 };
        let kernels = Cuda { dispatch, ..common::small_kernels() };
        let plain = RowShape { format: RowFormat::Bf16, ..shape };
        let bytes = |shape| WarpMap::new(&config, Lane::Dispatch, dispatch, shape).bytes as usize;
        assert!(bytes(&plain) < bytes(&shape), "scales take some");
        // As much as rows without scales need.
        let limits = Limits { shared: kernels.warps * bytes(&plain), ..common::shim::limits() };
        let drivers = common::shim::drivers_with(limits, 2, 2, 6);
        let world = LocalWorld::on_drivers(config.clone().on(EngineKind::Cuda(kernels)), drivers).unwrap();
        let mut ranks = Ranks { comms: world.into_communicators() };
        let case = Case::regular(&config, plain, 3);
        let handles = ranks.plan(&case);
        let pending = ranks.each(|comm| {
            let buffer = comm.recv_buffer(6, shape).unwrap();
            comm.start_dispatch(&handles[comm.rank()], case.x(comm.rank()), buffer)
        });
        for pending in pending {
            let outcome = pending.wait().map(drop).map_err(Error::from);
            assert!(matches!(&outcome, Err(Error::Config(error)) if error.field == "warps"), "{outcome:?}");
        }
        ranks.round_trip(&case);
    });
}

#[test]
fn who_missed_an_operation_is_not_missed_after_the_reset() {
    within(LIMIT, || {
        let config = config(2, 2).deadline(Duration::from_millis(300)).build().unwrap();
        let (case, mut ranks) = (Case::regular(&config, BF16, 6), Ranks::on_shim(&config));
        let missing =
            |comm: &mut Communicator| (comm.rank() != 1).then(|| comm.start_plan(case.routing(comm.rank())));
        let pending = ranks.each(missing);
        assert!(pending.into_iter().flatten().all(|pending| pending.wait().is_err()));
        ranks.at_once(|comm| comm.reset().unwrap());
        let mut pending = ranks.each(|comm| comm.start_plan(case.routing(comm.rank())));
        // It has started all that the others have, and leaves.
        drop((pending.remove(1), ranks.comms.remove(1)));
        pending.into_iter().for_each(|pending| drop(pending.wait().unwrap()));
    });
}
