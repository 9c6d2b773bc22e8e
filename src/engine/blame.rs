//! Who is to blame: a rank past its deadline follows the chain of waits to its end.

use std::time::{Duration, Instant};

use super::control::Control;
use super::mesh::Answer;
use crate::error::{AWAITED, Wait};
use crate::wire::region::Lane;

/// How long ranks in other processes have to say what they wait for.
const QUESTIONING: Duration = Duration::from_millis(700);

/// A wait that expired, and whom one may ask.
pub struct Inquiry<'a> {
    /// The way to the other ranks.
    pub control: &'a Control,
    /// Whose wait it is.
    pub rank: usize,
    /// Of which operation.
    pub lane: Lane,
    /// The wait.
    pub wait: Wait,
    /// What the operations of a rank of this process wait for.
    pub waits: &'a dyn Fn(usize) -> Answer,
}

/// Where the chains of waits end.
#[derive(Debug, Clone, Copy)]
pub struct Last {
    /// The wait for the rank that is to blame.
    pub wait: Wait,
    /// Whether it is known what that rank waits for; otherwise the chain may go on there.
    pub known: bool,
}

impl Inquiry<'_> {
    /// The wait at the end of the chains that begin here: for a rank that waits for nobody, or has not entered the
    /// operation, so that a healthy but blocked rank is not blamed. Chains that all end in a circle are cut at the wait
    /// for what comes first in an operation, and of those at the longest.
    pub fn last(&self) -> Last {
        let lane = self.lane as usize;
        let end = Instant::now() + QUESTIONING;
        let mut reached = vec![(Instant::now(), self.wait)];
        let mut followed: Vec<usize> = Vec::new();
        let mut unknown = None;
        loop {
            let mut peers: Vec<usize> = reached.iter().map(|(_, wait)| wait.peer).collect();
            peers.retain(|peer| !followed.contains(peer));
            peers.sort_unstable();
            peers.dedup();
            if peers.is_empty() {
                break;
            }
            followed.extend(&peers);
            for (&peer, answer) in peers.iter().zip(self.ask(&peers, end)) {
                let last = reached.iter().find(|(_, wait)| wait.peer == peer);
                let last = last.map_or(self.wait, |(_, wait)| *wait);
                let mut waits = match answer {
                    Answer::Waits(waits) => waits,
                    Answer::None => Default::default(),
                    Answer::Later => {
                        unknown.get_or_insert(last);
                        continue;
                    }
                };
                if waits[lane].is_empty() {
                    let crossed = (!waits[1 - lane].is_empty()).then(|| self.crossed(end)).flatten();
                    return Last { wait: crossed.map_or(last, |peer| Wait { peer, ..last }), known: true };
                }
                reached.append(&mut waits[lane]);
            }
        }
        let first = reached.iter().min_by_key(|(since, wait)| (stage(wait), *since));
        let circle = first.map_or(self.wait, |(_, wait)| *wait);
        Last { wait: unknown.unwrap_or(circle), known: unknown.is_none() }
    }

    /// What the operations of `peers` wait for, as far as they say so by `end`.
    fn ask(&self, peers: &[usize], end: Instant) -> Vec<Answer> {
        let Some(mesh) = self.control.mesh() else {
            return peers.iter().map(|&peer| (self.waits)(peer)).collect();
        };
        let others: Vec<usize> = peers.iter().copied().filter(|&peer| peer != self.rank).collect();
        let mut answers = mesh.ask(&others, end);
        if let Some(place) = peers.iter().position(|&peer| peer == self.rank) {
            answers.insert(place, (self.waits)(self.rank));
        }
        answers
    }

    /// Where some ranks wait on one lane alone, and others on the other: the first rank of the fewer, for it has started
    /// something else than the rest. Lanes share no records, so nobody else can tell.
    fn crossed(&self, end: Instant) -> Option<usize> {
        let ranks: Vec<usize> = (0..self.control.world_size()).collect();
        let answers = self.ask(&ranks, end);
        let alone = |lane: usize| {
            let only = |answer: &Answer| match answer {
                Answer::Waits(waits) => !waits[lane].is_empty() && waits[1 - lane].is_empty(),
                Answer::None | Answer::Later => false,
            };
            ranks.iter().copied().filter(|&rank| only(&answers[rank])).collect::<Vec<_>>()
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
