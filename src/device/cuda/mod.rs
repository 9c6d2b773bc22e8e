//! The CUDA driver as a [`Driver`]. Nothing of CUDA is needed to build this, nor to start: the driver's library is
//! opened when a device is, and its absence is a [`DeviceError`].
//!
//! Kernels here wait for kernels of other ranks, so nothing that a rank does while it works may wait for the device: no
//! default stream, no synchronisation of a context, memory that is freed without one. Opening a driver may wait.
//!
//! | variable | meaning |
//! |---|---|
//! | `RAILHOP_CACHE` | where kernels that were compiled here are kept; else `XDG_CACHE_HOME/railhop`, `~/.cache/railhop` |
//! | `CUDA_DEVICE_MAX_CONNECTIONS` | queues to the device, 1 to 32; 8 unless told |

#![allow(unsafe_code)]

mod cache;
mod compiler;
mod context;
mod kernels;
mod library;
mod memory;
#[cfg(target_os = "linux")]
mod share;
mod stream;
mod survey;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::sys::CUdevice_attribute;

pub use self::compiler::compile;
#[cfg(target_os = "linux")]
pub use self::share::{ExportedMemory, FABRIC_HANDLE_BYTES, FabricMemory, ImportedMemory};
pub use self::survey::{DeviceInfo, survey};

use self::context::Context;
use self::kernels::Kernels;
use self::library::{attribute, call};
use self::memory::{HostPool, Sharing};
use self::stream::{Immediate, event_of, stream_of};
use super::{Driver, Grid, Kernel, Limits, Place, RawEvent, RawMemory, RawStream};
use crate::error::DeviceError;

/// The names of the devices that are here.
///
/// # Errors
/// There is no driver, or it is too old.
pub fn devices() -> Result<Vec<String>, DeviceError> {
    let count = library::load()?;
    (0..count).map(|ordinal| library::name(library::device(ordinal, count)?)).collect()
}

/// A CUDA device.
pub struct CudaDriver {
    limits: Limits,
    sharing: Sharing,
    kernels: Kernels,
    host: HostPool,
    immediate: Immediate,
    context: Arc<Context>,
}

impl CudaDriver {
    /// The device with this ordinal. All ranks of the process that are on it get the same driver.
    ///
    /// # Errors
    /// There is no driver or no such device, the device can't do what is needed, or the kernels can't be had for it.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, DeviceError> {
        static OPEN: Mutex<BTreeMap<usize, Weak<CudaDriver>>> = Mutex::new(BTreeMap::new());
        // A panic while it was held has left no entry.
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(driver) = open.get(&ordinal).and_then(Weak::upgrade) {
            return Ok(driver);
        }
        let driver = Arc::new(Self::new(ordinal)?);
        open.insert(ordinal, Arc::downgrade(&driver));
        Ok(driver)
    }

    fn new(ordinal: usize) -> Result<Self, DeviceError> {
        let device = library::device(ordinal, library::load()?)?;
        let name = library::name(device)?;
        let context = Arc::new(Context::retain(device)?);
        require_capabilities(&context, &name)?;
        let limits = Limits {
            name,
            device: ordinal as u64,
            sms: attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared: attribute(
                device,
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?,
            connections: library::connections(),
        };
        let driver = Self {
            limits,
            sharing: Sharing::of(device)?,
            kernels: Kernels::load(&context)?,
            host: HostPool::new(&context),
            immediate: Immediate::new(&context)?,
            context,
        };
        driver.warm_up()?;
        Ok(driver)
    }

    /// The device's address on the PCI bus, as the system writes it.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn pci_address(&self) -> Result<String, DeviceError> {
        library::pci_address(self.context.device())
    }

    /// Has the driver load what it clears and copies with. It may do so at the first use, and wait for kernels then.
    fn warm_up(&self) -> Result<(), DeviceError> {
        const BYTES: usize = 1 << 16;
        let host = self.allocate(Place::Host, BYTES)?;
        let device = self.allocate(Place::Device, 2 * BYTES);
        let copied = device.as_ref().map_err(Clone::clone).and_then(|device| {
            let _entered = self.context.enter()?;
            let (first, second) = (device.address, device.address + BYTES as u64);
            for bytes in [8, 100, BYTES] {
                for (to, from) in [(first, host.address), (second, first), (host.address, second)] {
                    // SAFETY: memory of this function's own, of so many bytes.
                    unsafe { self.immediate.copy(to, from, bytes) }?;
                }
            }
            Ok(())
        });
        for memory in [Some(host), device.ok()].into_iter().flatten() {
            // SAFETY: allocated above, and every copy has been waited for.
            unsafe { self.free(memory) };
        }
        copied
    }

    fn allocate_on_device(&self, place: Place, bytes: usize) -> Result<u64, DeviceError> {
        let shared = place == Place::Shared;
        let (address, mapped) = memory::allocate(self.context.device(), self.sharing, shared, bytes)?;
        // SAFETY: mapped just now, and nobody knows it yet.
        let zeroed = unsafe { self.immediate.zero(address, mapped) };
        if let Err(error) = zeroed {
            // SAFETY: as above. Where the clearing has failed, the device has.
            unsafe { memory::free(address) };
            return Err(error);
        }
        Ok(address)
    }
}

/// What the kernels and the memory here stand on.
fn require_capabilities(context: &Context, name: &str) -> Result<(), DeviceError> {
    let lacks = |what: &str| DeviceError::Unsupported { device: name.to_string(), what: what.to_string() };
    let (major, minor) = kernels::capability(context)?;
    if major < 9 {
        let what = format!("run these kernels: they need compute capability 9.0, this is {major}.{minor}");
        return Err(lacks(&what));
    }
    if attribute(context.device(), CUdevice_attribute::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING)? == 0 {
        return Err(lacks("share addresses with the host"));
    }
    if attribute(
        context.device(),
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED,
    )? == 0
    {
        return Err(lacks("map memory by hand"));
    }
    Ok(())
}

// SAFETY: memory is mapped until `free` unmaps it; streams and events are the driver's, which keeps what is promised.
unsafe impl Driver for CudaDriver {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn allocate(&self, place: Place, bytes: usize) -> Result<RawMemory, DeviceError> {
        let _entered = self.context.enter()?;
        let address = match place {
            Place::Host => self.host.allocate(&self.limits.name, bytes),
            Place::Shared | Place::Device => self.allocate_on_device(place, bytes),
        }?;
        Ok(RawMemory { address, bytes, place })
    }

    unsafe fn free(&self, memory: RawMemory) {
        let _entered = self.context.enter();
        match memory.place {
            // SAFETY: the caller's.
            Place::Host => unsafe { self.host.free(memory.address, memory.bytes) },
            // SAFETY: the caller's.
            Place::Shared | Place::Device => unsafe { memory::free(memory.address) },
        }
    }

    fn reach(&self, owner: &dyn Driver, memory: &RawMemory) -> Result<u64, DeviceError> {
        let _entered = self.context.enter()?;
        let what = match memory::reach(self.context.device(), memory.address)? {
            Some(true) => return Ok(memory.address),
            Some(false) => {
                format!("reach the memory of {} (device {})", owner.limits().name, owner.limits().device)
            }
            None => "reach memory that no CUDA driver of this process shares".to_string(),
        };
        Err(DeviceError::Unsupported { device: self.limits.name.clone(), what })
    }

    fn new_stream(&self) -> Result<RawStream, DeviceError> {
        let _entered = self.context.enter()?;
        Ok(RawStream(stream::create()? as u64))
    }

    unsafe fn free_stream(&self, stream: RawStream) {
        let _entered = self.context.enter();
        // SAFETY: the caller's.
        let _ = unsafe { call!(cuStreamDestroy_v2(stream_of(stream))) };
    }

    fn new_event(&self) -> Result<RawEvent, DeviceError> {
        let _entered = self.context.enter()?;
        Ok(RawEvent(stream::create_event()? as u64))
    }

    unsafe fn free_event(&self, event: RawEvent) {
        let _entered = self.context.enter();
        // SAFETY: the caller's.
        let _ = unsafe { call!(cuEventDestroy_v2(event_of(event))) };
    }

    unsafe fn record(&self, event: RawEvent, stream: RawStream) -> Result<(), DeviceError> {
        let _entered = self.context.enter()?;
        // SAFETY: the caller's.
        unsafe { call!(cuEventRecord(event_of(event), stream_of(stream))) }
    }

    unsafe fn wait(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError> {
        let _entered = self.context.enter()?;
        // SAFETY: the caller's.
        unsafe { call!(cuStreamWaitEvent(stream_of(stream), event_of(event), 0)) }
    }

    unsafe fn is_done(&self, event: RawEvent) -> Result<bool, DeviceError> {
        let _entered = self.context.enter()?;
        // SAFETY: the caller's.
        unsafe { stream::is_done(event_of(event)) }
    }

    fn prepare(&self, kernel: Kernel, grid: Grid) -> Result<usize, DeviceError> {
        let _entered = self.context.enter()?;
        Ok(self.kernels.prepare(&self.limits, kernel, grid)? * self.limits.sms)
    }

    unsafe fn launch(
        &self,
        stream: RawStream,
        kernel: Kernel,
        grid: Grid,
        params: &[u8],
    ) -> Result<(), DeviceError> {
        let _entered = self.context.enter()?;
        // SAFETY: the caller's.
        unsafe { self.kernels.launch(stream_of(stream), kernel, grid, params) }
    }

    unsafe fn copy(&self, stream: RawStream, to: u64, from: u64, bytes: usize) -> Result<(), DeviceError> {
        let _entered = self.context.enter()?;
        // SAFETY: the caller's.
        unsafe { stream::copy(stream_of(stream), to, from, bytes) }
    }

    unsafe fn store(&self, stream: RawStream, to: u64, value: u64) -> Result<(), DeviceError> {
        let _entered = self.context.enter()?;
        // SAFETY: the caller's.
        unsafe { stream::store(stream_of(stream), to, value) }
    }

    unsafe fn synchronize(&self, stream: RawStream) -> Result<(), DeviceError> {
        let _entered = self.context.enter()?;
        // SAFETY: the caller's.
        unsafe { call!(cuStreamSynchronize(stream_of(stream))) }
    }
}
