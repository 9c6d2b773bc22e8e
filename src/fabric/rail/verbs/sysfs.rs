//! What the system says of RDMA devices: their ports, their addresses, and where they are plugged in.

use std::fs;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

/// A port's entry in the table of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gid {
    pub(super) index: u8,
    pub(super) bytes: [u8; 16],
}

/// `/sys`, or a tree like it.
pub(super) struct Sysfs {
    root: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self { root: "/sys".into() }
    }
}

impl Sysfs {
    fn device(&self, device: &str) -> PathBuf {
        self.root.join("class/infiniband").join(device)
    }

    fn port(&self, device: &str, port: u8) -> PathBuf {
        self.device(device).join("ports").join(port.to_string())
    }

    /// The state of a port by its name, as in `ACTIVE`.
    pub(super) fn state(&self, device: &str, port: u8) -> String {
        let state = fs::read_to_string(self.port(device, port).join("state")).unwrap_or_default();
        state.trim().rsplit(": ").next().filter(|name| !name.is_empty()).unwrap_or("absent").to_string()
    }

    /// Whether a port carries data.
    pub(super) fn is_active(&self, device: &str, port: u8) -> bool {
        self.state(device, port).starts_with("ACTIVE")
    }

    /// The device's ports in order.
    pub(super) fn ports(&self, device: &str) -> Vec<u8> {
        let entries = fs::read_dir(self.device(device).join("ports")).into_iter().flatten().flatten();
        let mut ports: Vec<u8> =
            entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        ports.sort_unstable();
        ports
    }

    /// The port's address: the entry at `wanted`, or else the best: of RoCE version 2 with an IPv4 address, for that
    /// crosses routers and is what networks are set up for; then version 2 with an IPv6 address, a global one first;
    /// then version 1, or InfiniBand's. The order of the table differs from machine to machine.
    pub(super) fn gid(&self, device: &str, port: u8, wanted: Option<u8>) -> Option<Gid> {
        let entries = fs::read_dir(self.port(device, port).join("gids")).into_iter().flatten().flatten();
        let indices = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u8>().ok());
        let gids = indices.filter(|&index| wanted.is_none_or(|wanted| wanted == index));
        let gids = gids.filter_map(|index| self.read_gid(device, port, index));
        gids.max_by_key(|gid| (self.worth(device, port, gid), std::cmp::Reverse(gid.index)))
    }

    /// The entry at `index`; none where it is empty.
    fn read_gid(&self, device: &str, port: u8, index: u8) -> Option<Gid> {
        let text = fs::read_to_string(self.port(device, port).join("gids").join(index.to_string())).ok()?;
        let bytes = text.trim().parse::<Ipv6Addr>().ok()?.octets();
        bytes.iter().any(|&byte| byte != 0).then_some(Gid { index, bytes })
    }

    fn worth(&self, device: &str, port: u8, gid: &Gid) -> (bool, bool, bool) {
        let path = self.port(device, port).join("gid_attrs/types").join(gid.index.to_string());
        let version_2 = fs::read_to_string(path).is_ok_and(|kind| kind.trim() == "RoCE v2");
        let address = Ipv6Addr::from(gid.bytes);
        (version_2, address.to_ipv4_mapped().is_some(), !address.is_unicast_link_local())
    }

    /// Of `devices`, those that share most of the way through the machine with the PCI function at `address`.
    pub(super) fn nearest<'a>(&self, address: &str, devices: &[&'a str]) -> Vec<&'a str> {
        let Ok(place) = fs::canonicalize(self.root.join("bus/pci/devices").join(address)) else {
            return devices.to_vec();
        };
        let shared = |device: &&str| {
            let own = fs::canonicalize(self.device(device).join("device")).unwrap_or_default();
            common(&place, &own)
        };
        let most = devices.iter().map(shared).max();
        devices.iter().filter(|device| Some(shared(device)) == most).copied().collect()
    }
}

/// Folders that two paths have in common.
fn common(one: &Path, other: &Path) -> usize {
    one.components().zip(other.components()).take_while(|(one, other)| one == other).count()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct Machine(tempfile::TempDir, Sysfs);

    impl Machine {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let sysfs = Sysfs { root: folder.path().into() };
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
