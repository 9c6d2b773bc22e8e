//! The monitor: ends what has ended, and finds out who is to blame when something does not.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::World;
use super::rank::Rank;
use super::report::Ended;
use super::start::Run;
use crate::engine::completion::lock;
use crate::error::{Cause, Error, Fault, Kind, Wait};
use crate::wire::device::FaultRecord;
use crate::wire::region::{LANES, Lane};

/// How long it only gives its core away after something has moved, before it sleeps.
const YIELDING: Duration = Duration::from_micros(200);

/// Sleeps while operations are under way: how late their end may be seen.
const SLEEP: Duration = Duration::from_micros(50);

/// Sleeps while recordings may be executed.
const WATCH: Duration = Duration::from_millis(5);

/// How long it lets other ranks come to the end of their deadlines once one has: their records tell who waits for whom.
const GRACE: Duration = Duration::from_millis(500);

/// How long a run may be silent before its device is asked whether it still works.
const SILENCE: Duration = Duration::from_millis(20);

pub struct Monitor<'a> {
    world: &'a Arc<World>,
    /// Since when some rank is known to have stopped.
    suspected: Option<Instant>,
    asked: Instant,
}

impl<'a> Monitor<'a> {
    pub fn new(world: &'a Arc<World>) -> Self {
        Self { world, suspected: None, asked: Instant::now() }
    }

    /// Works until the engine stops, and then until nothing is under way, or a deadline has passed.
    pub fn run(mut self) {
        let mut moved_at = Instant::now();
        let mut stopped_at = None;
        loop {
            let moved = self.pass();
            let (now, idle) = (Instant::now(), self.world.is_idle());
            let recordings = self.world.recordings.load(Ordering::Relaxed) > 0;
            if self.world.stop.load(Ordering::Acquire) {
                let since = *stopped_at.get_or_insert(now);
                if idle || now - since > self.world.config.deadline {
                    return;
                }
            }
            if moved {
                moved_at = now;
            } else if idle {
                // Nobody says when a recording is executed: it is enough to see in time when one fails.
                if recordings { thread::park_timeout(WATCH) } else { thread::park() }
            } else if now - moved_at < YIELDING {
                thread::yield_now();
            } else {
                thread::park_timeout(SLEEP);
            }
        }
    }

    /// Looks at everything once; whether anything has ended.
    fn pass(&mut self) -> bool {
        let mut moved = false;
        for rank in &self.world.ranks {
            for lane in LANES {
                while let Some(run) = rank.first_run(lane)
                    && self.end(rank, &run).is_some()
                {
                    rank.drop_first_run(lane);
                    moved = true;
                }
            }
        }
        if self.world.control.fault().is_none() {
            self.look_for_faults();
        }
        moved
    }

    /// Ends `run` if its kernels have; none if they have not, or if it is not known yet why.
    fn end(&mut self, rank: &Rank, run: &Run) -> Option<()> {
        let report = self.report(run)?;
        let result = match self.ended(rank, run)? {
            Ended::Ok => Ok(()),
            Ended::Refused => Err(rank.refusal(report)),
            Ended::Stopped => match self.world.control.fault() {
                Some(fault) => Err(Error::Fault(fault)),
                None => {
                    self.suspected.get_or_insert_with(Instant::now);
                    return None;
                }
            },
        };
        if result.is_ok() && matches!(run.kind, Kind::Plan | Kind::PlanDispatch) {
            run.plan.as_ref().map(|plan| plan.counts.set(rank.counts(report)));
        }
        tracing::debug!(rank = run.rank, kind = %run.kind, number = run.number, ok = result.is_ok(), "operation over");
        if let Some(slot) = lock(&run.slot).take() {
            rank.give_slot(slot);
        }
        run.completion.finish(result);
        Some(())
    }

    /// Which report is the run's; none once it is over.
    fn report(&self, run: &Run) -> Option<usize> {
        lock(&run.slot).as_ref().map(|slot| slot.report)
    }

    fn ended(&self, rank: &Rank, run: &Run) -> Option<Ended> {
        // Nothing of a dead device will ever report.
        rank.ended(self.report(run)?).or_else(|| self.is_dead(run).then_some(Ended::Stopped))
    }

    fn is_dead(&self, run: &Run) -> bool {
        let fault = self.world.control.fault();
        fault.is_some_and(|fault| fault.rank == run.rank && matches!(fault.cause, Cause::Device(_)))
    }

    // ---- faults

    fn look_for_faults(&mut self) {
        let runs: Vec<_> = self.world.runs().collect();
        if runs.is_empty() && self.world.recordings.load(Ordering::Relaxed) == 0 {
            self.suspected = None;
            return;
        }
        let fault = self.sudden(&runs).or_else(|| self.expired(&runs));
        if let Some(fault) = fault {
            self.suspected = None;
            self.world.control.broadcast(fault, self.world.control.generation());
            self.world.abort();
        }
    }

    /// What needs no waiting: a rank that has left, a proxy or a device that has failed.
    fn sudden(&mut self, runs: &[Arc<Run>]) -> Option<Fault> {
        for run in runs {
            if let Some(rank) = self.missing_for_good(run) {
                return Some(run.silent_fault(rank, Cause::Departed));
            }
            if let Some(why) = self.world.ranks[run.rank].proxy_failure() {
                return Some(run.silent_fault(run.rank, Cause::Proxy(why)));
            }
        }
        if self.asked.elapsed() < SILENCE {
            return None;
        }
        self.asked = Instant::now();
        runs.iter().find_map(|run| Some(run.silent_fault(run.rank, Cause::Device(self.device_failure(run)?))))
    }

    /// A rank that has left without starting this operation, and so never will.
    fn missing_for_good(&self, run: &Run) -> Option<usize> {
        if self.world.uncounted.load(Ordering::Relaxed) {
            return None;
        }
        let ranks = self.world.ranks.iter().filter(|rank| self.world.control.has_departed(rank.rank));
        let missed = |rank: &&Rank| lock(rank.lane(Lane::of(run.kind))).started <= run.number;
        ranks.filter(missed).map(|rank| rank.rank).next()
    }

    /// How the device of a run has failed, if it has: its kernels end without a report.
    fn device_failure(&self, run: &Run) -> Option<String> {
        if run.enqueued.elapsed() < SILENCE {
            return None;
        }
        let done = lock(&run.slot).as_ref()?.event.is_done();
        match done {
            Ok(false) => None,
            // The report may have come in between.
            Ok(true) => {
                let silent = self.ended(&self.world.ranks[run.rank], run).is_none();
                silent.then(|| format!("the kernels of a {} have ended without a report", run.kind))
            }
            Err(error) => Some(error.to_string()),
        }
    }

    /// A wait that outlived the deadline, once the others' are known too.
    fn expired(&mut self, runs: &[Arc<Run>]) -> Option<Fault> {
        let records: Vec<Option<FaultRecord>> = self.world.ranks.iter().map(Rank::fault_record).collect();
        if self.suspected.is_none() && records.iter().all(Option::is_none) {
            return None;
        }
        let since = *self.suspected.get_or_insert_with(Instant::now);
        let running = runs.iter().any(|run| self.ended(&self.world.ranks[run.rank], run).is_none());
        // What else waits is not known of recordings.
        let running = running || runs.is_empty();
        (!running || since.elapsed() > GRACE).then(|| self.blame(&records, runs))
    }

    /// The fault at the end of the chain of waits, so that a healthy but blocked rank is not blamed: at a rank that
    /// waited for nobody, or has not started the operation. A chain that ends in a circle is cut at the wait for what
    /// comes first in an operation.
    fn blame(&self, records: &[Option<FaultRecord>], runs: &[Arc<Run>]) -> Fault {
        let first = records.iter().position(Option::is_some);
        let Some(reporter) = first else {
            // Stopped, and no record: by the abort flag, which only a failed proxy raises by itself.
            return runs[0]
                .silent_fault(runs[0].rank, Cause::Proxy("its kernels were told to return".into()));
        };
        let wait = |rank: usize| records[rank].map(|record| record.read());
        let mut chain: Vec<(usize, (Kind, Wait))> = Vec::new();
        let mut rank = reporter;
        let last = loop {
            let Some(step) = wait(rank) else { break chain.last().copied() };
            if chain.iter().any(|(seen, _)| *seen == rank) {
                break chain.iter().min_by_key(|(rank, _)| records[*rank].map(|record| record.what)).copied();
            }
            chain.push((rank, step));
            rank = step.1.peer;
        };
        let (_, (kind, wait)) = last.expect("the reporter has a record");
        let epoch = records[reporter].map_or(0, |record| record.epoch);
        let cause = match self.world.control.has_departed(wait.peer) {
            true => Cause::Departed,
            false => Cause::Deadline(self.world.config.deadline),
        };
        Fault { rank: wait.peer, cause, reporter, kind, epoch, wait: Some(wait) }
    }
}
