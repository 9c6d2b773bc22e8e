//! The rail over TCP: frames on connections that somebody else has made.
//!
//! - `frame`: headers, and what is believed of them.
//! - `outbox`: what a connection's socket has not taken yet.
//! - `inbox`: from a connection straight into the region.
//! - `links`: the connections, with who sends on them and who waits for answers.
//! - `receiver`: the rail's thread.
//!
//! Postings of a queue to a peer share a connection, so TCP keeps their order. Data is never copied on this side of
//! the sockets: it goes from its source, and into its target. Who posts sends at once; what the socket does not take
//! is the thread's.

#![allow(unsafe_code)]

mod frame;
mod inbox;
mod links;
mod outbox;
mod receiver;

use std::io;
use std::net::TcpStream;
use std::ops::Range;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use self::frame::Frame;
use self::links::Links;
use self::receiver::Receiver;
use super::{Completion, Landing, Listener, NetworkRail, Rail, RailError};
use crate::fabric::mapped::Mapped;
use crate::wire::posting::Posting;

/// How long a rail that is dropped waits for its peers to take what is left.
const GOODBYE: Duration = Duration::from_millis(200);

/// A peer and the connections to it; the i-th here is the i-th there. Equally many at both ends.
#[derive(Debug)]
pub struct TcpPeer {
    /// Its rank.
    pub rank: usize,
    /// Established, with nothing on them yet, and known to lead to that rank: whoever is at the other end may write
    /// this rank's region.
    pub connections: Vec<TcpStream>,
}

/// Carries postings to ranks of other processes over TCP. A posting takes the connection of its queue, modulo their
/// number.
///
/// Dropping it says goodbye to the peers and ends its thread. What peers have sent and this rank has not received is
/// gone then, and the system may tell a peer so by a reset, which destroys what is on its way there: drain first.
pub struct TcpRail {
    source: Mapped,
    links: Arc<Links>,
    /// The connections to each rank; none where it is no peer.
    routes: Vec<Range<usize>>,
    /// The connections that got something to send from the call under way.
    touched: Vec<usize>,
    /// Fences so far.
    fences: u64,
    thread: Option<JoinHandle<()>>,
}

impl TcpRail {
    /// The rail of `rank`. The sources of its postings lie in `source`; what peers send lands in `landing`.
    ///
    /// A peer that sends what makes no sense is lost; nothing outside of its memory is written, whatever comes.
    ///
    /// # Errors
    /// A peer has no connection, is the rank itself or there twice, or the system refuses.
    ///
    /// # Safety
    /// The memories outlive the rail: dropping it ends its thread first. Whatever is posted here and at the peers
    /// keeps to the protocol: from the posting to its completion nobody writes its source, and nobody touches its
    /// target until the signal is there.
    pub unsafe fn new(
        rank: usize,
        source: Mapped,
        landing: Arc<dyn Landing>,
        peers: Vec<TcpPeer>,
        listener: Arc<dyn Listener>,
    ) -> io::Result<Self> {
        let routes = routes(rank, &peers)?;
        let ranges: Vec<_> = peers.iter().map(|peer| (peer.rank, routes[peer.rank].clone())).collect();
        // SAFETY: as promised to this function.
        let links = Arc::new(unsafe { Links::new(source, peers) }?);
        // SAFETY: as promised to this function; the thread ends before the rail does.
        let receiver = unsafe { Receiver::new(links.clone(), listener, landing, ranges.into_iter()) };
        let thread = thread::Builder::new().name(format!("rail-{rank}")).spawn(move || receiver.run())?;
        Ok(Self { source, links, routes, touched: Vec::new(), fences: 0, thread: Some(thread) })
    }

    /// Appends a posting to its connection's outbox.
    fn push(&mut self, posting: &Posting) -> Result<(), RailError> {
        let Posting { peer, queue, source, bytes, .. } = *posting;
        let outside = |what, offset, bytes| RailError::OutOfRange { what, peer, offset, bytes };
        let route = self.routes.get(peer).filter(|route| !route.is_empty());
        let route = route.ok_or_else(|| outside("the region", 0, 0))?;
        if !self.source.holds(source, bytes) {
            return Err(outside("the source", source, bytes));
        }
        let link = route.start + queue % route.len();
        self.links.push(link, posting.into());
        if !self.touched.contains(&link) {
            self.touched.push(link);
        }
        Ok(())
    }

    /// Sends `frame` on every connection.
    fn send_to_all(&self, frame: Frame) {
        for link in self.routes.iter().cloned().flatten() {
            self.links.push(link, frame.into());
            self.links.send(link);
        }
    }
}

/// The connections to each rank, in the order of `peers`.
fn routes(rank: usize, peers: &[TcpPeer]) -> io::Result<Vec<Range<usize>>> {
    let refused = |what: String| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    let mut routes = vec![0..0; peers.iter().map(|peer| peer.rank + 1).max().unwrap_or(0)];
    let mut next = 0;
    for TcpPeer { rank: peer, connections } in peers {
        if connections.is_empty() || *peer == rank || !routes[*peer].is_empty() {
            return refused(format!(
                "rank {rank} has {} connections to rank {peer}: a rail peer is another rank, given once, with at least one",
                connections.len()
            ));
        }
        routes[*peer] = next..next + connections.len();
        next += connections.len();
    }
    Ok(routes)
}

impl Rail for TcpRail {
    fn post(&mut self, postings: &[Posting]) -> Result<usize, RailError> {
        let pushed = postings.iter().try_for_each(|posting| self.push(posting));
        self.touched.drain(..).for_each(|link| self.links.send(link));
        pushed.map(|()| postings.len())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<(), RailError> {
        self.links.departures.report(completions);
        Ok(())
    }

    fn is_idle(&self) -> bool {
        self.links.departures.is_idle()
    }
}

impl NetworkRail for TcpRail {
    fn drain(&mut self, end: Instant) -> Vec<usize> {
        self.fences += 1;
        self.send_to_all(Frame::Fence(self.fences));
        let unanswered = self.links.unanswered(self.fences, end);
        let waits = |route: &Range<usize>| unanswered.iter().any(|link| route.contains(link));
        (0..self.routes.len()).filter(|&peer| waits(&self.routes[peer])).collect()
    }
}

impl Drop for TcpRail {
    fn drop(&mut self) {
        self.send_to_all(Frame::Goodbye);
        self.links.leave(Instant::now() + GOODBYE);
        if let Some(thread) = self.thread.take() {
            // A panic is the listener's, and has been printed.
            let _ = thread.join();
        }
    }
}
