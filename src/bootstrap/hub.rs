//! Where the ranks of a world come together: threads that wait here, and connections that are told by their outboxes.
//!
//! A rank brings its next contribution only after the last step's end has reached it, so there is one step at a time.

use std::collections::BTreeSet;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::error::{Agreed, BootstrapError, Operation, Step};
use super::frame::{MAX_GATHER, Outcome, encode_outcome, end_of, time_left};

/// What the writer of a connection is to do.
#[derive(Debug)]
pub(super) enum Post {
    /// Send these bytes, which end the rank's wait.
    Send(Arc<[u8]>),
    /// Unless something is sent before, this wait has lasted too long.
    Expire(Expiry),
}

/// The end of a rank's patience.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expiry {
    pub at: Instant,
    /// The step waited for.
    pub number: u64,
    /// How long, in all.
    pub after: Duration,
}

#[derive(Debug)]
pub(super) struct Hub {
    world_size: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Number of the step that is under way or next.
    number: u64,
    /// What it is, and the rank that came first; none before the first.
    operation: Option<(Operation, usize)>,
    /// What each rank has brought to it.
    parts: Vec<Option<Vec<u8>>>,
    arrived: usize,
    /// Bytes brought, those that had no room included.
    bytes: u64,
    /// How the step before ended. Nobody comes to the next but one before all have seen it.
    last: Option<Arc<Outcome>>,
    /// Why there is no next step. The first reason stays.
    failure: Option<BootstrapError>,
    /// Where to reach each rank that has come by a connection.
    outboxes: Vec<Option<Sender<Post>>>,
    /// Ranks that were here and have left.
    gone: BTreeSet<usize>,
}

impl State {
    fn step(&self) -> Option<Step> {
        self.operation.map(|(operation, _)| Step { operation, number: self.number })
    }

    /// Tells every connection how a step or the world has ended.
    fn announce(&self, outcome: &Outcome) {
        let bytes: Arc<[u8]> = encode_outcome(outcome).into();
        // A connection that no longer listens is told by its reader.
        self.outboxes.iter().flatten().for_each(|outbox| drop(outbox.send(Post::Send(bytes.clone()))));
    }

    fn fail(&mut self, error: BootstrapError) {
        if self.failure.is_none() {
            tracing::debug!(%error, "the bootstrap has failed");
            self.failure = Some(error.clone());
            self.announce(&Err(error));
        }
    }

    /// Ends the step that all ranks have come to.
    fn complete(&mut self) {
        let world_size = self.parts.len();
        let parts = std::mem::replace(&mut self.parts, vec![None; world_size]);
        let outcome = match std::mem::take(&mut self.bytes) {
            bytes if bytes > MAX_GATHER => Err(BootstrapError::TooLarge { bytes, limit: MAX_GATHER }),
            _ => Ok(parts.into_iter().map(Option::unwrap_or_default).collect()),
        };
        (self.operation, self.arrived) = (None, 0);
        self.number += 1;
        self.announce(&outcome);
        self.last = Some(Arc::new(outcome));
    }
}

impl Hub {
    pub fn new(world_size: usize) -> Self {
        let state = State {
            number: 0,
            operation: None,
            parts: vec![None; world_size],
            arrived: 0,
            bytes: 0,
            last: None,
            failure: None,
            outboxes: vec![None; world_size],
            gone: BTreeSet::new(),
        };
        Self { world_size, state: Mutex::new(state), changed: Condvar::new() }
    }

    pub fn world_size(&self) -> usize {
        self.world_size
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Whether all ranks have joined.
    pub fn is_formed(&self) -> bool {
        self.lock().number > 0
    }

    /// Bytes that there still is room for in the step under way.
    pub fn room(&self) -> u64 {
        MAX_GATHER.saturating_sub(self.lock().bytes)
    }

    /// Lets `rank` in, reached by `outbox` from now on.
    pub fn admit(&self, rank: usize, outbox: Sender<Post>) -> Result<(), BootstrapError> {
        let mut state = self.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        if rank == 0 || state.outboxes[rank].is_some() || state.gone.contains(&rank) {
            return Err(BootstrapError::Duplicate { rank });
        }
        state.outboxes[rank] = Some(outbox);
        Ok(())
    }

    /// Whether somebody is, or was, here as `rank`.
    pub fn is_taken(&self, rank: usize) -> bool {
        let state = self.lock();
        rank == 0 || state.gone.contains(&rank) || state.outboxes.get(rank).is_some_and(Option::is_some)
    }

    /// Without some rank there will be no world. One that has formed is none of its business.
    pub fn fail_forming(&self, error: BootstrapError) {
        let mut state = self.lock();
        if state.number == 0 {
            state.fail(error);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Takes what `rank` brings to its next step: `part`, of `bytes`, which may have had no room. Whether it was the
    /// one that is next.
    pub fn contribute(&self, rank: usize, step: Step, part: Vec<u8>, bytes: u64, expiry: Expiry) -> bool {
        let mut state = self.lock();
        if state.failure.is_some() {
            return true;
        }
        if let Some(outbox) = &state.outboxes[rank] {
            // Before what ends the wait.
            let _ = outbox.send(Post::Expire(expiry));
        }
        if step.number != state.number || state.parts[rank].is_some() {
            return false;
        }
        let (operation, first) = *state.operation.get_or_insert((step.operation, rank));
        if operation != step.operation {
            let (ours, theirs) = (step.operation as u64, operation as u64);
            state.fail(BootstrapError::Mismatch { rank, peer: first, what: Agreed::Operation, ours, theirs });
        } else if let Some(&rank) = state.gone.first() {
            state.fail(BootstrapError::Lost { rank });
        } else {
            state.parts[rank] = Some(part);
            state.bytes = state.bytes.saturating_add(bytes);
            state.arrived += 1;
            if state.arrived == self.world_size {
                state.complete();
            }
        }
        drop(state);
        self.changed.notify_all();
        true
    }

    /// A rank that was here has left. Whoever waits, waits in vain.
    pub fn leave(&self, rank: usize) {
        let mut state = self.lock();
        state.outboxes[rank] = None;
        state.gone.insert(rank);
        if state.arrived > 0 {
            state.fail(BootstrapError::Lost { rank });
        }
        drop(state);
        self.changed.notify_all();
    }

    /// A wait has lasted too long, if its step is still under way.
    pub fn expire(&self, expiry: Expiry) {
        let mut state = self.lock();
        if let (true, Some(step)) = (state.number == expiry.number, state.step()) {
            let ranks = (0..self.world_size).filter(|&rank| state.parts[rank].is_none()).collect();
            state.fail(BootstrapError::Missing { ranks, step, after: expiry.after });
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Lets all connections end, when they have sent what they were given, and nobody in any more.
    pub fn close(&self) {
        let mut state = self.lock();
        state.failure.get_or_insert(BootstrapError::Lost { rank: 0 });
        state.outboxes.iter_mut().for_each(|outbox| *outbox = None);
    }

    /// What a rank that waits here does: brings `mine` to the next step, and gives how that ends.
    pub fn meet(&self, rank: usize, operation: Operation, mine: &[u8], deadline: Duration) -> Outcome {
        let bytes = mine.len() as u64;
        let part = if bytes <= MAX_GATHER { mine.to_vec() } else { Vec::new() };
        let number = self.lock().number;
        let expiry = Expiry { at: end_of(deadline), number, after: deadline };
        self.contribute(rank, Step { operation, number }, part, bytes, expiry);
        let mut state = self.lock();
        loop {
            match &state.last {
                Some(last) if state.number > number => {
                    let last = last.clone();
                    // Parts may be large: they are copied when others can go on.
                    drop(state);
                    return Arc::unwrap_or_clone(last);
                }
                _ => {}
            }
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            state = match time_left(expiry.at) {
                Some(left) => self.changed.wait_timeout(state, left).unwrap_or_else(|p| p.into_inner()).0,
                None => {
                    drop(state);
                    self.expire(expiry);
                    self.lock()
                }
            };
        }
    }
}
