//! Starting an operation: its parameters are filled, its kernels enqueued.

#![allow(unsafe_code)]

use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytemuck::bytes_of;

use super::World;
use super::plan::DevicePlan;
use super::rank::{Grids, LaneQueue, Rank, Slot, check_shared};
use super::request::{Request, Staged};
use crate::device::{Kernel, RawStream};
use crate::engine::completion::{Completion, Waiter, lock};
use crate::engine::pool::{Block, Pool};
use crate::error::{Cause, ConfigError, DeviceError, Error, Fault, Kind};
use crate::wire::device::HandleMap;
use crate::wire::kernel::{Operation, Params};
use crate::wire::region::{LANES, Lane};
use crate::wire::shape::{RowFormat, RowShape};

/// An operation whose kernels have been enqueued.
pub struct Run {
    pub(super) rank: usize,
    pub(super) kind: Kind,
    /// Number of the operation on its lane in this generation, as the host counts.
    pub(super) number: u64,
    /// Until it is over.
    pub(super) slot: Mutex<Option<Slot>>,
    pub(super) plan: Option<Arc<DevicePlan>>,
    pub(super) completion: Arc<Completion>,
    pub(super) enqueued: Instant,
    /// Inputs that were copied.
    _blocks: Vec<Block>,
}

/// The caller's end of an operation on a device.
pub struct Started {
    /// Who waits for it.
    pub waiter: Waiter,
    /// None if nothing was enqueued.
    pub run: Option<Arc<Run>>,
}

impl World {
    /// Starts an operation at `rank`. Whatever becomes of it is its result.
    ///
    /// # Safety
    /// Host sinks of the request stay where they are, untouched by anybody else, until the operation is over and has
    /// been waited for, or nobody waits any more. What lies on the device holds what the kernels read and write there,
    /// until the operation is over.
    pub unsafe fn start(
        self: &Arc<Self>,
        rank: usize,
        pool: &Arc<Pool>,
        mut request: Request<'_>,
    ) -> Started {
        let fail = |keep, error| Started { waiter: Waiter::failed(keep, error), run: None };
        if let Some(fault) = self.control.fault() {
            return fail(request.keep, Error::Fault(fault));
        }
        if request.poison.is_some() {
            request.withhold();
        }
        // SAFETY: the caller's.
        let mut staged = unsafe { self.stage(rank, pool, &request) };
        if let Err(error @ Error::PoolExhausted { .. }) = &staged {
            request.poison = Some(error.for_peers());
            request.withhold();
            // SAFETY: as above; nothing is left to be staged.
            staged = unsafe { self.stage(rank, pool, &request) };
        }
        let keep = request.keep.clone();
        // SAFETY: the caller's.
        match staged.and_then(|staged| unsafe { self.enqueue(rank, request, staged) }) {
            Ok(run) => {
                drop(keep);
                self.rank(rank).wake_proxy();
                self.bell.ring();
                Started { waiter: Waiter::new(run.completion.clone()), run: Some(run) }
            }
            Err(error) => fail(keep, self.failed(rank, error)),
        }
    }

    /// A rank that can't enqueue will be missed by all others: they need not wait for their deadline.
    fn failed(&self, rank: usize, error: Error) -> Error {
        let Error::Device(error) = error else { return error };
        let cause = Cause::Device(error.to_string());
        let fault = Fault { rank, cause, reporter: rank, kind: Kind::Plan, epoch: 0, wait: None };
        self.control.broadcast(fault, self.control.generation());
        self.abort();
        Error::Device(error)
    }

    /// # Safety
    /// As for [`World::start`].
    unsafe fn enqueue(&self, rank: usize, request: Request<'_>, staged: Staged) -> Result<Arc<Run>, Error> {
        let this = self.rank(rank);
        let lane = Lane::of(request.kind);
        let launch = self.launch_of(this, request.kind, &request.shape)?;
        let slot = this.take_slot(self.config.deadline)?;
        let params = self.params(this, &request, &staged, (slot.report, &launch));
        let completion = Arc::new(Completion::with_fetch(request.keep, staged.fetch));
        let mut queue = lock(this.lane(lane));
        let stream = request.stream.unwrap_or(this.stream(lane));
        // SAFETY: the parameters are those of this rank's memory, which stays as long as the world; what else they
        // name is the run's, or the caller's by contract.
        unsafe {
            self.follow(this, &queue, stream)?;
            if !self.cuda.overlap {
                let other = LANES.into_iter().find(|&other| other != lane).expect("there are two");
                self.follow(this, &lock(this.lane(other)), stream)?;
            }
            launch.enqueue(this, stream, &params)?;
            this.driver.record(slot.event.raw(), stream)?;
        }
        let run = Arc::new(Run {
            rank,
            kind: request.kind,
            number: queue.started,
            slot: Mutex::new(Some(slot)),
            plan: request.plan,
            completion,
            enqueued: Instant::now(),
            _blocks: staged.blocks,
        });
        queue.started += 1;
        queue.stream = Some(stream);
        queue.runs.push_back(run.clone());
        tracing::debug!(rank, kind = %run.kind, number = run.number, "operation enqueued");
        Ok(run)
    }

    /// How an operation on rows of `shape` is launched.
    ///
    /// # Errors
    /// Its rows don't fit shared memory: seen before anything is enqueued that peers would wait for.
    pub(super) fn launch_of(&self, rank: &Rank, kind: Kind, shape: &RowShape) -> Result<Launch, ConfigError> {
        let (shape, lane) = (valid(&self.config, shape), Lane::of(kind));
        let grids = Grids::new(&self.config, &self.cuda, lane, &shape);
        check_shared(grids.rows, rank.driver.limits().shared)?;
        Ok(Launch { kind, shape, grids })
    }

    /// Makes what is enqueued next on `stream` come after the last operation of a lane.
    ///
    /// # Safety
    /// The stream is alive.
    unsafe fn follow(&self, rank: &Rank, queue: &LaneQueue, stream: RawStream) -> Result<(), DeviceError> {
        let Some(last) = queue.runs.back().filter(|_| queue.stream != Some(stream)) else { return Ok(()) };
        match &*lock(&last.slot) {
            // SAFETY: the caller's; an event lives as long as its slot.
            Some(slot) => unsafe { rank.driver.wait(stream, slot.event.raw()) },
            // It is over.
            None => Ok(()),
        }
    }

    /// Makes what `rank` starts from now on (on `own`, or on the engine's streams) wait for all that is on `stream`.
    ///
    /// # Errors
    /// The device has failed.
    ///
    /// # Safety
    /// The streams are alive.
    pub unsafe fn after(&self, rank: usize, stream: RawStream, own: Option<RawStream>) -> Result<(), Error> {
        let this = self.rank(rank);
        let mark = lock(&this.mark);
        let waiting = own.map_or(LANES.map(|lane| this.stream(lane)).to_vec(), |own| vec![own]);
        // SAFETY: the caller's; a wait is for the mark as it is now, so it may be set again.
        unsafe {
            this.driver.record(mark.raw(), stream)?;
            waiting.into_iter().try_for_each(|waiting| this.driver.wait(waiting, mark.raw()))?;
        }
        Ok(())
    }

    /// Makes `stream` wait for `run`.
    ///
    /// # Errors
    /// The device has failed.
    ///
    /// # Safety
    /// The stream is alive.
    pub unsafe fn before(&self, run: &Run, stream: RawStream) -> Result<(), Error> {
        // Without a slot it is over.
        let Some(slot) = &*lock(&run.slot) else { return Ok(()) };
        // SAFETY: the caller's.
        unsafe { self.rank(run.rank).driver.wait(stream, slot.event.raw()) }.map_err(Error::from)
    }

    pub(super) fn params(
        &self,
        rank: &Rank,
        request: &Request<'_>,
        staged: &Staged,
        (report, launch): (usize, &Launch),
    ) -> Params {
        let (lane, shape) = (Lane::of(launch.kind), launch.shape);
        let blank = HandleMap::new(&self.config, 0, shape.topk, 0);
        let (map, handle, tokens) = match &request.plan {
            Some(plan) => (&plan.map, self.address(rank.rank, plan.offset()), plan.tokens),
            None => (&blank, rank.blank(lane), 0),
        };
        let operation = Operation {
            kind: request.kind,
            rank: rank.rank,
            generation: self.control.generation(),
            shape,
            tokens,
            topk_idx: staged.topk_idx,
            topk_weights: staged.topk_weights,
            input: staged.input,
            weights: request.weights,
            poison: request.poison,
            capacity: request.buffer.0,
            parts: request.buffer.1,
            handle: (map, handle),
            warp: launch.grids.warp,
            report,
        };
        Params::new(rank.maps(), &rank.addresses, &operation)
    }
}

/// How the kernels of an operation are launched.
pub struct Launch {
    pub(super) kind: Kind,
    shape: RowShape,
    grids: Grids,
}

impl Launch {
    /// Enqueues the kernels.
    ///
    /// # Safety
    /// As for [`crate::device::Driver::launch`].
    pub(super) unsafe fn enqueue(
        &self,
        rank: &Rank,
        stream: RawStream,
        params: &Params,
    ) -> Result<(), DeviceError> {
        let rows = match self.kind {
            Kind::Plan => None,
            Kind::Dispatch | Kind::PlanDispatch => Some(Kernel::Dispatch),
            Kind::Combine => Some(Kernel::Combine),
        };
        let (driver, Grids { plan, rows: grid, .. }) = (&rank.driver, &self.grids);
        // SAFETY: the caller's.
        unsafe {
            driver.launch(stream, Kernel::Plan, *plan, bytes_of(params))?;
            rows.map_or(Ok(()), |kernel| driver.launch(stream, kernel, *grid, bytes_of(params)))
        }
    }
}

impl Request<'_> {
    /// Takes back what is of no use with invalid input, so that nothing is copied for it.
    fn withhold(&mut self) {
        use super::request::{Sink, Source};
        (self.topk_idx, self.topk_weights) = (Source::None, Source::None);
        (self.x, self.scales, self.bias) = (Source::None, Source::None, Source::None);
        (self.out, self.out_weights) = (Sink::None, Sink::None);
    }
}

impl Run {
    /// Which report is its own; none once it is over.
    pub(super) fn report(&self) -> Option<usize> {
        lock(&self.slot).as_ref().map(|slot| slot.report)
    }

    /// The fault that ends it if nothing better is known.
    pub(super) fn silent_fault(&self, rank: usize, cause: Cause) -> Fault {
        let (kind, epoch) = (self.kind, self.number);
        Fault { rank, cause, reporter: self.rank, kind, epoch, wait: None }
    }
}

/// `shape`, or one that can be launched where it is refused anyway: then its rows never move.
fn valid(config: &crate::config::Config, shape: &RowShape) -> RowShape {
    match shape.hidden == 0 || shape.check(config).is_ok() {
        true => *shape,
        false => RowShape { hidden: 0, topk: shape.topk.clamp(1, config.max_topk), format: RowFormat::Bf16 },
    }
}
