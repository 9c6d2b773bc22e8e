//! What a GPU, a NIC and a peer must agree on. Offsets, strides and constants of everything that crosses a
//! rank boundary stand here and nowhere else.
//!
//! - [`word`]: index words (generation and index in one `u64`) and their arithmetic.
//! - [`shape`]: row formats, token slots of the rings and the layout of receive buffers.
//! - [`record`]: the records that open an operation, and the count block.
//! - [`region`]: the symmetric region: every offset and the total size from one pass.
//! - [`device`]: a rank's other memory on a device: private memory, mailbox, handles, shared memory.
//! - [`kernel`], [`local`]: the parameters of kernels, and the header that they include.
//! - [`command`], [`posting`]: what kernels ask of their proxy, and what that comes to.

pub mod command;
pub mod device;
pub mod kernel;
pub mod local;
pub mod posting;
pub mod record;
pub mod region;
mod render;
pub mod shape;
pub mod word;

/// Alignment of rows, scales and headers: the unit of bulk copies.
pub const ROW_ALIGN: usize = 16;

/// Distance of things written by different ranks: a line is never shared by two writers.
pub const LINE: usize = 64;

/// All of it as one number: what processes must have in common to be ranks of one world.
pub fn layout() -> u64 {
    let hash = blake3::hash(kernel::header().as_bytes());
    u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("32 bytes"))
}

/// `n` rounded up to a multiple of `align`.
pub const fn align_up(n: usize, align: usize) -> usize {
    n.div_ceil(align) * align
}
