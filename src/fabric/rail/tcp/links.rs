//! The connections of a rail: what who posts and the rail's thread share.

#![allow(unsafe_code)]

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

use super::TcpPeer;
use super::inbox::End;
use super::outbox::{Departures, Outbox, Outgoing};
use crate::fabric::mapped::Mapped;

/// The event that is no connection's.
const LEAVING: u64 = u64::MAX;

/// An answer to every fence: nothing is waited for where nothing can come.
const ALL: u64 = u64::MAX;

/// The connections of all peers, and who waits for them.
pub struct Links {
    source: Mapped,
    links: Vec<Link>,
    /// Wakes the thread: any connection can be read, one with an outbox also when it can be written.
    epoll: OwnedFd,
    leaving: Leaving,
    pub departures: Departures,
    /// The latest answer on each connection.
    answers: Mutex<Vec<u64>>,
    answered: Condvar,
}

struct Link {
    stream: TcpStream,
    sending: Mutex<Sending>,
}

#[derive(Default)]
struct Sending {
    outbox: Outbox,
    /// The thread sends what is in the outbox, when the socket can be written.
    by_thread: bool,
    /// Why it can't be sent, where that is not because the peer is gone.
    failure: Option<Errno>,
}

/// How the rail's thread learns that it is to end.
struct Leaving {
    event: OwnedFd,
    until: Mutex<Option<Instant>>,
}

impl Links {
    /// All connections of `peers`, in this order.
    ///
    /// # Safety
    /// Where postings' sources lie stays mapped, and nobody writes a posting's data before its completion.
    pub unsafe fn new(source: Mapped, peers: Vec<TcpPeer>) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &event, EventData::new_u64(LEAVING), EventFlags::IN)?;
        let mut links = Vec::new();
        for stream in peers.into_iter().flat_map(|peer| peer.connections) {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            epoll::add(&epoll, &stream, EventData::new_u64(links.len() as u64), EventFlags::IN)?;
            links.push(Link { stream, sending: Mutex::default() });
        }
        Ok(Self {
            source,
            answers: Mutex::new(vec![0; links.len()]),
            links,
            epoll,
            leaving: Leaving { event, until: Mutex::default() },
            departures: Departures::default(),
            answered: Condvar::new(),
        })
    }

    /// The socket of a connection.
    pub fn stream(&self, link: usize) -> &TcpStream {
        &self.links[link].stream
    }

    // ---- sending

    /// Appends a frame to a connection's outbox; [`Links::send`] follows. A posting's source has been checked.
    pub fn push(&self, link: usize, frame: Outgoing) {
        self.sending(link).outbox.push(frame, &self.departures);
    }

    /// Sends what can be sent now, unless the thread is about to.
    pub fn send(&self, link: usize) {
        let mut sending = self.sending(link);
        if !sending.by_thread {
            self.go_on(link, &mut sending);
        }
    }

    /// For the thread, when the socket can be written: goes on with what is left.
    pub fn send_rest(&self, link: usize) {
        self.go_on(link, &mut self.sending(link));
    }

    fn go_on(&self, link: usize, sending: &mut Sending) {
        let stream = &self.links[link].stream;
        // SAFETY: sources have been checked before `push`; nobody writes them by the contract of `new`.
        let sent = unsafe { sending.outbox.send(stream, &self.source, &self.departures) };
        if let Err(errno) = sent.and_then(|()| self.arm(link, sending)) {
            self.give_up(link, sending, errno);
        }
    }

    /// Lets the thread be woken if, and only if, there is something left to send.
    fn arm(&self, link: usize, sending: &mut Sending) -> Result<(), Errno> {
        let rest = !sending.outbox.is_empty();
        if rest != sending.by_thread {
            let events = if rest { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            epoll::modify(&self.epoll, self.stream(link), EventData::new_u64(link as u64), events)?;
            sending.by_thread = rest;
        }
        Ok(())
    }

    /// The thread still reads what is there: its end is the connection's.
    fn give_up(&self, link: usize, sending: &mut Sending, errno: Errno) {
        if let End::Failed(errno) = End::from(errno) {
            sending.failure = Some(errno);
        }
        sending.outbox.close(&self.departures);
        // Fails only where there is no connection any more.
        let _ = self.stream(link).shutdown(Shutdown::Both);
    }

    // ---- the end of a connection

    /// Closes a connection: what is posted to it from now on leaves for nowhere, and nothing is waited for. Why
    /// sending had failed before, if it had.
    pub fn close(&self, link: usize) -> Option<Errno> {
        let mut sending = self.sending(link);
        sending.outbox.close(&self.departures);
        sending.by_thread = false;
        // Fails only where there is no connection any more.
        let _ = self.stream(link).shutdown(Shutdown::Both);
        let failure = sending.failure;
        drop(sending);
        epoll::delete(&self.epoll, self.stream(link)).expect("it was added, and is closed once");
        self.answer(link, ALL);
        failure
    }

    // ---- fences

    /// All that came before fence `number` on a connection has landed.
    pub fn answer(&self, link: usize, number: u64) {
        let mut answers = self.answers();
        answers[link] = answers[link].max(number);
        drop(answers);
        self.answered.notify_all();
    }

    /// Waits for answers to fence `number`, at most until `end`. The connections without.
    pub fn unanswered(&self, number: u64, end: Instant) -> Vec<usize> {
        let missing = |answers: &mut Vec<u64>| answers.iter().any(|&answer| answer < number);
        let time = end.saturating_duration_since(Instant::now());
        let waited = self.answered.wait_timeout_while(self.answers(), time, missing);
        let (answers, _) = waited.unwrap_or_else(PoisonError::into_inner);
        (0..answers.len()).filter(|&link| answers[link] < number).collect()
    }

    // ---- the thread

    /// Tells the thread to end once every outbox is empty, or at `until`.
    pub fn leave(&self, until: Instant) {
        *self.leaving.until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
        // Never full: it is written once.
        let _ = rustix::io::write(&self.leaving.event, &1u64.to_ne_bytes());
    }

    /// When the thread is to end, if it is.
    pub fn leaves_at(&self) -> Option<Instant> {
        *self.leaving.until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until connections can be read or written, for `time` at most: calls `on` with each, and which of the two.
    pub fn wait(
        &self,
        time: Option<Duration>,
        events: &mut Vec<Event>,
        mut on: impl FnMut(usize, EventFlags),
    ) {
        let time = time.map(|time| Timespec::try_from(time).expect("no wait is as long as that"));
        events.clear();
        match epoll::wait(&self.epoll, spare_capacity(events), time.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => panic!("epoll on sockets and an event: {errno}"),
        }
        for event in events {
            let (data, flags) = (event.data.u64(), event.flags);
            match data {
                LEAVING => drop(rustix::io::read(&self.leaving.event, &mut [0u8; 8])),
                link => on(link as usize, flags),
            }
        }
    }

    fn sending(&self, link: usize) -> MutexGuard<'_, Sending> {
        self.links[link].sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answers(&self) -> MutexGuard<'_, Vec<u64>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
