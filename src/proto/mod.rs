//! The protocol without I/O, threads or clock. A role is a small state machine: [`Step::step`] does a bounded
//! piece of work through a [`Port`] and never blocks. Threads, a seeded simulator and tests run the same code.
//!
//! # The steps
//! The roles cite these clauses.
//!
//! **Enter** (every operation, by its receiver)
//! - E1 A rank stores its enter record at every peer of its node, and puts its rail record (with its counts,
//!   where the operation plans) at every peer of its rail; its own places are written alike.
//! - E2 When all rail records are in, the pairs of the rail are *open* where both ranks' input is valid and
//!   both started the same. Between a pair that is not open nothing moves. Where the operation plans, the
//!   rank tells its node that its rail's counts are gathered.
//! - E3 When all enter records (and all gathered counts) of the node are in, every rank of the node computes
//!   the same bases and the same verdict, and puts the verdict at its rail peers.
//! - E4 When the verdicts of all nodes are in, every rank computes the same result.
//! - E5 The operation is over at a rank when E4 is done, its channels are done, and every channel of every
//!   local rank has said that it no longer touches this rank's buffer. After a bad verdict of the node none
//!   touches it, and ranks out of step may have no channels to say so.
//!
//! **Dispatch**
//! - D1 Sender: once the pair is open (E2), for each token of the channel that a remote node wants: take a
//!   credit, put the slot, publish the tail per chunk. It waits for nothing else, so hop 1 overlaps the plan.
//! - D2 Forwarder: after E3, for each slot published: write the row to its final row at every local rank that
//!   wants it, then release the slot. Tokens for the own node come straight from the input.
//! - D3 If the node's verdict is bad, slots are released unread.
//! - D4 When all sources of the channel are done, say so to every local rank. Credits are flushed by then.
//!
//! **Combine**
//! - C1 Forwarder: after E3 and if the verdict is good, for each token it forwarded from a home rank whose
//!   pair is open: sum the local ranks' rows, round once, put the slot, publish the tail per chunk.
//! - C2 Reducer: after E4, for each token of the channel in order: wait for the partial sums of the remote
//!   nodes that have it, sum all nodes ascending (the own node's rows read in place), round once.
//! - C3 If the world's verdict is bad, the reducer releases unread what nodes with a good verdict send.
//! - C4 When forwarder and reducer of a channel are done, say to every local rank that its rows are read.
//!
//! # Why nothing waits forever
//! A dispatch forwarder waits for nothing but its own input and the verdict, so dispatch rings drain. In
//! combine each node has its own ring and sends a channel's tokens in the home rank's order, so a reducer
//! never waits for a token behind one it has not asked for. No role blocks on one ring while another it
//! serves could move: it polls all of them.

mod combine_forwarder;
mod encoder;
mod forwarder;
mod op;
pub mod plan;
mod receiver;
mod reducer;
mod ring;
mod sender;

pub use op::{Buffer, Op, OpSpec};
pub use ring::{RecvRing, RingEnd, SendRing};

use half::bf16;

use crate::error::{Kind, Wait};
use combine_forwarder::CombineForwarder;
use encoder::Encoder;
use forwarder::Forwarder;
use receiver::Receiver;
use reducer::Reducer;
use sender::Sender;
use std::sync::Arc;

/// All that a role can touch. Offsets are those of the symmetric region's map.
///
/// The one promise a port makes about order: a [`Port::signal`] becomes visible to `rank` only after everything
/// this role put or stored there before it, in earlier operations too, and a [`Port::load`] that sees it sees
/// that data. Nothing is promised between peers.
pub trait Port {
    /// An index word of the own region.
    fn load(&self, word: usize) -> u64;
    /// Writes a private word of the own region.
    fn set(&self, word: usize, value: u64);
    /// Publishes `value` in a word of `rank` (on the own rail or node, the own rank included).
    fn signal(&self, rank: usize, word: usize, value: u64);
    /// Hop 1: writes `parts`, one after the other, at `offset` of `rank` on the own rail.
    fn put(&self, rank: usize, offset: usize, parts: &[&[u8]]);
    /// Hop 2: writes at `offset` of `rank` on the own node, the own rank included.
    fn store(&self, rank: usize, offset: usize, bytes: &[u8]);
    /// Bytes of the own region.
    fn own(&self, offset: usize, len: usize) -> &[u8];
    /// Bytes of the region of `rank` on the own node.
    fn peer(&self, rank: usize, offset: usize, len: usize) -> &[u8];
    /// The caller's input.
    fn input(&self) -> Input<'_>;
    /// Delivers the combined row of `token`, and its combined weights where asked for. A token is delivered
    /// once, by the channel that owns it.
    fn emit(&self, token: usize, row: &[bf16], weights: &[f32]);
}

/// The caller's input to an operation, as rows of the operation's shape.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// No rows (plan, combine without bias).
    None,
    /// BF16 rows [T, H]: tokens to dispatch, or the bias of a combine.
    Bf16(&'a [bf16]),
    /// E4M3 rows [T, H] and their scales.
    E4m3(&'a [u8], ScaleView<'a>),
}

/// Scales of E4M3 rows as the caller holds them: element (token, group) is at
/// `token * token_stride + group * group_stride`, in elements of one scale.
#[derive(Debug, Clone, Copy)]
pub struct ScaleView<'a> {
    /// Raw little-endian scales: f32, or UE8M0 bytes.
    pub bytes: &'a [u8],
    /// Scales between tokens.
    pub token_stride: usize,
    /// Scales between groups (UE8M0: between words of four groups).
    pub group_stride: usize,
}

/// What a step came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Something moved; there may be more.
    Moved,
    /// Nothing could move; this is what is missing.
    Blocked(Wait),
    /// Nothing could move until the receiver of the same operation has moved; it has the deadline.
    Pending,
    /// The role is done and must not be stepped again.
    Done,
}

/// A state machine of the protocol.
pub trait Step {
    /// Does a bounded piece of work.
    fn step(&mut self, port: &impl Port) -> Progress;
}

/// The role table of an operation: what can be stepped independently. The host engine gives each to a thread
/// at a time, as a kernel gives each to a warp.
pub enum Task {
    /// Enter, counts, verdicts, arrivals.
    Receiver(Receiver),
    /// Sender and forwarder of one dispatch channel. They share what the channel encoded last.
    Dispatch(Box<(Sender, Forwarder, Encoder)>),
    /// Forwarder and reducer of one combine channel.
    Combine(Box<(CombineForwarder, Reducer)>),
}

impl Task {
    /// The tasks of `op`: its receiver, and one per channel where rows move.
    pub fn table(op: &Arc<Op>) -> Vec<Task> {
        let channels = (0..op.config.channels()).filter(|_| op.started.kind != Kind::Plan);
        let mut tasks = vec![Task::Receiver(Receiver::new(op.clone()))];
        tasks.extend(channels.map(|channel| match op.started.kind {
            Kind::Combine => {
                let forwarder = CombineForwarder::new(op.clone(), channel);
                Task::Combine(Box::new((forwarder, Reducer::new(op.clone(), channel))))
            }
            _ => {
                let (sender, forwarder) =
                    (Sender::new(op.clone(), channel), Forwarder::new(op.clone(), channel));
                Task::Dispatch(Box::new((sender, forwarder, Encoder::new(op.clone()))))
            }
        }));
        tasks
    }
}

impl Step for Task {
    fn step(&mut self, port: &impl Port) -> Progress {
        match self {
            Self::Receiver(receiver) => receiver.step(port),
            Self::Dispatch(channel) => {
                let (sender, forwarder, encoder) = &mut **channel;
                let progress = both(sender.step(port, encoder), forwarder.step(port, encoder));
                finish(progress, forwarder.op(), forwarder.channel(), port)
            }
            Self::Combine(channel) => {
                let (forwarder, reducer) = &mut **channel;
                let progress = both(forwarder.step(port), reducer.step(port));
                finish(progress, forwarder.op(), forwarder.channel(), port)
            }
        }
    }
}

/// The progress of two roles stepped in turn: whatever moved wins, then whatever names its wait.
fn both(first: Progress, second: Progress) -> Progress {
    match (first, second) {
        (Progress::Moved, _) | (_, Progress::Moved) => Progress::Moved,
        (Progress::Done, other) | (other, Progress::Done) => other,
        (Progress::Blocked(wait), _) | (_, Progress::Blocked(wait)) => Progress::Blocked(wait),
        (Progress::Pending, Progress::Pending) => Progress::Pending,
    }
}

/// D4, C4: a channel that is done says so to every local rank.
fn finish(progress: Progress, op: &Op, channel: usize, port: &impl Port) -> Progress {
    if progress == Progress::Done {
        op.signal_done(port, channel);
    }
    progress
}
