//! The shim as a driver: what engines rely on of any driver, on a machine that runs beside them.
#![allow(unsafe_code, reason = "drivers take addresses")]
#![cfg(all(target_os = "linux", target_arch = "x86_64"))] // What the shim runs on.

#[path = "common/rows.rs"]
mod rows;
mod shim;

use std::fs;
use std::ptr::read_volatile;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytemuck::{Pod, bytes_of};
use railhop::device::{Driver, Event, Grid, Kernel, Memory, Place, Stream};
use railhop::error::DeviceError;
use railhop::fabric::rail::{DeviceRail, Inbox, Outbox, Rail, RailError, Reached, StagedRail};
use railhop::wire::posting::Posting;
use railhop::wire::word::Word;

use rows::{GRID, MisplacedOrder, Rows, holding};
use shim::drivers;

fn one(seed: u64) -> Arc<dyn Driver> {
    drivers(1, 1, seed).remove(0)
}

/// What memory holds that nothing writes any more.
fn contents<T: Pod>(memory: &Memory) -> Vec<T> {
    let at = memory.address() as *const T;
    // SAFETY: within the memory, which is aligned for anything; nobody writes it.
    (0..memory.bytes() / size_of::<T>()).map(|i| unsafe { read_volatile(at.add(i)) }).collect()
}

/// Multiplies each row with the f32 that stands at the start of a row of `scales`.
fn launch(rows: &Rows, driver: &dyn Driver, stream: &Stream, scales: &Memory) {
    rows.launch(driver, stream, scales.address(), scales.bytes() / rows.rows);
}

fn assert_all(rows: &Rows, value: f32) {
    assert!(contents::<f32>(&rows.out).iter().all(|&x| x == value), "all are {value}");
}

/// Makes `event` stand for what is on `stream`.
fn record(driver: &dyn Driver, event: &Event, stream: &Stream) {
    // SAFETY: both are alive.
    unsafe { driver.record(event.raw(), stream.raw()).unwrap() }
}

fn synchronize(driver: &dyn Driver, stream: &Stream) -> Result<(), DeviceError> {
    // SAFETY: it is alive.
    unsafe { driver.synchronize(stream.raw()) }
}

fn until_done(event: &Event) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !event.is_done().unwrap() {
        assert!(Instant::now() < deadline, "the event is never done");
        thread::sleep(Duration::from_micros(50));
    }
}

#[test]
fn memory_is_zeroed_and_aligned() {
    let driver = one(1);
    for place in [Place::Shared, Place::Device, Place::Host] {
        for bytes in [0, 1, 300, 1 << 20] {
            let memory = Memory::new(&driver, place, bytes).unwrap();
            assert_eq!((memory.address() % 256, memory.bytes()), (0, bytes));
            assert!(contents::<u8>(&memory).iter().all(|&byte| byte == 0));
            assert_eq!(memory.reached_by(&*driver).unwrap(), memory.address());
        }
    }
}

#[test]
fn copies_are_made() {
    let driver = one(2);
    let stream = Stream::new(&driver).unwrap();
    let values: Vec<u8> = (0..=255).collect();
    let (from, to) =
        (holding(&driver, Place::Host, &values), Memory::new(&driver, Place::Shared, 256).unwrap());
    for (at, bytes) in [(0, 8), (8, 3), (11, 8), (19, 237)] {
        // SAFETY: within both memories; nothing else uses them.
        unsafe { stream.copy_now(to.address() + at, from.address() + at, bytes).unwrap() };
    }
    assert_eq!(contents::<u8>(&to), values);
}

/// Each kernel reads what another stream's has written, and starts after it.
#[test]
fn streams_wait_for_events_of_others() {
    for seed in 0..4 {
        let driver = one(seed);
        let streams = [(); 2].map(|()| Stream::new(&driver).unwrap());
        let first = holding(&driver, Place::Device, &[2.5f32; 512]);
        let stages: Vec<_> = (0..6).map(|_| Rows::new(&driver, Place::Device, 512)).collect();
        let events: Vec<_> = stages.iter().map(|_| Event::new(&driver).unwrap()).collect();
        assert!(events[0].is_done().unwrap(), "done until it is recorded");
        for (stage, rows) in stages.iter().enumerate() {
            let stream = &streams[stage % 2];
            if stage > 0 {
                // SAFETY: both are alive.
                unsafe { driver.wait(stream.raw(), events[stage - 1].raw()).unwrap() };
            }
            let scales = if stage == 0 { &first } else { &stages[stage - 1].out };
            launch(rows, &*driver, stream, scales);
            record(&*driver, &events[stage], stream);
        }
        events.iter().zip(&stages).for_each(|(event, rows)| {
            until_done(event);
            assert_all(rows, 2.5);
        });
        for stream in &streams {
            synchronize(&*driver, stream).unwrap();
        }
    }
}

#[test]
fn threads_launch_at_once() {
    let ranks = drivers(4, 2, 5);
    thread::scope(|scope| {
        for (rank, driver) in ranks.iter().enumerate() {
            for half in [0.5, 1.0] {
                scope.spawn(move || {
                    let stream = Stream::new(driver).unwrap();
                    for turn in 1..=20 {
                        // Memory and launch one after the other, while the machine runs others' kernels.
                        let (scale, rows) =
                            ((turn + rank) as f32 * half, Rows::new(driver, Place::Device, 16));
                        let scales = holding(driver, Place::Device, &[scale; 16]);
                        launch(&rows, &**driver, &stream, &scales);
                        synchronize(&**driver, &stream).unwrap();
                        assert_all(&rows, scale);
                    }
                });
            }
        }
    });
}

/// An event that is done stands for what comes later once it is recorded again.
#[test]
fn events_stand_for_what_was_recorded_last() {
    let driver = one(6);
    let (stream, other) = (Stream::new(&driver).unwrap(), Stream::new(&driver).unwrap());
    let (short, long) = (Rows::new(&driver, Place::Device, 4), Rows::new(&driver, Place::Device, 4096));
    let scales = holding(&driver, Place::Device, &vec![3.0f32; 4096]);
    let few = holding(&driver, Place::Device, &[2.0f32; 4]);
    let event = Event::new(&driver).unwrap();
    launch(&short, &*driver, &stream, &few);
    record(&*driver, &event, &stream);
    (0..4).for_each(|_| launch(&long, &*driver, &other, &scales));
    until_done(&event);
    assert_all(&short, 2.0);
    record(&*driver, &event, &other);
    until_done(&event);
    assert_all(&long, 3.0);
    synchronize(&*driver, &other).unwrap();
}

#[test]
fn impossible_launches_are_refused() {
    let driver = one(7);
    let stream = Stream::new(&driver).unwrap();
    let most = driver.limits().shared;
    for (warps, shared) in [(0, 0), (17, 0), (1, most + 1)] {
        assert!(driver.prepare(Kernel::Plan, Grid { blocks: 1, warps, shared }).is_err());
    }
    assert!(driver.prepare(Kernel::Plan, Grid { blocks: 1, warps: 16, shared: most }).unwrap() > 1000);
    // SAFETY: parameters of the wrong size are refused.
    let launched = unsafe { driver.launch(stream.raw(), Kernel::Dequantise, GRID, &[0; 8]) };
    assert!(matches!(launched, Err(DeviceError::Call { .. })));
    synchronize(&*driver, &stream).unwrap();
}

/// A check that fails is what every later call says.
#[test]
fn failed_checks_are_errors() {
    let driver = one(8);
    let stream = Stream::new(&driver).unwrap();
    let order = MisplacedOrder::new(&driver);
    order.launch(&*driver, &stream);
    let failed = |error: DeviceError| {
        let said = error.to_string();
        assert!(said.contains("shim failed") && said.contains("gpu scope on shared memory"), "{said}");
    };
    failed(synchronize(&*driver, &stream).unwrap_err());
    failed(driver.new_event().unwrap_err());
    failed(driver.allocate(Place::Host, 8).unwrap_err());
}

/// Whether a thread of this process is named so.
fn is_running(name: &str) -> bool {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.into_iter().any(|found| found.trim() == name)
}

/// The machine's thread ends with the last driver, whatever is under way.
#[test]
fn the_last_driver_takes_the_machine_along() {
    let mut ranks = drivers(3, 3, 0xD209);
    let driver = ranks.pop().unwrap();
    drop(ranks);
    let name = "shim d209";
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_running(name) {
        assert!(Instant::now() < deadline, "the machine has a thread");
    }
    let rows = Rows::new(&driver, Place::Device, 1 << 14);
    let scales = holding(&driver, Place::Device, &vec![1.0f32; 1 << 14]);
    let stream = driver.new_stream().unwrap();
    let params = rows.params(scales.address(), 4);
    // SAFETY: what the kernel takes; freed memory stays until the machine is gone.
    unsafe { driver.launch(stream, Kernel::Dequantise, GRID, bytes_of(&params)).unwrap() };
    drop((rows, scales, driver));
    while is_running(name) {
        assert!(Instant::now() < deadline, "its thread has ended");
    }
}

// ---- rails

/// A posting of `bytes` bytes from and to the same offset, on the only queue to rank 1.
fn posting(offset: usize, bytes: usize, value: u64) -> Posting {
    let completion = (bytes > 0).then_some(8);
    Posting {
        peer: 1,
        queue: 0,
        source: offset,
        target: offset,
        bytes,
        word: 0,
        completion,
        value: Word(value),
    }
}

/// Two ranks, the private memory of one and the region of the other, and rails between them.
struct Ends {
    rails: Vec<Box<dyn Rail>>,
    private: Memory,
    region: Memory,
    drivers: Vec<Arc<dyn Driver>>,
}

fn ends(room: usize) -> Ends {
    let drivers = drivers(2, 1, 9);
    let private = Memory::new(&drivers[0], Place::Device, 4096).unwrap();
    let region = Memory::new(&drivers[1], Place::Shared, 4096).unwrap();
    let reached = |memory: &Memory| Reached { address: memory.address(), bytes: memory.bytes() };
    // SAFETY: the memories outlive the rails, and the tests wait.
    let rails: Vec<Box<dyn Rail>> = unsafe {
        let outbox = Outbox::new(&drivers[0], reached(&private), room).unwrap();
        let inboxes = vec![None, Some(Inbox::new(&drivers[1], reached(&region)).unwrap())];
        let regions = vec![None, Some(reached(&region))];
        vec![
            Box::new(DeviceRail::new(&drivers[0], reached(&private), regions).unwrap()),
            Box::new(StagedRail::new(outbox, inboxes)),
        ]
    };
    Ends { rails, private, region, drivers }
}

#[test]
fn rails_deliver_in_order_with_little_room() {
    let Ends { rails, private, region, drivers } = ends(256);
    let stream = Stream::new(&drivers[0]).unwrap();
    for mut rail in rails {
        let mut completions = Vec::new();
        for value in 1..200u64 {
            let (offset, bytes) = (64 + (value as usize * 56) % 3000, [0, 8, 100, 256][value as usize % 4]);
            let data = vec![value as u8; 256];
            let mut got = vec![0u8; bytes];
            // SAFETY: in range, and nothing is under way.
            unsafe {
                stream.copy_now(private.address() + offset as u64, data.as_ptr() as u64, bytes).unwrap()
            };
            while rail.post(&[posting(offset, bytes, value)]).unwrap() == 0 {
                rail.poll(&mut completions).unwrap();
            }
            while !rail.is_idle() {
                rail.poll(&mut completions).unwrap();
            }
            let mut word = 0u64;
            // SAFETY: as above.
            unsafe {
                stream.copy_now(got.as_mut_ptr() as u64, region.address() + offset as u64, bytes).unwrap();
                stream.copy_now(&raw mut word as u64, region.address(), 8).unwrap();
            }
            assert!((word, &got[..]) == (value, &data[..bytes]));
        }
        let values: Vec<u64> = completions.iter().map(|completion| completion.value.0).collect();
        let with_data: Vec<u64> = (1..200).filter(|value| value % 4 != 0).collect();
        assert_eq!(values, with_data);
    }
}

#[test]
fn rails_take_what_there_is_room_for() {
    let mut ends = ends(256);
    for rail in &mut ends.rails {
        let postings: Vec<_> = (1..=10).map(|value| posting(64, 100, value)).collect();
        let (mut taken, mut completions) = (0, Vec::new());
        while taken < postings.len() || !rail.is_idle() {
            taken += rail.post(&postings[taken..]).unwrap();
            rail.poll(&mut completions).unwrap();
        }
        assert!(completions.iter().map(|completion| completion.value.0).eq(1..=10));
    }
}

#[test]
fn rails_refuse_what_is_outside() {
    let mut ends = ends(256);
    for rail in &mut ends.rails {
        let outside = [
            posting(4090, 8, 1),
            Posting { target: 4090, ..posting(64, 8, 1) },
            Posting { word: 4092, ..posting(64, 8, 1) },
            Posting { peer: 0, ..posting(64, 8, 1) },
            Posting { peer: 7, ..posting(64, 8, 1) },
        ];
        for posting in outside {
            // The staged rail sees the far end when the data has come.
            let outcome = rail.post(&[posting]).and_then(|_| rail.poll(&mut Vec::new()));
            assert!(matches!(outcome, Err(RailError::OutOfRange { .. })), "{posting:?}: {outcome:?}");
        }
    }
}
