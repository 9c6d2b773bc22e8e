//! What callers use: a world, its communicators, buffers, handles and operations.

mod buffer;
mod communicator;
mod device;
mod expert_major;
mod group;
mod input;
mod mirror;
mod pending;
mod recorded;
mod start;
mod world;

pub use buffer::{DeviceParts, RecvBuffer, Source};
pub use communicator::{Communicator, Handle};
pub use device::{DeviceFp8Tokens, DeviceRouting, DeviceScales, DeviceSlice, StreamRef};
pub use expert_major::{ExpertMajor, ExpertMajorError, ScaleRows};
pub use group::Group;
pub use input::{
    Combine, ExpertOutputs, Fp8Tokens, Routed, Routing, Rows, ScaleData, ScaleOrder, Scales, Tokens,
};
pub use pending::{Combined, Dispatched, Failed, Operation, Pending};
pub use recorded::Recorded;
pub use world::{LocalWorld, ProcessWorld};

pub use crate::engine::join::JoinError;
