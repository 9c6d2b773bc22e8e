//! Streams and events, and the driver's own stream for what must be done when a call returns.

#![allow(unsafe_code)]

use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUresult, CUstream, CUstream_flags};

use super::context::Context;
use super::library::{call, check};
use crate::device::{RawEvent, RawStream};
use crate::error::DeviceError;

pub(super) fn stream_of(raw: RawStream) -> CUstream {
    raw.0 as CUstream
}

pub(super) fn event_of(raw: RawEvent) -> CUevent {
    raw.0 as CUevent
}

/// A stream of the highest priority, so that kernels which peers wait for start ahead of the caller's; it does not wait
/// for the default stream.
pub(super) fn create() -> Result<CUstream, DeviceError> {
    let (mut least, mut greatest) = (0, 0);
    let mut stream = ptr::null_mut();
    let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: the calls write two integers and a handle.
    unsafe {
        call!(cuCtxGetStreamPriorityRange(&mut least, &mut greatest))?;
        call!(cuStreamCreateWithPriority(&mut stream, flags, greatest))?;
    }
    Ok(stream)
}

/// An event that takes no time.
pub(super) fn create_event() -> Result<CUevent, DeviceError> {
    let mut event = ptr::null_mut();
    // SAFETY: the call writes a handle.
    unsafe { call!(cuEventCreate(&mut event, CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)) }?;
    Ok(event)
}

/// Whether what the event stands for has ended.
///
/// # Safety
/// It is alive.
pub(super) unsafe fn is_done(event: CUevent) -> Result<bool, DeviceError> {
    // SAFETY: the caller's.
    match unsafe { sys::cuEventQuery(event) } {
        CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        result => check("cuEventQuery", result).map(|()| true),
    }
}

/// Enqueues a copy.
///
/// # Safety
/// As for [`Driver::copy`](crate::device::Driver::copy).
pub(super) unsafe fn copy(stream: CUstream, to: u64, from: u64, bytes: usize) -> Result<(), DeviceError> {
    // SAFETY: the caller's.
    unsafe { call!(cuMemcpyAsync(to, from, bytes, stream)) }
}

/// Enqueues a store of a word. Without flags the write is one of 64 bits, behind a fence for all that came before on the
/// stream.
///
/// # Safety
/// As for [`Driver::store`](crate::device::Driver::store).
pub(super) unsafe fn store(stream: CUstream, to: u64, value: u64) -> Result<(), DeviceError> {
    // SAFETY: the caller's.
    unsafe { call!(cuStreamWriteValue64_v2(stream, to, value, 0)) }
}

/// A stream for work that is waited for at once. Never the default stream and never the whole context: kernels that
/// wait for peers may be running.
pub(super) struct Immediate {
    context: Arc<Context>,
    stream: CUstream,
}

// SAFETY: streams belong to no thread, and the driver locks for itself.
unsafe impl Send for Immediate {}
// SAFETY: as above.
unsafe impl Sync for Immediate {}

impl Immediate {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        let _entered = context.enter()?;
        Ok(Self { context: context.clone(), stream: create()? })
    }

    /// Clears memory of the device.
    ///
    /// # Safety
    /// It is mapped, and nobody uses it.
    pub(super) unsafe fn zero(&self, address: u64, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: the caller's; the stream is alive.
        unsafe {
            call!(cuMemsetD8Async(address, 0, bytes, self.stream))?;
            call!(cuStreamSynchronize(self.stream))
        }
    }

    /// Copies between memories of the device and of the host.
    ///
    /// # Safety
    /// Both are mapped, do not overlap, and nobody uses them.
    pub(super) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: the caller's; the stream is alive.
        unsafe {
            copy(self.stream, to, from, bytes)?;
            call!(cuStreamSynchronize(self.stream))
        }
    }
}

impl Drop for Immediate {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: made in `new`, destroyed once; nothing of it is under way.
        let _ = unsafe { call!(cuStreamDestroy_v2(self.stream)) };
    }
}
