//! Who is to blame: a rank past its deadline follows the chain of waits to its end.

use std::sync::Arc;
use std::time::Instant;

use super::World;
use super::run::Run;
use crate::engine::completion::lock;
use crate::error::{Cause, Fault, Wait};

/// The fault of a wait of `run` that expired, at the end of the chains that begin there: at a rank that waits for
/// nobody, or has not entered the operation, so that a healthy but blocked rank is not blamed. Chains that all
/// end in a circle are cut at the wait for what comes first in an operation, and of those at the longest.
pub(super) fn blame(world: &World, runs: &[Arc<Run>], run: &Run, wait: Wait) -> Fault {
    let cause = Cause::Deadline(world.config.deadline);
    let mut reached = vec![(Instant::now(), wait)];
    let mut followed = Vec::new();
    let mut next = 0;
    while let Some(&(_, wait)) = reached.get(next) {
        next += 1;
        if followed.contains(&wait.peer) {
            continue;
        }
        followed.push(wait.peer);
        let of_peer = |other: &&Arc<Run>| other.rank == wait.peer && other.op.lane() == run.op.lane();
        let waits = runs.iter().find(of_peer).map_or(Vec::new(), |run| waits(run));
        if waits.is_empty() {
            return fault(run, wait, cause);
        }
        reached.extend(waits);
    }
    let first = reached.iter().min_by_key(|(since, wait)| (stage(wait), *since));
    fault(run, first.map_or(wait, |(_, wait)| *wait), cause)
}

/// How far an operation has come when it waits for this: what is missing earlier explains what is missing later.
fn stage(wait: &Wait) -> usize {
    const STAGES: [&str; 4] = ["rail record", "enter record", "gathered counts", "verdict"];
    let rows = STAGES.len() + usize::from(wait.what == "arrivals");
    STAGES.iter().position(|&what| what == wait.what).unwrap_or(rows)
}

/// The fault of `run` that ends in `wait`.
pub(super) fn fault(run: &Run, wait: Wait, cause: Cause) -> Fault {
    let started = run.op.started();
    let (kind, epoch) = (started.kind, started.epoch);
    Fault { rank: wait.peer, cause, reporter: run.rank, kind, epoch, wait: Some(wait) }
}

/// What a rank's operation waits for, and since when. Its channels have waits of their own: a receiver's for
/// them says nothing.
fn waits(run: &Run) -> Vec<(Instant, Wait)> {
    let blocked = run.tasks.iter().filter_map(|slot| lock(slot).blocked);
    blocked.filter(|(_, wait)| wait.peer != run.rank).collect()
}
