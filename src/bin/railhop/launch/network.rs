//! A network namespace for each node.
//!
//! Each node has one, with a device `eth0`, and one more has the switch between them. So nothing of it appears among the
//! machine's own devices, addresses or firewall rules; networks of several launchers don't see each other; and removing
//! the namespaces removes it all. They are named `railhop-PID-NODE` after the launcher, which is how the next launcher
//! knows those that a killed one has left behind.

use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{self, Command};

use rustix::process::{Pid, geteuid, test_kill_process};

/// Where `ip netns` keeps namespaces.
const NAMESPACES: &str = "/run/netns";

/// Nodes of a /24.
const MAX_NODES: usize = 254;

/// What a switch holds of a limited link: no packet is larger, and at 10 Gbit/s it is worth 0.2 ms.
const BURST: &str = "256kb";

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("--netns needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN): network namespaces are made and entered")]
    NotRoot,
    #[error("--netns is for at most {MAX_NODES} nodes, not {0}")]
    TooManyNodes(usize),
    #[error("--netns needs the command `{0}`: install iproute2")]
    NoCommand(&'static str),
    #[error("`{command}` failed: {reason}")]
    Failed { command: String, reason: String },
}

/// The nodes' namespaces, until it is dropped.
pub struct Network {
    launcher: u32,
    nodes: usize,
}

impl Network {
    /// Namespaces for so many nodes, each link limited to `rate` both ways, if any. Removes what launchers have left
    /// behind that are no more.
    pub fn new(nodes: usize, rate: Option<&str>) -> Result<Self, NetworkError> {
        if !geteuid().is_root() {
            return Err(NetworkError::NotRoot);
        }
        if nodes > MAX_NODES {
            return Err(NetworkError::TooManyNodes(nodes));
        }
        remove_leftovers();
        let network = Self { launcher: process::id(), nodes };
        let switch = network.switch();
        ip(&format!("netns add {switch}"))?;
        ip(&format!("-n {switch} link add switch mtu 9000 type bridge"))?;
        ip(&format!("-n {switch} link set switch up"))?;
        for node in 0..nodes {
            network.connect(node)?;
            if let Some(rate) = rate {
                network.limit(node, rate)?;
            }
        }
        Ok(network)
    }

    /// Makes a node's namespace and its link to the switch.
    fn connect(&self, node: usize) -> Result<(), NetworkError> {
        let (name, switch, address) = (self.name(node), self.switch(), self.address(node));
        ip(&format!("netns add {name}"))?;
        ip(&format!(
            "-n {switch} link add node{node} mtu 9000 type veth peer name eth0 mtu 9000 netns {name}"
        ))?;
        ip(&format!("-n {switch} link set node{node} master switch up"))?;
        ip(&format!("-n {name} addr add {address}/24 dev eth0"))?;
        ip(&format!("-n {name} link set eth0 up"))?;
        ip(&format!("-n {name} link set lo up"))
    }

    /// Each end limits what it sends.
    fn limit(&self, node: usize, rate: &str) -> Result<(), NetworkError> {
        for (name, device) in [(self.name(node), "eth0".to_string()), (self.switch(), format!("node{node}"))]
        {
            let limit = format!("root tbf rate {rate} burst {BURST} latency 50ms");
            command("tc", &format!("-n {name} qdisc add dev {device} {limit}"))?;
        }
        Ok(())
    }

    /// The nodes' addresses, of a /24 that tells launchers apart in logs.
    pub fn addresses(&self) -> Vec<Ipv4Addr> {
        (0..self.nodes).map(|node| self.address(node)).collect()
    }

    fn address(&self, node: usize) -> Ipv4Addr {
        let [.., high, low] = self.launcher.to_be_bytes();
        Ipv4Addr::new(10, high, low, node as u8 + 1)
    }

    /// A node's namespace.
    pub fn namespace(&self, node: usize) -> Result<File, NetworkError> {
        let path = Path::new(NAMESPACES).join(self.name(node));
        File::open(&path).map_err(|error| failed(&format!("open {}", path.display()), &error))
    }

    fn name(&self, node: usize) -> String {
        format!("railhop-{}-{node}", self.launcher)
    }

    fn switch(&self) -> String {
        format!("railhop-{}-switch", self.launcher)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in (0..self.nodes).map(|node| self.name(node)).chain([self.switch()]) {
            remove(&name);
        }
    }
}

/// Removes namespaces of launchers that have been killed. Any that have this one's number are of an earlier process.
fn remove_leftovers() {
    let entries = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
        let launcher = name.strip_prefix("railhop-").and_then(|rest| rest.split('-').next()?.parse().ok());
        let is_dead = |launcher: i32| {
            let pid = Pid::from_raw(launcher).filter(|&pid| pid != rustix::process::getpid());
            pid.is_none_or(|pid| test_kill_process(pid) == Err(rustix::io::Errno::SRCH))
        };
        if launcher.is_some_and(is_dead) {
            remove(&name);
        }
    }
}

/// Removes a namespace, if it is there: several launchers may be at it.
fn remove(name: &str) {
    if let Err(error) = ip(&format!("netns del {name}")) {
        tracing::debug!(%error, "a network namespace is not removed");
    }
}

fn ip(words: &str) -> Result<(), NetworkError> {
    command("ip", words)
}

/// Runs a command with these words.
fn command(name: &'static str, words: &str) -> Result<(), NetworkError> {
    let text = format!("{name} {words}");
    match Command::new(name).args(words.split(' ')).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let reason = String::from_utf8_lossy(&output.stderr).trim().to_string();
            Err(NetworkError::Failed { command: text, reason })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(NetworkError::NoCommand(name)),
        Err(error) => Err(failed(&text, &error)),
    }
}

fn failed(command: &str, error: &io::Error) -> NetworkError {
    NetworkError::Failed { command: command.into(), reason: error.to_string() }
}
