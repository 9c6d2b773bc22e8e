//! Memory of devices and pinned memory of the host.
//!
//! Memory of devices is mapped by hand, for its own kernels as well: freeing it waits for nothing, while `cuMemFree`
//! waits for every kernel of the device, and those may wait for peers. The price is whole granules, of 2 MiB.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{
    self, CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE, CUdevice, CUdevice_attribute, CUdeviceptr,
    CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags, CUmemAllocationHandleType,
    CUmemAllocationProp, CUmemAllocationType, CUmemGenericAllocationHandle, CUmemLocation, CUmemLocationType,
    CUresult,
};

use super::context::Context;
use super::library::{attribute, call, check};
use super::survey::reaches;
use crate::error::DeviceError;

/// How memory can leave the process: `CUmemAllocationHandleType` is a set of bits.
pub(super) const BY_DESCRIPTOR: CUmemAllocationHandleType =
    CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
/// As [`BY_DESCRIPTOR`], to other nodes of an NVLink domain.
pub(super) const BY_FABRIC: CUmemAllocationHandleType = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_FABRIC;
const NOT_AT_ALL: CUmemAllocationHandleType = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE;

/// What a device's memory can do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sharing {
    descriptor: bool,
    fabric: bool,
    rdma: bool,
}

impl Sharing {
    pub(super) fn of(device: CUdevice) -> Result<Self, DeviceError> {
        use CUdevice_attribute as Attribute;
        let has = |name| attribute(device, name).map(|value| value != 0);
        Ok(Self {
            descriptor: has(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED)?,
            fabric: has(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED)?,
            rdma: has(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED)?,
        })
    }

    /// Kinds of handles to ask for, the best first.
    fn wishes(self) -> Vec<CUmemAllocationHandleType> {
        let descriptor = if self.descriptor { BY_DESCRIPTOR } else { NOT_AT_ALL };
        // A device may offer fabric handles where the node has no right to them: no IMEX channel.
        let fabric = self.fabric.then_some(CUmemAllocationHandleType(descriptor.0 | BY_FABRIC.0));
        fabric.into_iter().chain([descriptor]).collect()
    }
}

/// Memory without an address. It lives until this, every mapping of it and every handle to it are gone.
pub(super) struct Physical(pub(super) CUmemGenericAllocationHandle);

impl Physical {
    /// None where there is not so much.
    fn create(bytes: usize, properties: &CUmemAllocationProp) -> Result<Option<Self>, DeviceError> {
        let mut handle = 0;
        // SAFETY: the call writes a handle; the properties are whole.
        match unsafe { sys::cuMemCreate(&mut handle, bytes, properties, 0) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Ok(None),
            result => check("cuMemCreate", result).map(|()| Some(Self(handle))),
        }
    }

    /// That which is mapped at `address`.
    pub(super) fn at(address: u64) -> Result<Self, DeviceError> {
        let mut handle = 0;
        // SAFETY: the call writes a handle, or fails where nothing is mapped.
        unsafe { call!(cuMemRetainAllocationHandle(&mut handle, address as *mut c_void)) }?;
        Ok(Self(handle))
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        // SAFETY: created, retained or imported once. Mappings keep the memory.
        let _ = unsafe { call!(cuMemRelease(self.0)) };
    }
}

/// A range of addresses.
struct Range {
    address: CUdeviceptr,
    bytes: usize,
}

impl Range {
    fn reserve(bytes: usize) -> Result<Self, DeviceError> {
        let mut address = 0;
        // SAFETY: the call writes an address, of the driver's choice and alignment.
        unsafe { call!(cuMemAddressReserve(&mut address, bytes, 0, 0, 0)) }?;
        Ok(Self { address, bytes })
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: reserved once, and nothing is mapped there any more: a mapping unmaps before its range goes.
        let _ = unsafe { call!(cuMemAddressFree(self.address, self.bytes)) };
    }
}

/// Memory at an address.
pub(super) struct Mapping(Range);

impl Mapping {
    /// Maps all `bytes` of `physical` for `devices`.
    pub(super) fn new(physical: &Physical, bytes: usize, devices: &[CUdevice]) -> Result<Self, DeviceError> {
        let range = Range::reserve(bytes)?;
        // SAFETY: the range is reserved, free, and of this size.
        unsafe { call!(cuMemMap(range.address, bytes, 0, physical.0, 0)) }?;
        let mapping = Self(range);
        mapping.open_to(devices)?;
        Ok(mapping)
    }

    pub(super) fn address(&self) -> u64 {
        self.0.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.bytes
    }

    fn open_to(&self, devices: &[CUdevice]) -> Result<(), DeviceError> {
        let access = |&device: &CUdevice| CUmemAccessDesc {
            location: location(device),
            flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        let access: Vec<_> = devices.iter().map(access).collect();
        // SAFETY: the whole range is mapped; what it lets in stays in when more are let in.
        unsafe { call!(cuMemSetAccess(self.0.address, self.0.bytes, access.as_ptr(), access.len())) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped once, as a whole. Whoever used it has ended, by the contract of who hands it out.
        let _ = unsafe { call!(cuMemUnmap(self.0.address, self.0.bytes)) };
    }
}

fn location(device: CUdevice) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device }
}

fn properties(device: CUdevice, handles: CUmemAllocationHandleType, rdma: bool) -> CUmemAllocationProp {
    CUmemAllocationProp {
        type_: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: handles,
        location: location(device),
        win32HandleMetaData: ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: rdma.into(),
            usage: 0,
            reserved: [0; 4],
        },
    }
}

/// Memory that a driver of this process has handed out.
struct Allocation {
    mapping: Mapping,
    owner: CUdevice,
    shared: bool,
    handles: CUmemAllocationHandleType,
    /// The devices that have access.
    reached_by: Vec<CUdevice>,
}

/// All of it, by address: a driver that is to reach another's memory finds its owner here.
static ALLOCATIONS: Mutex<BTreeMap<u64, Allocation>> = Mutex::new(BTreeMap::new());

fn allocations() -> MutexGuard<'static, BTreeMap<u64, Allocation>> {
    // Nothing is left half done in it.
    ALLOCATIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory of `device`, to be shared or not: its address and mapped size. What is in it is undefined.
pub(super) fn allocate(
    device: CUdevice,
    sharing: Sharing,
    shared: bool,
    bytes: usize,
) -> Result<(u64, usize), DeviceError> {
    let wishes = if shared { sharing.wishes() } else { vec![NOT_AT_ALL] };
    let create = |handles| -> Result<_, DeviceError> {
        let properties = properties(device, handles, sharing.rdma);
        let out_of_memory = || DeviceError::OutOfMemory { bytes, place: "device" };
        let whole = round_up(bytes, granularity(&properties)?).ok_or_else(out_of_memory)?;
        let physical = Physical::create(whole, &properties)?.ok_or_else(out_of_memory)?;
        Ok((physical, whole, handles))
    };
    let mut created = create(wishes[0]);
    for &handles in &wishes[1..] {
        created = created.or_else(|_| create(handles));
    }
    let (physical, mapped, handles) = created?;
    let mapping = Mapping::new(&physical, mapped, &[device])?;
    let address = mapping.address();
    allocations()
        .insert(address, Allocation { mapping, owner: device, shared, handles, reached_by: vec![device] });
    Ok((address, mapped))
}

fn granularity(properties: &CUmemAllocationProp) -> Result<usize, DeviceError> {
    let mut bytes = 0;
    let option = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
    // SAFETY: the call writes a size; the properties are whole.
    unsafe { call!(cuMemGetAllocationGranularity(&mut bytes, properties, option)) }?;
    Ok(bytes)
}

/// `bytes`, at least one, as whole granules.
fn round_up(bytes: usize, granule: usize) -> Option<usize> {
    bytes.max(1).checked_next_multiple_of(granule)
}

/// Frees memory that [`allocate`] has given.
///
/// # Safety
/// Nothing uses it any more.
pub(super) unsafe fn free(address: u64) {
    // Unmapped outside the lock.
    let allocation = allocations().remove(&address);
    drop(allocation);
}

/// Mapped size of shared memory, and how it can leave the process; none where no driver of this process shares it.
pub(super) fn shared(address: u64) -> Option<(usize, CUmemAllocationHandleType)> {
    let allocations = allocations();
    let allocation = allocations.get(&address).filter(|allocation| allocation.shared)?;
    Some((allocation.mapping.bytes(), allocation.handles))
}

/// Lets `device` reach shared memory of this process: by the same address as its owner. False where the devices don't
/// reach each other, none where no driver of this process shares it.
pub(super) fn reach(device: CUdevice, address: u64) -> Result<Option<bool>, DeviceError> {
    let mut allocations = allocations();
    let Some(allocation) = allocations.get_mut(&address).filter(|allocation| allocation.shared) else {
        return Ok(None);
    };
    if allocation.reached_by.contains(&device) {
        return Ok(Some(true));
    }
    if !reaches(device, allocation.owner)? {
        return Ok(Some(false));
    }
    let devices: Vec<_> = allocation.reached_by.iter().copied().chain([device]).collect();
    allocation.mapping.open_to(&devices)?;
    allocation.reached_by = devices;
    Ok(Some(true))
}

/// Pinned memory of the host. What is freed is kept for the next who asks for as much, until the pool is dropped:
/// `cuMemFreeHost` waits for every kernel of the device.
pub(super) struct HostPool {
    context: Arc<Context>,
    /// (address, bytes).
    free: Mutex<Vec<(u64, usize)>>,
}

/// The unit of pinned memory.
pub(super) const PAGE: usize = 4096;

impl HostPool {
    pub(super) fn new(context: &Arc<Context>) -> Self {
        Self { context: context.clone(), free: Mutex::default() }
    }

    fn kept(&self) -> MutexGuard<'_, Vec<(u64, usize)>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Zeroed memory, at the same address for the host and for every device of the process.
    pub(super) fn allocate(&self, device: &str, bytes: usize) -> Result<u64, DeviceError> {
        let out_of_memory = DeviceError::OutOfMemory { bytes, place: "host" };
        let whole = round_up(bytes, PAGE).ok_or(out_of_memory.clone())?;
        let mut kept = self.kept();
        let reused = kept.iter().position(|&(_, bytes)| bytes == whole).map(|at| kept.swap_remove(at).0);
        drop(kept);
        let address = match reused {
            Some(address) => address,
            None => self.pin(device, whole, out_of_memory)?,
        };
        // SAFETY: pinned, of this size, and nobody else's.
        unsafe { (address as *mut u8).write_bytes(0, whole) };
        Ok(address)
    }

    fn pin(&self, device: &str, whole: usize, out_of_memory: DeviceError) -> Result<u64, DeviceError> {
        let mut host = ptr::null_mut();
        // SAFETY: the call writes a pointer.
        let result = unsafe {
            sys::cuMemHostAlloc(&mut host, whole, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP)
        };
        match result {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(out_of_memory),
            result => check("cuMemHostAlloc", result)?,
        }
        let address = host as u64;
        let mut mapped = 0;
        // SAFETY: the call writes an address; the memory has just been mapped.
        let asked = unsafe { call!(cuMemHostGetDevicePointer_v2(&mut mapped, host, 0)) };
        if asked.is_ok() && mapped == address {
            return Ok(address);
        }
        self.put_back(address, whole);
        asked?;
        let what = "reach pinned memory of the host by the host's own address".to_string();
        Err(DeviceError::Unsupported { device: device.to_string(), what })
    }

    /// Takes memory back.
    ///
    /// # Safety
    /// It came from [`HostPool::allocate`] for so many bytes, and nobody uses it any more.
    pub(super) unsafe fn free(&self, address: u64, bytes: usize) {
        if let Some(whole) = round_up(bytes, PAGE) {
            self.put_back(address, whole);
        }
    }

    fn put_back(&self, address: u64, whole: usize) {
        self.kept().push((address, whole));
    }
}

impl Drop for HostPool {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        for (address, _) in self.kept().drain(..) {
            // SAFETY: allocated here, freed once, and nobody uses it.
            let _ = unsafe { call!(cuMemFreeHost(address as *mut c_void)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_granules_and_never_none() {
        let sizes = [0, 1, 4096, 4097, usize::MAX];
        assert_eq!(
            sizes.map(|bytes| round_up(bytes, 4096)),
            [Some(4096), Some(4096), Some(4096), Some(8192), None]
        );
    }

    #[test]
    fn fabric_handles_are_wished_for_first_and_never_insisted_on() {
        let wishes = |descriptor, fabric| Sharing { descriptor, fabric, rdma: false }.wishes();
        assert_eq!(wishes(true, true), [CUmemAllocationHandleType(9), BY_DESCRIPTOR]);
        assert_eq!(wishes(true, false), [BY_DESCRIPTOR]);
        assert_eq!(wishes(false, true), [BY_FABRIC, NOT_AT_ALL]);
    }
}
