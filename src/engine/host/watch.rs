//! Who is to blame: a rank past its deadline follows the chain of waits to its end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::World;
use super::run::Run;
use crate::engine::completion::lock;
use crate::engine::mesh::LaneWaits;
use crate::error::{AWAITED, Cause, Fault, Wait};
use crate::wire::region::LANES;

/// How long ranks in other processes have to say what they wait for.
const QUESTIONING: Duration = Duration::from_millis(600);

/// A wait that expired, and whom one may ask.
pub(super) struct Inquiry<'a> {
    pub world: &'a World,
    /// Those of this process.
    pub runs: &'a [Arc<Run>],
    /// Whose wait it is.
    pub run: &'a Run,
    pub wait: Wait,
}

impl Inquiry<'_> {
    /// The fault at the end of the chains of waits that begin here: at a rank that waits for nobody, or has not entered
    /// the operation, so that a healthy but blocked rank is not blamed. Chains that all end in a circle are cut at the
    /// wait for what comes first in an operation, and of those at the longest.
    pub fn blame(&self) -> Fault {
        let cause = Cause::Deadline(self.world.config.deadline);
        let end = Instant::now() + QUESTIONING;
        let mut reached = vec![(Instant::now(), self.wait)];
        let mut followed: Vec<usize> = Vec::new();
        loop {
            let mut peers: Vec<usize> = reached.iter().map(|(_, wait)| wait.peer).collect();
            peers.retain(|peer| !followed.contains(peer));
            peers.sort_unstable();
            peers.dedup();
            if peers.is_empty() {
                break;
            }
            followed.extend(&peers);
            for (peer, waits) in peers.iter().zip(self.ask(&peers, end)) {
                let waits = waits.unwrap_or_default();
                if waits[self.lane()].is_empty() {
                    let last = reached
                        .iter()
                        .find(|(_, wait)| wait.peer == *peer)
                        .map_or(self.wait, |(_, wait)| *wait);
                    let crossed = (!waits[1 - self.lane()].is_empty()).then(|| self.crossed(end)).flatten();
                    let wait = crossed.map_or(last, |peer| Wait { peer, ..last });
                    return fault(self.run, wait, cause);
                }
                let [dispatch, combine] = waits;
                reached.extend([dispatch, combine].into_iter().nth(self.lane()).unwrap_or_default());
            }
        }
        let first = reached.iter().min_by_key(|(since, wait)| (stage(wait), *since));
        fault(self.run, first.map_or(self.wait, |(_, wait)| *wait), cause)
    }

    fn lane(&self) -> usize {
        self.run.op.lane() as usize
    }

    /// What the operations of `peers` wait for; none of one that does not answer by `end`.
    fn ask(&self, peers: &[usize], end: Instant) -> Vec<Option<LaneWaits>> {
        let of_peer = |&peer: &usize| waits(self.runs.iter().filter(move |other| other.rank == peer));
        let Some(mesh) = self.world.control.mesh() else {
            return peers.iter().map(|peer| Some(of_peer(peer))).collect();
        };
        let own = self.run.rank;
        let others: Vec<usize> = peers.iter().copied().filter(|&peer| peer != own).collect();
        let mut answers = mesh.ask(&others, end);
        if let Some(place) = peers.iter().position(|&peer| peer == own) {
            answers.insert(place, Some(of_peer(&own)));
        }
        answers
    }

    /// Where some ranks wait on one lane alone, and others on the other: the first rank of the fewer, for it has started
    /// something else than the rest. Lanes share no records, so nobody else can tell.
    fn crossed(&self, end: Instant) -> Option<usize> {
        let ranks: Vec<usize> = (0..self.world.config.topology().world_size()).collect();
        let answers = self.ask(&ranks, end);
        let alone = |lane: usize| {
            let only = |waits: &LaneWaits| !waits[lane].is_empty() && waits[1 - lane].is_empty();
            let of = |(&rank, waits): (&usize, &Option<LaneWaits>)| {
                waits.as_ref().is_some_and(only).then_some(rank)
            };
            ranks.iter().zip(&answers).filter_map(of).collect::<Vec<_>>()
        };
        let lanes = [alone(0), alone(1)];
        if lanes.iter().any(Vec::is_empty) {
            return None;
        }
        // As many on both: those without rank 0.
        let fewer = lanes.iter().min_by_key(|ranks| (ranks.len(), ranks.first() == Some(&0)))?;
        fewer.first().copied()
    }
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
