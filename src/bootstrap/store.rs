//! The rendezvous store: rank 0 serves it over TCP, the other ranks come to it.

use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::Bootstrap;
use super::client::{Client, STRANGER_TIME, resolve};
use super::environment::{Address, INTERFACE, Member, SECRET_FILE};
use super::error::{BootstrapError, Operation};
use super::frame::{Outcome, end_of, time_left};
use super::handshake::{Greeting, JobKey, VERSION};
use super::hub::Hub;
use super::server::Server;
use crate::error::ConfigError;
use crate::interface::Interface;

/// The largest secret that is read.
const MAX_SECRET: u64 = 64 << 10;

/// Between two attempts to listen on a port that another process still has.
const BIND_PAUSE: Duration = Duration::from_millis(50);

/// What a rank needs to know to join a world. Secret, job and address are the same on all ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreConfig {
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Where rank 0 serves.
    pub address: Address,
    /// The interface that rank 0 listens on, if not that of [`StoreConfig::address`]. No other is bound.
    pub interface: Option<Interface>,
    /// Whether some ranks run on other machines, so that a host name must not lead to this machine alone.
    pub is_remote: bool,
    /// What tells ranks of this job from others.
    pub key: JobKey,
    /// What ranks must agree on beside the version, as one number: [`layout`](crate::wire::layout) for a
    /// [`ProcessWorld`](crate::ProcessWorld).
    pub layout: u64,
    /// Version of the library; [`VERSION`] but in tests.
    pub version: u64,
    /// By when all ranks must have come.
    pub deadline: Duration,
}

impl StoreConfig {
    /// As the environment says it.
    ///
    /// # Errors
    /// The secret file can't be read, is empty, or has more than 64 KiB.
    pub fn of(member: &Member, layout: u64, deadline: Duration) -> Result<Self, BootstrapError> {
        let secret = member.secret_file.as_deref().map(read_secret).transpose()?;
        Ok(Self {
            rank: member.rank,
            world_size: member.world_size,
            address: member.store.clone(),
            interface: member.interface.clone(),
            is_remote: member.is_remote(),
            key: JobKey::new(secret.as_deref(), &member.job_id),
            layout,
            version: VERSION,
            deadline,
        })
    }

    fn check(&self) -> Result<(), ConfigError> {
        let refuse = |field, value: usize, reason: &str, nearest| {
            Err(ConfigError { field, value: value as u64, reason: reason.into(), nearest: Some(nearest) })
        };
        match (self.rank, self.world_size) {
            (_, 0) => refuse("world_size", 0, "a world has at least one rank", 1),
            (_, size) if u32::try_from(size).is_err() => {
                refuse("world_size", size, "ranks are 32-bit numbers", u32::MAX.into())
            }
            (rank, size) if rank >= size => {
                refuse("rank", rank, "a rank is below the world size", size as u64 - 1)
            }
            _ => Ok(()),
        }
    }

    /// What this end says of itself; the nonce is filled in for each connection.
    fn greeting(&self) -> Greeting {
        let (rank, world_size) = (self.rank as u64, self.world_size as u64);
        Greeting { version: self.version, layout: self.layout, rank, world_size, nonce: Default::default() }
    }

    /// Listens where the configuration says. A port that is taken may be about to be free: a job before this one may
    /// just be ending.
    fn listen(&self) -> Result<TcpListener, BootstrapError> {
        let end = end_of(self.deadline.min(STRANGER_TIME));
        let addresses = self.own_addresses(end_of(self.deadline))?;
        loop {
            let error = match TcpListener::bind(&addresses[..]) {
                Ok(listener) => return Ok(listener),
                Err(error) => error,
            };
            match (error.kind(), time_left(end)) {
                (io::ErrorKind::AddrInUse, Some(left)) => thread::sleep(left.min(BIND_PAUSE)),
                (kind, _) => return Err(self.cannot_listen(&addresses, kind, &error)),
            }
        }
    }

    fn cannot_listen(
        &self,
        addresses: &[SocketAddr],
        kind: io::ErrorKind,
        error: &io::Error,
    ) -> BootstrapError {
        let hint = match kind {
            io::ErrorKind::AddrInUse => "; set RAILHOP_STORE to a host and a free port on all ranks",
            io::ErrorKind::AddrNotAvailable => "; set RAILHOP_INTERFACE to an address of rank 0's machine",
            _ => "",
        };
        let reason = format!("{error}{hint}");
        BootstrapError::Io { what: format!("the store can't listen on {addresses:?}"), reason }
    }

    /// The addresses to listen on, of which the first that works is taken.
    fn own_addresses(&self, end: Instant) -> Result<Vec<SocketAddr>, BootstrapError> {
        let Address { host, port } = &self.address;
        if let Some(interface) = &self.interface {
            let found = interface.address().map_err(|error| BootstrapError::Environment {
                variable: INTERFACE.into(),
                value: Some(interface.to_string()),
                reason: error.to_string(),
            })?;
            return Ok(vec![(found, *port).into()]);
        }
        let what = || format!("the store's host {host:?} has no address");
        let addresses = resolve(host, *port, end).map_err(|error| BootstrapError::io(what(), &error))?;
        let named = host.parse::<IpAddr>().is_err() && host != "localhost";
        let is_usable = |address: &SocketAddr| !(self.is_remote && named && address.ip().is_loopback());
        let usable: Vec<_> = addresses.into_iter().filter(is_usable).collect();
        match usable.is_empty() {
            false => Ok(usable),
            // A common entry in /etc/hosts: a machine's own name leads to itself alone.
            true => Err(BootstrapError::Environment {
                variable: INTERFACE.into(),
                value: None,
                reason: format!(
                    "on rank 0's machine {host:?} leads to no address that others reach; set one"
                ),
            }),
        }
    }
}

fn read_secret(path: &std::path::Path) -> Result<Vec<u8>, BootstrapError> {
    let refuse = |reason: String| {
        let (variable, value) = (SECRET_FILE.into(), Some(path.display().to_string()));
        BootstrapError::Environment { variable, value, reason }
    };
    let mut secret = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_SECRET + 1).read_to_end(&mut secret));
    match read {
        Err(error) => Err(refuse(error.to_string())),
        Ok(0) => Err(refuse("the file is empty".into())),
        Ok(bytes) if bytes as u64 > MAX_SECRET => Err(refuse(format!("more than {MAX_SECRET} bytes"))),
        Ok(_) => Ok(secret),
    }
}

/// A world whose ranks are processes, which meet at a store that rank 0 serves over TCP.
///
/// Dropping it leaves the world. On rank 0 that ends the store: its port is closed, its threads have ended, and ranks
/// that still want something get [`BootstrapError::Lost`].
#[derive(Debug)]
pub struct Store {
    rank: usize,
    world_size: usize,
    end: End,
}

/// A rank's end of the store.
#[derive(Debug)]
enum End {
    Server(Arc<Hub>, Server),
    Client(Client),
}

impl Store {
    /// Joins the world: returns when all its ranks have. Rank 0 serves, the others may come before it.
    ///
    /// # Errors
    /// - [`BootstrapError::Missing`]: ranks have not come by the deadline; all that have are told which.
    /// - [`BootstrapError::Unreachable`]: rank 0 was not to be found by then.
    /// - [`BootstrapError::Refused`]: for three seconds something else was in its place, say the store of another job.
    /// - [`BootstrapError::Mismatch`]: a rank has another version, layout or world size. All ranks are told.
    /// - [`BootstrapError::Duplicate`]: another process is this rank.
    /// - [`BootstrapError::Lost`]: a rank has come and left.
    /// - [`BootstrapError::Io`], [`BootstrapError::Environment`]: rank 0 can't listen.
    /// - [`BootstrapError::Config`]: `rank` or `world_size` can't be.
    pub fn connect(config: &StoreConfig) -> Result<Self, BootstrapError> {
        config.check()?;
        match config.rank {
            0 => Self::serve(config, config.listen()?),
            _ => Self::visit(config),
        }
    }

    /// Joins the world as [`Store::connect`] does, but rank 0 serves on a listener that it has: so may its port be
    /// one of the system's choice, if the other ranks learn of it.
    ///
    /// # Errors
    /// Those of [`Store::connect`]; the rank must be 0.
    pub fn connect_with(config: &StoreConfig, listener: TcpListener) -> Result<Self, BootstrapError> {
        config.check()?;
        match config.rank {
            0 => Self::serve(config, listener),
            rank => {
                let (value, reason) = (rank as u64, "rank 0 serves the store".into());
                Err(ConfigError { field: "rank", value, reason, nearest: Some(0) }.into())
            }
        }
    }

    fn serve(config: &StoreConfig, listener: TcpListener) -> Result<Self, BootstrapError> {
        let hub = Arc::new(Hub::new(config.world_size));
        let server = Server::start(listener, hub.clone(), config.key.clone(), config.greeting())?;
        tracing::debug!(address = %server.address(), ranks = config.world_size, "the store serves");
        hub.meet(0, Operation::Join, &[], config.deadline)?;
        Ok(Self { rank: 0, world_size: config.world_size, end: End::Server(hub, server) })
    }

    fn visit(config: &StoreConfig) -> Result<Self, BootstrapError> {
        let address = (config.address.host.as_str(), config.address.port);
        let client = Client::join(address, &config.key, &config.greeting(), config.deadline)?;
        Ok(Self { rank: config.rank, world_size: config.world_size, end: End::Client(client) })
    }

    /// Where rank 0 listens; none on the other ranks.
    pub fn local_address(&self) -> Option<SocketAddr> {
        match &self.end {
            End::Server(_, server) => Some(server.address()),
            End::Client(_) => None,
        }
    }

    fn step(&mut self, operation: Operation, mine: &[u8], deadline: Duration) -> Outcome {
        match &mut self.end {
            End::Server(hub, _) => hub.meet(0, operation, mine, deadline),
            End::Client(client) => client.step(operation, mine, deadline),
        }
    }
}

impl Bootstrap for Store {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn own_address(&self) -> Option<IpAddr> {
        let address = match &self.end {
            End::Server(_, server) => server.address().ip(),
            End::Client(client) => client.local_address()?.ip(),
        };
        (!address.is_unspecified()).then_some(address)
    }

    fn all_gather(&mut self, mine: &[u8], deadline: Duration) -> Result<Vec<Vec<u8>>, BootstrapError> {
        self.step(Operation::Gather, mine, deadline)
    }

    fn barrier(&mut self, deadline: Duration) -> Result<(), BootstrapError> {
        self.step(Operation::Barrier, &[], deadline).map(drop)
    }
}
