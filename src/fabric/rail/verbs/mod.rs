//! The rail over RDMA verbs: a put is an RDMA WRITE from the own memory to the peer's, a signal one of 8 bytes behind it.
//!
//! A queue pair of the reliable kind places what it carries in the order of posting, and memory is never registered for
//! relaxed ordering: so an index word becomes visible after its data, which is the rail's contract. A peer that sleeps
//! gets its signals with an immediate, whose completion wakes its rail's thread; a peer that polls has no part in them.
//!
//! - [`VerbsSetup`]: all that can fail on one machine; then the ranks exchange [`VerbsSetup::card`]s.
//! - [`VerbsRail`]: what carries, once they are connected.
//! - `device`, `sysfs`: which device, port and address; `memory`: what the device reaches; `card`: what peers must know.
//! - `pair`, `lane`, `chain`: queue pairs, what waits for them, and work requests.
//! - `traffic`, `arrivals`, `thread`: what goes out, what comes in, and who waits for both.

#![allow(unsafe_code)]

mod arrivals;
mod card;
mod chain;
mod device;
mod error;
mod lane;
mod memory;
mod object;
mod pair;
mod sysfs;
mod thread;
mod traffic;

pub use error::VerbsError;
pub use memory::NicMemory;
pub use sysfs::{Gid, RdmaSysfs};

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use arrivals::Arrivals;
use card::{Card, End};
use chain::{PIECES, Place};
use device::{Device, Preference};
use lane::Lane;
use memory::{Registered, Use};
use object::{Channel, Completions};
use pair::{QueuePair, Room};
use thread::{Shared, Worker};
use traffic::{Parts, Peer, Traffic};

use super::{Completion, Listener, NetworkRail, Rail, RailError};
use crate::config::Verbs;
use crate::sys::verbs::Library;
use crate::wire::posting::Posting;

/// Whether libibverbs can be loaded; why, if not.
///
/// # Errors
/// What the loader says.
pub fn verbs_library() -> Result<(), String> {
    Library::get().map(drop)
}

/// Work requests of a queue pair under way at most, where the device has room for them.
const REQUESTS: usize = 256;

/// Packets are numbered with as many bits.
const PACKET_BITS: u32 = 24;

/// A rank's end of a rail over RDMA.
#[derive(Debug)]
pub struct VerbsEnd<'a> {
    /// How devices are used.
    pub config: &'a Verbs,
    /// The rank.
    pub rank: usize,
    /// Its index on its node: where no device is named and nearer than others, ranks take them in turn.
    pub local_rank: usize,
    /// PCI address of its GPU, as in `0000:65:00.0`: the device nearest to it is taken.
    pub gpu: Option<&'a str>,
    /// The ranks it is to be connected with.
    pub peers: &'a [usize],
    /// Where the data of its postings is.
    pub source: NicMemory,
    /// What its peers write.
    pub region: NicMemory,
    /// Whether peers' signals wake the listener: for ranks that sleep, not for devices that poll.
    pub wakes: bool,
}

/// A device opened, memory registered, queue pairs made: nothing is connected yet.
pub struct VerbsSetup {
    config: Verbs,
    rank: usize,
    wakes: bool,
    // Queue pairs end before the memory that they read and write.
    pairs: Vec<(usize, Vec<QueuePair>)>,
    arrivals: Arrivals,
    sends: Arc<Completions>,
    channel: Arc<Channel>,
    source: Registered,
    region: Registered,
    room: Room,
    first_packet: u32,
    device: Device,
}

impl VerbsSetup {
    /// Does all that needs no peer.
    ///
    /// # Errors
    /// What is missing, or what the device refuses.
    pub fn open(end: VerbsEnd<'_>) -> Result<Self, VerbsError> {
        let VerbsEnd { config, rank, local_rank, gpu, peers, source, region, wakes } = end;
        let device = Device::open(config, Preference { local_rank, gpu })?;
        let room = room(&device, config.queue_pairs * peers.len())?;
        let (domain, channel) = (device.domain()?, device.channel()?);
        let source = Registered::new(&device, &domain, source, Use::Source)?;
        let region = Registered::new(&device, &domain, region, Use::Region)?;
        // A queue pair that fails completes all its requests.
        let sends = device.completions(&channel, room.requests * config.queue_pairs * peers.len())?;
        let arrivals = Arrivals::new(&device, &domain, &channel, wakes)?;
        let shared = pair::Shared {
            domain,
            sends: sends.clone(),
            arrivals: arrivals.completions.clone(),
            receives: arrivals.receives.clone(),
        };
        let make = |&peer: &usize| {
            let pairs = (0..config.queue_pairs).map(|_| QueuePair::new(&device, &shared, room));
            Ok((peer, pairs.collect::<Result<_, _>>()?))
        };
        let pairs = peers.iter().map(make).collect::<Result<_, VerbsError>>()?;
        let first_packet = first_packet();
        let config = config.clone();
        Ok(Self {
            config,
            rank,
            wakes,
            pairs,
            arrivals,
            sends,
            channel,
            source,
            region,
            room,
            first_packet,
            device,
        })
    }

    /// The device's name.
    pub fn device(&self) -> &str {
        &self.device.name
    }

    /// What peers need for [`VerbsSetup::connect`], the same for all.
    pub fn card(&self) -> Vec<u8> {
        let numbers = |pairs: &Vec<QueuePair>| pairs.iter().map(QueuePair::number).collect();
        let peers: Vec<_> = self.pairs.iter().map(|(peer, pairs)| (*peer, numbers(pairs))).collect();
        card::write(self.rank, self.end(), &peers)
    }

    fn end(&self) -> End {
        let Device { port, gid, .. } = &self.device;
        End {
            first_packet: self.first_packet,
            key: self.region.remote_key(),
            base: bytemuck::cast(self.region.address()),
            bytes: bytemuck::cast(self.region.bytes() as u64),
            gid: gid.map_or([0; 16], |gid| gid.address.octets()),
            lid: port.lid,
            mtu: port.active_mtu as u8,
            is_ethernet: self.device.is_ethernet().into(),
            wakes: self.wakes.into(),
        }
    }

    /// Connects with the peers whose cards these are, by rank. Nothing is to be posted before all of them have connected
    /// too: it would be lost, and sent again only after [`Verbs::timeout`].
    ///
    /// # Errors
    /// A peer's card is missing or can't be, or the device refuses the connection.
    ///
    /// # Safety
    /// What is posted keeps to the protocol: from the posting to its completion nobody writes its source, and nobody
    /// touches its target until the signal is there. The cards come from peers that do likewise: they write to this
    /// rank's region as long as the rail lives.
    pub unsafe fn connect(
        self,
        cards: &[(usize, Vec<u8>)],
        listener: Arc<dyn Listener>,
    ) -> Result<VerbsRail, VerbsError> {
        let near = self.end();
        let Self {
            config, rank, wakes, pairs, arrivals, sends, channel, source, region, room, device, ..
        } = self;
        let (mut lanes, mut peers) = (Vec::new(), Vec::new());
        for (peer, pairs) in pairs {
            let card = cards.iter().find(|(owner, _)| *owner == peer);
            let missing = || VerbsError::Card { rank: peer, problem: "it has not come".into() };
            let Card { end: far, pairs: numbers } = card::read(&card.ok_or_else(missing)?.1, peer, rank)?;
            if far.is_ethernet != near.is_ethernet {
                let problem = "one end is on Ethernet, the other on InfiniBand".into();
                return Err(VerbsError::Card { rank: peer, problem });
            }
            let first = lanes.len();
            // The smaller number of the two ends counts.
            for (pair, number) in pairs.into_iter().zip(numbers) {
                pair.connect(&device, &config, (&near, &far), number)?;
                lanes.push(Lane::new(pair, peers.len()));
            }
            peers.push(Peer {
                rank: peer,
                lanes: first..lanes.len(),
                region: Place { address: far.base(), key: far.key },
                region_bytes: far.bytes() as usize,
                wakes: far.wakes != 0,
                lost: false,
            });
        }
        let parts = Parts { lanes, peers, device, sends, source, region, room, wakes };
        // SAFETY: by contract.
        let traffic = unsafe { Traffic::new(parts) };
        VerbsRail::start(rank, traffic, channel, arrivals, listener)
    }
}

/// What queue pairs have room for, if there can be `pairs` of them.
fn room(device: &Device, pairs: usize) -> Result<Room, VerbsError> {
    let limits = &device.limits;
    let completions = limits.max_cqe as usize / pairs.max(1);
    let requests = REQUESTS.min(limits.max_qp_wr as usize).min(completions);
    // A put, its signal, and as much again.
    if pairs > limits.max_qp as usize || requests < 4 {
        return Err(VerbsError::TooManyPairs { device: device.name.clone(), pairs });
    }
    Ok(Room { requests, pieces: PIECES.min(limits.max_sge as usize) })
}

/// By chance, so that no packet of an earlier connection is taken for one of this.
fn first_packet() -> u32 {
    getrandom::u32().unwrap_or_else(|_| std::process::id()) & ((1 << PACKET_BITS) - 1)
}

/// A rank's rail over RDMA: whatever is posted is taken, and goes on without the caller.
pub struct VerbsRail {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl VerbsRail {
    fn start(
        rank: usize,
        traffic: Traffic,
        channel: Arc<Channel>,
        arrivals: Arrivals,
        listener: Arc<dyn Listener>,
    ) -> Result<Self, VerbsError> {
        let refused = |error: std::io::Error| VerbsError::Thread(error.to_string());
        let shared = Arc::new(Shared::new(traffic).map_err(refused)?);
        let worker = Worker::new(&shared, channel, arrivals, listener).map_err(refused)?;
        let thread = std::thread::Builder::new().name(format!("rail-{rank}"));
        let thread = thread.spawn(|| worker.run()).map_err(refused)?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Rail for VerbsRail {
    fn post(&mut self, postings: &[Posting]) -> Result<usize, RailError> {
        let mut traffic = self.shared.traffic();
        traffic.post(postings)?;
        traffic.arm();
        if traffic.has_losses() {
            self.shared.ring();
        }
        Ok(postings.len())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), RailError> {
        let mut traffic = self.shared.traffic();
        traffic.advance();
        traffic.take_ready(completions);
        if traffic.has_losses() {
            self.shared.ring();
        }
        Ok(())
    }

    fn is_idle(&self) -> bool {
        self.shared.traffic().is_idle()
    }
}

impl NetworkRail for VerbsRail {
    fn drain(&mut self, end: Instant) -> Vec<usize> {
        let mut traffic = self.shared.traffic();
        traffic.draining = true;
        loop {
            traffic.advance();
            traffic.arm();
            if traffic.has_losses() {
                self.shared.ring();
            }
            let (behind, left) = (traffic.behind(), end.saturating_duration_since(Instant::now()));
            if behind.is_empty() || left.is_zero() {
                traffic.draining = false;
                return behind;
            }
            let waited = self.shared.progress.wait_timeout(traffic, left);
            traffic = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }
}

impl Drop for VerbsRail {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take() {
            // A listener that panics has said so.
            let _ = thread.join();
        }
    }
}
