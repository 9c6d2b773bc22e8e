//! What is asked of a rank: an operation with its rows in and out, on the host or on the device.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::World;
use super::plan::DevicePlan;
use crate::device::RawStream;
use crate::engine::completion::{Fetch, Keep};
use crate::engine::pool::{Block, Pool};
use crate::error::{Error, Kind, Reason};
use crate::wire::kernel::Input;
use crate::wire::shape::{RecvParts, RowShape};

/// Where rows that kernels read come from.
#[derive(Debug, Clone, Copy, Default)]
pub enum Source<'a> {
    /// There are none.
    #[default]
    None,
    /// The host: they are copied to the device first.
    Host(&'a [u8]),
    /// The device, at this address.
    Device(u64),
}

/// Where rows that kernels write go.
#[derive(Debug, Clone, Copy, Default)]
pub enum Sink {
    /// There are none.
    #[default]
    None,
    /// So many bytes of the host: they are copied when the caller waits.
    Host(*mut u8, usize),
    /// The device, at this address.
    Device(u64),
}

/// One operation of one rank.
pub struct Request<'a> {
    /// Its kind.
    pub kind: Kind,
    /// Shape of its rows.
    pub shape: RowShape,
    /// Sums of weights that a combine returns per token.
    pub weights: usize,
    /// Why the input is invalid, as far as the host can tell.
    pub poison: Option<Reason>,
    /// The plan; none where it is of no use: the input is invalid then.
    pub plan: Option<Arc<DevicePlan>>,
    /// Rows of the buffer that peers touch, and its parts.
    pub buffer: (usize, RecvParts),
    /// Experts, `i64 [T, K]`, for what plans.
    pub topk_idx: Source<'a>,
    /// Weights, `f32 [T, K]`, for what plans.
    pub topk_weights: Source<'a>,
    /// Rows [T, H].
    pub x: Source<'a>,
    /// Scales of E4M3 rows.
    pub scales: Source<'a>,
    /// Elements between tokens and between groups.
    pub scale_strides: (u64, u64),
    /// Bias of a combine.
    pub bias: Source<'a>,
    /// Combined rows.
    pub out: Sink,
    /// Combined weights.
    pub out_weights: Sink,
    /// The caller's stream, if it is to be enqueued there.
    pub stream: Option<RawStream>,
    /// What owns all this.
    pub keep: Keep,
}

impl Request<'_> {
    /// Whether any rows lie on the host.
    pub fn is_on_host(&self) -> bool {
        let sources = [self.topk_idx, self.topk_weights, self.x, self.scales, self.bias];
        let sinks = [self.out, self.out_weights];
        sources.iter().any(|source| matches!(source, Source::Host(_)))
            || sinks.iter().any(|sink| matches!(sink, Sink::Host(..)))
    }
}

/// What a request comes to on the device.
pub struct Staged {
    pub topk_idx: u64,
    pub topk_weights: u64,
    pub input: Input,
    /// What was copied, until the operation is over.
    pub blocks: Vec<Block>,
    /// What is to be copied back.
    pub fetch: Option<Fetch>,
}

/// What a sink's rows come back by.
struct Download {
    to: *mut u8,
    block: Block,
    bytes: usize,
}

// SAFETY: the pointer is the caller's promise (`World::stage`), not tied to a thread.
unsafe impl Send for Download {}

impl World {
    /// Copies from the memory of `rank`, at an offset of its region, to the host; returns when that is done.
    ///
    /// # Errors
    /// The device has failed.
    ///
    /// # Safety
    /// `to` holds `bytes` bytes, nobody else touches them meanwhile, and nobody writes the source.
    pub unsafe fn fetch(&self, rank: usize, offset: usize, to: *mut u8, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's; the range is the pool's.
        unsafe { self.rank(rank).transfer(to as u64, self.address(rank, offset), bytes) }
    }

    /// Copies to the memory of `rank`, at an offset of its region, from the host; returns when that is done.
    ///
    /// # Errors
    /// The device has failed.
    ///
    /// # Safety
    /// Nobody else touches the target meanwhile.
    pub unsafe fn store(&self, rank: usize, offset: usize, from: &[u8]) -> Result<(), Error> {
        // SAFETY: the caller's; the range is the pool's.
        unsafe { self.rank(rank).transfer(self.address(rank, offset), from.as_ptr() as u64, from.len()) }
    }

    /// Brings the request's rows to where kernels reach them.
    ///
    /// # Errors
    /// The pool is exhausted, or the device has failed.
    ///
    /// # Safety
    /// Host sinks stay where they are, untouched by anybody else, until the fetch has been called or dropped.
    pub(super) unsafe fn stage(
        self: &Arc<Self>,
        rank: usize,
        pool: &Arc<Pool>,
        request: &Request<'_>,
    ) -> Result<Staged, Error> {
        let mut blocks = Vec::new();
        let mut source = |source: Source<'_>| match source {
            Source::None => Ok(0),
            Source::Device(address) => Ok(address),
            Source::Host(bytes) => {
                let block = pool.lend(bytes.len().max(1))?;
                // SAFETY: the block was lent just now.
                unsafe { self.store(rank, block.offset, bytes)? };
                let address = self.address(rank, block.offset);
                blocks.push(block);
                Ok::<_, Error>(address)
            }
        };
        let mut downloads = Vec::new();
        let mut sink = |sink: Sink| match sink {
            Sink::None => Ok(0),
            Sink::Device(address) => Ok(address),
            Sink::Host(to, bytes) => {
                let block = pool.lend(bytes.max(1))?;
                let address = self.address(rank, block.offset);
                downloads.push(Download { to, block, bytes });
                Ok::<_, Error>(address)
            }
        };
        let (topk_idx, topk_weights) = (source(request.topk_idx)?, source(request.topk_weights)?);
        let input = Input {
            x: source(request.x)?,
            scales: source(request.scales)?,
            scale_strides: request.scale_strides,
            bias: source(request.bias)?,
            out: sink(request.out)?,
            out_weights: sink(request.out_weights)?,
        };
        let world = self.clone();
        let fetch = move || {
            for download in downloads {
                let Download { to, block, bytes } = download;
                // SAFETY: the caller of `stage` keeps the sink; kernels have written the block and ended.
                unsafe { world.fetch(rank, block.offset, to, bytes)? };
            }
            Ok(())
        };
        Ok(Staged { topk_idx, topk_weights, input, blocks, fetch: Some(Box::new(fetch)) })
    }
}
