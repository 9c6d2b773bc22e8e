//! A rank's memories and the kernels' end of its command queue, on host threads.

#![allow(dead_code, reason = "every file takes what it needs")]
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use railhop::Config;
use railhop::fabric::mapped::Mapped;
use railhop::fabric::proxy::Proxy;
use railhop::fabric::rail::Rail;
use railhop::wire::command::Command;
use railhop::wire::device::{MailboxMap, PrivateMap, QUEUE_CAPACITY};
use railhop::wire::region::RegionMap;

/// No wait may take longer.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Waits until `done`; its core goes to others meanwhile.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "{what} did not come");
        thread::yield_now();
    }
}

/// Zeroed memory in words.
pub struct Memory(Box<[AtomicU64]>);

impl Memory {
    pub fn new(bytes: usize) -> Self {
        Self((0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect())
    }

    pub fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8));
        &self.0[offset / 8]
    }

    /// For as long as the memory lives.
    pub fn mapped(&self) -> Mapped {
        // SAFETY: whoever has a rail or proxy to it keeps the memory, and there are atomics only.
        unsafe { Mapped::new(self.0.as_ptr().cast_mut().cast(), 8 * self.0.len()) }
    }
}

/// What a rank on a device has.
pub struct Rank {
    pub config: Arc<Config>,
    pub map: Arc<RegionMap>,
    pub private_map: PrivateMap,
    pub mailbox_map: MailboxMap,
    pub rank: usize,
    pub region: Memory,
    pub private: Memory,
    pub mailbox: Memory,
    /// `RankState::commands`.
    commands: AtomicU64,
}

impl Rank {
    /// Ranks are never freed, so that no proxy outlives its memory.
    pub fn leaked(config: &Config, rank: usize) -> &'static Self {
        let map = Arc::new(RegionMap::new(config));
        let (private_map, mailbox_map) = (PrivateMap::new(config, &map), MailboxMap::new(config, rank));
        Box::leak(Box::new(Self {
            region: Memory::new(map.memory.region),
            private: Memory::new(private_map.bytes),
            mailbox: Memory::new(mailbox_map.bytes),
            config: Arc::new(config.clone()),
            map,
            private_map,
            mailbox_map,
            rank,
            commands: AtomicU64::new(0),
        }))
    }

    pub fn proxy<R: Rail>(&'static self, rail: R) -> Proxy<R> {
        let (config, map) = (self.config.clone(), self.map.clone());
        Proxy::new(config, map, self.rank, 1, self.mailbox.mapped(), rail)
            .expect("the mailbox is as large as its map")
    }

    pub fn mapped_region(&'static self) -> Mapped {
        self.region.mapped()
    }

    pub fn mapped_private(&'static self) -> Mapped {
        self.private.mapped()
    }

    /// Pushes a command as kernels do.
    pub fn push(&self, command: &Command) {
        self.push_torn(command, [0, 1], || {});
    }

    /// Pushes a command whose halves land in `order`, with `between` between them.
    pub fn push_torn(&self, command: &Command, order: [usize; 2], between: impl FnOnce()) {
        let place = self.commands.fetch_add(1, Ordering::Relaxed);
        let has_room = || place - self.taken() < QUEUE_CAPACITY as u64;
        wait_until("room in the queue", has_room);
        let halves = command.halves(place & QUEUE_CAPACITY as u64 == 0);
        // The data that the command names is there before it.
        fence(Ordering::SeqCst);
        self.half(place, order[0]).store(halves[order[0]], Ordering::Relaxed);
        between();
        self.half(place, order[1]).store(halves[order[1]], Ordering::Relaxed);
    }

    /// Pushes whatever `halves` hold, phase bits aside; there must be room.
    pub fn push_raw(&self, halves: [u64; 2]) {
        let place = self.commands.fetch_add(1, Ordering::Relaxed);
        let phase = u64::from(place & QUEUE_CAPACITY as u64 == 0) << 63;
        for (i, half) in halves.into_iter().enumerate() {
            self.half(place, i).store(half & !(1 << 63) | phase, Ordering::Release);
        }
    }

    /// Makes the next proxy begin after what has been pushed so far.
    pub fn skip(&self) {
        let taken = self.mailbox.word(self.mailbox_map.taken);
        taken.store(self.commands.load(Ordering::Relaxed), Ordering::Release);
    }

    fn half(&self, place: u64, half: usize) -> &AtomicU64 {
        self.mailbox.word(self.mailbox_map.queue + 16 * (place as usize & (QUEUE_CAPACITY - 1)) + 8 * half)
    }

    /// Commands the proxy says it has taken.
    pub fn taken(&self) -> u64 {
        self.mailbox.word(self.mailbox_map.taken).load(Ordering::Acquire)
    }

    /// Whether kernels have been told to return.
    pub fn is_aborted(&self) -> bool {
        self.mailbox.word(self.mailbox_map.abort).load(Ordering::Acquire) != 0
    }
}
