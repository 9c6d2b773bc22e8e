//! Receive buffers: blocks of the pool in the rank's symmetric region.

#![allow(unsafe_code)]

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::mirror::Mirror;
use crate::engine::World;
use crate::engine::pool::{Block, Pool};
use crate::error::Error;
use crate::numeric::{ScaleFormat, scale_groups};
use crate::wire::shape::{RecvLayout, RowFormat, RowShape};

/// Where a received row came from.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Source {
    /// Source rank.
    pub rank: u32,
    /// Index of the token at that rank.
    pub token: u32,
}

/// Rows in memory that peers of the node touch: the receive buffer of a dispatch, or the experts' outputs of
/// a combine. It comes from [`Communicator::recv_buffer`](crate::Communicator::recv_buffer) and goes back to
/// the pool when dropped. An operation that uses it owns it; nobody else touches it in between.
///
/// On a CUDA engine the rows lie on the device: [`RecvBuffer::device`] says where. What is looked at from the host is
/// copied there first, and what was changed there is copied back before the next operation, or before
/// [`RecvBuffer::device`] returns. Such a copy panics if the device has failed.
pub struct RecvBuffer {
    world: World,
    rank: usize,
    mirror: Mirror,
    block: Block,
    pub(crate) communicator: u64,
    pub(crate) layout: RecvLayout,
    pub(crate) rows: usize,
}

/// Where the parts of a [`RecvBuffer`] lie on its device: addresses of row 0 of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceParts {
    /// Elements [capacity, hidden].
    pub x: u64,
    /// Scales [capacity, [`RowShape::scale_pitch`] bytes]; of no use for BF16.
    pub scales: u64,
    /// Local expert indices, i32 [capacity, topk].
    pub topk_idx: u64,
    /// Weights, f32 [capacity, topk].
    pub topk_weights: u64,
    /// Source (rank, token), u32 [capacity, 2].
    pub sources: u64,
}

impl RecvBuffer {
    pub(crate) fn new(
        (world, rank): (&World, usize),
        pool: &Arc<Pool>,
        communicator: u64,
        capacity: usize,
        shape: RowShape,
    ) -> Result<Self, Error> {
        let least = capacity.saturating_mul(shape.row_bytes());
        if least > pool.bytes() {
            // Not laid out: its size might not fit a usize.
            return Err(pool.exhausted(least));
        }
        let layout = RecvLayout::new(shape, capacity);
        let block = pool.lend(layout.bytes)?;
        let world = world.clone();
        Ok(Self { world, rank, mirror: Mirror::default(), block, communicator, layout, rows: 0 })
    }

    pub(crate) fn pool(&self) -> &Arc<Pool> {
        self.block.pool()
    }

    /// Where it lies in the region.
    pub(crate) fn offset(&self) -> usize {
        self.block.offset
    }

    /// Rows it can hold.
    pub fn capacity(&self) -> usize {
        self.layout.capacity
    }

    /// Rows it holds, R.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The shape of its rows.
    pub fn shape(&self) -> RowShape {
        self.layout.shape
    }

    /// Declares that it holds `rows` rows, for expert outputs that are written directly into it.
    ///
    /// # Panics
    /// `rows` exceeds the capacity.
    pub fn set_rows(&mut self, rows: usize) {
        assert!(rows <= self.capacity(), "{rows} rows in a buffer of {}", self.capacity());
        self.settle().unwrap_or_else(lost);
        self.rows = rows;
    }

    /// Where its parts lie on the device, for kernels of the caller's own that read or write them before it is handed
    /// to an operation; none on a host engine.
    pub fn device(&mut self) -> Option<DeviceParts> {
        self.settle().unwrap_or_else(lost);
        let World::Cuda(world) = &self.world else { return None };
        let at = |part| world.address(self.rank, self.block.offset + part);
        let RecvLayout { x, scales, topk_idx, topk_weights, source, .. } = self.layout;
        Some(DeviceParts {
            x: at(x),
            scales: at(scales),
            topk_idx: at(topk_idx),
            topk_weights: at(topk_weights),
            sources: at(source),
        })
    }

    /// Makes the host see what a recorded operation has delivered since it looked last, and kernels what the host has
    /// changed.
    pub fn refresh(&mut self) {
        self.settle().unwrap_or_else(lost);
    }

    /// Makes the rows where kernels see them the only ones: what the host has changed is copied there.
    pub(crate) fn settle(&mut self) -> Result<(), Error> {
        match &self.world {
            World::Host(_) => Ok(()),
            World::Cuda(world) => self.mirror.settle(world, self.rank),
        }
    }

    fn part<T: Pod>(&self, part: usize, row_bytes: usize) -> &[T] {
        let (offset, bytes) = (self.block.offset + part, self.rows * row_bytes);
        bytemuck::cast_slice(match &self.world {
            // SAFETY: the block is this buffer's alone: the pool lends it once, peers touch it only during an
            // operation, which owns the buffer, and `&self` excludes `part_mut`.
            World::Host(world) => unsafe { world.regions[self.rank].slice(offset, bytes) },
            World::Cuda(world) => self.mirror.look(world, self.rank, offset, bytes).unwrap_or_else(lost),
        })
    }

    fn part_mut<T: Pod>(&mut self, part: usize, row_bytes: usize) -> &mut [T] {
        let (offset, bytes) = (self.block.offset + part, self.rows * row_bytes);
        bytemuck::cast_slice_mut(match &self.world {
            // SAFETY: as in `part`; `&mut self` excludes every other access.
            World::Host(world) => unsafe { world.regions[self.rank].slice_mut(offset, bytes) },
            World::Cuda(world) => self.mirror.change(world, self.rank, offset, bytes).unwrap_or_else(lost),
        })
    }

    /// BF16 rows [R, hidden]. Empty if the rows are FP8.
    pub fn bf16(&self) -> &[bf16] {
        match self.shape().format {
            RowFormat::Bf16 => self.part(self.layout.x, self.shape().row_bytes()),
            RowFormat::Fp8(_) => &[],
        }
    }

    /// BF16 rows [R, hidden], to be written. Empty if the rows are FP8.
    pub fn bf16_mut(&mut self) -> &mut [bf16] {
        match self.shape().format {
            RowFormat::Bf16 => self.part_mut(self.layout.x, self.shape().row_bytes()),
            RowFormat::Fp8(_) => &mut [],
        }
    }

    /// E4M3 codes [R, hidden]. Empty if the rows are BF16.
    pub fn e4m3(&self) -> &[u8] {
        match self.shape().format {
            RowFormat::Bf16 => &[],
            RowFormat::Fp8(_) => self.part(self.layout.x, self.shape().row_bytes()),
        }
    }

    /// Raw scales [R, [`RowShape::scale_pitch`] bytes]: little-endian f32, or UE8M0 bytes. Empty for BF16.
    pub fn scale_rows(&self) -> &[u8] {
        self.part(self.layout.scales, self.shape().scale_pitch())
    }

    /// Scales as f32, dense [R, ceil(hidden / 128)]. Empty for BF16.
    pub fn scales(&self) -> Vec<f32> {
        let RowFormat::Fp8(format) = self.shape().format else { return Vec::new() };
        let groups = scale_groups(self.shape().hidden);
        let rows = self.scale_rows().chunks_exact(self.shape().scale_pitch());
        rows.flat_map(|row| (0..groups).map(|group| ScaleFormat::read(format, row, group))).collect()
    }

    /// Local expert indices [R, topk], −1 where the expert is on another rank.
    pub fn topk_idx(&self) -> &[i32] {
        self.part(self.layout.topk_idx, 4 * self.shape().topk)
    }

    /// Weights [R, topk], 0 where the expert is on another rank.
    pub fn topk_weights(&self) -> &[f32] {
        self.part(self.layout.topk_weights, 4 * self.shape().topk)
    }

    /// Weights [R, topk], to be replaced (by their gradients, say) before a combine that returns them summed.
    pub fn topk_weights_mut(&mut self) -> &mut [f32] {
        self.part_mut(self.layout.topk_weights, 4 * self.shape().topk)
    }

    /// Where the rows came from `[R]`, ascending (rank, token).
    pub fn sources(&self) -> &[Source] {
        self.part(self.layout.source, size_of::<Source>())
    }
}

impl std::fmt::Debug for RecvBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { rows, layout, .. } = self;
        f.debug_struct("RecvBuffer")
            .field("rows", rows)
            .field("offset", &self.block.offset)
            .field("layout", layout)
            .finish()
    }
}

/// Rows on a device that has failed can't be looked at. Its operations have said so before, as errors.
fn lost<T>(error: Error) -> T {
    panic!("the rows are lost: {error}")
}
