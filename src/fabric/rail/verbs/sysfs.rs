//! What the system says of RDMA devices: their ports, their addresses, and where they are plugged in.

use std::cmp::Reverse;
use std::fs;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A port's entry in the table of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gid {
    /// Its place in the table.
    pub index: u8,
    /// The address; an IPv4 one is mapped.
    pub address: Ipv6Addr,
    /// Whether packets to it cross routers: RoCE version 2. Otherwise it is InfiniBand, or RoCE version 1.
    pub is_roce_v2: bool,
}

impl Gid {
    /// Which of a port's entries is the best: of RoCE version 2 with an IPv4 address, for that crosses routers and is
    /// what networks are set up for; then version 2 with an IPv6 address, a global one first; then version 1, or
    /// InfiniBand's. The order of the table differs from machine to machine.
    fn worth(&self) -> impl Ord + use<> {
        let (is_ipv4, is_local) =
            (self.address.to_ipv4_mapped().is_some(), self.address.is_unicast_link_local());
        (self.is_roce_v2, is_ipv4, !is_local, Reverse(self.index))
    }
}

/// What `/sys`, or a tree like it, says of RDMA devices.
pub struct RdmaSysfs {
    root: PathBuf,
}

impl Default for RdmaSysfs {
    fn default() -> Self {
        Self::at("/sys")
    }
}

impl RdmaSysfs {
    /// The tree at `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn class(&self) -> PathBuf {
        self.root.join("class/infiniband")
    }

    fn port(&self, device: &str, port: u8) -> PathBuf {
        self.class().join(device).join("ports").join(port.to_string())
    }

    /// The names of all devices.
    pub fn devices(&self) -> Vec<String> {
        let mut names: Vec<String> = entries(&self.class()).collect();
        names.sort();
        names
    }

    /// The device's ports in order.
    pub fn ports(&self, device: &str) -> Vec<u8> {
        let mut ports: Vec<u8> = entries(&self.class().join(device).join("ports")).collect();
        ports.sort_unstable();
        ports
    }

    /// What the kernel says of a port in a file of this name, without the number that may stand before.
    pub fn attribute(&self, device: &str, port: u8, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.port(device, port).join(name)).ok()?;
        text.trim().rsplit(": ").next().filter(|word| !word.is_empty()).map(String::from)
    }

    /// The state of a port by its name, as in `ACTIVE`.
    pub fn state(&self, device: &str, port: u8) -> String {
        self.attribute(device, port, "state").unwrap_or_else(|| "absent".into())
    }

    /// Whether a port carries data.
    pub fn is_active(&self, device: &str, port: u8) -> bool {
        self.state(device, port).starts_with("ACTIVE")
    }

    /// The network device behind a port.
    pub fn net_device(&self, device: &str, port: u8) -> Option<String> {
        let named = |index: u8| self.attribute(device, port, &format!("gid_attrs/ndevs/{index}"));
        self.indices(device, port).find_map(named)
    }

    /// The port's address: the entry at `wanted`, or else the best.
    pub fn gid(&self, device: &str, port: u8, wanted: Option<u8>) -> Option<Gid> {
        let gids = self.gids(device, port).into_iter();
        gids.filter(|gid| wanted.is_none_or(|wanted| wanted == gid.index)).max_by_key(Gid::worth)
    }

    /// The port's table of addresses without its empty entries, in order.
    pub fn gids(&self, device: &str, port: u8) -> Vec<Gid> {
        self.indices(device, port).filter_map(|index| self.read_gid(device, port, index)).collect()
    }

    fn indices(&self, device: &str, port: u8) -> impl Iterator<Item = u8> + use<> {
        let mut indices: Vec<u8> = entries(&self.port(device, port).join("gids")).collect();
        indices.sort_unstable();
        indices.into_iter()
    }

    /// The entry at `index`; none where it is empty.
    fn read_gid(&self, device: &str, port: u8, index: u8) -> Option<Gid> {
        let text = fs::read_to_string(self.port(device, port).join(format!("gids/{index}"))).ok()?;
        let address: Ipv6Addr = text.trim().parse().ok()?;
        let kind = self.attribute(device, port, &format!("gid_attrs/types/{index}"));
        let is_roce_v2 = kind.is_some_and(|kind| kind == "RoCE v2");
        (!address.is_unspecified()).then_some(Gid { index, address, is_roce_v2 })
    }

    /// Of `devices`, those that share most of the way through the machine with the PCI function at `address`.
    pub(super) fn nearest<'a>(&self, address: &str, devices: &[&'a str]) -> Vec<&'a str> {
        let Ok(place) = fs::canonicalize(self.root.join("bus/pci/devices").join(address)) else {
            return devices.to_vec();
        };
        let shared = |device: &&str| {
            let own = fs::canonicalize(self.class().join(device).join("device")).unwrap_or_default();
            common(&place, &own)
        };
        let most = devices.iter().map(shared).max();
        devices.iter().filter(|device| Some(shared(device)) == most).copied().collect()
    }
}

/// What is in a folder that reads as a `T`.
fn entries<T: FromStr>(folder: &Path) -> impl Iterator<Item = T> + use<T> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Folders that two paths have in common.
fn common(one: &Path, other: &Path) -> usize {
    one.components().zip(other.components()).take_while(|(one, other)| one == other).count()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct Machine(tempfile::TempDir, RdmaSysfs);

    impl Machine {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let sysfs = RdmaSysfs::at(folder.path());
            Self(folder, sysfs)
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        /// The table of port 1 of `mlx5_0`: a GID and its kind for each index.
        fn with_gids(gids: &[(&str, &str)]) -> Self {
            let machine = Self::new();
            for (index, (gid, kind)) in gids.iter().enumerate() {
                let port = "class/infiniband/mlx5_0/ports/1";
                machine.write(&format!("{port}/gids/{index}"), &format!("{gid}\n"));
                machine.write(&format!("{port}/gid_attrs/types/{index}"), &format!("{kind}\n"));
            }
            machine
        }

        /// A PCI function at `path` below the root complex, and what is linked to it.
        fn plug(&self, path: &str, link: &str) {
            let (place, link) = (self.0.path().join("devices").join(path), self.0.path().join(link));
            fs::create_dir_all(&place).unwrap();
            fs::create_dir_all(link.parent().unwrap()).unwrap();
            symlink(place, link).unwrap();
        }
    }

    const EMPTY: (&str, &str) = ("0000:0000:0000:0000:0000:0000:0000:0000", "");
    const LOCAL: &str = "fe80:0000:0000:0000:5054:00ff:fe12:3456";
    const GLOBAL: &str = "2001:0db8:0000:0000:0000:0000:0000:0001";
    const IPV4: &str = "0000:0000:0000:0000:0000:ffff:0a4d:0001";

    fn chosen(gids: &[(&str, &str)], wanted: Option<u8>) -> Option<u8> {
        Machine::with_gids(gids).1.gid("mlx5_0", 1, wanted).map(|gid| gid.index)
    }

    #[test]
    fn the_best_address_is_found_wherever_it_stands() {
        let (v1, v2) = ("IB/RoCE v1", "RoCE v2");
        assert_eq!(chosen(&[(LOCAL, v1), (LOCAL, v2), (IPV4, v1), (IPV4, v2)], None), Some(3));
        assert_eq!(chosen(&[(IPV4, v2), (LOCAL, v1), (IPV4, v2), (GLOBAL, v2)], None), Some(0));
        assert_eq!(chosen(&[(LOCAL, v2), EMPTY, (GLOBAL, v2), (IPV4, v1)], None), Some(2));
        assert_eq!(chosen(&[(LOCAL, v1), (LOCAL, v2)], None), Some(1));
        assert_eq!(chosen(&[EMPTY, (LOCAL, v1)], None), Some(1));
        assert_eq!(chosen(&[(IPV4, v2), (LOCAL, v1)], Some(1)), Some(1));
        assert_eq!(chosen(&[(IPV4, v2), EMPTY], Some(1)), None);
        assert_eq!((chosen(&[EMPTY, EMPTY], None), chosen(&[], None)), (None, None));
    }

    #[test]
    fn ports_and_their_states_are_read() {
        let machine = Machine::new();
        machine.write("class/infiniband/rxe0/ports/2/state", "4: ACTIVE\n");
        machine.write("class/infiniband/rxe0/ports/1/state", "1: DOWN\n");
        let sysfs = &machine.1;
        assert_eq!((sysfs.ports("rxe0"), sysfs.ports("rxe1")), (vec![1, 2], vec![]));
        assert!(sysfs.is_active("rxe0", 2) && !sysfs.is_active("rxe0", 1));
        assert_eq!((sysfs.state("rxe0", 1), sysfs.state("rxe0", 3)), ("DOWN".into(), "absent".into()));
    }

    #[test]
    fn the_nearest_devices_share_the_gpus_switch() {
        let machine = Machine::new();
        machine.plug("pci0000:00/0000:00:01.0/0000:10:00.0/0000:11:00.0", "bus/pci/devices/0000:11:00.0");
        let link = |name: &str| format!("class/infiniband/{name}/device");
        machine.plug("pci0000:00/0000:00:01.0/0000:10:00.0/0000:12:00.0", &link("mlx5_2"));
        machine.plug("pci0000:00/0000:00:01.0/0000:10:00.0/0000:12:00.1", &link("mlx5_3"));
        machine.plug("pci0000:00/0000:00:02.0/0000:20:00.0", &link("mlx5_0"));
        machine.plug("pci0000:80/0000:80:01.0/0000:90:00.0", &link("mlx5_1"));
        let nearest = |address, devices: &[&'static str]| machine.1.nearest(address, devices);
        assert_eq!(nearest("0000:11:00.0", &["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"]), ["mlx5_2", "mlx5_3"]);
        assert_eq!(nearest("0000:11:00.0", &["mlx5_1", "mlx5_0"]), ["mlx5_0"]);
        assert_eq!(nearest("0000:77:00.0", &["mlx5_1", "mlx5_0"]), ["mlx5_1", "mlx5_0"]);
    }
}
