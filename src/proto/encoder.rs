//! From the caller's rows to the bytes of a slot, quantising on the way where the operation asks for it.

use std::sync::Arc;

use super::{Input, Op, Port};
use crate::numeric::{ScaleFormat, quantise, scale_groups};
use crate::wire::shape::RowFormat;

const NONE: u32 = u32::MAX;

/// Nodes want about the same tokens, but not in step: rows are kept this many chunks long.
const KEPT_CHUNKS: usize = 4;

/// Encodes tokens of one channel. It keeps the rows of a few chunks, so that a token wanted by several nodes
/// is quantised once.
pub struct Encoder {
    op: Arc<Op>,
    tokens: Vec<u32>,
    rows: Vec<u8>,
}

impl Encoder {
    pub(super) fn new(op: Arc<Op>) -> Self {
        let kept = KEPT_CHUNKS * op.config.chunk_tokens.next_power_of_two();
        let pitch = match op.shape.format {
            RowFormat::Bf16 => 0,
            RowFormat::Fp8(_) => op.shape.row_bytes() + op.shape.scale_pitch(),
        };
        Self { tokens: vec![NONE; kept], rows: vec![0; kept * pitch], op }
    }

    /// The row and the scales of `token`, as they lie in a slot.
    pub(super) fn encode<'a>(&'a mut self, port: &'a impl Port, token: usize) -> (&'a [u8], &'a [u8]) {
        let shape = &self.op.shape;
        let (row_bytes, scale_pitch) = (shape.row_bytes(), shape.scale_pitch());
        let elements = token * shape.hidden..(token + 1) * shape.hidden;
        let input = port.input();
        let format = match (shape.format, input) {
            (RowFormat::Fp8(format), _) => format,
            (RowFormat::Bf16, Input::Bf16(x)) => return (bytemuck::cast_slice(&x[elements]), &[]),
            (RowFormat::Bf16, _) => unreachable!("formats are checked when the operation starts"),
        };
        let index = token & (self.tokens.len() - 1);
        let (codes, scales) =
            self.rows[index * (row_bytes + scale_pitch)..][..row_bytes + scale_pitch].split_at_mut(row_bytes);
        let hit = self.tokens[index] == token as u32;
        self.tokens[index] = token as u32;
        match input {
            Input::E4m3(ready, view) => {
                if !hit {
                    gather_scales(view, format, token, shape.hidden, scales);
                }
                (&ready[elements], scales)
            }
            Input::Bf16(x) => {
                if !hit {
                    quantise(&x[elements], format, codes, scales);
                }
                (codes, scales)
            }
            Input::None => unreachable!("a dispatch has input"),
        }
    }
}

/// Copies the scales of `token` from the caller's order into a dense row.
fn gather_scales(
    view: super::ScaleView<'_>,
    format: ScaleFormat,
    token: usize,
    hidden: usize,
    row: &mut [u8],
) {
    for group in 0..scale_groups(hidden) {
        let (from, to, len) = match format {
            ScaleFormat::F32 => (4 * (token * view.token_stride + group * view.group_stride), 4 * group, 4),
            // Four exponents to a 32-bit word, the lowest byte first.
            ScaleFormat::Ue8m0 => {
                let word = token * view.token_stride + group / 4 * view.group_stride;
                (4 * word + group % 4, group, 1)
            }
        };
        row[to..to + len].copy_from_slice(&view.bytes[from..from + len]);
    }
}
