//! The records that open an operation, as they lie in memory, and the block of counts.

use bytemuck::Zeroable;

use super::render::{device_codes, device_struct};
use super::shape::RecvParts;
use crate::config::Config;
use crate::error::{Error, Kind, Reason, Started, Tensor};

device_struct! {
    /// What was started, on the wire.
    StartedRecord {
        /// Number of the operation on its communicator.
        pub(super) epoch: u64,
        /// Epoch of the plan.
        pub(super) plan: u64,
        /// Hash of the configuration.
        pub(super) config: u64,
        /// Kind of operation.
        pub(super) kind: u32,
        /// Elements per row.
        pub(super) hidden: u32,
        /// Entries per token.
        pub(super) topk: u32,
        /// Code of the row format.
        pub(super) format: u32,
    }
}

impl From<&Started> for StartedRecord {
    fn from(s: &Started) -> Self {
        let (epoch, plan, config) = (s.epoch, s.plan, s.config);
        Self { epoch, plan, config, kind: s.kind as u32, hidden: s.hidden, topk: s.topk, format: s.format }
    }
}

impl StartedRecord {
    /// What was started. A code no version knows reads as a plan, which then differs in its other fields.
    pub fn read(&self) -> Started {
        let Self { epoch, plan, config, hidden, topk, format, kind } = *self;
        Started {
            kind: Kind::from_code(kind).unwrap_or(Kind::Plan),
            epoch,
            plan,
            config,
            hidden,
            topk,
            format,
        }
    }
}

device_struct! {
    /// Why an input was refused, on the wire; all zero for no reason.
    ReasonRecord {
        /// See `reason`.
        pub(super) code: u64,
        /// What the reason names.
        pub(super) args: [u64; 4],
    }
}

device_codes! {
    /// Reasons that kernels find by themselves.
    reason {
        /// An entry of `topk_idx` is no expert: token, position, entry, number of experts.
        EXPERT_OUT_OF_RANGE = 1,
        /// The receive buffer is too small: rows needed, rows there.
        BUFFER_TOO_SMALL = 3,
        /// The plan has not been dispatched.
        NOT_DISPATCHED = 10,
    }
}

impl From<Option<Reason>> for ReasonRecord {
    fn from(reason: Option<Reason>) -> Self {
        let Some(reason) = reason else { return Self::zeroed() };
        let (code, args) = match reason {
            Reason::ExpertOutOfRange { token, k, expert, num_experts } => {
                (1, [token, k, expert as u64, num_experts])
            }
            Reason::WrongSize { tensor, expected, got } => (2, [tensor as u64, expected, got, 0]),
            Reason::BufferTooSmall { needed, capacity } => (3, [needed, capacity, 0, 0]),
            Reason::HiddenNotAligned { hidden, multiple } => (4, [hidden, multiple, 0, 0]),
            Reason::HiddenTooLarge { hidden, max } => (5, [hidden, max, 0, 0]),
            Reason::TopkOutOfRange { topk, max } => (6, [topk, max, 0, 0]),
            Reason::FormatMismatch => (7, [0; 4]),
            Reason::Foreign => (8, [0; 4]),
            Reason::StaleHandle => (9, [0; 4]),
            Reason::NotDispatched => (10, [0; 4]),
            Reason::PoolExhausted { needed, largest } => (11, [needed, largest, 0, 0]),
            Reason::TooManyTokens { tokens, max } => (12, [tokens, max, 0, 0]),
            Reason::WrongMemory => (13, [0; 4]),
        };
        Self { code, args }
    }
}

impl ReasonRecord {
    /// The reason, if there is one.
    pub fn read(&self) -> Option<Reason> {
        let [a, b, c, d] = self.args;
        Some(match self.code {
            1 => Reason::ExpertOutOfRange { token: a, k: b, expert: c as i64, num_experts: d },
            2 => Reason::WrongSize { tensor: tensor(a), expected: b, got: c },
            3 => Reason::BufferTooSmall { needed: a, capacity: b },
            4 => Reason::HiddenNotAligned { hidden: a, multiple: b },
            5 => Reason::HiddenTooLarge { hidden: a, max: b },
            6 => Reason::TopkOutOfRange { topk: a, max: b },
            7 => Reason::FormatMismatch,
            8 => Reason::Foreign,
            9 => Reason::StaleHandle,
            10 => Reason::NotDispatched,
            11 => Reason::PoolExhausted { needed: a, largest: b },
            12 => Reason::TooManyTokens { tokens: a, max: b },
            13 => Reason::WrongMemory,
            _ => return None,
        })
    }
}

fn tensor(code: u64) -> Tensor {
    let all = [
        Tensor::TopkIdx,
        Tensor::TopkWeights,
        Tensor::X,
        Tensor::Scales,
        Tensor::ExpertOutputs,
        Tensor::Bias,
        Tensor::Out,
    ];
    all.into_iter().find(|&tensor| tensor as u64 == code).unwrap_or(Tensor::X)
}

device_struct! {
    /// Opens an operation towards the peers of the node: what was started, why it is poisoned (if it is), and
    /// the buffer that peers will touch.
    EnterRecord {
        /// What was started.
        pub started: StartedRecord,
        /// Why the rank's input is invalid.
        pub poison: ReasonRecord,
        /// Rows the buffer holds.
        pub capacity: u64,
        /// Where its parts lie.
        pub parts: RecvParts,
    }
}

device_struct! {
    /// Opens an operation towards a peer of the rail; the count block follows where the operation plans.
    RailRecord {
        /// What was started.
        pub started: StartedRecord,
        /// Why the rank's input is invalid.
        pub poison: ReasonRecord,
    }
}

device_struct! {
    /// A node's verdict on an operation: good, refused for one rank's reason, or out of step.
    VerdictRecord {
        /// The rank that speaks for the node, is refused, or is out of step.
        pub(super) rank: u32,
        /// The rank that the one out of step differs from.
        pub(super) reference: u32,
        /// See `verdict`.
        pub(super) state: u64,
        /// Why it was refused.
        pub(super) reason: ReasonRecord,
        /// What `rank` started.
        pub(super) started: StartedRecord,
        /// What `reference` started.
        pub(super) expected: StartedRecord,
    }
}

device_codes! {
    /// States of a verdict.
    verdict {
        /// Every rank of the node started the same, and everything fits.
        GOOD = 0,
        /// A rank's input was refused.
        REFUSED = 1,
        /// A rank started something else.
        OUT_OF_STEP = 2,
    }
}

const GOOD: u64 = verdict::GOOD as u64;
const REFUSED: u64 = verdict::REFUSED as u64;
const OUT_OF_STEP: u64 = verdict::OUT_OF_STEP as u64;

impl VerdictRecord {
    /// Every rank of the node, the first of which is `rank`, started `started`, and everything fits.
    pub fn good(rank: usize, started: StartedRecord) -> Self {
        Self { rank: rank as u32, started, ..Zeroable::zeroed() }
    }

    /// `rank`'s input was refused.
    pub fn refused(rank: usize, reason: Reason, started: StartedRecord) -> Self {
        Self { rank: rank as u32, state: REFUSED, reason: Some(reason).into(), started, ..Zeroable::zeroed() }
    }

    /// `rank` did not start what `reference` started.
    pub fn out_of_step(
        rank: usize,
        started: StartedRecord,
        reference: usize,
        expected: StartedRecord,
    ) -> Self {
        let (rank, reference) = (rank as u32, reference as u32);
        Self { rank, reference, state: OUT_OF_STEP, reason: Zeroable::zeroed(), started, expected }
    }

    /// Whether the node may go on.
    pub fn is_good(&self) -> bool {
        self.state == GOOD
    }

    /// The verdict of the world from those of its nodes in ascending order; every rank comes to the same one.
    pub fn of_world(nodes: &[Self]) -> Result<(), Error> {
        for node in nodes {
            node.error()?;
            let first = &nodes[0];
            if node.started != first.started {
                let (rank, reference) = (node.rank as usize, first.rank as usize);
                Self::out_of_step(rank, node.started, reference, first.started).error()?;
            }
        }
        Ok(())
    }

    fn error(&self) -> Result<(), Error> {
        let rank = self.rank as usize;
        match self.state {
            GOOD => Ok(()),
            OUT_OF_STEP => Err(Error::OutOfStep {
                rank,
                started: Box::new(self.started.read()),
                reference: self.reference as usize,
                expected: Box::new(self.expected.read()),
            }),
            _ => Err(Error::Refused { rank, reason: self.reason.read().unwrap_or(Reason::Foreign) }),
        }
    }
}

/// The count block one source rank sends to the rank of its rail on one node, as 32-bit words: per channel
/// its distinct tokens for that node and its rows for each local rank, then entries per expert of the node
/// (experts in the order of their ranks, ascending ids within a rank).
#[derive(Debug, Clone)]
pub struct CountBlock {
    ranks_per_node: usize,
    experts: usize,
    /// 32-bit words of the block, for any node.
    pub words: usize,
}

impl CountBlock {
    /// The block for worlds of `config`.
    pub fn new(config: &Config) -> Self {
        let topology = config.topology();
        let on_node = |node| {
            let ranks = (0..topology.ranks_per_node()).map(|local| topology.rank(node, local));
            ranks.map(|rank| config.placement().experts_of(rank).len()).sum::<usize>()
        };
        let most = (0..topology.nodes()).map(on_node).max().unwrap_or(0);
        let experts = config.channels() * (1 + topology.ranks_per_node());
        Self { ranks_per_node: topology.ranks_per_node(), experts, words: experts + most }
    }

    /// Index of the number of tokens of `channel`.
    pub fn tokens(&self, channel: usize) -> usize {
        channel * (1 + self.ranks_per_node)
    }

    /// Index of the number of rows of `channel` for `local`.
    pub fn rows(&self, channel: usize, local: usize) -> usize {
        self.tokens(channel) + 1 + local
    }

    /// Index of the number of entries of the first expert of the node; those of the others follow.
    pub fn experts(&self) -> usize {
        self.experts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_survive_the_wire() {
        let reasons = [
            Reason::ExpertOutOfRange { token: 1, k: 2, expert: -7, num_experts: 4 },
            Reason::WrongSize { tensor: Tensor::Bias, expected: 5, got: 6 },
            Reason::BufferTooSmall { needed: 7, capacity: 8 },
            Reason::HiddenNotAligned { hidden: 9, multiple: 16 },
            Reason::HiddenTooLarge { hidden: 10, max: 9 },
            Reason::TopkOutOfRange { topk: 33, max: 32 },
            Reason::FormatMismatch,
            Reason::Foreign,
            Reason::StaleHandle,
            Reason::NotDispatched,
            Reason::PoolExhausted { needed: 11, largest: 3 },
            Reason::TooManyTokens { tokens: 9, max: 8 },
            Reason::WrongMemory,
        ];
        for reason in reasons {
            assert_eq!(ReasonRecord::from(Some(reason)).read(), Some(reason));
        }
        assert_eq!(ReasonRecord::from(None).read(), None);
    }
}
