//! The kernels of one rank against the host's code, bit for bit: their arithmetic by itself, then each kernel as
//! lanes of the shim.
#![allow(unsafe_code)] // Calls of compiled C++.

mod common;

use std::ffi::c_float;

use bytemuck::{Pod, Zeroable, cast_slice, cast_slice_mut};
use common::Random;
use half::bf16;
use proptest::prelude::*;
use railhop::numeric::{GROUP, ScaleFormat, decode, dequantise, quantise, round_bf16, scale_groups};
use railhop::wire::align_up;
use railhop::wire::local::{
    CollapseParams, DequantiseParams, ExpandParams, ExpertOrder, ExpertOrderParams, ORDER_THREADS, columns,
    most_expanded_rows, order, order_scratch_words,
};
use railhop::{ExpertMajor, ScaleRows};

use machine::{numeric, run};

const FORMATS: [ScaleFormat; 2] = [ScaleFormat::F32, ScaleFormat::Ue8m0];

// ---- arithmetic

/// One row as the header quantises it, and as the host does.
fn check_quantised(x: &[bf16]) {
    type Quantise = unsafe extern "C" fn(*const u16, u64, u32, *mut u64, *mut u8);
    // SAFETY: the signature in tests/kernels/numeric.cpp.
    let quantise_row = unsafe { numeric().get::<Quantise>("quantise_row").unwrap() };
    let row = Memory::of(x);
    for format in FORMATS {
        let (mut codes, mut scales) = (Memory::new(x.len()), vec![0; scale_groups(x.len()) * format.bytes()]);
        let (x_at, elements, bytes) = (row.words.as_ptr().cast(), x.len() as u64, format.bytes() as u32);
        // SAFETY: a row of `elements`, and room for as many codes and for its scales; both aligned to 16 bytes.
        unsafe { quantise_row(x_at, elements, bytes, codes.words.as_mut_ptr().cast(), scales.as_mut_ptr()) };
        let (mut expected, mut expected_scales) = (vec![0; x.len()], vec![0; scales.len()]);
        quantise(x, format, &mut expected, &mut expected_scales);
        assert!(codes.get::<u8>(x.len()) == expected, "{format:?} {x:?}");
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
    let scales = Memory::of(&[1.0f32, -0.0, 1e-42, f32::INFINITY]);
    for group in 0..4 {
        // SAFETY: there are four scales, aligned.
        let scale = unsafe { read(scales.words.as_ptr().cast(), group, 4) };
        assert_eq!(scale.to_bits(), scales.get::<f32>(4)[group as usize].to_bits());
    }
}

// ---- memory

/// Device memory: 16-byte aligned, and full of what nobody wrote.
struct Memory {
    words: Vec<u128>,
}

impl Memory {
    fn new(bytes: usize) -> Self {
        Self { words: vec![u128::from_ne_bytes([0xA5; 16]); bytes.div_ceil(16).max(1)] }
    }

    fn of<T: Pod>(values: &[T]) -> Self {
        let mut memory = Self::new(size_of_val(values));
        cast_slice_mut::<_, u8>(&mut memory.words)[..size_of_val(values)].copy_from_slice(cast_slice(values));
        memory
    }

    fn at(&self) -> u64 {
        self.words.as_ptr() as u64
    }

    fn get<T: Pod>(&self, n: usize) -> &[T] {
        cast_slice(&cast_slice::<_, u8>(&self.words)[..n * size_of::<T>()])
    }

    /// Whether everything from `bytes` on is as it was.
    fn untouched_from(&self, bytes: usize) -> bool {
        cast_slice::<_, u8>(&self.words)[bytes..].iter().all(|&byte| byte == 0xA5)
    }
}

// ---- kernels

#[derive(Debug, Clone)]
struct Case {
    received: usize,
    topk: usize,
    experts: usize,
    /// Experts that entries name: the others have no rows.
    named: usize,
    alignment: usize,
    hidden: usize,
    /// Rows, expanded rows, scales of a column that there is room for beyond what is needed.
    spare: [usize; 3],
    grid: u32,
    warps: u32,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let rows = prop_oneof![1 => Just(0usize), 20 => 1usize..80];
    let topk = prop_oneof![8 => 1usize..=8, 1 => 9usize..=32];
    let alignment = prop_oneof![Just(1), Just(128), 1usize..=128];
    let sizes = (rows, topk, 1usize..=40, alignment, 1usize..=25);
    (sizes, any::<[prop::sample::Index; 4]>(), 1u32..=4, 1u32..=16, any::<u64>()).prop_map(
        |((received, topk, experts, alignment, hidden), drawn, grid, warps, seed)| {
            let [named, rows, expanded, column] = drawn.map(|drawn| move |n| drawn.index(n));
            Case {
                received,
                topk,
                experts,
                named: named(experts) + 1,
                alignment,
                hidden: 16 * hidden,
                spare: [rows(4), expanded(50), column(70)],
                grid,
                warps,
                seed,
            }
        },
    )
}

/// A case on the device: its order's tables.
struct Ordered {
    case: Case,
    random: Random,
    expected: ExpertMajor,
    topk_idx: Vec<i32>,
    received: Memory,
    order: Memory,
    expanded: Memory,
    sources: Memory,
}

impl Ordered {
    fn new(case: &Case) -> Self {
        let mut random = Random(case.seed);
        let entry = |_| random.below(case.named + 1) as i32 - 1;
        let topk_idx: Vec<i32> = (0..case.received * case.topk).map(entry).collect();
        let expected = ExpertMajor::new(&topk_idx, case.topk, case.experts, case.alignment).unwrap();
        let entries = (case.received + case.spare[0]) * case.topk;
        let mut this = Self {
            random,
            received: Memory::of(&[case.received as u64]),
            order: Memory::new(size_of::<ExpertOrder>()),
            expanded: Memory::new(4 * entries),
            sources: Memory::new(4 * (expected.rows() + case.spare[1])),
            case: case.clone(),
            expected,
            topk_idx,
        };
        this.make_order();
        this
    }

    /// The order's tables against the host's.
    fn make_order(&mut self) {
        let Case { received, topk, experts, .. } = self.case;
        let capacity = received + self.case.spare[0];
        assert!(
            self.expected.rows() <= most_expanded_rows(received, topk, experts, self.case.alignment),
            "always enough"
        );
        let mut topk_idx = self.topk_idx.clone();
        topk_idx.resize(capacity * topk, 12345);
        let topk_idx = Memory::of(&topk_idx);
        let (counts, starts) = (Memory::new(4 * experts), Memory::new(4 * (experts + 1)));
        let scratch = Memory::new(4 * order_scratch_words(experts));
        let params = ExpertOrderParams {
            topk_idx: topk_idx.at(),
            received: self.received.at(),
            order: self.order.at(),
            counts: counts.at(),
            starts: starts.at(),
            expanded: self.expanded.at(),
            sources: self.sources.at(),
            scratch: scratch.at(),
            capacity: capacity as u32,
            expanded_capacity: (self.expected.rows() + self.case.spare[1]) as u32,
            topk: topk as u32,
            num_experts: experts as u32,
            alignment: self.case.alignment as u32,
            reserved: 0,
        };
        let memories = [
            &topk_idx,
            &self.received,
            &self.order,
            &counts,
            &starts,
            &self.expanded,
            &self.sources,
            &scratch,
        ];
        let block = 32 * self.case.warps;
        assert!(block as usize <= ORDER_THREADS);
        run(self.case.seed, "expert_order", [1, block], &params, &memories);

        let (order, rows) = (self.order.get::<ExpertOrder>(1)[0], self.expected.rows());
        assert_eq!((order.status, order.invalid), (order::OK, u64::MAX));
        assert_eq!((order.received as usize, order.rows as usize), (received, rows));
        assert_eq!(counts.get::<u32>(experts), self.expected.counts());
        let groups: Vec<_> = starts
            .get::<u32>(experts + 1)
            .windows(2)
            .map(|ends| ends[0] as usize..ends[1] as usize)
            .collect();
        assert_eq!(groups, self.expected.groups());
        let mut sources = vec![u32::MAX; rows];
        for (r, k) in (0..received).flat_map(|r| (0..topk).map(move |k| (r, k))) {
            let row = self.expected.row_of(r, k);
            assert_eq!(
                self.expanded.get::<u32>(received * topk)[r * topk + k],
                row.map_or(u32::MAX, |row| row as u32)
            );
            if let Some(row) = row {
                sources[row] = r as u32;
            }
        }
        assert_eq!(self.sources.get::<u32>(rows), sources);
        assert!(self.expanded.untouched_from(4 * received * topk) && self.sources.untouched_from(4 * rows));
        assert!(counts.untouched_from(4 * experts) && starts.untouched_from(4 * (experts + 1)));
    }

    fn shape(&self) -> [u32; 2] {
        [self.case.grid, 32 * self.case.warps]
    }

    /// Any bytes at all.
    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.random.next() as u8).collect()
    }

    fn elements(&mut self, n: usize) -> Vec<bf16> {
        (0..n).map(|_| self.random.element()).collect()
    }

    /// Rows of `row_bytes`, with scales of `format` or none, as `columns` says.
    fn expand(&mut self, row_bytes: usize, format: Option<ScaleFormat>, columns: u32) {
        let (received, rows) = (self.case.received, self.expected.rows());
        let x = self.bytes(received * row_bytes);
        let groups = format.map_or(0, |_| scale_groups(self.case.hidden));
        let scale_bytes = format.map_or(0, ScaleFormat::bytes);
        let (pitch, column) = (align_up(groups * scale_bytes, 16), rows + self.case.spare[2]);
        let scales = self.bytes(received * pitch);
        let words = if columns == columns::PACKED { groups.div_ceil(4) } else { groups } * column;
        let (x_at, out) = (Memory::of(&x), Memory::new(rows * row_bytes));
        let (scales_at, out_scales) = (Memory::of(&scales), Memory::new(4 * words));
        let params = ExpandParams {
            order: self.order.at(),
            sources: self.sources.at(),
            x: x_at.at(),
            out: out.at(),
            scales: scales_at.at(),
            out_scales: out_scales.at(),
            row_bytes: row_bytes as u32,
            scale_pitch: pitch as u32,
            scale_groups: groups as u32,
            column_pitch: column as u32,
            columns,
            reserved: 0,
        };
        let memories = [&self.order, &self.sources, &x_at, &out, &scales_at, &out_scales];
        run(self.case.seed, "expand", self.shape(), &params, &memories);

        let mut expected = vec![0u8; rows * row_bytes];
        self.expected.expand(&x, row_bytes, &mut expected).unwrap();
        assert!(out.get::<u8>(expected.len()) == expected && out.untouched_from(expected.len()));
        let Some(format) = format else { return };
        let mut expected = vec![0u32; words];
        let scales = ScaleRows::new(&scales, received, pitch, self.case.hidden, format).unwrap();
        match columns {
            columns::PACKED => self.expected.expand_scales_ue8m0(&scales, column, &mut expected).unwrap(),
            _ => self.expected.expand_scales_f32(&scales, column, cast_slice_mut(&mut expected)).unwrap(),
        }
        assert_eq!(out_scales.get::<u32>(words), expected, "{format:?}");
        assert!(out_scales.untouched_from(4 * words));
    }

    fn collapse(&mut self, weighted: bool) {
        let Case { received, topk, hidden, .. } = self.case;
        let y = self.elements(self.expected.rows() * hidden);
        let weights: Vec<f32> = (0..received * topk).map(|_| self.random.weight()).collect();
        let (y_at, weights_at) = (Memory::of(&y), Memory::of(&weights));
        let out = Memory::new(2 * received * hidden);
        let params = CollapseParams {
            order: self.order.at(),
            expanded: self.expanded.at(),
            y: y_at.at(),
            weights: if weighted { weights_at.at() } else { 0 },
            out: out.at(),
            hidden: hidden as u32,
            topk: topk as u32,
        };
        let memories = [&self.order, &self.expanded, &y_at, &weights_at, &out];
        run(self.case.seed, "collapse", self.shape(), &params, &memories);

        let mut expected = vec![bf16::ONE; received * hidden];
        self.expected.reduce(&y, hidden, weighted.then_some(&weights), &mut expected).unwrap();
        assert_eq!(out.get::<u16>(expected.len()), cast_slice::<_, u16>(&expected));
        assert!(out.untouched_from(2 * expected.len()));
    }

    /// Rows that fit in the capacity are dequantised, whatever number was received.
    fn dequantise(&mut self, format: ScaleFormat, out_bytes: usize, capacity: usize) {
        let (rows, hidden) = (self.case.received.min(capacity), self.case.hidden);
        let (groups, codes) = (scale_groups(hidden), self.bytes(rows * hidden));
        let pitch = align_up(groups * format.bytes(), 16);
        let mut scales = self.bytes(rows * pitch);
        if format == ScaleFormat::F32 && self.random.one_in(2) {
            let ordinary = |_| self.random.below(1000) as f32 / 448.0;
            scales = cast_slice(&(0..rows * pitch / 4).map(ordinary).collect::<Vec<_>>()).to_vec();
        }
        let (x, scales_at) = (Memory::of(&codes), Memory::of(&scales));
        let out = Memory::new(rows * hidden * out_bytes);
        let params = DequantiseParams {
            x: x.at(),
            scales: scales_at.at(),
            out: out.at(),
            received: self.received.at(),
            capacity: capacity as u32,
            hidden: hidden as u32,
            scale_pitch: pitch as u32,
            scale_bytes: format.bytes() as u32,
            out_bytes: out_bytes as u32,
            reserved: 0,
        };
        run(self.case.seed, "dequantise", self.shape(), &params, &[&x, &scales_at, &out, &self.received]);

        let mut expected = vec![0.0f32; rows * hidden];
        for r in 0..rows {
            dequantise(
                &codes[r * hidden..][..hidden],
                format,
                &scales[r * pitch..],
                &mut expected[r * hidden..][..hidden],
            );
        }
        // Which NaN the host computes is the machine's choice.
        let expected = expected.into_iter().map(|x| if x.is_nan() { f32::NAN } else { x });
        match out_bytes {
            4 => assert_eq!(out.get::<u32>(rows * hidden), expected.map(f32::to_bits).collect::<Vec<_>>()),
            _ => assert_eq!(
                out.get::<u16>(rows * hidden),
                expected.map(|x| round_bf16(x).to_bits()).collect::<Vec<_>>()
            ),
        }
        assert!(out.untouched_from(rows * hidden * out_bytes));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn orders_and_expands_as_the_host(case in case()) {
        let mut ordered = Ordered::new(&case);
        ordered.expand(2 * case.hidden, None, columns::NONE);
        ordered.expand(case.hidden, Some(ScaleFormat::F32), columns::F32);
        ordered.expand(case.hidden, Some(ScaleFormat::Ue8m0), columns::WIDENED);
        ordered.expand(case.hidden, Some(ScaleFormat::Ue8m0), columns::PACKED);
    }

    #[test]
    fn collapses_as_the_host(case in case()) {
        let mut ordered = Ordered::new(&case);
        ordered.collapse(false);
        ordered.collapse(true);
    }

    #[test]
    fn dequantises_as_the_host(case in case(), short in any::<bool>()) {
        let mut ordered = Ordered::new(&case);
        let capacity = if short { case.received / 2 } else { case.received + case.spare[0] };
        for format in FORMATS {
            ordered.dequantise(format, 4, capacity);
            ordered.dequantise(format, 2, capacity);
        }
    }
}

/// Rows of more than one block of a warp's loads, and scales of more than one vector.
#[test]
fn takes_long_rows() {
    let case = Case {
        received: 9,
        topk: 3,
        experts: 5,
        named: 5,
        alignment: 4,
        hidden: 7168 + 16,
        spare: [1, 7, 3],
        grid: 2,
        warps: 3,
        seed: 3,
    };
    let mut ordered = Ordered::new(&case);
    ordered.expand(case.hidden, Some(ScaleFormat::F32), columns::F32);
    ordered.expand(case.hidden, Some(ScaleFormat::Ue8m0), columns::PACKED);
    ordered.collapse(true);
    for format in FORMATS {
        ordered.dequantise(format, 4, 9);
    }
}

/// Slices of several blocks of entries, of one warp and of many.
#[test]
fn orders_many_entries() {
    for (warps, topk, experts) in [(1, 8, 40), (16, 8, 1), (16, 7, 300), (5, 32, 33)] {
        let received = 1000 + warps as usize;
        let spare = [0; 3];
        let case = Case {
            received,
            topk,
            experts,
            named: experts,
            alignment: 16,
            hidden: 16,
            spare,
            grid: 3,
            warps,
            seed: 11,
        };
        Ordered::new(&case).collapse(true);
    }
}

/// An order of `topk_idx` [3, 2] for three experts, padded to 4: its state, and the rows it would have.
fn refused(topk_idx: [i32; 6], received: u64, expanded_capacity: usize) -> (ExpertOrder, u32) {
    let (topk_idx, received) = (Memory::of(&topk_idx), Memory::of(&[received]));
    let (order, counts, starts) = (Memory::new(size_of::<ExpertOrder>()), Memory::new(12), Memory::new(16));
    let (expanded, sources) = (Memory::new(24), Memory::new(4 * expanded_capacity));
    let (scratch, x, out, columns) =
        (Memory::new(4 * order_scratch_words(3)), Memory::new(48), Memory::new(400), Memory::new(40));
    let params = ExpertOrderParams {
        topk_idx: topk_idx.at(),
        received: received.at(),
        order: order.at(),
        counts: counts.at(),
        starts: starts.at(),
        expanded: expanded.at(),
        sources: sources.at(),
        scratch: scratch.at(),
        capacity: 3,
        expanded_capacity: expanded_capacity as u32,
        topk: 2,
        num_experts: 3,
        alignment: 4,
        reserved: 0,
    };
    let memories = [&topk_idx, &received, &order, &counts, &starts, &expanded, &sources, &scratch];
    run(1, "expert_order", [1, 64], &params, &memories);
    let state = order.get::<ExpertOrder>(1)[0];
    assert!(state.status == order::OK || expanded.untouched_from(0) && sources.untouched_from(0));

    // Without an order nothing is expanded nor collapsed; scales are zero.
    if state.status != order::OK {
        let params = ExpandParams {
            order: order.at(),
            sources: sources.at(),
            x: x.at(),
            out: out.at(),
            scales: x.at(),
            out_scales: columns.at(),
            row_bytes: 16,
            scale_pitch: 16,
            scale_groups: 1,
            column_pitch: 10,
            columns: columns::F32,
            reserved: 0,
        };
        run(1, "expand", [1, 32], &params, &[&order, &sources, &x, &out, &columns]);
        assert_eq!(columns.get::<u32>(10), [0; 10]);
        let mut params = CollapseParams::zeroed();
        (params.order, params.expanded, params.y, params.out) = (order.at(), expanded.at(), x.at(), out.at());
        (params.hidden, params.topk) = (8, 2);
        run(1, "collapse", [1, 32], &params, &[&order, &expanded, &x, &out]);
        assert!(out.untouched_from(0));
    }
    (state, starts.get::<u32>(4)[3])
}

#[test]
fn refuses_what_makes_no_order() {
    let good = [0, 1, -1, -1, 2, 0];
    let (state, rows) = refused(good, 3, 12);
    assert_eq!((state.status, state.received, state.rows, rows), (order::OK, 3, 12, 12));

    let (state, rows) = refused(good, 3, 11);
    assert_eq!((state.status, state.received, state.rows, rows), (order::TOO_MANY_ROWS, 0, 0, 12));

    for received in [4, u64::from(u32::MAX) + 2] {
        let (state, _) = refused(good, received, 12);
        assert_eq!((state.status, state.received, state.rows), (order::TOO_MANY_RECEIVED, 0, 0));
    }
    for (entry, expert) in [(0, 3), (5, -2), (3, i32::MIN)] {
        let mut topk_idx = good;
        topk_idx[entry] = expert;
        topk_idx[5] = topk_idx[5].min(3).max(if entry == 5 { expert } else { 7 });
        let (state, _) = refused(topk_idx, 3, 12);
        assert_eq!((state.status, state.received, state.rows), (order::EXPERT_OUT_OF_RANGE, 0, 0));
        assert_eq!(state.invalid, entry as u64);
    }
}

/// The shim and the arithmetic as libraries.
mod machine {
    use super::Memory;
    use bytemuck::{Pod, bytes_of};
    use libloading::Library;
    use std::ffi::{CStr, CString, c_char, c_int, c_void};
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::sync::OnceLock;

    const ROOT: &str = env!("CARGO_MANIFEST_DIR");

    /// The kernels, run by the shim.
    pub fn kernels() -> &'static Library {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        LIBRARY.get_or_init(|| {
            let shim = std::fs::read_dir(format!("{ROOT}/kernels/shim")).unwrap();
            let sources =
                shim.map(|file| file.unwrap().path()).filter(|path| path.extension() == Some("cpp".as_ref()));
            build("local_kernels", &sources.collect::<Vec<_>>(), &["-DRAILHOP_KERNELS=\"../local.cu\""])
        })
    }

    /// The arithmetic by itself.
    pub fn numeric() -> &'static Library {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        LIBRARY.get_or_init(|| build("numeric", &[format!("{ROOT}/tests/kernels/numeric.cpp").into()], &[]))
    }

    fn build(name: &str, sources: &[PathBuf], options: &[&str]) -> Library {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("lib{name}.so"));
        let flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-shared"];
        let output = Command::new("g++")
            .args(flags)
            .args(options)
            .args(sources)
            .arg("-o")
            .arg(&path)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // SAFETY: its initialisers register kernels and nothing else.
        unsafe { Library::new(path).unwrap() }
    }

    #[repr(C)]
    struct Options {
        seed: u64,
        resident: u32,
        tsan_per_warp: u32,
        ranks_per_node: u32,
        reserved: u32,
    }

    /// Runs one kernel to its end, on a machine of one rank with `memories`.
    pub fn run(seed: u64, kernel: &str, [grid, block]: [u32; 2], params: &impl Pod, memories: &[&Memory]) {
        type New = unsafe extern "C" fn(*const Options) -> *mut c_void;
        type Free = unsafe extern "C" fn(*mut c_void);
        type Register = unsafe extern "C" fn(*mut c_void, u32, *const c_void, u64, u32) -> u32;
        type Launch = unsafe extern "C" fn(
            *mut c_void,
            u32,
            u32,
            *const c_char,
            u32,
            u32,
            u32,
            *const u8,
            u64,
        ) -> c_int;
        type Run = unsafe extern "C" fn(*mut c_void) -> c_int;
        type Report = unsafe extern "C" fn(*mut c_void) -> *const c_char;
        let options = Options { seed, resident: 0, tsan_per_warp: 0, ranks_per_node: 0, reserved: 0 };
        let (library, name, params) = (kernels(), CString::new(kernel).unwrap(), bytes_of(params));
        // SAFETY: the signatures in shim.h; memories and parameters outlive the run.
        unsafe {
            let shim = library.get::<New>("railhop_shim_new").unwrap()(&options);
            let register = library.get::<Register>("railhop_shim_memory").unwrap();
            for memory in memories {
                register(shim, 0, memory.words.as_ptr().cast(), 16 * memory.words.len() as u64, 0);
            }
            let launch = library.get::<Launch>("railhop_shim_launch").unwrap();
            let launched =
                launch(shim, 0, 0, name.as_ptr(), grid, block, 0, params.as_ptr(), params.len() as u64);
            assert_eq!(launched, 0, "{kernel}");
            let failed = library.get::<Run>("railhop_shim_run").unwrap()(shim);
            let report = library.get::<Report>("railhop_shim_report").unwrap()(shim);
            assert!(failed == 0, "{kernel}: {}", CStr::from_ptr(report).to_string_lossy());
            library.get::<Free>("railhop_shim_free").unwrap()(shim);
        }
    }
}
