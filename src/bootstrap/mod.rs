//! How the processes of a world find each other and exchange what they need before there is a fabric.
//!
//! A [`Bootstrap`] is all that the rest of the library asks for: every rank brings some bytes, every rank gets all of
//! them in rank order. [`Store`] does it over TCP with what a launcher (torchrun, Slurm, `mpirun`) leaves in the
//! environment, [`Callback`] by whatever the caller has, [`LocalBootstrap`] among threads.
//!
//! ```no_run
//! use std::time::Duration;
//! use railhop::bootstrap::{Bootstrap, Member, Store, StoreConfig};
//!
//! let member = Member::from_environment()?;
//! let mut store = Store::connect(&StoreConfig::of(&member, railhop::wire::layout(), Duration::from_secs(100))?)?;
//! let names = store.all_gather(b"what the others must know", Duration::from_secs(100))?;
//! assert_eq!(names.len(), member.world_size);
//! # Ok::<(), railhop::bootstrap::BootstrapError>(())
//! ```
//!
//! Calls are collective: all ranks make the same ones in the same order. A call that fails with anything but
//! [`BootstrapError::TooLarge`] has failed for good, on all ranks, and every later call gives the same error.

mod callback;
mod client;
mod environment;
mod error;
mod frame;
mod handshake;
mod hostlist;
mod hub;
mod local;
pub(crate) mod machine;
mod server;
mod store;

use std::net::IpAddr;
use std::time::Duration;

pub use callback::Callback;
pub use environment::{Address, Launcher, Local, Member, PORTS, derived_port};
pub use error::{Agreed, BootstrapError, Operation, Refusal, Step};
pub use frame::MAX_GATHER;
pub use handshake::{JobKey, VERSION};
pub use hostlist::{expand_hosts, tasks_of_node};
pub use local::LocalBootstrap;
pub use store::{Store, StoreConfig};

/// What lets the ranks of a world exchange bytes, slowly but surely.
pub trait Bootstrap: Send {
    /// The rank of this process (or thread).
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// The address of this process by which it reaches the others, where that is known.
    fn own_address(&self) -> Option<IpAddr> {
        None
    }

    /// Brings `mine`, and gives what all ranks have brought, in rank order. Lengths may differ.
    ///
    /// # Errors
    /// A rank has not come within the deadline (of the rank whose deadline ends first) or has left, or it came for
    /// something else; all together are more than [`MAX_GATHER`].
    fn all_gather(&mut self, mine: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>, BootstrapError>;

    /// Returns when all ranks have come.
    ///
    /// # Errors
    /// As for [`Bootstrap::all_gather`].
    fn barrier(&mut self, deadline: Duration) -> Result<(), BootstrapError> {
        self.all_gather(&[], deadline).map(drop)
    }
}
