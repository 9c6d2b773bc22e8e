//! Receive buffers: blocks of the pool in the rank's symmetric region.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use bytemuck::{Pod, Zeroable};
use half::bf16;

use crate::engine::host::World;
use crate::error::Error;
use crate::numeric::{ScaleFormat, scale_groups};
use crate::wire::shape::{RecvLayout, RowFormat, RowShape};

/// The pool of one rank: a first-fit allocator over its part of the region.
pub(crate) struct Pool {
    world: Arc<World>,
    rank: usize,
    state: Mutex<Blocks>,
}

#[derive(Default)]
struct Blocks {
    /// Free blocks, by offset; neighbours are always merged.
    free: BTreeMap<usize, usize>,
    /// Blocks given back while the communicator was poisoned: peers may still touch them, until `reset`.
    retired: Vec<(usize, usize)>,
}

impl Pool {
    pub(crate) fn new(world: Arc<World>, rank: usize) -> Self {
        let free = BTreeMap::from([(world.map.pool, world.map.memory.pool)]);
        Self { world, rank, state: Mutex::new(Blocks { free, retired: Vec::new() }) }
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Lends a block of `bytes`, whole lines. An empty one is nowhere: it takes nothing and is never given back.
    fn take(&self, needed: usize) -> Result<usize, Error> {
        if needed == 0 {
            return Ok(self.world.map.pool);
        }
        let mut blocks = self.blocks();
        let Some((&offset, &len)) = blocks.free.iter().find(|(_, len)| **len >= needed) else {
            return Err(blocks.exhausted(needed));
        };
        blocks.free.remove(&offset);
        if len > needed {
            blocks.free.insert(offset + needed, len - needed);
        }
        Ok(offset)
    }

    fn give(&self, offset: usize, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let block = (offset, bytes);
        let poisoned = self.world.control.fault().is_some();
        let mut blocks = self.blocks();
        match poisoned {
            true => blocks.retired.push(block),
            false => blocks.release(block),
        }
    }

    /// Lends retired blocks again: after a reset no role of the old generation is left.
    pub(crate) fn revive(&self) {
        let mut blocks = self.blocks();
        for block in std::mem::take(&mut blocks.retired) {
            blocks.release(block);
        }
    }
}

impl Blocks {
    fn exhausted(&self, needed: usize) -> Error {
        Error::PoolExhausted { needed, largest: self.free.values().copied().max().unwrap_or(0) }
    }

    fn release(&mut self, (mut offset, mut len): (usize, usize)) {
        if let Some((&before, &before_len)) = self.free.range(..offset).next_back()
            && before + before_len == offset
        {
            self.free.remove(&before);
            (offset, len) = (before, before_len + len);
        }
        if let Some(after) = self.free.remove(&(offset + len)) {
            len += after;
        }
        self.free.insert(offset, len);
    }
}

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
pub struct RecvBuffer {
    pool: Arc<Pool>,
    pub(crate) communicator: u64,
    pub(crate) offset: usize,
    pub(crate) layout: RecvLayout,
    pub(crate) rows: usize,
}

impl RecvBuffer {
    pub(crate) fn new(
        pool: &Arc<Pool>,
        communicator: u64,
        capacity: usize,
        shape: RowShape,
    ) -> Result<Self, Error> {
        let least = capacity.saturating_mul(shape.row_bytes());
        if least > pool.world.map.memory.pool {
            // Not laid out: its size might not fit a usize.
            return Err(pool.blocks().exhausted(least));
        }
        let layout = RecvLayout::new(shape, capacity);
        let offset = pool.take(layout.bytes)?;
        Ok(Self { pool: pool.clone(), communicator, offset, layout, rows: 0 })
    }

    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
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
        self.rows = rows;
    }

    fn part<T: Pod>(&self, part: usize, row_bytes: usize) -> &[T] {
        let region = &self.pool.world.regions[self.pool.rank];
        // SAFETY: the block is this buffer's alone: the pool lends it once, peers touch it only during an
        // operation, which owns the buffer, and `&self` excludes `part_mut`.
        bytemuck::cast_slice(unsafe { region.slice(self.offset + part, self.rows * row_bytes) })
    }

    fn part_mut<T: Pod>(&mut self, part: usize, row_bytes: usize) -> &mut [T] {
        let region = &self.pool.world.regions[self.pool.rank];
        // SAFETY: as in `part`; `&mut self` excludes every other access.
        bytemuck::cast_slice_mut(unsafe { region.slice_mut(self.offset + part, self.rows * row_bytes) })
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

impl Drop for RecvBuffer {
    fn drop(&mut self) {
        self.pool.give(self.offset, self.layout.bytes);
    }
}

impl std::fmt::Debug for RecvBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { rows, offset, layout, .. } = self;
        f.debug_struct("RecvBuffer")
            .field("rows", rows)
            .field("offset", offset)
            .field("layout", layout)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_merge() {
        let mut blocks = Blocks { free: BTreeMap::from([(0, 64), (128, 64)]), retired: Vec::new() };
        blocks.release((64, 64));
        blocks.release((256, 64));
        assert_eq!(blocks.free, BTreeMap::from([(0, 192), (256, 64)]));
    }
}
