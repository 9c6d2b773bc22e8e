//! Regions: memory that several ranks read and write, kept apart by the protocol.

#![allow(unsafe_code)]

use std::io;
use std::ops::Index;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{Advice, MmapOptions, MmapRaw};

use super::mapped::Mapped;
use crate::numeric::copy;

/// Bytes from which a copy bypasses the cache: it is a row that another core reads later.
const STREAM_FROM: usize = 1024;

/// The mapped region of one rank. Pages are taken from the system when first touched.
#[derive(Debug)]
pub struct Region {
    map: MmapRaw,
}

impl Region {
    /// Maps `bytes` zeroed bytes.
    ///
    /// # Errors
    /// The system has no address space or memory for it.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let map = MmapRaw::from(MmapOptions::new().len(bytes).no_reserve_swap().map_anon()?);
        // Rows are spread over the region: huge pages spare most of the TLB misses. Refusal costs speed only.
        let _ = map.advise(Advice::HugePage);
        Ok(Self { map })
    }

    /// Maps memory that other processes map too.
    pub(super) fn of(map: MmapRaw) -> Self {
        Self { map }
    }

    /// The same memory, for what reaches it by its address.
    ///
    /// # Safety
    /// The region outlives the result and its copies.
    pub unsafe fn mapped(&self) -> Mapped {
        // SAFETY: mapped and zero-initialised, as long as the contract asks; words are accessed as atomics only, and
        // references to the rest are given out by those who answer for races.
        unsafe { Mapped::new(self.map.as_mut_ptr(), self.map.len()) }
    }

    /// Bytes mapped.
    pub fn bytes(&self) -> usize {
        self.map.len()
    }

    fn check(&self, offset: usize, len: usize) {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.map.len()),
            "{len} bytes at {offset} are outside the region"
        );
    }

    /// The index word at `offset`.
    pub fn word(&self, offset: usize) -> &AtomicU64 {
        self.check(offset, size_of::<u64>());
        assert!(offset.is_multiple_of(align_of::<AtomicU64>()));
        // SAFETY: in bounds and aligned (mappings are page-aligned), mapped as long as `self`; words are
        // accessed as atomics only, for the map gives each a line that holds nothing else.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(offset).cast()) }
    }

    /// The bytes at `offset`.
    ///
    /// # Safety
    /// Nobody writes them while the slice lives, and they hold no index word.
    pub unsafe fn slice(&self, offset: usize, len: usize) -> &[u8] {
        self.check(offset, len);
        // SAFETY: in bounds, mapped as long as `self`, zero-initialised; not written meanwhile by contract.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(offset), len) }
    }

    /// The bytes at `offset`, to be written.
    ///
    /// # Safety
    /// Nobody else reads or writes them while the slice lives, and they hold no index word.
    #[expect(clippy::mut_from_ref, reason = "exclusive by contract, as in `UnsafeCell`")]
    pub unsafe fn slice_mut(&self, offset: usize, len: usize) -> &mut [u8] {
        self.check(offset, len);
        // SAFETY: in bounds, mapped as long as `self`, zero-initialised; exclusive by contract.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().add(offset), len) }
    }

    /// Publishes `value` in the word at `offset`, after all that this thread has written to any region.
    pub fn publish(&self, offset: usize, value: u64) {
        copy::fence();
        self.word(offset).store(value, Ordering::Release);
    }
}

/// The regions of a world that this process reaches, by rank: all of an in-process world; of a world of processes its
/// own and those of its node.
#[derive(Debug)]
pub struct Regions(Box<[Option<Region>]>);

impl FromIterator<Option<Region>> for Regions {
    fn from_iter<I: IntoIterator<Item = Option<Region>>>(regions: I) -> Self {
        Self(regions.into_iter().collect())
    }
}

impl Index<usize> for Regions {
    type Output = Region;

    fn index(&self, rank: usize) -> &Region {
        self.0[rank].as_ref().unwrap_or_else(|| panic!("the region of rank {rank} is in another node"))
    }
}

/// Copies a piece of a row to where another core will read it: large ones bypass this core's cache.
///
/// # Safety
/// The calling thread must call [`Region::publish`] (or [`copy::fence`]) before anyone may read `to`.
pub unsafe fn deliver(to: &mut [u8], from: &[u8]) {
    match from.len() >= STREAM_FROM {
        // SAFETY: the fence follows by contract.
        true => unsafe { copy::stream(to, from) },
        false => to.copy_from_slice(from),
    }
}
