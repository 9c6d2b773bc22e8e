//! One rank of a world: starts operations, hands out buffers.

#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::sync::Arc;

use super::buffer::RecvBuffer;
use super::device::StreamRef;
use super::group::Groups;
use super::input::{Combine, ExpertOutputs, Routed, Tokens, TokensAt};
use super::pending::{
    CombineKeep, CombineOperation, Combined, DispatchKeep, DispatchOperation, Dispatched, Failed, Pending,
    PlanOperation,
};
use super::start::{Io, Job, Out};
use crate::config::Config;
use crate::device::RawStream;
use crate::engine::completion::Waiter;
use crate::engine::cuda::{self, DevicePlan};
use crate::engine::pool::Pool;
use crate::engine::{Engine, World};
use crate::error::{Error, Fault, Kind, Reason, Tensor};
use crate::proto::Input;
use crate::proto::plan::{self, Plan};
use crate::wire::shape::{RowFormat, RowShape};

/// A plan, and after the first dispatch the final place of every row: what combine and a cached dispatch
/// need. Cheap to clone; it works with the communicator that made it, until that is reset.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(super) plan: PlanOf,
    config: Arc<Config>,
    rank: usize,
}

/// A plan as the engine keeps it.
#[derive(Debug, Clone)]
pub(super) enum PlanOf {
    Host(Arc<Plan>),
    /// None if there was no room: then its operation is refused, and nobody gets the handle.
    Device(Option<Arc<DevicePlan>>),
}

impl Handle {
    /// Rows this rank receives.
    pub fn num_recv_tokens(&self) -> usize {
        let local = self.config.topology().local_of(self.rank);
        match &self.plan {
            PlanOf::Host(plan) => plan.arrivals.get().map_or(0, |arrivals| arrivals.rows(local) as usize),
            PlanOf::Device(_) => self.device_counts().map_or(0, |counts| counts.rows),
        }
    }

    /// Entries for each of this rank's experts (ascending ids), each rounded up to a multiple of `alignment`.
    ///
    /// # Panics
    /// `alignment` is 0.
    pub fn num_recv_tokens_per_expert(&self, alignment: usize) -> Vec<usize> {
        let counts = match &self.plan {
            PlanOf::Host(plan) => plan.arrivals.get().map_or(&[][..], |arrivals| arrivals.experts()),
            PlanOf::Device(_) => self.device_counts().map_or(&[][..], |counts| &counts.experts),
        };
        counts.iter().map(|&count| (count as usize).next_multiple_of(alignment)).collect()
    }

    /// Tokens of this rank, T.
    pub fn num_tokens(&self) -> usize {
        match &self.plan {
            PlanOf::Host(plan) => plan.routing.tokens(),
            PlanOf::Device(plan) => plan.as_ref().map_or(0, |plan| plan.tokens),
        }
    }

    /// Entries per token, K.
    pub fn topk(&self) -> usize {
        match &self.plan {
            PlanOf::Host(plan) => plan.routing.topk(),
            PlanOf::Device(plan) => plan.as_ref().map_or(1, |plan| plan.topk),
        }
    }

    /// Tokens of this rank that cross hop 1, counted once per remote node.
    pub fn num_hop1_tokens(&self) -> usize {
        let PlanOf::Host(plan) = &self.plan else {
            return self.device_counts().map_or(0, |counts| counts.sent);
        };
        let own = self.config.topology().node_of(self.rank);
        let remote = (0..self.config.topology().nodes()).filter(|&node| node != own);
        let on = |node| (0..self.config.channels()).map(move |channel| (channel, node));
        remote.flat_map(on).map(|(c, node)| plan.sends.targets(&self.config, c, node).len()).sum()
    }

    fn device_counts(&self) -> Option<&cuda::Counts> {
        let PlanOf::Device(Some(plan)) = &self.plan else { return None };
        plan.counts.get()
    }

    /// Who made it, and when.
    fn origin(&self) -> Option<(u64, u16)> {
        match &self.plan {
            PlanOf::Host(plan) => Some((plan.communicator, plan.generation)),
            PlanOf::Device(plan) => plan.as_ref().map(|plan| (plan.communicator, plan.generation)),
        }
    }
}

/// While any of these lives, the rank is present; with the last one it departs.
pub(crate) struct Presence {
    world: World,
    rank: usize,
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.world.depart(self.rank);
    }
}

/// An operation under way, whoever runs it.
pub(crate) struct Started {
    pub waiter: Waiter,
    /// The kernels, on a CUDA engine.
    pub on_device: Option<(Arc<cuda::World>, Arc<cuda::Run>)>,
}

impl Started {
    pub fn before(&self, stream: StreamRef) -> Result<(), Error> {
        let Some((world, run)) = &self.on_device else { return Ok(()) };
        // SAFETY: the stream is alive by the contract of `StreamRef::from_raw`.
        unsafe { world.before(run, stream.0) }
    }
}

/// One rank of a world.
///
/// Operations start in the same order on every rank. Each has a blocking form and a split one: `start_…`
/// returns a [`Pending`] that the engine works on while the caller computes. Plans and dispatches run one
/// after the other, so do combines; a dispatch and a combine may be under way together.
///
/// The backward of dispatch is [`Communicator::combine`] (of the gradients of the received rows, and
/// [`Combine::with_topk_weights`] for those of the weights); the backward of combine is
/// [`Communicator::dispatch`] with the same handle.
pub struct Communicator {
    rank: usize,
    id: u64,
    pub(super) generation: u16,
    pub(super) epoch: u64,
    pub(super) turns: [u64; 2],
    /// The caller's stream for what is started next.
    pub(super) stream: Option<RawStream>,
    pub(super) pool: Arc<Pool>,
    pub(super) groups: Groups,
    presence: Arc<Presence>,
    engine: Arc<Engine>,
    pub(super) world: World,
}

impl Communicator {
    pub(crate) fn new(engine: &Arc<Engine>, id: u64, rank: usize) -> Self {
        let world = engine.world();
        Self {
            rank,
            id,
            generation: world.control().generation(),
            epoch: 0,
            turns: [0; 2],
            stream: None,
            pool: Arc::new(Pool::new(world.map(), world.control().clone())),
            groups: Groups::default(),
            presence: Arc::new(Presence { world: world.clone(), rank }),
            engine: engine.clone(),
            world,
        }
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The configuration of the world.
    pub fn config(&self) -> &Config {
        self.world.config()
    }

    /// A buffer for `rows` rows of `shape` from the pool.
    ///
    /// # Errors
    /// [`Error::PoolExhausted`]; [`Error::Refused`] if rings could not carry rows of this shape.
    pub fn recv_buffer(&self, rows: usize, shape: RowShape) -> Result<RecvBuffer, Error> {
        shape.check(self.config()).map_err(|reason| Error::Refused { rank: self.rank, reason })?;
        RecvBuffer::new((&self.world, self.rank), &self.pool, self.id, rows, shape)
    }

    /// Enqueues what is started from now on, on `stream` (none: on streams of the engine's own, one for dispatches and
    /// one for combines). Operations of one kind stay in order whatever streams they are on. Without effect on a host
    /// engine.
    pub fn use_stream(&mut self, stream: Option<StreamRef>) {
        self.stream = stream.map(|stream| stream.0);
    }

    /// Makes what is started from now on wait for all that is on `stream` by now: for kernels of the caller's that
    /// make its input. On a host engine there are no streams, and nothing to do.
    ///
    /// # Errors
    /// The device has failed.
    pub fn after(&mut self, stream: StreamRef) -> Result<(), Error> {
        match &self.world {
            World::Host(_) => Ok(()),
            // SAFETY: the streams are alive by the contract of `StreamRef::from_raw`.
            World::Cuda(world) => unsafe { world.after(self.rank, stream.0, self.stream) },
        }
    }

    /// Exchanges counts: after it every rank knows how many rows it receives, and where each goes.
    ///
    /// # Errors
    /// See [`Pending::wait`].
    pub fn plan<'a>(&mut self, routing: impl Into<Routed<'a>>) -> Result<Handle, Error> {
        Ok(self.start_plan(routing).wait()?)
    }

    /// The split form of [`Communicator::plan`].
    pub fn start_plan<'a>(&mut self, routing: impl Into<Routed<'a>>) -> Pending<PlanOperation> {
        let routing = routing.into();
        let (handle, poison) = self.new_plan(&routing);
        let shape = RowShape { hidden: 0, topk: handle.topk(), format: RowFormat::Bf16 };
        let job = Job { kind: Kind::Plan, shape, weights: 0, poison, handle: &handle, buffer: None };
        // SAFETY: there is nothing to keep in place.
        let started = unsafe { self.start(job, Io::of(&routing), Arc::new(())) };
        self.pending(started, PlanOperation { handle })
    }

    /// Sends `x` [T, hidden] by the plan of `handle` into every rank's `buffer`. The first dispatch with a
    /// handle makes it ready for combine; later ones are cached dispatches and cost no counts.
    ///
    /// # Errors
    /// See [`Pending::wait`].
    pub fn dispatch<X: Tokens>(
        &mut self,
        handle: &Handle,
        x: X,
        buffer: RecvBuffer,
    ) -> Result<Dispatched<X>, Failed<(X, Option<RecvBuffer>)>> {
        self.start_dispatch(handle, x, buffer).wait()
    }

    /// The split form of [`Communicator::dispatch`].
    pub fn start_dispatch<X: Tokens>(
        &mut self,
        handle: &Handle,
        x: X,
        buffer: RecvBuffer,
    ) -> Pending<DispatchOperation<X>> {
        let poison = self.check_handle(handle).err();
        self.start_rows(Kind::Dispatch, (handle.clone(), poison), Io::default(), x, buffer)
    }

    /// Plan and dispatch in one operation: hop 1 overlaps the exchange of counts. `buffer` must hold what
    /// comes, which is not known before; a rank whose buffer is too small fails the operation on all.
    ///
    /// # Errors
    /// See [`Pending::wait`].
    pub fn plan_dispatch<'a, X: Tokens>(
        &mut self,
        routing: impl Into<Routed<'a>>,
        x: X,
        buffer: RecvBuffer,
    ) -> Result<Dispatched<X>, Failed<(X, Option<RecvBuffer>)>> {
        self.start_plan_dispatch(routing, x, buffer).wait()
    }

    /// The split form of [`Communicator::plan_dispatch`].
    pub fn start_plan_dispatch<'a, X: Tokens>(
        &mut self,
        routing: impl Into<Routed<'a>>,
        x: X,
        buffer: RecvBuffer,
    ) -> Pending<DispatchOperation<X>> {
        let routing = routing.into();
        let (handle, poison) = self.new_plan(&routing);
        self.start_rows(Kind::PlanDispatch, (handle, poison), Io::of(&routing), x, buffer)
    }

    fn start_rows<X: Tokens>(
        &mut self,
        kind: Kind,
        (handle, poison): (Handle, Option<Reason>),
        io: Io<'_>,
        x: X,
        mut buffer: RecvBuffer,
    ) -> Pending<DispatchOperation<X>> {
        let shape = buffer.shape();
        let poison = poison.or_else(|| self.check_tokens(&handle, &x, &buffer).err());
        let settled = buffer.settle();
        let kept = Arc::new(DispatchKeep { x, buffer });
        let job = Job { kind, shape, weights: 0, poison, handle: &handle, buffer: Some(&kept.buffer) };
        let io = Io { rows: kept.x.view(), ..io };
        let started = match settled {
            // SAFETY: `kept` owns the tokens and is kept by the operation; nobody has them mutably, for `kept` is
            // shared from here until that is over.
            Ok(()) => unsafe { self.start(job, io, kept.clone()) },
            Err(error) => Started::failed(kept.clone(), error),
        };
        drop(kept);
        self.pending(started, DispatchOperation { handle, _input: PhantomData })
    }

    /// Brings the experts' outputs home and sums them: for each token, the rows of a node in ascending local
    /// rank, the nodes in ascending order, then the bias.
    ///
    /// # Errors
    /// See [`Pending::wait`].
    pub fn combine<Y: ExpertOutputs>(
        &mut self,
        handle: &Handle,
        input: Combine<Y>,
    ) -> Result<Combined<Y>, Failed<Option<Combine<Y>>>> {
        self.start_combine(handle, input).wait()
    }

    /// The split form of [`Communicator::combine`].
    pub fn start_combine<Y: ExpertOutputs>(
        &mut self,
        handle: &Handle,
        mut input: Combine<Y>,
    ) -> Pending<CombineOperation<Y>> {
        let topk = handle.topk();
        let (mut copied, mut poison) = match input.outputs.in_place() {
            Some(_) => (None, None),
            None => match input.outputs.copied(self, topk) {
                Ok(buffer) => (Some(buffer), None),
                Err(reason) => (None, Some(reason)),
            },
        };
        if let Some(buffer) = &copied {
            let bytes = buffer.rows() * buffer.shape().row_bytes();
            tracing::debug!(rank = self.rank, bytes, "expert outputs copied to where peers can read them");
        }
        let mut buffer = copied.as_mut().or(input.outputs.in_place());
        let settled = buffer.as_mut().map_or(Ok(()), |buffer| buffer.settle());
        let shape =
            buffer.as_ref().map_or(RowShape { hidden: 0, topk, format: RowFormat::Bf16 }, |b| b.shape());
        poison = poison.or_else(|| self.check_outputs(handle, buffer.as_deref()).err());
        let (elements, weights) =
            (handle.num_tokens() * shape.hidden, if input.with_weights { topk } else { 0 });
        poison = poison.or_else(|| input.check(elements, handle.num_tokens() * weights).err());
        let mut summed = Vec::new();
        if poison.is_none() {
            let on_host = |on_device: bool, elements| if on_device { 0 } else { elements };
            input.out.resize(on_host(input.on_device.out.is_some(), elements), half::bf16::ZERO);
            let weights = handle.num_tokens() * weights;
            summed.resize(on_host(input.on_device.weights.is_some(), weights), 0.0);
        }
        let (bias, out) = (input.bias.clone(), Out::of(&mut input, &mut summed));
        let on_device = input.on_device.bias_rows();
        let rows = bias.as_deref().map_or(on_device, |bias| TokensAt::Host(Input::Bf16(bias)));
        let kept = Arc::new(CombineKeep { input, copied, weights: summed });
        let buffer = kept.buffer();
        let job = Job { kind: Kind::Combine, shape, weights, poison, handle, buffer };
        let started = match settled {
            // SAFETY: bias and output buffers live on the heap, owned by what the operation keeps; moving their owners
            // has not moved them, and nobody touches them before it is over.
            Ok(()) => unsafe { self.start(job, Io { rows, out, ..Io::default() }, kept.clone()) },
            Err(error) => Started::failed(kept.clone(), error),
        };
        drop(kept);
        self.pending(started, CombineOperation { _outputs: PhantomData })
    }

    /// `x` can be sent by the plan of `handle` into `buffer`.
    pub(super) fn check_tokens(
        &self,
        handle: &Handle,
        x: &impl Tokens,
        buffer: &RecvBuffer,
    ) -> Result<(), Reason> {
        self.check_buffer(buffer)?;
        let shape = buffer.shape();
        Tensor::TopkIdx.check_size(handle.topk(), shape.topk)?;
        x.check(handle.num_tokens(), &shape)
    }

    fn check_outputs(&self, handle: &Handle, buffer: Option<&RecvBuffer>) -> Result<(), Reason> {
        self.check_handle(handle)?;
        // Kernels know by themselves.
        if matches!(&handle.plan, PlanOf::Host(plan) if !plan.is_dispatched()) {
            return Err(Reason::NotDispatched);
        }
        let buffer = buffer.ok_or(Reason::FormatMismatch)?;
        self.check_summable(handle, buffer)?;
        let hidden = buffer.shape().hidden;
        Tensor::ExpertOutputs.check_size(handle.num_recv_tokens() * hidden, buffer.rows() * hidden)
    }

    /// Rows like those of `buffer` can be summed by the plan of `handle`.
    pub(super) fn check_summable(&self, handle: &Handle, buffer: &RecvBuffer) -> Result<(), Reason> {
        self.check_buffer(buffer)?;
        let RowShape { topk, format, .. } = buffer.shape();
        if format != RowFormat::Bf16 {
            return Err(Reason::FormatMismatch);
        }
        Tensor::TopkIdx.check_size(handle.topk(), topk)
    }

    /// The fault that poisons the communicator, once this rank has heard of it: faults of other processes take a moment.
    pub fn fault(&self) -> Option<Arc<Fault>> {
        self.world.control().fault()
    }

    /// After a fault: meets all ranks of the world, stops what is left of the old operations and makes the
    /// communicator usable again. Handles made before are stale; retired memory is lent again.
    ///
    /// # Errors
    /// [`Error::ResetIncomplete`] names the ranks that did not call it within the deadline, or that have left.
    pub fn reset(&mut self) -> Result<(), Error> {
        self.world.reset(self.rank)?;
        self.generation = self.world.control().generation();
        (self.epoch, self.turns) = (0, [0; 2]);
        self.pool.revive();
        Ok(())
    }

    pub(super) fn new_plan(&self, routing: &Routed<'_>) -> (Handle, Option<Reason>) {
        let (plan, poison) = match &self.world {
            World::Host(world) => self.host_plan(world, routing),
            World::Cuda(world) => self.device_plan(world, routing),
        };
        (Handle { plan, config: self.world.config().clone(), rank: self.rank }, poison)
    }

    fn host_plan(
        &self,
        world: &crate::engine::host::World,
        routing: &Routed<'_>,
    ) -> (PlanOf, Option<Reason>) {
        let (topk, checked) = match routing {
            Routed::Host(routing) => {
                let weights = routing.topk_weights.into();
                (routing.topk, plan::Routing::new(&world.config, routing.topk, routing.topk_idx, weights))
            }
            Routed::Device(routing) => (routing.topk, Err(Reason::WrongMemory)),
        };
        let poison = checked.as_ref().err().copied();
        let routing = checked.unwrap_or_else(|_| plan::Routing::empty(topk));
        let id = (self.id, self.generation, self.epoch);
        (PlanOf::Host(Arc::new(Plan::new(&world.config, world.map.counts(), id, routing))), poison)
    }

    fn device_plan(&self, world: &cuda::World, routing: &Routed<'_>) -> (PlanOf, Option<Reason>) {
        let checked = routing.check(&world.config);
        let tokens = checked.unwrap_or(0);
        // A plan of a refused routing holds nothing, and any number of entries will do.
        let topk = if checked.is_ok() { routing.topk() } else { 1 };
        match DevicePlan::new(&world.config, &self.pool, (self.id, self.generation), tokens, topk) {
            Ok(plan) => (PlanOf::Device(Some(Arc::new(plan))), checked.err()),
            Err(error) => (PlanOf::Device(None), checked.err().or(Some(error.for_peers()))),
        }
    }

    /// The plan of `handle` on this rank's device, if it is of use.
    pub(super) fn device_plan_of(&self, handle: &Handle) -> Option<Arc<DevicePlan>> {
        let PlanOf::Device(plan) = &handle.plan else { return None };
        plan.clone().filter(|_| self.check_handle(handle).is_ok())
    }

    pub(super) fn check_handle(&self, handle: &Handle) -> Result<(), Reason> {
        let Some((communicator, generation)) = handle.origin() else { return Err(Reason::Foreign) };
        if communicator != self.id || handle.rank != self.rank {
            return Err(Reason::Foreign);
        }
        match generation == self.generation {
            true => Ok(()),
            false => Err(Reason::StaleHandle),
        }
    }

    pub(super) fn check_buffer(&self, buffer: &RecvBuffer) -> Result<(), Reason> {
        match buffer.communicator == self.id && Arc::ptr_eq(buffer.pool(), &self.pool) {
            true => Ok(()),
            false => Err(Reason::Foreign),
        }
    }

    pub(super) fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    fn pending<O>(&self, started: Started, operation: O) -> Pending<O> {
        Pending { started, operation, _presence: self.presence.clone(), _engine: self.engine.clone() }
    }
}
