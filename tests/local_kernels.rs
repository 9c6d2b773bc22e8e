//! The kernels of one rank against the host's code, bit for bit: their arithmetic by itself, then each kernel as
//! lanes of the shim.
#![allow(unsafe_code, reason = "calls of compiled C++")]
#![cfg(all(target_os = "linux", target_arch = "x86_64"))] // What the shim runs on.

mod common;
#[path = "common/local.rs"]
mod local;

use std::ffi::c_float;
use std::process::Command;
use std::sync::OnceLock;

use common::Random;
use half::bf16;
use libloading::Library;
use proptest::prelude::*;
use railhop::numeric::{GROUP, ScaleFormat, decode, quantise, round_bf16, scale_groups};

use common::shim::{Grid, Options, Shim};
use local::{FORMATS, Launch, memory_of, room};

// ---- arithmetic

/// `tests/kernels/numeric.cpp`, built.
fn numeric() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kernels/numeric.cpp");
        let library = concat!(env!("CARGO_TARGET_TMPDIR"), "/libnumeric.so");
        let flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-shared"];
        let status = Command::new("g++").args(flags).args([source, "-o", library]).status();
        assert!(status.expect("g++ runs").success(), "numeric.cpp builds");
        // SAFETY: it has no initialisers.
        unsafe { Library::new(library) }.expect("numeric.cpp loads")
    })
}

/// One row as the header quantises it, and as the host does.
fn check_quantised(x: &[bf16]) {
    type Quantise = unsafe extern "C" fn(*const u16, u64, u32, *mut u64, *mut u8);
    // SAFETY: the signature in tests/kernels/numeric.cpp.
    let quantise_row = unsafe { numeric().get::<Quantise>("quantise_row").unwrap() };
    let row = memory_of(x);
    for format in FORMATS {
        let (mut codes, mut scales) = (room(x.len()), vec![0; scale_groups(x.len()) * format.bytes()]);
        let (x_at, elements, bytes) = (row.bytes().as_ptr().cast(), x.len() as u64, format.bytes() as u32);
        // SAFETY: a row of `elements`, and room for as many codes and for its scales; both aligned to 16 bytes.
        unsafe {
            quantise_row(x_at, elements, bytes, codes.bytes_mut().as_mut_ptr().cast(), scales.as_mut_ptr())
        };
        let (mut expected, mut expected_scales) = (vec![0; x.len()], vec![0; scales.len()]);
        quantise(x, format, &mut expected, &mut expected_scales);
        assert!(codes.slice::<u8>(0, x.len()) == expected, "{format:?} {x:?}");
        assert_eq!(scales, expected_scales, "{format:?} {x:?}");
    }
}

#[test]
fn quantises_every_bf16() {
    let all: Vec<_> = (0..=u16::MAX).map(bf16::from_bits).collect();
    check_quantised(&all);
    let spread: Vec<_> = (0..=u16::MAX).map(|i| bf16::from_bits(i.wrapping_mul(0x9E37))).collect();
    check_quantised(&spread);
}

/// A group for every peak there is: the peak, values around each step of its codes, anything not finite.
#[test]
fn quantises_by_every_peak() {
    let mut random = Random(7);
    let element = |random: &mut Random, peak: u16| {
        let sign = (random.next() as u16) & 0x8000;
        let magnitude = match random.below(16) {
            0 => [0x7F80, 0x7FC0, 0x7F81, 0x7FFF, 0][random.below(5)],
            1 => random.below(usize::from(peak) + 1) as u16,
            _ => peak.saturating_sub(random.below(20 << 7) as u16),
        };
        bf16::from_bits(sign | magnitude)
    };
    for first in (0..0x7F80).step_by(64) {
        let mut row = Vec::new();
        for peak in first..first + 64 {
            row.push(bf16::from_bits(peak));
            row.extend((1..GROUP).map(|_| element(&mut random, peak)));
        }
        check_quantised(&row);
    }
}

#[test]
fn rounds_and_reads_as_the_host() {
    type Round = unsafe extern "C" fn(c_float, c_float) -> u32;
    type Decode = unsafe extern "C" fn(u32) -> c_float;
    type Read = unsafe extern "C" fn(*const u8, u32, u32) -> c_float;
    // SAFETY: the signatures in tests/kernels/numeric.cpp.
    let (rounded, decoded, read) = unsafe {
        let library = numeric();
        let (rounded, decoded) = (library.get::<Round>("rounded_pair"), library.get::<Decode>("decoded"));
        (rounded.unwrap(), decoded.unwrap(), library.get::<Read>("scale_read").unwrap())
    };
    for high in 0..=u32::from(u16::MAX) {
        for low in [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
            let pair = [high << 16 | low, !high << 16 | low].map(f32::from_bits);
            let [first, second] = pair.map(|x| u32::from(round_bf16(x).to_bits()));
            // SAFETY: it takes any values.
            assert_eq!(unsafe { rounded(pair[0], pair[1]) }, first | second << 16, "{pair:?}");
        }
    }
    for code in 0..=u8::MAX {
        // SAFETY: it takes any code.
        let value = unsafe { decoded(code.into()) };
        assert_eq!(value.to_bits(), decode(code).to_bits(), "{code:#x}");
        // SAFETY: there are two scales, the second of which is read.
        let scale = unsafe { read([9, code].as_ptr(), 1, 1) };
        assert_eq!(scale.to_bits(), ScaleFormat::Ue8m0.read(&[code], 0).to_bits(), "{code:#x}");
    }
    let scales = memory_of(&[1.0f32, -0.0, 1e-42, f32::INFINITY]);
    for group in 0..4 {
        // SAFETY: there are four scales, aligned.
        let scale = unsafe { read(scales.bytes().as_ptr().cast(), group, 4) };
        assert_eq!(scale.to_bits(), scales.slice::<f32>(0, 4)[group as usize].to_bits());
    }
}

// ---- kernels

/// Runs one kernel to its end, on a machine of one rank.
fn run(launch: &Launch<'_>) {
    let Launch { seed, kernel, blocks, warps, params, memories } = *launch;
    let shim = Shim::new(Options { seed, ..Options::default() });
    for memory in memories {
        shim.memory(0, memory.address(), memory.bytes().len(), false);
    }
    assert!(shim.try_launch(0, 0, kernel.name(), Grid { blocks, warps, shared: 0 }, params));
    shim.run().unwrap_or_else(|report| panic!("{}: {report}", kernel.name()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(local::cases()))]

    #[test]
    fn orders_and_expands_as_the_host(case in local::case()) {
        local::orders_and_expands(&case, run);
    }

    #[test]
    fn collapses_as_the_host(case in local::case()) {
        local::collapses(&case, run);
    }

    #[test]
    fn dequantises_as_the_host(case in local::case(), short in any::<bool>()) {
        local::dequantises(&case, short, run);
    }
}

#[test]
fn takes_long_rows() {
    local::takes_long_rows(run);
}

#[test]
fn orders_many_entries() {
    local::orders_many_entries(run);
}

#[test]
fn refuses_what_makes_no_order() {
    local::refuses_what_makes_no_order(run);
}

#[test]
fn copies_whatever_size() {
    local::copies(run);
}
