//! A rank's end of its connection to the store.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use super::error::{BootstrapError, Operation, Refusal, Step};
use super::frame::{Contribution, Outcome, Timed, end_of, read_outcome, time_left};
use super::handshake::{Greeting, JobKey, Stop, greet, prove};

/// How long a rank waits beyond its deadline for the store to say who is missing.
const GRACE: Duration = Duration::from_millis(600);

/// How long a store of another job, or something else, may be in our store's place: it may be on its way out.
pub(super) const STRANGER_TIME: Duration = Duration::from_secs(3);

/// How long one attempt may take to connect, and to hear from who listens.
const CONNECT_TIME: Duration = Duration::from_secs(3);
const GREETING_TIME: Duration = Duration::from_secs(10);

/// Pauses between attempts double from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LAST_PAUSE: Duration = Duration::from_millis(320);

#[derive(Debug)]
pub(super) struct Client {
    stream: TcpStream,
    world_size: usize,
    /// Number of the next step.
    number: u64,
    /// Why there is none.
    failure: Option<BootstrapError>,
}

impl Client {
    /// This end's address, while it is connected.
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.stream.local_addr().ok()
    }

    /// Finds the store of this job at `address` and joins its world.
    pub fn join(
        address: (&str, u16),
        key: &JobKey,
        greeting: &Greeting,
        deadline: Duration,
    ) -> Result<Self, BootstrapError> {
        let end = end_of(deadline);
        let stream = find(address, key, greeting, end, deadline)?;
        let mut client = Self { stream, world_size: greeting.world_size as usize, number: 0, failure: None };
        client.step_until(Operation::Join, &[], deadline, end)?;
        Ok(client)
    }

    /// Brings `mine` to the next step, and gives how that ends.
    pub fn step(&mut self, operation: Operation, mine: &[u8], deadline: Duration) -> Outcome {
        self.step_until(operation, mine, deadline, end_of(deadline))
    }

    fn step_until(&mut self, operation: Operation, mine: &[u8], deadline: Duration, end: Instant) -> Outcome {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let step = Step { operation, number: self.number };
        let outcome = self.exchange(step, mine, deadline, end).unwrap_or_else(|error| {
            Err(match error.kind() {
                io::ErrorKind::TimedOut => BootstrapError::Missing { ranks: vec![0], step, after: deadline },
                io::ErrorKind::InvalidData => BootstrapError::io("what the store has sent", &error),
                _ => BootstrapError::Lost { rank: 0 },
            })
        });
        self.number += 1;
        self.failure = outcome.as_ref().err().filter(|error| error.is_final()).cloned();
        outcome
    }

    fn exchange(&self, step: Step, mine: &[u8], deadline: Duration, end: Instant) -> io::Result<Outcome> {
        let left = time_left(end).unwrap_or_default();
        let contribution = Contribution { step, deadline, left, bytes: mine.len() as u64 };
        let mut timed = Timed { stream: &self.stream, end: end + GRACE };
        let sent = contribution.write(mine, &mut timed);
        // A store that has failed may have closed, but said why before.
        match (read_outcome(&mut timed, self.world_size), sent) {
            (Err(_), Err(error)) => Err(error),
            (outcome, _) => outcome,
        }
    }
}

/// How an attempt to join ends without success.
enum Failed {
    /// Another attempt may fare better.
    Again(io::Error),
    /// Who listens is not of this job.
    Stranger(SocketAddr, Refusal),
    /// The store has decided.
    Finally(BootstrapError),
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Again(error) => write!(f, "{error}"),
            Self::Stranger(by, why) => write!(f, "{by}: {why}"),
            Self::Finally(error) => write!(f, "{error}"),
        }
    }
}

/// Tries until the store lets us in, or `end`.
fn find(
    address: (&str, u16),
    key: &JobKey,
    greeting: &Greeting,
    end: Instant,
    deadline: Duration,
) -> Result<TcpStream, BootstrapError> {
    let mut pause = FIRST_PAUSE;
    let mut stranger_since: Option<Instant> = None;
    loop {
        let failed = match attempt(address, key, greeting, end) {
            Ok(stream) => return Ok(stream),
            Err(failed) => failed,
        };
        match &failed {
            Failed::Finally(error) => return Err(error.clone()),
            Failed::Stranger(by, why) => {
                let is_first = stranger_since.is_none();
                if is_first {
                    tracing::warn!(%by, %why, "this is not the store of this job; trying again");
                }
                let since = *stranger_since.get_or_insert_with(Instant::now);
                let is_over = since.elapsed() + pause >= STRANGER_TIME || end < Instant::now() + pause;
                if is_over {
                    return Err(BootstrapError::Refused { by: by.to_string(), why: *why });
                }
            }
            Failed::Again(_) => stranger_since = None,
        }
        let Some(left) = time_left(end) else {
            let address = super::Address { host: address.0.into(), port: address.1 }.to_string();
            return Err(BootstrapError::Unreachable { address, after: deadline, reason: failed.to_string() });
        };
        thread::sleep(pause.min(left));
        pause = LAST_PAUSE.min(2 * pause);
    }
}

/// Tries each address once.
fn attempt(
    (host, port): (&str, u16),
    key: &JobKey,
    greeting: &Greeting,
    end: Instant,
) -> Result<TcpStream, Failed> {
    let mut failed = Failed::Again(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    for address in resolve(host, port, end).map_err(Failed::Again)? {
        failed = match connect(address, end).map_err(Failed::Again) {
            Ok(stream) => match shake_hands(&stream, address, key, greeting, end) {
                Ok(()) => return Ok(stream),
                Err(failed) => failed,
            },
            Err(failed) => failed,
        };
        if matches!(failed, Failed::Finally(_)) {
            break;
        }
    }
    Err(failed)
}

/// The addresses of `host`.
pub(super) fn resolve(host: &str, port: u16, end: Instant) -> io::Result<Vec<SocketAddr>> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![(ip, port).into()]);
    }
    // The system's resolver knows no deadline, so it runs where nobody waits for it.
    let (found, result) = channel();
    let name = host.to_string();
    thread::Builder::new().name("bootstrap-resolve".into()).spawn(move || {
        let addresses = (name.as_str(), port).to_socket_addrs().map(Vec::from_iter);
        let _ = found.send(addresses);
    })?;
    let left = time_left(end).unwrap_or_default();
    result.recv_timeout(left).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn connect(address: SocketAddr, end: Instant) -> io::Result<TcpStream> {
    let left = time_left(end).ok_or(io::ErrorKind::TimedOut)?;
    let stream = TcpStream::connect_timeout(&address, left.min(CONNECT_TIME))?;
    // Where nobody listens, a port of the system's own choice may come to be connected to itself.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn shake_hands(
    stream: &TcpStream,
    address: SocketAddr,
    key: &JobKey,
    greeting: &Greeting,
    end: Instant,
) -> Result<(), Failed> {
    let stop = |stop| match stop {
        Stop::Refused(why) => Failed::Stranger(address, why),
        Stop::Broken(error) => Failed::Again(error),
    };
    let own = greeting.fresh().map_err(Failed::Finally)?;
    let soon = end.min(end_of(GREETING_TIME));
    let store = greet(&own, &mut Timed { stream, end: soon }).map_err(stop)?;
    // From here on the store takes this connection for the rank: giving it up would be leaving.
    let verdict = prove(key, &own, &store, &mut Timed { stream, end }).map_err(stop)?;
    verdict.map_err(Failed::Finally)
}
