//! The monitor: ends what has ended, and finds out who is to blame when something does not.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::World;
use super::rank::Rank;
use super::report::Ended;
use super::start::Run;
use crate::engine::blame::{Inquiry, Last};
use crate::engine::completion::lock;
use crate::engine::mesh::Answer;
use crate::error::{Cause, Error, Fault, Kind};
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
    /// When it last asked who waits for whom.
    inquired: Instant,
    asked: Instant,
}

impl<'a> Monitor<'a> {
    pub fn new(world: &'a Arc<World>) -> Self {
        Self { world, suspected: None, inquired: Instant::now(), asked: Instant::now() }
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
        for rank in self.world.ranks.values() {
            for lane in LANES {
                while let Some(run) = rank.first_run(lane)
                    && self.end(rank, &run).is_some()
                {
                    rank.drop_first_run(lane);
                    moved = true;
                }
            }
        }
        match self.world.control.fault() {
            None => self.look_for_faults(),
            // Whatever was suspected, all is over.
            Some(_) => self.suspected = None,
        }
        moved
    }

    /// Ends `run` if its kernels have; none if they have not, or if it is not known yet why.
    fn end(&mut self, rank: &Rank, run: &Run) -> Option<()> {
        let report = run.report()?;
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

    fn ended(&self, rank: &Rank, run: &Run) -> Option<Ended> {
        // Nothing of a dead device will ever report.
        rank.ended(run.report()?).or_else(|| self.is_dead(run).then_some(Ended::Stopped))
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
                let cause = self.world.control.why_departed(rank);
                return Some(run.silent_fault(cause.culprit(run.rank, rank), cause));
            }
            if let Some(why) = self.world.rank(run.rank).proxy_failure() {
                return Some(run.silent_fault(run.rank, Cause::Proxy(why)));
            }
        }
        if self.asked.elapsed() < SILENCE {
            return None;
        }
        self.asked = Instant::now();
        runs.iter().find_map(|run| Some(run.silent_fault(run.rank, Cause::Device(self.device_failure(run)?))))
    }

    /// A rank that is gone without having started this operation, and so never will; or in the midst of things.
    fn missing_for_good(&self, run: &Run) -> Option<usize> {
        let (control, uncounted) = (&self.world.control, self.world.uncounted.load(Ordering::Relaxed));
        let missed = |rank: &usize| match control.farewell(*rank) {
            Some(started) => !uncounted && started[Lane::of(run.kind) as usize] <= run.number,
            None => true,
        };
        control.departed().find(missed)
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
                let silent = self.ended(self.world.rank(run.rank), run).is_none();
                silent.then(|| format!("the kernels of a {} have ended without a report", run.kind))
            }
            Err(error) => Some(error.to_string()),
        }
    }

    /// A wait that outlived the deadline, once the others' are known too.
    fn expired(&mut self, runs: &[Arc<Run>]) -> Option<Fault> {
        let any = self.world.ranks.values().any(|rank| rank.fault_record().is_some());
        if self.suspected.is_none() && !any {
            return None;
        }
        let since = *self.suspected.get_or_insert_with(Instant::now);
        let running = runs.iter().any(|run| self.ended(self.world.rank(run.rank), run).is_none());
        // What else waits is not known of recordings, nor of other processes.
        let running = running || runs.is_empty() || self.world.control.mesh().is_some();
        if running && self.inquired.max(since).elapsed() < GRACE {
            return None;
        }
        self.inquired = Instant::now();
        // Kernels that are under way come to their own deadline, unless their device hangs.
        let patient = since.elapsed() < self.world.config.deadline + GRACE;
        self.blame(runs).filter(|(_, known)| *known || !patient).map(|(fault, _)| fault)
    }

    /// The fault at the end of the chain of waits, and whether it is known that it ends there: kernels have left what they
    /// waited for.
    fn blame(&self, runs: &[Arc<Run>]) -> Option<(Fault, bool)> {
        let Self { world, .. } = self;
        let first = world.ranks.values().find_map(|rank| Some((rank.rank, rank.fault_record()?)));
        let Some((reporter, record)) = first else {
            // Stopped, and no record: by the abort flag, which only a failed proxy raises by itself.
            let cause = Cause::Proxy("its kernels were told to return".into());
            return runs.first().map(|run| (run.silent_fault(run.rank, cause), true));
        };
        let (kind, wait) = record.read();
        let waits = |rank: usize| world.ranks.get(&rank).and_then(Rank::waits);
        let waits = |rank: usize| waits(rank).map_or(Answer::Later, Answer::Waits);
        let (control, lane) = (&*world.control, Lane::of(kind));
        let Last { wait, known } = Inquiry { control, rank: reporter, lane, wait, waits: &waits }.last();
        let cause = match control.has_departed(wait.peer) {
            true => control.why_departed(wait.peer),
            false => Cause::Deadline(world.config.deadline),
        };
        let rank = cause.culprit(reporter, wait.peer);
        let fault = Fault { rank, cause, reporter, kind, epoch: record.epoch, wait: Some(wait) };
        Some((fault, known))
    }
}
