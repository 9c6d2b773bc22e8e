//! Who is to blame: a rank past its deadline follows the chain of waits to its end.

use super::World;
use super::run::{Run, lock};
use crate::error::{Cause, Fault, Wait};

/// The fault of a wait of `run` that expired, at the end of the chain: the rank there waits for nobody, or has
/// not entered the operation, so that a healthy but blocked rank is not blamed.
pub(super) fn blame(world: &World, runs: &[std::sync::Arc<Run>], run: &Run, wait: Wait) -> Fault {
    let mut end = wait;
    let mut visited = vec![run.rank];
    while !visited.contains(&end.peer) {
        visited.push(end.peer);
        let same_lane =
            |other: &&std::sync::Arc<Run>| other.rank == end.peer && other.op.lane() == run.op.lane();
        match runs.iter().find(same_lane).and_then(|run| blocked(run)) {
            Some(next) => end = next,
            None => break,
        }
    }
    fault(run, end, Cause::Deadline(world.config.deadline))
}

/// The fault of `run` that ends in `wait`.
pub(super) fn fault(run: &Run, wait: Wait, cause: Cause) -> Fault {
    let started = run.op.started();
    let (kind, epoch) = (started.kind, started.epoch);
    Fault { rank: wait.peer, cause, reporter: run.rank, kind, epoch, wait: Some(wait) }
}

/// What a rank's operation waits for: its first blocked task's wait. None if one of them can move.
fn blocked(run: &Run) -> Option<Wait> {
    run.tasks.iter().find_map(|slot| lock(slot).blocked.map(|(_, wait)| wait))
}
