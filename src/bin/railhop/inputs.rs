//! A rank's tokens and where their sums go, on the host or on its device, used again and again.

#![allow(unsafe_code)]

use std::sync::Arc;

use half::bf16;
use railhop::device::{Driver, Memory, Place, Stream};
use railhop::error::DeviceError;
use railhop::{
    Combine, Communicator, DeviceRouting, DeviceSlice, Error, Handle, RecvBuffer, Routed, Routing,
};

/// What a rank brings to an iteration, and its result.
pub enum Inputs<'a> {
    /// In memory of the host.
    Host {
        /// Experts and weights.
        routing: Routing<'a>,
        /// Tokens.
        x: Arc<[bf16]>,
        /// Sums.
        out: Vec<bf16>,
    },
    /// In memory of the rank's device, so that nothing crosses the bus.
    Device {
        /// Experts and weights.
        routing: DeviceRouting,
        /// Tokens.
        x: DeviceSlice<bf16>,
        /// Sums.
        out: DeviceSlice<bf16>,
    },
}

impl<'a> Inputs<'a> {
    /// Tokens `x` with their routing, on the device of `driver` or on the host.
    pub fn new(
        driver: Option<&Arc<dyn Driver>>,
        routing: Routing<'a>,
        x: Vec<bf16>,
    ) -> Result<Self, DeviceError> {
        let Some(driver) = driver else {
            let out = vec![bf16::ZERO; x.len()];
            return Ok(Self::Host { routing, x: x.into(), out });
        };
        let stream = Stream::new(driver)?;
        let routing = DeviceRouting {
            topk: routing.topk,
            topk_idx: upload(driver, &stream, routing.topk_idx)?,
            topk_weights: upload(driver, &stream, routing.topk_weights)?,
        };
        // What is in the memory of the sums does not matter.
        let (x, out) = (upload(driver, &stream, &x)?, upload(driver, &stream, &x)?);
        Ok(Self::Device { routing, x, out })
    }

    /// Plans.
    pub fn plan(&self, communicator: &mut Communicator) -> Result<Handle, Error> {
        communicator.plan(match self {
            Self::Host { routing, .. } => Routed::Host(*routing),
            Self::Device { routing, .. } => Routed::Device(routing.clone()),
        })
    }

    /// Sends the tokens into `buffer` and its peers.
    pub fn dispatch(
        &self,
        communicator: &mut Communicator,
        handle: &Handle,
        buffer: RecvBuffer,
    ) -> Result<RecvBuffer, Error> {
        Ok(match self {
            Self::Host { x, .. } => communicator.dispatch(handle, x.clone(), buffer)?.buffer,
            Self::Device { x, .. } => communicator.dispatch(handle, x.clone(), buffer)?.buffer,
        })
    }

    /// Sums `outputs`, and gives them back.
    pub fn combine(
        &mut self,
        communicator: &mut Communicator,
        handle: &Handle,
        outputs: RecvBuffer,
    ) -> Result<RecvBuffer, Error> {
        let input = Combine::new(outputs);
        let input = match self {
            Self::Host { out, .. } => input.out(std::mem::take(out)),
            Self::Device { out, .. } => input.device_out(out.clone()),
        };
        let done = communicator.combine(handle, input)?;
        if let Self::Host { out, .. } = self {
            *out = done.x;
        }
        Ok(done.outputs)
    }
}

/// A copy of `values` on the device of `driver`.
fn upload<T: Copy>(
    driver: &Arc<dyn Driver>,
    stream: &Stream,
    values: &[T],
) -> Result<DeviceSlice<T>, DeviceError> {
    let bytes = size_of_val(values);
    let memory = Memory::new(driver, Place::Device, bytes.max(1))?;
    let address = memory.address();
    // SAFETY: the memory was allocated for so many bytes, nobody else knows it, and it lives as long as the slice. The
    // bench hands it to one operation at a time, and waits for each.
    unsafe {
        stream.copy_now(address, values.as_ptr() as u64, bytes)?;
        Ok(DeviceSlice::from_raw(address, values.len(), memory))
    }
}
