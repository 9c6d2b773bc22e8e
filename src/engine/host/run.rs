//! One operation of one rank, running: its tasks.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::port::CallerBuffers;
use crate::engine::completion::{Completion, Keep, Waiter};
use crate::error::Wait;
use crate::proto::{Op, Task};

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
    pub(super) completion: Arc<Completion>,
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
            completion: Arc::new(Completion::new(keep)),
        }
    }

    /// Notes that a task is about to be taken out before it is done.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    pub(super) fn was_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// The caller's end.
    pub fn waiter(&self) -> Waiter {
        Waiter::new(self.completion.clone())
    }
}
