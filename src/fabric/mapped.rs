//! Memory known by its address: a device's as the host sees it, or a peer's.

#![allow(unsafe_code)]

use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use bytemuck::{Pod, cast_slice, pod_read_unaligned};

/// A piece of memory that somebody else owns. Kernels, NICs and threads read and write it too; what keeps
/// them apart is the protocol. Copies of the value name the same memory.
#[derive(Debug, Clone, Copy)]
pub struct Mapped {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: by the contract of `new` the memory stays as long as any copy does. Safe methods give out atomics
// only; whoever copies answers for races.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// The `bytes` bytes from `base` on.
    ///
    /// # Safety
    /// As long as this value or a copy of it is used, the bytes are initialised, mapped for reading and
    /// writing, and nobody holds a reference to any of them but to atomics. What [`Mapped::word`] and
    /// [`Mapped::flag`] are asked for is accessed atomically by everybody who accesses it at the same time.
    ///
    /// # Panics
    /// `base` is null or not aligned to 8 bytes.
    pub unsafe fn new(base: *mut u8, bytes: usize) -> Self {
        let base = NonNull::new(base).expect("mapped memory has an address");
        assert!(base.cast::<AtomicU64>().is_aligned(), "words are aligned");
        Self { base, bytes }
    }

    /// Where it begins.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether `bytes` bytes at `offset` are in it.
    pub fn holds(&self, offset: usize, bytes: usize) -> bool {
        offset.checked_add(bytes).is_some_and(|end| end <= self.bytes)
    }

    /// The index word at `offset`; none where there can be no word.
    #[inline]
    pub fn word(&self, offset: usize) -> Option<&AtomicU64> {
        // SAFETY: in bounds and aligned, as `base` is; mapped and accessed as an atomic by the contract of
        // `new`.
        self.has::<AtomicU64>(offset).then(|| unsafe { self.base.add(offset).cast().as_ref() })
    }

    /// The flag at `offset`; none where there can be no flag.
    pub fn flag(&self, offset: usize) -> Option<&AtomicU32> {
        // SAFETY: as in `word`.
        self.has::<AtomicU32>(offset).then(|| unsafe { self.base.add(offset).cast().as_ref() })
    }

    /// The value at `offset`, read in halves of words: for what nobody writes meanwhile.
    ///
    /// # Panics
    /// It is not all there, or not aligned to 4 bytes.
    pub fn read<T: Pod>(&self, offset: usize) -> T {
        let halves =
            (0..size_of::<T>().div_ceil(4)).map(|i| self.half(offset + 4 * i).load(Ordering::Relaxed));
        let halves: Vec<u32> = halves.collect();
        pod_read_unaligned(&cast_slice(&halves)[..size_of::<T>()])
    }

    /// Writes zeros, where nobody else reads or writes meanwhile.
    ///
    /// # Panics
    /// As [`Mapped::read`].
    pub fn clear(&self, offset: usize, bytes: usize) {
        (0..bytes.div_ceil(4)).for_each(|i| self.half(offset + 4 * i).store(0, Ordering::Relaxed));
    }

    fn half(&self, offset: usize) -> &AtomicU32 {
        self.flag(offset).expect("what is read is there")
    }

    fn has<T>(&self, offset: usize) -> bool {
        self.holds(offset, size_of::<T>()) && offset.is_multiple_of(align_of::<T>())
    }

    /// The bytes at `offset`.
    ///
    /// # Safety
    /// The range is held. As long as the slice is used the memory stays mapped, and nobody writes these bytes.
    pub unsafe fn slice<'a>(&self, offset: usize, bytes: usize) -> &'a [u8] {
        debug_assert!(self.holds(offset, bytes));
        // SAFETY: in bounds, mapped and undisturbed by contract; initialised by the contract of `new`.
        unsafe { slice::from_raw_parts(self.base.as_ptr().add(offset), bytes) }
    }

    /// The bytes at `offset`, to be written.
    ///
    /// # Safety
    /// As [`Mapped::slice`], and nobody reads these bytes either.
    pub unsafe fn slice_mut<'a>(&self, offset: usize, bytes: usize) -> &'a mut [u8] {
        debug_assert!(self.holds(offset, bytes));
        // SAFETY: as in `slice`; exclusive by contract.
        unsafe { slice::from_raw_parts_mut(self.base.as_ptr().add(offset), bytes) }
    }

    /// Copies `bytes` bytes at `offset` to `target` of `to`.
    ///
    /// # Safety
    /// Both ranges are held by their memory and do not overlap. Meanwhile nobody writes the source, and
    /// nobody reads or writes the target.
    pub unsafe fn copy(&self, offset: usize, to: &Self, target: usize, bytes: usize) {
        debug_assert!(self.holds(offset, bytes) && to.holds(target, bytes));
        // SAFETY: in bounds, apart and undisturbed by contract; mapped by the contract of `new`.
        unsafe {
            ptr::copy_nonoverlapping(self.base.as_ptr().add(offset), to.base.as_ptr().add(target), bytes)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_outside_or_misaligned_are_not_there() {
        let memory: Vec<AtomicU64> = (0..4).map(AtomicU64::new).collect();
        // SAFETY: `memory` outlives `mapped`, and only atomics refer to it.
        let mapped = unsafe { Mapped::new(memory.as_ptr().cast_mut().cast(), 32) };
        assert_eq!(mapped.word(24).map(|word| word.load(std::sync::atomic::Ordering::Relaxed)), Some(3));
        assert!([4, 25, 32, usize::MAX - 7].iter().all(|&at| mapped.word(at).is_none()));
        assert!(mapped.flag(28).is_some() && mapped.flag(32).is_none() && mapped.flag(2).is_none());
    }
}
