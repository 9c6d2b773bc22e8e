//! One rank of a world of processes, on its device: what it brings to the join, and what carries its hop 1.
//!
//! The processes of a node map each other's regions, and kernels signal there as within a process. Between nodes the
//! network's device reads and writes the memory of this one where that is possible (RDMA, by dma-buf); otherwise what is
//! posted goes over TCP by way of mirrors in pinned memory.

#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::rank::{Rank, check_devices};
use super::{Engine, MonitorBell, Parts, settings};
use crate::bootstrap::Bootstrap;
use crate::config::{Config, Cuda};
use crate::device::Driver;
use crate::device::cuda::{CudaDriver, ExportedMemory, ImportedMemory};
use crate::engine::completion::lock;
use crate::engine::control::Control;
use crate::engine::join::{Hop1, JoinError, Joined, Member, Neighbour, Nic, Place, join};
use crate::error::{Cause, DeviceError, Error};
use crate::fabric::rail::{
    Listener, Mirror, MirroredRail, MirroredRegion, NetworkRail, NicMemory, Rail, RailError, TcpPeer, TcpRail,
};
use crate::topology::Topology;

impl Engine {
    /// Joins the world of `config` as the rank that `bootstrap` says, on the device that the configuration names for it.
    ///
    /// # Errors
    /// See [`JoinError`].
    pub fn join(bootstrap: &mut dyn Bootstrap, config: Config) -> Result<Self, JoinError> {
        let cuda = settings(&config)?;
        join(bootstrap, config, |place| Own::new(place, cuda).map_err(|error| error.to_string()))
    }
}

/// What a rank has before it knows any other.
struct Own {
    place: Place,
    cuda: Cuda,
    rank: Rank,
    driver: Arc<CudaDriver>,
    /// Its region.
    exported: ExportedMemory,
}

impl Own {
    fn new(place: &Place, cuda: Cuda) -> Result<Self, Error> {
        let Place { rank, config, map } = place;
        let driver = CudaDriver::open(cuda.device(config.topology().local_of(*rank)))?;
        let seam: Arc<dyn Driver> = driver.clone();
        check_devices(config, &cuda, std::slice::from_ref(&seam))?;
        let rank = Rank::new(config, map, *rank, seam)?;
        let exported = driver.export(rank.region().raw())?;
        Ok(Self { place: place.clone(), cuda, rank, driver, exported })
    }

    /// Maps what the other processes of the node have sent.
    fn import(&self, neighbours: Vec<Neighbour>) -> Result<Vec<(usize, ImportedMemory)>, DeviceError> {
        let pieces = neighbours
            .into_iter()
            .flat_map(|Neighbour { rank, pieces }| pieces.into_iter().map(move |piece| (rank, piece)));
        let import = |(rank, (descriptor, bytes))| {
            Ok((rank, self.driver.import(&ExportedMemory::new(descriptor, bytes))?))
        };
        pieces.map(import).collect()
    }

    /// Tells kernels where the regions of the node are.
    fn connect(&self, imported: &[(usize, ImportedMemory)], topology: Topology) -> Result<(), Error> {
        let mut addresses = vec![self.rank.region().address(); topology.ranks_per_node()];
        for (rank, memory) in imported {
            addresses[topology.local_of(*rank)] = memory.address();
        }
        self.rank.connect(&addresses)
    }
}

impl Member for Own {
    type Engine = Engine;

    fn shared(&self) -> Vec<(BorrowedFd<'_>, usize)> {
        vec![(self.exported.as_fd(), self.exported.bytes())]
    }

    fn nic(&self) -> Result<Nic, String> {
        let share = |memory: &crate::device::Memory, bytes| {
            let descriptor = self.driver.dma_buf(memory.raw()).map_err(|error| error.to_string())?;
            Ok::<_, String>(NicMemory::Device { descriptor, offset: 0, address: memory.address(), bytes })
        };
        let private = self.rank.private();
        Ok(Nic {
            source: share(private, private.bytes())?,
            // Peers put nothing into the pool.
            region: share(self.rank.region(), self.place.map.pool)?,
            gpu: Some(self.driver.pci_address().map_err(|error| error.to_string())?),
            // Kernels poll.
            wakes: false,
        })
    }

    fn start(self, joined: Joined) -> Result<Engine, String> {
        let Joined { neighbours, control, hop1 } = joined;
        let topology = self.place.config.topology();
        let imported = self.import(neighbours).map_err(|error| format!("memory of the node: {error}"))?;
        self.connect(&imported, topology).map_err(|error| error.to_string())?;
        let (control, bell) = (Arc::new(control), Arc::<MonitorBell>::default());
        let ears = Arc::new(Ears { control: control.clone(), bell: bell.clone() });
        let Self { place: Place { rank: number, config, map }, cuda, rank, .. } = self;
        let network = hop1.map(|hop1| Network::new(&rank, map.pool, hop1, ears)).transpose()?;
        let parts = Parts {
            config,
            map,
            control,
            cuda,
            network,
            ranks: [(number, rank)].into(),
            neighbours: imported.into_iter().map(|(_, memory)| memory).collect(),
            bell,
        };
        Engine::start(parts).map_err(|error| error.to_string())
    }
}

/// Hop 1 of a rank in a process of its own. One rail serves all generations.
pub struct Network {
    // Dropped first: it lands in the mirror.
    rail: Arc<Mutex<Box<dyn NetworkRail>>>,
    /// Where what comes lands, if the network does not reach the device.
    mirrored: Option<Arc<MirroredRegion>>,
}

impl Network {
    /// What carries the postings of `rank`; its peers write the first `bytes` bytes of its region.
    fn new(rank: &Rank, bytes: usize, hop1: Hop1, listener: Arc<Ears>) -> Result<Self, String> {
        match hop1 {
            Hop1::Verbs(setup, cards) => {
                // SAFETY: both memories are the rank's, which the world drops after the network; kernels and proxy keep
                // to the protocol.
                let rail = unsafe { setup.connect(&cards, listener) }.map_err(|error| error.to_string())?;
                Ok(Self { rail: Arc::new(Mutex::new(Box::new(rail))), mirrored: None })
            }
            Hop1::Tcp(peers) => Self::mirrored(rank, bytes, peers, listener),
        }
    }

    fn mirrored(rank: &Rank, bytes: usize, peers: Vec<TcpPeer>, listener: Arc<Ears>) -> Result<Self, String> {
        let refused = |error: DeviceError| format!("mirrors for TCP: {error}");
        let source = Mirror::new(&rank.driver, rank.private().bytes()).map_err(refused)?;
        // SAFETY: as in `new`.
        let region = unsafe { MirroredRegion::new(&rank.driver, rank.region().into(), bytes) };
        let region = Arc::new(region.map_err(refused)?);
        // SAFETY: the rail keeps the landing, and the mirror is dropped after it; for the rest, as in `new`.
        let rail = unsafe { TcpRail::new(rank.rank, source.mapped(), region.clone(), peers, listener) };
        let rail = Box::new(rail.map_err(|error| format!("the rail over TCP: {error}"))?);
        // SAFETY: as in `new`.
        let rail = unsafe { MirroredRail::new(&rank.driver, rank.private().into(), source, rail) };
        let rail: Box<dyn NetworkRail> = Box::new(rail.map_err(refused)?);
        Ok(Self { rail: Arc::new(Mutex::new(rail)), mirrored: Some(region) })
    }

    fn lock(&self) -> MutexGuard<'_, Box<dyn NetworkRail>> {
        lock(&self.rail)
    }

    /// For a proxy.
    pub fn rail(&self) -> Box<dyn Rail> {
        Box::new(self.rail.clone())
    }

    /// Waits until all that was posted has arrived, at most until `end`; the peers of which that is not known by then. No
    /// proxy works meanwhile, and the next hears nothing of what the last has posted.
    pub fn drain(&self, end: Instant) -> Vec<usize> {
        let mut rail = self.lock();
        let missing = rail.drain(end);
        // A rail that is broken has said so to the proxy.
        let _ = rail.poll(&mut Vec::new());
        missing
    }

    /// Waits until what has come to this process is on its device.
    ///
    /// # Errors
    /// The device has failed.
    pub fn settle(&self) -> Result<(), DeviceError> {
        self.mirrored.as_ref().map_or(Ok(()), |mirrored| mirrored.settle())
    }
}

/// What a rail tells this process's rank. Its kernels poll their words by themselves.
struct Ears {
    control: Arc<Control>,
    bell: Arc<MonitorBell>,
}

impl Listener for Ears {
    fn signalled(&self) {}

    fn lost(&self, peer: usize, failure: Option<RailError>) {
        self.control.lose(peer, failure.map(Cause::from));
        self.bell.ring();
    }
}
