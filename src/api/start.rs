//! What a call of the API comes to on each engine.

#![allow(unsafe_code)]

use std::sync::Arc;

use half::bf16;

use super::buffer::RecvBuffer;
use super::communicator::{Communicator, Handle, PlanOf, Started};
use super::input::{Combine, ExpertOutputs, Routed, TokensAt};
use crate::engine::World;
use crate::engine::completion::{Keep, Waiter};
use crate::engine::cuda::{self, DevicePlan, Request, Sink, Source};
use crate::engine::host::{self, CallerBuffers, Run};
use crate::error::{Error, Kind, Reason, Started as StartedOperation};
use crate::proto::plan::{Plan, Routing};
use crate::proto::{Buffer, Input, Op, OpSpec};
use crate::wire::region::Lane;
use crate::wire::shape::{RecvParts, RowShape};

/// An operation, apart from its rows.
pub(super) struct Job<'a> {
    pub kind: Kind,
    pub shape: RowShape,
    /// Sums of weights that a combine returns per token.
    pub weights: usize,
    /// Why the input is invalid.
    pub poison: Option<Reason>,
    pub handle: &'a Handle,
    /// What peers touch.
    pub buffer: Option<&'a RecvBuffer>,
}

/// Its rows, in and out.
pub(super) struct Io<'a> {
    /// For what plans.
    pub routing: Option<&'a Routed<'a>>,
    /// Tokens, or the bias of a combine.
    pub rows: TokensAt<'a>,
    pub out: Out,
}

/// Where a combine writes.
#[derive(Default)]
pub(super) struct Out {
    x: Sink,
    weights: Sink,
}

impl Default for Io<'_> {
    fn default() -> Self {
        Self { routing: None, rows: TokensAt::Host(Input::None), out: Out::default() }
    }
}

impl<'a> Io<'a> {
    /// Routing and nothing else.
    pub fn of(routing: &'a Routed<'a>) -> Self {
        Self { routing: Some(routing), ..Self::default() }
    }

    /// Whether any of it lies on a device.
    fn is_on_device(&self) -> bool {
        let sinks = [self.out.x, self.out.weights];
        let routed = matches!(self.routing, Some(Routed::Device(_)));
        routed
            || matches!(self.rows, TokensAt::Device { .. })
            || sinks.iter().any(|sink| matches!(sink, Sink::Device(_)))
    }
}

impl Out {
    /// What `input` says, or else its host memory and `weights`.
    pub fn of<Y: ExpertOutputs>(input: &mut Combine<Y>, weights: &mut [f32]) -> Self {
        let x = match &input.on_device.out {
            Some(out) => Sink::Device(out.address()),
            None => host_sink(&mut input.out),
        };
        let weights = match &input.on_device.weights {
            Some(weights) => Sink::Device(weights.address()),
            None => host_sink(weights),
        };
        Self { x, weights }
    }
}

fn host_sink<T>(out: &mut [T]) -> Sink {
    match out.is_empty() {
        true => Sink::None,
        false => Sink::Host(out.as_mut_ptr().cast(), size_of_val(out)),
    }
}

/// What of a host sink the host engine writes to.
fn host_part<T>(sink: Sink) -> (*mut T, usize) {
    match sink {
        Sink::Host(to, bytes) => (to.cast(), bytes / size_of::<T>()),
        _ => (std::ptr::NonNull::dangling().as_ptr(), 0),
    }
}

impl Started {
    /// An operation that was over before it began.
    pub fn failed(keep: Keep, error: Error) -> Self {
        Self { waiter: Waiter::failed(keep, error), on_device: None }
    }
}

impl Communicator {
    /// Starts an operation.
    ///
    /// # Safety
    /// What `io` names on the host stays where it is, inputs unchanged and outputs untouched, until the operation is
    /// over; what it names on the device, by the contract of [`super::DeviceSlice::from_raw`]. `keep` owns it.
    pub(super) unsafe fn start(&mut self, job: Job<'_>, io: Io<'_>, keep: Keep) -> Started {
        match self.world.clone() {
            World::Host(world) => {
                let plan = match &job.handle.plan {
                    PlanOf::Host(plan) => plan.clone(),
                    // Foreign, so refused: some plan stands in for it.
                    PlanOf::Device(_) => {
                        let routing = Routing::empty(job.handle.topk());
                        Arc::new(Plan::new(&world.config, world.map.counts(), (0, 0, 0), routing))
                    }
                };
                // SAFETY: the caller's.
                unsafe { self.start_on_host(&world, job, plan, io, keep) }
            }
            World::Cuda(world) => {
                let plan = self.device_plan_of(job.handle);
                // SAFETY: the caller's.
                unsafe { self.start_on_device(&world, job, plan, io, keep) }
            }
        }
    }

    /// # Safety
    /// As for [`Communicator::start`].
    unsafe fn start_on_host(
        &mut self,
        world: &host::World,
        job: Job<'_>,
        plan: Arc<Plan>,
        io: Io<'_>,
        keep: Keep,
    ) -> Started {
        let poison = job.poison.or(io.is_on_device().then_some(Reason::WrongMemory));
        let input = match io.rows {
            TokensAt::Host(input) if poison.is_none() => input,
            _ => Input::None,
        };
        let started = StartedOperation {
            kind: job.kind,
            epoch: self.epoch,
            hidden: job.shape.hidden as u32,
            topk: job.shape.topk as u32,
            format: job.shape.format.code() | u32::from(job.weights > 0) << 8,
            plan: plan.epoch,
            config: world.config.agreement(),
        };
        let at = |buffer: &RecvBuffer| Buffer::new(&buffer.layout, buffer.offset());
        let buffer = job.buffer.filter(|_| poison.is_none()).map_or(Buffer::none(), at);
        let spec = OpSpec { started, shape: job.shape, weights: job.weights, poison, buffer, plan };
        let ((out, len), (weights, weights_len)) =
            (host_part::<bf16>(io.out.x), host_part::<f32>(io.out.weights));
        // SAFETY: the sinks are slices of the caller's, by contract nobody else's until the operation is over.
        let buffers = unsafe {
            let out = std::slice::from_raw_parts_mut(out, len);
            CallerBuffers::new(input, out, std::slice::from_raw_parts_mut(weights, weights_len))
        };
        let lane = Lane::of(job.kind);
        let turn = self.turns[lane as usize];
        self.turns[lane as usize] += 1;
        self.epoch += 1;
        let rank = self.rank();
        let op = Op::new(world.config.clone(), world.map.clone(), rank, self.generation, turn, spec);
        let run = Arc::new(Run::new(Arc::new(op), rank, buffers, keep));
        world.submit(run.clone());
        Started { waiter: run.waiter(), on_device: None }
    }

    /// # Safety
    /// As for [`Communicator::start`].
    unsafe fn start_on_device(
        &mut self,
        world: &Arc<cuda::World>,
        job: Job<'_>,
        plan: Option<Arc<DevicePlan>>,
        io: Io<'_>,
        keep: Keep,
    ) -> Started {
        let request = self.request(job, plan, io, keep);
        // SAFETY: the caller's.
        let started = unsafe { world.start(self.rank(), &self.pool, request) };
        let on_device = started.run.map(|run| (world.clone(), run));
        Started { waiter: started.waiter, on_device }
    }

    /// What an operation comes to on a device.
    pub(super) fn request<'a>(
        &self,
        job: Job<'_>,
        plan: Option<Arc<DevicePlan>>,
        io: Io<'a>,
        keep: Keep,
    ) -> Request<'a> {
        let none = RecvParts { x: 0, scales: 0, topk_idx: 0, topk_weights: 0, source: 0 };
        let at = |buffer: &RecvBuffer| (buffer.capacity(), buffer.layout.parts_at(buffer.offset()));
        let (topk_idx, topk_weights) = match io.routing {
            None => Default::default(),
            Some(Routed::Host(routing)) => (
                Source::Host(bytemuck::cast_slice(routing.topk_idx)),
                Source::Host(bytemuck::cast_slice(routing.topk_weights)),
            ),
            Some(Routed::Device(routing)) => {
                (Source::Device(routing.topk_idx.address()), Source::Device(routing.topk_weights.address()))
            }
        };
        let (rows, scales, scale_strides) = match io.rows {
            TokensAt::Host(Input::None) => (Source::None, Source::None, (0, 0)),
            TokensAt::Host(Input::Bf16(x)) => (Source::Host(bytemuck::cast_slice(x)), Source::None, (0, 0)),
            TokensAt::Host(Input::E4m3(codes, scales)) => {
                let strides = (scales.token_stride as u64, scales.group_stride as u64);
                (Source::Host(codes), Source::Host(scales.bytes), strides)
            }
            TokensAt::Device { x, scales: 0, .. } => (Source::Device(x), Source::None, (0, 0)),
            TokensAt::Device { x, scales, scale_strides } => {
                (Source::Device(x), Source::Device(scales), scale_strides)
            }
        };
        let (x, bias) = if job.kind == Kind::Combine { (Source::None, rows) } else { (rows, Source::None) };
        Request {
            kind: job.kind,
            shape: job.shape,
            weights: job.weights,
            poison: job.poison,
            plan,
            buffer: job.buffer.filter(|_| job.poison.is_none()).map_or((0, none), at),
            topk_idx,
            topk_weights,
            x,
            scales,
            scale_strides,
            bias,
            out: io.out.x,
            out_weights: io.out.weights,
            stream: self.stream,
            keep,
        }
    }
}
