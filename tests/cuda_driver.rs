//! The CUDA driver as a device, over a CUDA that stands on the CPU shim (`kernels/shim/cuda`): the calls themselves,
//! their order and their errors. CUDA is opened once by a process and stays as it is, so every test runs in one of its
//! own.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))] // What the shim runs on.
#![allow(unsafe_code, reason = "drivers take addresses")]

mod common;
#[path = "common/rows.rs"]
mod rows;

use std::env;
use std::fs;
use std::io::{Read, Write};
use std::mem::{offset_of, size_of};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::ptr::null_mut;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytemuck::{Pod, Zeroable, bytes_of, cast_slice};
use common::shim::cuda_folder;
use common::{BF16, Case, LIMIT, Ranks, config, cuda_world, small_kernels, within};
use cudarc::driver::sys;
use railhop::device::cuda::{self, CudaDriver, ExportedMemory, FabricMemory, ImportedMemory};
use railhop::device::{Driver, Event, Grid, Kernel, Memory, Place, RawMemory, Stream};
use railhop::error::{DeviceError, Error, Reason};
use railhop::fabric::descriptor::{recv_fd, send_fd};
use railhop::{Config, EngineKind, LocalWorld, Routing};
use rows::{GRID, HIDDEN, MisplacedOrder, Rows, holding};

// ---- processes

/// Set in a test's own process.
const INSIDE: &str = "RAILHOP_TEST_INSIDE";
/// Of the test that is a second process.
const SOCKET: &str = "RAILHOP_TEST_SOCKET";

/// This test program, for one test and with the shim's CUDA.
fn process(test: &str, variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args([test, "--exact", "--test-threads", "1", "--nocapture"]);
    command.envs([("LD_LIBRARY_PATH", cuda_folder().to_str().unwrap()), (INSIDE, test)]);
    command.env("RAILHOP_ENGINE", "cuda").envs(variables.iter().copied());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The process has passed its test, and CUDA had nothing to complain of but what is expected.
fn passed(child: Child, complaint: &str) {
    let output = child.wait_with_output().unwrap();
    let [said, complained] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success() && said.contains("1 passed"), "{}\n{said}{complained}", output.status);
    let complaints: Vec<_> = complained.lines().filter(|line| line.starts_with("libcuda:")).collect();
    assert_eq!(complaints.is_empty(), complaint.is_empty(), "{complaints:?}");
    assert!(complaints.iter().all(|line| line.contains(complaint)), "{complaints:?}");
}

/// Runs `body` in a process of its own, where CUDA is what `variables` make it.
fn inside(test: &str, variables: &[(&str, &str)], body: impl FnOnce() + Send + 'static) {
    inside_complaining(test, variables, "", body);
}

fn inside_complaining(
    test: &str,
    variables: &[(&str, &str)],
    complaint: &str,
    body: impl FnOnce() + Send + 'static,
) {
    if env::var_os(INSIDE).is_some() {
        return within(LIMIT, body);
    }
    let cache = tempfile::tempdir().unwrap();
    let cache = [("RAILHOP_CACHE", cache.path().to_str().unwrap())];
    passed(process(test, &[&cache, variables].concat()).spawn().unwrap(), complaint);
}

// ---- devices

fn open(ordinal: usize) -> (Arc<CudaDriver>, Arc<dyn Driver>) {
    let driver = CudaDriver::open(ordinal).unwrap();
    (driver.clone(), driver)
}

/// Writes `values` to memory, and waits for that.
fn fill<T: Pod>(driver: &Arc<dyn Driver>, address: u64, values: &[T]) {
    let stream = Stream::new(driver).unwrap();
    // SAFETY: the callers' memory has room for them; nobody else uses it.
    unsafe { stream.copy_now(address, values.as_ptr() as u64, size_of_val(values)).unwrap() }
}

/// What stands at an address.
fn read<T: Pod>(driver: &Arc<dyn Driver>, address: u64, count: usize) -> Vec<T> {
    let mut values = vec![T::zeroed(); count];
    let stream = Stream::new(driver).unwrap();
    // SAFETY: as many bytes on both sides; nobody writes them.
    unsafe { stream.copy_now(values.as_mut_ptr() as u64, address, size_of_val(&*values)).unwrap() }
    values
}

fn is_unsupported<T>(result: Result<T, DeviceError>, expected: &str) {
    match result.err() {
        Some(DeviceError::Unsupported { device, what }) => {
            assert!(device == "Shim H100" && what.contains(expected), "{device} {what}");
        }
        other => panic!("{other:?}, not unsupported: {expected}"),
    }
}

fn is_refused<T>(result: Result<T, DeviceError>, name: &str, expected: &str) {
    match result.err() {
        Some(DeviceError::Call { call, reason }) => {
            assert!(call == name && reason.contains(expected), "{call}: {reason}");
        }
        other => panic!("{other:?}, not {name}: {expected}"),
    }
}

/// The layouts that `kernels/shim/cuda/cuda.hpp` asserts.
#[test]
fn layouts_are_as_the_shim_has_them() {
    assert_eq!(size_of::<sys::CUmemLocation>(), 8);
    assert_eq!(size_of::<sys::CUmemAllocationProp>(), 32);
    assert_eq!(offset_of!(sys::CUmemAllocationProp, location), 8);
    assert_eq!(
        offset_of!(sys::CUmemAllocationProp, allocFlags)
            + offset_of!(sys::CUmemAllocationProp_st__bindgen_ty_1, gpuDirectRDMACapable),
        25
    );
    assert_eq!((size_of::<sys::CUmemAccessDesc>(), offset_of!(sys::CUmemAccessDesc, flags)), (12, 8));
    assert_eq!(size_of::<sys::CUmemFabricHandle>(), 64);
    assert_eq!(size_of::<sys::CUlaunchConfig>(), 56);
    let offsets = [
        offset_of!(sys::CUlaunchConfig, sharedMemBytes),
        offset_of!(sys::CUlaunchConfig, hStream),
        offset_of!(sys::CUlaunchConfig, numAttrs),
    ];
    assert_eq!(offsets, [24, 32, 48]);
}

#[test]
fn devices_have_names_and_limits() {
    inside("devices_have_names_and_limits", &[("SHIM_CUDA_DEVICES", "2")], || {
        assert_eq!(cuda::devices().unwrap(), ["Shim H100"; 2]);
        let (first, second) = (CudaDriver::open(0).unwrap(), CudaDriver::open(1).unwrap());
        assert!(Arc::ptr_eq(&first, &CudaDriver::open(0).unwrap()), "a device has one driver");
        let limits = first.limits();
        assert_eq!((limits.device, second.limits().device), (0, 1));
        assert_eq!((limits.sms, limits.shared, limits.connections), (132, 227 << 10, 8));
        let kept = fs::read_dir(env::var("RAILHOP_CACHE").unwrap()).unwrap().count();
        // None where nvcc has compiled the kernels already.
        assert!(kept <= 1, "both have the same kernels");
    });
}

#[test]
fn devices_are_described() {
    for peers in ["1", "0"] {
        let variables = [("SHIM_CUDA_DEVICES", "2"), ("SHIM_CUDA_PEERS", peers)];
        inside("devices_are_described", &variables, || {
            let found = cuda::survey().unwrap();
            assert_eq!((&found[0].name[..], found[0].capability), ("Shim H100", (9, 0)));
            assert_eq!((found[0].sms, found[0].memory, found[0].exports_dma_buf), (132, 80 << 30, true));
            let reached: Vec<_> = found.into_iter().map(|device| device.peers).collect();
            let have_peers = env::var("SHIM_CUDA_PEERS").unwrap() == "1";
            assert_eq!(reached, if have_peers { [vec![1], vec![0]] } else { [vec![], vec![]] });
        });
    }
}

#[test]
fn an_old_driver_is_called_old() {
    inside("an_old_driver_is_called_old", &[("SHIM_CUDA_VERSION", "12030")], || {
        let old = DeviceError::OldDriver { found: 12_030, needed: 12_040 };
        assert_eq!(cuda::devices(), Err(old.clone()));
        assert_eq!(CudaDriver::open(0).err(), Some(old));
    });
}

#[test]
fn missing_devices_are_counted() {
    inside("missing_devices_are_counted", &[("SHIM_CUDA_DEVICES", "0")], || {
        assert_eq!(cuda::devices(), Ok(vec![]));
        assert_eq!(CudaDriver::open(0).err(), Some(DeviceError::NoDevice { device: 0, count: 0 }));
    });
}

#[test]
fn ordinals_end_with_the_devices() {
    inside("ordinals_end_with_the_devices", &[("SHIM_CUDA_DEVICES", "3")], || {
        assert_eq!(CudaDriver::open(3).err(), Some(DeviceError::NoDevice { device: 3, count: 3 }));
        CudaDriver::open(2).unwrap();
    });
}

#[test]
fn an_early_architecture_is_refused() {
    inside("an_early_architecture_is_refused", &[("SHIM_CUDA_ATTRIBUTES", "75=8,76=6")], || {
        is_unsupported(CudaDriver::open(0), "need compute capability 9.0, this is 8.6");
    });
}

#[test]
fn memory_must_be_mapped_by_hand() {
    inside("memory_must_be_mapped_by_hand", &[("SHIM_CUDA_ATTRIBUTES", "102=0")], || {
        is_unsupported(CudaDriver::open(0), "map memory by hand");
    });
}

#[test]
fn a_target_without_a_compiler_is_named() {
    inside("a_target_without_a_compiler_is_named", &[("SHIM_CUDA_ATTRIBUTES", "75=13")], || {
        // Where nvcc has compiled the kernels, the driver takes them.
        match CudaDriver::open(0) {
            Err(DeviceError::Compile { target, log }) => {
                assert!(target == "sm_130" && log.contains("--gpu-architecture"), "{target}: {log}");
            }
            other => assert!(other.is_ok(), "{:?}", other.err()),
        }
    });
}

/// A thread's own context stays its own, and the last who drops a driver ends the device's.
#[test]
fn contexts_are_left_as_they_were() {
    inside("contexts_are_left_as_they_were", &[("SHIM_CUDA_DEVICES", "2")], || {
        let current = || {
            let mut context = null_mut();
            // SAFETY: the call writes a handle.
            assert_eq!(unsafe { sys::cuCtxGetCurrent(&mut context) }, sys::CUresult::CUDA_SUCCESS);
            context
        };
        let (driver, _) = open(0);
        let own = current();
        assert!(!own.is_null(), "a thread without a context keeps the driver's");
        let mut foreign = null_mut();
        // SAFETY: the calls write and take a handle, which is given back below.
        unsafe {
            assert_eq!(sys::cuDevicePrimaryCtxRetain(&mut foreign, 1), sys::CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuCtxSetCurrent(foreign), sys::CUresult::CUDA_SUCCESS);
        }
        let memory = driver.allocate(Place::Device, 1).unwrap();
        assert_eq!(current(), foreign);
        // SAFETY: allocated above, used by nobody.
        unsafe { driver.free(memory) };
        drop(driver);
        assert_eq!(current(), foreign);
        // SAFETY: retained above; nothing was made in it.
        assert_eq!(unsafe { sys::cuDevicePrimaryCtxRelease_v2(1) }, sys::CUresult::CUDA_SUCCESS);
        // The device's context and the thread's are gone.
        let (driver, _) = open(0);
        let other = thread::spawn(move || {
            let memory = driver.allocate(Place::Shared, 1).unwrap();
            // SAFETY: allocated above, used by nobody.
            unsafe { driver.free(memory) };
        });
        other.join().unwrap();
    });
}

// ---- memory

#[test]
fn memory_is_zeroed_whatever_was_there() {
    inside("memory_is_zeroed_whatever_was_there", &[], || {
        let (_, driver) = open(0);
        for place in [Place::Shared, Place::Device, Place::Host] {
            for bytes in [0, 1, 300, (2 << 20) + 8] {
                for _ in 0..2 {
                    let memory = Memory::new(&driver, place, bytes).unwrap();
                    assert_eq!((memory.address() % 256, memory.bytes()), (0, bytes));
                    let found = read::<u8>(&driver, memory.address(), bytes);
                    assert!(found.iter().all(|&byte| byte == 0));
                    fill(&driver, memory.address(), &vec![0xFF_u8; bytes]);
                }
            }
        }
    });
}

#[test]
fn memory_ends() {
    inside("memory_ends", &[("SHIM_CUDA_MEMORY", "0x2000000")], || {
        let (driver, _) = open(0);
        let half = driver.allocate(Place::Device, 16 << 20).unwrap();
        let bytes = (16 << 20) + 1;
        let missing = Some(DeviceError::OutOfMemory { bytes, place: "device" });
        assert_eq!(driver.allocate(Place::Shared, bytes).err(), missing);
        // SAFETY: allocated above, used by nobody.
        unsafe { driver.free(half) };
        let whole = driver.allocate(Place::Shared, bytes).unwrap();
        // SAFETY: as above.
        unsafe { driver.free(whole) };
    });
}

#[test]
fn shared_memory_is_reached_by_other_devices() {
    inside("shared_memory_is_reached_by_other_devices", &[("SHIM_CUDA_DEVICES", "2")], || {
        let ((_, first), (_, second)) = (open(0), open(1));
        let shared = holding(&first, Place::Shared, &[7_u64; 100]);
        let stream = Stream::new(&second).unwrap();
        let mut found = [0_u64; 100];
        let to = found.as_mut_ptr() as u64;
        // SAFETY: as many bytes on both sides, which nobody else uses.
        let copied = unsafe { stream.copy_now(to, shared.address(), 800) };
        is_refused(copied, "cuMemcpyAsync", "CUDA_ERROR_INVALID_VALUE");
        for _ in 0..2 {
            assert_eq!(shared.reached_by(&*second).unwrap(), shared.address());
        }
        assert_eq!(shared.reached_by(&*first).unwrap(), shared.address());
        // SAFETY: as above.
        unsafe { stream.copy_now(to, shared.address(), 800).unwrap() };
        assert_eq!(found, [7; 100]);
        for place in [Place::Device, Place::Host] {
            let own = Memory::new(&first, place, 8).unwrap();
            is_unsupported(own.reached_by(&*second), "memory that no CUDA driver of this process shares");
        }
    });
}

#[test]
fn devices_may_be_out_of_reach() {
    let apart = [("SHIM_CUDA_DEVICES", "2"), ("SHIM_CUDA_PEERS", "0")];
    inside("devices_may_be_out_of_reach", &apart, || {
        let ((_, first), (_, second)) = (open(0), open(1));
        let shared = Memory::new(&first, Place::Shared, 8).unwrap();
        is_unsupported(shared.reached_by(&*second), "reach the memory of Shim H100 (device 0)");
    });
}

/// A NIC's driver finds what kernels do, and is not given what it could not show them in order.
#[test]
fn memory_goes_to_other_drivers() {
    for lacking in ["", "124=0", "118=0"] {
        inside("memory_goes_to_other_drivers", &[("SHIM_CUDA_ATTRIBUTES", lacking)], || {
            let (driver, device) = open(0);
            let memory = holding(&device, Place::Device, &[7_u64; 100]);
            let shared = driver.dma_buf(memory.raw());
            match &*env::var("SHIM_CUDA_ATTRIBUTES").unwrap() {
                "124=0" => is_unsupported(shared, "as a dma-buf"),
                "118=0" => is_unsupported(shared, "in the order of writing"),
                _ => {
                    let mut found = [0; 800];
                    fs::File::from(shared.unwrap()).read_exact_at(&mut found, 0).unwrap();
                    assert_eq!(cast_slice::<u8, u64>(&found), [7; 100]);
                }
            }
            assert_eq!(driver.pci_address().unwrap(), "0000:a0:00.0");
        });
    }
}

// ---- streams

fn until_done(event: &Event) {
    let deadline = Instant::now() + LIMIT;
    while !event.is_done().unwrap() {
        assert!(Instant::now() < deadline, "the event is never done");
        thread::yield_now();
    }
}

/// Copies come after what was enqueued before them, and before what is enqueued after. What is read from memory of the
/// caller's may change as soon as the call has returned.
#[test]
fn copies_take_their_turn() {
    inside("copies_take_their_turn", &[], || {
        const ROWS: usize = 64;
        let (_, driver) = open(0);
        let rows = Rows::new(&driver, Place::Shared, ROWS);
        let scales = Memory::new(&driver, Place::Device, 4 * ROWS).unwrap();
        let (stream, done) = (Stream::new(&driver).unwrap(), Event::new(&driver).unwrap());
        let turns = 8;
        let results = Memory::new(&driver, Place::Host, 4 * turns).unwrap();
        for turn in 0..turns {
            let mut own = [turn as f32; ROWS];
            // SAFETY: within the memories; the kernel's reads and writes are of the same stream.
            unsafe {
                driver.copy(stream.raw(), scales.address(), own.as_ptr() as u64, 4 * ROWS).unwrap();
                own.fill(f32::NAN);
                rows.launch(&*driver, &stream, scales.address(), 4);
                let last = rows.out.address() + (4 * (ROWS * HIDDEN - 1)) as u64;
                driver.copy(stream.raw(), results.address() + 4 * turn as u64, last, 4).unwrap();
            }
        }
        // SAFETY: both are alive.
        unsafe { driver.record(done.raw(), stream.raw()).unwrap() };
        until_done(&done);
        let expected: Vec<_> = (0..turns).map(|turn| turn as f32).collect();
        assert_eq!(read::<f32>(&driver, results.address(), turns), expected);
        // What goes to the caller's memory is there when the call returns, after all that came before.
        rows.launch(&*driver, &stream, scales.address(), 4);
        let mut out = vec![0_f32; ROWS * HIDDEN];
        // SAFETY: as many bytes on both sides.
        unsafe {
            driver.copy(stream.raw(), out.as_mut_ptr() as u64, rows.out.address(), 4 * out.len()).unwrap();
        }
        assert!(out.iter().all(|&x| x == (turns - 1) as f32));
    });
}

/// Who sees the word sees the data.
#[test]
fn stores_come_after_copies() {
    inside("stores_come_after_copies", &[], || {
        let (_, driver) = open(0);
        let from = holding(&driver, Place::Device, &(0..1000_u32).collect::<Vec<_>>());
        let to = Memory::new(&driver, Place::Host, 4000).unwrap();
        let word = Memory::new(&driver, Place::Host, 8).unwrap();
        let stream = Stream::new(&driver).unwrap();
        for turn in 1..20_u64 {
            // SAFETY: within the memories; the words are read as atomics only.
            let seen = unsafe {
                (to.address() as *mut u8).write_bytes(0, 4000);
                driver.copy(stream.raw(), to.address(), from.address(), 4000).unwrap();
                driver.store(stream.raw(), word.address(), turn).unwrap();
                std::sync::atomic::AtomicU64::from_ptr(word.address() as *mut u64)
            };
            while seen.load(std::sync::atomic::Ordering::Acquire) < turn {
                thread::yield_now();
            }
            // SAFETY: written whole by now, and by nobody else.
            let last = unsafe { (to.address() as *const u32).add(999).read() };
            assert_eq!(last, 999);
        }
        // SAFETY: refused, as no word stands there.
        let stored = unsafe { driver.store(stream.raw(), word.address() + 4, 1) };
        is_refused(stored, "cuStreamWriteValue64_v2", "CUDA_ERROR_INVALID_VALUE");
    });
}

/// Each kernel reads what another device's has written, and starts after it.
#[test]
fn streams_wait_for_events_of_other_devices() {
    inside("streams_wait_for_events_of_other_devices", &[("SHIM_CUDA_DEVICES", "2")], || {
        const ROWS: usize = 256;
        let drivers = [open(0).1, open(1).1];
        let streams = [0, 1].map(|device: usize| Stream::new(&drivers[device]).unwrap());
        let first = holding(&drivers[0], Place::Device, &[2.5_f32; ROWS]);
        let stages: Vec<_> =
            (0..6).map(|stage| Rows::new(&drivers[stage % 2], Place::Shared, ROWS)).collect();
        let events: Vec<_> = (0..6).map(|stage| Event::new(&drivers[stage % 2]).unwrap()).collect();
        assert!(events[0].is_done().unwrap(), "done until it is recorded");
        for (stage, rows) in stages.iter().enumerate() {
            let (driver, stream) = (&*drivers[stage % 2], &streams[stage % 2]);
            let (mut scales, mut pitch) = (first.address(), 4);
            if let Some(before) = stage.checked_sub(1) {
                scales = stages[before].out.reached_by(driver).unwrap();
                pitch = 4 * HIDDEN;
                // SAFETY: both are alive.
                unsafe { driver.wait(stream.raw(), events[before].raw()).unwrap() };
            }
            rows.launch(driver, stream, scales, pitch);
            // SAFETY: both are alive.
            unsafe { driver.record(events[stage].raw(), stream.raw()).unwrap() };
        }
        events.iter().for_each(until_done);
        for (stage, rows) in stages.iter().enumerate() {
            let found = read::<f32>(&drivers[stage % 2], rows.out.address(), ROWS * HIDDEN);
            assert!(found.iter().all(|&x| x == 2.5));
        }
        // SAFETY: refused: the stream is another device's.
        let recorded = unsafe { drivers[1].record(events[1].raw(), streams[0].raw()) };
        is_refused(recorded, "cuEventRecord", "CUDA_ERROR_INVALID_HANDLE");
    });
}

#[test]
fn impossible_launches_are_refused() {
    inside("impossible_launches_are_refused", &[], || {
        let (_, driver) = open(0);
        let (stream, most) = (Stream::new(&driver).unwrap(), driver.limits().shared);
        is_unsupported(driver.prepare(Kernel::Plan, Grid { blocks: 1, warps: 1, shared: most + 1 }), "plan");
        is_unsupported(driver.prepare(Kernel::Plan, Grid { blocks: 1, warps: 17, shared: 0 }), "17 warps");
        let prepare = |warps, shared| driver.prepare(Kernel::Dispatch, Grid { blocks: 1, warps, shared });
        assert_eq!(prepare(16, most), Ok(132));
        assert_eq!(prepare(4, 100 << 10), Ok(2 * 132));
        assert_eq!(prepare(4, 0), Ok(4 * 132));
        let rows = Rows::new(&driver, Place::Shared, 4);
        let scales = holding(&driver, Place::Device, &[3_f32; 4]);
        let params = rows.params(scales.address(), 4);
        let launch = |shared, params: &[u8]| {
            let grid = Grid { shared, ..GRID };
            // SAFETY: what the kernel takes, or refused.
            unsafe { driver.launch(stream.raw(), Kernel::Dequantise, grid, params) }
        };
        is_refused(launch(0, &[0; 8]), "cuLaunchKernelEx", "bytes of parameters, 8 given");
        // More than 48 KiB only where it was prepared.
        let invalid = |result| is_refused(result, "cuLaunchKernelEx", "CUDA_ERROR_INVALID_VALUE");
        invalid(launch((48 << 10) + 1, bytes_of(&params)));
        launch(48 << 10, bytes_of(&params)).unwrap();
        let dequantise = |shared| driver.prepare(Kernel::Dequantise, Grid { shared, ..GRID });
        dequantise(64 << 10).unwrap();
        // What was allowed stays allowed.
        dequantise(1).unwrap();
        launch(64 << 10, bytes_of(&params)).unwrap();
        invalid(launch((64 << 10) + 1, bytes_of(&params)));
        // SAFETY: alive.
        unsafe { driver.synchronize(stream.raw()).unwrap() };
        assert_eq!(read::<f32>(&driver, rows.out.address(), 4 * HIDDEN), [3.0; 4 * HIDDEN]);
    });
}

/// What a kernel does wrong is an error of every later call.
#[test]
fn failed_kernels_fail_the_device() {
    inside_complaining("failed_kernels_fail_the_device", &[], "gpu scope on shared memory", || {
        let (_, driver) = open(0);
        let stream = Stream::new(&driver).unwrap();
        let order = MisplacedOrder::new(&driver);
        order.launch(&*driver, &stream);
        // SAFETY: alive.
        let ended = unsafe { driver.synchronize(stream.raw()) };
        is_refused(ended, "cuStreamSynchronize", "CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure");
        is_refused(driver.new_event(), "cuEventCreate", "gpu scope on shared memory");
        assert!(driver.allocate(Place::Device, 8).is_err());
    });
}

// ---- other processes

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Fabric {
    handle: [[u8; 32]; 2],
    bytes: u64,
}

fn values(from: u32) -> Vec<u32> {
    (from..from + 1000).collect()
}

/// A second process, which maps what this one sends it, finds [`values`] of 0 and leaves those of 5000.
fn with_second(
    variables: &[(&str, &str)],
    driver: &Arc<CudaDriver>,
    send: impl FnOnce(&mut UnixStream, &RawMemory),
) {
    let device: Arc<dyn Driver> = driver.clone();
    let memory = driver.allocate(Place::Shared, 4000).unwrap();
    fill(&device, memory.address, &values(0));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let child = process("a_second_process_maps_memory", variables).env(SOCKET, &path).spawn().unwrap();
    let mut socket = listener.accept().unwrap().0;
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    send(&mut socket, &memory);
    socket.read_exact(&mut [0]).unwrap();
    assert_eq!(read::<u32>(&device, memory.address, 1000), values(5000));
    // The other has it still.
    // SAFETY: allocated above; nobody of this process uses it.
    unsafe { driver.free(memory) };
    socket.write_all(&[1]).unwrap();
    passed(child, "");
}

/// Nothing by itself: [`with_second`] starts it.
#[test]
fn a_second_process_maps_memory() {
    let Some(path) = env::var_os(SOCKET) else { return };
    within(LIMIT, move || {
        let mut socket = UnixStream::connect(Path::new(&path)).unwrap();
        let (driver, device) = open(0);
        let imported: ImportedMemory = if env::var_os("SHIM_CUDA_FABRIC").is_some() {
            let mut sent = Fabric::zeroed();
            socket.read_exact(bytemuck::bytes_of_mut(&mut sent)).unwrap();
            let mut handle = [0; 64];
            handle.copy_from_slice(cast_slice(&sent.handle));
            driver.import_fabric(&FabricMemory { handle, bytes: sent.bytes as usize }).unwrap()
        } else {
            let (descriptor, bytes) = recv_fd(&socket, Instant::now() + LIMIT).unwrap();
            driver.import(&ExportedMemory::new(descriptor, bytes as usize)).unwrap()
        };
        assert_eq!(imported.bytes(), 2 << 20);
        assert_eq!(read::<u32>(&device, imported.address(), 1000), values(0));
        fill(&device, imported.address(), &values(5000));
        socket.write_all(&[1]).unwrap();
        socket.read_exact(&mut [0]).unwrap();
        assert_eq!(read::<u32>(&device, imported.address(), 1000), values(5000));
        let file = tempfile::tempfile().unwrap();
        let foreign = driver.import(&ExportedMemory::new(file.into(), 2 << 20)).map(|_| ());
        is_refused(foreign, "cuMemImportFromShareableHandle", "CUDA_ERROR_INVALID_VALUE");
    });
}

#[test]
fn memory_goes_to_another_process() {
    inside("memory_goes_to_another_process", &[], || {
        let (driver, _) = open(0);
        with_second(&[], &driver, |socket, memory| {
            let exported = driver.export(memory).unwrap();
            assert_eq!(exported.bytes(), 2 << 20);
            send_fd(socket, exported.as_fd(), exported.bytes() as u64).unwrap();
        });
        let own = driver.allocate(Place::Device, 8).unwrap();
        is_unsupported(driver.export(&own), "export memory that no driver of this process shares");
        // SAFETY: allocated above, used by nobody.
        unsafe { driver.free(own) };
    });
}

#[test]
fn memory_goes_through_the_fabric() {
    const GRANTED: &[(&str, &str)] = &[("SHIM_CUDA_FABRIC", "granted")];
    inside("memory_goes_through_the_fabric", GRANTED, || {
        let (driver, _) = open(0);
        with_second(GRANTED, &driver, |socket, memory| {
            let exported = driver.export_fabric(memory).unwrap();
            let mut sent = Fabric { bytes: exported.bytes as u64, ..Fabric::zeroed() };
            bytemuck::cast_slice_mut(&mut sent.handle).copy_from_slice(&exported.handle);
            socket.write_all(bytes_of(&sent)).unwrap();
        });
    });
}

/// The device has fabric handles, and the node no right to them.
#[test]
fn a_fabric_that_is_denied_is_done_without() {
    inside("a_fabric_that_is_denied_is_done_without", &[("SHIM_CUDA_FABRIC", "denied")], || {
        let (driver, _) = open(0);
        let memory = driver.allocate(Place::Shared, 8).unwrap();
        driver.export(&memory).unwrap();
        is_unsupported(driver.export_fabric(&memory), "give fabric handles to its memory");
        // SAFETY: allocated above, used by nobody.
        unsafe { driver.free(memory) };
    });
}

// ---- worlds

fn world_of(nodes: usize, ranks_per_node: usize) -> Config {
    config(nodes, ranks_per_node).pool_bytes(16 << 20).build().unwrap()
}

#[test]
fn a_world_works_and_refuses() {
    let devices = [("SHIM_CUDA_DEVICES", "3"), ("CUDA_DEVICE_MAX_CONNECTIONS", "32")];
    inside("a_world_works_and_refuses", &devices, || {
        let config = world_of(2, 2);
        let mut ranks = Ranks { comms: cuda_world(&config).into_communicators() };
        for seed in 0..3 {
            ranks.round_trip(&Case::random(&config, BF16, 40, seed));
        }
        let case = Case::regular(&config, BF16, 6);
        let mut wrong = case.ranks[1].topk_idx.to_vec();
        wrong[5] = 8;
        let pending = ranks.each(|comm| {
            let own = case.routing(comm.rank());
            comm.start_plan(if comm.rank() == 1 { Routing { topk_idx: &wrong, ..own } } else { own })
        });
        let reason = Reason::ExpertOutOfRange { token: 1, k: 1, expert: 8, num_experts: 8 };
        for pending in pending {
            let refused = pending.wait().err().map(Error::from);
            assert_eq!(refused, Some(Error::Refused { rank: 1, reason }));
        }
        ranks.round_trip(&case);
    });
}

/// A rank that never comes is a fault of all, and the next world works.
#[test]
fn a_world_ends_its_waits() {
    let devices = [("SHIM_CUDA_DEVICES", "2"), ("CUDA_DEVICE_MAX_CONNECTIONS", "32")];
    inside("a_world_ends_its_waits", &devices, || {
        let hasty = config(2, 1).deadline(Duration::from_millis(300)).build().unwrap();
        let case = Case::regular(&hasty, BF16, 6);
        let mut ranks = Ranks { comms: cuda_world(&hasty).into_communicators() };
        let pending = ranks.comms[0].start_plan(case.routing(0));
        match pending.wait().map_err(Error::from) {
            Err(Error::Fault(fault)) => assert_eq!(fault.rank, 1, "{fault:?}"),
            other => panic!("{other:?}"),
        }
        drop(ranks);
        let config = world_of(2, 1);
        Ranks { comms: cuda_world(&config).into_communicators() }.round_trip(&case);
    });
}

#[test]
fn a_device_has_room_for_so_many_ranks() {
    inside("a_device_has_room_for_so_many_ranks", &[("SHIM_CUDA_ATTRIBUTES", "16=3")], || {
        let open = |ranks| {
            let config = world_of(1, ranks).on(EngineKind::Cuda(small_kernels()));
            LocalWorld::new(config).err()
        };
        // 8 connections and 3 multiprocessors, with 4 streams a rank.
        assert!(open(2).is_none());
        match open(3) {
            Some(Error::Device(DeviceError::Unsupported { what, .. })) => {
                assert!(what.contains("CUDA_DEVICE_MAX_CONNECTIONS"), "{what}");
            }
            other => panic!("{other:?}"),
        }
        match open(64) {
            Some(Error::Device(DeviceError::NotResident { ranks, blocks, resident, .. })) => {
                assert!(ranks == 64 && ranks * blocks > resident, "{blocks} blocks, {resident} resident");
            }
            other => panic!("{other:?}"),
        }
    });
}
