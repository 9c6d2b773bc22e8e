//! Where the ranks of a command meet.

use std::fmt::Display;
use std::thread;
use std::time::{Duration, Instant};

use railhop::Topology;
use railhop::bootstrap::{Bootstrap, BootstrapError, LocalBootstrap, Member};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Where a rank meets all others between phases, be they threads or processes. No clock starts before the others' last
/// work is done, and a failure of one stops all of them at the same place, with one sentence.
pub struct Meeting {
    ranks: Box<dyn Bootstrap>,
    /// How long any rank may keep the others waiting.
    deadline: Duration,
}

impl Meeting {
    /// Where the rank that `ranks` says meets them.
    pub fn new<B: Bootstrap + 'static>(ranks: B, deadline: Duration) -> Self {
        Self { ranks: Box::new(ranks), deadline }
    }

    /// What a world is joined by.
    pub fn ranks(&mut self) -> &mut dyn Bootstrap {
        &mut *self.ranks
    }

    /// The world's shape, as the launcher says it or else as the ranks find it together.
    pub fn topology(&mut self, member: &Member) -> Result<Topology, BootstrapError> {
        member.find_topology(&mut *self.ranks, self.deadline)
    }

    /// Brings `mine`; what all have brought, by rank.
    pub fn gather<T: Serialize + DeserializeOwned>(&mut self, mine: &T) -> Result<Vec<T>, String> {
        let bytes = postcard::to_stdvec(mine).map_err(|error| error.to_string())?;
        let all = self.ranks.all_gather(&bytes, self.deadline).map_err(|error| error.to_string())?;
        let read = |(rank, bytes): (usize, Vec<u8>)| {
            postcard::from_bytes(&bytes)
                .map_err(|error| format!("what rank {rank} says makes no sense: {error}"))
        };
        all.into_iter().enumerate().map(read).collect()
    }

    /// Comes with `result`, and leaves with its value if nobody came with an error, else with that of the lowest rank
    /// that did.
    pub fn join<T>(&mut self, result: Result<T, String>) -> Result<T, String> {
        let (value, said) = match result {
            Ok(value) => (Some(value), None),
            Err(failure) => (None, Some(failure)),
        };
        // Who can't tell its failure any more has seen what came before the loss of the others.
        let all = self.gather(&said).map_err(|lost| said.unwrap_or(lost))?;
        let unanimous = all.iter().all(|said| said == &all[0]);
        match (value, all.into_iter().enumerate().find_map(|(rank, said)| Some((rank, said?)))) {
            (Some(value), None) => Ok(value),
            (_, Some((rank, failure))) if !unanimous => Err(format!("rank {rank}: {failure}")),
            (_, failure) => Err(failure.map(|(_, failure)| failure).unwrap_or_default()),
        }
    }

    /// Makes sure that all ranks have come for the same.
    pub fn agree(&mut self, what: &str) -> Result<(), String> {
        let all = self.gather(&what.to_string())?;
        match all.iter().position(|other| *other != all[0]) {
            None => Ok(()),
            Some(rank) => Err(format!("rank {rank} has come for {}; rank 0 for {}", all[rank], all[0])),
        }
    }

    /// Does `work` when all ranks are there; its value and time, if all did it.
    pub fn timed<T, E: Display>(
        &mut self,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<(T, Duration), String> {
        self.join(Ok(()))?;
        let started = Instant::now();
        let result = work();
        let time = started.elapsed();
        Ok((self.join(result.map_err(|error| error.to_string()))?, time))
    }
}

/// Runs `rank` on a thread for each of `parts`, by rank; what each came to, or the failure that ended them.
pub fn on_threads<P: Send, T: Send, E: Send>(
    parts: Vec<P>,
    deadline: Duration,
    rank: impl Fn(P, &mut Meeting) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let (rank, ranks) = (&rank, LocalBootstrap::world(parts.len()));
    thread::scope(|scope| {
        let start = |(part, ranks)| {
            scope.spawn(move || rank(part, &mut Meeting::new::<LocalBootstrap>(ranks, deadline)))
        };
        let threads: Vec<_> = parts.into_iter().zip(ranks).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank panicked")).collect()
    })
}
