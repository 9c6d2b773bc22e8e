//! Event counts: workers that found nothing to do sleep until something is published.

use std::time::Duration;

use crate::sync::{AtomicU64, AtomicUsize, Condvar, Mutex, Ordering, fence};

/// Wakes the threads of a process that have found nothing to do.
pub trait Bell: Send + Sync {
    /// What [`Bell::wait`] compares with; take it before looking for work.
    fn ticket(&self) -> u64;

    /// Wakes whoever sleeps, and makes every ticket taken so far stale.
    fn ring(&self);

    /// Sleeps until a ring after `ticket`, at most `timeout`. It may wake up early.
    fn wait(&self, ticket: u64, timeout: Duration);
}

/// The bell of threads of one process. Rung after every publication. No wake-up is lost: a worker takes a ticket, looks for work, and sleeps only
/// while no ring has come since the ticket.
#[derive(Debug, Default)]
pub struct Doorbell {
    rings: AtomicU64,
    // A ringer increments `rings`, then reads `sleepers`; a sleeper increments `sleepers`, then reads
    // `rings`. Each has a SeqCst fence between the two, so at least one of them sees the other.
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Bell for Doorbell {
    fn ticket(&self) -> u64 {
        // Whoever has seen a ring sees what was published before it.
        self.rings.load(Ordering::Acquire)
    }

    fn ring(&self) {
        self.rings.fetch_add(1, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::Relaxed) > 0 {
            drop(self.lock.lock());
            self.wake.notify_all();
        }
    }

    fn wait(&self, ticket: u64, timeout: Duration) {
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let guard = self.lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if self.ticket() == ticket {
            drop(self.wake.wait_timeout(guard, timeout));
        }
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
    }
}
