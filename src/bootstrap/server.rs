//! The store's end of the connections, on rank 0: a thread that accepts, and two for each connection.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::error::BootstrapError;
use super::frame::{Contribution, Timed, end_of, time_left};
use super::handshake::{Greeting, JobKey, challenge, conclude};
use super::hub::{Expiry, Hub, Post};
use crate::error::ConfigError;

/// How long a handshake may take, all of it. Whoever is cut off by a slow machine comes again.
const HANDSHAKE_TIME: Duration = Duration::from_secs(3);

/// The most handshakes at a time. More wait in the system's queue, no longer than the silent ones before them last.
const MAX_HANDSHAKES: usize = 64;

/// How often to look for new connections: while the world forms, and when only latecomers and strangers are left.
const FORMING_PAUSE: Duration = Duration::from_millis(5);
const FORMED_PAUSE: Duration = Duration::from_millis(200);

/// How long the end of the store waits for ranks to take what they were sent.
const LINGER: Duration = Duration::from_secs(2);

const STACK_BYTES: usize = 256 << 10;

/// A rank that was let in, and what it is to be sent.
type Admitted = (usize, Receiver<Post>);

/// Serves until it is dropped. Then the port is closed and no thread is left.
#[derive(Debug)]
pub(super) struct Server {
    shared: Arc<Shared>,
    address: SocketAddr,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    hub: Arc<Hub>,
    key: JobKey,
    /// What the store says of itself; each connection gets a nonce of its own.
    greeting: Greeting,
    gate: Mutex<Gate>,
    changed: Condvar,
}

/// The connections there are.
#[derive(Debug, Default)]
struct Gate {
    is_closed: bool,
    next_id: u64,
    /// Connections whose handshake is under way, and those of ranks.
    strangers: BTreeMap<u64, TcpStream>,
    members: BTreeMap<u64, TcpStream>,
}

impl Server {
    /// Serves `hub` on `listener`.
    pub fn start(
        listener: TcpListener,
        hub: Arc<Hub>,
        key: JobKey,
        greeting: Greeting,
    ) -> Result<Self, BootstrapError> {
        let start = || {
            let address = listener.local_addr()?;
            listener.set_nonblocking(true)?;
            let (gate, changed) = (Mutex::default(), Condvar::new());
            let shared = Arc::new(Shared { hub, key, greeting, gate, changed });
            let acceptor = {
                let shared = shared.clone();
                spawn("bootstrap-store".into(), move || shared.accept_all(&listener))?
            };
            Ok(Self { shared, address, acceptor: Some(acceptor) })
        };
        start().map_err(|error: io::Error| BootstrapError::io("the store can't start", &error))
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ranks first get what they were sent, the last step's end above all.
        self.shared.hub.close();
        self.shared.close();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(work)
}

fn refuse(peer: SocketAddr, why: &dyn std::fmt::Display) {
    tracing::warn!(%peer, %why, "a connection to the store was refused");
}

impl Shared {
    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits for `time`, or until the store is closed.
    fn pause(&self, time: Duration) {
        let waits = |gate: &mut Gate| !gate.is_closed;
        drop(self.changed.wait_timeout_while(self.gate(), time, waits));
    }

    /// Waits until another handshake may begin; false when the store is closed.
    fn wait_for_room(&self) -> bool {
        let waits = |gate: &mut Gate| !gate.is_closed && gate.strangers.len() >= MAX_HANDSHAKES;
        let gate = self.changed.wait_while(self.gate(), waits).unwrap_or_else(|p| p.into_inner());
        !gate.is_closed
    }

    fn accept_all(self: &Arc<Self>, listener: &TcpListener) {
        let mut connections: Vec<JoinHandle<()>> = Vec::new();
        while self.wait_for_room() {
            let pause = if self.hub.is_formed() { FORMED_PAUSE } else { FORMING_PAUSE };
            match listener.accept() {
                Ok((stream, peer)) => match self.clone().connection(stream, peer) {
                    Ok(connection) => connections.push(connection),
                    Err(error) => refuse(peer, &error),
                },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.pause(pause),
                // Too many open files, or a peer that was gone before it was accepted: no reason to stop.
                Err(error) => {
                    tracing::warn!(%error, "the store can't accept a connection");
                    self.pause(FORMED_PAUSE);
                }
            }
            connections.retain(|connection| !connection.is_finished());
        }
        connections.into_iter().for_each(|connection| drop(connection.join()));
    }

    /// Starts the thread of a connection.
    fn connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr) -> io::Result<JoinHandle<()>> {
        // Some systems hand the listener's mode on.
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        let id = {
            let mut gate = self.gate();
            if gate.is_closed {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            let (id, clone) = (gate.next_id, stream.try_clone()?);
            gate.next_id += 1;
            gate.strangers.insert(id, clone);
            id
        };
        let guard = Registered { shared: self, id };
        spawn(format!("bootstrap-{id}"), move || guard.shared.serve(guard.id, &stream, peer))
    }

    /// Serves one connection until it ends.
    fn serve(&self, id: u64, stream: &TcpStream, peer: SocketAddr) {
        match self.handshake(id, stream, peer) {
            Ok(Some((rank, posts))) => self.serve_rank(rank, stream, posts),
            Ok(None) => {}
            Err(why) => refuse(peer, &why),
        }
    }

    /// A stranger is one no longer: what it is sent will reach it even if the store ends now.
    fn promote(&self, id: u64) {
        let mut gate = self.gate();
        if let Some(stream) = gate.strangers.remove(&id) {
            gate.members.insert(id, stream);
        }
        drop(gate);
        self.changed.notify_all();
    }

    /// Finds out who has connected; none if it is of this job, but can't be let in.
    fn handshake(
        &self,
        id: u64,
        stream: &TcpStream,
        peer: SocketAddr,
    ) -> Result<Option<Admitted>, Box<dyn std::error::Error>> {
        let mut timed = Timed { stream, end: end_of(HANDSHAKE_TIME) };
        let own = self.greeting.fresh()?;
        let who = challenge(&self.key, &own, &mut timed).map_err(|stop| stop.to_string())?;
        let (outbox, posts) = channel();
        let verdict = self.judge(&who).and_then(|rank| self.hub.admit(rank, outbox).map(|()| rank));
        self.promote(id);
        let told = conclude(&self.key, &own, &who, &verdict.clone().map(drop), &mut timed);
        if let (Err(BootstrapError::Mismatch { .. }), Some(ours)) = (&verdict, own.mismatch(&who)) {
            // A rank of this job that does not fit: without it there is no world. But it has been told before that ends.
            self.hub.fail_forming(ours);
        }
        // A rank may be silent for as long as it likes, from here on.
        let told = told.and_then(|()| stream.set_read_timeout(None));
        match (verdict, told.and_then(|()| stream.set_write_timeout(None))) {
            (Ok(rank), Ok(())) => {
                tracing::debug!(rank, %peer, "a rank has come");
                Ok(Some((rank, posts)))
            }
            (Ok(rank), Err(error)) => {
                self.hub.leave(rank);
                Err(error.into())
            }
            (Err(error), _) => {
                refuse(peer, &error);
                Ok(None)
            }
        }
    }

    /// Whether `who`, which is of this job, fits the world; its rank if so.
    fn judge(&self, who: &Greeting) -> Result<usize, BootstrapError> {
        let rank = usize::try_from(who.rank).unwrap_or(usize::MAX);
        if self.hub.is_taken(rank) {
            return Err(BootstrapError::Duplicate { rank });
        }
        match who.mismatch(&self.greeting) {
            Some(mismatch) => Err(mismatch),
            None if rank >= self.hub.world_size() => {
                let reason = "a rank is below the world size".into();
                Err(ConfigError { field: "rank", value: who.rank, reason, nearest: None }.into())
            }
            None => Ok(rank),
        }
    }

    /// Takes what a rank brings, while another thread sends it what it waits for.
    fn serve_rank(&self, rank: usize, stream: &TcpStream, posts: Receiver<Post>) {
        thread::scope(|scope| {
            let writer = thread::Builder::new().name(format!("bootstrap-to-{rank}")).stack_size(STACK_BYTES);
            let end = match writer.spawn_scoped(scope, move || self.write_all(stream, &posts)) {
                Ok(_) => self.read_all(rank, stream),
                Err(error) => Err(error),
            };
            match end {
                Ok(()) => tracing::debug!(rank, "a rank has left"),
                Err(error) => tracing::debug!(rank, %error, "a rank was lost"),
            }
            // Its outbox goes, and with it the writer.
            self.hub.leave(rank);
        });
    }

    /// Until the rank leaves, or does what no rank does.
    fn read_all(&self, rank: usize, mut stream: &TcpStream) -> io::Result<()> {
        while let Some(came) = Contribution::read(&mut stream)? {
            let expiry = Expiry { at: end_of(came.left), number: came.step.number, after: came.deadline };
            let part = came.read_payload(self.hub.room(), &mut stream)?;
            if !self.hub.contribute(rank, came.step, part, came.bytes, expiry) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "it came to another step"));
            }
        }
        Ok(())
    }

    /// Until the outbox is gone, or the rank no longer listens.
    fn write_all(&self, mut stream: &TcpStream, posts: &Receiver<Post>) {
        let mut expiry: Option<Expiry> = None;
        loop {
            let left = expiry.map(|expiry| time_left(expiry.at).unwrap_or_default());
            let post = match left {
                Some(left) => posts.recv_timeout(left),
                None => posts.recv().map_err(RecvTimeoutError::from),
            };
            match post {
                Ok(Post::Expire(next)) => expiry = Some(next),
                Ok(Post::Send(bytes)) => {
                    expiry = None;
                    if stream.write_all(&bytes).is_err() {
                        break;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    expiry.take().into_iter().for_each(|end| self.hub.expire(end))
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        // Ends the reader, too.
        let _ = stream.shutdown(Shutdown::Both);
    }

    /// Ends all connections: strangers' at once, ranks' when they have what they were sent.
    fn close(&self) {
        let mut gate = self.gate();
        gate.is_closed = true;
        self.changed.notify_all();
        gate.strangers.values().for_each(shut);
        let waits = |gate: &mut Gate| !gate.members.is_empty();
        let gate = self.changed.wait_timeout_while(gate, LINGER, waits).unwrap_or_else(|p| p.into_inner()).0;
        gate.members.values().for_each(shut);
    }
}

fn shut(stream: &TcpStream) {
    // One that is shut already can't be once more.
    let _ = stream.shutdown(Shutdown::Both);
}

/// Takes a connection off the list when its thread ends, however it does.
struct Registered {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut gate = self.shared.gate();
        gate.strangers.remove(&self.id);
        gate.members.remove(&self.id);
        drop(gate);
        self.shared.changed.notify_all();
    }
}
