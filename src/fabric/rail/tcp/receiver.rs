//! The rail's thread: receives, goes on with what could not be sent at once, and tells the rank.

#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::frame::Frame;
use super::inbox::{End, Inbox};
use super::links::Links;
use crate::fabric::rail::{Landing, Listener, RailError};

/// Connections that one sleep ends for at most; the others have their turn after these.
const EVENTS: usize = 64;

/// What the thread has of the rail.
pub struct Receiver {
    links: Arc<Links>,
    listener: Arc<dyn Listener>,
    peers: Vec<Peer>,
    /// One for each connection, until its end.
    inboxes: Vec<Option<Inbox>>,
}

/// Whom a connection leads to.
struct Peer {
    rank: usize,
    links: Range<usize>,
    /// Connections that have not ended. None: the peer is lost.
    open: usize,
}

impl Receiver {
    /// The thread's part for `peers`, ranks with their connections, whose postings land in `landing`.
    ///
    /// # Safety
    /// Nobody touches a posting's target before its word is written.
    pub unsafe fn new(
        links: Arc<Links>,
        listener: Arc<dyn Listener>,
        landing: Arc<dyn Landing>,
        peers: impl Iterator<Item = (usize, Range<usize>)>,
    ) -> Self {
        let peers: Vec<Peer> = peers.map(|(rank, links)| Peer { rank, open: links.len(), links }).collect();
        let count = peers.iter().map(|peer| peer.open).sum();
        let inboxes = (0..count).map(|_| Some(Inbox::new(landing.clone()))).collect();
        Self { links, listener, peers, inboxes }
    }

    /// Works until the rail leaves.
    pub fn run(mut self) {
        let links = self.links.clone();
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            let leaves_at = links.leaves_at();
            let left = leaves_at.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero() || links.departures.all_left()) {
                return;
            }
            links.wait(left, &mut events, |link, flags| {
                if flags.contains(EventFlags::OUT) {
                    links.send_rest(link);
                }
                self.receive(link);
            });
        }
    }

    fn receive(&mut self, link: usize) {
        // Another connection of the peer may have ended this one since the event.
        let Some(inbox) = &mut self.inboxes[link] else { return };
        // SAFETY: as promised to `new`.
        let received = unsafe { inbox.turn(self.links.stream(link)) };
        if received.published {
            self.listener.signalled();
        }
        if let Some(number) = received.answer {
            self.links.answer(link, number);
        }
        if let Some(number) = received.fence {
            self.links.push(link, Frame::Answer(number).into());
            self.links.send(link);
        }
        if let Some(end) = received.end {
            self.end(link, end);
        }
    }

    /// A connection has ended. A peer that leaves ends all of its connections; one that fails on one has failed.
    fn end(&mut self, link: usize, end: End) {
        let peer = self.peers.partition_point(|peer| peer.links.end <= link);
        let Peer { rank, links, .. } = &self.peers[peer];
        let (rank, links) = (*rank, links.clone());
        let send_failure = self.close(peer, link);
        let failure = match end {
            End::Closed => send_failure.map(|errno| errno.to_string()),
            End::Failed(errno) => Some(errno.to_string()),
            End::Garbage(error) => Some(error.to_string()),
            End::Unpublished(error) => Some(error.to_string()),
        };
        if failure.is_some() {
            for link in links.filter(|&other| other != link) {
                self.close(peer, link);
            }
        }
        if self.peers[peer].open == 0 {
            self.listener.lost(rank, failure.map(|reason| RailError::Broken { peer: rank, reason }));
        }
    }

    /// Closes a connection of a peer if it is still open. Why sending had failed before, if it had.
    fn close(&mut self, peer: usize, link: usize) -> Option<Errno> {
        self.inboxes[link].take()?;
        self.peers[peer].open -= 1;
        self.links.close(link)
    }
}
