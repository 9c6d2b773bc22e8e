//! Computing while rows are under way, on two nodes of two ranks in one process: the same work one step after the
//! other and overlapped, with the timeline of each.
//!
//! With CUDA devices the kernels of the engine move rows that lie in device memory, and a kernel of the caller's
//! computes on the multiprocessors that they leave ([`cuda`]). Without, the threads of the engine move rows, and the
//! rank's own thread computes ([`host`]); `CUDA_VISIBLE_DEVICES=` hides the devices there are.

#![allow(unsafe_code)] // Fabrics, device memory and launches have contracts.

mod cuda;
mod host;

use std::process::ExitCode;

use railhop::error::DeviceError;

/// Characters of the longest timeline.
const BAR: f64 = 64.0;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let ran = match devices() {
        Ok(names) => cuda::run(&names),
        Err(why) => host::run(&why),
    };
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// The names of the CUDA devices, or why there are none.
fn devices() -> Result<Vec<String>, DeviceError> {
    let names = railhop::device::cuda::devices()?;
    if names.is_empty() { Err(DeviceError::NoDevice { device: 0, count: 0 }) } else { Ok(names) }
}

/// What was done, from when to when, in milliseconds.
struct Row {
    name: &'static str,
    start: f64,
    end: f64,
}

/// Prints the timelines of rank 0, both to the same scale, under what each way took on all ranks.
fn compare([sequential, overlapped]: [(f64, &[Row]); 2]) {
    let scale = BAR / sequential.0.max(overlapped.0);
    for (name, (total, rows)) in [("sequential", sequential), ("overlapped", overlapped)] {
        println!("\n{name}: {total:.2} ms on all ranks; rank 0, in ms:");
        for Row { name, start, end } in rows {
            let (before, bar) = ((start * scale).round(), ((end - start) * scale).round().max(1.0));
            let (before, bar) = (" ".repeat(before as usize), "#".repeat(bar as usize));
            println!("  {name:<8} {start:7.2} .. {end:7.2}  |{before}{bar}");
        }
    }
    println!("\noverlapped / sequential: {:.2}", overlapped.0 / sequential.0);
}
