//! One rank of a world of processes, on the host: its memory, and what its node shares with it.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::{Engine, Parts, World};
use crate::bootstrap::Bootstrap;
use crate::config::Config;
use crate::engine::join::{Hop1, JoinError, Joined, Member, Neighbour, Nic, Place, join};
use crate::fabric::doorbell::Bell;
use crate::fabric::memory::{Region, Regions};
use crate::fabric::process::{ProcessFabric, Railed};
use crate::fabric::rail::{Listener, NetworkRail, NicMemory};
use crate::fabric::shm::{SharedBell, SharedMemory};

/// What a rank has before it knows any other.
struct Own {
    place: Place,
    memory: SharedMemory,
    region: Region,
    bell_memory: SharedMemory,
    bell: Region,
    /// What [`Railed`] keeps, where there are several nodes.
    mirror: Option<Region>,
}

/// Regions by rank, bells by local rank: those of the node.
struct Node {
    regions: Arc<Regions>,
    bells: Vec<Arc<dyn Bell>>,
}

impl Engine {
    /// Joins the world of `config` as the rank that `bootstrap` says.
    ///
    /// # Errors
    /// See [`JoinError`].
    pub fn join(bootstrap: &mut dyn Bootstrap, config: Config) -> Result<Self, JoinError> {
        join(bootstrap, config, |place| Own::new(place).map_err(|error| format!("shared memory: {error}")))
    }
}

impl Own {
    fn new(place: &Place) -> io::Result<Self> {
        let (memory, region) = SharedMemory::new(place.map.memory.region)?;
        let (bell_memory, bell) = SharedMemory::new(SharedBell::BYTES)?;
        let several = place.config.topology().nodes() > 1;
        let mirror = several.then(|| Region::new(Railed::mirror_bytes(&place.map))).transpose()?;
        Ok(Self { place: place.clone(), memory, region, bell_memory, bell, mirror })
    }
}

impl Member for Own {
    type Engine = Engine;

    fn shared(&self) -> Vec<(BorrowedFd<'_>, usize)> {
        vec![
            (self.memory.as_fd(), self.place.map.memory.region),
            (self.bell_memory.as_fd(), SharedBell::BYTES),
        ]
    }

    fn nic(&self) -> Result<Nic, String> {
        let mirror = self.mirror.as_ref().ok_or("one node needs no network")?;
        // SAFETY: the memories go after what is made of them: both are the fabric's in the end, which drops its rail
        // first, and until then they are `self`'s, which outlives its share of the world.
        let (source, region) = unsafe { (mirror.mapped(), self.region.mapped()) };
        // Workers sleep until something comes.
        Ok(Nic { source: NicMemory::Host(source), region: NicMemory::Host(region), gpu: None, wakes: true })
    }

    fn start(self, joined: Joined) -> Result<Engine, String> {
        let Self { place, region, bell, mirror, .. } = self;
        let Joined { neighbours, control, hop1 } = joined;
        let node = Node::new(&place, (region, bell), neighbours)
            .map_err(|error| format!("shared memory: {error}"))?;
        let Place { rank, config, map } = place;
        let topology = config.topology();
        let parts = Parts {
            config: config.clone(),
            map: map.clone(),
            regions: node.regions.clone(),
            control: Arc::new(control),
            doorbell: node.bells[topology.local_of(rank)].clone(),
        };
        // A lane has a receiver and its channels: no more threads have anything to do.
        let workers = config.worker_budget().min(1 + config.channels());
        let mut failure = None;
        let world = World::new(parts, |listener| {
            let rail = mirror.zip(hop1).map(|(mirror, hop1)| {
                let rail = rail(rank, &mirror, &node.regions, hop1, listener.clone());
                rail.map(|rail| Railed::new(rail, mirror, &map, topology.nodes()))
            });
            let rail = rail.transpose().map_err(|reason| failure = Some(reason)).ok().flatten();
            let Node { regions, bells } = node;
            Arc::new(ProcessFabric::new((rank, topology), map, regions, bells, rail, listener))
        });
        match failure {
            Some(reason) => Err(reason),
            None => Engine::start(Arc::new(world), workers).map_err(|error| error.to_string()),
        }
    }
}

fn rail(
    rank: usize,
    mirror: &Region,
    regions: &Regions,
    hop1: Hop1,
    listener: Arc<dyn Listener>,
) -> Result<Box<dyn NetworkRail>, String> {
    // SAFETY: the fabric keeps both memories and drops its rail first; roles keep to the protocol.
    unsafe { hop1.rail(rank, (mirror.mapped(), regions[rank].mapped()), listener) }
}

impl Node {
    /// The node of `place`, whose own region and bell are mapped already.
    fn new(place: &Place, (region, bell): (Region, Region), neighbours: Vec<Neighbour>) -> io::Result<Self> {
        let topology = place.config.topology();
        let mut regions: Vec<_> = (0..topology.world_size()).map(|_| None).collect();
        let mut bells: Vec<_> = (0..topology.ranks_per_node()).map(|_| None).collect();
        let own = (place.rank, region, bell);
        let map = |Neighbour { rank, pieces }: Neighbour| {
            let mut pieces =
                pieces.into_iter().map(|(memory, bytes)| SharedMemory::adopt(memory, bytes)?.map());
            let mut next = || pieces.next().unwrap_or_else(|| Err(io::ErrorKind::InvalidData.into()));
            Ok((rank, next()?, next()?))
        };
        let others = neighbours.into_iter().map(map).collect::<io::Result<Vec<_>>>()?;
        for (rank, region, bell) in others.into_iter().chain([own]) {
            regions[rank] = Some(region);
            bells[topology.local_of(rank)] = Some(Arc::new(SharedBell::new(bell)) as Arc<dyn Bell>);
        }
        Ok(Self {
            regions: Arc::new(regions.into_iter().collect()),
            bells: bells.into_iter().flatten().collect(),
        })
    }
}
