//! Where the ranks of a command meet.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Barrier, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Where all ranks meet between phases. No clock starts before the others' last work is done,
/// and a failure of one stops all of them at the same place.
pub struct Meeting {
    barrier: Barrier,
    /// By rank, all of the same place.
    failures: Mutex<BTreeMap<usize, String>>,
}

impl Meeting {
    /// For `ranks` ranks.
    pub fn new(ranks: usize) -> Self {
        Self { barrier: Barrier::new(ranks), failures: Mutex::default() }
    }

    fn failures(&self) -> MutexGuard<'_, BTreeMap<usize, String>> {
        self.failures.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Comes with `result`, and leaves with its value if nobody came with an error.
    pub fn join<T>(&self, rank: usize, result: Result<T, String>) -> Option<T> {
        let value = result.map_err(|failure| self.failures().insert(rank, failure)).ok();
        self.barrier.wait();
        let well = self.failures().is_empty();
        // Nobody brings the next failure before all have looked.
        self.barrier.wait();
        value.filter(|_| well)
    }

    /// Does `work` when all ranks are there; its value and time, if all did it.
    pub fn timed<T, E: Display>(
        &self,
        rank: usize,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Option<(T, Duration)> {
        self.join(rank, Ok(()))?;
        let started = Instant::now();
        let result = work();
        let time = started.elapsed();
        let value = self.join(rank, result.map_err(|error| error.to_string()))?;
        Some((value, time))
    }

    /// The failure of the lowest rank that came with one.
    pub fn outcome(&self) -> Result<(), String> {
        self.failures().pop_first().map_or(Ok(()), |(_, failure)| Err(failure))
    }
}
