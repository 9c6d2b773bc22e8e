//! The pool of one rank: what is lent of its part of the region.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::completion::lock;
use super::control::Control;
use crate::error::Error;
use crate::wire::region::RegionMap;
use crate::wire::{LINE, align_up};

/// A first-fit allocator.
pub struct Pool {
    control: Arc<Control>,
    start: usize,
    bytes: usize,
    state: Mutex<Blocks>,
}

#[derive(Default)]
struct Blocks {
    /// Free blocks, by offset; neighbours are always merged.
    free: BTreeMap<usize, usize>,
    /// Blocks given back while the communicator was poisoned: peers may still touch them, until `reset`.
    retired: Vec<(usize, usize)>,
}

/// A piece of the pool, given back when dropped.
pub struct Block {
    pool: Arc<Pool>,
    /// Its offset in the region.
    pub offset: usize,
    bytes: usize,
}

impl Block {
    /// The pool it is of.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pool.give(self.offset, self.bytes);
    }
}

impl Pool {
    /// The whole pool of a region.
    pub fn new(map: &RegionMap, control: Arc<Control>) -> Self {
        let (start, bytes) = (map.pool, map.memory.pool);
        let state = Blocks { free: BTreeMap::from([(start, bytes)]), retired: Vec::new() };
        Self { control, start, bytes, state: Mutex::new(state) }
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Lends a block of `bytes`, rounded up to whole lines. An empty one is nowhere: it takes nothing and is never given back.
    ///
    /// # Errors
    /// [`Error::PoolExhausted`].
    pub fn lend(self: &Arc<Self>, bytes: usize) -> Result<Block, Error> {
        let bytes = align_up(bytes, LINE);
        let block = |offset| Block { pool: self.clone(), offset, bytes };
        if bytes == 0 {
            return Ok(block(self.start));
        }
        let mut blocks = lock(&self.state);
        let Some((&offset, &len)) = blocks.free.iter().find(|(_, len)| **len >= bytes) else {
            return Err(blocks.exhausted(bytes));
        };
        blocks.free.remove(&offset);
        if len > bytes {
            blocks.free.insert(offset + bytes, len - bytes);
        }
        drop(blocks);
        Ok(block(offset))
    }

    /// Why `needed` bytes can't be lent.
    pub fn exhausted(&self, needed: usize) -> Error {
        lock(&self.state).exhausted(needed)
    }

    fn give(&self, offset: usize, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let poisoned = self.control.fault().is_some();
        let mut blocks = lock(&self.state);
        match poisoned {
            true => blocks.retired.push((offset, bytes)),
            false => blocks.release((offset, bytes)),
        }
    }

    /// Lends retired blocks again: after a reset no role of the old generation is left.
    pub fn revive(&self) {
        let mut blocks = lock(&self.state);
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
