//! A proxy on a thread of its own.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{Proxy, ProxyError};
use crate::error::{ConfigError, panic_message};
use crate::fabric::rail::Rail;

/// Sleeps are this part of the silence so far: what ends a silence is late by that part of it at most.
const SLEEP_PART: u32 = 8;

/// The longest sleep while something is under way: its completion is what a sender may wait for.
const UNDER_WAY_SLEEP: Duration = Duration::from_micros(100);

/// How long a proxy without work stays awake. Ranks may outnumber cores, and kernels can't wake a thread: so
/// it spins first, then gives its core to whoever wants it, then sleeps, longer and longer. Where it has a
/// core to itself it may spin for ever, [`Duration::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// How long it spins.
    pub spin: Duration,
    /// How long it yields after that.
    pub yielding: Duration,
    /// The longest sleep: how late a command may be taken after a long silence without [`ProxyThread::wake`].
    pub longest_sleep: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let micros = Duration::from_micros;
        Self { spin: micros(50), yielding: micros(150), longest_sleep: micros(2000) }
    }
}

impl Patience {
    /// Waits a little after a silence of `silence`.
    fn rest(&self, silence: Duration, is_idle: bool) {
        if silence < self.spin {
            std::hint::spin_loop();
        } else if silence < self.spin.saturating_add(self.yielding) {
            thread::yield_now();
        } else {
            let longest = if is_idle { self.longest_sleep } else { self.longest_sleep.min(UNDER_WAY_SLEEP) };
            thread::park_timeout(longest.min(silence / SLEEP_PART));
        }
    }
}

/// A thread that drains one rank's queue until it is dropped.
#[derive(Debug)]
pub struct ProxyThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    woken: AtomicBool,
    /// Steps that found nothing to do and nothing under way.
    quiet_steps: AtomicU64,
    failure: OnceLock<ProxyError>,
}

impl ProxyThread {
    /// Starts draining, on `core` only where one is given.
    ///
    /// # Errors
    /// The system refuses the thread or the core; nothing has been drained then.
    pub fn spawn<R: Rail + 'static>(
        proxy: Proxy<R>,
        patience: Patience,
        core: Option<usize>,
    ) -> Result<Self, ConfigError> {
        let rank = proxy.rank();
        let shared = Arc::<Shared>::default();
        let (pinned, outcome) = channel();
        let worker = Worker { proxy, patience, shared: shared.clone() };
        let run = move || worker.run(core, pinned);
        let thread = thread::Builder::new().name(format!("proxy-{rank}")).spawn(run);
        let thread = thread.map_err(|error| ConfigError::refused("proxy", rank, error))?;
        let proxy = Self { shared, thread: Some(thread) };
        match (outcome.recv(), core) {
            (Ok(Err(error)), Some(core)) => Err(ConfigError::refused("core", core, error)),
            _ => Ok(proxy),
        }
    }

    /// Ends its sleep: for whoever knows that commands are about to come, say at a kernel's launch. A hint.
    pub fn wake(&self) {
        self.shared.woken.store(true, Ordering::Release);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// Why it no longer drains, if it does not. The rank's kernels have been told to return.
    pub fn failure(&self) -> Option<&ProxyError> {
        self.shared.failure.get()
    }

    /// Steps so far that found the queue empty and nothing under way. Two more than before mean that all has been
    /// done that was asked for before.
    pub fn quiet_steps(&self) -> u64 {
        self.shared.quiet_steps.load(Ordering::Acquire)
    }

    /// Stops between two batches. Commands not taken stay in the queue.
    ///
    /// # Errors
    /// It had failed.
    pub fn stop(mut self) -> Result<(), ProxyError> {
        self.end();
        self.failure().cloned().map_or(Ok(()), Err)
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake();
        if let Some(thread) = self.thread.take() {
            // Panics of the rail have been caught, and there is nothing else to panic.
            let _ = thread.join();
        }
    }
}

impl Drop for ProxyThread {
    fn drop(&mut self) {
        self.end();
    }
}

struct Worker<R> {
    proxy: Proxy<R>,
    patience: Patience,
    shared: Arc<Shared>,
}

impl<R: Rail> Worker<R> {
    fn run(mut self, core: Option<usize>, pinned: Sender<io::Result<()>>) {
        let outcome = core.map_or(Ok(()), pin);
        let refused = outcome.is_err();
        if pinned.send(outcome).is_err() || refused {
            return;
        }
        let drained = catch_unwind(AssertUnwindSafe(|| self.drain()));
        if let Err(error) = drained.unwrap_or_else(|panic| Err(ProxyError::Panicked(panic_message(&*panic))))
        {
            tracing::error!(rank = self.proxy.rank(), %error, "the proxy has stopped");
            // Set before kernels return, so that whoever sees them return can ask why.
            let _ = self.shared.failure.set(error);
            self.proxy.abort();
        }
    }

    fn drain(&mut self) -> Result<(), ProxyError> {
        let mut moved_at = Instant::now();
        while !self.shared.stop.load(Ordering::Acquire) {
            let moved = self.proxy.step()?.moved();
            let now = Instant::now();
            if !moved && self.proxy.is_idle() {
                self.shared.quiet_steps.fetch_add(1, Ordering::Release);
            }
            if moved || self.shared.woken.swap(false, Ordering::Acquire) {
                moved_at = now;
            } else {
                self.patience.rest(now - moved_at, self.proxy.is_idle());
            }
        }
        Ok(())
    }
}

/// Keeps the calling thread on `core`.
#[cfg(target_os = "linux")]
fn pin(core: usize) -> io::Result<()> {
    use rustix::thread::{CpuSet, sched_setaffinity};
    if core >= CpuSet::MAX_CPU {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut cores = CpuSet::new();
    cores.set(core);
    Ok(sched_setaffinity(None, &cores)?)
}

#[cfg(not(target_os = "linux"))]
fn pin(_core: usize) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
