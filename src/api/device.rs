//! Rows in device memory, and the streams of callers: what a CUDA engine takes without a copy.

#![allow(unsafe_code)]

use std::any::Any;
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use half::bf16;

use super::input::{ScaleOrder, TokensAt, check_scales, sealed};
use crate::device::RawStream;
use crate::error::{Reason, Tensor};
use crate::numeric::ScaleFormat;
use crate::wire::shape::{RowFormat, RowShape};

/// Elements in the memory of the rank's device, and whoever owns them. Cheap to clone.
#[derive(Clone)]
pub struct DeviceSlice<T> {
    address: u64,
    len: usize,
    _owner: Arc<dyn Any + Send + Sync>,
    _elements: PhantomData<fn() -> T>,
}

impl<T> DeviceSlice<T> {
    /// The `len` elements at `address`, as long as `owner` lives.
    ///
    /// # Safety
    /// While this or a clone of it lives, they lie in memory that kernels on the rank's device reach at `address`. What
    /// an operation reads is not written from its start to its end, and what it writes is not touched by anybody else;
    /// work on other streams that comes before or after is ordered by events or streams
    /// ([`Communicator::after`](crate::Communicator::after), [`Pending::before`](crate::Pending::before)).
    pub unsafe fn from_raw(address: u64, len: usize, owner: impl Any + Send + Sync) -> Self {
        Self { address, len, _owner: Arc::new(owner), _elements: PhantomData }
    }

    /// Address of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<T: Send + Sync + 'static> From<Arc<CudaSlice<T>>> for DeviceSlice<T> {
    /// The elements of `slice`, which must be on the rank's device. Its own stream and events know nothing of the
    /// operations that use it: [`Communicator::after`](crate::Communicator::after) that stream and
    /// [`Pending::before`](crate::Pending::before) it order them.
    fn from(slice: Arc<CudaSlice<T>>) -> Self {
        let (address, len) = (slice.device_ptr(slice.stream()).0, slice.len());
        Self { address, len, _owner: slice, _elements: PhantomData }
    }
}

impl<T> std::fmt::Debug for DeviceSlice<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceSlice({} elements at {:#x})", self.len, self.address)
    }
}

/// Routing in device memory: the kernels check it, so that a bad expert is found there.
#[derive(Debug, Clone)]
pub struct DeviceRouting {
    /// Entries per token, K.
    pub topk: usize,
    /// Global expert ids [T, K]; −1 is a masked entry.
    pub topk_idx: DeviceSlice<i64>,
    /// Weights [T, K].
    pub topk_weights: DeviceSlice<f32>,
}

/// Ready E4M3 tokens in device memory: codes [T, hidden] and one scale per 128 elements.
#[derive(Debug, Clone)]
pub struct DeviceFp8Tokens {
    /// E4M3 codes, row-major and dense.
    pub codes: DeviceSlice<u8>,
    /// Their scales.
    pub scales: DeviceScales,
    /// The order of the scales.
    pub order: ScaleOrder,
}

/// Scales in device memory, as [`ScaleData`](crate::ScaleData) in the host's.
#[derive(Debug, Clone)]
pub enum DeviceScales {
    /// One f32 per group.
    F32(DeviceSlice<f32>),
    /// Four groups to a word.
    Ue8m0(DeviceSlice<u32>),
}

impl DeviceScales {
    fn format(&self) -> ScaleFormat {
        match self {
            Self::F32(_) => ScaleFormat::F32,
            Self::Ue8m0(_) => ScaleFormat::Ue8m0,
        }
    }

    /// Address and number of elements.
    fn place(&self) -> (u64, usize) {
        match self {
            Self::F32(scales) => (scales.address, scales.len),
            Self::Ue8m0(scales) => (scales.address, scales.len),
        }
    }
}

impl sealed::Tokens for DeviceSlice<bf16> {
    fn view(&self) -> TokensAt<'_> {
        TokensAt::Device { x: self.address, scales: 0, scale_strides: (0, 0) }
    }

    fn check(&self, tokens: usize, shape: &RowShape) -> Result<(), Reason> {
        Tensor::X.check_size(tokens * shape.hidden, self.len)
    }
}

impl sealed::Tokens for DeviceFp8Tokens {
    fn view(&self) -> TokensAt<'_> {
        let (token, group) = self.order.strides();
        let scale_strides = (token as u64, group as u64);
        TokensAt::Device { x: self.codes.address, scales: self.scales.place().0, scale_strides }
    }

    fn check(&self, tokens: usize, shape: &RowShape) -> Result<(), Reason> {
        let format = self.scales.format();
        if shape.format != RowFormat::Fp8(format) {
            return Err(Reason::FormatMismatch);
        }
        Tensor::X.check_size(tokens * shape.hidden, self.codes.len)?;
        check_scales((format, self.order, self.scales.place().1), tokens, shape.hidden)
    }
}

/// A CUDA stream of the caller's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamRef(pub(crate) RawStream);

impl StreamRef {
    /// The stream whose `CUstream` is `stream`.
    ///
    /// # Safety
    /// It belongs to the rank's device, and lives until every operation that was enqueued on it, or ordered before or
    /// after it, is over.
    pub unsafe fn from_raw(stream: u64) -> Self {
        Self(RawStream(stream))
    }

    /// The same of a stream of cudarc's.
    ///
    /// # Safety
    /// As for [`StreamRef::from_raw`].
    pub unsafe fn from_cudarc(stream: &CudaStream) -> Self {
        Self(RawStream(stream.cu_stream() as u64))
    }
}
