//! A device's primary context, and being in it.

#![allow(unsafe_code)]

use std::ptr;

use cudarc::driver::sys::{CUcontext, CUdevice, CUstreamCaptureMode};

use super::library::call;
use crate::error::DeviceError;

/// The primary context of a device, retained: that of the CUDA runtime, so that its streams and memory work here.
pub(super) struct Context {
    device: CUdevice,
    handle: CUcontext,
}

// SAFETY: contexts belong to no thread, and the driver locks for itself.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn retain(device: CUdevice) -> Result<Self, DeviceError> {
        let mut handle = ptr::null_mut();
        // SAFETY: the call writes a handle; `drop` gives it back.
        unsafe { call!(cuDevicePrimaryCtxRetain(&mut handle, device)) }?;
        Ok(Self { device, handle })
    }

    pub(super) fn device(&self) -> CUdevice {
        self.device
    }

    /// Makes it the calling thread's context, until what is returned is dropped.
    ///
    /// Streams of the caller's may be being captured. What is called here never touches a captured stream unless it is
    /// meant to be captured, but the driver can't know: allocating memory or asking for an event would fail, and spoil
    /// the capture of another thread. So the thread says that it knows what it does.
    pub(super) fn enter(&self) -> Result<Entered, DeviceError> {
        let mut previous = ptr::null_mut();
        let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the calls write a handle and a mode; the context is alive.
        unsafe {
            call!(cuCtxGetCurrent(&mut previous))?;
            if previous != self.handle {
                call!(cuCtxSetCurrent(self.handle))?;
            }
            call!(cuThreadExchangeStreamCaptureMode(&mut mode))?;
        }
        // A thread without a context keeps this one, and the next call finds it.
        let foreign = !previous.is_null() && previous != self.handle;
        Ok(Entered { previous: foreign.then_some(previous), mode })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once. Where the driver is gone already, as when the process ends, the call does nothing.
        let _ = unsafe { call!(cuDevicePrimaryCtxRelease_v2(self.device)) };
    }
}

/// The thread is in a context; dropped, it is where it was. Stays on its thread.
pub(super) struct Entered {
    previous: Option<CUcontext>,
    mode: CUstreamCaptureMode,
}

impl Drop for Entered {
    fn drop(&mut self) {
        // SAFETY: the caller's own mode and context, which it had when it came in.
        unsafe {
            let _ = call!(cuThreadExchangeStreamCaptureMode(&mut self.mode));
            if let Some(previous) = self.previous {
                let _ = call!(cuCtxSetCurrent(previous));
            }
        }
    }
}
