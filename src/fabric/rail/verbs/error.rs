//! Why there is no rail over RDMA.

use std::io;

/// What keeps a rank from RDMA: which device, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerbsError {
    /// The library is not installed.
    #[error("{0}; install libibverbs and the provider of the device (rdma-core)")]
    NoLibrary(String),
    /// There is no such device, or none at all.
    #[error("no RDMA device {}", absent(.wanted.as_deref(), found))]
    NoDevice {
        /// The device of the configuration.
        wanted: Option<String>,
        /// The devices that are there.
        found: Vec<String>,
    },
    /// The port carries nothing now.
    #[error("device {device}, port {port} is {state}: it must be active")]
    PortDown {
        /// The device; the first one where none was named.
        device: String,
        /// Its port.
        port: u8,
        /// The state that the system reports.
        state: String,
    },
    /// The port has no address to be reached by.
    #[error("device {device}, port {port} has no GID{}: its network interface needs an address, or another entry \
             must be named", .wanted.map_or(String::new(), |index| format!(" at index {index}")))]
    NoGid {
        /// The device.
        device: String,
        /// Its port.
        port: u8,
        /// The index of the configuration.
        wanted: Option<u8>,
    },
    /// The device can't reach a memory.
    #[error("device {device} can't register {bytes} bytes of the {memory}: {reason}")]
    Memory {
        /// The device.
        device: String,
        /// What the memory is for.
        memory: &'static str,
        /// Its size.
        bytes: usize,
        /// What the system says, and what to do.
        reason: String,
    },
    /// The device has no room for as many queue pairs.
    #[error(
        "device {device} has no room for {pairs} queue pairs: fewer for each peer (Verbs::queue_pairs) may do"
    )]
    TooManyPairs {
        /// The device.
        device: String,
        /// Queue pairs asked for.
        pairs: usize,
    },
    /// A call of the library has failed.
    #[error("device {device}: {call} failed: {reason}")]
    Call {
        /// The device.
        device: String,
        /// The call.
        call: &'static str,
        /// What the system says.
        reason: String,
    },
    /// What a peer says of itself can't be.
    #[error("the card of rank {rank} can't be used: {problem}")]
    Card {
        /// The peer.
        rank: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// The rail's thread can't be started.
    #[error("the rail's thread can't be started: {0}")]
    Thread(String),
}

/// What follows "no RDMA device".
fn absent(wanted: Option<&str>, found: &[String]) -> String {
    match (wanted, found.is_empty()) {
        (None, _) => "is here".into(),
        (Some(wanted), true) => format!("{wanted}, nor any other"),
        (Some(wanted), false) => format!("{wanted}: found {found:?}"),
    }
}

impl VerbsError {
    /// `call` has failed.
    pub(super) fn call(device: &str, call: &'static str, error: &io::Error) -> Self {
        Self::Call { device: device.into(), call, reason: error.to_string() }
    }
}
