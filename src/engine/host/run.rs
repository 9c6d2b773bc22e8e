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
    keep: Mutex<Option<Keep>>,
    result: OnceLock<Result<(), Error>>,
    finished: Mutex<bool>,
    wake: Condvar,
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
            keep: Mutex::new(Some(keep)),
            result: OnceLock::new(),
            finished: Mutex::new(false),
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
            *lock(&self.finished) = true;
            self.wake.notify_all();
        }
    }

    /// Whether [`Run::wait`] would return at once.
    pub fn is_finished(&self) -> bool {
        self.result.get().is_some()
    }

    /// Sleeps until the run is over; every wait of its tasks has a deadline, so this one has an end.
    pub fn wait(&self) -> Result<(), Error> {
        let mut finished = lock(&self.finished);
        while !*finished {
            finished = self.wake.wait(finished).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        self.result.get().expect("set before `finished`").clone()
    }

    /// What the run kept, once.
    pub fn take_keep(&self) -> Option<Keep> {
        lock(&self.keep).take()
    }

    /// The operation.
    pub fn op(&self) -> &Arc<Op> {
        &self.op
    }
}

/// A panic elsewhere is reported as a fault; the state under the lock is still whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
