//! All that goes out: which lane takes a posting, what is under way, and which peers are lost.

#![allow(unsafe_code)]

use std::mem::zeroed;
use std::ops::Range;
use std::sync::Arc;

use super::chain::{Chain, Place};
use super::device::{Device, text};
use super::lane::{Ends, Lane, requests};
use super::memory::Registered;
use super::object::Completions;
use super::pair::Room;
use crate::fabric::rail::{Completion, RailError};
use crate::sys::verbs as sys;
use crate::wire::posting::Posting;

/// Completions that are taken from the queue at once.
const TAKEN: usize = 32;

/// A rank on the rail.
pub(super) struct Peer {
    pub(super) rank: usize,
    /// Its lanes; posting queues go to them in turn.
    pub(super) lanes: Range<usize>,
    /// Its region.
    pub(super) region: Place,
    pub(super) region_bytes: usize,
    /// Whether signals wake it.
    pub(super) wakes: bool,
    pub(super) lost: bool,
}

/// The sending half of a rail.
pub(super) struct Traffic {
    // Dropped before the memory that they read is deregistered.
    pub(super) lanes: Vec<Lane>,
    pub(super) peers: Vec<Peer>,
    pub(super) device: Device,
    pub(super) sends: Arc<Completions>,
    pub(super) source: Registered,
    /// Peers write it until the lanes are gone.
    pub(super) _region: Registered,
    pub(super) room: Room,
    chain: Chain,
    /// Lanes with something to flush, each once.
    touched: Vec<usize>,
    /// What the next poll reports.
    ready: Vec<Completion>,
    /// What the thread will tell the listener.
    losses: Vec<(usize, RailError)>,
    /// Whether the rank sleeps, and is to be woken for completions.
    wakes: bool,
    /// Whether somebody waits for all to be done.
    pub(super) draining: bool,
    /// Whether the next completion causes an event.
    pub(super) armed: bool,
}

/// What [`Traffic`] is made of.
pub(super) struct Parts {
    pub(super) lanes: Vec<Lane>,
    pub(super) peers: Vec<Peer>,
    pub(super) device: Device,
    pub(super) sends: Arc<Completions>,
    pub(super) source: Registered,
    pub(super) region: Registered,
    pub(super) room: Room,
    pub(super) wakes: bool,
}

impl Traffic {
    /// Nothing is under way yet.
    ///
    /// # Safety
    /// What is posted keeps to the protocol: from the posting to its completion nobody writes its source.
    pub(super) unsafe fn new(parts: Parts) -> Self {
        let Parts { lanes, peers, device, sends, source, region, room, wakes } = parts;
        Self {
            lanes,
            peers,
            device,
            sends,
            source,
            _region: region,
            room,
            chain: Chain::new(room.requests),
            touched: Vec::new(),
            ready: Vec::new(),
            losses: Vec::new(),
            wakes,
            draining: false,
            armed: false,
        }
    }

    /// Takes all postings; those to lost peers are done at once.
    pub(super) fn post(&mut self, postings: &[Posting]) -> Result<(), RailError> {
        for posting in postings {
            let peer = self.peer_of(posting)?;
            if self.peers[peer].lost {
                self.ready.extend(Completion::of(posting));
                continue;
            }
            let lanes = &self.peers[peer].lanes;
            let lane = lanes.start + posting.queue % lanes.len();
            self.lanes[lane].push(*posting);
            if !self.touched.contains(&lane) {
                self.touched.push(lane);
            }
        }
        self.flush();
        Ok(())
    }

    /// The peer that `posting` goes to, once all of it is known to be there.
    fn peer_of(&self, posting: &Posting) -> Result<usize, RailError> {
        let Posting { peer: rank, source, target, bytes, word, .. } = *posting;
        let outside = |what, offset, bytes| RailError::OutOfRange { what, peer: rank, offset, bytes };
        let holds = |size: usize, offset: usize, bytes: usize| {
            offset.checked_add(bytes).is_some_and(|end| end <= size)
        };
        let peer = self.peers.iter().position(|peer| peer.rank == rank);
        let peer = peer.ok_or_else(|| outside("the region", 0, 0))?;
        let region = self.peers[peer].region_bytes;
        let fits = requests(bytes, self.max_message()) <= self.room.requests;
        if !holds(self.source.bytes(), source, bytes) || !fits {
            return Err(outside("the source", source, bytes));
        }
        if !holds(region, target, bytes) {
            return Err(outside("the target", target, bytes));
        }
        if !holds(region, word, size_of::<u64>()) || !word.is_multiple_of(size_of::<u64>()) {
            return Err(outside("the word", word, size_of::<u64>()));
        }
        Ok(peer)
    }

    fn max_message(&self) -> usize {
        self.device.port.max_msg_sz as usize
    }

    /// Posts what the touched lanes have room for.
    fn flush(&mut self) {
        while let Some(index) = self.touched.pop() {
            let lane = &mut self.lanes[index];
            let peer = &self.peers[lane.peer];
            let ends = Ends {
                source: Place { address: self.source.address(), key: self.source.local_key() },
                target: peer.region,
                wakes: peer.wakes,
                room: self.room,
                max_message: self.device.port.max_msg_sz as usize,
            };
            // SAFETY: registered as long as `self`; undisturbed by the contract of `new`.
            if let Err(error) = unsafe { lane.flush(&mut self.chain, &ends, index as u64) } {
                let error = std::io::Error::from_raw_os_error(error);
                self.lose_lane(index, &format!("ibv_post_send: {error}"), false);
            }
        }
    }

    /// Takes what has completed, and goes on with what waited for it.
    pub(super) fn advance(&mut self) {
        // SAFETY: plain numbers, for which zeros do.
        let mut done = [unsafe { zeroed::<sys::Wc>() }; TAKEN];
        loop {
            // SAFETY: the queue is alive.
            let count = unsafe { sys::poll_cq(self.sends.raw(), &mut done) };
            let Ok(count) = usize::try_from(count) else {
                return self.lose_all("its completion queue can't be read");
            };
            done[..count].iter().for_each(|done| self.complete(done));
            self.flush();
            if count < TAKEN {
                return;
            }
        }
    }

    fn complete(&mut self, done: &sys::Wc) {
        let index = done.wr_id as usize;
        // Completions of failed requests carry their own numbers: 0 where none was asked for.
        let index = if done.status == sys::WC_SUCCESS { Some(index) } else { self.lane_of(done.qp_num) };
        let Some(index) = index else { return };
        let lane = &mut self.lanes[index];
        if self.peers[lane.peer].lost {
            return;
        }
        if done.status != sys::WC_SUCCESS {
            return self.fail(index, "RDMA WRITE", done.status);
        }
        lane.complete(&mut self.ready);
        if lane.is_full() {
            self.touched.push(index);
        }
    }

    /// Reports what has completed.
    pub(super) fn take_ready(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.ready);
    }

    /// Asks for an event with the next completion, if somebody sleeps who needs it: the rank for completions, whoever
    /// drains, or what waits for room.
    pub(super) fn arm(&mut self) {
        let wakes = self.wakes;
        let needed = |lane: &Lane| lane.is_full() || (wakes && lane.owes());
        if self.armed || !(self.draining || self.lanes.iter().any(needed)) {
            return;
        }
        // SAFETY: the queue is alive.
        if unsafe { sys::req_notify_cq(self.sends.raw()) } != 0 {
            return self.lose_all("its completion queue gives no events");
        }
        self.armed = true;
        // What came before the request causes no event.
        self.advance();
    }

    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.ready.is_empty() && self.lanes.iter().all(Lane::is_idle)
    }

    /// Peers that have not got all that was posted to them, and may yet.
    pub(super) fn behind(&self) -> Vec<usize> {
        let busy = |peer: &&Peer| !self.lanes[peer.lanes.clone()].iter().all(Lane::is_idle);
        self.peers.iter().filter(busy).map(|peer| peer.rank).collect()
    }

    /// The lane of the queue pair with this number.
    pub(super) fn lane_of(&self, number: u32) -> Option<usize> {
        self.lanes.iter().position(|lane| lane.pair.number() == number)
    }

    /// The lane of a queue pair that the library names.
    pub(super) fn lane_at(&self, pair: *mut sys::Qp) -> Option<usize> {
        self.lanes.iter().position(|lane| lane.pair.raw() == pair)
    }

    /// A request on a lane has failed with this status.
    pub(super) fn fail(&mut self, lane: usize, request: &str, status: u32) {
        // SAFETY: it takes any number.
        let meaning = text(unsafe { (self.device.library.wc_status_str)(status) });
        let rank = self.peers[self.lanes[lane].peer].rank;
        let reason = format!("{request} to rank {rank}: {} ({meaning})", sys::name_of("IBV_WC_", status));
        self.lose_lane(lane, &reason, sys::is_local(status));
    }

    /// A lane has failed, and its peer with it: a rank is not reached by half of its queues. It `is_local` if this end is
    /// known to be the cause, as it is, too, where the port has no link.
    pub(super) fn lose_lane(&mut self, lane: usize, reason: &str, is_local: bool) {
        let Device { name, port_number, .. } = &self.device;
        let number = self.lanes[lane].pair.number();
        let has_link = self.device.has_link();
        let link = if has_link { String::new() } else { format!(", port {port_number} has no link") };
        let reason = format!("device {name}{link}, queue pair {number}: {reason}");
        self.lose(self.lanes[lane].peer, |peer| match is_local || !has_link {
            true => RailError::Cut { peer, reason },
            false => RailError::Broken { peer, reason },
        });
    }

    /// The device has failed.
    pub(super) fn lose_all(&mut self, reason: &str) {
        let Device { name, port_number, .. } = &self.device;
        let reason = format!("device {name}, port {port_number}: {reason}");
        let cut = |peer| RailError::Cut { peer, reason: reason.clone() };
        (0..self.peers.len()).for_each(|peer| self.lose(peer, cut));
    }

    /// The first reason counts: what follows is its consequence.
    fn lose(&mut self, peer: usize, error: impl FnOnce(usize) -> RailError) {
        let Peer { rank, lost, lanes, .. } = &mut self.peers[peer];
        if std::mem::replace(lost, true) {
            return;
        }
        self.lanes[lanes.clone()].iter_mut().for_each(|lane| lane.end(&mut self.ready));
        self.losses.push((*rank, error(*rank)));
    }

    /// Losses that the listener has not been told of.
    pub(super) fn take_losses(&mut self) -> Vec<(usize, RailError)> {
        std::mem::take(&mut self.losses)
    }

    pub(super) fn has_losses(&self) -> bool {
        !self.losses.is_empty()
    }
}
