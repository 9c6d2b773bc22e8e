//! How the processes of a world connect, once each has told the others where its door is. Whoever knocks shows the token
//! that the door's owner has handed out; others are turned away.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use crate::topology::Topology;

/// What every knock begins with.
const MAGIC: [u8; 8] = *b"railhop\x01";

/// Bytes of a knock: magic, token, rank, purpose.
const KNOCK: usize = 32;

/// How long a visitor may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(3);

/// The longest sleep at the door, after which it is seen whether the other side has given up.
const GLANCE: Duration = Duration::from_millis(50);

/// How often it is seen whether those who have not come are still there.
const LOOKOUT: Duration = Duration::from_millis(250);

/// Visitors that have not said who they are; beyond, the oldest is turned away.
const MAX_VISITORS: usize = 256;

type Token = [u8; 16];

/// Where others knock, and what they must show. To be told to the ranks of the world, and to nobody else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    tcp: SocketAddr,
    /// Of a socket that only this machine sees, gone with the process.
    unix: String,
    token: Token,
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Faults, departures, meetings.
    Control,
    /// Descriptors of shared memory.
    Node,
    /// The `n`th connection of the rail.
    Rail(usize),
}

impl Purpose {
    fn code(self) -> u32 {
        match self {
            Self::Control => 0,
            Self::Node => 1,
            Self::Rail(n) => 2 + n as u32,
        }
    }

    fn from_code(code: u32) -> Self {
        match code {
            0 => Self::Control,
            1 => Self::Node,
            n => Self::Rail(n as usize - 2),
        }
    }
}

/// A rank's end of all its connections.
#[derive(Debug, Default)]
pub struct Links {
    /// By rank; none for itself.
    pub control: Vec<Option<TcpStream>>,
    /// By rank: those of its node.
    pub node: Vec<Option<UnixStream>>,
    /// By rank: those of its rail on other nodes.
    pub rail: Vec<Vec<Option<TcpStream>>>,
}

/// Ranks that could not be connected with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// A rank did not let this one in.
    #[error("rank {rank} can't be reached at {address}: {reason}")]
    Unreachable {
        /// The rank.
        rank: usize,
        /// Where it should be.
        address: String,
        /// What the system says.
        reason: String,
    },
    /// Ranks did not come in time.
    #[error("ranks {0:?} have not connected in time")]
    Missing(Vec<usize>),
    /// Ranks have shut their doors, and have not come.
    #[error("ranks {0:?} are gone")]
    Gone(Vec<usize>),
    /// The door itself failed.
    #[error("connections can't be accepted: {0}")]
    Door(String),
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(to),
            Self::Unix(stream) => stream.read(to),
        }
    }

    fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_nonblocking(nonblocking),
            Self::Unix(stream) => stream.set_nonblocking(nonblocking),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Tcp(stream) => stream.peer_addr().map_or("?".into(), |address| address.to_string()),
            Self::Unix(_) => "a process of this machine".into(),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

/// Where the other ranks of a world knock.
#[derive(Debug)]
pub struct Door {
    tcp: TcpListener,
    unix: UnixListener,
    address: Address,
}

/// Whom to connect with.
#[derive(Debug, Clone, Copy)]
pub struct World<'a> {
    /// This rank.
    pub rank: usize,
    /// Nodes and rails.
    pub topology: Topology,
    /// By rank.
    pub addresses: &'a [Address],
    /// Connections to each rail peer.
    pub connections: usize,
    /// By when.
    pub end: Instant,
}

impl Door {
    /// A door at `interface`.
    ///
    /// # Errors
    /// It is no address of this machine.
    pub fn new(interface: IpAddr) -> io::Result<Self> {
        let tcp = TcpListener::bind((interface, 0))?;
        let (mut name, mut token) = (Token::default(), Token::default());
        getrandom::fill(&mut name).and_then(|()| getrandom::fill(&mut token)).map_err(io::Error::other)?;
        let name = format!("railhop-{:032x}", u128::from_le_bytes(name));
        let unix = UnixListener::bind_addr(&UnixAddr::from_abstract_name(&name)?)?;
        let address = Address { tcp: tcp.local_addr()?, unix: name, token };
        Ok(Self { tcp, unix, address })
    }

    /// What the others must know.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Connects with all ranks. All do it at the same time: each knocks at those before it.
    ///
    /// # Errors
    /// A rank does not come, or does not answer, by the end.
    pub fn connect(self, world: World<'_>) -> Result<Links, ConnectError> {
        let mut links = Links::none(&world);
        let failed = AtomicBool::new(false);
        let accepted = thread::scope(|scope| {
            let guests = scope.spawn(|| {
                let accepted = Visitors { door: &self, world, strangers: Vec::new() }.accept(&failed);
                failed.fetch_or(accepted.is_err(), Ordering::Relaxed);
                accepted
            });
            let knocked = (0..world.rank).try_for_each(|peer| links.knock(&world, peer, &failed));
            failed.fetch_or(knocked.is_err(), Ordering::Relaxed);
            let guests = guests.join().expect("accepting does not panic");
            // Whoever failed first made the other give up.
            knocked.and(guests)
        })?;
        accepted.into_iter().for_each(|(rank, purpose, stream)| links.put(rank, purpose, stream));
        Ok(links)
    }
}

impl World<'_> {
    /// What two ranks have between them.
    fn purposes(&self, peer: usize) -> impl Iterator<Item = Purpose> + use<> {
        let (topology, own) = (self.topology, self.rank);
        let of_node = topology.node_of(own) == topology.node_of(peer);
        let of_rail = !of_node && topology.local_of(own) == topology.local_of(peer);
        let rail = (0..if of_rail { self.connections } else { 0 }).map(Purpose::Rail);
        [Purpose::Control].into_iter().chain(of_node.then_some(Purpose::Node)).chain(rail)
    }

    fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }
}

impl Links {
    fn none(world: &World<'_>) -> Self {
        let ranks = 0..world.topology.world_size();
        let rail =
            |peer| world.purposes(peer).filter(|purpose| matches!(purpose, Purpose::Rail(_))).map(|_| None);
        Self {
            control: ranks.clone().map(|_| None).collect(),
            node: ranks.clone().map(|_| None).collect(),
            rail: ranks.map(|peer| rail(peer).collect()).collect(),
        }
    }

    fn put(&mut self, rank: usize, purpose: Purpose, stream: Stream) {
        match (purpose, stream) {
            (Purpose::Control, Stream::Tcp(stream)) => self.control[rank] = Some(stream),
            (Purpose::Rail(n), Stream::Tcp(stream)) => self.rail[rank][n] = Some(stream),
            (Purpose::Node, Stream::Unix(stream)) => self.node[rank] = Some(stream),
            _ => unreachable!("each purpose has its kind of socket"),
        }
    }

    /// Makes all connections to `peer`, which comes before this rank.
    fn knock(&mut self, world: &World<'_>, peer: usize, failed: &AtomicBool) -> Result<(), ConnectError> {
        for purpose in world.purposes(peer) {
            let address = &world.addresses[peer];
            let refuse = |reason: io::Error| {
                let at =
                    if purpose == Purpose::Node { address.unix.clone() } else { address.tcp.to_string() };
                ConnectError::Unreachable { rank: peer, address: at, reason: reason.to_string() }
            };
            if failed.load(Ordering::Relaxed) {
                return Err(ConnectError::Missing(vec![peer]));
            }
            let stream = knock(world, address, purpose).map_err(refuse)?;
            self.put(peer, purpose, stream);
        }
        Ok(())
    }
}

fn knock(world: &World<'_>, address: &Address, purpose: Purpose) -> io::Result<Stream> {
    let mut knock = [0; KNOCK];
    knock[..8].copy_from_slice(&MAGIC);
    knock[8..24].copy_from_slice(&address.token);
    knock[24..28].copy_from_slice(&(world.rank as u32).to_le_bytes());
    knock[28..].copy_from_slice(&purpose.code().to_le_bytes());
    // The system takes so few bytes at once.
    if purpose == Purpose::Node {
        let mut stream = UnixStream::connect_addr(&UnixAddr::from_abstract_name(&address.unix)?)?;
        stream.write_all(&knock)?;
        return Ok(Stream::Unix(stream));
    }
    let left = Some(world.left()).filter(|left| !left.is_zero()).ok_or(io::ErrorKind::TimedOut)?;
    let mut stream = TcpStream::connect_timeout(&address.tcp, left)?;
    stream.set_nodelay(true)?;
    stream.write_all(&knock)?;
    Ok(Stream::Tcp(stream))
}

/// Who stands before the door.
struct Visitors<'a> {
    door: &'a Door,
    world: World<'a>,
    strangers: Vec<Stranger>,
}

struct Stranger {
    stream: Stream,
    said: Vec<u8>,
    until: Instant,
}

impl Visitors<'_> {
    /// Lets in all ranks that come after this one.
    fn accept(mut self, failed: &AtomicBool) -> Result<Vec<(usize, Purpose, Stream)>, ConnectError> {
        let door = |error: io::Error| ConnectError::Door(error.to_string());
        self.door.tcp.set_nonblocking(true).and(self.door.unix.set_nonblocking(true)).map_err(door)?;
        let later = self.world.rank + 1..self.world.topology.world_size();
        let wanted = |peer| self.world.purposes(peer).map(move |purpose| (peer, purpose));
        let mut wanted: Vec<_> = later.flat_map(wanted).collect();
        let mut accepted = Vec::new();
        let (mut next_look, mut suspects) = (Instant::now() + LOOKOUT, Vec::new());
        while !wanted.is_empty() {
            let mut missing: Vec<_> = wanted.iter().map(|&(peer, _)| peer).collect();
            missing.sort_unstable();
            missing.dedup();
            if failed.load(Ordering::Relaxed) || self.world.left().is_zero() {
                return Err(ConnectError::Missing(missing));
            }
            if next_look < Instant::now() {
                // Whoever was gone the last time as well had time for what it had sent to arrive.
                let enough = next_look + 2 * GLANCE;
                let looked = missing.into_iter().take_while(|_| Instant::now() < enough);
                let gone: Vec<_> = looked.filter(|&peer| self.is_gone(peer)).collect();
                let lost: Vec<_> = gone.iter().copied().filter(|peer| suspects.contains(peer)).collect();
                if !lost.is_empty() {
                    return Err(ConnectError::Gone(lost));
                }
                (next_look, suspects) = (Instant::now() + LOOKOUT, gone);
            }
            self.sleep().map_err(door)?;
            self.open().map_err(door)?;
            for (rank, purpose, stream) in self.listen() {
                match wanted.iter().position(|&one| one == (rank, purpose)) {
                    Some(at) => {
                        wanted.swap_remove(at);
                        accepted.push((rank, purpose, stream));
                    }
                    None => tracing::warn!(rank, ?purpose, "a connection that nobody expects was refused"),
                }
            }
        }
        Ok(accepted)
    }

    /// Whether nobody is behind `peer`'s door any more: its process has ended, or it has all its connections.
    fn is_gone(&self, peer: usize) -> bool {
        let knock = TcpStream::connect_timeout(&self.world.addresses[peer].tcp, GLANCE);
        knock.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    }

    /// Until somebody moves, or a glance's time is over.
    fn sleep(&self) -> io::Result<()> {
        let strangers = self.strangers.iter().map(|stranger| stranger.stream.as_fd());
        let fds = [self.door.tcp.as_fd(), self.door.unix.as_fd()].into_iter().chain(strangers);
        let mut fds: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let glance = Timespec::try_from(GLANCE).map_err(io::Error::other)?;
        match poll(&mut fds, Some(&glance)) {
            Err(rustix::io::Errno::INTR) => Ok(()),
            result => Ok(result.map(drop)?),
        }
    }

    /// Takes who has knocked since.
    fn open(&mut self) -> io::Result<()> {
        loop {
            let tcp = self.door.tcp.accept().map(|(stream, _)| Stream::Tcp(stream));
            let next = tcp.or_else(|_| self.door.unix.accept().map(|(stream, _)| Stream::Unix(stream)));
            let stream = match next {
                Ok(stream) => stream,
                // Nobody, or one that has left again.
                Err(_) => return Ok(()),
            };
            stream.set_nonblocking(true)?;
            if self.strangers.len() == MAX_VISITORS {
                self.strangers.remove(0);
            }
            self.strangers.push(Stranger { stream, said: Vec::new(), until: Instant::now() + PATIENCE });
        }
    }

    /// Those who have said who they are, rightly; others stay, or are turned away.
    fn listen(&mut self) -> Vec<(usize, Purpose, Stream)> {
        let mut known = Vec::new();
        for mut stranger in std::mem::take(&mut self.strangers) {
            match stranger.hear(self.door.address.token) {
                Ok(None) => self.strangers.push(stranger),
                Ok(Some((rank, purpose))) => known.push((rank, purpose, stranger.stream)),
                // Has looked whether somebody is here.
                Err(_) if stranger.said.is_empty() => {}
                Err(why) => tracing::warn!(by = stranger.stream.name(), %why, "a stranger was turned away"),
            }
        }
        known
    }
}

impl Stranger {
    /// Who it is, once it has said it all.
    fn hear(&mut self, token: Token) -> io::Result<Option<(usize, Purpose)>> {
        let mut bytes = [0; KNOCK];
        let missing = KNOCK - self.said.len();
        match self.stream.read(&mut bytes[..missing]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => self.said.extend_from_slice(&bytes[..n]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        let Ok(knock) = <&[u8; KNOCK]>::try_from(&self.said[..]) else {
            return match Instant::now() < self.until {
                true => Ok(None),
                false => Err(io::ErrorKind::TimedOut.into()),
            };
        };
        if knock[..8] != MAGIC || !blake3_eq(&knock[8..24], &token) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let number = |at: usize| u32::from_le_bytes(knock[at..at + 4].try_into().expect("four bytes"));
        self.stream.set_nonblocking(false)?;
        if let Stream::Tcp(stream) = &self.stream {
            stream.set_nodelay(true)?;
        }
        Ok(Some((number(24) as usize, Purpose::from_code(number(28)))))
    }
}

/// Compares without saying by its duration how much was right.
fn blake3_eq(a: &[u8], b: &[u8]) -> bool {
    blake3::hash(a) == blake3::hash(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn doors(count: usize) -> (Vec<Door>, Vec<Address>) {
        let doors: Vec<_> = (0..count).map(|_| Door::new([127, 0, 0, 1].into()).unwrap()).collect();
        let addresses = doors.iter().map(|door| door.address().clone()).collect();
        (doors, addresses)
    }

    fn whom(rank: usize, addresses: &[Address], patience: Duration) -> World<'_> {
        let (topology, end) = (Topology::new(2, 2).unwrap(), Instant::now() + patience);
        World { rank, topology, addresses, connections: 2, end }
    }

    /// What strangers say, each by a connection of its own that stays open.
    fn strangers(address: &Address) -> Vec<Stream> {
        let mut knock = [0; KNOCK];
        knock[..8].copy_from_slice(&MAGIC);
        let words = [&b""[..], &knock[..5], &knock, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", &[0xff; 4096]];
        let say = |&word: &&[u8]| {
            let mut tcp = TcpStream::connect(address.tcp).unwrap();
            let unix = UnixAddr::from_abstract_name(&address.unix).unwrap();
            let mut unix = UnixStream::connect_addr(&unix).unwrap();
            // Those who are turned away at once may not get all of it out.
            let _ = tcp.write_all(word);
            let _ = unix.write_all(word);
            [Stream::Tcp(tcp), Stream::Unix(unix)]
        };
        words.iter().flat_map(say).collect()
    }

    #[test]
    fn strangers_at_the_door_disturb_nobody() {
        let (doors, addresses) = doors(4);
        let addresses = &addresses;
        // As many as the system keeps for who does not open yet.
        let before: Vec<_> = (0..24).flat_map(|_| strangers(&addresses[0])).collect();
        let links: Vec<_> = thread::scope(|scope| {
            let connect = |(rank, door): (usize, Door)| {
                scope.spawn(move || {
                    // The last to come finds the others waiting, among strangers.
                    let during = (rank == 3).then(|| {
                        thread::sleep(Duration::from_millis(200));
                        // More than may stand there at a time.
                        addresses[..3].iter().cycle().take(60).flat_map(strangers).collect::<Vec<_>>()
                    });
                    let links = door.connect(whom(rank, addresses, LONG)).unwrap();
                    drop(during);
                    links
                })
            };
            let ranks: Vec<_> = doors.into_iter().enumerate().map(connect).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        drop(before);
        for (rank, links) in links.iter().enumerate() {
            let control = links.control.iter().map(Option::is_some);
            assert!(control.eq((0..4).map(|peer| peer != rank)));
            assert_eq!(links.node.iter().position(Option::is_some), Some(rank ^ 1));
            assert!(links.rail[rank ^ 2].iter().all(Option::is_some) && links.rail[rank ^ 2].len() == 2);
        }
    }

    #[test]
    fn a_rank_that_is_gone_is_named_before_the_end() {
        let (mut doors, addresses) = doors(4);
        let addresses = &addresses;
        [3, 1].into_iter().for_each(|gone| drop(doors.remove(gone)));
        let begun = Instant::now();
        let errors: Vec<_> = thread::scope(|scope| {
            let connect = |(rank, door): (usize, Door)| {
                scope.spawn(move || door.connect(whom(rank, addresses, LONG)).unwrap_err())
            };
            let ranks: Vec<_> = [0, 2].into_iter().zip(doors).map(connect).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert!(begun.elapsed() < LONG / 2, "{errors:?}");
        let names = |error: &ConnectError| match error {
            ConnectError::Unreachable { rank, .. } => [1, 3].contains(rank),
            ConnectError::Missing(ranks) | ConnectError::Gone(ranks) => {
                ranks.iter().all(|rank| [1, 3].contains(rank))
            }
            ConnectError::Door(_) => false,
        };
        assert!(errors.iter().all(names), "{errors:?}");
    }
}
