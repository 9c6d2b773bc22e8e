//! Operations under way, and what they return.

use std::sync::Arc;

use half::bf16;

use super::buffer::RecvBuffer;
use super::communicator::{Handle, Presence, Started};
use super::device::StreamRef;
use super::input::{Combine, ExpertOutputs, Tokens};
use crate::engine::Engine;
use crate::engine::completion::Keep;
use crate::error::Error;

/// An operation that was started. The engine works on it whether or not anybody waits; dropping or forgetting
/// it loses the result and nothing else: its buffers live until the engine is done with them.
#[must_use = "the result and the buffers come back by `wait`"]
pub struct Pending<O> {
    pub(crate) started: Started,
    pub(crate) operation: O,
    // Dropped last: the rank counts as present, and the workers run, while an operation is under way.
    pub(crate) _presence: Arc<Presence>,
    pub(crate) _engine: Arc<Engine>,
}

impl<O: Operation> Pending<O> {
    /// Whether [`Pending::wait`] would return at once.
    pub fn is_done(&self) -> bool {
        self.started.waiter.is_finished()
    }

    /// Makes what is enqueued on `stream` from now on wait for the operation, so that kernels of the caller's may use
    /// its results without the host. On a host engine there are no streams, and nothing to do.
    ///
    /// # Errors
    /// The device has failed.
    pub fn before(&self, stream: StreamRef) -> Result<(), Error> {
        self.started.before(stream)
    }

    /// Waits for the operation and takes back what it owned.
    ///
    /// # Errors
    /// [`Error::Refused`] and [`Error::OutOfStep`], the same on every rank: nothing was delivered, the
    /// communicator works on. [`Error::Fault`]: the communicator is poisoned until
    /// [`reset`](crate::Communicator::reset).
    pub fn wait(self) -> Result<O::Output, Failed<O::Input>> {
        let result = self.started.waiter.wait();
        let kept = self.started.waiter.take_keep().expect("taken once, here");
        match result {
            Ok(()) => Ok(self.operation.complete(kept)),
            Err(error) => Err(Failed { input: O::give_back(kept, &error), error }),
        }
    }
}

/// An operation that failed, with the input it owned.
#[derive(Debug)]
pub struct Failed<I> {
    /// Why.
    pub error: Error,
    /// What was handed in. After a fault peers may still touch pool memory: it is retired, not returned.
    pub input: I,
}

impl<I: std::fmt::Debug> std::error::Error for Failed<I> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl<I> std::fmt::Display for Failed<I> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

impl<I> From<Failed<I>> for Error {
    fn from(failed: Failed<I>) -> Self {
        failed.error
    }
}

/// What an operation returns: implemented by the operations of this crate.
pub trait Operation: private::Sealed {
    /// What success returns.
    type Output;
    /// What failure gives back.
    type Input;
    #[doc(hidden)]
    fn complete(self, kept: Keep) -> Self::Output;
    #[doc(hidden)]
    fn give_back(kept: Keep, error: &Error) -> Self::Input;
}

mod private {
    pub trait Sealed {}
}

/// What the run kept, once it is over.
fn unwrap<K: Send + Sync + 'static>(kept: Keep) -> K {
    let kept = kept.downcast::<K>().ok().and_then(|kept| Arc::try_unwrap(kept).ok());
    kept.expect("the run was the only other owner, and let go")
}

/// A plan under way.
pub struct PlanOperation {
    pub(crate) handle: Handle,
}

impl private::Sealed for PlanOperation {}

impl Operation for PlanOperation {
    type Output = Handle;
    type Input = ();

    fn complete(self, _: Keep) -> Handle {
        self.handle
    }

    fn give_back(_: Keep, _: &Error) {}
}

/// What a dispatch owns while it runs.
pub(crate) struct DispatchKeep<X> {
    pub x: X,
    pub buffer: RecvBuffer,
}

/// A dispatch under way.
pub struct DispatchOperation<X> {
    pub(crate) handle: Handle,
    pub(crate) _input: std::marker::PhantomData<X>,
}

impl<X> private::Sealed for DispatchOperation<X> {}

/// A completed dispatch.
#[derive(Debug)]
pub struct Dispatched<X> {
    /// What combine and a cached dispatch need.
    pub handle: Handle,
    /// The received rows.
    pub buffer: RecvBuffer,
    /// The tokens handed in.
    pub x: X,
}

impl<X: Tokens> Operation for DispatchOperation<X> {
    type Output = Dispatched<X>;
    type Input = (X, Option<RecvBuffer>);

    fn complete(self, kept: Keep) -> Dispatched<X> {
        let DispatchKeep { x, mut buffer } = unwrap::<DispatchKeep<X>>(kept);
        buffer.rows = self.handle.num_recv_tokens();
        Dispatched { handle: self.handle, buffer, x }
    }

    fn give_back(kept: Keep, error: &Error) -> Self::Input {
        let DispatchKeep { x, mut buffer } = unwrap::<DispatchKeep<X>>(kept);
        buffer.rows = 0;
        (x, (!matches!(error, Error::Fault(_))).then_some(buffer))
    }
}

/// What a combine owns while it runs.
pub(crate) struct CombineKeep<Y> {
    pub input: Combine<Y>,
    pub copied: Option<RecvBuffer>,
    pub weights: Vec<f32>,
}

impl<Y: ExpertOutputs> CombineKeep<Y> {
    /// Where peers read the outputs.
    pub fn buffer(&self) -> Option<&RecvBuffer> {
        self.copied.as_ref().or(self.input.outputs.buffer())
    }
}

/// A combine under way.
pub struct CombineOperation<Y> {
    pub(crate) _outputs: std::marker::PhantomData<Y>,
}

impl<Y> private::Sealed for CombineOperation<Y> {}

/// A completed combine.
#[derive(Debug)]
pub struct Combined<Y> {
    /// Combined rows [T, hidden]; empty where they went to device memory.
    pub x: Vec<bf16>,
    /// Combined weights [T, topk]; empty where none were asked for, or where they went to device memory.
    pub topk_weights: Vec<f32>,
    /// The outputs handed in.
    pub outputs: Y,
    /// Bytes that had to be copied to where peers can read them: 0 for a [`RecvBuffer`].
    pub copied_bytes: usize,
}

impl<Y: ExpertOutputs> Operation for CombineOperation<Y> {
    type Output = Combined<Y>;
    type Input = Option<Combine<Y>>;

    fn complete(self, kept: Keep) -> Combined<Y> {
        let CombineKeep { input, copied, weights } = unwrap::<CombineKeep<Y>>(kept);
        let copied_bytes = copied.map_or(0, |buffer| buffer.rows() * buffer.shape().row_bytes());
        Combined { x: input.out, topk_weights: weights, outputs: input.outputs, copied_bytes }
    }

    fn give_back(kept: Keep, error: &Error) -> Self::Input {
        let Combine { outputs, bias, out, with_weights, on_device } = unwrap::<CombineKeep<Y>>(kept).input;
        let outputs = match error {
            Error::Fault(_) => outputs.after_fault()?,
            _ => outputs,
        };
        Some(Combine { outputs, bias, out, with_weights, on_device })
    }
}
