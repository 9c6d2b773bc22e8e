//! What devices are here, without opening any.

use cudarc::driver::sys::{CUdevice, CUdevice_attribute};

use super::library::{self, attribute, call};
use crate::error::DeviceError;

/// A device, as its driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (usize, usize),
    /// Its SMs.
    pub sms: usize,
    /// Bytes of its memory.
    pub memory: usize,
    /// Whether its memory can be given to other drivers, a NIC's say, as a dma-buf.
    pub exports_dma_buf: bool,
    /// Ordinals of the devices whose memory it reaches.
    pub peers: Vec<usize>,
}

/// Every device, by ordinal.
///
/// # Errors
/// There is no driver, or it is too old.
pub fn survey() -> Result<Vec<DeviceInfo>, DeviceError> {
    let count = library::load()?;
    let devices = (0..count).map(|ordinal| library::device(ordinal, count)).collect::<Result<Vec<_>, _>>()?;
    devices.iter().map(|&device| describe(device, &devices)).collect()
}

fn describe(device: CUdevice, all: &[CUdevice]) -> Result<DeviceInfo, DeviceError> {
    use CUdevice_attribute as Attribute;
    let mut memory = 0;
    // SAFETY: the call writes a size.
    unsafe { call!(cuDeviceTotalMem_v2(&mut memory, device)) }?;
    let mut peers = Vec::new();
    for (ordinal, &peer) in all.iter().enumerate() {
        if peer != device && reaches(device, peer)? {
            peers.push(ordinal);
        }
    }
    Ok(DeviceInfo {
        name: library::name(device)?,
        capability: (
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        sms: attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory,
        exports_dma_buf: attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED)? != 0,
        peers,
    })
}

/// Whether `device` can reach the memory of `peer`.
pub(super) fn reaches(device: CUdevice, peer: CUdevice) -> Result<bool, DeviceError> {
    let mut can = 0;
    // SAFETY: the call writes an integer.
    unsafe { call!(cuDeviceCanAccessPeer(&mut can, device, peer)) }?;
    Ok(can != 0)
}
