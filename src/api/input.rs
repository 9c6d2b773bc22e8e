//! What callers hand in: routing, tokens in any of the accepted forms, and the experts' outputs.

use std::sync::Arc;

use half::bf16;

use super::buffer::RecvBuffer;
use super::communicator::Communicator;
use crate::error::{Error, Reason, Tensor};
use crate::numeric::{ScaleFormat, scale_groups};
use crate::proto::{Input, ScaleView};
use crate::wire::shape::{RowFormat, RowShape};

/// Which experts each token goes to, and with which weights. It is copied when an operation starts.
#[derive(Debug, Clone, Copy)]
pub struct Routing<'a> {
    /// Entries per token, K.
    pub topk: usize,
    /// Global expert ids [T, K]; −1 is a masked entry.
    pub topk_idx: &'a [i64],
    /// Weights [T, K]; NaNs and signed zeros pass untouched.
    pub topk_weights: &'a [f32],
}

/// Tokens that can be dispatched: `Vec<bf16>`, `Arc<[bf16]>` or whatever holds BF16 rows [T, hidden] (quantised on
/// the way if the receive buffer is FP8), or [`Fp8Tokens`].
pub trait Tokens: sealed::Tokens {}

impl<B: sealed::Tokens> Tokens for B {}

pub(crate) mod sealed {
    use super::*;

    pub trait Tokens: Send + Sync + 'static {
        /// The rows. They stay where they are while `self` is borrowed.
        fn view(&self) -> Input<'_>;
        /// Whether these are `tokens` rows of `shape`.
        fn check(&self, tokens: usize, shape: &RowShape) -> Result<(), Reason>;
    }

    pub trait ExpertOutputs: Sized + Send + Sync + 'static {
        /// Where the rows are, if peers can read them there.
        fn in_place(&self) -> Option<&RecvBuffer>;
        /// The rows copied to where peers can read them; called if they are not in place.
        fn copied(&self, communicator: &Communicator, topk: usize) -> Result<RecvBuffer, Reason>;
        /// Given back after a fault: not if peers may still read it.
        fn after_fault(self) -> Option<Self>;
    }
}

/// `tensor` has the elements it should have.
pub(crate) fn check_size(tensor: Tensor, expected: usize, got: usize) -> Result<(), Reason> {
    match expected == got {
        true => Ok(()),
        false => Err(Reason::WrongSize { tensor, expected: expected as u64, got: got as u64 }),
    }
}

impl<B: AsRef<[bf16]> + Send + Sync + 'static> sealed::Tokens for B {
    fn view(&self) -> Input<'_> {
        Input::Bf16(self.as_ref())
    }

    fn check(&self, tokens: usize, shape: &RowShape) -> Result<(), Reason> {
        check_size(Tensor::X, tokens * shape.hidden, self.as_ref().len())
    }
}

/// Ready E4M3 tokens: codes [T, hidden] and one scale per 128 elements.
#[derive(Debug, Clone)]
pub struct Fp8Tokens<C> {
    /// E4M3 codes, row-major and dense.
    pub codes: C,
    /// Their scales.
    pub scales: Scales,
}

/// Scales of E4M3 tokens, as quantising kernels leave them.
#[derive(Debug, Clone)]
pub struct Scales {
    /// The numbers.
    pub data: ScaleData,
    /// Their order.
    pub order: ScaleOrder,
}

/// The element type of [`Scales`].
#[derive(Debug, Clone)]
pub enum ScaleData {
    /// One f32 per group.
    F32(Arc<[f32]>),
    /// Powers of two, four groups to a word: the biased exponent of group 4 i + j is byte j (from the least
    /// significant) of word i.
    Ue8m0(Arc<[u32]>),
}

/// The order of [`Scales`], in elements of the data (f32s or words of four groups).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleOrder {
    /// A token's elements are neighbours; tokens are `pitch` elements apart.
    RowMajor {
        /// Elements from token to token.
        pitch: usize,
    },
    /// A group's elements are neighbours, as TMA-fed grouped GEMMs take them; groups are `pitch` elements apart.
    ColumnMajor {
        /// Elements from group to group.
        pitch: usize,
    },
}

impl Scales {
    fn format(&self) -> ScaleFormat {
        match self.data {
            ScaleData::F32(_) => ScaleFormat::F32,
            ScaleData::Ue8m0(_) => ScaleFormat::Ue8m0,
        }
    }

    fn strides(&self) -> (usize, usize) {
        match self.order {
            ScaleOrder::RowMajor { pitch } => (pitch, 1),
            ScaleOrder::ColumnMajor { pitch } => (1, pitch),
        }
    }

    fn bytes(&self) -> &[u8] {
        match &self.data {
            ScaleData::F32(data) => bytemuck::cast_slice(data),
            ScaleData::Ue8m0(data) => bytemuck::cast_slice(data),
        }
    }

    fn check(&self, tokens: usize, hidden: usize) -> Result<(), Reason> {
        let elements = match self.data {
            ScaleData::F32(_) => scale_groups(hidden),
            ScaleData::Ue8m0(_) => scale_groups(hidden).div_ceil(4),
        };
        let (token, group) = self.strides();
        let Some(last) = tokens.checked_sub(1) else { return Ok(()) };
        // Pitches are the caller's: any number.
        let last = last.saturating_mul(token).saturating_add((elements - 1).saturating_mul(group));
        let needed = last.saturating_add(1);
        let wide_enough = match self.order {
            ScaleOrder::RowMajor { pitch } => pitch >= elements,
            ScaleOrder::ColumnMajor { pitch } => pitch >= tokens,
        };
        let got = self.bytes().len() / 4;
        match wide_enough && got >= needed {
            true => Ok(()),
            false => {
                check_size(Tensor::Scales, (tokens * elements).max(needed), got.min(tokens * elements - 1))
            }
        }
    }
}

impl<C: AsRef<[u8]> + Send + Sync + 'static> sealed::Tokens for Fp8Tokens<C> {
    fn view(&self) -> Input<'_> {
        let (token_stride, group_stride) = self.scales.strides();
        Input::E4m3(self.codes.as_ref(), ScaleView { bytes: self.scales.bytes(), token_stride, group_stride })
    }

    fn check(&self, tokens: usize, shape: &RowShape) -> Result<(), Reason> {
        if shape.format != RowFormat::Fp8(self.scales.format()) {
            return Err(Reason::FormatMismatch);
        }
        check_size(Tensor::X, tokens * shape.hidden, self.codes.as_ref().len())?;
        self.scales.check(tokens, shape.hidden)
    }
}

/// Experts' outputs that can be combined: a BF16 [`RecvBuffer`], read in place by the peers, or [`Rows`] from
/// elsewhere, copied in first.
pub trait ExpertOutputs: sealed::ExpertOutputs {}

impl<Y: sealed::ExpertOutputs> ExpertOutputs for Y {}

impl sealed::ExpertOutputs for RecvBuffer {
    fn in_place(&self) -> Option<&RecvBuffer> {
        Some(self)
    }

    fn copied(&self, _: &Communicator, _: usize) -> Result<RecvBuffer, Reason> {
        unreachable!("a receive buffer is in place")
    }

    fn after_fault(self) -> Option<Self> {
        None
    }
}

/// Experts' outputs in memory of the caller's own.
#[derive(Debug, Clone)]
pub struct Rows<B> {
    /// BF16 rows [R, hidden], in received order.
    pub rows: B,
    /// Elements per row.
    pub hidden: usize,
    /// Weights [R, topk] to be summed, where the combine returns them.
    pub topk_weights: Option<Vec<f32>>,
}

impl<B: AsRef<[bf16]> + Send + Sync + 'static> sealed::ExpertOutputs for Rows<B> {
    fn in_place(&self) -> Option<&RecvBuffer> {
        None
    }

    fn copied(&self, communicator: &Communicator, topk: usize) -> Result<RecvBuffer, Reason> {
        let shape = RowShape { hidden: self.hidden, topk, format: RowFormat::Bf16 };
        shape.check(communicator.config())?;
        let rows = self.rows.as_ref();
        let count = rows.len() / self.hidden;
        check_size(Tensor::ExpertOutputs, count * self.hidden, rows.len())?;
        let mut buffer = communicator.recv_buffer(count, shape).map_err(|error| match error {
            Error::PoolExhausted { needed, largest } => {
                Reason::PoolExhausted { needed: needed as u64, largest: largest as u64 }
            }
            _ => Reason::FormatMismatch,
        })?;
        buffer.set_rows(count);
        buffer.bf16_mut().copy_from_slice(rows);
        if let Some(weights) = &self.topk_weights {
            check_size(Tensor::TopkWeights, count * topk, weights.len())?;
            buffer.topk_weights_mut().copy_from_slice(weights);
        }
        Ok(buffer)
    }

    fn after_fault(self) -> Option<Self> {
        Some(self)
    }
}

/// The input of a combine.
#[derive(Debug)]
pub struct Combine<Y> {
    pub(crate) outputs: Y,
    pub(crate) bias: Option<Arc<[bf16]>>,
    pub(crate) out: Vec<bf16>,
    pub(crate) with_weights: bool,
}

impl<Y: ExpertOutputs> Combine<Y> {
    /// Combines the experts' `outputs`.
    pub fn new(outputs: Y) -> Self {
        Self { outputs, bias: None, out: Vec::new(), with_weights: false }
    }

    /// Adds `bias` [T, hidden] to the sums, last.
    pub fn bias(mut self, bias: Arc<[bf16]>) -> Self {
        self.bias = Some(bias);
        self
    }

    /// Writes the result into `out`, resized to [T, hidden]. A buffer used before spares the page faults.
    pub fn out(mut self, out: Vec<bf16>) -> Self {
        self.out = out;
        self
    }

    /// Also sums the outputs' `topk_weights` [R, topk] and returns them [T, topk]: the backward of dispatch
    /// needs the gradients of the weights. Every rank must ask for it.
    pub fn with_topk_weights(mut self) -> Self {
        self.with_weights = true;
        self
    }

    /// The outputs and the result buffer, as they were handed in.
    pub fn into_parts(self) -> (Y, Option<Arc<[bf16]>>, Vec<bf16>) {
        (self.outputs, self.bias, self.out)
    }
}
