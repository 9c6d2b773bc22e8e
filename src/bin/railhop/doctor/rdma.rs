//! What hop 1 may run on between nodes: RDMA devices, their ports, and the library that reaches them.

use railhop::fabric::rail::{Gid, verbs_library};
use serde_json::{Value, json};

use super::finding::{Finding, Topic};
use super::machine::Machine;

/// Headers of a RoCE packet, at most.
const ROCE_HEADERS: u64 = 96;

/// The largest payload of a packet.
const MAX_PATH_MTU: u64 = 4096;

/// What is here of RDMA.
pub fn findings(machine: &Machine) -> Vec<Finding> {
    let mut findings = vec![library()];
    let ports: Vec<_> =
        machine.rdma().devices().iter().flat_map(|device| Port::all(machine, device)).collect();
    let active = ports.iter().filter(|port| port.is_active()).count();
    let summary = Finding::ok(Topic::Rdma, "ports", format!("{active} of {} active", ports.len()));
    findings.push(match (active, ports.is_empty()) {
        (0, true) => summary.missing("no RDMA device is here: hop 1 between nodes runs over TCP"),
        (0, false) => {
            summary.missing("bring a port up, see below: until then hop 1 between nodes runs over TCP")
        }
        _ => summary,
    });
    findings.extend(ports.iter().map(Port::finding));
    findings
}

fn library() -> Finding {
    match verbs_library() {
        Ok(()) => Finding::ok(Topic::Rdma, "library", "libibverbs is here"),
        Err(reason) => Finding::ok(Topic::Rdma, "library", reason)
            .missing("install rdma-core (libibverbs1 and ibverbs-providers on Debian)"),
    }
}

/// A port of a device.
struct Port {
    device: String,
    number: u8,
    /// As the kernel says it: `ACTIVE`, `DOWN`, …
    state: String,
    physical: String,
    link_layer: String,
    rate: String,
    gids: Vec<Gid>,
    /// The one that is used where none is named.
    gid: Option<Gid>,
    /// The network device behind a RoCE port, and its MTU.
    net_device: Option<(String, Option<u64>)>,
}

/// An address, as people write it.
fn address(gid: &Gid) -> String {
    gid.address.to_ipv4_mapped().map_or(gid.address.to_string(), |address| address.to_string())
}

impl Port {
    fn all(machine: &Machine, device: &str) -> Vec<Self> {
        machine.rdma().ports(device).into_iter().map(|number| Self::read(machine, device, number)).collect()
    }

    fn read(machine: &Machine, device: &str, number: u8) -> Self {
        let sysfs = machine.rdma();
        let word = |file| sysfs.attribute(device, number, file).unwrap_or_else(|| "unknown".into());
        let net_device = sysfs.net_device(device, number).map(|name| {
            let mtu = machine.number(format!("/sys/class/net/{name}/mtu"));
            (name, mtu)
        });
        Self {
            device: device.to_string(),
            number,
            state: word("state"),
            physical: word("phys_state"),
            link_layer: word("link_layer"),
            rate: word("rate"),
            gids: sysfs.gids(device, number),
            gid: sysfs.gid(device, number, None),
            net_device,
        }
    }

    fn is_active(&self) -> bool {
        self.state == "ACTIVE"
    }

    fn is_roce(&self) -> bool {
        self.link_layer == "Ethernet"
    }

    /// The payload of a RoCE packet; what InfiniBand's is, only the subnet manager says.
    fn path_mtu(&self) -> Option<u64> {
        let (_, mtu) = self.net_device.as_ref()?;
        let room = mtu.as_ref()?.saturating_sub(ROCE_HEADERS);
        [MAX_PATH_MTU, 2048, 1024, 512, 256].into_iter().find(|&mtu| mtu <= room)
    }

    fn finding(&self) -> Finding {
        let finding =
            Finding::ok(Topic::Rdma, format!("{} port {}", self.device, self.number), self.describe());
        let finding = match (self.advice(), self.is_active()) {
            (Some(advice), _) => finding.warn(advice),
            (None, _) => finding,
        };
        finding.with(self.json())
    }

    fn describe(&self) -> String {
        let mut words = vec![self.state.clone(), self.link_layer.clone(), self.rate.clone()];
        if let Some((name, mtu)) = &self.net_device {
            let mtu = mtu.map_or(String::new(), |mtu| format!(" (mtu {mtu})"));
            words.push(format!("{name}{mtu}"));
        }
        words.extend(self.path_mtu().map(|mtu| format!("path mtu {mtu}")));
        words.push(match &self.gid {
            Some(gid) => format!("GID {} = {} of {}", gid.index, address(gid), self.gids.len()),
            None => "no GID that is of use".to_string(),
        });
        words.join(", ")
    }

    /// The first thing to do.
    fn advice(&self) -> Option<String> {
        let behind = self.net_device.as_ref().map_or("its network device", |(name, _)| name);
        match self.state.as_str() {
            "ACTIVE" => {}
            "INIT" => {
                return Some("the link is up, but no subnet manager has configured it: start opensm".into());
            }
            _ if self.is_roce() => {
                return Some(format!(
                    "link is {}: ip link set {behind} up, and look at the cable",
                    self.physical
                ));
            }
            _ => return Some(format!("link is {}: look at cable and switch", self.physical)),
        }
        if self.is_roce() && !self.gid.is_some_and(|gid| gid.is_roce_v2) {
            return Some(format!("give {behind} an IP address: a RoCE v2 GID comes with it"));
        }
        let is_small = self.path_mtu().is_some_and(|mtu| mtu < MAX_PATH_MTU);
        is_small.then(|| {
            format!("ip link set {behind} mtu 9000, and the switch: packets then carry {MAX_PATH_MTU} bytes")
        })
    }

    fn json(&self) -> Value {
        let gid =
            |gid: &Gid| json!({ "index": gid.index, "address": address(gid), "roce_v2": gid.is_roce_v2 });
        json!({
            "device": self.device, "port": self.number, "state": self.state, "physical_state": self.physical,
            "link_layer": self.link_layer, "rate": self.rate, "path_mtu": self.path_mtu(),
            "net_device": self.net_device.as_ref().map(|(name, mtu)| json!({ "name": name, "mtu": mtu })),
            "gids": self.gids.iter().map(gid).collect::<Vec<_>>(),
            "gid": self.gid.map(|gid| gid.index),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use tempfile::TempDir;

    use super::super::finding::State;
    use super::*;

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
    }

    /// The only port of `device`, with these files more.
    fn port(device: &str, state: &str, layer: &str, files: &[(&str, &str)]) -> TempDir {
        let root = tempfile::tempdir().unwrap();
        let at = root.path().join(format!("sys/class/infiniband/{device}/ports/1"));
        write(&at, &[("state", state), ("phys_state", "5: LinkUp"), ("rate", "100 Gb/sec (4X EDR)")]);
        write(&at, &[("link_layer", layer), ("gids/1", "0000:0000:0000:0000:0000:0000:0000:0000")]);
        write(&at, files);
        root
    }

    /// What is said of the ports, summary first.
    fn ports(root: &TempDir) -> Vec<Finding> {
        findings(&Machine::at(root.path())).split_off(1)
    }

    const ROCE: [(&str, &str); 8] = [
        ("gids/0", "fe80:0000:0000:0000:0202:c9ff:fe00:0001"),
        ("gid_attrs/types/0", "IB/RoCE v1"),
        ("gid_attrs/ndevs/0", "eth2"),
        ("gids/2", "fe80:0000:0000:0000:0202:c9ff:fe00:0001"),
        ("gid_attrs/types/2", "RoCE v2"),
        ("gids/10", "0000:0000:0000:0000:0000:ffff:0a4e:0001"),
        ("gid_attrs/types/10", "RoCE v2"),
        ("gid_attrs/ndevs/10", "eth2"),
    ];

    #[test]
    fn a_roce_port_has_a_routable_gid_and_an_mtu() {
        let root = port("mlx5_0", "4: ACTIVE", "Ethernet", &ROCE);
        write(root.path(), &[("sys/class/net/eth2/mtu", "9000")]);
        let [summary, port] = &ports(&root)[..] else { panic!("one port") };
        assert_eq!((summary.state, &summary.value[..]), (State::Ok, "1 of 1 active"));
        assert_eq!((port.state, &port.name[..]), (State::Ok, "mlx5_0 port 1"));
        assert_eq!(
            port.value,
            "ACTIVE, Ethernet, 100 Gb/sec (4X EDR), eth2 (mtu 9000), path mtu 4096, GID 10 = 10.78.0.1 of 3"
        );
        assert_eq!((&port.details["gid"], &port.details["path_mtu"]), (&10.into(), &4096.into()));
        assert_eq!(port.details["gids"].as_array().unwrap().len(), 3);
    }

    #[test]
    fn small_packets_are_worth_a_warning() {
        let root = port("mlx5_0", "4: ACTIVE", "Ethernet", &ROCE);
        write(root.path(), &[("sys/class/net/eth2/mtu", "1500")]);
        let port = &ports(&root)[1];
        assert_eq!((port.state, &port.details["path_mtu"]), (State::Warning, &1024.into()));
        assert!(port.advice.as_ref().unwrap().contains("eth2 mtu 9000"));
    }

    #[test]
    fn a_roce_port_without_an_address_is_of_no_use() {
        let root = port("rxe0", "4: ACTIVE", "Ethernet", &ROCE[..3]);
        let port = &ports(&root)[1];
        assert_eq!(port.state, State::Warning);
        assert!(port.advice.as_ref().unwrap().starts_with("give eth2 an IP address"));
    }

    #[test]
    fn infiniband_uses_its_first_gid() {
        let gid =
            [("gids/0", "fe80:0000:0000:0000:0002:c903:0000:0001"), ("gid_attrs/types/0", "IB/RoCE v1")];
        let root = port("mlx5_1", "4: ACTIVE", "InfiniBand", &gid);
        let port = &ports(&root)[1];
        assert_eq!((port.state, &port.details["gid"]), (State::Ok, &0.into()));
        assert_eq!(port.details["path_mtu"], Value::Null);
        let unmanaged = ports(&self::port("mlx5_1", "2: INIT", "InfiniBand", &gid));
        assert_eq!((unmanaged[0].state, unmanaged[1].state), (State::Missing, State::Warning));
        assert!(unmanaged[1].advice.as_ref().unwrap().contains("subnet manager"));
    }

    #[test]
    fn a_port_that_is_down_is_missing_if_it_is_the_only_one() {
        let root = port("mlx5_0", "1: DOWN", "Ethernet", &ROCE);
        write(root.path(), &[("sys/class/infiniband/mlx5_0/ports/1/phys_state", "3: Disabled")]);
        let [summary, down] = &ports(&root)[..] else { panic!("one port") };
        assert_eq!((summary.state, &summary.value[..]), (State::Missing, "0 of 1 active"));
        assert_eq!(
            down.advice.as_deref(),
            Some("link is Disabled: ip link set eth2 up, and look at the cable")
        );
        let gid = [("gids/0", "fe80:0000:0000:0000:0002:c903:0000:0001")];
        let other = port("mlx5_9", "4: ACTIVE", "InfiniBand", &gid);
        fs::rename(
            other.path().join("sys/class/infiniband/mlx5_9"),
            root.path().join("sys/class/infiniband/mlx5_9"),
        )
        .unwrap();
        assert_eq!(ports(&root)[0].state, State::Ok);
    }

    #[test]
    fn no_device_is_missing() {
        let found = ports(&tempfile::tempdir().unwrap());
        assert_eq!((found.len(), found[0].state), (1, State::Missing));
    }
}
