//! How a rank joins a world of processes, whatever runs its roles.
//!
//! 1. What can fail here alone comes first: memory, the door, the network's device.
//! 2. All ranks are told what others must know of each, or why there is nothing to know.
//! 3. They connect, and the processes of a node hand each other the descriptors of their memory.
//! 4. All are told that all have.

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::control::Control;
use super::mesh::Mesh;
use crate::bootstrap::{Bootstrap, BootstrapError, machine};
use crate::config::{Carrier, Config};
use crate::error::ConfigError;
use crate::fabric::connect::{Address, Door, Links, World as Whom};
use crate::fabric::descriptor::{recv_fd, send_fd};
use crate::fabric::mapped::Mapped;
use crate::fabric::rail::{
    Listener, NetworkRail, NicMemory, TcpPeer, TcpRail, VerbsEnd, VerbsError, VerbsSetup,
};
use crate::interface::Interface;
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
    #[error(
        "ranks {0} and {1} are on one node by the configuration, but not on one machine and in one network namespace"
    )]
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

/// A rank of a world that is about to be.
#[derive(Clone)]
pub struct Place {
    /// The rank.
    pub rank: usize,
    /// The configuration, equal on all ranks.
    pub config: Arc<Config>,
    /// The map of every region.
    pub map: Arc<RegionMap>,
}

/// What an engine brings to a world of processes.
pub trait Member: Sized {
    /// What it becomes.
    type Engine;

    /// Memory that the processes of the node map, and the size of each piece: as many on all ranks.
    fn shared(&self) -> Vec<(BorrowedFd<'_>, usize)>;

    /// What of it the network's device reads and writes.
    ///
    /// # Errors
    /// Such a device can't reach it.
    fn nic(&self) -> Result<Nic, String>;

    /// Takes what others have brought, and starts.
    ///
    /// # Errors
    /// The system refuses something.
    fn start(self, joined: Joined) -> Result<Self::Engine, String>;
}

/// What a network's device reaches of a rank.
pub struct Nic {
    /// Where the data of postings is.
    pub source: NicMemory,
    /// The region.
    pub region: NicMemory,
    /// PCI address of the rank's GPU.
    pub gpu: Option<String>,
    /// Whether peers' signals must wake somebody.
    pub wakes: bool,
}

/// The memory of another rank of the node.
pub struct Neighbour {
    /// The rank.
    pub rank: usize,
    /// Its pieces, as [`Member::shared`] lists them there.
    pub pieces: Vec<(OwnedFd, usize)>,
}

/// What a rank has of the others.
pub struct Joined {
    /// The rest of the node.
    pub neighbours: Vec<Neighbour>,
    /// The control channel.
    pub control: Control,
    /// None where there is one node.
    pub hop1: Option<Hop1>,
}

/// What carries hop 1 of a rank, as soon as it is told from where to where.
pub enum Hop1 {
    /// TCP.
    Tcp(Vec<TcpPeer>),
    /// RDMA, with the cards of the peers.
    Verbs(Box<VerbsSetup>, Vec<(usize, Vec<u8>)>),
}

impl Hop1 {
    /// The rail of `rank` from `source` to its peers' regions. Where it is RDMA, both were named by [`Member::nic`].
    ///
    /// # Errors
    /// The system or the device refuses something.
    ///
    /// # Safety
    /// The memories outlive the rail; what is posted keeps to the protocol.
    #[allow(unsafe_code)]
    pub unsafe fn rail(
        self,
        rank: usize,
        (source, region): (Mapped, Mapped),
        listener: Arc<dyn Listener>,
    ) -> Result<Box<dyn NetworkRail>, String> {
        match self {
            Self::Tcp(peers) => {
                // SAFETY: the caller's.
                let rail = unsafe { TcpRail::new(rank, source, Arc::new(region), peers, listener) };
                Ok(Box::new(rail.map_err(|error| format!("the rail over TCP: {error}"))?))
            }
            Self::Verbs(setup, cards) => {
                // SAFETY: the caller's.
                let rail = unsafe { setup.connect(&cards, listener) };
                Ok(Box::new(rail.map_err(|error| error.to_string())?))
            }
        }
    }
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
    /// Sizes of the memory that the node maps.
    shared: Vec<usize>,
    connections: usize,
    /// Its card for RDMA, or why it has none.
    verbs: Result<Vec<u8>, String>,
}

/// What a rank has before it knows any other.
struct Own<M> {
    /// Dropped before the memory that it names.
    verbs: Option<VerbsSetup>,
    member: M,
    door: Door,
    card: Card,
}

/// Joins the world of `config` as the rank that `bootstrap` says, with what `prepare` makes.
///
/// # Errors
/// See [`JoinError`].
pub fn join<M: Member>(
    bootstrap: &mut dyn Bootstrap,
    config: Config,
    prepare: impl FnOnce(&Place) -> Result<M, String>,
) -> Result<M::Engine, JoinError> {
    let (ranks, size) = (bootstrap.world_size(), config.topology().world_size());
    let other = "the bootstrap has another number of ranks";
    ConfigError::check(ranks == size, "world_size", size, other, Some(ranks))?;
    let map = Arc::new(RegionMap::new(&config));
    let place = Place { rank: bootstrap.rank(), config: Arc::new(config), map };
    let mut joining = Joining { bootstrap, place };
    let own = prepare(&joining.place).and_then(|member| joining.prepare(member));
    let told = own.as_ref().map(|own| own.card.clone()).map_err(String::clone);
    let deadline = joining.place.config.deadline;
    let cards = joining.exchange(told, deadline)?;
    joining.check(&cards)?;
    let end = Instant::now() + deadline;
    let engine = own.and_then(|own| joining.connect(own, &cards, end));
    let told = engine.as_ref().map(|_| ()).map_err(String::clone);
    // All had the same time, whatever became of it here.
    joining.exchange(told, end.saturating_duration_since(Instant::now()) + GRACE)?;
    engine.map_err(|reason| JoinError::Rank { rank: joining.place.rank, reason })
}

/// One rank on its way into the world.
struct Joining<'a> {
    bootstrap: &'a mut dyn Bootstrap,
    place: Place,
}

impl Joining<'_> {
    fn topology(&self) -> Topology {
        self.place.config.topology()
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

    /// All that can fail without any other rank, beside the engine's own.
    fn prepare<M: Member>(&self, member: M) -> Result<Own<M>, String> {
        let Place { config, .. } = &self.place;
        let verbs = self.verbs(&member)?;
        let address = self.address()?;
        let door = Door::new(address).map_err(|error| format!("connections to {address}: {error}"))?;
        let card = Card {
            agreement: config.agreement(),
            summary: config.summary(),
            machine: machine::identity().map_err(|error| format!("the machine has no name: {error}"))?,
            address: door.address().clone(),
            shared: member.shared().iter().map(|(_, bytes)| *bytes).collect(),
            connections: config.network().connections,
            verbs: verbs.as_ref().map(VerbsSetup::card).map_err(String::clone),
        };
        Ok(Own { member, door, verbs: verbs.ok(), card })
    }

    /// The device for RDMA, or why there is none; an error where there must be one.
    fn verbs(&self, member: &impl Member) -> Result<Result<VerbsSetup, String>, String> {
        let (config, topology) = (&self.place.config, self.topology());
        let carrier = config.network().carrier;
        if topology.nodes() == 1 || carrier == Carrier::Tcp {
            return Ok(Err("it was not asked for".into()));
        }
        let opened = member.nic().and_then(|nic| {
            let peers = rail_peers(topology, self.place.rank);
            let end = VerbsEnd {
                config: &config.network().verbs,
                rank: self.place.rank,
                local_rank: topology.local_of(self.place.rank),
                gpu: nic.gpu.as_deref(),
                peers: &peers,
                source: nic.source,
                region: nic.region,
                wakes: nic.wakes,
            };
            VerbsSetup::open(end).map_err(|error: VerbsError| error.to_string())
        });
        match (carrier, opened) {
            (Carrier::Verbs, Err(reason)) => Err(reason),
            (_, opened) => Ok(opened),
        }
    }

    /// The address that others are to connect to.
    fn address(&self) -> Result<IpAddr, String> {
        let chosen = self.place.config.network().interface.as_ref().map(Interface::address);
        let known = chosen.transpose().map_err(|error| error.to_string())?;
        let beyond = || if self.topology().nodes() > 1 { outward() } else { None };
        let found = known.or_else(|| self.bootstrap.own_address()).or_else(beyond);
        Ok(found.unwrap_or(Ipv4Addr::LOCALHOST.into()))
    }

    fn check(&self, cards: &[Card]) -> Result<(), JoinError> {
        let topology = self.topology();
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

    fn connect<M: Member>(&self, own: Own<M>, cards: &[Card], end: Instant) -> Result<M::Engine, String> {
        let (rank, topology) = (self.place.rank, self.topology());
        let addresses: Vec<Address> = cards.iter().map(|card| card.address.clone()).collect();
        let rdma = cards.iter().all(|card| card.verbs.is_ok());
        let connections = cards.iter().map(|card| card.connections).min().unwrap_or(1);
        let connections = if rdma { 0 } else { connections };
        let whom = Whom { rank, topology, addresses: &addresses, connections, end };
        let Links { control, node, rail } = own.door.connect(whom).map_err(|error| error.to_string())?;
        let neighbours = Neighbours { cards, end }.share(&own.member.shared(), &node)?;
        let hop1 = (topology.nodes() > 1).then(|| match own.verbs.filter(|_| rdma) {
            Some(setup) => Hop1::Verbs(Box::new(setup), verbs_cards(topology, rank, cards)),
            None => Hop1::Tcp(tcp_peers(rail)),
        });
        self.say_carrier(hop1.as_ref(), cards);
        let mesh = Mesh::new(rank, control).map_err(|error| error.to_string())?;
        // The mesh, and a rail that tells when a peer has closed its end. RDMA has no such end: what a rank has sent by it
        // has arrived before the rank says that it leaves.
        let tells = matches!(hop1, Some(Hop1::Tcp(_)));
        let ways = |peer| 1 + usize::from(tells && rail_peers(topology, rank).contains(&peer));
        let control = Control::over(Arc::new(mesh), (0..cards.len()).map(ways).collect());
        own.member.start(Joined { neighbours, control, hop1 })
    }

    fn say_carrier(&self, hop1: Option<&Hop1>, cards: &[Card]) {
        let rank = self.place.rank;
        match hop1 {
            None => {}
            Some(Hop1::Verbs(setup, _)) => {
                tracing::info!(rank, device = setup.device(), "hop 1 goes over RDMA")
            }
            Some(Hop1::Tcp(_)) => {
                let lacks = cards
                    .iter()
                    .enumerate()
                    .find_map(|(rank, card)| Some((rank, card.verbs.as_ref().err()?)));
                let (lacking, why) = lacks.map_or((rank, ""), |(rank, why)| (rank, why));
                tracing::info!(rank, lacking, why, "hop 1 goes over TCP");
            }
        }
    }
}

/// The ranks on the other nodes with the same index.
fn rail_peers(topology: Topology, rank: usize) -> Vec<usize> {
    let (node, local) = (topology.node_of(rank), topology.local_of(rank));
    (0..topology.nodes()).filter(|&other| other != node).map(|other| topology.rank(other, local)).collect()
}

fn tcp_peers(rail: Vec<Vec<Option<std::net::TcpStream>>>) -> Vec<TcpPeer> {
    let peer = |(rank, links): (usize, Vec<Option<_>>)| TcpPeer {
        rank,
        connections: links.into_iter().flatten().collect(),
    };
    rail.into_iter().enumerate().map(peer).filter(|peer| !peer.connections.is_empty()).collect()
}

fn verbs_cards(topology: Topology, rank: usize, cards: &[Card]) -> Vec<(usize, Vec<u8>)> {
    let card = |peer: usize| Some((peer, cards[peer].verbs.clone().ok()?));
    rail_peers(topology, rank).into_iter().filter_map(card).collect()
}

/// The other ranks of the node.
struct Neighbours<'a> {
    cards: &'a [Card],
    end: Instant,
}

impl Neighbours<'_> {
    /// Gives the memory of this rank to its neighbours over `sockets`, by rank, and takes theirs.
    fn share(
        &self,
        own: &[(BorrowedFd<'_>, usize)],
        sockets: &[Option<UnixStream>],
    ) -> Result<Vec<Neighbour>, String> {
        let lost = |rank: usize| move |error: &dyn Display| format!("memory of rank {rank}: {error}");
        let open = || sockets.iter().enumerate().filter_map(|(rank, socket)| Some((rank, socket.as_ref()?)));
        // All is sent before any is awaited, and so little fits any socket.
        for (rank, socket) in open() {
            let mut numbered = own.iter().enumerate();
            let sent = numbered.try_for_each(|(number, (memory, _))| send_fd(socket, *memory, number as u64));
            sent.map_err(|error| lost(rank)(&error))?;
        }
        let receive = |rank: usize, socket| {
            let piece = |(number, &bytes): (usize, &usize)| match recv_fd(socket, self.end)? {
                (descriptor, got) if got == number as u64 => Ok((descriptor, bytes)),
                _ => Err(std::io::Error::from(std::io::ErrorKind::InvalidData)),
            };
            let pieces: Result<_, _> = self.cards[rank].shared.iter().enumerate().map(piece).collect();
            Ok(Neighbour { rank, pieces: pieces.map_err(|error| lost(rank)(&error))? })
        };
        open().map(|(rank, socket)| receive(rank, socket)).collect()
    }
}

/// The address from which this machine reaches others, if it has one. Nothing is sent.
fn outward() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    // Kept for documentation: nobody's.
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}
