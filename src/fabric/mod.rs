//! What carries puts and signals, and the memory they land in.
//!
//! - [`memory`]: one mapped region per rank.
//! - [`local`]: ranks are threads of one process.
//! - [`process`]: ranks are processes: [`shm`] within a node, a network rail between nodes; [`connect`] is how they meet,
//!   [`descriptor`] how memory gets from one to another.
//! - [`doorbell`]: how a fabric wakes the engine.
//! - [`rail`]: what carries the puts and signals of ranks on a device, over [`mapped`] memory.
//! - [`proxy`]: drains the queue of commands that such a rank's kernels fill, into its rail.
//! - [`sim`]: a seeded simulator with delay, reordering and loss, for tests.

pub mod connect;
pub mod descriptor;
pub mod doorbell;
pub mod local;
pub mod mapped;
pub mod memory;
pub mod process;
pub mod proxy;
pub mod rail;
pub mod shm;
pub mod sim;

use std::time::Instant;

/// Carries what crosses ranks. The contract is one sentence: *an index becomes visible only after the data
/// put before it on the same channel*; nothing is promised between channels or peers.
pub trait Fabric: Send + Sync {
    /// Writes `parts`, one after the other, at `offset` in the region of `to`.
    fn put(&self, from: usize, to: usize, offset: usize, parts: &[&[u8]]);

    /// Publishes `value` in the index word at offset `word` of `to`, after all that the calling thread has
    /// put (and stored in peers' memory) before.
    fn signal(&self, from: usize, to: usize, word: usize, value: u64);

    /// Sends what was signalled and is still held back for company. Called by every worker after a pass.
    fn flush(&self) {}

    /// Waits until all that was signalled has arrived, at most until `end`; the peers of which that is not known by then.
    fn drain(&self, _end: Instant) -> Vec<usize> {
        Vec::new()
    }
}
