//! What a driver hands out, given back when dropped.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::{Driver, Place, RawEvent, RawMemory, RawStream};
use crate::error::DeviceError;

/// Memory of a rank. Whoever lets kernels or rails at it drops it after they have ended.
pub struct Memory {
    driver: Arc<dyn Driver>,
    raw: RawMemory,
}

impl Memory {
    /// `bytes` zeroed bytes.
    ///
    /// # Errors
    /// There is not so much.
    pub fn new(driver: &Arc<dyn Driver>, place: Place, bytes: usize) -> Result<Self, DeviceError> {
        let raw = driver.allocate(place, bytes)?;
        Ok(Self { driver: driver.clone(), raw })
    }

    /// Its address.
    pub fn address(&self) -> u64 {
        self.raw.address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.raw.bytes
    }

    /// As its driver knows it.
    pub fn raw(&self) -> &RawMemory {
        &self.raw
    }

    /// The address at which kernels of `driver`, a rank of the same node, reach it.
    ///
    /// # Errors
    /// The devices don't reach each other.
    pub fn reached_by(&self, driver: &dyn Driver) -> Result<u64, DeviceError> {
        driver.reach(&*self.driver, &self.raw)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, freed once; who used it has ended by the type's contract.
        unsafe { self.driver.free(self.raw) }
    }
}

/// A stream of the engine's own.
pub struct Stream {
    driver: Arc<dyn Driver>,
    raw: RawStream,
}

impl Stream {
    /// A stream that waits for no other.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn new(driver: &Arc<dyn Driver>) -> Result<Self, DeviceError> {
        Ok(Self { driver: driver.clone(), raw: driver.new_stream()? })
    }

    /// The driver's name for it.
    pub fn raw(&self) -> RawStream {
        self.raw
    }

    /// Copies, and waits until that is done.
    ///
    /// # Errors
    /// The device has failed.
    ///
    /// # Safety
    /// As for [`Driver::copy`], until the call returns.
    pub unsafe fn copy_now(&self, to: u64, from: u64, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's; the stream is alive.
        unsafe {
            self.driver.copy(self.raw, to, from, bytes)?;
            self.driver.synchronize(self.raw)
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once. What was enqueued has ended, or the device has failed: then the call
        // does nothing.
        unsafe {
            let _ = self.driver.synchronize(self.raw);
            self.driver.free_stream(self.raw);
        }
    }
}

/// A point in a stream.
pub struct Event {
    driver: Arc<dyn Driver>,
    raw: RawEvent,
}

impl Event {
    /// An event that is done.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn new(driver: &Arc<dyn Driver>) -> Result<Self, DeviceError> {
        Ok(Self { driver: driver.clone(), raw: driver.new_event()? })
    }

    /// The driver's name for it.
    pub fn raw(&self) -> RawEvent {
        self.raw
    }

    /// Whether all that it stands for has ended.
    ///
    /// # Errors
    /// The device has failed.
    pub fn is_done(&self) -> Result<bool, DeviceError> {
        // SAFETY: alive as long as `self`.
        unsafe { self.driver.is_done(self.raw) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        unsafe { self.driver.free_event(self.raw) }
    }
}
