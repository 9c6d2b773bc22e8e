//! What carries the postings of device ranks along the rail, asynchronous by nature.
//!
//! - [`LocalRail`]: ranks of one process, whose memories the host can address.
//! - [`DeviceRail`]: ranks of one process on devices: puts and signals are copies on a stream.
//! - [`StagedRail`]: the same by way of the host, for devices that don't reach each other.
//! - [`TcpRail`]: ranks of other processes, over connections that somebody else has made; [`MirroredRail`] and
//!   [`MirroredRegion`] for those on devices.
//! - [`VerbsRail`]: ranks in other processes and on other machines, over RDMA.
//! - [`NullRail`]: builds what a NIC would be given and carries nothing, to measure what posting costs.

mod device;
mod local;
mod mirrored;
mod null;
mod staged;
#[cfg(target_os = "linux")]
mod tcp;
#[cfg(target_os = "linux")]
mod verbs;

pub use device::{DeviceRail, Reached};
pub use local::LocalRail;
pub use mirrored::{Mirror, MirroredRail, MirroredRegion};
pub use null::{NullRail, WorkRequest, work};
pub use staged::{Inbox, Outbox, Staged, StagedRail};
#[cfg(target_os = "linux")]
pub use tcp::{TcpPeer, TcpRail};
#[cfg(target_os = "linux")]
pub use verbs::{Gid, NicMemory, RdmaSysfs, VerbsEnd, VerbsError, VerbsRail, VerbsSetup, verbs_library};

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::mapped::Mapped;
use crate::error::{Cause, DeviceError};
use crate::wire::posting::Posting;
use crate::wire::word::Word;

/// Carries what one rank's kernels ask for. The contract is one sentence: *a signal becomes visible at the
/// peer only after the data posted before it on the same queue to the same peer*; nothing is promised between
/// queues or peers.
///
/// A completion says that the data has been read at home: its source may be written again. It says nothing
/// about the peer. Completions of one queue and peer come in the order of posting, for the index of a later
/// one covers the earlier ones. Postings without data have none.
pub trait Rail: Send {
    /// Takes postings from the front of `postings`, in order, and returns how many: fewer than all where
    /// there is no room now. Room comes by [`Rail::poll`] alone, whatever the peers' software does.
    ///
    /// # Errors
    /// The rail can't carry a posting, or is broken. What becomes of postings taken earlier is not known.
    fn post(&mut self, postings: &[Posting]) -> Result<usize, RailError>;

    /// Moves what is under way, without waiting; appends the completions that have come.
    ///
    /// # Errors
    /// The rail is broken.
    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), RailError>;

    /// Whether nothing is under way: every posting has left its source.
    fn is_idle(&self) -> bool;
}

/// A rail to ranks in other processes. Threads of its own receive, and carry on with what was posted: it takes all it
/// is given, for the protocol's credits bound what can be under way.
pub trait NetworkRail: Rail {
    /// Waits until all that was posted before is in its peers' memory, at most until `end`. The peers of which that is
    /// not known by then; what is posted to a peer that is lost is gone, and nobody waits for it.
    fn drain(&mut self, end: Instant) -> Vec<usize>;
}

/// What a rail to other processes tells the rank it serves, from its own threads.
pub trait Listener: Send + Sync {
    /// Index words in the rank's region have been written.
    fn signalled(&self);

    /// Nothing more comes from `peer` or goes there, and all that has come from it has been published. Said once for a
    /// peer: with the reason where the rail has failed, without where the peer has closed its end or its process is gone.
    fn lost(&self, peer: usize, failure: Option<RailError>);
}

/// Where what peers put and signal lands.
pub trait Landing: Send + Sync {
    /// What data is received into, at its place in a region. It stays mapped as long as `self`.
    fn memory(&self) -> Mapped;

    /// Makes an index word hold its value for the rank, after the data that has landed with it and whatever was
    /// published before.
    ///
    /// # Errors
    /// The rank's device has failed.
    fn publish(&self, landed: &Landed) -> Result<(), DeviceError>;
}

/// A posting that has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Landed {
    /// Where its data lies.
    pub target: usize,
    /// The size of that.
    pub bytes: usize,
    /// Offset of its index word, in the memory.
    pub word: usize,
    /// What that is to hold.
    pub value: u64,
}

/// The region itself.
impl Landing for Mapped {
    fn memory(&self) -> Mapped {
        *self
    }

    fn publish(&self, landed: &Landed) -> Result<(), DeviceError> {
        let word = self.word(landed.word).expect("what has landed is in the memory");
        word.store(landed.value, Ordering::Release);
        Ok(())
    }
}

/// A rail that outlives whoever posts to it.
impl<R: Rail + ?Sized> Rail for Arc<Mutex<R>> {
    fn post(&mut self, postings: &[Posting]) -> Result<usize, RailError> {
        lock(self).post(postings)
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), RailError> {
        lock(self).poll(completions)
    }

    fn is_idle(&self) -> bool {
        lock(self).is_idle()
    }
}

/// A rail that has panicked has said so to whoever posted.
fn lock<R: ?Sized>(rail: &Mutex<R>) -> MutexGuard<'_, R> {
    rail.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<R: Rail + ?Sized> Rail for Box<R> {
    fn post(&mut self, postings: &[Posting]) -> Result<usize, RailError> {
        (**self).post(postings)
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), RailError> {
        (**self).poll(completions)
    }

    fn is_idle(&self) -> bool {
        (**self).is_idle()
    }
}

/// The data of a posting has left its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// [`Posting::completion`].
    pub offset: usize,
    /// [`Posting::value`].
    pub value: Word,
}

impl Completion {
    /// The completion of `posting`, if it has one.
    pub fn of(posting: &Posting) -> Option<Self> {
        posting.completion.map(|offset| Self { offset, value: posting.value })
    }
}

/// Why a rail carries no more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RailError {
    /// A posting names what is not there.
    #[error("{what} of a posting to rank {peer}: {bytes} bytes at {offset} are outside its memory")]
    OutOfRange {
        /// Which part of the posting.
        what: &'static str,
        /// Its peer.
        peer: usize,
        /// The offset.
        offset: usize,
        /// The size.
        bytes: usize,
    },
    /// What connects this rank to a peer has failed.
    #[error("the rail to rank {peer} is broken: {reason}")]
    Broken {
        /// The peer.
        peer: usize,
        /// What the transport says.
        reason: String,
    },
    /// What connects this rank to everybody has failed.
    #[error("the rail's own end is broken: {reason}")]
    Cut {
        /// A peer that is no longer reached.
        peer: usize,
        /// What the transport says.
        reason: String,
    },
}

impl RailError {
    /// The peer that is no longer reached.
    pub fn peer(&self) -> usize {
        match self {
            Self::OutOfRange { peer, .. } | Self::Broken { peer, .. } | Self::Cut { peer, .. } => *peer,
        }
    }
}

impl From<RailError> for Cause {
    fn from(error: RailError) -> Self {
        match error {
            RailError::Cut { reason, .. } => Self::Link(reason),
            other => Self::Rail(other.to_string()),
        }
    }
}
