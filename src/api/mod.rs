//! What callers use: a world, its communicators, buffers, handles and operations.

mod buffer;
mod communicator;
mod expert_major;
mod input;
mod pending;
mod world;

pub use buffer::{RecvBuffer, Source};
pub use communicator::{Communicator, Handle};
pub use expert_major::{ExpertMajor, ExpertMajorError, ScaleRows};
pub use input::{Combine, ExpertOutputs, Fp8Tokens, Routing, Rows, ScaleData, ScaleOrder, Scales, Tokens};
pub use pending::{Combined, Dispatched, Failed, Operation, Pending};
pub use world::LocalWorld;
