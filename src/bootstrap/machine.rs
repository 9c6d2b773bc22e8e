//! Which ranks can share memory.

use std::fs;
use std::io;
use std::time::Duration;

use super::{Bootstrap, BootstrapError};
use crate::error::ConfigError;
use crate::topology::Topology;

/// What processes that can share memory have in common, and no others: the running system, and the network in which they
/// find each other's sockets.
pub(crate) fn identity() -> io::Result<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let network = fs::read_link("/proc/self/ns/net")?;
    Ok(format!("{} {}", boot.trim(), network.display()))
}

/// The world's shape by who can share memory with whom.
pub(super) fn topology(
    bootstrap: &mut dyn Bootstrap,
    deadline: Duration,
) -> Result<Topology, BootstrapError> {
    let own = identity().map_err(|error| BootstrapError::io("the machine has no name", &error))?;
    shape(&bootstrap.all_gather(own.as_bytes(), deadline)?)
}

/// The shape of a world whose ranks are on these machines, in rank order.
fn shape(machines: &[Vec<u8>]) -> Result<Topology, BootstrapError> {
    let nodes: Vec<&[Vec<u8>]> = machines.chunk_by(|a, b| a == b).collect();
    let size = nodes.first().map_or(0, |node| node.len());
    let once = nodes.iter().enumerate().all(|(i, node)| nodes[..i].iter().all(|other| other[0] != node[0]));
    let reason =
        "machines have as many ranks each, numbered one machine after the other, or nodes must be given";
    let even = once && nodes.iter().all(|node| node.len() == size);
    ConfigError::check(even, "ranks_per_node", size, reason, None)?;
    Ok(Topology::new(nodes.len(), size)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_nodes() {
        let shape = |names: &str| shape(&names.bytes().map(|name| vec![name]).collect::<Vec<_>>());
        assert_eq!(shape("aabb").unwrap(), Topology::new(2, 2).unwrap());
        assert_eq!(shape("aaa").unwrap(), Topology::new(1, 3).unwrap());
        assert_eq!(shape("abc").unwrap(), Topology::new(3, 1).unwrap());
        assert!(["aab", "abab", "abba"].iter().all(|names| shape(names).is_err()));
    }

    #[test]
    fn ranks_of_one_process_are_one_node() {
        let ranks = super::super::LocalBootstrap::world(3);
        std::thread::scope(|scope| {
            for mut rank in ranks {
                scope.spawn(move || {
                    let found = topology(&mut rank, Duration::from_secs(60)).unwrap();
                    assert_eq!(found, Topology::new(1, 3).unwrap());
                });
            }
        });
    }
}
