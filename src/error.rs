//! Everything that can go wrong, as types. No failure is a panic, a hang or a lost row.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

/// A configuration that can't work, refused before anything is allocated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} = {value}: {reason}{}", .nearest.map_or(String::new(), |n| format!("; {n} would work")))]
pub struct ConfigError {
    /// The builder field.
    pub field: &'static str,
    /// The refused value.
    pub value: u64,
    /// Why it can't work.
    pub reason: String,
    /// The value next to the refused one that works, where there is one.
    pub nearest: Option<u64>,
}

impl ConfigError {
    /// Refuses `value`, unless it is `ok`.
    pub(crate) fn check(
        ok: bool,
        field: &'static str,
        value: usize,
        reason: &str,
        nearest: Option<usize>,
    ) -> Result<(), Self> {
        if ok {
            return Ok(());
        }
        let (value, nearest) = (value as u64, nearest.map(|nearest| nearest as u64));
        Err(Self { field, value, reason: reason.into(), nearest })
    }

    /// The system has refused what `field` asks for.
    pub(crate) fn refused(field: &'static str, value: usize, error: std::io::Error) -> Self {
        Self { field, value: value as u64, reason: error.to_string(), nearest: None }
    }
}

/// What a panic says.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("unknown").to_string()
}

/// What a device, its driver or the compiler of its kernels can't do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// No CUDA driver is installed.
    #[error("no CUDA driver here: {0}")]
    NoDriver(String),
    /// The driver is older than what this library needs. Versions are 1000 × major + 10 × minor.
    #[error("the CUDA driver supports version {found}, {needed} is needed")]
    OldDriver {
        /// What it supports.
        found: u32,
        /// What is needed.
        needed: u32,
    },
    /// There is no such device.
    #[error("there is no CUDA device {device}: {count} found")]
    NoDevice {
        /// Its ordinal.
        device: usize,
        /// Devices there are.
        count: usize,
    },
    /// The kernels were not compiled at build time, and there is no NVRTC to do it now.
    #[error(
        "the kernels must be compiled first, and NVRTC is not here: {0}; build with nvcc, or install NVRTC"
    )]
    NoCompiler(String),
    /// The kernels do not compile.
    #[error("the kernels do not compile for {target}: {log}")]
    Compile {
        /// The architecture.
        target: String,
        /// What the compiler says.
        log: String,
    },
    /// The device lacks something.
    #[error("{device} can't do this: {what}")]
    Unsupported {
        /// The device's name.
        device: String,
        /// What it lacks.
        what: String,
    },
    /// There is not so much memory.
    #[error("{bytes} bytes of {place} memory can't be had")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// Where.
        place: &'static str,
    },
    /// Blocks that wait for each other must all run at the same time, and can't.
    #[error(
        "{ranks} ranks with {blocks} blocks each share {device}, which runs {resident} such blocks at a time"
    )]
    NotResident {
        /// The device's name.
        device: String,
        /// Ranks on it.
        ranks: usize,
        /// Blocks of each, over its lanes.
        blocks: usize,
        /// What it runs.
        resident: usize,
    },
    /// A call of the driver has failed.
    #[error("{call} failed: {reason}")]
    Call {
        /// The call.
        call: &'static str,
        /// What the driver says.
        reason: String,
    },
}

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u32)]
pub enum Kind {
    /// Counts are exchanged, no rows move.
    Plan = 1,
    /// Rows move by an existing plan (first or cached dispatch).
    Dispatch = 2,
    /// Counts and rows in one operation.
    PlanDispatch = 3,
    /// Expert outputs come home and are summed.
    Combine = 4,
}

impl Kind {
    /// The kind that `code` stands for on the wire.
    pub fn from_code(code: u32) -> Option<Self> {
        [Self::Plan, Self::Dispatch, Self::PlanDispatch, Self::Combine]
            .into_iter()
            .find(|&kind| kind as u32 == code)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plan => "plan",
            Self::Dispatch => "dispatch",
            Self::PlanDispatch => "plan+dispatch",
            Self::Combine => "combine",
        })
    }
}

/// A tensor whose size did not fit the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Tensor {
    /// `topk_idx` [T, K].
    TopkIdx = 1,
    /// `topk_weights` [T, K].
    TopkWeights = 2,
    /// The tokens, `x` [T, H].
    X = 3,
    /// The scales of E4M3 tokens.
    Scales = 4,
    /// The experts' outputs, `y` [R, H].
    ExpertOutputs = 5,
    /// The bias [T, H].
    Bias = 6,
    /// Memory for the result [T, H].
    Out = 7,
}

impl Tensor {
    /// It has the elements it should have.
    pub(crate) fn check_size(self, expected: usize, got: usize) -> Result<(), Reason> {
        match expected == got {
            true => Ok(()),
            false => Err(Reason::WrongSize { tensor: self, expected: expected as u64, got: got as u64 }),
        }
    }
}

impl fmt::Display for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TopkIdx => "topk_idx",
            Self::TopkWeights => "topk_weights",
            Self::X => "x",
            Self::Scales => "scales",
            Self::ExpertOutputs => "expert outputs",
            Self::Bias => "bias",
            Self::Out => "out",
        })
    }
}

/// Why a rank's input to an operation was refused. It travels to every rank, so that all report the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// An entry of `topk_idx` is neither an expert nor −1.
    #[error("topk_idx[{token}][{k}] = {expert} is outside -1..{num_experts}")]
    ExpertOutOfRange {
        /// Token.
        token: u64,
        /// Position in the token's top-k.
        k: u64,
        /// The entry.
        expert: i64,
        /// Number of experts in the placement.
        num_experts: u64,
    },
    /// A tensor has the wrong number of elements.
    #[error("{tensor} has {got} elements, {expected} expected")]
    WrongSize {
        /// Which tensor.
        tensor: Tensor,
        /// Elements expected.
        expected: u64,
        /// Elements given.
        got: u64,
    },
    /// The receive buffer has fewer rows than the plan needs.
    #[error("the receive buffer holds {capacity} rows, {needed} needed")]
    BufferTooSmall {
        /// Rows needed.
        needed: u64,
        /// Rows the buffer holds.
        capacity: u64,
    },
    /// `hidden` is zero or a row is not a multiple of 16 bytes.
    #[error("hidden = {hidden} is not a positive multiple of {multiple}")]
    HiddenNotAligned {
        /// Elements per row.
        hidden: u64,
        /// What it must be a multiple of, for this row format.
        multiple: u64,
    },
    /// `hidden` is larger than the rings were made for.
    #[error("hidden = {hidden} exceeds Config::max_hidden = {max}")]
    HiddenTooLarge {
        /// Elements per row.
        hidden: u64,
        /// The configured maximum.
        max: u64,
    },
    /// `topk` is zero or larger than the rings were made for.
    #[error("topk = {topk} is outside 1..={max} (Config::max_topk)")]
    TopkOutOfRange {
        /// Entries per token.
        topk: u64,
        /// The configured maximum.
        max: u64,
    },
    /// The row format of the input is not the receive buffer's.
    #[error("the input's row format can't be sent into a receive buffer of another format")]
    FormatMismatch,
    /// The handle or buffer was made by another communicator.
    #[error("the handle or buffer belongs to another communicator")]
    Foreign,
    /// The handle was made before the last reset.
    #[error("the handle was made before the communicator was reset")]
    StaleHandle,
    /// `combine` needs a handle whose rows have been dispatched.
    #[error("the handle was planned but never dispatched")]
    NotDispatched,
    /// The pool of the symmetric region has no block of this size.
    #[error("the pool has no {needed} bytes in one block free (largest: {largest}; Config::pool_bytes)")]
    PoolExhausted {
        /// Bytes asked for.
        needed: u64,
        /// The largest free block.
        largest: u64,
    },
    /// More tokens than plans on a device have room for.
    #[error("{tokens} tokens exceed Config::max_tokens = {max}")]
    TooManyTokens {
        /// Tokens of the rank.
        tokens: u64,
        /// The configured maximum.
        max: u64,
    },
    /// The rows lie in the memory of a device, which this engine does not reach, or of the host where a device's is
    /// needed.
    #[error("the engine can't use rows in this memory: device memory needs a CUDA engine")]
    WrongMemory,
}

/// What a rank said it was starting: ranks must agree on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Started {
    /// Kind of operation.
    pub kind: Kind,
    /// Number of the operation on its communicator.
    pub epoch: u64,
    /// Elements per row, 0 for a plan.
    pub hidden: u32,
    /// Entries per token.
    pub topk: u32,
    /// Code of the row format (`wire`), 0 for a plan.
    pub format: u32,
    /// Epoch of the plan that is used, 0 where the operation makes its own.
    pub plan: u64,
    /// Hash of the configuration.
    pub config: u64,
}

impl fmt::Display for Started {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (epoch {}, hidden {}, topk {}", self.kind, self.epoch, self.hidden, self.topk)?;
        write!(f, ", format {}, plan {}, config {:016x})", self.format, self.plan, self.config)
    }
}

/// What a warp or a host task does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Role {
    /// Enter, counts, verdicts, arrivals of one rank.
    Receiver,
    /// Puts tokens on the rail.
    Sender,
    /// Moves arrived tokens to their final rows; in combine sums a node's rows for the rail.
    Forwarder,
    /// Sums the nodes' partial sums at the home rank.
    Reducer,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Receiver => "receiver",
            Self::Sender => "sender",
            Self::Forwarder => "forwarder",
            Self::Reducer => "reducer",
        })
    }
}

/// One wait of one role: what it needs, from whom, and how far that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Wait {
    /// The role that waits.
    pub role: Role,
    /// Its channel, where it has one.
    pub channel: Option<usize>,
    /// The rank that must move first.
    pub peer: usize,
    /// What is awaited, by the name of its index word.
    pub what: &'static str,
    /// The index that would end the wait.
    pub expected: u64,
    /// The index seen last.
    pub seen: u64,
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.role)?;
        if let Some(channel) = self.channel {
            write!(f, " of channel {channel}")?;
        }
        write!(f, " waited for {} {} of rank {}, saw {}", self.what, self.expected, self.peer, self.seen)
    }
}

/// All that is awaited, by the names of index words, in the order of an operation: what is missing earlier explains what
/// is missing later.
pub(crate) const AWAITED: [&str; 7] =
    ["rail record", "enter record", "gathered counts", "verdict", "credit", "tail", "arrivals"];

/// A wait as another process has sent it.
#[derive(Deserialize)]
struct SentWait {
    role: Role,
    channel: Option<usize>,
    peer: usize,
    what: String,
    expected: u64,
    seen: u64,
}

impl<'de> Deserialize<'de> for Wait {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let SentWait { role, channel, peer, what, expected, seen } = SentWait::deserialize(from)?;
        // Devices know some more.
        let what = AWAITED.into_iter().find(|&known| known == what).unwrap_or("progress");
        Ok(Self { role, channel, peer, what, expected, seen })
    }
}

/// Why a communicator stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// A wait outlived the deadline.
    Deadline(Duration),
    /// The rank's communicator was dropped.
    Departed,
    /// A role panicked; the message.
    Panicked(String),
    /// A proxy has stopped; why.
    Proxy(String),
    /// A device has failed; how.
    Device(String),
    /// What carries hop 1 to the rank has failed; how.
    Rail(String),
    /// What the rank itself is connected by has failed; how.
    Link(String),
}

impl Cause {
    /// The rank to look at, where `rank` can't go on for want of `peer`.
    pub(crate) fn culprit(&self, rank: usize, peer: usize) -> usize {
        if matches!(self, Self::Link(_)) { rank } else { peer }
    }
}

/// The record of the first fault of a world. It poisons the communicator until `reset`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The rank at the end of the chain of waits: the one to look at.
    pub rank: usize,
    /// Why.
    pub cause: Cause,
    /// The rank that noticed.
    pub reporter: usize,
    /// The operation it was in.
    pub kind: Kind,
    /// That operation's epoch.
    pub epoch: u64,
    /// The wait at the end of the chain; none where a role panicked.
    pub wait: Option<Wait>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Cause::Deadline(after) => write!(f, "rank {} did not move within {after:?}", self.rank)?,
            Cause::Departed => write!(f, "rank {} left the world", self.rank)?,
            Cause::Panicked(message) => write!(f, "a role of rank {} panicked: {message}", self.rank)?,
            Cause::Device(message) => write!(f, "the device of rank {} has failed: {message}", self.rank)?,
            Cause::Rail(message) => write!(f, "rank {} can't be reached: {message}", self.rank)?,
            Cause::Link(message) => write!(f, "rank {} is cut off: {message}", self.rank)?,
            Cause::Proxy(message) => write!(f, "the proxy of rank {} has stopped: {message}", self.rank)?,
        }
        write!(f, "; seen by rank {} in {} of epoch {}", self.reporter, self.kind, self.epoch)?;
        match &self.wait {
            Some(wait) => write!(f, ": {wait}"),
            None => Ok(()),
        }
    }
}

/// How an operation fails. Every rank of the world gets the same one for [`Error::Refused`] and
/// [`Error::OutOfStep`], after which the communicator works on; a [`Error::Fault`] poisons it until `reset`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The configuration can't work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A device can't be used, or has failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// One rank's input was invalid, or a receive buffer was too small: no rank got its rows.
    #[error("rank {rank}: {reason}")]
    Refused {
        /// The rank whose input was refused.
        rank: usize,
        /// Why.
        reason: Reason,
    },
    /// Ranks started different operations.
    #[error("rank {rank} is out of step: it started {started}, rank {reference} started {expected}")]
    OutOfStep {
        /// The rank that differs.
        rank: usize,
        /// What it started.
        started: Box<Started>,
        /// The rank it differs from.
        reference: usize,
        /// What that one started.
        expected: Box<Started>,
    },
    /// A rank stopped moving; the communicator is poisoned until every rank has called `reset`.
    #[error("{0}")]
    Fault(Arc<Fault>),
    /// The pool has no block of this size; nothing was started.
    #[error(
        "pool exhausted: {needed} bytes asked for, largest free block {largest}; raise Config::pool_bytes"
    )]
    PoolExhausted {
        /// Bytes asked for.
        needed: usize,
        /// The largest free block.
        largest: usize,
    },
    /// Not every rank called `reset` within the deadline, or one has left for good.
    #[error("reset: waited {after:?} for ranks {missing:?} in vain")]
    ResetIncomplete {
        /// The ranks that did not come, or that have left.
        missing: Vec<usize>,
        /// How long the first to come waited.
        after: Duration,
    },
}

impl Error {
    /// The reason that peers are told when this keeps a rank from the memory it needs.
    pub(crate) fn for_peers(&self) -> Reason {
        match *self {
            Self::PoolExhausted { needed, largest } => {
                Reason::PoolExhausted { needed: needed as u64, largest: largest as u64 }
            }
            _ => Reason::FormatMismatch,
        }
    }
}
