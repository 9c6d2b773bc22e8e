//! The kernels of one rank against the host's code, bit for bit, wherever they run: their inputs, and what must come out.

#![allow(dead_code, reason = "every test file takes what it needs")]

#[allow(clippy::duplicate_mod, reason = "the shim is not everywhere")]
#[path = "../shim/memory.rs"]
mod memory;

use bytemuck::{Pod, Zeroable, bytes_of, cast_slice, cast_slice_mut};
use half::bf16;
use proptest::prelude::*;
use railhop::device::Kernel;
use railhop::numeric::{ScaleFormat, dequantise, round_bf16, scale_groups};
use railhop::wire::align_up;
use railhop::wire::local::{
    CollapseParams, CopyParams, DequantiseParams, ExpandParams, ExpertOrder, ExpertOrderParams,
    ORDER_THREADS, columns, most_expanded_rows, order, order_scratch_words,
};
use railhop::{ExpertMajor, ScaleRows};

use crate::common::Random;
pub use memory::Memory;

pub const FORMATS: [ScaleFormat; 2] = [ScaleFormat::F32, ScaleFormat::Ue8m0];

// ---- memory

/// Memory full of what nobody wrote.
pub fn room(bytes: usize) -> Memory {
    let mut memory = Memory::new(bytes);
    memory.bytes_mut().fill(0xA5);
    memory
}

/// Values, and what nobody wrote behind them.
pub fn memory_of<T: Pod>(values: &[T]) -> Memory {
    let mut memory = room(size_of_val(values));
    memory.write(0, values);
    memory
}

/// Whether everything from `bytes` on is as it was.
pub fn untouched_from(memory: &Memory, bytes: usize) -> bool {
    memory.bytes()[bytes..].iter().all(|&byte| byte == 0xA5)
}

// ---- kernels

/// One launch of a kernel.
pub struct Launch<'a> {
    pub seed: u64,
    pub kernel: Kernel,
    pub blocks: usize,
    pub warps: usize,
    pub params: &'a [u8],
    /// All that the parameters name, by their addresses.
    pub memories: &'a [&'a Memory],
}

/// Runs a kernel to its end: the memories then hold what it has written.
pub type Run = fn(&Launch<'_>);

fn launch(
    run: Run,
    seed: u64,
    kernel: Kernel,
    [blocks, warps]: [usize; 2],
    params: &impl Pod,
    memories: &[&Memory],
) {
    run(&Launch { seed, kernel, blocks, warps, params: bytes_of(params), memories });
}

#[derive(Debug, Clone)]
pub struct Case {
    pub received: usize,
    pub topk: usize,
    pub experts: usize,
    /// Experts that entries name: the others have no rows.
    pub named: usize,
    pub alignment: usize,
    pub hidden: usize,
    /// Rows, expanded rows, scales of a column that there is room for beyond what is needed.
    pub spare: [usize; 3],
    pub grid: usize,
    pub warps: usize,
    pub seed: u64,
}

pub fn case() -> impl Strategy<Value = Case> {
    let rows = prop_oneof![1 => Just(0usize), 20 => 1usize..80];
    let topk = prop_oneof![8 => 1usize..=8, 1 => 9usize..=32];
    let alignment = prop_oneof![Just(1), Just(128), 1usize..=128];
    let sizes = (rows, topk, 1usize..=40, alignment, 1usize..=25);
    (sizes, any::<[prop::sample::Index; 4]>(), 1usize..=4, 1usize..=16, any::<u64>()).prop_map(
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
pub struct Ordered {
    run: Run,
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
    pub fn new(case: &Case, run: Run) -> Self {
        let mut random = Random(case.seed);
        let entry = |_| random.below(case.named + 1) as i32 - 1;
        let topk_idx: Vec<i32> = (0..case.received * case.topk).map(entry).collect();
        let expected = ExpertMajor::new(&topk_idx, case.topk, case.experts, case.alignment).unwrap();
        let entries = (case.received + case.spare[0]) * case.topk;
        let mut this = Self {
            run,
            random,
            received: memory_of(&[case.received as u64]),
            order: room(size_of::<ExpertOrder>()),
            expanded: room(4 * entries),
            sources: room(4 * (expected.rows() + case.spare[1])),
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
        let topk_idx = memory_of(&topk_idx);
        let (counts, starts) = (room(4 * experts), room(4 * (experts + 1)));
        let scratch = room(4 * order_scratch_words(experts));
        let params = ExpertOrderParams {
            topk_idx: topk_idx.address(),
            received: self.received.address(),
            order: self.order.address(),
            counts: counts.address(),
            starts: starts.address(),
            expanded: self.expanded.address(),
            sources: self.sources.address(),
            scratch: scratch.address(),
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
        assert!(32 * self.case.warps <= ORDER_THREADS);
        self.launch(Kernel::ExpertOrder, [1, self.case.warps], &params, &memories);

        let (order, rows) = (self.order.read::<ExpertOrder>(0), self.expected.rows());
        assert_eq!((order.status, order.invalid), (order::OK, u64::MAX));
        assert_eq!((order.received as usize, order.rows as usize), (received, rows));
        assert_eq!(counts.slice::<u32>(0, experts), self.expected.counts());
        let groups: Vec<_> = starts
            .slice::<u32>(0, experts + 1)
            .windows(2)
            .map(|ends| ends[0] as usize..ends[1] as usize)
            .collect();
        assert_eq!(groups, self.expected.groups());
        let mut sources = vec![u32::MAX; rows];
        for (r, k) in (0..received).flat_map(|r| (0..topk).map(move |k| (r, k))) {
            let row = self.expected.row_of(r, k);
            assert_eq!(
                self.expanded.slice::<u32>(0, received * topk)[r * topk + k],
                row.map_or(u32::MAX, |row| row as u32)
            );
            if let Some(row) = row {
                sources[row] = r as u32;
            }
        }
        assert_eq!(self.sources.slice::<u32>(0, rows), sources);
        assert!(
            untouched_from(&self.expanded, 4 * received * topk) && untouched_from(&self.sources, 4 * rows)
        );
        assert!(untouched_from(&counts, 4 * experts) && untouched_from(&starts, 4 * (experts + 1)));
    }

    fn launch(&self, kernel: Kernel, grid: [usize; 2], params: &impl Pod, memories: &[&Memory]) {
        launch(self.run, self.case.seed, kernel, grid, params, memories);
    }

    fn shape(&self) -> [usize; 2] {
        [self.case.grid, self.case.warps]
    }

    /// Any bytes at all.
    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.random.next() as u8).collect()
    }

    fn elements(&mut self, n: usize) -> Vec<bf16> {
        (0..n).map(|_| self.random.element()).collect()
    }

    /// Rows of `row_bytes`, with scales of `format` or none, as `columns` says.
    pub fn expand(&mut self, row_bytes: usize, format: Option<ScaleFormat>, columns: u32) {
        let (received, rows) = (self.case.received, self.expected.rows());
        let x = self.bytes(received * row_bytes);
        let groups = format.map_or(0, |_| scale_groups(self.case.hidden));
        let scale_bytes = format.map_or(0, ScaleFormat::bytes);
        let (pitch, column) = (align_up(groups * scale_bytes, 16), rows + self.case.spare[2]);
        let scales = self.bytes(received * pitch);
        let words = if columns == columns::PACKED { groups.div_ceil(4) } else { groups } * column;
        let (x_at, out) = (memory_of(&x), room(rows * row_bytes));
        let (scales_at, out_scales) = (memory_of(&scales), room(4 * words));
        let params = ExpandParams {
            order: self.order.address(),
            sources: self.sources.address(),
            x: x_at.address(),
            out: out.address(),
            scales: scales_at.address(),
            out_scales: out_scales.address(),
            row_bytes: row_bytes as u32,
            scale_pitch: pitch as u32,
            scale_groups: groups as u32,
            column_pitch: column as u32,
            columns,
            reserved: 0,
        };
        let memories = [&self.order, &self.sources, &x_at, &out, &scales_at, &out_scales];
        self.launch(Kernel::Expand, self.shape(), &params, &memories);

        let mut expected = vec![0u8; rows * row_bytes];
        self.expected.expand(&x, row_bytes, &mut expected).unwrap();
        assert!(out.slice::<u8>(0, expected.len()) == expected && untouched_from(&out, expected.len()));
        let Some(format) = format else { return };
        let mut expected = vec![0u32; words];
        let scales = ScaleRows::new(&scales, received, pitch, self.case.hidden, format).unwrap();
        match columns {
            columns::PACKED => self.expected.expand_scales_ue8m0(&scales, column, &mut expected).unwrap(),
            _ => self.expected.expand_scales_f32(&scales, column, cast_slice_mut(&mut expected)).unwrap(),
        }
        assert_eq!(out_scales.slice::<u32>(0, words), expected, "{format:?}");
        assert!(untouched_from(&out_scales, 4 * words));
    }

    pub fn collapse(&mut self, weighted: bool) {
        let Case { received, topk, hidden, .. } = self.case;
        let y = self.elements(self.expected.rows() * hidden);
        let weights: Vec<f32> = (0..received * topk).map(|_| self.random.weight()).collect();
        let (y_at, weights_at) = (memory_of(&y), memory_of(&weights));
        let out = room(2 * received * hidden);
        let params = CollapseParams {
            order: self.order.address(),
            expanded: self.expanded.address(),
            y: y_at.address(),
            weights: if weighted { weights_at.address() } else { 0 },
            out: out.address(),
            hidden: hidden as u32,
            topk: topk as u32,
        };
        let memories = [&self.order, &self.expanded, &y_at, &weights_at, &out];
        self.launch(Kernel::Collapse, self.shape(), &params, &memories);

        let mut expected = vec![bf16::ONE; received * hidden];
        self.expected.reduce(&y, hidden, weighted.then_some(&weights), &mut expected).unwrap();
        assert_eq!(out.slice::<u16>(0, expected.len()), cast_slice::<_, u16>(&expected));
        assert!(untouched_from(&out, 2 * expected.len()));
    }

    /// Rows that fit in the capacity are dequantised, whatever number was received.
    pub fn dequantise(&mut self, format: ScaleFormat, out_bytes: usize, capacity: usize) {
        let (rows, hidden) = (self.case.received.min(capacity), self.case.hidden);
        let (groups, codes) = (scale_groups(hidden), self.bytes(rows * hidden));
        let pitch = align_up(groups * format.bytes(), 16);
        let mut scales = self.bytes(rows * pitch);
        if format == ScaleFormat::F32 && self.random.one_in(2) {
            let ordinary = |_| self.random.below(1000) as f32 / 448.0;
            scales = cast_slice(&(0..rows * pitch / 4).map(ordinary).collect::<Vec<_>>()).to_vec();
        }
        let (x, scales_at) = (memory_of(&codes), memory_of(&scales));
        let out = room(rows * hidden * out_bytes);
        let params = DequantiseParams {
            x: x.address(),
            scales: scales_at.address(),
            out: out.address(),
            received: self.received.address(),
            capacity: capacity as u32,
            hidden: hidden as u32,
            scale_pitch: pitch as u32,
            scale_bytes: format.bytes() as u32,
            out_bytes: out_bytes as u32,
            reserved: 0,
        };
        self.launch(Kernel::Dequantise, self.shape(), &params, &[&x, &scales_at, &out, &self.received]);

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
            4 => {
                assert_eq!(out.slice::<u32>(0, rows * hidden), expected.map(f32::to_bits).collect::<Vec<_>>())
            }
            _ => assert_eq!(
                out.slice::<u16>(0, rows * hidden),
                expected.map(|x| round_bf16(x).to_bits()).collect::<Vec<_>>()
            ),
        }
        assert!(untouched_from(&out, rows * hidden * out_bytes));
    }
}

/// Random cases of each property: sanitizers take their time.
pub fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").map_or(48, |cases| cases.parse().expect("a number"))
}

/// Any order, and rows and scales of all kinds expanded by it.
pub fn orders_and_expands(case: &Case, run: Run) {
    let mut ordered = Ordered::new(case, run);
    ordered.expand(2 * case.hidden, None, columns::NONE);
    ordered.expand(case.hidden, Some(ScaleFormat::F32), columns::F32);
    ordered.expand(case.hidden, Some(ScaleFormat::Ue8m0), columns::WIDENED);
    ordered.expand(case.hidden, Some(ScaleFormat::Ue8m0), columns::PACKED);
}

pub fn collapses(case: &Case, run: Run) {
    let mut ordered = Ordered::new(case, run);
    ordered.collapse(false);
    ordered.collapse(true);
}

pub fn dequantises(case: &Case, short: bool, run: Run) {
    let mut ordered = Ordered::new(case, run);
    let capacity = if short { case.received / 2 } else { case.received + case.spare[0] };
    for format in FORMATS {
        ordered.dequantise(format, 4, capacity);
        ordered.dequantise(format, 2, capacity);
    }
}

/// Copies of no bytes, of less than a vector for each thread, of whole tiles and of what is left of them.
pub fn copies(run: Run) {
    let mut random = Random(5);
    // A thread takes eight vectors of 16 bytes of a tile.
    for (blocks, warps) in [(1, 1), (3, 2), (2, 16)] {
        let tile = 32 * warps * 8 * 16;
        for bytes in [0, 16, 32 * 16, tile - 16, tile, tile + 16, 2 * blocks * tile + tile / 2 + 48] {
            let values: Vec<u8> = (0..bytes).map(|_| random.next() as u8).collect();
            let (from, to) = (memory_of(&values), room(bytes + 32));
            let params = CopyParams { from: from.address(), to: to.address() + 16, bytes: bytes as u64 };
            launch(run, random.next(), Kernel::Copy, [blocks, warps], &params, &[&from, &to]);
            assert!(to.bytes()[16..16 + bytes] == values[..], "{bytes} bytes by {blocks} blocks");
            assert!(to.bytes()[..16] == [0xA5; 16] && untouched_from(&to, 16 + bytes));
        }
    }
}

/// Rows of more than one block of a warp's loads, and scales of more than one vector.
pub fn takes_long_rows(run: Run) {
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
    let mut ordered = Ordered::new(&case, run);
    ordered.expand(case.hidden, Some(ScaleFormat::F32), columns::F32);
    ordered.expand(case.hidden, Some(ScaleFormat::Ue8m0), columns::PACKED);
    ordered.collapse(true);
    for format in FORMATS {
        ordered.dequantise(format, 4, 9);
    }
}

/// Slices of several blocks of entries, of one warp and of many.
pub fn orders_many_entries(run: Run) {
    for (warps, topk, experts) in [(1, 8, 40), (16, 8, 1), (16, 7, 300), (5, 32, 33)] {
        let received = 1000 + warps;
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
        Ordered::new(&case, run).collapse(true);
    }
}

/// An order of `topk_idx` [3, 2] for three experts, padded to 4: its state, and the rows it would have.
fn refused(run: Run, topk_idx: [i32; 6], received: u64, expanded_capacity: usize) -> (ExpertOrder, u32) {
    let (topk_idx, received) = (memory_of(&topk_idx), memory_of(&[received]));
    let (order, counts, starts) = (room(size_of::<ExpertOrder>()), room(12), room(16));
    let (expanded, sources) = (room(24), room(4 * expanded_capacity));
    let (scratch, x, out, columns) = (room(4 * order_scratch_words(3)), room(48), room(400), room(40));
    let params = ExpertOrderParams {
        topk_idx: topk_idx.address(),
        received: received.address(),
        order: order.address(),
        counts: counts.address(),
        starts: starts.address(),
        expanded: expanded.address(),
        sources: sources.address(),
        scratch: scratch.address(),
        capacity: 3,
        expanded_capacity: expanded_capacity as u32,
        topk: 2,
        num_experts: 3,
        alignment: 4,
        reserved: 0,
    };
    let memories = [&topk_idx, &received, &order, &counts, &starts, &expanded, &sources, &scratch];
    launch(run, 1, Kernel::ExpertOrder, [1, 2], &params, &memories);
    let state = order.read::<ExpertOrder>(0);
    assert!(state.status == order::OK || untouched_from(&expanded, 0) && untouched_from(&sources, 0));

    // Without an order nothing is expanded nor collapsed; scales are zero.
    if state.status != order::OK {
        let params = ExpandParams {
            order: order.address(),
            sources: sources.address(),
            x: x.address(),
            out: out.address(),
            scales: x.address(),
            out_scales: columns.address(),
            row_bytes: 16,
            scale_pitch: 16,
            scale_groups: 1,
            column_pitch: 10,
            columns: columns::F32,
            reserved: 0,
        };
        launch(run, 1, Kernel::Expand, [1, 1], &params, &[&order, &sources, &x, &out, &columns]);
        assert_eq!(columns.slice::<u32>(0, 10), [0; 10]);
        let mut params = CollapseParams::zeroed();
        (params.order, params.expanded, params.y, params.out) =
            (order.address(), expanded.address(), x.address(), out.address());
        (params.hidden, params.topk) = (8, 2);
        launch(run, 1, Kernel::Collapse, [1, 1], &params, &[&order, &expanded, &x, &out]);
        assert!(untouched_from(&out, 0));
    }
    (state, starts.slice::<u32>(0, 4)[3])
}

pub fn refuses_what_makes_no_order(run: Run) {
    let good = [0, 1, -1, -1, 2, 0];
    let (state, rows) = refused(run, good, 3, 12);
    assert_eq!((state.status, state.received, state.rows, rows), (order::OK, 3, 12, 12));

    let (state, rows) = refused(run, good, 3, 11);
    assert_eq!((state.status, state.received, state.rows, rows), (order::TOO_MANY_ROWS, 0, 0, 12));

    for received in [4, u64::from(u32::MAX) + 2] {
        let (state, _) = refused(run, good, received, 12);
        assert_eq!((state.status, state.received, state.rows), (order::TOO_MANY_RECEIVED, 0, 0));
    }
    for (entry, expert) in [(0, 3), (5, -2), (3, i32::MIN)] {
        let mut topk_idx = good;
        (topk_idx[5], topk_idx[entry]) = (7, expert);
        let (state, _) = refused(run, topk_idx, 3, 12);
        assert_eq!((state.status, state.received, state.rows), (order::EXPERT_OUT_OF_RANGE, 0, 0));
        assert_eq!(state.invalid, entry as u64);
    }
}
