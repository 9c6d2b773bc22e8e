//! What kernels tell the host of an operation, in pinned memory.

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::plan::Counts;
use super::rank::Rank;
use super::start::Run;
use crate::engine::completion::lock;
use crate::engine::mesh::LaneWaits;
use crate::error::{DeviceError, Error};
use crate::wire::device::{FaultRecord, Report, status};
use crate::wire::record::VerdictRecord;
use crate::wire::region::LANES;

/// An operation's end as the kernels report it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Ok,
    /// The verdicts say why.
    Refused,
    /// By a fault.
    Stopped,
}

impl Rank {
    /// Makes a report say that its operation is under way.
    pub(super) fn expect_report(&self, report: usize) {
        let at = self.mailbox_map.reports[report].report;
        self.mailbox.clear(at, size_of::<Report>());
        let ended = self.mailbox.word(at + offset_of!(Report, ended)).expect("in the map");
        ended.store(Report::UNDER_WAY, Ordering::Release);
    }

    /// How the operation has ended that writes this report; none while it has not.
    pub fn ended(&self, report: usize) -> Option<Ended> {
        let at = self.mailbox_map.reports[report].report;
        let ended = self.mailbox.word(at + offset_of!(Report, ended)).expect("in the map");
        if ended.load(Ordering::Acquire) == Report::UNDER_WAY {
            return None;
        }
        let status = self.mailbox.flag(at + offset_of!(Report, status)).expect("in the map");
        Some(match status.load(Ordering::Relaxed) {
            status::OK => Ended::Ok,
            status::REFUSED => Ended::Refused,
            _ => Ended::Stopped,
        })
    }

    /// Why it was refused.
    pub fn refusal(&self, report: usize) -> Error {
        let at = self.mailbox_map.reports[report].verdicts;
        let verdict = |node| self.mailbox.read(at + node * size_of::<VerdictRecord>());
        let nodes = self.maps().config.topology().nodes();
        let world = VerdictRecord::of_world(&(0..nodes).map(verdict).collect::<Vec<_>>());
        let reason = "an operation was refused, and no node says why";
        world.err().unwrap_or_else(|| DeviceError::Call { call: "plan", reason: reason.into() }.into())
    }

    /// What it has counted.
    pub fn counts(&self, report: usize) -> Counts {
        let map = self.mailbox_map.reports[report];
        let rows: u64 = self.mailbox.read(map.report + offset_of!(Report, rows));
        let sent: u32 = self.mailbox.read(map.report + offset_of!(Report, sent));
        let experts = self.maps().config.placement().experts_of(self.rank).len();
        let experts = (0..experts).map(|expert| self.mailbox.read(map.experts + 4 * expert)).collect();
        Counts { rows: rows as usize, experts, sent: sent as usize }
    }

    /// What the rank's kernels have waited for in vain: once one has, all of both lanes return. None while some work on an
    /// operation that the host knows of and have left no record.
    pub fn waits(&self) -> Option<LaneWaits> {
        let waits = self.fault_record().map(|record| (Instant::now(), record.read().1));
        (waits.is_some() || !self.is_working()).then(|| LANES.map(|_| waits.into_iter().collect()))
    }

    fn is_working(&self) -> bool {
        let works = |run: &Arc<Run>| run.report().is_some_and(|report| self.ended(report).is_none());
        LANES.iter().any(|&lane| lock(self.lane(lane)).runs.iter().any(works))
    }

    /// What a warp of the rank waited for in vain.
    pub fn fault_record(&self) -> Option<FaultRecord> {
        let at = self.mailbox_map.fault;
        let written = self.mailbox.flag(at + offset_of!(FaultRecord, written)).expect("in the map");
        (written.load(Ordering::Acquire) != 0).then(|| self.mailbox.read(at))
    }
}
