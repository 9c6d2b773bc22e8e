//! Ranks in one process on RDMA devices, and what their rails tell them.

#![allow(dead_code, reason = "every file takes what it needs")]
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use railhop::Verbs;
use railhop::fabric::mapped::Mapped;
use railhop::fabric::rail::{
    Listener, NetworkRail, NicMemory, RailError, VerbsEnd, VerbsError, VerbsRail, VerbsSetup,
};
use railhop::wire::posting::Posting;
use railhop::wire::word::Word;

/// No wait may take longer: an emulated machine is slow.
pub const LIMIT: Duration = Duration::from_secs(60);

const PAGE: usize = 4096;

/// Memory that is never freed, so that no device outlives it.
#[derive(Clone, Copy)]
pub struct Memory(&'static [AtomicU64]);

impl Memory {
    /// Aligned to pages, as regions are.
    pub fn new(bytes: usize) -> Self {
        let (words, page) = (bytes.div_ceil(8), PAGE / 8);
        let all: &'static [AtomicU64] = Vec::leak((0..words + page).map(|_| AtomicU64::new(0)).collect());
        let first = all.as_ptr().align_offset(PAGE);
        Self(&all[first..first + words])
    }

    pub fn word(&self, offset: usize) -> &'static AtomicU64 {
        assert!(offset.is_multiple_of(8));
        &self.0[offset / 8]
    }

    pub fn load(&self, offset: usize) -> u64 {
        self.word(offset).load(Ordering::Acquire)
    }

    pub fn mapped(&self) -> Mapped {
        // SAFETY: never freed, and there are atomics only.
        unsafe { Mapped::new(self.0.as_ptr().cast_mut().cast(), 8 * self.0.len()) }
    }
}

/// Keeps what a rail tells its rank.
#[derive(Default)]
pub struct Ear {
    heard: Mutex<Heard>,
    more: Condvar,
}

#[derive(Default)]
struct Heard {
    signals: u64,
    losses: Vec<(usize, Option<RailError>)>,
}

impl Listener for Ear {
    fn signalled(&self) {
        self.heard.lock().unwrap().signals += 1;
        self.more.notify_all();
    }

    fn lost(&self, peer: usize, failure: Option<RailError>) {
        self.heard.lock().unwrap().losses.push((peer, failure));
        self.more.notify_all();
    }
}

impl Ear {
    /// How often it was called so far: for [`Ear::wait`].
    pub fn signals(&self) -> u64 {
        self.heard.lock().unwrap().signals
    }

    pub fn losses(&self) -> Vec<(usize, Option<RailError>)> {
        self.heard.lock().unwrap().losses.clone()
    }

    /// Sleeps until it is called after the count was `signals`.
    pub fn wait(&self, signals: u64) {
        let heard = self.heard.lock().unwrap();
        let (heard, timeout) = self
            .more
            .wait_timeout_while(heard, LIMIT, |heard| heard.signals == signals && heard.losses.is_empty())
            .unwrap();
        assert!(!timeout.timed_out(), "no call after {signals}");
        assert!(heard.losses.is_empty(), "{:?}", heard.losses);
    }

    /// What the rail says of the first peer that is lost.
    pub fn loss(&self) -> (usize, String) {
        let heard = self.heard.lock().unwrap();
        let (heard, timeout) =
            self.more.wait_timeout_while(heard, LIMIT, |heard| heard.losses.is_empty()).unwrap();
        assert!(!timeout.timed_out(), "nobody is lost");
        let (peer, failure) = heard.losses[0].clone();
        (peer, failure.expect("a reason").to_string())
    }
}

/// What ranks of a test have in common, and rank i's device is `rxe`i.
#[derive(Clone)]
pub struct World {
    pub ranks: usize,
    pub queue_pairs: usize,
    /// Bytes of each memory.
    pub bytes: usize,
    pub wakes: bool,
    pub timeout: u8,
    pub retries: u8,
}

impl Default for World {
    fn default() -> Self {
        Self { ranks: 2, queue_pairs: 2, bytes: 1 << 20, wakes: true, timeout: 18, retries: 6 }
    }
}

impl World {
    /// Short of patience with peers.
    pub fn impatient(self) -> Self {
        Self { timeout: 16, retries: 3, ..self }
    }

    pub fn config(&self, rank: usize) -> Verbs {
        let device = Some(format!("rxe{rank}"));
        let Self { queue_pairs, timeout, retries, .. } = *self;
        Verbs { device, queue_pairs, timeout, retries, ..Verbs::default() }
    }

    pub fn setup(&self, rank: usize) -> Result<Setup, VerbsError> {
        let (source, region) = (Memory::new(self.bytes), Memory::new(self.bytes));
        self.setup_on(&self.config(rank), rank, source, region)
    }

    pub fn setup_on(
        &self,
        config: &Verbs,
        rank: usize,
        source: Memory,
        region: Memory,
    ) -> Result<Setup, VerbsError> {
        let setup = self.setup_of(config, rank, source.mapped(), region.mapped())?;
        Ok(Setup { rank, source, region, setup })
    }

    pub fn setup_of(
        &self,
        config: &Verbs,
        rank: usize,
        source: Mapped,
        region: Mapped,
    ) -> Result<VerbsSetup, VerbsError> {
        let peers: Vec<usize> = (0..self.ranks).filter(|&peer| peer != rank).collect();
        VerbsSetup::open(VerbsEnd {
            config,
            rank,
            local_rank: rank,
            gpu: None,
            peers: &peers,
            source: NicMemory::Host(source),
            region: NicMemory::Host(region),
            wakes: self.wakes,
        })
    }

    pub fn connect(&self) -> Vec<Rank> {
        connect((0..self.ranks).map(|rank| self.setup(rank).unwrap()).collect())
    }
}

/// A rank that is ready to be connected.
pub struct Setup {
    pub rank: usize,
    pub source: Memory,
    pub region: Memory,
    pub setup: VerbsSetup,
}

impl Setup {
    pub fn connect(self, cards: &[(usize, Vec<u8>)]) -> Result<Rank, VerbsError> {
        let ear = Arc::new(Ear::default());
        let Self { rank, source, region, setup } = self;
        // SAFETY: memory is never freed; tests keep to the protocol, or give up on what they would read.
        let rail = unsafe { setup.connect(cards, ear.clone())? };
        Ok(Rank { rank, source, region, rail, ear })
    }
}

pub fn connect(setups: Vec<Setup>) -> Vec<Rank> {
    let cards: Vec<_> = setups.iter().map(|setup| (setup.rank, setup.setup.card())).collect();
    setups.into_iter().map(|setup| setup.connect(&cards).unwrap()).collect()
}

/// A connected rank.
pub struct Rank {
    pub rank: usize,
    pub source: Memory,
    pub region: Memory,
    pub rail: VerbsRail,
    pub ear: Arc<Ear>,
}

impl Rank {
    /// Waits until all that was posted is where it goes.
    pub fn drained(&mut self) {
        let behind = self.rail.drain(Instant::now() + LIMIT);
        assert!(behind.is_empty(), "{behind:?}");
    }
}

/// Offset of a queue's tail in a region: each word has a line of its own.
pub fn tail(queue: usize) -> usize {
    128 * queue
}

/// Offset of a queue's head in a region.
pub fn head(queue: usize) -> usize {
    tail(queue) + 64
}

/// A posting without data.
pub fn signal(peer: usize, queue: usize, word: usize, value: u64) -> Posting {
    Posting { peer, queue, source: 0, target: 0, bytes: 0, word, completion: None, value: Word(value) }
}

/// Waits until `done`; its core goes to others meanwhile.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "{what} did not come");
        std::thread::sleep(Duration::from_micros(200));
    }
}
