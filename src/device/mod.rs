//! What engines and rails ask of a device: memory, streams, events, kernels. [`Driver`] is the seam: [`cuda`]
//! stands on the CUDA driver, and tests put the CPU shim behind it.

#![allow(unsafe_code)]

pub mod cuda;
mod resources;

pub use resources::{Event, Memory, Stream};

use crate::error::DeviceError;

/// What lies where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// On the device; the other ranks of the node reach it by [`Driver::reach`].
    Shared,
    /// On the device, for its own kernels.
    Device,
    /// On the host, pinned, at an address that is the same for host and kernels.
    Host,
}

/// Memory as a driver hands it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawMemory {
    /// Its address in the driver's space, aligned to 256 bytes at least.
    pub address: u64,
    /// Its size.
    pub bytes: usize,
    /// Where it lies.
    pub place: Place,
}

/// A stream as the driver knows it: a `CUstream`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RawStream(pub u64);

/// An event as the driver knows it: a `CUevent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RawEvent(pub u64);

/// The kernels of `kernels/railhop.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Opens an operation and agrees on it; one block.
    Plan,
    /// Moves tokens.
    Dispatch,
    /// Sums experts' outputs.
    Combine,
    /// Orders received rows by expert; one block.
    ExpertOrder,
    /// Copies received rows into that order.
    Expand,
    /// Sums rows of that order back.
    Collapse,
    /// Widens E4M3 rows.
    Dequantise,
    /// Copies bytes: what the others are compared with.
    Copy,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Plan,
        Self::Dispatch,
        Self::Combine,
        Self::ExpertOrder,
        Self::Expand,
        Self::Collapse,
        Self::Dequantise,
        Self::Copy,
    ];

    /// The name of its entry point.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plan => "plan",
            Self::Dispatch => "dispatch",
            Self::Combine => "combine",
            Self::ExpertOrder => "expert_order",
            Self::Expand => "expand",
            Self::Collapse => "collapse",
            Self::Dequantise => "dequantise",
            Self::Copy => "copy",
        }
    }
}

/// A launch's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Blocks.
    pub blocks: usize,
    /// Warps of a block, at most 16.
    pub warps: usize,
    /// Bytes of dynamic shared memory of a block.
    pub shared: usize,
}

/// What a device has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Its name, for people.
    pub name: String,
    /// Ranks whose drivers give the same number share one device, and its multiprocessors.
    pub device: u64,
    /// Multiprocessors.
    pub sms: usize,
    /// Bytes of shared memory that a block may have.
    pub shared: usize,
    /// Streams whose work never waits for another's: `CUDA_DEVICE_MAX_CONNECTIONS`.
    pub connections: usize,
}

/// One rank's device. Everything is asynchronous unless said otherwise; work of one stream runs in order, and streams
/// are independent of each other and of whatever else the process does on the device.
///
/// Kernels of several ranks wait for each other: no call may wait for a kernel unless it says so.
///
/// # Safety
/// What the methods promise holds: memory stays mapped until it is freed, work of a stream is ordered, and
/// [`Driver::is_done`] is true only after all that was recorded has ended.
pub unsafe trait Driver: Send + Sync + 'static {
    /// What the device has.
    fn limits(&self) -> &Limits;

    /// Zeroed memory; ready when the call returns.
    ///
    /// # Errors
    /// There is not so much.
    fn allocate(&self, place: Place, bytes: usize) -> Result<RawMemory, DeviceError>;

    /// Frees memory.
    ///
    /// # Safety
    /// It came from [`Driver::allocate`], and nothing uses it any more, by whatever address.
    unsafe fn free(&self, memory: RawMemory);

    /// The address at which this rank's kernels reach [`Place::Shared`] memory of `owner`, a rank of the same node.
    ///
    /// # Errors
    /// The devices don't reach each other.
    fn reach(&self, owner: &dyn Driver, memory: &RawMemory) -> Result<u64, DeviceError>;

    /// A stream.
    ///
    /// # Errors
    /// The driver refuses.
    fn new_stream(&self) -> Result<RawStream, DeviceError>;

    /// Destroys a stream.
    ///
    /// # Safety
    /// It came from [`Driver::new_stream`], and nothing of it is under way.
    unsafe fn free_stream(&self, stream: RawStream);

    /// An event, done until it is recorded.
    ///
    /// # Errors
    /// The driver refuses.
    fn new_event(&self) -> Result<RawEvent, DeviceError>;

    /// Destroys an event.
    ///
    /// # Safety
    /// It came from [`Driver::new_event`].
    unsafe fn free_event(&self, event: RawEvent);

    /// Makes `event` stand for all that has been enqueued on `stream`.
    ///
    /// # Errors
    /// The device has failed.
    ///
    /// # Safety
    /// Both are alive.
    unsafe fn record(&self, event: RawEvent, stream: RawStream) -> Result<(), DeviceError>;

    /// Makes what is enqueued on `stream` from now on wait for `event`, as it was recorded last.
    ///
    /// # Errors
    /// The device has failed.
    ///
    /// # Safety
    /// Both are alive.
    unsafe fn wait(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError>;

    /// Whether all that `event` stands for has ended.
    ///
    /// # Errors
    /// The device has failed.
    ///
    /// # Safety
    /// It is alive.
    unsafe fn is_done(&self, event: RawEvent) -> Result<bool, DeviceError>;

    /// Makes `kernel` ready for launches with up to `grid.shared` bytes; how many such blocks the device runs at a time.
    ///
    /// # Errors
    /// It can't be launched so.
    fn prepare(&self, kernel: Kernel, grid: Grid) -> Result<usize, DeviceError>;

    /// Enqueues a kernel; its parameters are copied.
    ///
    /// # Errors
    /// It can't be launched so, or the device has failed.
    ///
    /// # Safety
    /// `params` is what the kernel takes, and all that it names stays there until the kernel has ended.
    unsafe fn launch(
        &self,
        stream: RawStream,
        kernel: Kernel,
        grid: Grid,
        params: &[u8],
    ) -> Result<(), DeviceError>;

    /// Enqueues a copy between any two of: memory of any rank's [`Driver::allocate`] as this one reaches it, memory
    /// of the caller's on this device, memory of the host. Where the host's is not pinned the call may read it before
    /// it returns, or return only when it has been written.
    ///
    /// # Errors
    /// The device has failed.
    ///
    /// # Safety
    /// Both are there until the copy has ended, do not overlap, and nobody else writes them meanwhile.
    unsafe fn copy(&self, stream: RawStream, to: u64, from: u64, bytes: usize) -> Result<(), DeviceError>;

    /// Enqueues a store of `value` in the word at `to`: one write, which whoever polls the word sees only after all that
    /// came before it on the stream.
    ///
    /// # Errors
    /// The device has failed.
    ///
    /// # Safety
    /// The word lies in memory of some rank's [`Driver::allocate`] as this one reaches it, and is there until the store
    /// has ended.
    unsafe fn store(&self, stream: RawStream, to: u64, value: u64) -> Result<(), DeviceError>;

    /// Waits until all of `stream` has ended.
    ///
    /// # Errors
    /// The device has failed.
    ///
    /// # Safety
    /// It is alive.
    unsafe fn synchronize(&self, stream: RawStream) -> Result<(), DeviceError>;
}
