//! Host copies of what lies on a device, made when it is looked at.

#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::Mutex;

use crate::engine::completion::lock;
use crate::engine::cuda::World;
use crate::error::Error;

/// Host copies of the parts of a buffer.
#[derive(Default)]
pub struct Mirror {
    /// A part stays where it is until [`Mirror::settle`], whatever comes after it: it is boxed.
    parts: Mutex<Vec<Part>>,
}

struct Part {
    /// Where it lies in the region.
    offset: usize,
    bytes: usize,
    /// As aligned as any element.
    copy: Box<[u128]>,
    changed: bool,
}

impl Part {
    fn fetch(world: &World, rank: usize, offset: usize, bytes: usize) -> Result<Self, Error> {
        let mut copy = vec![0u128; bytes.div_ceil(16)].into_boxed_slice();
        // SAFETY: the copy holds as many bytes and is nobody else's; the buffer is not in an operation.
        unsafe { world.fetch(rank, offset, copy.as_mut_ptr().cast(), bytes)? };
        Ok(Self { offset, bytes, copy, changed: false })
    }

    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.copy)[..self.bytes]
    }
}

impl Mirror {
    /// The `bytes` bytes at `offset` of the region of `rank`.
    ///
    /// # Errors
    /// The device has failed.
    pub fn look(&self, world: &Arc<World>, rank: usize, offset: usize, bytes: usize) -> Result<&[u8], Error> {
        let mut parts = lock(&self.parts);
        let at = Self::find(&mut parts, world, rank, offset, bytes)?;
        let part = parts[at].bytes();
        // SAFETY: boxed bytes stay where they are when `parts` grows. They are freed by `settle` and changed through
        // `change`, which take `&mut self`, so not while the result is borrowed.
        Ok(unsafe { std::slice::from_raw_parts(part.as_ptr(), part.len()) })
    }

    /// The same, to be changed.
    ///
    /// # Errors
    /// The device has failed.
    pub fn change(
        &mut self,
        world: &Arc<World>,
        rank: usize,
        offset: usize,
        bytes: usize,
    ) -> Result<&mut [u8], Error> {
        let parts = self.parts.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        let at = Self::find(parts, world, rank, offset, bytes)?;
        parts[at].changed = true;
        Ok(&mut bytemuck::cast_slice_mut(&mut parts[at].copy)[..bytes])
    }

    /// Copies back what was changed, and forgets everything.
    ///
    /// # Errors
    /// The device has failed.
    pub fn settle(&mut self, world: &Arc<World>, rank: usize) -> Result<(), Error> {
        let parts = self.parts.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        for part in std::mem::take(parts).iter().filter(|part| part.changed) {
            // SAFETY: the buffer is its owner's, and in no operation.
            unsafe { world.store(rank, part.offset, part.bytes())? };
        }
        Ok(())
    }

    fn find(
        parts: &mut Vec<Part>,
        world: &World,
        rank: usize,
        offset: usize,
        bytes: usize,
    ) -> Result<usize, Error> {
        if let Some(at) = parts.iter().position(|part| (part.offset, part.bytes) == (offset, bytes)) {
            return Ok(at);
        }
        parts.push(Part::fetch(world, rank, offset, bytes)?);
        Ok(parts.len() - 1)
    }
}
