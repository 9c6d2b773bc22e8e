//! How a bootstrap fails.

use std::fmt;
use std::time::Duration;

use crate::error::ConfigError;

/// What ranks come together for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u64)]
pub enum Operation {
    /// To form the world.
    Join = 1,
    /// To exchange bytes.
    Gather = 2,
    /// To have met.
    Barrier = 3,
}

impl Operation {
    /// The operation that `code` stands for between processes.
    pub(super) fn from_code(code: u64) -> Option<Self> {
        [Self::Join, Self::Gather, Self::Barrier].into_iter().find(|&operation| operation as u64 == code)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Join => "join",
            Self::Gather => "all_gather",
            Self::Barrier => "barrier",
        })
    }
}

/// One coming together of all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Step {
    /// What for.
    pub operation: Operation,
    /// How many there were before it.
    pub number: u64,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.operation {
            Operation::Join => write!(f, "join"),
            operation => write!(f, "{operation} (step {})", self.number),
        }
    }
}

/// What the ranks of a world must have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u64)]
pub enum Agreed {
    /// The library's version.
    Version = 1,
    /// The hash of configuration and wire layout that the caller passes.
    Layout = 2,
    /// The number of ranks.
    WorldSize = 3,
    /// What they come together for, as the number of an [`Operation`].
    Operation = 4,
}

impl Agreed {
    /// What `code` stands for between processes.
    pub(super) fn from_code(code: u64) -> Option<Self> {
        let all = [Self::Version, Self::Layout, Self::WorldSize, Self::Operation];
        all.into_iter().find(|&what| what as u64 == code)
    }

    /// `value`, as people read it.
    fn show(self, value: u64) -> String {
        match (self, Operation::from_code(value)) {
            (Self::Layout, _) => format!("{value:#018x}"),
            (Self::Operation, Some(operation)) => operation.to_string(),
            _ => value.to_string(),
        }
    }
}

impl fmt::Display for Agreed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Version => "version",
            Self::Layout => "layout",
            Self::WorldSize => "world size",
            Self::Operation => "operation",
        })
    }
}

/// Why one end of a connection wants nothing to do with the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The ends do not share the job's secret: another job's store, or another secret file.
    #[error("the secret or the job id differs")]
    Secret,
    /// What listens there does not talk as a store does.
    #[error("what listens there is not a store of this library")]
    NotAStore,
}

/// How a bootstrap fails. All ranks that wait together get the same error, but for what only one can see.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootstrapError {
    /// A variable of the environment can't be what it is, or is needed.
    #[error("{variable}{}: {reason}", .value.as_ref().map_or(" is not set".into(), |value| format!(" = {value:?}")))]
    Environment {
        /// Its name.
        variable: String,
        /// Its value, if it is set.
        value: Option<String>,
        /// What is wrong.
        reason: String,
    },
    /// Nothing in the environment says which rank this is.
    #[error(
        "no launcher found: neither torchrun's RANK, nor Open MPI's OMPI_COMM_WORLD_RANK, nor PMI_RANK, nor \
         SLURM_PROCID is set; set RAILHOP_RANK, RAILHOP_WORLD_SIZE, RAILHOP_LOCAL_RANK and RAILHOP_LOCAL_SIZE"
    )]
    NoLauncher,
    /// A setting can't work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Ranks have not come in time.
    #[error("ranks {ranks:?} have not come to {step} within {after:?}")]
    Missing {
        /// The ranks that have not come.
        ranks: Vec<usize>,
        /// To what.
        step: Step,
        /// The deadline that has passed: that of the rank whose deadline ended first.
        after: Duration,
    },
    /// The store was not to be found in time.
    #[error("the store that rank 0 serves was not to be found at {address} within {after:?}: {reason}")]
    Unreachable {
        /// Where it should be.
        address: String,
        /// The deadline that has passed.
        after: Duration,
        /// What the last attempt came to.
        reason: String,
    },
    /// The other end of a connection is not of this job.
    #[error("{by}: {why}")]
    Refused {
        /// Its address.
        by: String,
        /// Why.
        why: Refusal,
    },
    /// Two ranks do not fit together.
    #[error("rank {rank} has {what} {}, rank {peer} has {}", what.show(*.ours), what.show(*.theirs))]
    Mismatch {
        /// One of them.
        rank: usize,
        /// The other.
        peer: usize,
        /// What differs.
        what: Agreed,
        /// What `rank` has.
        ours: u64,
        /// What `peer` has.
        theirs: u64,
    },
    /// Another process has joined as this rank.
    #[error("rank {rank} has joined already: two processes claim to be it")]
    Duplicate {
        /// The rank.
        rank: usize,
    },
    /// A rank has left, or the connection to it has broken.
    #[error("rank {rank}{} has left or was lost", if *.rank == 0 { ", which serves the store," } else { "" })]
    Lost {
        /// The rank.
        rank: usize,
    },
    /// More bytes than a gather carries. Nothing was exchanged, and the next call works.
    #[error("an all_gather of {bytes} bytes exceeds the limit of {limit}")]
    TooLarge {
        /// Bytes of all ranks together.
        bytes: u64,
        /// What there may be.
        limit: u64,
    },
    /// The system has refused something.
    #[error("{what}: {reason}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system says.
        reason: String,
    },
    /// The caller's own exchange has failed, or gave what can't be.
    #[error("the exchange given by the caller: {reason}")]
    Callback {
        /// What it says, or what is wrong with what it gave.
        reason: String,
    },
}

impl BootstrapError {
    pub(super) fn io(what: impl Into<String>, error: &std::io::Error) -> Self {
        Self::Io { what: what.into(), reason: error.to_string() }
    }

    /// Whether no later step can succeed.
    pub(super) fn is_final(&self) -> bool {
        !matches!(self, Self::TooLarge { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_who_and_what() {
        let step = Step { operation: Operation::Barrier, number: 3 };
        let missing = BootstrapError::Missing { ranks: vec![2, 5], step, after: Duration::from_secs(9) };
        assert_eq!(missing.to_string(), "ranks [2, 5] have not come to barrier (step 3) within 9s");
        let mismatch =
            BootstrapError::Mismatch { rank: 3, peer: 0, what: Agreed::Layout, ours: 17, theirs: 1 << 63 };
        let text = "rank 3 has layout 0x0000000000000011, rank 0 has layout 0x8000000000000000";
        assert_eq!(mismatch.to_string(), text.replace("0 has layout", "0 has"));
        let variable = || "RANK".to_string();
        let unset = BootstrapError::Environment { variable: variable(), value: None, reason: "why".into() };
        assert_eq!(unset.to_string(), "RANK is not set: why");
        let value = Some("x".into());
        let wrong = BootstrapError::Environment { variable: variable(), value, reason: "why".into() };
        assert_eq!(wrong.to_string(), "RANK = \"x\": why");
    }
}
