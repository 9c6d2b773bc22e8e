//! Shared memory on its way between processes: as a file descriptor within a node, as a fabric handle within an NVLink
//! domain.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use cudarc::driver::sys::{
    CUGPUDirectRDMAWritesOrdering, CUdevice_attribute, CUmemAllocationHandleType, CUmemFabricHandle,
    CUmemRangeHandleType,
};

use super::CudaDriver;
use super::library::{attribute, call};
use super::memory::{self, BY_DESCRIPTOR, BY_FABRIC, Mapping, PAGE, Physical};
use crate::device::{Driver, RawMemory};
use crate::error::DeviceError;

/// Bytes of a fabric handle.
pub const FABRIC_HANDLE_BYTES: usize = 64;

/// Shared memory as another process of the node can map it. It keeps the memory alive, also once its owner has freed
/// it.
#[derive(Debug)]
pub struct ExportedMemory {
    descriptor: OwnedFd,
    bytes: usize,
}

impl ExportedMemory {
    /// What another process has sent: its descriptor, and its [`ExportedMemory::bytes`].
    pub fn new(descriptor: OwnedFd, bytes: usize) -> Self {
        Self { descriptor, bytes }
    }

    /// Its size as it must be mapped: what was allocated, rounded up.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl AsFd for ExportedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Shared memory as any node of its NVLink domain can map it, while its owner keeps it. Plain data, to be sent as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FabricMemory {
    /// What the driver calls it.
    pub handle: [u8; FABRIC_HANDLE_BYTES],
    /// Its size as it must be mapped.
    pub bytes: usize,
}

/// Memory of another process, mapped for one device of this one. Whoever lets kernels at it drops it after they have
/// ended.
pub struct ImportedMemory {
    // Before the driver, whose context it needs.
    mapping: Mapping,
    driver: Arc<CudaDriver>,
}

impl ImportedMemory {
    /// Its address here.
    pub fn address(&self) -> u64 {
        self.mapping.address()
    }

    /// Its mapped size.
    pub fn bytes(&self) -> usize {
        self.mapping.bytes()
    }

    /// The driver whose kernels reach it.
    pub fn driver(&self) -> &Arc<CudaDriver> {
        &self.driver
    }
}

impl CudaDriver {
    /// Hands out [`Place::Shared`](crate::device::Place::Shared) memory of this driver to other processes of the node.
    ///
    /// # Errors
    /// It is not such memory, or the device has no descriptors for it.
    pub fn export(&self, memory: &RawMemory) -> Result<ExportedMemory, DeviceError> {
        let mut descriptor: c_int = -1;
        let to = (&raw mut descriptor).cast();
        let bytes = self.export_as(memory, BY_DESCRIPTOR, "descriptors", to)?;
        // SAFETY: the driver has opened it for the caller, who is its only owner.
        let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
        Ok(ExportedMemory { descriptor, bytes })
    }

    /// Hands out memory of this driver, on the device, to other drivers of this machine: what a NIC reads and writes.
    ///
    /// # Errors
    /// The device can't, or a kernel that sees what a NIC has written last might not see what it wrote before.
    pub fn dma_buf(&self, memory: &RawMemory) -> Result<OwnedFd, DeviceError> {
        use CUdevice_attribute as Attribute;
        let lacks = |what: &str| DeviceError::Unsupported {
            device: self.limits().name.clone(),
            what: what.to_string(),
        };
        let device = self.context.device();
        if attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED)? == 0 {
            return Err(lacks("give its memory to other drivers as a dma-buf"));
        }
        let ordered = CUGPUDirectRDMAWritesOrdering::CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER as usize;
        if attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING)? < ordered {
            return Err(lacks("show its kernels what a NIC writes in the order of writing"));
        }
        // Whole pages of the host: memory is mapped in whole granules.
        let bytes = memory.bytes.next_multiple_of(PAGE);
        let kind = CUmemRangeHandleType::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD;
        let mut descriptor: c_int = -1;
        let to = (&raw mut descriptor).cast();
        let _entered = self.context.enter()?;
        // SAFETY: the call writes a descriptor, or fails where nothing is mapped.
        unsafe { call!(cuMemGetHandleForAddressRange(to, memory.address, bytes, kind, 0)) }?;
        // SAFETY: the driver has opened it for the caller, who is its only owner.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }

    /// Hands out such memory to the nodes of the NVLink domain.
    ///
    /// # Errors
    /// It is not such memory, or the device has no fabric handles for it.
    pub fn export_fabric(&self, memory: &RawMemory) -> Result<FabricMemory, DeviceError> {
        let mut handle = CUmemFabricHandle { data: [0; FABRIC_HANDLE_BYTES] };
        let bytes = self.export_as(memory, BY_FABRIC, "fabric handles", (&raw mut handle).cast())?;
        Ok(FabricMemory { handle: handle.data, bytes })
    }

    /// Writes a handle of this kind to `to`, which has room for it; the mapped size of the memory.
    fn export_as(
        &self,
        memory: &RawMemory,
        kind: CUmemAllocationHandleType,
        name: &str,
        to: *mut c_void,
    ) -> Result<usize, DeviceError> {
        let lacks = |what| DeviceError::Unsupported { device: self.limits().name.clone(), what };
        let (bytes, handles) = memory::shared(memory.address)
            .ok_or_else(|| lacks("export memory that no driver of this process shares".to_string()))?;
        if handles.0 & kind.0 == 0 {
            return Err(lacks(format!("give {name} to its memory")));
        }
        let _entered = self.context.enter()?;
        let physical = Physical::at(memory.address)?;
        // SAFETY: the call writes a handle of this kind, for which the caller has room.
        unsafe { call!(cuMemExportToShareableHandle(to, physical.0, kind, 0)) }?;
        Ok(bytes)
    }

    /// Maps memory of another process of this node for this device.
    ///
    /// # Errors
    /// It is no such memory, or the device does not reach it.
    pub fn import(self: &Arc<Self>, exported: &ExportedMemory) -> Result<ImportedMemory, DeviceError> {
        let descriptor = exported.descriptor.as_raw_fd() as usize as *mut c_void;
        // SAFETY: for this kind the pointer is the descriptor itself, which is open.
        unsafe { self.import_as(descriptor, BY_DESCRIPTOR, exported.bytes) }
    }

    /// Maps memory of another node of the NVLink domain for this device.
    ///
    /// # Errors
    /// It is no such memory, or this node has no right to it.
    pub fn import_fabric(self: &Arc<Self>, exported: &FabricMemory) -> Result<ImportedMemory, DeviceError> {
        let mut handle = CUmemFabricHandle { data: exported.handle };
        // SAFETY: for this kind the pointer is to a handle, which is there until the call returns.
        unsafe { self.import_as((&raw mut handle).cast(), BY_FABRIC, exported.bytes) }
    }

    /// # Safety
    /// `handle` is what the driver takes for this kind.
    unsafe fn import_as(
        self: &Arc<Self>,
        handle: *mut c_void,
        kind: CUmemAllocationHandleType,
        bytes: usize,
    ) -> Result<ImportedMemory, DeviceError> {
        let _entered = self.context.enter()?;
        let mut imported = 0;
        // SAFETY: the call writes a handle; the rest is the caller's.
        unsafe { call!(cuMemImportFromShareableHandle(&mut imported, handle, kind)) }?;
        // The mapping keeps the memory, so the handle goes when this returns.
        let physical = Physical(imported);
        let mapping = Mapping::new(&physical, bytes, &[self.context.device()])?;
        Ok(ImportedMemory { mapping, driver: self.clone() })
    }
}
