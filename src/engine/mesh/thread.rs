//! The thread that listens to all ranks.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::link::Inbox;
use super::{LaneWaits, Mesh, Message, Waits};
use crate::engine::completion::lock;
use crate::engine::control::Counted;
use crate::error::Fault;

/// Whose operations the mesh is for.
pub trait Host: Send + Sync {
    /// Another rank has come upon a fault.
    fn adopt(&self, fault: &Fault, generation: u16);

    /// Nothing more comes from `rank` by the mesh. If it has said that it leaves: what it had started.
    fn closed(&self, rank: usize, farewell: Option<Counted>);

    /// The fault of this generation, if there is one.
    fn fault(&self) -> Option<(u16, Arc<Fault>)>;

    /// What this rank's operations wait for; none if that is not known yet.
    fn waits(&self) -> Option<LaneWaits>;
}

/// Listens until it is dropped.
pub struct MeshThread {
    mesh: Arc<Mesh>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl MeshThread {
    /// Starts listening on behalf of `host`.
    ///
    /// # Errors
    /// The system refuses the thread.
    pub fn spawn(mesh: Arc<Mesh>, host: Weak<dyn Host>) -> io::Result<Self> {
        let stop = Arc::<AtomicBool>::default();
        let mut listener = Listener {
            inboxes: mesh.links.iter().map(|link| link.as_ref().map(|_| Inbox::default())).collect(),
            mesh: mesh.clone(),
            host,
            stop: stop.clone(),
        };
        let name = format!("mesh-{}", mesh.rank);
        let thread = thread::Builder::new().name(name).spawn(move || listener.run())?;
        Ok(Self { mesh, stop, thread: Some(thread) })
    }
}

impl Drop for MeshThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.mesh.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Listener {
    mesh: Arc<Mesh>,
    host: Weak<dyn Host>,
    stop: Arc<AtomicBool>,
    /// By rank; none of those that are closed.
    inboxes: Vec<Option<Inbox>>,
}

impl Listener {
    fn run(&mut self) {
        while !self.stop.load(Ordering::Acquire) {
            let next = self.mesh.hold_meeting();
            let ready = match self.sleep(next) {
                Ok(ready) => ready,
                Err(error) => return tracing::error!(%error, "the mesh can't wait for messages"),
            };
            for (rank, flags) in ready {
                if flags.contains(PollFlags::OUT)
                    && let Some(link) = &self.mesh.links[rank]
                {
                    link.flush();
                }
                if flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                    self.hear(rank);
                }
            }
        }
    }

    /// Sleeps until something can be read or written, or `next`; by rank what it is.
    fn sleep(&self, next: Option<Instant>) -> io::Result<Vec<(usize, PollFlags)>> {
        let open = self.mesh.links.iter().zip(&self.inboxes).enumerate();
        let open = open
            .filter_map(|(rank, (link, inbox))| inbox.as_ref().and(link.as_ref()).map(|link| (rank, link)));
        let (ranks, links): (Vec<usize>, Vec<_>) = open.unzip();
        let wanted = |unsent| if unsent { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let mut fds: Vec<_> = links
            .iter()
            .map(|link| PollFd::from_borrowed_fd(link.as_fd(), wanted(link.has_unsent())))
            .collect();
        fds.push(PollFd::new(&self.mesh.wake, PollFlags::IN));
        let timeout = next.map(|next| next.saturating_duration_since(Instant::now()));
        let timeout = timeout.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        match poll(&mut fds, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            result => drop(result?),
        }
        let _ = rustix::io::read(&self.mesh.wake, &mut [0u8; 8]);
        let ready = ranks.into_iter().zip(&fds).map(|(rank, fd)| (rank, fd.revents()));
        Ok(ready.filter(|(_, flags)| !flags.is_empty()).collect())
    }

    fn hear(&mut self, rank: usize) {
        let (Some(link), Some(inbox)) = (&self.mesh.links[rank], &mut self.inboxes[rank]) else { return };
        match inbox.read(link) {
            Ok(messages) => messages.into_iter().for_each(|message| self.obey(rank, message)),
            Err(_) => self.close(rank, None),
        }
    }

    fn obey(&mut self, rank: usize, message: Message) {
        match message {
            Message::Fault { generation, fault } => {
                if let Some(host) = self.host.upgrade() {
                    host.adopt(&fault, generation);
                }
                self.mesh.note(rank, Message::Fault { generation, fault });
            }
            Message::Ask { id } => {
                let Some(host) = self.host.upgrade() else { return };
                // Taken before it is seen whether a fault has ended them: then that rank is not to be blamed.
                let micros = |since: Instant| since.elapsed().as_micros() as u64;
                let sent =
                    |waits: Waits| waits.into_iter().map(|(since, wait)| (micros(since), wait)).collect();
                let waits = host.waits().map(|waits| waits.map(sent));
                if let Some((generation, fault)) = host.fault() {
                    self.mesh.tell(rank, &Message::Fault { generation, fault: (*fault).clone() });
                }
                self.mesh.tell(rank, &Message::Answer { id, waits });
            }
            Message::Bye { started } => self.close(rank, Some(started)),
            message => self.mesh.note(rank, message),
        }
    }

    fn close(&mut self, rank: usize, farewell: Option<Counted>) {
        if self.inboxes[rank].take().is_none() {
            return;
        }
        lock(&self.mesh.state).closed[rank] = true;
        self.mesh.changed.notify_all();
        if let Some(host) = self.host.upgrade() {
            host.closed(rank, farewell);
        }
    }
}
