//! Operations without the host: recorded once, enqueued any number of times.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::buffer::RecvBuffer;
use super::communicator::{Communicator, Handle};
use super::device::{DeviceRouting, StreamRef};
use super::input::{Combine, ExpertOutputs, Routed, Tokens};
use super::start::{Io, Job, Out};
use crate::engine::cuda::Recording;
use crate::engine::{Engine, World};
use crate::error::{Error, Kind, Reason};

/// An operation with fixed rows and buffers, all on the device: *capacity mode*. No execution needs the host: counts
/// stay on the device, and a buffer too small for what comes makes the execution end with status and counts in
/// pinned memory, without a row moved. So it can be captured in a CUDA graph, and replayed with whatever the routing,
/// tokens or outputs are by then.
///
/// It owns what was handed in until [`Recorded::finish`].
pub struct Recorded<K> {
    // Dropped before what its kernels use.
    recording: Recording,
    handle: Handle,
    kept: K,
    _engine: Arc<Engine>,
}

impl<K> Recorded<K> {
    /// Enqueues one execution on `stream`, which may be capturing. Kernels are all that is enqueued.
    ///
    /// # Errors
    /// The communicator is poisoned or was reset, or the device refuses; nothing was enqueued.
    ///
    /// # Safety
    /// The stream lives, and so does `self`, until every execution has ended, those of graphs included. Every rank
    /// executes the same operations of a kind (plans and dispatches, combines) in the same order, one after the other.
    pub unsafe fn enqueue(&self, stream: StreamRef) -> Result<(), Error> {
        // SAFETY: the caller's.
        unsafe { self.recording.enqueue(stream.0) }
    }

    /// What the last execution that ended came to: the rows that this rank receives. None before the first, and while
    /// it is not known yet who is to blame for a fault.
    pub fn outcome(&self) -> Option<Result<usize, Error>> {
        Some(self.recording.outcome()?.map(|counts| counts.rows))
    }

    /// Where kernels find the number of rows that this rank receives: a u64 in device memory, valid after an
    /// execution.
    pub fn rows_address(&self) -> u64 {
        self.recording.rows_address()
    }

    /// The plan, for operations that are recorded after this one.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// What was handed in. A buffer that the host has looked at before needs a [`RecvBuffer::refresh`] to show a later
    /// execution's rows.
    pub fn kept(&mut self) -> &mut K {
        &mut self.kept
    }

    /// Gives back what was handed in.
    ///
    /// # Safety
    /// Every execution has ended, and there will be no other: no graph that holds one is left.
    pub unsafe fn finish(self) -> K {
        self.kept
    }
}

impl Communicator {
    /// Records a plan and dispatch of `x` into `buffer`. At most [`RecvBuffer::capacity`] rows are received.
    ///
    /// # Errors
    /// [`Error::Refused`]: invalid input, or a host engine.
    pub fn record_plan_dispatch<X: Tokens>(
        &mut self,
        routing: DeviceRouting,
        x: X,
        buffer: RecvBuffer,
    ) -> Result<Recorded<(DeviceRouting, X, RecvBuffer)>, Error> {
        let routed = Routed::Device(routing.clone());
        let (handle, poison) = self.new_plan(&routed);
        let kept = (x, buffer);
        let io = Io::of(&routed);
        let recorded = self.record_rows(Kind::PlanDispatch, (handle, poison), io, kept)?;
        let Recorded { recording, handle, kept: (x, buffer), _engine } = recorded;
        Ok(Recorded { recording, handle, kept: (routing, x, buffer), _engine })
    }

    /// Records a dispatch of `x` into `buffer` by the plan of `handle`.
    ///
    /// # Errors
    /// [`Error::Refused`]: invalid input, or a host engine.
    pub fn record_dispatch<X: Tokens>(
        &mut self,
        handle: &Handle,
        x: X,
        buffer: RecvBuffer,
    ) -> Result<Recorded<(X, RecvBuffer)>, Error> {
        let poison = self.check_handle(handle).err();
        self.record_rows(Kind::Dispatch, (handle.clone(), poison), Io::default(), (x, buffer))
    }

    fn record_rows<X: Tokens>(
        &mut self,
        kind: Kind,
        (handle, poison): (Handle, Option<Reason>),
        io: Io<'_>,
        (x, mut buffer): (X, RecvBuffer),
    ) -> Result<Recorded<(X, RecvBuffer)>, Error> {
        buffer.settle()?;
        let shape = buffer.shape();
        let poison = poison.or_else(|| self.check_tokens(&handle, &x, &buffer).err());
        let job = Job { kind, shape, weights: 0, poison, handle: &handle, buffer: Some(&buffer) };
        let recording = self.record(job, Io { rows: x.view(), ..io })?;
        // Rows that executions deliver are as many as the buffer holds, at most.
        buffer.set_rows(buffer.capacity());
        Ok(Recorded { recording, handle, kept: (x, buffer), _engine: self.engine().clone() })
    }

    /// Records a combine of the experts' outputs by the plan of `handle`. Results go to device memory
    /// ([`Combine::device_out`]).
    ///
    /// # Errors
    /// [`Error::Refused`]: invalid input, or a host engine.
    pub fn record_combine<Y: ExpertOutputs>(
        &mut self,
        handle: &Handle,
        mut input: Combine<Y>,
    ) -> Result<Recorded<Combine<Y>>, Error> {
        let refused = |reason| Error::Refused { rank: self.rank(), reason };
        let Some(buffer) = input.outputs.in_place() else { return Err(refused(Reason::WrongMemory)) };
        buffer.settle()?;
        // As many rows are read as were dispatched.
        buffer.set_rows(buffer.capacity());
        let shape = buffer.shape();
        self.check_handle(handle).and_then(|()| self.check_summable(handle, buffer)).map_err(refused)?;
        let weights = if input.with_weights { handle.topk() } else { 0 };
        let tokens = handle.num_tokens();
        input.check(tokens * shape.hidden, tokens * weights).map_err(refused)?;
        let lacks_out =
            tokens > 0 && (input.on_device.out.is_none() || weights > 0 && input.on_device.weights.is_none());
        if lacks_out || input.bias.is_some() {
            return Err(refused(Reason::WrongMemory));
        }
        let out = Out::of(&mut input, &mut []);
        let rows = input.on_device.bias_rows();
        let buffer = input.outputs.buffer();
        let job = Job { kind: Kind::Combine, shape, weights, poison: None, handle, buffer };
        let recording = self.record(job, Io { rows, out, ..Io::default() })?;
        Ok(Recorded { recording, handle: handle.clone(), kept: input, _engine: self.engine().clone() })
    }

    fn record(&self, job: Job<'_>, io: Io<'_>) -> Result<Recording, Error> {
        let refused = |reason| Error::Refused { rank: self.rank(), reason };
        let World::Cuda(world) = &self.world else { return Err(refused(Reason::WrongMemory)) };
        let plan = self.device_plan_of(job.handle);
        let request = self.request(job, plan, io, Arc::new(()));
        // SAFETY: nothing is enqueued yet; what is recorded stays as long as `Recorded`, by the contract of `enqueue`
        // and of `DeviceSlice::from_raw`.
        unsafe { world.record(self.rank(), &self.pool, request) }
    }
}
