//! Rows and where their parts lie: in a ring's slot and in a receive buffer.

use super::render::device_struct;
use super::{LINE, ROW_ALIGN, align_up};
use crate::config::{Config, MAX_TOPK};
use crate::error::Reason;
use crate::numeric::{ScaleFormat, scale_groups};

/// Element format of dispatched rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowFormat {
    /// BF16 elements.
    Bf16,
    /// E4M3 elements with one scale per 128 elements.
    Fp8(ScaleFormat),
}

impl RowFormat {
    /// The format's code in records.
    pub fn code(self) -> u32 {
        match self {
            Self::Bf16 => 1,
            Self::Fp8(ScaleFormat::F32) => 2,
            Self::Fp8(ScaleFormat::Ue8m0) => 3,
        }
    }

    /// Elements a row's `hidden` must be a multiple of: 16 bytes' worth.
    pub fn hidden_multiple(self) -> usize {
        match self {
            Self::Bf16 => ROW_ALIGN / 2,
            Self::Fp8(_) => ROW_ALIGN,
        }
    }
}

/// What one token's row is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RowShape {
    /// Elements per row.
    pub hidden: usize,
    /// Entries of `topk_idx` and `topk_weights` per token.
    pub topk: usize,
    /// Element format.
    pub format: RowFormat,
}

impl RowShape {
    /// Bytes of the elements of a row.
    pub fn row_bytes(&self) -> usize {
        match self.format {
            RowFormat::Bf16 => 2 * self.hidden,
            RowFormat::Fp8(_) => self.hidden,
        }
    }

    /// Bytes from one row's scales to the next's, a multiple of 16; 0 for BF16.
    pub fn scale_pitch(&self) -> usize {
        match self.format {
            RowFormat::Bf16 => 0,
            RowFormat::Fp8(scales) => align_up(scale_groups(self.hidden) * scales.bytes(), ROW_ALIGN),
        }
    }

    /// Whether rings made for `config` can carry such rows.
    pub fn check(&self, config: &Config) -> Result<(), Reason> {
        let (hidden, multiple) = (self.hidden as u64, self.format.hidden_multiple() as u64);
        if hidden == 0 || hidden % multiple != 0 {
            return Err(Reason::HiddenNotAligned { hidden, multiple });
        }
        if self.hidden > config.max_hidden {
            return Err(Reason::HiddenTooLarge { hidden, max: config.max_hidden as u64 });
        }
        check_topk(self.topk, config)
    }
}

/// Whether rings made for `config` can carry `topk` entries per token.
pub fn check_topk(topk: usize, config: &Config) -> Result<(), Reason> {
    match (1..=config.max_topk).contains(&topk) {
        true => Ok(()),
        false => Err(Reason::TopkOutOfRange { topk: topk as u64, max: config.max_topk as u64 }),
    }
}

/// A slot of a dispatch ring: header, row, scales, each 16-byte aligned and contiguous.
#[derive(Debug, Clone, Copy)]
pub struct DispatchSlot {
    /// Offset of the row: the header's size.
    pub row: usize,
    /// Offset of the scales.
    pub scales: usize,
    /// Bytes from slot to slot.
    pub pitch: usize,
}

impl DispatchSlot {
    /// The slot for rows of `shape`.
    pub fn new(shape: &RowShape) -> Self {
        let row = 4 * header_words(shape.topk);
        let scales = row + align_up(shape.row_bytes(), ROW_ALIGN);
        Self { row, scales, pitch: scales + shape.scale_pitch() }
    }
}

/// A slot of a combine ring: the partial sums of `topk_weights` (f32, where asked for), then the BF16 row.
#[derive(Debug, Clone, Copy)]
pub struct CombineSlot {
    /// Offset of the row.
    pub row: usize,
    /// Bytes from slot to slot.
    pub pitch: usize,
}

impl CombineSlot {
    /// The slot for `hidden` elements and `weights` partial sums (0 or topk).
    pub fn new(hidden: usize, weights: usize) -> Self {
        let row = align_up(4 * weights, ROW_ALIGN);
        Self { row, pitch: row + align_up(2 * hidden, ROW_ALIGN) }
    }
}

/// The largest slot pitches that `config` admits: (dispatch, combine).
pub fn max_pitches(config: &Config) -> (usize, usize) {
    let shape = |format: RowFormat| RowShape {
        hidden: align_up(config.max_hidden, format.hidden_multiple()),
        topk: config.max_topk,
        format,
    };
    let formats = [RowFormat::Bf16, RowFormat::Fp8(ScaleFormat::F32), RowFormat::Fp8(ScaleFormat::Ue8m0)];
    let dispatch = formats.map(|format| DispatchSlot::new(&shape(format)).pitch).into_iter().max();
    let hidden = shape(RowFormat::Bf16).hidden;
    (dispatch.unwrap_or(0), CombineSlot::new(hidden, config.max_topk).pitch)
}

/// 32-bit words of a slot header with `topk` entries, a multiple of 16 bytes.
pub const fn header_words(topk: usize) -> usize {
    align_up(1 + 3 * topk, ROW_ALIGN / 4)
}

/// The largest header.
pub const MAX_HEADER_WORDS: usize = header_words(MAX_TOPK);

/// A slot header: the source token, then per entry the global expert (−1 = masked), the weight's bits, and
/// the row's offset within its (source, channel, destination) run. The offset lets any warp place any slot
/// without a serial scan. Weights travel as bits: NaNs and signed zeros pass untouched.
#[derive(Debug, Clone, Copy)]
pub struct Header<W> {
    words: W,
    topk: usize,
}

impl<W> Header<W> {
    /// Index of the first expert, of the first weight and of the first offset.
    pub const fn parts(topk: usize) -> [u32; 3] {
        [1, 1 + topk as u32, 1 + 2 * topk as u32]
    }
}

impl<W: AsRef<[u32]>> Header<W> {
    /// The header that lies in `words`.
    pub fn new(words: W, topk: usize) -> Self {
        debug_assert!(words.as_ref().len() >= header_words(topk));
        Self { words, topk }
    }

    /// Index of the token at its source rank.
    pub fn token(&self) -> u32 {
        self.words.as_ref()[0]
    }

    /// Global experts of the token, −1 = masked.
    pub fn experts(&self) -> &[i32] {
        bytemuck::cast_slice(self.part(0))
    }

    /// Bits of the weights.
    pub fn weights(&self) -> &[u32] {
        self.part(1)
    }

    /// Per entry, the row's offset within its run; meaningless for entries of other nodes.
    pub fn offsets(&self) -> &[u32] {
        self.part(2)
    }

    fn part(&self, part: usize) -> &[u32] {
        &self.words.as_ref()[Self::parts(self.topk)[part] as usize..][..self.topk]
    }
}

impl<W: AsMut<[u32]>> Header<W> {
    /// Writes the source token.
    pub fn set_token(&mut self, token: u32) {
        self.words.as_mut()[0] = token;
    }

    /// Writes entry `k`.
    pub fn set_entry(&mut self, k: usize, expert: i32, weight: u32, offset: u32) {
        let words = self.words.as_mut();
        for (part, value) in Self::parts(self.topk).into_iter().zip([expert as u32, weight, offset]) {
            words[part as usize + k] = value;
        }
    }
}

/// Where the parts of a receive buffer of `capacity` rows lie, as offsets from its start. Row r of each part
/// belongs to the same token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecvLayout {
    /// The shape of its rows.
    pub shape: RowShape,
    /// Rows it holds.
    pub capacity: usize,
    /// Elements [capacity, hidden].
    pub x: usize,
    /// Scales [capacity, scale_pitch bytes].
    pub scales: usize,
    /// Local expert indices, i32 [capacity, topk].
    pub topk_idx: usize,
    /// Weights, f32 [capacity, topk].
    pub topk_weights: usize,
    /// Source (rank, token), u32 [capacity, 2].
    pub source: usize,
    /// Size in bytes.
    pub bytes: usize,
}

impl RecvLayout {
    /// A buffer of `capacity` rows of `shape`.
    pub fn new(shape: RowShape, capacity: usize) -> Self {
        let mut end = 0;
        let mut part = |row_bytes: usize| {
            let start = end;
            end = align_up(start + capacity * row_bytes, LINE);
            start
        };
        let (x, scales) = (part(shape.row_bytes()), part(shape.scale_pitch()));
        let (topk_idx, topk_weights, source) = (part(4 * shape.topk), part(4 * shape.topk), part(8));
        Self { shape, capacity, x, scales, topk_idx, topk_weights, source, bytes: end }
    }

    /// Where the parts of a buffer at `offset` of a region lie in that region.
    pub fn parts_at(&self, offset: usize) -> RecvParts {
        let [x, scales, topk_idx, topk_weights, source] =
            [self.x, self.scales, self.topk_idx, self.topk_weights, self.source]
                .map(|at| (offset + at) as u64);
        RecvParts { x, scales, topk_idx, topk_weights, source }
    }
}

device_struct! {
    /// The parts of a receive buffer as offsets in its rank's region: what a peer is told, so that it derives none.
    RecvParts {
        /// Elements.
        pub x: u64,
        /// Scales.
        pub scales: u64,
        /// Local expert indices.
        pub topk_idx: u64,
        /// Weights.
        pub topk_weights: u64,
        /// Source (rank, token).
        pub source: u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_slot_are_aligned() {
        for (hidden, topk) in [(16, 1), (7168, 8), (400, 32), (144, 3)] {
            for format in
                [RowFormat::Bf16, RowFormat::Fp8(ScaleFormat::F32), RowFormat::Fp8(ScaleFormat::Ue8m0)]
            {
                let shape = RowShape { hidden, topk, format };
                let slot = DispatchSlot::new(&shape);
                assert!(slot.row >= 4 * (1 + 3 * topk));
                assert!(slot.scales - slot.row == shape.row_bytes());
                assert!([slot.row, slot.scales, slot.pitch].iter().all(|offset| offset % ROW_ALIGN == 0));
            }
        }
    }

    #[test]
    fn a_header_returns_what_was_written() {
        let mut words = [0; header_words(3)];
        let mut header = Header::new(&mut words[..], 3);
        header.set_token(9);
        header.set_entry(2, -1, 0x7fc0_dead, 5);
        let header = Header::new(&words[..], 3);
        assert_eq!((header.token(), header.experts()[2]), (9, -1));
        assert_eq!((header.weights()[2], header.offsets()[2]), (0x7fc0_dead, 5));
    }
}
