//! The kernels on a device: loaded, described, launched.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::path::Path;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{
    CUdevice_attribute, CUfunction, CUfunction_attribute, CUlaunchConfig, CUmodule, CUshared_carveout_enum,
    CUstream,
};

use super::context::Context;
use super::library::{attribute, call};
use super::{cache, compiler};
use crate::device::{Grid, Kernel, Limits};
use crate::error::DeviceError;

/// As the driver reads it: in words.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

/// What nvcc has made at build time: nothing where it was not there.
static EMBEDDED: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/railhop.fatbin")));

/// The kernels of a device, all of them loaded: a kernel that is loaded by its first launch can make that launch wait
/// for those that run, and these wait for peers.
pub(super) struct Kernels {
    context: Arc<Context>,
    module: CUmodule,
    /// In the order of [`Kernel::ALL`].
    functions: Vec<Function>,
}

struct Function {
    handle: CUfunction,
    /// Bytes of its parameters.
    parameters: usize,
    /// Bytes of dynamic shared memory that it may have by now.
    shared: Mutex<usize>,
}

// SAFETY: modules and functions belong to no thread, and the driver locks for itself.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, DeviceError> {
        let _entered = context.enter()?;
        if EMBEDDED.0.is_empty() {
            return Self::compile(context, cache::folder().as_deref());
        }
        // The driver refuses what nvcc has made where that is newer than itself, or was not for this architecture.
        // NVRTC may be of the right age, and knows the device.
        Self::load_image(context, &EMBEDDED.0).or_else(|refused| {
            Self::compile(context, cache::folder().as_deref()).map_err(|error| match error {
                DeviceError::NoCompiler(why) => {
                    DeviceError::NoCompiler(format!("{why}, and of the kernels in this build {refused}"))
                }
                error => error,
            })
        })
    }

    fn compile(context: &Arc<Context>, folder: Option<&Path>) -> Result<Self, DeviceError> {
        let (major, minor) = capability(context)?;
        Self::load_image(context, &compiler::compile_cached(&target(major, minor), folder)?)
    }

    fn load_image(context: &Arc<Context>, image: &[u8]) -> Result<Self, DeviceError> {
        let mut module = ptr::null_mut();
        // SAFETY: an image that a compiler has made, whole, and there until the call returns.
        unsafe {
            call!(cuModuleLoadDataEx(&mut module, image.as_ptr().cast(), 0, ptr::null_mut(), ptr::null_mut()))
        }?;
        let mut kernels = Self { context: context.clone(), module, functions: Vec::new() };
        for kernel in Kernel::ALL {
            kernels.functions.push(Function::load(module, kernel)?);
        }
        Ok(kernels)
    }

    fn function(&self, kernel: Kernel) -> &Function {
        &self.functions[kernel as usize]
    }

    /// Makes `kernel` ready for such launches; how many blocks of it a multiprocessor runs at a time.
    pub(super) fn prepare(&self, limits: &Limits, kernel: Kernel, grid: Grid) -> Result<usize, DeviceError> {
        let unsupported = || DeviceError::Unsupported {
            device: limits.name.clone(),
            what: format!(
                "run {} in blocks of {} warps with {} bytes of shared memory (at most {})",
                kernel.name(),
                grid.warps,
                grid.shared,
                limits.shared
            ),
        };
        let threads = i32::try_from(32 * grid.warps).map_err(|_| unsupported())?;
        if grid.shared > limits.shared {
            return Err(unsupported());
        }
        let function = self.function(kernel);
        function.allow_shared(grid.shared)?;
        let mut blocks = 0;
        // SAFETY: the function is loaded, and the call writes an integer.
        unsafe {
            call!(cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut blocks,
                function.handle,
                threads,
                grid.shared
            ))
        }?;
        usize::try_from(blocks).ok().filter(|&blocks| blocks > 0).ok_or_else(unsupported)
    }

    /// Enqueues a kernel.
    ///
    /// # Safety
    /// As for [`Driver::launch`](crate::device::Driver::launch).
    pub(super) unsafe fn launch(
        &self,
        stream: CUstream,
        kernel: Kernel,
        grid: Grid,
        params: &[u8],
    ) -> Result<(), DeviceError> {
        let function = self.function(kernel);
        if params.len() != function.parameters {
            let (takes, given) = (function.parameters, params.len());
            let reason = format!("{} takes {takes} bytes of parameters, {given} given", kernel.name());
            return Err(DeviceError::Call { call: "cuLaunchKernelEx", reason });
        }
        // One struct by value, whose alignment the bytes need not have. The driver copies it.
        let mut aligned = vec![0u128; params.len().div_ceil(size_of::<u128>())];
        bytemuck::cast_slice_mut(&mut aligned)[..params.len()].copy_from_slice(params);
        let mut argument = aligned.as_mut_ptr().cast();
        let config = CUlaunchConfig {
            gridDimX: grid.blocks as u32,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: 32 * grid.warps as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared as u32,
            hStream: stream,
            attrs: ptr::null_mut(),
            numAttrs: 0,
        };
        // SAFETY: one pointer for the one parameter, to as many bytes as it has; the rest is the caller's.
        unsafe { call!(cuLaunchKernelEx(&config, function.handle, &mut argument, ptr::null_mut())) }
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: loaded once, and none of its kernels is running: whoever launched them has waited.
        let _ = unsafe { call!(cuModuleUnload(self.module)) };
    }
}

impl Function {
    fn load(module: CUmodule, kernel: Kernel) -> Result<Self, DeviceError> {
        let name = CString::new(kernel.name()).expect("names of kernels have no NUL");
        let mut handle = ptr::null_mut();
        let (mut offset, mut parameters) = (0, 0);
        // SAFETY: the module is loaded; the calls write a handle and two sizes. Every kernel has one parameter.
        unsafe {
            call!(cuModuleGetFunction(&mut handle, module, name.as_ptr()))?;
            call!(cuFuncLoad(handle))?;
            call!(cuFuncGetParamInfo(handle, 0, &mut offset, &mut parameters))?;
        }
        if matches!(kernel, Kernel::Plan | Kernel::Dispatch | Kernel::Combine) {
            // Kernels that wait for each other share multiprocessors. One that runs with less shared memory set aside
            // must leave before another can have more, so all get the most.
            let most = CUshared_carveout_enum::CU_SHAREDMEM_CARVEOUT_MAX_SHARED as i32;
            let carveout = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            // SAFETY: the function is loaded.
            unsafe { call!(cuFuncSetAttribute(handle, carveout, most)) }?;
        }
        Ok(Self { handle, parameters, shared: Mutex::new(0) })
    }

    /// Lets it have `bytes` of dynamic shared memory. What it was allowed before, it stays allowed: others count on it.
    fn allow_shared(&self, bytes: usize) -> Result<(), DeviceError> {
        let mut allowed = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes > *allowed {
            let limit = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded. The caller has seen that so few bytes fit.
            unsafe { call!(cuFuncSetAttribute(self.handle, limit, bytes as i32)) }?;
            *allowed = bytes;
        }
        Ok(())
    }
}

/// A device's compute capability.
pub(super) fn capability(context: &Context) -> Result<(usize, usize), DeviceError> {
    let major = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
    let minor = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR;
    Ok((attribute(context.device(), major)?, attribute(context.device(), minor)?))
}

/// The architecture to compile for: where the kernels have been measured, exactly what was measured.
fn target(major: usize, minor: usize) -> String {
    let exact = if matches!((major, minor), (9, 0) | (10, 0) | (12, 0)) { "a" } else { "" };
    format!("sm_{major}{minor}{exact}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_named_as_the_compiler_names_them() {
        let capabilities = [(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)];
        let targets = ["sm_90a", "sm_100a", "sm_103", "sm_120a", "sm_121"];
        assert_eq!(capabilities.map(|(major, minor)| target(major, minor)), targets);
    }

    #[test]
    fn kernels_are_found_by_their_number() {
        for (at, kernel) in Kernel::ALL.into_iter().enumerate() {
            assert_eq!(kernel as usize, at);
        }
    }
}
