//! Operations that are enqueued again and again as they are, by the host or by a captured graph: kernels alone know which
//! one it is.

#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::plan::DevicePlan;
use super::rank::Slot;
use super::report::Ended;
use super::request::Request;
use super::start::Launch;
use super::{Counts, World};
use crate::device::RawStream;
use crate::engine::completion::lock;
use crate::engine::pool::Pool;
use crate::error::{Error, Reason};
use crate::wire::kernel::Params;
use crate::wire::region::Lane;

/// An operation of one rank, ready to be enqueued. It owns nothing of the caller's.
pub struct Recording {
    world: Arc<World>,
    rank: usize,
    launch: Launch,
    generation: u16,
    params: Params,
    /// Until it is dropped.
    slot: Option<Slot>,
    _plan: Option<Arc<DevicePlan>>,
}

impl World {
    /// Prepares what `request` asks for; all its rows lie on the device.
    ///
    /// # Errors
    /// [`Error::Refused`] if the input is invalid or rows lie on the host; a fault of the world.
    ///
    /// # Safety
    /// What the request names stays there as long as any execution of the recording.
    pub unsafe fn record(
        self: &Arc<Self>,
        rank: usize,
        pool: &Arc<Pool>,
        request: Request<'_>,
    ) -> Result<Recording, Error> {
        if let Some(fault) = self.control.fault() {
            return Err(Error::Fault(fault));
        }
        let this = self.rank(rank);
        let launch = self.launch_of(this, request.kind, &request.shape)?;
        let wrong = request.poison.or(request.is_on_host().then_some(Reason::WrongMemory));
        if let Some(reason) = wrong {
            return Err(Error::Refused { rank, reason });
        }
        // SAFETY: nothing lies on the host.
        let staged = unsafe { self.stage(rank, pool, &request)? };
        let slot = this.take_slot(self.config.deadline)?;
        self.recordings.fetch_add(1, Ordering::Relaxed);
        self.uncounted.store(true, Ordering::Relaxed);
        self.bell.ring();
        Ok(Recording {
            world: self.clone(),
            rank,
            generation: self.control.generation(),
            params: self.params(this, &request, &staged, (slot.report, &launch)),
            launch,
            slot: Some(slot),
            _plan: request.plan,
        })
    }
}

impl Recording {
    fn report(&self) -> usize {
        self.slot.as_ref().expect("until it is dropped").report
    }

    /// Enqueues the operation's kernels on `stream`, and nothing else.
    ///
    /// # Errors
    /// A fault of the world, a reset since it was recorded, or the device refuses.
    ///
    /// # Safety
    /// The stream is alive; all executions end before the recording is dropped; operations of its lane are ordered.
    pub unsafe fn enqueue(&self, stream: RawStream) -> Result<(), Error> {
        let (world, rank) = (&self.world, self.rank);
        if let Some(fault) = world.control.fault() {
            return Err(Error::Fault(fault));
        }
        if world.control.generation() != self.generation {
            return Err(Error::Refused { rank, reason: Reason::StaleHandle });
        }
        let this = world.rank(rank);
        // In order with what else is launched for the lane.
        let _queue = lock(this.lane(Lane::of(self.launch.kind)));
        // SAFETY: the caller's.
        unsafe { self.launch.enqueue(this, stream, &self.params)? };
        this.wake_proxy();
        Ok(())
    }

    /// What the last execution came to: the counts, if it is one that plans. None while there was none.
    pub fn outcome(&self) -> Option<Result<Counts, Error>> {
        let this = self.world.rank(self.rank);
        Some(match this.ended(self.report())? {
            Ended::Ok => Ok(this.counts(self.report())),
            Ended::Refused => Err(this.refusal(self.report())),
            // The monitor is about to find out why.
            Ended::Stopped => Err(Error::Fault(self.world.control.fault()?)),
        })
    }

    /// Where kernels find the number of rows that the rank receives, a u64.
    pub fn rows_address(&self) -> u64 {
        self.params.plan_rows + 8 * u64::from(self.params.local)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.world.rank(self.rank).give_slot(slot);
        }
        self.world.recordings.fetch_sub(1, Ordering::Relaxed);
    }
}
