//! What operations wait for.

use std::sync::Arc;

use super::run::Run;
use crate::engine::completion::lock;
use crate::engine::mesh::LaneWaits;
use crate::error::{Cause, Fault, Wait};
use crate::wire::region::LANES;

/// The fault of `run` that ends in `wait`.
pub(super) fn fault(run: &Run, wait: Wait, cause: Cause) -> Fault {
    let started = run.op.started();
    let (kind, epoch) = (started.kind, started.epoch);
    Fault {
        rank: cause.culprit(run.rank, wait.peer),
        cause,
        reporter: run.rank,
        kind,
        epoch,
        wait: Some(wait),
    }
}

/// What operations wait for, and since when, by lane. Their channels have waits of their own: a receiver's for them says
/// nothing.
pub(super) fn waits<'a>(runs: impl Iterator<Item = &'a Arc<Run>> + Clone) -> LaneWaits {
    LANES.map(|lane| {
        let runs = runs.clone().filter(|run| run.op.lane() == lane);
        let blocked =
            runs.flat_map(|run| run.tasks.iter().filter_map(|slot| Some((run.rank, lock(slot).blocked?))));
        blocked.filter(|(rank, (_, wait))| wait.peer != *rank).map(|(_, blocked)| blocked).collect()
    })
}
