//! The control channel of an in-process world: the first fault, who has left, and the meeting of a reset.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::completion::lock;
use crate::error::{Error, Fault};

/// Shared by all ranks of a world.
pub struct Control {
    /// Cheap to poll; `state.fault` is the truth.
    faulted: AtomicBool,
    departed: Vec<AtomicBool>,
    state: Mutex<State>,
    met: Condvar,
}

struct State {
    fault: Option<Arc<Fault>>,
    generation: u16,
    resetting: Vec<bool>,
    /// Meetings that ended without everybody, and what the last of them came to.
    given_up: (u64, Option<Error>),
}

impl Control {
    /// The control channel of a world.
    pub fn new(world_size: usize) -> Self {
        Self {
            faulted: AtomicBool::new(false),
            departed: (0..world_size).map(|_| AtomicBool::new(false)).collect(),
            // Zeroed words belong to generation 0.
            state: Mutex::new(State {
                fault: None,
                generation: 1,
                resetting: vec![false; world_size],
                given_up: (0, None),
            }),
            met: Condvar::new(),
        }
    }

    /// The generation of new operations.
    pub fn generation(&self) -> u16 {
        lock(&self.state).generation
    }

    /// The fault that poisons the world, if there is one.
    pub fn fault(&self) -> Option<Arc<Fault>> {
        match self.faulted.load(Ordering::Acquire) {
            true => lock(&self.state).fault.clone(),
            false => None,
        }
    }

    /// Poisons the world; the first fault stays. One of an earlier generation is over: a worker may come with
    /// it when all others have gone through the reset.
    pub fn broadcast(&self, fault: Fault, generation: u16) {
        let mut state = lock(&self.state);
        if state.fault.is_none() && state.generation == generation {
            tracing::error!(%fault, "communicator poisoned");
            state.fault = Some(Arc::new(fault));
            self.faulted.store(true, Ordering::Release);
        }
    }

    /// `rank` is gone.
    pub fn depart(&self, rank: usize) {
        self.departed[rank].store(true, Ordering::Release);
        // Under the lock, so that nobody who is about to wait for this rank misses it.
        drop(lock(&self.state));
        self.met.notify_all();
    }

    /// Whether `rank` has left. All it ever signalled is visible to who sees this.
    pub fn has_departed(&self, rank: usize) -> bool {
        self.departed[rank].load(Ordering::Acquire)
    }

    /// Meets all ranks and raises the generation. The caller has no run left. When a rank has left, or the first
    /// to have come has waited long enough, all who are there give up, so that they name the same ranks.
    pub fn reset(&self, rank: usize, deadline: Duration) -> Result<(), Error> {
        let started = Instant::now();
        let mut state = lock(&self.state);
        let (generation, meeting) = (state.generation, state.given_up.0);
        state.resetting[rank] = true;
        if state.resetting.iter().all(|&met| met) {
            state.raise_generation();
            self.faulted.store(false, Ordering::Release);
            self.met.notify_all();
        }
        while state.generation == generation {
            let waited = started.elapsed().min(deadline);
            if state.given_up.0 == meeting && (waited == deadline || self.departed().next().is_some()) {
                state.give_up(self.departed().collect(), waited);
                self.met.notify_all();
            }
            if let (true, Some(error)) = (state.given_up.0 != meeting, &state.given_up.1) {
                return Err(error.clone());
            }
            let left = self.met.wait_timeout(state, deadline - waited);
            (state, _) = left.unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        Ok(())
    }

    /// The ranks that have left.
    fn departed(&self) -> impl Iterator<Item = usize> {
        (0..self.departed.len()).filter(|&rank| self.has_departed(rank))
    }
}

impl State {
    fn raise_generation(&mut self) {
        // Generation 0 is that of zeroed memory.
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        self.fault = None;
        self.resetting.fill(false);
    }

    /// Ends the meeting for the sake of `departed` ranks, or else of those that have not come.
    fn give_up(&mut self, departed: Vec<usize>, after: Duration) {
        let absent = || (0..self.resetting.len()).filter(|&rank| !self.resetting[rank]).collect();
        let missing = if departed.is_empty() { absent() } else { departed };
        self.given_up = (self.given_up.0 + 1, Some(Error::ResetIncomplete { missing, after }));
        self.resetting.fill(false);
    }
}
