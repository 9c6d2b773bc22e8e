//! Expert-parallel all-to-all for mixture-of-experts models.
//!
//! `dispatch` sends every token to the ranks that own its chosen experts, `combine` brings the experts' outputs
//! back and sums them. A token crosses the network once per target node, to the rank with the same in-node
//! index (its *rail*), and fans out from there inside the node, as in section 3.2.2 of the
//! [DeepSeek-V3 technical report](https://arxiv.org/abs/2412.19437).
//!
//! # A layer, step by step
//!
//! A [`LocalWorld`] holds all ranks of a world in one process: here two nodes of two ranks, and eight experts,
//! two on each rank.
//!
//! ```
//! use half::bf16;
//! use railhop::{Combine, Config, LocalWorld, RowFormat, RowShape, Routing, Topology};
//!
//! let config = Config::builder(Topology::new(2, 2)?).experts(8).max_hidden(64).build()?;
//! LocalWorld::new(config)?.run(|mut comm| -> Result<(), railhop::Error> {
//!     // Two tokens of 64 elements, each with two experts; −1 masks an entry.
//!     let routing = Routing { topk: 2, topk_idx: &[0, 7, 3, -1], topk_weights: &[0.5, 0.5, 1.0, 0.0] };
//!     let x = vec![bf16::ONE; 2 * 64];
//!
//!     // The plan exchanges counts: now the size of the receive buffer is known.
//!     let handle = comm.plan(routing)?;
//!     let shape = RowShape { hidden: 64, topk: 2, format: RowFormat::Bf16 };
//!     let buffer = comm.recv_buffer(handle.num_recv_tokens(), shape)?;
//!
//!     // Rows arrive ordered by (source rank, source token), with local expert indices and weights.
//!     let received = comm.dispatch(&handle, x, buffer)?.buffer;
//!     for (row, source) in received.bf16().chunks(64).zip(received.sources()) {
//!         assert_eq!(row[0], bf16::ONE);
//!         assert!(source.rank < 4);
//!     }
//!
//!     // Experts would run here. Their outputs come home from where they are, and are summed.
//!     let combined = comm.combine(&handle, Combine::new(received))?;
//!     assert_eq!(combined.x[0], bf16::from_f32(2.0)); // experts 0 and 7 are on two ranks
//!     assert_eq!(combined.x[64], bf16::ONE); // expert 3 is on one
//!     Ok(())
//! });
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Overlap and ownership
//!
//! `start_plan`, `start_dispatch`, `start_combine` return a [`Pending`]: the engine works while the caller
//! computes, and `wait` gives back what the operation owned. A plan or dispatch and a combine may be under way
//! together. Inputs are moved in (an `Arc` is as good), so nobody can change them meanwhile:
//!
//! ```compile_fail,E0382
//! # use half::bf16;
//! # fn f(comm: &mut railhop::Communicator, handle: &railhop::Handle, x: Vec<bf16>, buffer: railhop::RecvBuffer) {
//! let pending = comm.start_dispatch(handle, x, buffer);
//! buffer.bf16(); // owned by the operation until `wait`
//! # }
//! ```
//!
//! ```compile_fail,E0382
//! # use half::bf16;
//! # fn f(comm: &mut railhop::Communicator, handle: &railhop::Handle, mut x: Vec<bf16>, buffer: railhop::RecvBuffer) {
//! let pending = comm.start_dispatch(handle, x, buffer);
//! x[0] = bf16::ONE; // moved in as well
//! # }
//! ```
//!
//! A result borrows the buffer it lies in, and a borrowed input can't be handed to an operation that may outlive
//! the borrow:
//!
//! ```compile_fail,E0505
//! # use railhop::{Combine, Communicator, Handle, RecvBuffer};
//! # fn f(comm: &mut Communicator, handle: &Handle, received: RecvBuffer) {
//! let rows = received.bf16();
//! let pending = comm.start_combine(handle, Combine::new(received));
//! assert!(rows.is_empty());
//! # }
//! ```
//!
//! ```compile_fail,E0597
//! # use half::bf16;
//! # fn f(comm: &mut railhop::Communicator, handle: &railhop::Handle, buffer: railhop::RecvBuffer) {
//! # let pending = {
//! let x = vec![bf16::ONE; 64];
//! let pending = comm.start_dispatch(handle, x.as_slice(), buffer);
//! # pending };
//! # let _ = pending.wait();
//! # }
//! ```
//!
//! Dropping or forgetting a [`Pending`], a buffer, a handle or a [`Communicator`] on one rank never corrupts
//! another: operations under way complete, and whoever waits for a rank that is gone gets a typed error.
//!
//! # On GPUs
//!
//! [`ConfigBuilder::cuda`] runs the roles as kernels; every call works as on the host. Rows may stay in device memory
//! ([`DeviceSlice`], [`RecvBuffer::device`]); [`Communicator::after`], [`Pending::before`] and
//! [`Communicator::use_stream`] order operations with the caller's kernels; what [`Communicator::record_dispatch`] and
//! its kin record needs no host to run, and can be captured in a CUDA graph.
//!
//! # Backward
//!
//! The backward of dispatch is [`Communicator::combine`] of the gradients of the received rows, with
//! [`Combine::with_topk_weights`] for the gradients of the weights. The backward of combine is
//! [`Communicator::dispatch`] of the gradients with the same [`Handle`]: a cached dispatch, which exchanges no
//! counts.
//!
//! # Numbers
//!
//! Rows are BF16, or E4M3 with a scale per 128 elements ([`RowFormat`]); BF16 tokens are quantised on the way
//! into an FP8 receive buffer, ready-made [`Fp8Tokens`] pass through. Every sum runs in f32 in a fixed order, so
//! results are bitwise reproducible: rows of a node in ascending local rank, nodes in ascending order, partial
//! sums that cross the rail rounded to BF16, the bias last. [`ExpertMajor`] brings received rows into the order
//! of grouped GEMMs and back.
//!
//! # When something is wrong
//!
//! Invalid input on one rank (or a receive buffer that is too small) fails the operation on all ranks with the
//! same [`Error::Refused`], which names the rank and the reason; the inputs come back and the next operation
//! works. A rank that stops moving ends the world's operations with an [`Error::Fault`] within the deadline, after
//! which a collective [`Communicator::reset`] makes the communicators usable again.

pub mod api;
pub mod bootstrap;
pub mod budget;
pub mod config;
pub mod device;
// Not public: a hand-made operation could name memory that somebody borrows.
mod engine;
pub mod error;
pub mod fabric;
mod interface;
pub mod numeric;
pub mod proto;
pub mod reference;
mod sync;
#[cfg(target_os = "linux")]
mod sys;
pub mod topology;
pub mod wire;

pub use api::*;
pub use config::{Carrier, Config, ConfigBuilder, Cuda, EngineKind, Network, Verbs};
pub use error::Error;
pub use interface::Interface;
pub use numeric::ScaleFormat;
pub use topology::{ExpertPlacement, Topology};
pub use wire::shape::{RowFormat, RowShape};
