//! Memory that the processes of a node share. It has no name: who shall have it is sent its descriptor, and it is gone
//! with the last process that maps it, however that ends.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use memmap2::{Advice, MmapOptions};
use rustix::event::Timespec;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::thread::futex;

use super::doorbell::Bell;
use super::mapped::Mapped;
use super::memory::Region;

/// Huge pages are of this size where there are any.
const HUGE_PAGE: usize = 2 << 20;

/// Nobody can make it smaller, so no access to what is mapped fails, nor larger.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Shared memory by its descriptor.
#[derive(Debug)]
pub struct SharedMemory {
    descriptor: OwnedFd,
    bytes: usize,
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl SharedMemory {
    /// Zeroed memory of `bytes` bytes, and its mapping here: on reserved huge pages if there are enough for all of it,
    /// else its pages are taken from the system as they are first touched.
    ///
    /// # Errors
    /// The system has no memory or no descriptor for it.
    pub fn new(bytes: usize) -> io::Result<(Self, Region)> {
        let huge = if bytes >= HUGE_PAGE {
            Self::create(bytes, MemfdFlags::HUGETLB)
        } else {
            Err(io::ErrorKind::Unsupported.into())
        };
        huge.or_else(|_| Self::create(bytes, MemfdFlags::empty()))
    }

    fn create(bytes: usize, kind: MemfdFlags) -> io::Result<(Self, Region)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | kind;
        let descriptor = memfd_create("railhop", flags)?;
        let size = if kind.is_empty() { bytes } else { bytes.next_multiple_of(HUGE_PAGE) };
        ftruncate(&descriptor, size as u64)?;
        fcntl_add_seals(&descriptor, SEALS)?;
        let memory = Self { descriptor, bytes };
        let region = memory.map()?;
        Ok((memory, region))
    }

    /// What a process of the node has sent: `bytes` bytes of its memory.
    ///
    /// # Errors
    /// It is something else.
    pub fn adopt(descriptor: OwnedFd, bytes: usize) -> io::Result<Self> {
        let refuse = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        if fstat(&descriptor)?.st_size < bytes as i64 {
            return refuse("the memory is smaller than a region");
        }
        match fcntl_get_seals(&descriptor) {
            Ok(seals) if seals.contains(SealFlags::SHRINK) => Ok(Self { descriptor, bytes }),
            _ => refuse("the descriptor is not one of sealed memory"),
        }
    }

    /// Maps it.
    ///
    /// # Errors
    /// The system has no address space or memory for it.
    pub fn map(&self) -> io::Result<Region> {
        let map = MmapOptions::new().len(self.bytes).map_raw(&self.descriptor)?;
        // As for memory of one process: refusal costs speed only.
        let _ = map.advise(Advice::HugePage);
        Ok(Region::of(map))
    }
}

/// The bell of a process whose peers ring it: as [`Doorbell`](super::doorbell::Doorbell), in shared memory.
#[derive(Debug)]
pub struct SharedBell {
    words: Mapped,
    // What `words` points to.
    _page: Region,
}

impl SharedBell {
    /// Bytes of its memory.
    pub const BYTES: usize = 4096;
    const RINGS: usize = 0;
    /// A line of its own: ringers read it, sleepers write it.
    const SLEEPERS: usize = 128;

    /// The bell in `page`.
    pub fn new(page: Region) -> Self {
        assert!(page.bytes() >= Self::BYTES);
        // SAFETY: `page` goes where the result goes, and nothing else refers to it.
        let words = unsafe { page.mapped() };
        Self { words, _page: page }
    }

    fn flag(&self, offset: usize) -> &std::sync::atomic::AtomicU32 {
        self.words.flag(offset).expect("`new` has seen the size")
    }
}

impl Bell for SharedBell {
    fn ticket(&self) -> u64 {
        self.flag(Self::RINGS).load(Ordering::Acquire).into()
    }

    // A ringer counts, then reads `SLEEPERS`; a sleeper is counted, then the system compares the rings with its ticket.
    // Each has a SeqCst fence between the two, so at least one of them sees the other. The system looks at the rings
    // again with the sleeper on its list, so a ring in between wakes it.
    fn ring(&self) {
        let rings = self.flag(Self::RINGS);
        rings.fetch_add(1, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.flag(Self::SLEEPERS).load(Ordering::Relaxed) > 0 {
            // It can't fail on memory that is mapped.
            let _ = futex::wake(rings, futex::Flags::empty(), u32::MAX >> 1);
        }
    }

    fn wait(&self, ticket: u64, timeout: Duration) {
        let (rings, sleepers) = (self.flag(Self::RINGS), self.flag(Self::SLEEPERS));
        sleepers.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let timeout = Timespec::try_from(timeout).ok();
        // Rung already, timed out, interrupted: whatever it is, the caller looks for work again.
        let _ = futex::wait(rings, futex::Flags::empty(), ticket as u32, timeout.as_ref());
        sleepers.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn what_is_written_through_one_mapping_is_read_through_the_other() {
        let (memory, region) = SharedMemory::new(3 * HUGE_PAGE / 2).unwrap();
        let descriptor = memory.as_fd().try_clone_to_owned().unwrap();
        let other = SharedMemory::adopt(descriptor, 3 * HUGE_PAGE / 2).unwrap().map().unwrap();
        region.publish(4096, 7);
        assert_eq!(other.word(4096).load(Ordering::Acquire), 7);
        let descriptor = memory.as_fd().try_clone_to_owned().unwrap();
        assert!(SharedMemory::adopt(descriptor, 5 * HUGE_PAGE).is_err(), "smaller than said");
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        assert!(SharedMemory::adopt(file.into(), 1 << 20).is_err(), "a file could be cut");
    }

    #[test]
    fn a_ring_wakes_a_sleeper_and_makes_tickets_stale() {
        let (memory, page) = SharedMemory::new(SharedBell::BYTES).unwrap();
        let (here, there) = (SharedBell::new(page), SharedBell::new(memory.map().unwrap()));
        let stale = here.ticket();
        there.ring();
        here.wait(stale, Duration::from_secs(60));
        let (ticket, started) = (here.ticket(), Instant::now());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while here.flag(SharedBell::SLEEPERS).load(Ordering::Relaxed) == 0 {
                    std::thread::yield_now();
                }
                there.ring();
            });
            while here.ticket() == ticket {
                here.wait(ticket, Duration::from_secs(60));
            }
        });
        assert!(started.elapsed() < Duration::from_secs(60));
    }
}
