//! CUDA devices, and how a NIC gets at their memory.

use railhop::device::cuda::{DeviceInfo, survey};
use serde_json::json;

use super::finding::{Finding, Topic};
use super::machine::Machine;

/// What kernels here are compiled for at least.
const NEEDED: (usize, usize) = (9, 0);

/// What is here of GPUs.
pub fn findings(machine: &Machine) -> Vec<Finding> {
    let name = "devices";
    let devices = match survey() {
        Err(error) => {
            let finding = Finding::ok(Topic::Gpu, name, error.to_string());
            return vec![
                finding.missing("install the NVIDIA driver; without it the host engine is what runs"),
            ];
        }
        Ok(devices) if devices.is_empty() => {
            let finding = Finding::ok(Topic::Gpu, name, "the driver is here, and sees no device");
            return vec![finding.missing("look at CUDA_VISIBLE_DEVICES and at what the container is given")];
        }
        Ok(devices) => devices,
    };
    let mut findings = vec![Finding::ok(Topic::Gpu, name, devices.len().to_string())];
    findings
        .extend(devices.iter().enumerate().map(|(ordinal, device)| describe(ordinal, device, devices.len())));
    findings.push(memory_for_nics(machine, &devices));
    findings
}

fn describe(ordinal: usize, device: &DeviceInfo, count: usize) -> Finding {
    let DeviceInfo { name, capability, sms, memory, peers, exports_dma_buf } = device;
    let (major, minor) = capability;
    let value = format!(
        "{name}, {major}.{minor}, {sms} SMs, {} GiB, reaches {} of {} others",
        memory >> 30,
        peers.len(),
        count - 1,
    );
    let finding = Finding::ok(Topic::Gpu, format!("device {ordinal}"), value).with(json!({
        "name": name, "capability": [major, minor], "sms": sms, "memory": memory, "peers": peers,
        "exports_dma_buf": exports_dma_buf,
    }));
    match () {
        () if *capability < NEEDED => {
            finding.missing(format!("kernels need compute capability {}.{}", NEEDED.0, NEEDED.1))
        }
        () if peers.len() + 1 < count => {
            finding.warn("ranks of a node need peer access to each other: put them on devices that have it")
        }
        () => finding,
    }
}

/// Whether a NIC can get at device memory, by way of the kernel's dma-bufs or NVIDIA's module.
fn memory_for_nics(machine: &Machine, devices: &[DeviceInfo]) -> Finding {
    let has_module = machine.has("/sys/module/nvidia_peermem");
    let has_dma_buf = devices.iter().all(|device| device.exports_dma_buf);
    let word = |has| if has { "yes" } else { "no" };
    let value = format!("dma-buf: {}, nvidia-peermem: {}", word(has_dma_buf), word(has_module));
    Finding::ok(Topic::Gpu, "memory for NICs", value)
        .with(json!({ "dma_buf": has_dma_buf, "nvidia_peermem": has_module }))
        .warn_if(
            !has_dma_buf && !has_module,
            "modprobe nvidia-peermem, or use the open kernel driver: until then rows pass through the host",
        )
}
