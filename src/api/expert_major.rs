//! Received rows in the order grouped GEMMs take them.
//!
//! A dispatch leaves a rank with rows in the order they were received, each with up to `topk` of the rank's
//! experts. A grouped GEMM wants every expert's rows side by side, at an aligned start. [`ExpertMajor`] is
//! that order: it expands rows and scales into it, and reduces the experts' outputs back to one row per
//! received row.
//!
//! Letters in shapes: R received rows, K entries of a row's top-k, H elements of a row, G scales of a row.

use std::ops::Range;

use bytemuck::Pod;
use half::bf16;

use crate::numeric::fp8::{ScaleFormat, scale_groups};
use crate::numeric::reduce::{bf16_to_f32, round_bf16};

/// Stands for no row: an entry of another rank's expert, or the source of a padding row.
const NONE: u32 = u32::MAX;

/// Elements summed at a time: their f32 sums stay in registers, even if vectors have only four lanes.
const BLOCK: usize = 32;

/// Rows transposed at a time: what they fill of a column is a cache line.
const TILE: usize = 16;

/// Why an order could not be made or used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExpertMajorError {
    /// An argument has the wrong size.
    #[error("{got} {what}, {expected} expected")]
    WrongSize {
        /// What is counted, of which argument.
        what: &'static str,
        /// The number expected; `usize::MAX` if it is larger still.
        expected: usize,
        /// The number given.
        got: usize,
    },
    /// `topk_idx` ends within a row.
    #[error("topk_idx has {got} elements, a multiple of topk = {topk} expected")]
    PartialRow {
        /// Entries per row.
        topk: usize,
        /// Elements given.
        got: usize,
    },
    /// An entry of `topk_idx` is neither a local expert nor −1.
    #[error("topk_idx[{row}][{k}] = {got}, -1..{num_local_experts} expected")]
    ExpertOutOfRange {
        /// Received row.
        row: usize,
        /// Position in the row's top-k.
        k: usize,
        /// Experts of this rank.
        num_local_experts: usize,
        /// The entry.
        got: i32,
    },
    /// A number is too small.
    #[error("{what} = {got}, at least {least} expected")]
    TooSmall {
        /// The argument.
        what: &'static str,
        /// The least that would do.
        least: usize,
        /// The number given.
        got: usize,
    },
    /// A number is too large.
    #[error("{what} = {got}, at most {most} expected")]
    TooLarge {
        /// The argument, or what follows from the arguments.
        what: &'static str,
        /// The most that would do.
        most: usize,
        /// The number given; `usize::MAX` if it is larger still.
        got: usize,
    },
    /// Scales are received as another format than the output can hold.
    #[error("the scales are {got:?}, {expected:?} expected")]
    WrongScaleFormat {
        /// The format that fits.
        expected: ScaleFormat,
        /// The scales' format.
        got: ScaleFormat,
    },
}

/// The expert-major order of received rows.
///
/// Expanded rows are the rows of expert 0, zero rows up to a multiple of the alignment, the rows of expert 1
/// and so on. An expert's rows ascend by received row, then by position in its top-k: a row that names an
/// expert twice has two expanded rows. An expert without rows has no padding either.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertMajor {
    topk: usize,
    received: usize,
    counts: Vec<u32>,
    groups: Vec<Range<usize>>,
    /// [R, K]: expanded row, or [`NONE`].
    expanded: Vec<u32>,
    /// [rows]: received row, or [`NONE`] for padding.
    sources: Vec<u32>,
}

impl ExpertMajor {
    /// The order of the rows of `topk_idx` [R, `topk`]: entries are local experts, `0..num_local_experts`, or
    /// −1 where the expert is not on this rank. Each expert's rows are padded to a multiple of `alignment`; 1
    /// is no padding.
    pub fn new(
        topk_idx: &[i32],
        topk: usize,
        num_local_experts: usize,
        alignment: usize,
    ) -> Result<Self, ExpertMajorError> {
        at_least("topk", 1, topk)?;
        at_least("alignment", 1, alignment)?;
        at_most("num_local_experts", i32::MAX as usize, num_local_experts)?;
        at_most("entries of topk_idx", NONE as usize, topk_idx.len())?;
        if !topk_idx.len().is_multiple_of(topk) {
            return Err(ExpertMajorError::PartialRow { topk, got: topk_idx.len() });
        }
        let counts = count(topk_idx, topk, num_local_experts)?;
        let groups = lay_out(&counts, alignment)?;
        let (expanded, sources) = place(topk_idx, topk, &groups);
        Ok(Self { topk, received: topk_idx.len() / topk, counts, groups, expanded, sources })
    }

    /// Expanded rows, padding included.
    pub fn rows(&self) -> usize {
        self.sources.len()
    }

    /// Each expert's expanded rows, padding included.
    pub fn groups(&self) -> &[Range<usize>] {
        &self.groups
    }

    /// Each expert's number of rows, padding excluded.
    pub fn counts(&self) -> &[u32] {
        &self.counts
    }

    /// The expanded row of entry `k` of received row `r`; none where that expert is not on this rank, or
    /// there is no such entry.
    pub fn row_of(&self, r: usize, k: usize) -> Option<usize> {
        let entry = (r < self.received && k < self.topk).then(|| r * self.topk + k)?;
        some(self.expanded[entry])
    }

    /// Expands received rows `x` [R, width] to `out` [rows, width]. Padding rows are zero.
    pub fn expand<T: Pod>(&self, x: &[T], width: usize, out: &mut [T]) -> Result<(), ExpertMajorError> {
        size("elements of x", [self.received, width], x.len())?;
        size("elements of out", [self.rows(), width], out.len())?;
        for (row, &source) in self.sources.iter().enumerate() {
            let out = &mut out[row * width..][..width];
            match some(source) {
                Some(r) => out.copy_from_slice(&x[r * width..][..width]),
                None => out.fill(T::zeroed()),
            }
        }
        Ok(())
    }

    /// Expands received scales as f32, column-major: `out` [G, `column_pitch`], as
    /// [`ScaleRows::column_major_f32`] but of expanded rows. Scales of padding rows are zero.
    pub fn expand_scales_f32(
        &self,
        scales: &ScaleRows,
        column_pitch: usize,
        out: &mut [f32],
    ) -> Result<(), ExpertMajorError> {
        size("rows of scales", [self.received, 1], scales.rows)?;
        scales.write_f32(Order::ExpertMajor(&self.sources), column_pitch, out)
    }

    /// Expands received UE8M0 scales, packed and column-major: `out` [G / 4 rounded up, `column_pitch`], as
    /// [`ScaleRows::column_major_ue8m0`] but of expanded rows. Scales of padding rows are zero.
    pub fn expand_scales_ue8m0(
        &self,
        scales: &ScaleRows,
        column_pitch: usize,
        out: &mut [u32],
    ) -> Result<(), ExpertMajorError> {
        size("rows of scales", [self.received, 1], scales.rows)?;
        scales.write_ue8m0(Order::ExpertMajor(&self.sources), column_pitch, out)
    }

    /// Reduces the experts' outputs `y` [rows, hidden] to `out` [R, hidden], with one weight per entry of
    /// `topk_idx` or none. Per element, in f32, each operation rounded on its own:
    ///
    /// ```text
    /// total = +0.0
    /// total += weights[r][k] * y[row_of(r, k)]    or += y[..], for k ascending where there is such a row
    /// out[r] = bf16(total)
    /// ```
    ///
    /// rounded by [`round_bf16`]: every NaN becomes `0x7FC0`. Padding rows of `y` and weights of other ranks'
    /// experts are not read.
    pub fn reduce(
        &self,
        y: &[bf16],
        hidden: usize,
        weights: Option<&[f32]>,
        out: &mut [bf16],
    ) -> Result<(), ExpertMajorError> {
        size("elements of y", [self.rows(), hidden], y.len())?;
        size("elements of out", [self.received, hidden], out.len())?;
        if let Some(weights) = weights {
            size("elements of weights", [self.received, self.topk], weights.len())?;
        }
        let mut terms = Vec::new();
        for (r, entries) in self.expanded.chunks_exact(self.topk).enumerate() {
            terms.clear();
            terms.extend(entries.iter().enumerate().filter_map(|(k, &row)| {
                // A weight of one changes no value, so there is one loop for both.
                let weight = weights.map_or(1.0, |weights| weights[r * self.topk + k]);
                some(row).map(|row| Term { weight, row: &y[row * hidden..][..hidden] })
            }));
            sum(&terms, &mut out[r * hidden..][..hidden]);
        }
        Ok(())
    }
}

/// Rows per expert.
fn count(topk_idx: &[i32], topk: usize, num_local_experts: usize) -> Result<Vec<u32>, ExpertMajorError> {
    let mut counts = vec![0; num_local_experts];
    for (entry, &got) in topk_idx.iter().enumerate().filter(|&(_, &expert)| expert != -1) {
        let (row, k) = (entry / topk, entry % topk);
        *usize::try_from(got)
            .ok()
            .and_then(|expert| counts.get_mut(expert))
            .ok_or(ExpertMajorError::ExpertOutOfRange { row, k, num_local_experts, got })? += 1;
    }
    Ok(counts)
}

/// Each expert's range of expanded rows.
fn lay_out(counts: &[u32], alignment: usize) -> Result<Vec<Range<usize>>, ExpertMajorError> {
    let mut end = 0usize;
    let range = |&count: &u32| {
        let start = end;
        let padded = (count as usize).checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
        end = end.saturating_add(padded);
        at_most("expanded rows", NONE as usize, end)?;
        Ok(start..end)
    };
    counts.iter().map(range).collect()
}

/// The expanded row of every entry, and the received row of every expanded row.
fn place(topk_idx: &[i32], topk: usize, groups: &[Range<usize>]) -> (Vec<u32>, Vec<u32>) {
    let mut next: Vec<usize> = groups.iter().map(|group| group.start).collect();
    let mut expanded = vec![NONE; topk_idx.len()];
    let mut sources = vec![NONE; groups.last().map_or(0, |group| group.end)];
    for (entry, &expert) in topk_idx.iter().enumerate().filter(|&(_, &expert)| expert != -1) {
        let row = &mut next[expert as usize];
        expanded[entry] = *row as u32;
        sources[*row] = (entry / topk) as u32;
        *row += 1;
    }
    (expanded, sources)
}

/// What is added to a received row's sum.
struct Term<'a> {
    weight: f32,
    row: &'a [bf16],
}

/// Sums the terms into `out`, as long as each of their rows.
fn sum(terms: &[Term], out: &mut [bf16]) {
    let (blocks, rest) = out.as_chunks_mut::<BLOCK>();
    for (i, block) in blocks.iter_mut().enumerate() {
        *block = sum_lanes(terms, i * BLOCK);
    }
    let at = blocks.len() * BLOCK;
    for (i, out) in rest.iter_mut().enumerate() {
        [*out] = sum_lanes(terms, at + i);
    }
}

/// The sums `at..at + N`.
#[inline(always)]
fn sum_lanes<const N: usize>(terms: &[Term], at: usize) -> [bf16; N] {
    let mut total = [0.0; N];
    for term in terms {
        for (total, &y) in total.iter_mut().zip(&term.row[at..at + N]) {
            *total += term.weight * bf16_to_f32(y);
        }
    }
    total.map(round_bf16)
}

/// The order in which scales are written.
#[derive(Clone, Copy)]
enum Order<'a> {
    AsReceived,
    /// [rows]: received row, or [`NONE`].
    ExpertMajor(&'a [u32]),
}

/// The scales of received rows: G for every row, then whatever up to the pitch.
#[derive(Debug, Clone, Copy)]
pub struct ScaleRows<'a> {
    bytes: &'a [u8],
    rows: usize,
    pitch: usize,
    groups: usize,
    format: ScaleFormat,
}

impl<'a> ScaleRows<'a> {
    /// The scales of `rows` rows of `hidden` elements, which have [`scale_groups`] scales each: `bytes`
    /// [rows, `pitch`], the pitch in bytes.
    pub fn new(
        bytes: &'a [u8],
        rows: usize,
        pitch: usize,
        hidden: usize,
        format: ScaleFormat,
    ) -> Result<Self, ExpertMajorError> {
        let groups = scale_groups(hidden);
        at_least("scale pitch", groups.saturating_mul(format.bytes()), pitch)?;
        size("bytes of scales", [rows, pitch], bytes.len())?;
        Ok(Self { bytes, rows, pitch, groups, format })
    }

    /// Writes the scales as f32, column-major: `out` [G, `column_pitch`], where `column_pitch` is in elements
    /// and at least the number of rows, the scale of row r and group g is at `g * column_pitch + r`, and
    /// elements after the last row are zero. UE8M0 scales are widened, exactly.
    ///
    /// To be loaded by TMA, a column must be a multiple of 16 bytes: `column_pitch` a multiple of 4.
    pub fn column_major_f32(&self, column_pitch: usize, out: &mut [f32]) -> Result<(), ExpertMajorError> {
        self.write_f32(Order::AsReceived, column_pitch, out)
    }

    /// Writes UE8M0 scales column-major, four groups to a word: `out` [G / 4 rounded up, `column_pitch`],
    /// where `column_pitch` is in words and at least the number of rows, and the word at `w * column_pitch +
    /// r` has the scales of row r and groups 4w to 4w + 3, the first in its lowest byte. Groups after the
    /// last and words after the last row are zero. Refuses F32 scales.
    ///
    /// To be loaded by TMA, a column must be a multiple of 16 bytes: `column_pitch` a multiple of 4.
    pub fn column_major_ue8m0(&self, column_pitch: usize, out: &mut [u32]) -> Result<(), ExpertMajorError> {
        self.write_ue8m0(Order::AsReceived, column_pitch, out)
    }

    fn write_f32(&self, order: Order, column_pitch: usize, out: &mut [f32]) -> Result<(), ExpertMajorError> {
        self.transpose(order, self.groups, column_pitch, out, |scales, group| self.format.read(scales, group))
    }

    fn write_ue8m0(
        &self,
        order: Order,
        column_pitch: usize,
        out: &mut [u32],
    ) -> Result<(), ExpertMajorError> {
        if self.format != ScaleFormat::Ue8m0 {
            return Err(ExpertMajorError::WrongScaleFormat {
                expected: ScaleFormat::Ue8m0,
                got: self.format,
            });
        }
        self.transpose(order, self.groups.div_ceil(4), column_pitch, out, pack)
    }

    /// Fills `out` [columns, `column_pitch`]: element i of column c is `read(scales, c)` of the scales of row
    /// i in `order`, zero where there are none.
    fn transpose<C: Pod>(
        &self,
        order: Order,
        columns: usize,
        column_pitch: usize,
        out: &mut [C],
        read: impl Fn(&[u8], usize) -> C,
    ) -> Result<(), ExpertMajorError> {
        at_least("column_pitch", self.rows_in(order), column_pitch)?;
        size("elements of out", [columns, column_pitch], out.len())?;
        if out.is_empty() {
            return Ok(());
        }
        for at in (0..column_pitch).step_by(TILE) {
            let tile: [_; TILE] = std::array::from_fn(|i| self.row_in(order, at + i));
            for (c, column) in out.chunks_exact_mut(column_pitch).enumerate() {
                for (out, scales) in column[at..].iter_mut().zip(tile) {
                    *out = scales.map_or(C::zeroed(), |scales| read(scales, c));
                }
            }
        }
        Ok(())
    }

    fn rows_in(&self, order: Order) -> usize {
        match order {
            Order::AsReceived => self.rows,
            Order::ExpertMajor(sources) => sources.len(),
        }
    }

    /// The stored scales of row `row` in `order`, without what follows them; none for padding and after the
    /// last row.
    fn row_in(&self, order: Order, row: usize) -> Option<&'a [u8]> {
        let received = match order {
            Order::AsReceived => Some(row).filter(|&row| row < self.rows),
            Order::ExpertMajor(sources) => sources.get(row).copied().and_then(some),
        };
        received.map(|r| &self.bytes[r * self.pitch..][..self.groups * self.format.bytes()])
    }
}

/// Word `w` of a row of UE8M0 scales: four of them, or as many as are left and zeros.
fn pack(row: &[u8], w: usize) -> u32 {
    let rest = &row[4 * w..];
    u32::from_le_bytes(rest.first_chunk().copied().unwrap_or_else(|| {
        let mut word = [0; 4];
        word[..rest.len()].copy_from_slice(rest);
        word
    }))
}

/// The row that is stored as `row`, unless that is [`NONE`].
fn some(row: u32) -> Option<usize> {
    (row != NONE).then_some(row as usize)
}

fn size(what: &'static str, [rows, width]: [usize; 2], got: usize) -> Result<(), ExpertMajorError> {
    if rows.checked_mul(width) == Some(got) {
        return Ok(());
    }
    Err(ExpertMajorError::WrongSize { what, expected: rows.saturating_mul(width), got })
}

fn at_least(what: &'static str, least: usize, got: usize) -> Result<(), ExpertMajorError> {
    if got >= least { Ok(()) } else { Err(ExpertMajorError::TooSmall { what, least, got }) }
}

fn at_most(what: &'static str, most: usize, got: usize) -> Result<(), ExpertMajorError> {
    if got <= most { Ok(()) } else { Err(ExpertMajorError::TooLarge { what, most, got }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FORMATS: [ScaleFormat; 2] = [ScaleFormat::F32, ScaleFormat::Ue8m0];

    /// What an order is made from.
    #[derive(Debug, Clone)]
    struct Input {
        topk_idx: Vec<i32>,
        topk: usize,
        experts: usize,
        alignment: usize,
    }

    impl Input {
        fn received(&self) -> usize {
            self.topk_idx.len() / self.topk
        }

        fn order(&self) -> ExpertMajor {
            ExpertMajor::new(&self.topk_idx, self.topk, self.experts, self.alignment).unwrap()
        }

        /// The entry (r, k) of every expanded row, by search; none for padding.
        fn oracle(&self) -> Vec<Option<(usize, usize)>> {
            let mut rows = Vec::new();
            for expert in 0..self.experts {
                for (r, entries) in self.topk_idx.chunks(self.topk).enumerate() {
                    rows.extend(
                        (0..self.topk).filter(|&k| entries[k] == expert as i32).map(|k| Some((r, k))),
                    );
                }
                while rows.len() % self.alignment != 0 {
                    rows.push(None);
                }
            }
            rows
        }
    }

    fn input() -> impl Strategy<Value = Input> {
        let alignment = prop_oneof![Just(1), Just(128), 1usize..=128];
        (0usize..40, 1usize..=9, 0usize..7, alignment).prop_flat_map(
            |(received, topk, experts, alignment)| {
                // Few experts, so that rows name one twice, and sometimes only some of them, so that others
                // have no rows.
                let entry = (0..=experts).prop_flat_map(|named| -1..named as i32);
                prop::collection::vec(entry, received * topk).prop_map(move |topk_idx| Input {
                    topk_idx,
                    topk,
                    experts,
                    alignment,
                })
            },
        )
    }

    /// Mostly activations, and now and then any bf16: infinities, NaNs, denormals.
    fn element() -> impl Strategy<Value = bf16> {
        prop_oneof![
            20 => (-4.0f32..4.0).prop_map(bf16::from_f32),
            1 => any::<u16>().prop_map(bf16::from_bits),
        ]
    }

    /// `len` values, repeating those that were drawn.
    fn cycle<T: Copy>(drawn: &[T], len: usize) -> Vec<T> {
        drawn.iter().copied().cycle().take(len).collect()
    }

    fn bits(x: &[bf16]) -> Vec<u16> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    proptest! {
        #[test]
        fn orders_as_searched(input in input()) {
            let (order, oracle) = (input.order(), input.oracle());
            prop_assert_eq!(order.rows(), oracle.len());
            for (r, k) in (0..input.received()).flat_map(|r| (0..input.topk).map(move |k| (r, k))) {
                prop_assert_eq!(order.row_of(r, k), oracle.iter().position(|&entry| entry == Some((r, k))));
            }
            prop_assert_eq!((order.groups().len(), order.counts().len()), (input.experts, input.experts));
            let mut start = 0;
            for (expert, (group, &count)) in order.groups().iter().zip(order.counts()).enumerate() {
                let named = input.topk_idx.iter().filter(|&&entry| entry == expert as i32).count();
                prop_assert_eq!((group.start, count as usize), (start, named));
                prop_assert_eq!(group.len(), named.div_ceil(input.alignment) * input.alignment);
                start = group.end;
            }
            prop_assert_eq!(start, order.rows());
        }

        #[test]
        fn expands_as_searched(input in input(), width in 0usize..20) {
            let order = input.order();
            let x: Vec<u16> = (1..).take(input.received() * width).collect();
            let row = |r| x[r * width..][..width].to_vec();
            let expand = |entry: Option<_>| entry.map_or(vec![0; width], |(r, _)| row(r));
            let expected: Vec<u16> = input.oracle().into_iter().flat_map(expand).collect();
            let mut out = vec![0xAAAA; order.rows() * width];
            order.expand(&x, width, &mut out).unwrap();
            prop_assert_eq!(out, expected);
        }

        #[test]
        fn transposes_as_searched(
            input in input(), hidden in 0usize..1300,
            slack in (0usize..9, 0usize..40), drawn in prop::collection::vec(any::<u8>(), 61),
        ) {
            let (order, groups) = (input.order(), scale_groups(hidden));
            let expanded: Vec<_> = input.oracle().into_iter().map(|entry| entry.map(|(r, _)| r)).collect();
            let received: Vec<_> = (0..input.received()).map(Some).collect();
            for format in FORMATS {
                let pitch = groups * format.bytes() + slack.0;
                let bytes = cycle(&drawn, input.received() * pitch);
                let scales = ScaleRows::new(&bytes, input.received(), pitch, hidden, format).unwrap();
                for (rows, order) in [(&expanded, Some(&order)), (&received, None)] {
                    let column_pitch = rows.len() + slack.1;
                    let byte = |i: usize, at| rows.get(i).copied().flatten().map(|r| bytes[r * pitch + at]);

                    let mut out = vec![f32::NAN; groups * column_pitch];
                    match order {
                        Some(order) => order.expand_scales_f32(&scales, column_pitch, &mut out).unwrap(),
                        None => scales.column_major_f32(column_pitch, &mut out).unwrap(),
                    }
                    for (g, i) in (0..groups).flat_map(|g| (0..column_pitch).map(move |i| (g, i))) {
                        let at = g * format.bytes();
                        let stored: Option<Vec<u8>> = (at..at + format.bytes()).map(|at| byte(i, at)).collect();
                        let expected = stored.map_or(0.0, |stored| format.read(&stored, 0));
                        prop_assert_eq!(out[g * column_pitch + i].to_bits(), expected.to_bits());
                    }

                    let mut out = vec![u32::MAX; groups.div_ceil(4) * column_pitch];
                    let packed = match order {
                        Some(order) => order.expand_scales_ue8m0(&scales, column_pitch, &mut out),
                        None => scales.column_major_ue8m0(column_pitch, &mut out),
                    };
                    if format == ScaleFormat::F32 {
                        let expected = ScaleFormat::Ue8m0;
                        let refused = Err(ExpertMajorError::WrongScaleFormat { expected, got: format });
                        prop_assert_eq!(packed, refused);
                        continue;
                    }
                    packed.unwrap();
                    for (w, i) in (0..groups.div_ceil(4)).flat_map(|w| (0..column_pitch).map(move |i| (w, i))) {
                        for b in 0..4 {
                            let expected = if 4 * w + b < groups { byte(i, 4 * w + b).unwrap_or(0) } else { 0 };
                            prop_assert_eq!((out[w * column_pitch + i] >> (8 * b)) as u8, expected);
                        }
                    }
                }
            }
        }

        #[test]
        fn reduces_as_written(
            input in input(), hidden in 0usize..100,
            drawn in prop::collection::vec(element(), 211),
            weights in prop::collection::vec(prop_oneof![30 => -2.0f32..2.0, 1 => any::<f32>()], 31),
        ) {
            let order = input.order();
            let y = cycle(&drawn, order.rows() * hidden);
            let weights = cycle(&weights, input.topk_idx.len());
            for weights in [None, Some(&weights[..])] {
                let mut out = vec![bf16::ONE; input.received() * hidden];
                order.reduce(&y, hidden, weights, &mut out).unwrap();
                for (r, h) in (0..input.received()).flat_map(|r| (0..hidden).map(move |h| (r, h))) {
                    let mut total = 0.0f32;
                    for k in 0..input.topk {
                        if let Some(row) = order.row_of(r, k) {
                            let y = y[row * hidden + h].to_f32();
                            total += weights.map_or(y, |weights| weights[r * input.topk + k] * y);
                        }
                    }
                    let expected = if total.is_nan() { 0x7FC0 } else { bf16::from_f32(total).to_bits() };
                    prop_assert_eq!(out[r * hidden + h].to_bits(), expected);
                }
            }
        }

        /// Each row that has experts here comes back as the sum of as many copies as it has.
        #[test]
        fn reduces_what_it_expanded(input in input(), hidden in 1usize..70) {
            let order = input.order();
            let x: Vec<_> = (0..input.received() * hidden).map(|i| bf16::from_f32((i % 16) as f32)).collect();
            let (mut y, mut out) = (vec![bf16::ONE; order.rows() * hidden], vec![bf16::ONE; x.len()]);
            order.expand(&x, hidden, &mut y).unwrap();
            order.reduce(&y, hidden, None, &mut out).unwrap();
            for (i, (out, x)) in out.iter().zip(&x).enumerate() {
                let entries = &input.topk_idx[i / hidden * input.topk..][..input.topk];
                let copies = entries.iter().filter(|&&entry| entry >= 0).count();
                prop_assert_eq!(out.to_f32(), copies as f32 * x.to_f32());
            }
        }
    }

    #[test]
    fn small_example() {
        let order = ExpertMajor::new(&[2, 0, -1, 2, 2, 2], 2, 4, 4).unwrap();
        assert_eq!(order.counts(), [1, 0, 4, 0]);
        assert_eq!(order.groups(), [0..4, 4..4, 4..8, 8..8]);
        let rows = [0, 1, 2].map(|r| [0, 1].map(|k| order.row_of(r, k)));
        assert_eq!(rows, [[Some(4), Some(0)], [None, Some(5)], [Some(6), Some(7)]]);
        assert_eq!((order.row_of(0, 2), order.row_of(3, 0)), (None, None));
        let mut out = [9u8; 8];
        order.expand(&[1, 2, 3], 1, &mut out).unwrap();
        assert_eq!(out, [1, 0, 0, 0, 1, 2, 3, 3]);
    }

    #[test]
    fn no_received_rows() {
        let order = ExpertMajor::new(&[], usize::MAX, 3, 128).unwrap();
        assert_eq!((order.rows(), order.counts(), order.groups()), (0, &[0; 3][..], &[0..0, 0..0, 0..0][..]));
        order.expand::<u8>(&[], 7168, &mut []).unwrap();
        order.reduce(&[], 7168, Some(&[]), &mut []).unwrap();
        let scales = ScaleRows::new(&[], 0, 224, 7168, ScaleFormat::F32).unwrap();
        order.expand_scales_f32(&scales, 0, &mut []).unwrap();
        scales.column_major_f32(0, &mut []).unwrap();
    }

    #[test]
    fn every_nan_is_the_same() {
        let order = ExpertMajor::new(&[0, 0], 2, 1, 1).unwrap();
        let nans = [0x7F81, 0xFFC0, 0xFFFF, 0x7FC0].map(bf16::from_bits);
        let infinities = [bf16::INFINITY, bf16::NEG_INFINITY, bf16::INFINITY, bf16::NEG_INFINITY];
        let mut out = [bf16::ONE; 4];
        order.reduce(&[nans, infinities].concat(), 4, None, &mut out).unwrap();
        assert_eq!(bits(&out), [0x7FC0; 4]);
        order.reduce(&[infinities; 2].concat(), 4, Some(&[1.0, -1.0]), &mut out).unwrap();
        assert_eq!(bits(&out), [0x7FC0; 4], "Inf - Inf");
        order.reduce(&[[bf16::ZERO; 4]; 2].concat(), 4, Some(&[f32::INFINITY, 1.0]), &mut out).unwrap();
        assert_eq!(bits(&out), [0x7FC0; 4], "Inf * 0");
    }

    #[test]
    fn rows_without_experts_are_positive_zero() {
        let order = ExpertMajor::new(&[-1, 0], 1, 1, 2).unwrap();
        let y = [bf16::NEG_ZERO, bf16::NAN];
        let mut out = [bf16::ONE; 2];
        order.reduce(&y, 1, Some(&[f32::NAN, 1.0]), &mut out).unwrap();
        assert_eq!(
            bits(&out),
            [0, 0],
            "the sum starts at +0.0; padding and the absent entry's weight are not read"
        );
    }

    #[test]
    fn refuses_what_makes_no_order() {
        let refused = |topk_idx: &[i32], topk, experts, alignment| {
            ExpertMajor::new(topk_idx, topk, experts, alignment).unwrap_err().to_string()
        };
        assert_eq!(refused(&[], 0, 1, 1), "topk = 0, at least 1 expected");
        assert_eq!(refused(&[], 1, 1, 0), "alignment = 0, at least 1 expected");
        assert_eq!(refused(&[0; 5], 2, 1, 1), "topk_idx has 5 elements, a multiple of topk = 2 expected");
        assert_eq!(refused(&[0, 1, 0, 4], 2, 4, 1), "topk_idx[1][1] = 4, -1..4 expected");
        assert_eq!(refused(&[0, -2], 2, 4, 1), "topk_idx[0][1] = -2, -1..4 expected");
        assert_eq!(refused(&[0], 1, 0, 1), "topk_idx[0][0] = 0, -1..0 expected");
        let most = "at most 4294967295 expected";
        assert_eq!(refused(&[0], 1, 1, 1 << 32), format!("expanded rows = 4294967296, {most}"));
        assert_eq!(refused(&[0, 0], 1, 1, usize::MAX), format!("expanded rows = {}, {most}", usize::MAX));
        assert!(refused(&[], 1, usize::MAX, 1).starts_with("num_local_experts"));
    }

    #[test]
    fn refuses_wrong_sizes() {
        use ExpertMajorError::{TooSmall, WrongSize};

        // 2 received rows of 8, 4 expanded rows.
        let order = ExpertMajor::new(&[0, 0, -1, 0], 2, 1, 4).unwrap();
        let wrong = |what, expected, got| Err(WrongSize { what, expected, got });
        assert_eq!(order.expand(&[0u8; 15], 8, &mut [0; 32]), wrong("elements of x", 16, 15));
        assert_eq!(order.expand(&[0u8; 16], 8, &mut [0; 33]), wrong("elements of out", 32, 33));
        assert_eq!(order.expand(&[0u8; 16], usize::MAX, &mut []), wrong("elements of x", usize::MAX, 16));

        let (y, mut out) = ([bf16::ONE; 32], [bf16::ONE; 16]);
        assert_eq!(order.reduce(&y[1..], 8, None, &mut out), wrong("elements of y", 32, 31));
        assert_eq!(order.reduce(&y, 8, None, &mut out[1..]), wrong("elements of out", 16, 15));
        assert_eq!(order.reduce(&y, 8, Some(&[1.0; 5]), &mut out), wrong("elements of weights", 4, 5));

        // 5 groups, so 2 words.
        let (hidden, format) = (4 * 128 + 1, ScaleFormat::Ue8m0);
        let new = |bytes, pitch, format| ScaleRows::new(bytes, 2, pitch, hidden, format).map(drop);
        assert_eq!(new(&[0; 11], 5, format), wrong("bytes of scales", 10, 11));
        assert_eq!(
            new(&[0; 10], 5, ScaleFormat::F32),
            Err(TooSmall { what: "scale pitch", least: 20, got: 5 })
        );

        let scales = ScaleRows::new(&[0; 12], 2, 6, hidden, format).unwrap();
        let narrow = |least, got| Err(TooSmall { what: "column_pitch", least, got });
        assert_eq!(scales.column_major_f32(1, &mut [0.0; 5]), narrow(2, 1));
        assert_eq!(scales.column_major_ue8m0(4, &mut [0; 9]), wrong("elements of out", 8, 9));
        assert_eq!(order.expand_scales_f32(&scales, 4, &mut [0.0; 19]), wrong("elements of out", 20, 19));
        assert_eq!(order.expand_scales_ue8m0(&scales, 3, &mut [0; 6]), narrow(4, 3));
        let three = ScaleRows::new(&[0; 15], 3, 5, hidden, format).unwrap();
        assert_eq!(order.expand_scales_f32(&three, 4, &mut [0.0; 20]), wrong("rows of scales", 2, 3));
        assert_eq!(wrong("rows of scales", 2, 3).unwrap_err().to_string(), "3 rows of scales, 2 expected");
    }
}
