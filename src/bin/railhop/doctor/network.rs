//! Interfaces and ports.

use std::collections::BTreeMap;
use std::net::IpAddr;

use railhop::bootstrap::PORTS;
use serde_json::json;

use super::finding::{Finding, Topic};
use super::machine::Machine;

/// Where the kernel keeps what ports are for.
const PORT_SETTINGS: &str = "/proc/sys/net/ipv4";

/// What is here of networks.
pub fn findings(machine: &Machine) -> Vec<Finding> {
    let mut findings = interfaces(machine);
    findings.push(ports(machine));
    findings
}

fn interfaces(machine: &Machine) -> Vec<Finding> {
    let found = match if_addrs::get_if_addrs() {
        Ok(found) => found,
        Err(error) => {
            let finding = Finding::ok(Topic::Network, "interfaces", error.to_string());
            return vec![finding.warn("the interfaces can't be listed (seccomp?): see `ip addr`")];
        }
    };
    let mut addresses = BTreeMap::<String, Vec<IpAddr>>::new();
    for interface in found {
        addresses.entry(interface.name.clone()).or_default().push(interface.ip());
    }
    let is_remote = |ips: &Vec<IpAddr>| ips.iter().any(|ip| !ip.is_loopback());
    let mut findings: Vec<_> =
        addresses.iter().map(|(name, addresses)| interface(machine, name, addresses)).collect();
    if !addresses.values().any(is_remote) {
        let finding = Finding::ok(Topic::Network, "other machines", "no address that they reach");
        findings.push(finding.warn("give an interface an address: worlds of several machines need one"));
    }
    findings
}

fn interface(machine: &Machine, name: &str, addresses: &[IpAddr]) -> Finding {
    // /proc shows the network namespace of its reader, /sys the one that it was mounted in.
    let mtu = machine
        .number(format!("/proc/sys/net/ipv6/conf/{name}/mtu"))
        .or_else(|| machine.number(format!("/sys/class/net/{name}/mtu")));
    let words: Vec<_> = addresses.iter().map(IpAddr::to_string).collect();
    let value = format!("{}, mtu {}", words.join(", "), mtu.map_or("unknown".into(), |mtu| mtu.to_string()));
    Finding::ok(Topic::Network, name, value).with(json!({ "addresses": words, "mtu": mtu }))
}

/// The store's port is derived from the job, so nobody else should be given it.
fn ports(machine: &Machine) -> Finding {
    let range = machine.read(format!("{PORT_SETTINGS}/ip_local_port_range")).unwrap_or_default();
    let bounds: Vec<u16> = range.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let privileged = machine.number(format!("{PORT_SETTINGS}/ip_unprivileged_port_start")).unwrap_or(1024);
    let own = format!("{}–{}", PORTS.start, PORTS.end - 1);
    let value = format!("store: {own}, outgoing connections: {}", range.replace(char::is_whitespace, "–"));
    let details = json!({
        "store": [PORTS.start, PORTS.end - 1], "outgoing": bounds, "unprivileged_from": privileged,
    });
    let finding = Finding::ok(Topic::Network, "ports", value).with(details);
    match bounds[..] {
        _ if privileged > PORTS.start.into() => finding.warn(format!(
            "sysctl net.ipv4.ip_unprivileged_port_start=1024, or set RAILHOP_STORE: below {privileged} ports are root's"
        )),
        [first, last] if first < PORTS.end && PORTS.start <= last => finding.warn(format!(
            "sysctl net.ipv4.ip_local_reserved_ports={}-{}: a connection may take the store's port",
            PORTS.start,
            PORTS.end - 1
        )),
        _ => finding,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::finding::State;
    use super::*;

    fn state(range: &str, privileged: &str) -> State {
        let root = tempfile::tempdir().unwrap();
        let settings = root.path().join("proc/sys/net/ipv4");
        fs::create_dir_all(&settings).unwrap();
        fs::write(settings.join("ip_local_port_range"), range).unwrap();
        fs::write(settings.join("ip_unprivileged_port_start"), privileged).unwrap();
        ports(&Machine::at(root.path())).state
    }

    #[test]
    fn the_stores_ports_are_nobody_elses() {
        assert_eq!(state("32768\t60999\n", "1024\n"), State::Ok);
        assert_eq!(state("16000\t65535\n", "1024\n"), State::Warning);
        assert_eq!(state("27999\t65535\n", "1024\n"), State::Warning);
        assert_eq!(state("28000\t65535\n", "1024\n"), State::Ok);
        assert_eq!(state("32768\t60999\n", "30000\n"), State::Warning);
    }
}
