//! Who is to blame: a rank past its deadline follows the chain of waits to its end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::World;
use super::run::Run;
use crate::engine::completion::lock;
use crate::engine::mesh::Waits;
use crate::error::{AWAITED, Cause, Fault, Wait};

/// How long ranks in other processes have to say what they wait for.
const QUESTIONING: Duration = Duration::from_millis(500);

/// The fault of a wait of `run` that expired, at the end of the chains that begin there: at a rank that waits for
/// nobody, or has not entered the operation, so that a healthy but blocked rank is not blamed. Chains that all
/// end in a circle are cut at the wait for what comes first in an operation, and of those at the longest.
pub(super) fn blame(world: &World, runs: &[Arc<Run>], run: &Run, wait: Wait) -> Fault {
    let cause = Cause::Deadline(world.config.deadline);
    let end = Instant::now() + QUESTIONING.min(world.config.deadline);
    let mut reached = vec![(Instant::now(), wait)];
    let mut followed: Vec<usize> = Vec::new();
    loop {
        let new = |(_, wait): &(Instant, Wait)| (!followed.contains(&wait.peer)).then_some(wait.peer);
        let mut peers: Vec<usize> = reached.iter().filter_map(new).collect();
        peers.sort_unstable();
        peers.dedup();
        if peers.is_empty() {
            break;
        }
        followed.extend(&peers);
        let waits = waits_of(world, runs, run, &peers, end);
        for (peer, waits) in peers.into_iter().zip(waits) {
            let Some(waits) = waits.filter(|waits| !waits.is_empty()) else {
                let last = reached.iter().find(|(_, wait)| wait.peer == peer);
                return fault(run, last.map_or(wait, |(_, wait)| *wait), cause);
            };
            reached.extend(waits);
        }
    }
    let first = reached.iter().min_by_key(|(since, wait)| (stage(wait), *since));
    fault(run, first.map_or(wait, |(_, wait)| *wait), cause)
}

/// What the operations of `peers` on the lane of `run` wait for; none of one that does not answer by `end`.
fn waits_of(
    world: &World,
    runs: &[Arc<Run>],
    run: &Run,
    peers: &[usize],
    end: Instant,
) -> Vec<Option<Waits>> {
    if let Some(mesh) = world.control.mesh() {
        return mesh.ask(peers, run.op.lane(), end);
    }
    let of_peer = |peer| runs.iter().find(|other| other.rank == peer && other.op.lane() == run.op.lane());
    peers.iter().map(|&peer| of_peer(peer).map(|run| waits(run))).collect()
}

/// How far an operation has come when it waits for this.
fn stage(wait: &Wait) -> usize {
    match AWAITED.iter().position(|&what| what == wait.what) {
        // Rings move together: who waits for credit is no further than who waits for a tail.
        Some(stage) if AWAITED[stage] == "credit" => stage + 1,
        stage => stage.unwrap_or(AWAITED.len()),
    }
}

/// The fault of `run` that ends in `wait`.
pub(super) fn fault(run: &Run, wait: Wait, cause: Cause) -> Fault {
    let started = run.op.started();
    let (kind, epoch) = (started.kind, started.epoch);
    Fault { rank: wait.peer, cause, reporter: run.rank, kind, epoch, wait: Some(wait) }
}

/// What a rank's operation waits for, and since when. Its channels have waits of their own: a receiver's for
/// them says nothing.
pub(super) fn waits(run: &Run) -> Waits {
    let blocked = run.tasks.iter().filter_map(|slot| lock(slot).blocked);
    blocked.filter(|(_, wait)| wait.peer != run.rank).collect()
}
