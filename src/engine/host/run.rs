//! One operation of one rank, running: its tasks, who waits for it, and what it keeps alive.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Instant;

use super::port::CallerBuffers;
use crate::error::{Error, Wait};
use crate::proto::{Op, Task};

/// What a run owns for its duration: the caller's buffers.
pub type Keep = Arc<dyn Any + Send + Sync>;

/// A submitted operation.
pub struct Run {
    pub(super) rank: usize,
    pub(super) op: Arc<Op>,
    pub(super) buffers: CallerBuffers,
    pub(super) tasks: Vec<Mutex<Slot>>,
    /// Tasks left; who takes the last one finishes the run.
    pub(super) left: AtomicUsize,
    /// When a task moved last, in microseconds of the engine's clock: a wait expires only if nothing moves.
    pub(super) moved_at: AtomicU64,
    /// A fault ended a task before it was done.
    stopped: AtomicBool,
    result: OnceLock<Result<(), Error>>,
    state: Mutex<State>,
    wake: Condvar,
}

struct State {
    finished: bool,
    abandoned: bool,
    /// Until it is taken.
    keep: Option<Keep>,
}

impl State {
    /// What is kept for nobody any more.
    fn unwanted(&mut self) -> Option<Keep> {
        self.keep.take_if(|_| self.finished && self.abandoned)
    }
}

/// The caller's end of a run.
pub struct Waiter(Arc<Run>);

impl Waiter {
    /// The end of `run`.
    pub fn new(run: Arc<Run>) -> Self {
        Self(run)
    }
}

impl std::ops::Deref for Waiter {
    type Target = Run;

    fn deref(&self) -> &Run {
        &self.0
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// A task and what it waits for.
pub(super) struct Slot {
    pub task: Option<Task>,
    pub blocked: Option<(Instant, Wait)>,
}

impl Run {
    /// A run of `op` on the caller's `buffers`, which `keep` owns.
    pub fn new(op: Arc<Op>, rank: usize, buffers: CallerBuffers, keep: Keep) -> Self {
        let slot = |task| Mutex::new(Slot { task: Some(task), blocked: None });
        let tasks: Vec<_> = Task::table(&op).into_iter().map(slot).collect();
        Self {
            rank,
            op,
            buffers,
            left: AtomicUsize::new(tasks.len()),
            tasks,
            moved_at: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            result: OnceLock::new(),
            state: Mutex::new(State { finished: false, abandoned: false, keep: Some(keep) }),
            wake: Condvar::new(),
        }
    }

    /// Notes that a task is about to be taken out before it is done.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    pub(super) fn was_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Ends the run: only called when no task is left.
    pub(super) fn finish(&self, result: Result<(), Error>) {
        if self.result.set(result).is_ok() {
            let mut state = lock(&self.state);
            state.finished = true;
            let unwanted = state.unwanted();
            drop(state);
            self.wake.notify_all();
            drop(unwanted);
        }
    }

    /// Nobody will take what the run keeps: it goes as soon as the run is over, whoever still knows the run.
    fn abandon(&self) {
        let mut state = lock(&self.state);
        state.abandoned = true;
        let unwanted = state.unwanted();
        drop(state);
        drop(unwanted);
    }

    /// Whether [`Run::wait`] would return at once.
    pub fn is_finished(&self) -> bool {
        self.result.get().is_some()
    }

    /// Sleeps until the run is over; every wait of its tasks has a deadline, so this one has an end.
    pub fn wait(&self) -> Result<(), Error> {
        let mut state = lock(&self.state);
        while !state.finished {
            state = self.wake.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        self.result.get().expect("set before `finished`").clone()
    }

    /// What the run kept, once.
    pub fn take_keep(&self) -> Option<Keep> {
        lock(&self.state).keep.take()
    }
}

/// A panic elsewhere is reported as a fault; the state under the lock is still whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
