//! The fabric of one rank among processes: peers of its node are reached in shared memory, those of its rail by what
//! carries hop 1.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::Fabric;
use super::doorbell::Bell;
use super::memory::{Region, Regions};
use super::rail::{Listener, NetworkRail};
use crate::topology::Topology;
use crate::wire::posting::Posting;
use crate::wire::region::RegionMap;
use crate::wire::word::Word;

/// Carries what one rank puts and signals.
pub struct ProcessFabric {
    /// None where there is one node. Dropped before the region that it writes to.
    rail: Option<Railed>,
    rank: usize,
    topology: Topology,
    map: Arc<RegionMap>,
    regions: Arc<Regions>,
    /// By local rank.
    bells: Vec<Arc<dyn Bell>>,
    listener: Arc<dyn Listener>,
}

/// Hop 1. What is put lies in a mirror of the region until the peer has it, so that a chunk is one piece of memory at
/// both ends: the peer's credit says that it has, as it does for the slots themselves, and records alternate between
/// two places here as they do there.
pub struct Railed {
    // Dropped first: it reads the mirror.
    rail: Mutex<Box<dyn NetworkRail>>,
    mirror: Region,
    /// By stream and node: what has been put since the last signal.
    open: Vec<Mutex<Open>>,
    /// Signalled, and not posted yet.
    signalled: Mutex<Vec<Posting>>,
    /// Something posted has not left the mirror: the rail is to be polled.
    under_way: AtomicBool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Open {
    target: usize,
    bytes: usize,
}

impl Railed {
    /// Bytes of the mirror: all of a region but its pool.
    pub fn mirror_bytes(map: &RegionMap) -> usize {
        map.pool
    }

    /// What carries hop 1 of a rank in a world of `nodes` nodes, by a rail whose sources are in `mirror`.
    pub fn new(rail: Box<dyn NetworkRail>, mirror: Region, map: &RegionMap, nodes: usize) -> Self {
        let open = (0..map.streams() * nodes).map(|_| Mutex::default()).collect();
        Self {
            rail: Mutex::new(rail),
            mirror,
            open,
            signalled: Mutex::default(),
            under_way: AtomicBool::new(false),
        }
    }
}

impl ProcessFabric {
    /// The fabric of `rank`. `bells` are its node's, by local rank.
    pub fn new(
        (rank, topology): (usize, Topology),
        map: Arc<RegionMap>,
        regions: Arc<Regions>,
        bells: Vec<Arc<dyn Bell>>,
        rail: Option<Railed>,
        listener: Arc<dyn Listener>,
    ) -> Self {
        Self { rank, topology, map, regions, bells, rail, listener }
    }

    fn is_here(&self, rank: usize) -> bool {
        self.topology.node_of(rank) == self.topology.node_of(self.rank)
    }

    fn rail(&self) -> &Railed {
        self.rail.as_ref().expect("a world of several nodes has a rail")
    }

    fn open(&self, stream: usize, to: usize) -> MutexGuard<'_, Open> {
        let node = self.topology.node_of(to);
        lock(&self.rail().open[stream * self.topology.nodes() + node])
    }
}

impl Fabric for ProcessFabric {
    fn put(&self, from: usize, to: usize, offset: usize, parts: &[&[u8]]) {
        debug_assert!(from == self.rank && !self.is_here(to));
        let (own, node) = (self.topology.node_of(from), self.topology.node_of(to));
        let mut at = self.map.staged(offset, own, node);
        let mut open = self.open(self.map.stream(offset), to);
        if open.bytes == 0 {
            open.target = offset;
        }
        assert_eq!(open.target + open.bytes, offset, "what is put before a signal lies together");
        for part in parts {
            // SAFETY: the places of one stream and peer have one writer, the role that holds credit for the slots they
            // mirror; the rail has read what lay there before, for the peer has had it.
            let place = unsafe { self.rail().mirror.slice_mut(at, part.len()) };
            place.copy_from_slice(part);
            at += part.len();
            open.bytes += part.len();
        }
    }

    fn signal(&self, _from: usize, to: usize, word: usize, value: u64) {
        if self.is_here(to) {
            self.regions[to].publish(word, value);
            return self.bells[self.topology.local_of(to)].ring();
        }
        let stream = self.map.stream(word);
        // Held until the posting is in its place: the order of a stream is that of its signals.
        let mut open = self.open(stream, to);
        let Open { target, bytes } = std::mem::take(&mut *open);
        let (own, node) = (self.topology.node_of(self.rank), self.topology.node_of(to));
        let source = if bytes == 0 { 0 } else { self.map.staged(target, own, node) };
        let (completion, value) = (None, Word(value));
        let posting = Posting { peer: to, queue: stream, source, target, bytes, word, completion, value };
        lock(&self.rail().signalled).push(posting);
    }

    fn flush(&self) {
        let Some(railed) = &self.rail else { return };
        if lock(&railed.signalled).is_empty() && !railed.under_way.load(Ordering::Relaxed) {
            return;
        }
        // Taken under the rail's lock, so that postings stay in the order of their signals.
        let mut rail = lock(&railed.rail);
        let postings = std::mem::take(&mut *lock(&railed.signalled));
        // Nobody waits for a completion: the peer's credit says more.
        let moved = rail.post(&postings).and_then(|_| rail.poll(&mut Vec::new()));
        railed.under_way.store(!rail.is_idle(), Ordering::Relaxed);
        drop(rail);
        if let Err(error) = moved {
            self.listener.lost(error.peer(), Some(error));
        }
    }

    fn drain(&self, end: Instant) -> Vec<usize> {
        self.flush();
        self.rail.as_ref().map_or(Vec::new(), |railed| lock(&railed.rail).drain(end))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
