//! Which of this machine's networks a rank is reached by.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::str::FromStr;

use if_addrs::get_if_addrs;

/// One of this machine's networks, as launchers and people name it. Only an address is this machine's alone: a name and
/// a network may be told to all ranks alike.
///
/// Reads as `10.0.0.7`, `fd00::7`, `10.0.0.0/16`, `fd00::/64` or `eth0`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Interface {
    /// That of this address.
    Address(IpAddr),
    /// That whose address begins with so many bits of this one.
    Network(IpAddr, u8),
    /// That of this name.
    Name(String),
}

impl From<IpAddr> for Interface {
    fn from(address: IpAddr) -> Self {
        Self::Address(address)
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Network(address, bits) => write!(f, "{address}/{bits}"),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl FromStr for Interface {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        if let Some((address, bits)) = text.split_once('/') {
            let address: IpAddr = address.parse().map_err(|_| format!("{address:?} is not an address"))?;
            return match bits.parse() {
                Ok(bits) if bits <= width(address) => Ok(Self::Network(address, bits)),
                _ => Err(format!("{bits:?} is not a number of bits up to {}", width(address))),
            };
        }
        // What the kernel takes for a name.
        let is_name = (1..16).contains(&text.len()) && !text.contains([':', ' ']);
        if is_name {
            Ok(Self::Name(text.into()))
        } else {
            Err("neither an address, a network nor a name".into())
        }
    }
}

impl Interface {
    /// The address by which others reach this machine there.
    ///
    /// # Errors
    /// There is no such interface, it has no address, or the system does not tell.
    pub fn address(&self) -> io::Result<IpAddr> {
        if let Self::Address(address) = self {
            return Ok(*address);
        }
        let all = get_if_addrs()?;
        let all: Vec<_> = all.iter().map(|found| (found.name.as_str(), found.ip())).collect();
        self.choose(&all).ok_or_else(|| {
            let others: Vec<_> = all.iter().map(|(name, address)| format!("{name} ({address})")).collect();
            let what =
                format!("{self} is no interface with an address here; there are {}", others.join(", "));
            io::Error::new(io::ErrorKind::AddrNotAvailable, what)
        })
    }

    /// Of all addresses, the one that is meant. Where there are several: IPv4 before IPv6, for that is what most networks
    /// are set up for; then those that are good for more than one link.
    fn choose(&self, all: &[(&str, IpAddr)]) -> Option<IpAddr> {
        let is_meant = |&(name, address): &(&str, IpAddr)| match self {
            Self::Address(wanted) => address == *wanted,
            Self::Network(network, bits) => prefix(address, *bits) == prefix(*network, *bits),
            Self::Name(wanted) => name == wanted,
        };
        let meant = all.iter().copied().filter(is_meant).map(|(_, address)| address);
        meant.min_by_key(|address| match address {
            IpAddr::V4(_) => 0,
            IpAddr::V6(address) => 1 + u8::from(address.is_unicast_link_local()),
        })
    }
}

/// Bits of an address.
fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The first `bits` bits of an address, and which kind it is of.
fn prefix(address: IpAddr, bits: u8) -> (bool, u128) {
    let value = match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    };
    let rest = u32::from(width(address).saturating_sub(bits));
    (address.is_ipv4(), value.checked_shr(rest).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_read_as_they_print() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        for (text, interface) in [
            ("10.0.0.7", Interface::Address(address("10.0.0.7"))),
            ("fd00::7", Interface::Address(address("fd00::7"))),
            ("10.1.0.0/16", Interface::Network(address("10.1.0.0"), 16)),
            ("fd00::/64", Interface::Network(address("fd00::"), 64)),
            ("eth0", Interface::Name("eth0".into())),
            ("enp65s0f0np0.12", Interface::Name("enp65s0f0np0.12".into())),
        ] {
            assert_eq!(text.parse(), Ok(interface.clone()));
            assert_eq!(interface.to_string(), text);
        }
        for text in [
            "",
            "10.0.0.0/33",
            "fd00::/129",
            "eth0/24",
            "10.0.0.0/-1",
            "two words",
            "a:b",
            "sixteen-letters!",
        ] {
            assert!(text.parse::<Interface>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_address_that_is_meant_is_found() {
        let all = [
            ("lo", "127.0.0.1"),
            ("ib0", "fe80::1"),
            ("ib0", "fd00::1"),
            ("eth0", "fd00::2"),
            ("eth0", "192.0.2.9"),
            ("eth1", "192.0.3.9"),
        ];
        let all = all.map(|(name, address)| (name, address.parse().unwrap()));
        let chosen =
            |text: &str| text.parse::<Interface>().unwrap().choose(&all).map(|found| found.to_string());
        for (text, address) in [
            ("eth0", Some("192.0.2.9")),
            ("ib0", Some("fd00::1")),
            ("eth2", None),
            ("192.0.3.0/24", Some("192.0.3.9")),
            ("192.0.2.0/23", Some("192.0.2.9")),
            ("fd00::/126", Some("fd00::1")),
            ("fe80::/10", Some("fe80::1")),
            ("0.0.0.0/0", Some("127.0.0.1")),
            ("::/0", Some("fd00::1")),
            ("198.51.100.0/24", None),
        ] {
            assert_eq!(chosen(text).as_deref(), address, "{text}");
        }
    }

    #[test]
    fn this_machine_has_a_loopback() {
        let local = IpAddr::from([127, 0, 0, 1]);
        for text in ["lo", "127.0.0.0/8", "127.0.0.1"] {
            assert_eq!(text.parse::<Interface>().unwrap().address().unwrap(), local);
        }
        let error = Interface::Name("nowhere0".into()).address().unwrap_err().to_string();
        assert!(error.contains("nowhere0 is no interface") && error.contains("lo (127.0.0.1)"), "{error}");
    }
}
