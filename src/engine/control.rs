//! The control channel of a world, as one process has it: the first fault, who has left, and the meeting of a reset.
//! Where ranks are in other processes, the mesh carries it to them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::completion::lock;
use super::mesh::Mesh;
use crate::error::{Cause, Error, Fault};
use crate::wire::region::LANES;

/// Operations that a rank has started in its generation, by lane.
pub type Counted = [u64; LANES.len()];

/// Shared by all ranks of a process.
pub struct Control {
    /// Cheap to poll; `state.fault` is the truth.
    faulted: AtomicBool,
    departed: Vec<AtomicBool>,
    state: Mutex<State>,
    met: Condvar,
    /// To the ranks in other processes; none where there are none.
    mesh: Option<Arc<Mesh>>,
}

struct State {
    fault: Option<Arc<Fault>>,
    /// A fault of the next generation, from a rank that is through a reset already.
    early: Option<Fault>,
    generation: u16,
    resetting: Vec<bool>,
    /// Meetings that ended without everybody, and what the last of them came to.
    given_up: (u64, Option<Error>),
    /// By rank, the ways by which something may still come from it.
    ways: Vec<usize>,
    /// By rank, why it can't be reached, where it has not just left.
    failures: Vec<Option<Cause>>,
    /// By rank, what it had started when it left, if it has said so.
    farewells: Vec<Option<Counted>>,
}

impl Control {
    /// The control channel of a world in one process.
    pub fn new(world_size: usize) -> Self {
        Self::with(vec![1; world_size], None)
    }

    /// The control channel of one rank, to the others by `mesh`. `ways` says, by rank, in how many ways it is connected.
    pub fn over(mesh: Arc<Mesh>, ways: Vec<usize>) -> Self {
        Self::with(ways, Some(mesh))
    }

    fn with(ways: Vec<usize>, mesh: Option<Arc<Mesh>>) -> Self {
        let world_size = ways.len();
        Self {
            faulted: AtomicBool::new(false),
            departed: (0..world_size).map(|_| AtomicBool::new(false)).collect(),
            // Zeroed words belong to generation 0.
            state: Mutex::new(State {
                fault: None,
                early: None,
                generation: 1,
                resetting: vec![false; world_size],
                given_up: (0, None),
                ways,
                failures: vec![None; world_size],
                farewells: vec![None; world_size],
            }),
            met: Condvar::new(),
            mesh,
        }
    }

    /// The generation of new operations.
    pub fn generation(&self) -> u16 {
        lock(&self.state).generation
    }

    /// The way to ranks in other processes, if there are any.
    pub fn mesh(&self) -> Option<&Arc<Mesh>> {
        self.mesh.as_ref()
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
        if self.adopt(&fault, generation)
            && let Some(mesh) = &self.mesh
        {
            mesh.tell_fault(generation, fault);
        }
    }

    /// As [`Control::broadcast`], of a fault that the others know. Whether it is the first.
    pub fn adopt(&self, fault: &Fault, generation: u16) -> bool {
        let mut state = lock(&self.state);
        if generation == next(state.generation) {
            state.early.get_or_insert_with(|| fault.clone());
        }
        let first = state.fault.is_none() && state.generation == generation;
        if first {
            self.poison(&mut state, fault.clone());
        }
        first
    }

    fn poison(&self, state: &mut State, fault: Fault) {
        tracing::error!(%fault, "communicator poisoned");
        state.fault = Some(Arc::new(fault));
        self.faulted.store(true, Ordering::Release);
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.departed.len()
    }

    /// `rank`, of this process, leaves, having started so much.
    pub fn leave(&self, rank: usize, started: Counted) {
        self.note_farewell(rank, started);
        self.depart(rank);
        if let Some(mesh) = &self.mesh {
            mesh.leave(started);
        }
    }

    /// `rank` has said that it leaves, having started so much.
    pub fn note_farewell(&self, rank: usize, started: Counted) {
        lock(&self.state).farewells[rank] = Some(started);
    }

    /// What `rank`, which is gone, had started; none where it did not come to say so.
    pub fn farewell(&self, rank: usize) -> Option<Counted> {
        lock(&self.state).farewells[rank]
    }

    /// `rank` is gone.
    fn depart(&self, rank: usize) {
        self.departed[rank].store(true, Ordering::Release);
        // Under the lock, so that nobody who is about to wait for this rank misses it.
        drop(lock(&self.state));
        self.met.notify_all();
    }

    /// Nothing more comes from `rank` by one of the ways to it. When the last is closed, it is gone.
    pub fn close(&self, rank: usize) {
        let mut state = lock(&self.state);
        state.ways[rank] = state.ways[rank].saturating_sub(1);
        let gone = state.ways[rank] == 0;
        drop(state);
        if gone {
            self.depart(rank);
        }
    }

    /// The rail to `rank` carries nothing more: because it has failed, or is closed.
    pub fn lose(&self, rank: usize, failure: Option<Cause>) {
        match failure {
            Some(cause) => self.fail(rank, cause),
            None => self.close(rank),
        }
    }

    /// A way to `rank` has failed: for who needs it, the rank is gone.
    fn fail(&self, rank: usize, cause: Cause) {
        tracing::error!(rank, ?cause, "a rank can't be reached");
        lock(&self.state).failures[rank].get_or_insert(cause);
        self.depart(rank);
    }

    /// Whether `rank` has left. All it ever signalled is visible to who sees this.
    pub fn has_departed(&self, rank: usize) -> bool {
        self.departed[rank].load(Ordering::Acquire)
    }

    /// Why `rank` is gone.
    pub fn why_departed(&self, rank: usize) -> Cause {
        lock(&self.state).failures[rank].clone().unwrap_or(Cause::Departed)
    }

    /// Meets all ranks and raises the generation. The caller has no run left. When a rank has left, or the first
    /// to have come has waited long enough, all who are there give up, so that they name the same ranks.
    pub fn reset(&self, rank: usize, deadline: Duration) -> Result<(), Error> {
        let Some(mesh) = &self.mesh else { return self.reset_here(rank, deadline) };
        let gone: Vec<usize> = self.departed().collect();
        let generation = self.generation();
        mesh.meet(generation, gone, deadline)?;
        self.raise_generation(lock(&self.state));
        Ok(())
    }

    /// The same among the ranks of this process, which are all there are.
    fn reset_here(&self, rank: usize, deadline: Duration) -> Result<(), Error> {
        let started = Instant::now();
        let mut state = lock(&self.state);
        let (generation, meeting) = (state.generation, state.given_up.0);
        state.resetting[rank] = true;
        if state.resetting.iter().all(|&met| met) {
            self.raise_generation(state);
            self.met.notify_all();
            return Ok(());
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

    fn raise_generation(&self, mut state: MutexGuard<'_, State>) {
        state.generation = next(state.generation);
        state.fault = None;
        state.resetting.fill(false);
        self.faulted.store(false, Ordering::Release);
        if let Some(fault) = state.early.take() {
            self.poison(&mut state, fault);
        }
    }

    /// The ranks that have left.
    pub fn departed(&self) -> impl Iterator<Item = usize> {
        (0..self.departed.len()).filter(|&rank| self.has_departed(rank))
    }
}

/// The generation after `generation`. Generation 0 is that of zeroed memory.
fn next(generation: u16) -> u16 {
    generation.checked_add(1).unwrap_or(1)
}

impl State {
    /// Ends the meeting for the sake of `departed` ranks, or else of those that have not come.
    fn give_up(&mut self, departed: Vec<usize>, after: Duration) {
        let absent = || (0..self.resetting.len()).filter(|&rank| !self.resetting[rank]).collect();
        let missing = if departed.is_empty() { absent() } else { departed };
        self.given_up = (self.given_up.0 + 1, Some(Error::ResetIncomplete { missing, after }));
        self.resetting.fill(false);
    }
}
