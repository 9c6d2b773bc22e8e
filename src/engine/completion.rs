//! How an operation ends: its result, who waits for it, and what it keeps alive.

use std::any::Any;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};

use crate::error::Error;

/// What an operation owns for its duration: the caller's buffers.
pub type Keep = Arc<dyn Any + Send + Sync>;

/// What is left to do for the caller once an operation has succeeded: results are fetched from a device.
pub type Fetch = Box<dyn FnOnce() -> Result<(), Error> + Send>;

/// The end of one operation, shared by the engine and the caller.
pub struct Completion {
    result: OnceLock<Result<(), Error>>,
    state: Mutex<State>,
    wake: Condvar,
}

struct State {
    finished: bool,
    abandoned: bool,
    /// Until it is taken.
    keep: Option<Keep>,
    fetch: Option<Fetch>,
}

impl State {
    /// What is kept for nobody any more.
    fn unwanted(&mut self) -> Option<Keep> {
        self.keep.take_if(|_| self.finished && self.abandoned)
    }
}

impl Completion {
    /// The end of an operation that keeps `keep`.
    pub fn new(keep: Keep) -> Self {
        Self::with_fetch(keep, None)
    }

    /// The same; the caller who waits for success does `fetch` first.
    pub fn with_fetch(keep: Keep, fetch: Option<Fetch>) -> Self {
        let state = State { finished: false, abandoned: false, keep: Some(keep), fetch };
        Self { result: OnceLock::new(), state: Mutex::new(state), wake: Condvar::new() }
    }

    /// Ends the operation, once.
    pub fn finish(&self, result: Result<(), Error>) {
        if self.result.set(result).is_ok() {
            let mut state = lock(&self.state);
            state.finished = true;
            let unwanted = state.unwanted();
            drop(state);
            self.wake.notify_all();
            drop(unwanted);
        }
    }

    /// Whether [`Waiter::wait`] would return at once.
    pub fn is_finished(&self) -> bool {
        self.result.get().is_some()
    }
}

/// The caller's end.
pub struct Waiter(Arc<Completion>);

impl Waiter {
    /// Waits for `completion`.
    pub fn new(completion: Arc<Completion>) -> Self {
        Self(completion)
    }

    /// Waits for what was over before it began.
    pub fn failed(keep: Keep, error: Error) -> Self {
        let completion = Completion::new(keep);
        completion.finish(Err(error));
        Self::new(Arc::new(completion))
    }

    /// Whether [`Waiter::wait`] would return at once.
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }

    /// Sleeps until the operation is over; every wait within it has a deadline, so this one has an end.
    pub fn wait(&self) -> Result<(), Error> {
        let mut state = lock(&self.0.state);
        while !state.finished {
            state = self.0.wake.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        let fetch = state.fetch.take();
        drop(state);
        self.0.result.get().expect("set before `finished`").clone()?;
        fetch.map_or(Ok(()), |fetch| fetch())
    }

    /// What the operation kept, once.
    pub fn take_keep(&self) -> Option<Keep> {
        lock(&self.0.state).keep.take()
    }
}

impl Drop for Waiter {
    /// Nobody will take what the operation keeps: it goes as soon as that is over, whoever still knows it.
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.abandoned = true;
        let unwanted = state.unwanted();
        drop(state);
        drop(unwanted);
    }
}

/// A panic elsewhere is reported as a fault; the state under the lock is still whole.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
