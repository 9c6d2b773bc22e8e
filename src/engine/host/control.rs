//! The control channel of an in-process world: the first fault, who has left, and the meeting of a reset.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::run::lock;
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
    /// Meetings that ended without everybody, and whom the last of them missed.
    given_up: (u64, Vec<usize>),
}

impl Control {
    pub(super) fn new(world_size: usize) -> Self {
        Self {
            faulted: AtomicBool::new(false),
            departed: (0..world_size).map(|_| AtomicBool::new(false)).collect(),
            // Zeroed words belong to generation 0.
            state: Mutex::new(State {
                fault: None,
                generation: 1,
                resetting: vec![false; world_size],
                given_up: (0, Vec::new()),
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
    pub(super) fn broadcast(&self, fault: Fault, generation: u16) {
        let mut state = lock(&self.state);
        if state.fault.is_none() && state.generation == generation {
            tracing::error!(%fault, "communicator poisoned");
            state.fault = Some(Arc::new(fault));
            self.faulted.store(true, Ordering::Release);
        }
    }

    pub(super) fn depart(&self, rank: usize) {
        self.departed[rank].store(true, Ordering::Release);
    }

    /// Whether `rank` has left. All it ever signalled is visible to who sees this.
    pub(super) fn has_departed(&self, rank: usize) -> bool {
        self.departed[rank].load(Ordering::Acquire)
    }

    /// Meets all ranks and raises the generation. The caller has no run left. When the first to have come has
    /// waited long enough, all who are there give up, so that they name the same ranks.
    pub(super) fn reset(&self, rank: usize, deadline: Duration) -> Result<(), Error> {
        let until = Instant::now() + deadline;
        let mut state = lock(&self.state);
        let (generation, meeting) = (state.generation, state.given_up.0);
        state.resetting[rank] = true;
        if state.resetting.iter().all(|&met| met) {
            // Generation 0 is that of zeroed memory.
            state.generation = generation.checked_add(1).unwrap_or(1);
            state.fault = None;
            state.resetting.fill(false);
            self.faulted.store(false, Ordering::Release);
            self.met.notify_all();
            return Ok(());
        }
        while state.generation == generation {
            let left = until.saturating_duration_since(Instant::now());
            if state.given_up.0 == meeting && left.is_zero() {
                let missing = (0..state.resetting.len()).filter(|&other| !state.resetting[other]).collect();
                state.given_up = (meeting + 1, missing);
                state.resetting.fill(false);
                self.met.notify_all();
            }
            if state.given_up.0 != meeting {
                let missing = state.given_up.1.clone();
                return Err(Error::ResetIncomplete { missing, after: deadline });
            }
            let (guard, _) =
                self.met.wait_timeout(state, left).unwrap_or_else(|poisoned| poisoned.into_inner());
            state = guard;
        }
        Ok(())
    }
}
