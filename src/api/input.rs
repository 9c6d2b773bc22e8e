//! What callers hand in: routing, tokens in any of the accepted forms, and the experts' outputs.

use std::sync::Arc;

use half::bf16;

use super::buffer::RecvBuffer;
use super::communicator::Communicator;
use super::device::{DeviceRouting, DeviceSlice};
use crate::config::Config;
use crate::error::{Reason, Tensor};
use crate::numeric::{ScaleFormat, scale_groups};
use crate::proto::{Input, ScaleView, plan};
use crate::wire::shape::{RowFormat, RowShape};

/// Routing on the host or on the device.
pub enum Routed<'a> {
    /// On the host.
    Host(Routing<'a>),
    /// On the device.
    Device(DeviceRouting),
}

impl Routed<'_> {
    /// Entries per token.
    pub(crate) fn topk(&self) -> usize {
        match self {
            Self::Host(routing) => routing.topk,
            Self::Device(routing) => routing.topk,
        }
    }

    /// Whether kernels can take it; its tokens. They check the experts.
    pub(crate) fn check(&self, config: &Config) -> Result<usize, Reason> {
        let (topk, entries, weights) = match self {
            Self::Host(routing) => (routing.topk, routing.topk_idx.len(), routing.topk_weights.len()),
            Self::Device(routing) => (routing.topk, routing.topk_idx.len(), routing.topk_weights.len()),
        };
        let tokens = plan::check_sizes(config, topk, entries, weights)?;
        match tokens <= config.max_tokens {
            true => Ok(tokens),
            false => Err(Reason::TooManyTokens { tokens: tokens as u64, max: config.max_tokens as u64 }),
        }
    }
}

impl<'a> From<Routing<'a>> for Routed<'a> {
    fn from(routing: Routing<'a>) -> Self {
        Self::Host(routing)
    }
}

impl From<DeviceRouting> for Routed<'_> {
    fn from(routing: DeviceRouting) -> Self {
        Self::Device(routing)
    }
}

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

/// Where tokens are.
pub enum TokensAt<'a> {
    /// On the host.
    Host(Input<'a>),
    /// On the device: rows, and where they are E4M3 their scales.
    Device {
        /// Address of the rows.
        x: u64,
        /// Address of the scales; 0 for none.
        scales: u64,
        /// Elements between tokens and between groups.
        scale_strides: (u64, u64),
    },
}

pub(crate) mod sealed {
    use super::*;

    pub trait Tokens: Send + Sync + 'static {
        /// The rows. They stay where they are while `self` is borrowed.
        fn view(&self) -> TokensAt<'_>;
        /// Whether these are `tokens` rows of `shape`.
        fn check(&self, tokens: usize, shape: &RowShape) -> Result<(), Reason>;
    }

    pub trait ExpertOutputs: Sized + Send + Sync + 'static {
        /// Where the rows are, if peers can read them there.
        fn in_place(&mut self) -> Option<&mut RecvBuffer>;
        /// The same.
        fn buffer(&self) -> Option<&RecvBuffer>;
        /// The rows copied to where peers can read them; called if they are not in place.
        fn copied(&self, communicator: &Communicator, topk: usize) -> Result<RecvBuffer, Reason>;
        /// Given back after a fault: not if peers may still read it.
        fn after_fault(self) -> Option<Self>;
    }
}

impl<B: AsRef<[bf16]> + Send + Sync + 'static> sealed::Tokens for B {
    fn view(&self) -> TokensAt<'_> {
        TokensAt::Host(Input::Bf16(self.as_ref()))
    }

    fn check(&self, tokens: usize, shape: &RowShape) -> Result<(), Reason> {
        Tensor::X.check_size(tokens * shape.hidden, self.as_ref().len())
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

impl ScaleOrder {
    /// Elements between tokens and between groups.
    pub(crate) fn strides(self) -> (usize, usize) {
        match self {
            Self::RowMajor { pitch } => (pitch, 1),
            Self::ColumnMajor { pitch } => (1, pitch),
        }
    }
}

impl Scales {
    fn format(&self) -> ScaleFormat {
        match self.data {
            ScaleData::F32(_) => ScaleFormat::F32,
            ScaleData::Ue8m0(_) => ScaleFormat::Ue8m0,
        }
    }

    fn bytes(&self) -> &[u8] {
        match &self.data {
            ScaleData::F32(data) => bytemuck::cast_slice(data),
            ScaleData::Ue8m0(data) => bytemuck::cast_slice(data),
        }
    }
}

/// `len` elements of scales in `order` are enough for `tokens` rows of `hidden` elements.
pub(crate) fn check_scales(
    (format, order, len): (ScaleFormat, ScaleOrder, usize),
    tokens: usize,
    hidden: usize,
) -> Result<(), Reason> {
    let elements = match format {
        ScaleFormat::F32 => scale_groups(hidden),
        ScaleFormat::Ue8m0 => scale_groups(hidden).div_ceil(4),
    };
    let (token, group) = order.strides();
    let Some(last) = tokens.checked_sub(1) else { return Ok(()) };
    // Pitches are the caller's: any number.
    let last = last.saturating_mul(token).saturating_add((elements - 1).saturating_mul(group));
    let needed = last.saturating_add(1);
    let wide_enough = match order {
        ScaleOrder::RowMajor { pitch } => pitch >= elements,
        ScaleOrder::ColumnMajor { pitch } => pitch >= tokens,
    };
    match wide_enough && len >= needed {
        true => Ok(()),
        false => Tensor::Scales.check_size((tokens * elements).max(needed), len.min(tokens * elements - 1)),
    }
}

impl<C: AsRef<[u8]> + Send + Sync + 'static> sealed::Tokens for Fp8Tokens<C> {
    fn view(&self) -> TokensAt<'_> {
        let (token_stride, group_stride) = self.scales.order.strides();
        let scales = ScaleView { bytes: self.scales.bytes(), token_stride, group_stride };
        TokensAt::Host(Input::E4m3(self.codes.as_ref(), scales))
    }

    fn check(&self, tokens: usize, shape: &RowShape) -> Result<(), Reason> {
        if shape.format != RowFormat::Fp8(self.scales.format()) {
            return Err(Reason::FormatMismatch);
        }
        Tensor::X.check_size(tokens * shape.hidden, self.codes.as_ref().len())?;
        let Scales { order, .. } = self.scales;
        check_scales((self.scales.format(), order, self.scales.bytes().len() / 4), tokens, shape.hidden)
    }
}

/// Experts' outputs that can be combined: a BF16 [`RecvBuffer`], read in place by the peers, or [`Rows`] from
/// elsewhere, copied in first.
pub trait ExpertOutputs: sealed::ExpertOutputs {}

impl<Y: sealed::ExpertOutputs> ExpertOutputs for Y {}

impl sealed::ExpertOutputs for RecvBuffer {
    fn in_place(&mut self) -> Option<&mut RecvBuffer> {
        Some(self)
    }

    fn buffer(&self) -> Option<&RecvBuffer> {
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
    fn in_place(&mut self) -> Option<&mut RecvBuffer> {
        None
    }

    fn buffer(&self) -> Option<&RecvBuffer> {
        None
    }

    fn copied(&self, communicator: &Communicator, topk: usize) -> Result<RecvBuffer, Reason> {
        let shape = RowShape { hidden: self.hidden, topk, format: RowFormat::Bf16 };
        shape.check(communicator.config())?;
        let rows = self.rows.as_ref();
        let count = rows.len() / self.hidden;
        Tensor::ExpertOutputs.check_size(count * self.hidden, rows.len())?;
        let mut buffer = communicator.recv_buffer(count, shape).map_err(|error| error.for_peers())?;
        buffer.set_rows(count);
        buffer.bf16_mut().copy_from_slice(rows);
        if let Some(weights) = &self.topk_weights {
            Tensor::TopkWeights.check_size(count * topk, weights.len())?;
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
    pub(crate) on_device: OnDevice,
}

/// What of a combine lies on the device, instead of the host.
#[derive(Debug, Clone, Default)]
pub(crate) struct OnDevice {
    pub bias: Option<DeviceSlice<bf16>>,
    pub out: Option<DeviceSlice<bf16>>,
    pub weights: Option<DeviceSlice<f32>>,
}

impl OnDevice {
    /// The bias.
    pub fn bias_rows(&self) -> TokensAt<'static> {
        match &self.bias {
            Some(bias) => TokensAt::Device { x: bias.address(), scales: 0, scale_strides: (0, 0) },
            None => TokensAt::Host(Input::None),
        }
    }
}

impl<Y: ExpertOutputs> Combine<Y> {
    /// Combines the experts' `outputs`.
    pub fn new(outputs: Y) -> Self {
        let on_device = OnDevice::default();
        Self { outputs, bias: None, out: Vec::new(), with_weights: false, on_device }
    }

    /// Adds `bias` [T, hidden] to the sums, last.
    pub fn bias(mut self, bias: Arc<[bf16]>) -> Self {
        self.bias = Some(bias);
        self
    }

    /// Adds `bias` [T, hidden] in device memory to the sums, last.
    pub fn device_bias(mut self, bias: DeviceSlice<bf16>) -> Self {
        self.on_device.bias = Some(bias);
        self
    }

    /// Writes the result into `out`, resized to [T, hidden]. A buffer used before spares the page faults.
    pub fn out(mut self, out: Vec<bf16>) -> Self {
        self.out = out;
        self
    }

    /// Writes the result into `out` [T, hidden] in device memory; [`Combined::x`](crate::Combined::x) stays empty.
    pub fn device_out(mut self, out: DeviceSlice<bf16>) -> Self {
        self.on_device.out = Some(out);
        self
    }

    /// Also sums the outputs' `topk_weights` [R, topk] and returns them [T, topk]: the backward of dispatch
    /// needs the gradients of the weights. Every rank must ask for it.
    pub fn with_topk_weights(mut self) -> Self {
        self.with_weights = true;
        self
    }

    /// The same, into `weights` [T, topk] in device memory.
    pub fn with_device_topk_weights(mut self, weights: DeviceSlice<f32>) -> Self {
        self.on_device.weights = Some(weights);
        self.with_topk_weights()
    }

    /// Whether bias and results are of a size: so many elements, so many weights.
    pub(crate) fn check(&self, elements: usize, weights: usize) -> Result<(), Reason> {
        let OnDevice { bias, out, weights: sums } = &self.on_device;
        let bias = self.bias.as_ref().map(|bias| bias.len()).or(bias.as_ref().map(DeviceSlice::len));
        bias.map_or(Ok(()), |len| Tensor::Bias.check_size(elements, len))?;
        out.as_ref().map_or(Ok(()), |out| Tensor::Out.check_size(elements, out.len()))?;
        sums.as_ref().map_or(Ok(()), |sums| Tensor::TopkWeights.check_size(weights, sums.len()))
    }

    /// The outputs, to be changed before the operation that takes them.
    pub fn outputs_mut(&mut self) -> &mut Y {
        &mut self.outputs
    }

    /// The outputs and the result buffer, as they were handed in.
    pub fn into_parts(self) -> (Y, Option<Arc<[bf16]>>, Vec<bf16>) {
        (self.outputs, self.bias, self.out)
    }
}
