//! Streams and events, and the driver's own stream for what must be done when a call returns.

#![allow(unsafe_code)]

use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUevent, CUevent_flags, CUpointer_attribute_enum, CUresult, CUstream, CUstream_flags,
};

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
/// 8 bytes are a word that somebody polls, at an address that is a multiple of 8. From memory that the driver knows,
/// a copy engine moves them in one transaction: it splits at lines of its own, far longer and aligned. From other
/// memory of the host the driver would pass them through its command buffer in words of 4 bytes; there the value is
/// read now and written by the call whose value is 64 bits wide.
///
/// # Safety
/// As for [`Driver::copy`](crate::device::Driver::copy).
pub(super) unsafe fn copy(stream: CUstream, to: u64, from: u64, bytes: usize) -> Result<(), DeviceError> {
    // SAFETY: the caller's.
    unsafe {
        if bytes == 8 && to.is_multiple_of(8) && !is_known(from) && is_known(to) {
            let value = (from as *const u64).read_unaligned();
            return call!(cuStreamWriteValue64_v2(stream, to, value, 0));
        }
        call!(cuMemcpyAsync(to, from, bytes, stream))
    }
}

/// Whether the driver has allocated, mapped or pinned what lies at `address`.
fn is_known(address: u64) -> bool {
    let mut kind = 0u32;
    let attribute = CUpointer_attribute_enum::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
    // SAFETY: the attribute is an integer of 32 bits; an address that the driver does not know is an error.
    let result = unsafe { sys::cuPointerGetAttribute((&raw mut kind).cast(), attribute, address) };
    result == CUresult::CUDA_SUCCESS && kind != 0
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
