//! One rank of a world: starts operations, hands out buffers.

#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::sync::Arc;

use super::buffer::{Pool, RecvBuffer};
use super::input::{Combine, ExpertOutputs, Routing, Tokens, check_size};
use super::pending::{
    CombineKeep, CombineOperation, Combined, DispatchKeep, DispatchOperation, Dispatched, Failed, Pending,
    PlanOperation,
};
use crate::config::Config;
use crate::engine::host::{CallerBuffers, Engine, Keep, Run, Waiter, World};
use crate::error::{Error, Kind, Reason, Started, Tensor};
use crate::proto::plan::{self, Plan};
use crate::proto::{Buffer, Input, Op, OpSpec};
use crate::wire::region::Lane;
use crate::wire::shape::{RowFormat, RowShape};

/// A plan, and after the first dispatch the final place of every row: what combine and a cached dispatch
/// need. Cheap to clone; it works with the communicator that made it, until that is reset.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(crate) plan: Arc<Plan>,
    config: Arc<Config>,
    rank: usize,
}

impl Handle {
    /// Rows this rank receives.
    pub fn num_recv_tokens(&self) -> usize {
        let local = self.config.topology().local_of(self.rank);
        self.plan.arrivals.get().map_or(0, |arrivals| arrivals.rows(local) as usize)
    }

    /// Entries for each of this rank's experts (ascending ids), each rounded up to a multiple of `alignment`.
    ///
    /// # Panics
    /// `alignment` is 0.
    pub fn num_recv_tokens_per_expert(&self, alignment: usize) -> Vec<usize> {
        let counts = self.plan.arrivals.get().map_or(&[][..], |arrivals| arrivals.experts());
        counts.iter().map(|&count| (count as usize).next_multiple_of(alignment)).collect()
    }

    /// Tokens of this rank, T.
    pub fn num_tokens(&self) -> usize {
        self.plan.routing.tokens()
    }

    /// Entries per token, K.
    pub fn topk(&self) -> usize {
        self.plan.routing.topk()
    }

    /// Tokens of this rank that cross hop 1, counted once per remote node.
    pub fn num_hop1_tokens(&self) -> usize {
        let own = self.config.topology().node_of(self.rank);
        let remote = (0..self.config.topology().nodes()).filter(|&node| node != own);
        let on = |node| (0..self.config.channels()).map(move |channel| (channel, node));
        remote.flat_map(on).map(|(c, node)| self.plan.sends.targets(&self.config, c, node).len()).sum()
    }
}

/// While any of these lives, the rank is present; with the last one it departs.
pub(crate) struct Presence {
    world: Arc<World>,
    rank: usize,
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.world.depart(self.rank);
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
    generation: u16,
    epoch: u64,
    turns: [u64; 2],
    agreement: u64,
    pool: Arc<Pool>,
    presence: Arc<Presence>,
    engine: Arc<Engine>,
}

impl Communicator {
    pub(crate) fn new(engine: &Arc<Engine>, id: u64, rank: usize) -> Self {
        let world = engine.world();
        Self {
            rank,
            id,
            generation: world.control.generation(),
            epoch: 0,
            turns: [0; 2],
            agreement: world.config.agreement_hash(),
            pool: Arc::new(Pool::new(world.clone(), rank)),
            presence: Arc::new(Presence { world: world.clone(), rank }),
            engine: engine.clone(),
        }
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The configuration of the world.
    pub fn config(&self) -> &Config {
        &self.engine.world().config
    }

    /// A buffer for `rows` rows of `shape` from the pool.
    ///
    /// # Errors
    /// [`Error::PoolExhausted`]; [`Error::Refused`] if rings could not carry rows of this shape.
    pub fn recv_buffer(&self, rows: usize, shape: RowShape) -> Result<RecvBuffer, Error> {
        shape.check(self.config()).map_err(|reason| Error::Refused { rank: self.rank, reason })?;
        RecvBuffer::new(&self.pool, self.id, rows, shape)
    }

    /// Exchanges counts: after it every rank knows how many rows it receives, and where each goes.
    ///
    /// # Errors
    /// See [`Pending::wait`].
    pub fn plan(&mut self, routing: Routing<'_>) -> Result<Handle, Error> {
        Ok(self.start_plan(routing).wait()?)
    }

    /// The split form of [`Communicator::plan`].
    pub fn start_plan(&mut self, routing: Routing<'_>) -> Pending<PlanOperation> {
        let (handle, poison) = self.new_plan(routing);
        let shape = RowShape { hidden: 0, topk: handle.topk(), format: RowFormat::Bf16 };
        let spec = self.spec(Kind::Plan, &handle.plan, shape, 0, poison, None);
        let run = self.start(spec, Arc::new(()), Buffers::none());
        self.pending(run, PlanOperation { handle })
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
        self.start_rows(Kind::Dispatch, handle.clone(), x, buffer, poison)
    }

    /// Plan and dispatch in one operation: hop 1 overlaps the exchange of counts. `buffer` must hold what
    /// comes, which is not known before; a rank whose buffer is too small fails the operation on all.
    ///
    /// # Errors
    /// See [`Pending::wait`].
    pub fn plan_dispatch<X: Tokens>(
        &mut self,
        routing: Routing<'_>,
        x: X,
        buffer: RecvBuffer,
    ) -> Result<Dispatched<X>, Failed<(X, Option<RecvBuffer>)>> {
        self.start_plan_dispatch(routing, x, buffer).wait()
    }

    /// The split form of [`Communicator::plan_dispatch`].
    pub fn start_plan_dispatch<X: Tokens>(
        &mut self,
        routing: Routing<'_>,
        x: X,
        buffer: RecvBuffer,
    ) -> Pending<DispatchOperation<X>> {
        let (handle, poison) = self.new_plan(routing);
        self.start_rows(Kind::PlanDispatch, handle, x, buffer, poison)
    }

    fn start_rows<X: Tokens>(
        &mut self,
        kind: Kind,
        handle: Handle,
        x: X,
        buffer: RecvBuffer,
        poison: Option<Reason>,
    ) -> Pending<DispatchOperation<X>> {
        let shape = buffer.shape();
        let check = || {
            self.check_buffer(&buffer)?;
            check_size(Tensor::TopkIdx, handle.topk(), shape.topk)?;
            x.check(handle.num_tokens(), &shape)
        };
        let poison = poison.or_else(|| check().err());
        let spec = self.spec(kind, &handle.plan, shape, 0, poison, Some(&buffer));
        let kept = Arc::new(DispatchKeep { x, buffer });
        let input = if poison.is_none() { kept.x.view() } else { Input::None };
        // SAFETY: `kept` owns the tokens and is kept by the run; nobody has them mutably, for `kept` is
        // shared from here until the run is over.
        let buffers = unsafe { CallerBuffers::new(input, &mut [], &mut []) };
        let run = self.start(spec, kept.clone(), Buffers(buffers));
        self.pending(run, DispatchOperation { handle, _input: PhantomData })
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
        let (copied, mut poison) = match input.outputs.in_place() {
            Some(_) => (None, None),
            None => match input.outputs.copied(self, topk) {
                Ok(buffer) => (Some(buffer), None),
                Err(reason) => (None, Some(reason)),
            },
        };
        let buffer = copied.as_ref().or(input.outputs.in_place());
        if let Some(buffer) = &copied {
            let bytes = buffer.rows() * buffer.shape().row_bytes();
            tracing::debug!(rank = self.rank, bytes, "expert outputs copied to where peers can read them");
        }
        let shape = buffer.map_or(RowShape { hidden: 0, topk, format: RowFormat::Bf16 }, RecvBuffer::shape);
        let elements = handle.num_tokens() * shape.hidden;
        let check = || {
            self.check_handle(handle)?;
            if !handle.plan.is_dispatched() {
                return Err(Reason::NotDispatched);
            }
            let buffer = buffer.ok_or(Reason::FormatMismatch)?;
            self.check_buffer(buffer)?;
            if shape.format != RowFormat::Bf16 {
                return Err(Reason::FormatMismatch);
            }
            check_size(Tensor::TopkIdx, topk, shape.topk)?;
            check_size(
                Tensor::ExpertOutputs,
                handle.num_recv_tokens() * shape.hidden,
                buffer.rows() * shape.hidden,
            )?;
            input.bias.as_ref().map_or(Ok(()), |bias| check_size(Tensor::Bias, elements, bias.len()))
        };
        poison = poison.or_else(|| check().err());
        let weights = if input.with_weights { topk } else { 0 };
        let spec = self.spec(Kind::Combine, &handle.plan, shape, weights, poison, buffer);
        let mut summed = Vec::new();
        if poison.is_none() {
            input.out.resize(elements, half::bf16::ZERO);
            summed.resize(handle.num_tokens() * weights, 0.0);
        }
        let bias = input.bias.clone();
        let bias = bias.as_deref().filter(|_| poison.is_none()).map_or(Input::None, Input::Bf16);
        // SAFETY: bias and output buffers live on the heap, owned by what the run keeps; moving their owners
        // below does not move them, and nobody touches them before the run is over.
        let buffers = unsafe { CallerBuffers::new(bias, &mut input.out, &mut summed) };
        let run =
            self.start(spec, Arc::new(CombineKeep { input, copied, weights: summed }), Buffers(buffers));
        self.pending(run, CombineOperation { _outputs: PhantomData })
    }

    /// After a fault: meets all ranks of the world, stops what is left of the old operations and makes the
    /// communicator usable again. Handles made before are stale; retired memory is lent again.
    ///
    /// # Errors
    /// [`Error::ResetIncomplete`] names the ranks that did not call it within the deadline, or that have left.
    pub fn reset(&mut self) -> Result<(), Error> {
        let world = self.engine.world();
        world.reset(self.rank)?;
        self.generation = world.control.generation();
        (self.epoch, self.turns) = (0, [0; 2]);
        self.pool.revive();
        Ok(())
    }

    fn new_plan(&self, routing: Routing<'_>) -> (Handle, Option<Reason>) {
        let world = self.engine.world();
        let Routing { topk, topk_idx, topk_weights } = routing;
        let checked = plan::Routing::new(&world.config, topk, topk_idx, topk_weights.into());
        let poison = checked.as_ref().err().copied();
        let routing = checked.unwrap_or_else(|_| plan::Routing::empty(topk));
        let id = (self.id, self.generation, self.epoch);
        let plan = Arc::new(Plan::new(&world.config, world.map.counts(), id, routing));
        (Handle { plan, config: world.config.clone(), rank: self.rank }, poison)
    }

    fn check_handle(&self, handle: &Handle) -> Result<(), Reason> {
        if handle.plan.communicator != self.id || handle.rank != self.rank {
            return Err(Reason::Foreign);
        }
        match handle.plan.generation == self.generation {
            true => Ok(()),
            false => Err(Reason::StaleHandle),
        }
    }

    fn check_buffer(&self, buffer: &RecvBuffer) -> Result<(), Reason> {
        match buffer.communicator == self.id && Arc::ptr_eq(buffer.pool(), &self.pool) {
            true => Ok(()),
            false => Err(Reason::Foreign),
        }
    }

    fn spec(
        &self,
        kind: Kind,
        plan: &Arc<Plan>,
        shape: RowShape,
        weights: usize,
        poison: Option<Reason>,
        buffer: Option<&RecvBuffer>,
    ) -> OpSpec {
        let started = Started {
            kind,
            epoch: self.epoch,
            hidden: shape.hidden as u32,
            topk: shape.topk as u32,
            format: shape.format.code() | u32::from(weights > 0) << 8,
            plan: plan.epoch,
            config: self.agreement,
        };
        let at = |b: &RecvBuffer| Buffer::new(&b.layout, b.offset);
        let buffer = buffer.filter(|_| poison.is_none()).map_or(Buffer::none(), at);
        OpSpec { started, shape, weights, poison, buffer, plan: plan.clone() }
    }

    fn start(&mut self, spec: OpSpec, kept: Keep, buffers: Buffers) -> Waiter {
        let world = self.engine.world();
        let lane = Lane::of(spec.started.kind);
        let turn = self.turns[lane as usize];
        self.turns[lane as usize] += 1;
        self.epoch += 1;
        let op = Op::new(world.config.clone(), world.map.clone(), self.rank, self.generation, turn, spec);
        let run = Arc::new(Run::new(Arc::new(op), self.rank, buffers.0, kept));
        world.submit(run.clone());
        Waiter::new(run)
    }

    fn pending<O>(&self, run: Waiter, operation: O) -> Pending<O> {
        Pending { run, operation, _presence: self.presence.clone(), _engine: self.engine.clone() }
    }
}

/// The caller's buffers, as the engine takes them.
struct Buffers(CallerBuffers);

impl Buffers {
    fn none() -> Self {
        // SAFETY: there is nothing to keep in place.
        Self(unsafe { CallerBuffers::new(Input::None, &mut [], &mut []) })
    }
}
