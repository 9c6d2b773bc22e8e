//! What each rank is told of its world.

use std::net::{Ipv4Addr, TcpListener};

use railhop::bootstrap::{Address, Launcher, Local, Member, derived_port};
use railhop::{Interface, Topology};

/// Job ids that are tried for a port that is free.
const ATTEMPTS: usize = 1000;

/// What all ranks have in common.
///
/// The job's id is 128 random bits: who doesn't know it is no member. It lies in the environment of the ranks, which
/// only their user can read (as with a file that nobody else may open), and so it leaves nothing behind, however the
/// launcher ends.
pub struct Job {
    topology: Topology,
    id: String,
    store: Address,
    /// Of each node, where nodes have addresses of their own.
    addresses: Option<Vec<Ipv4Addr>>,
}

impl Job {
    /// A new job. Where nodes have no addresses of their own, all is on the loopback device.
    pub fn new(topology: Topology, addresses: Option<Vec<Ipv4Addr>>) -> Result<Self, String> {
        let host = addresses.as_ref().map_or(Ipv4Addr::LOCALHOST, |addresses| addresses[0]);
        for _ in 0..ATTEMPTS {
            let id = random_id()?;
            let port = derived_port(&id);
            // In a network of its own every port is free.
            if addresses.is_some() || TcpListener::bind((host, port)).is_ok() {
                let store = Address { host: host.to_string(), port };
                return Ok(Self { topology, id, store, addresses });
            }
        }
        Err(format!("no port for the store is free on {host}"))
    }

    /// What this rank is told.
    pub fn member(&self, rank: usize) -> Member {
        let node = self.topology.node_of(rank);
        Member {
            rank,
            world_size: self.topology.world_size(),
            local: Some(Local { rank: self.topology.local_of(rank), size: self.topology.ranks_per_node() }),
            node: None,
            store: self.store.clone(),
            interface: self.addresses.as_ref().map(|addresses| Interface::Address(addresses[node].into())),
            secret_file: None,
            job_id: self.id.clone(),
            launcher: Launcher::Explicit,
        }
    }
}

fn random_id() -> Result<String, String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| format!("no random numbers: {error}"))?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}
