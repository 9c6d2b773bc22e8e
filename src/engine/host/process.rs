//! One rank of a world of processes: its memory, its connections, its engine.
//!
//! 1. What can fail here alone comes first: memory, the door, the network's device.
//! 2. All ranks are told what others must know of each, or why there is nothing to know.
//! 3. They connect, and the processes of a node map each other's memory.
//! 4. All are told that all have.

#![allow(unsafe_code)]

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Engine, Parts, World};
use crate::bootstrap::{Bootstrap, BootstrapError};
use crate::config::{Carrier, Config};
use crate::engine::control::Control;
use crate::engine::mesh::Mesh;
use crate::error::ConfigError;
use crate::fabric::connect::{Address, ConnectError, Door, Links, World as Whom};
use crate::fabric::descriptor::{recv_fd, send_fd};
use crate::fabric::doorbell::Bell;
use crate::fabric::memory::{Region, Regions};
use crate::fabric::process::{ProcessFabric, Railed};
use crate::fabric::rail::{Listener, NetworkRail, TcpPeer, TcpRail};
use crate::fabric::shm::{SharedBell, SharedMemory};
use crate::topology::Topology;
use crate::wire::region::RegionMap;

/// How much longer than for its connections a rank waits to hear what the others came to.
const GRACE: Duration = Duration::from_millis(500);

/// Why a world of processes did not come about. All its ranks get an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// The exchange between the ranks has failed.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// The configuration can't work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Two ranks have different configurations.
    #[error("rank {rank} has the configuration {theirs}; rank {reference} has {ours}")]
    Mismatch {
        /// One of them.
        rank: usize,
        /// What it has.
        theirs: String,
        /// The other.
        reference: usize,
        /// What that one has.
        ours: String,
    },
    /// Two ranks of a node can't share memory.
    #[error("ranks {0} and {1} are on one node by the configuration, but not on one machine")]
    NotOneNode(usize, usize),
    /// A rank can't do its part.
    #[error("rank {rank}: {reason}")]
    Rank {
        /// The rank.
        rank: usize,
        /// Why.
        reason: String,
    },
}

/// What the others must know of a rank.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Card {
    agreement: u64,
    /// What the agreement is about, for people.
    summary: String,
    /// What only ranks of one machine have in common.
    machine: String,
    address: Address,
    region_bytes: usize,
    connections: usize,
}

/// What a rank has before it knows any other.
struct Own {
    memory: SharedMemory,
    region: Region,
    bell_memory: SharedMemory,
    bell: SharedBell,
    mirror: Option<Region>,
    door: Door,
    card: Card,
}

/// One rank on its way into the world.
struct Joining<'a> {
    bootstrap: &'a mut dyn Bootstrap,
    rank: usize,
    config: Arc<Config>,
    map: Arc<RegionMap>,
}

/// What a rank has of its node.
struct Node {
    regions: Regions,
    bells: Vec<Arc<dyn Bell>>,
    own: Arc<dyn Bell>,
}

impl Engine {
    /// Joins the world of `config` as the rank that `bootstrap` says.
    ///
    /// # Errors
    /// See [`JoinError`].
    pub fn join(bootstrap: &mut dyn Bootstrap, config: Config) -> Result<Self, JoinError> {
        let (ranks, size) = (bootstrap.world_size(), config.topology().world_size());
        let other = "the bootstrap has another number of ranks";
        ConfigError::check(ranks == size, "world_size", size, other, Some(ranks))?;
        let (rank, map) = (bootstrap.rank(), Arc::new(RegionMap::new(&config)));
        Joining { bootstrap, rank, config: Arc::new(config), map }.join()
    }
}

impl Joining<'_> {
    fn join(mut self) -> Result<Engine, JoinError> {
        let own = self.prepare();
        let told = own.as_ref().map(|own| own.card.clone()).map_err(String::clone);
        let deadline = self.config.deadline;
        let cards = self.exchange(told, deadline)?;
        self.check(&cards)?;
        let end = Instant::now() + deadline;
        let engine = own.and_then(|own| self.connect(own, &cards, end));
        let told = engine.as_ref().map(|_| ()).map_err(String::clone);
        // All had the same time, whatever became of it here.
        self.exchange(told, end.saturating_duration_since(Instant::now()) + GRACE)?;
        engine.map_err(|reason| JoinError::Rank { rank: self.rank, reason })
    }

    /// Tells all ranks what this one came to; what they came to, if all are well.
    fn exchange<T: Serialize + for<'de> Deserialize<'de>>(
        &mut self,
        mine: Result<T, String>,
        deadline: Duration,
    ) -> Result<Vec<T>, JoinError> {
        let bytes = postcard::to_stdvec(&mine).expect("cards can be written");
        let all = self.bootstrap.all_gather(&bytes, deadline)?;
        let read = |(rank, bytes): (usize, Vec<u8>)| {
            let refuse = |reason| JoinError::Rank { rank, reason };
            let said: Result<T, String> =
                postcard::from_bytes(&bytes).map_err(|_| refuse("what it says makes no sense".into()))?;
            said.map_err(refuse)
        };
        all.into_iter().enumerate().map(read).collect()
    }

    /// All that can fail without any other rank.
    fn prepare(&mut self) -> Result<Own, String> {
        let several = self.config.topology().nodes() > 1;
        if self.config.network().carrier == Carrier::Verbs && several {
            return Err("RDMA is not here".into());
        }
        let what = |what: &'static str| move |error| format!("{what}: {error}");
        let (memory, region) = SharedMemory::new(self.map.memory.region).map_err(what("shared memory"))?;
        let (bell_memory, page) = SharedMemory::new(SharedBell::BYTES).map_err(what("shared memory"))?;
        let mirror = several.then(|| Region::new(Railed::mirror_bytes(&self.map)));
        let interface = self.interface();
        let door = Door::new(interface).map_err(|error| format!("connections to {interface}: {error}"))?;
        let card = Card {
            agreement: self.config.agreement(),
            summary: self.config.summary(),
            machine: machine().map_err(what("the machine has no name"))?,
            address: door.address().clone(),
            region_bytes: region.bytes(),
            connections: self.config.network().connections,
        };
        let mirror = mirror.transpose().map_err(what("memory"))?;
        Ok(Own { memory, region, bell_memory, bell: SharedBell::new(page), mirror, door, card })
    }

    /// The address that others are to connect to.
    fn interface(&self) -> IpAddr {
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        let known = self.config.network().interface.or_else(|| self.bootstrap.own_address());
        let alone = self.config.topology().nodes() == 1;
        known.unwrap_or_else(|| if alone { loopback } else { outward().unwrap_or(loopback) })
    }

    fn check(&self, cards: &[Card]) -> Result<(), JoinError> {
        let topology = self.config.topology();
        for (rank, card) in cards.iter().enumerate() {
            if card.agreement != cards[0].agreement {
                let (theirs, ours) = (card.summary.clone(), cards[0].summary.clone());
                return Err(JoinError::Mismatch { rank, theirs, reference: 0, ours });
            }
            let first = topology.rank(topology.node_of(rank), 0);
            if card.machine != cards[first].machine {
                return Err(JoinError::NotOneNode(first, rank));
            }
        }
        Ok(())
    }

    fn connect(&self, own: Own, cards: &[Card], end: Instant) -> Result<Engine, String> {
        let (rank, topology) = (self.rank, self.config.topology());
        let addresses: Vec<Address> = cards.iter().map(|card| card.address.clone()).collect();
        let connections = cards.iter().map(|card| card.connections).min().unwrap_or(1);
        let whom = Whom { rank, topology, addresses: &addresses, connections, end };
        let links = own.door.connect(whom).map_err(|error: ConnectError| error.to_string())?;
        let Links { control, node, rail } = links;
        let here = Neighbours { topology, cards, end }.share(own.memory, own.bell_memory, &node);
        let (regions, bells) = here?;
        let node = self.node(own.region, own.bell, regions, bells);
        let mesh = Mesh::new(rank, control).map_err(|error| error.to_string())?;
        let peers: Vec<TcpPeer> = rail
            .into_iter()
            .enumerate()
            .map(|(rank, links)| TcpPeer { rank, connections: links.into_iter().flatten().collect() })
            .filter(|peer| !peer.connections.is_empty())
            .collect();
        let on_rail = |rank| usize::from(peers.iter().any(|peer| peer.rank == rank));
        let ways = (0..cards.len()).map(|rank| 1 + on_rail(rank)).collect();
        self.start(node, Control::over(Arc::new(mesh), ways), own.mirror.map(|mirror| (mirror, peers)))
    }

    /// This rank's node, by rank and by local rank; none of `regions` and `bells` is the rank's own.
    fn node(
        &self,
        region: Region,
        bell: SharedBell,
        mut regions: Vec<Option<Region>>,
        mut bells: Vec<Option<SharedBell>>,
    ) -> Node {
        let local = self.config.topology().local_of(self.rank);
        regions[self.rank] = Some(region);
        bells[local] = Some(bell);
        let bells: Vec<Arc<dyn Bell>> =
            bells.into_iter().flatten().map(|bell| Arc::new(bell) as Arc<dyn Bell>).collect();
        Node { regions: regions.into_iter().collect(), own: bells[local].clone(), bells }
    }

    fn start(
        &self,
        node: Node,
        control: Control,
        rail: Option<(Region, Vec<TcpPeer>)>,
    ) -> Result<Engine, String> {
        let (config, map, regions) = (self.config.clone(), self.map.clone(), Arc::new(node.regions));
        let parts =
            Parts { config, map, regions: regions.clone(), control: Arc::new(control), doorbell: node.own };
        let mut failure = None;
        let world = World::new(parts, |listener| {
            let railed = rail.map(|(mirror, peers)| self.railed(mirror, &regions, peers, listener.clone()));
            let railed = railed.transpose().map_err(|reason| failure = Some(reason)).ok().flatten();
            let place = (self.rank, self.config.topology());
            Arc::new(ProcessFabric::new(place, self.map.clone(), regions, node.bells, railed, listener))
        });
        if let Some(reason) = failure {
            return Err(reason);
        }
        // A lane has a receiver and its channels, and at most as many threads have anything to do.
        let most = 1 + self.config.channels();
        let workers = self.config.worker_budget().min(most);
        Engine::start(Arc::new(world), workers).map_err(|error| error.to_string())
    }

    fn railed(
        &self,
        mirror: Region,
        regions: &Regions,
        peers: Vec<TcpPeer>,
        listener: Arc<dyn Listener>,
    ) -> Result<Railed, String> {
        // SAFETY: both memories are kept by the fabric that keeps the rail, and go after it; roles keep to the protocol.
        let rail =
            unsafe { TcpRail::new(self.rank, mirror.mapped(), regions[self.rank].mapped(), peers, listener) };
        let rail: Box<dyn NetworkRail> = Box::new(rail.map_err(|error| format!("the rail: {error}"))?);
        Ok(Railed::new(rail, mirror, &self.map, self.config.topology().nodes()))
    }
}

/// The other ranks of the node.
struct Neighbours<'a> {
    topology: Topology,
    cards: &'a [Card],
    end: Instant,
}

/// Regions by rank, bells by local rank.
type Shared = (Vec<Option<Region>>, Vec<Option<SharedBell>>);

impl Neighbours<'_> {
    /// Gives the memory of this rank to its neighbours over `sockets`, and maps theirs.
    fn share(
        &self,
        memory: SharedMemory,
        bell: SharedMemory,
        sockets: &[Option<std::os::unix::net::UnixStream>],
    ) -> Result<Shared, String> {
        let topology = self.topology;
        let mut regions: Vec<_> = self.cards.iter().map(|_| None).collect();
        let mut bells: Vec<_> = (0..topology.ranks_per_node()).map(|_| None).collect();
        let lost = |rank: usize| move |error: &dyn Display| format!("memory of rank {rank}: {error}");
        // All is sent before any is awaited, and so little fits any socket.
        for (rank, socket) in sockets.iter().enumerate() {
            let Some(socket) = socket else { continue };
            let sent =
                send_fd(socket, memory.as_fd(), REGION).and_then(|()| send_fd(socket, bell.as_fd(), BELL));
            sent.map_err(|error| lost(rank)(&error))?;
        }
        for (rank, socket) in sockets.iter().enumerate() {
            let Some(socket) = socket else { continue };
            let receive = |label, bytes| {
                let (descriptor, got) = recv_fd(socket, self.end)?;
                match got == label {
                    true => SharedMemory::adopt(descriptor, bytes)?.map(),
                    false => Err(std::io::ErrorKind::InvalidData.into()),
                }
            };
            let region =
                receive(REGION, self.cards[rank].region_bytes).map_err(|error| lost(rank)(&error))?;
            let page = receive(BELL, SharedBell::BYTES).map_err(|error| lost(rank)(&error))?;
            regions[rank] = Some(region);
            bells[topology.local_of(rank)] = Some(SharedBell::new(page));
        }
        Ok((regions, bells))
    }
}

/// What descriptors are called on their way.
const REGION: u64 = 1;
const BELL: u64 = 2;

/// What the processes of one running system have in common, and no others.
fn machine() -> std::io::Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_string())
}

/// The address from which this machine reaches others, if it has one. Nothing is sent.
fn outward() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    // Kept for documentation: nobody's.
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}
