//! The driver's library: whether it is here and new enough, and its calls with their errors.

#![allow(unsafe_code)]

use std::env;
use std::ffi::{CStr, c_char, c_int};
use std::ptr;

use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute, CUresult};

use crate::error::DeviceError;

/// CUDA 12.4: the newest calls used are `cuFuncLoad`, `cuFuncGetParamInfo` and fabric handles. Kernels that a newer
/// nvcc has embedded may need a newer driver still; [`kernels`](super::kernels) then compiles them anew.
const NEEDED: u32 = 12_040;

/// All calls used. cudarc looks a symbol up when it is first called and panics where there is none, so they are asked
/// for beforehand.
const SYMBOLS: [&str; 51] = [
    "cuCtxGetCurrent",
    "cuCtxGetStreamPriorityRange",
    "cuCtxSetCurrent",
    "cuDeviceCanAccessPeer",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetPCIBusId",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuFuncGetParamInfo",
    "cuFuncLoad",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchKernelEx",
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemExportToShareableHandle",
    "cuMemFreeHost",
    "cuMemGetAllocationGranularity",
    "cuMemGetHandleForAddressRange",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer_v2",
    "cuMemImportFromShareableHandle",
    "cuMemMap",
    "cuMemRelease",
    "cuMemRetainAllocationHandle",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMemcpyAsync",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadDataEx",
    "cuModuleUnload",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamWriteValue64_v2",
    "cuThreadExchangeStreamCaptureMode",
];

/// `call!(cuInit(0))` calls the driver: `Ok(())`, or the error with the call's name. Unsafe as the call is.
macro_rules! call {
    ($name:ident($($argument:expr),* $(,)?)) => {
        $crate::device::cuda::library::check(stringify!($name), cudarc::driver::sys::$name($($argument),*))
    };
}
pub(super) use call;

/// What a call has come to.
pub(super) fn check(call: &'static str, result: CUresult) -> Result<(), DeviceError> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        failed => Err(DeviceError::Call { call, reason: describe(failed) }),
    }
}

fn describe(result: CUresult) -> String {
    let ask = |text: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut found = ptr::null();
        // SAFETY: the call writes a pointer to a string that lives as long as the process, or null where it knows none.
        unsafe {
            let _ = text(result, &mut found);
            (!found.is_null()).then(|| CStr::from_ptr(found).to_string_lossy().into_owned())
        }
    };
    match (ask(sys::cuGetErrorName), ask(sys::cuGetErrorString)) {
        (Some(name), Some(text)) => format!("{name}: {text}"),
        (Some(text), None) | (None, Some(text)) => text,
        (None, None) => format!("error {}", result as u32),
    }
}

/// Makes the driver ready for calls; how many devices it has.
pub(super) fn load() -> Result<usize, DeviceError> {
    // SAFETY: opening the library runs its initialisers, which depend on nothing of this process.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::NoDriver("libcuda is not found".to_string()));
    }
    // Versions first: an old driver is better called old than incomplete.
    require(&["cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString"])?;
    let mut version = 0;
    // SAFETY: the call writes an integer, and may come before `cuInit`.
    unsafe { call!(cuDriverGetVersion(&mut version)) }
        .map_err(|error| DeviceError::NoDriver(error.to_string()))?;
    let found = u32::try_from(version).unwrap_or(0);
    if found < NEEDED {
        return Err(DeviceError::OldDriver { found, needed: NEEDED });
    }
    require(&SYMBOLS)?;
    // SAFETY: the flags must be 0; calling it again does nothing.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
        result => check("cuInit", result).map_err(|error| DeviceError::NoDriver(error.to_string()))?,
    }
    let mut count = 0;
    // SAFETY: the call writes an integer.
    unsafe { call!(cuDeviceGetCount(&mut count)) }?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// The library has `symbols`.
fn require(symbols: &[&str]) -> Result<(), DeviceError> {
    // SAFETY: `culib` panics only where there is no library, and the callers have seen one.
    let library = unsafe { sys::culib() };
    let missing = symbols.iter().find(|symbol| {
        // SAFETY: looked at, never called by this type.
        unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) }.is_err()
    });
    missing.map_or(Ok(()), |symbol| Err(DeviceError::NoDriver(format!("libcuda lacks {symbol}"))))
}

/// The device with this ordinal, of `count`.
pub(super) fn device(ordinal: usize, count: usize) -> Result<CUdevice, DeviceError> {
    let missing = DeviceError::NoDevice { device: ordinal, count };
    if ordinal >= count {
        return Err(missing);
    }
    let mut device = 0;
    // SAFETY: the call writes a device.
    unsafe { call!(cuDeviceGet(&mut device, c_int::try_from(ordinal).map_err(|_| missing)?)) }?;
    Ok(device)
}

/// A device's name.
pub(super) fn name(device: CUdevice) -> Result<String, DeviceError> {
    let mut name = [0; 256];
    // SAFETY: the call writes at most that many characters, and ends them with 0.
    unsafe {
        call!(cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device))?;
        Ok(CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned())
    }
}

/// A device's address on the PCI bus.
pub(super) fn pci_address(device: CUdevice) -> Result<String, DeviceError> {
    let mut address = [0; 32];
    // SAFETY: the call writes at most that many characters, and ends them with 0.
    unsafe {
        call!(cuDeviceGetPCIBusId(address.as_mut_ptr(), address.len() as c_int, device))?;
        // The system writes it in lower case.
        Ok(CStr::from_ptr(address.as_ptr()).to_string_lossy().to_lowercase())
    }
}

/// An attribute of a device.
pub(super) fn attribute(device: CUdevice, attribute: CUdevice_attribute) -> Result<usize, DeviceError> {
    let mut value = 0;
    // SAFETY: the call writes an integer.
    unsafe { call!(cuDeviceGetAttribute(&mut value, attribute, device)) }?;
    Ok(usize::try_from(value).unwrap_or(0))
}

/// Queues between host and device: work in different ones never waits for each other. The driver reads the variable
/// too, when it makes a context.
pub(super) fn connections() -> usize {
    parse_connections(env::var("CUDA_DEVICE_MAX_CONNECTIONS").ok().as_deref())
}

fn parse_connections(text: Option<&str>) -> usize {
    // What the driver takes: 1 to 32, 8 unless told.
    text.and_then(|text| text.trim().parse().ok()).filter(|count| (1..=32).contains(count)).unwrap_or(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names of the driver's calls that stand in `source` behind `before`.
    fn calls<'a>(source: &'a str, before: &str) -> Vec<&'a str> {
        let found = source.split(before).skip(1).filter_map(|rest| {
            let name = &rest[..rest.find(|c: char| !c.is_alphanumeric() && c != '_')?];
            let is_call = name.starts_with("cu") && name[2..].starts_with(|c: char| c.is_ascii_uppercase());
            is_call.then_some(name)
        });
        found.collect()
    }

    #[test]
    fn every_call_is_asked_for_beforehand() {
        let sources = [
            include_str!("context.rs"),
            include_str!("kernels.rs"),
            include_str!("library.rs"),
            include_str!("memory.rs"),
            include_str!("mod.rs"),
            include_str!("share.rs"),
            include_str!("stream.rs"),
            include_str!("survey.rs"),
        ];
        let used =
            || sources.iter().flat_map(|source| ["call!(", "sys::"].map(|before| calls(source, before)));
        let used: std::collections::BTreeSet<_> = used().flatten().collect();
        assert_eq!(used, SYMBOLS.into_iter().collect());
        assert!(SYMBOLS.is_sorted());
    }

    #[test]
    fn connections_are_what_the_driver_takes() {
        let given = [None, Some("1"), Some(" 32 "), Some("0"), Some("33"), Some("many")];
        assert_eq!(given.map(parse_connections), [8, 1, 32, 8, 8, 8]);
    }
}
