//! The control channel between processes: every rank has a connection to every other, on which faults, departures,
//! questions and meetings travel. Nothing here is fast, and nothing here waits for a rank that does not answer.

mod link;
mod meeting;
mod thread;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

use super::completion::lock;
use super::control::Counted;
use crate::error::{Error, Fault, Wait};
use crate::wire::region::LANES;
use link::Link;
use meeting::Meeting;

pub use thread::{Host, MeshThread};

/// Waits of an operation, and since when.
pub type Waits = Vec<(Instant, Wait)>;

/// What a rank's operations wait for, by lane.
pub type LaneWaits = [Waits; LANES.len()];

/// What a rank says of its operations.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// Nothing, in the time it had.
    None,
    /// Some are under way, and it will be known what they wait for when the first wait of theirs has expired.
    Later,
    /// What they wait for: nothing, where there are none.
    Waits(LaneWaits),
}

/// What ranks tell each other.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Message {
    /// A fault poisons the world.
    Fault { generation: u16, fault: Fault },
    /// The rank leaves, having started so much; nothing follows.
    Bye { started: Counted },
    /// What do your operations wait for? If there is a fault, it is told first.
    Ask { id: u64 },
    /// By lane: for so many microseconds, for this. None if that is not known yet.
    Answer { id: u64, waits: Option<[Vec<(u64, Wait)>; LANES.len()]> },
    /// To rank 0: the rank has come to a reset.
    Arrived { attempt: u64, generation: u16, gone: Vec<usize>, deadline: Duration },
    /// From rank 0: all have, or these have not within so long.
    Met { attempt: u64, missing: Vec<usize>, after: Duration },
    /// What the rank brings to a gather among some of the ranks.
    Bring { gather: Gather, bytes: Vec<u8> },
}

/// Which gather: of which group of ranks, and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Gather {
    /// Hash of the group.
    pub group: u64,
    /// How many there were before it.
    pub step: u64,
}

/// A rank's connections to all others.
pub struct Mesh {
    rank: usize,
    /// By rank; none for itself.
    links: Vec<Option<Link>>,
    /// Wakes the thread.
    wake: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    questions: u64,
    /// Faults that have been told: they answer all questions.
    faults: u64,
    /// By question that somebody waits with, and rank: what has been answered. Several threads may ask at a time.
    asked: HashMap<u64, HashMap<usize, Answer>>,
    /// Resets this rank has come to, and what the last of them came to.
    attempts: u64,
    met: Option<Met>,
    /// By gather and rank: what was brought.
    brought: HashMap<(Gather, usize), Vec<u8>>,
    closed: Vec<bool>,
    /// At rank 0.
    meeting: Meeting,
}

struct Met {
    attempt: u64,
    missing: Vec<usize>,
    after: Duration,
}

impl Mesh {
    /// The mesh of `rank` over `links`, by rank.
    ///
    /// # Errors
    /// The system refuses a descriptor.
    pub fn new(rank: usize, links: Vec<Option<TcpStream>>) -> io::Result<Self> {
        let closed = vec![false; links.len()];
        let links =
            links.into_iter().map(|link| link.map(Link::new).transpose()).collect::<Result<_, _>>()?;
        Ok(Self {
            rank,
            links,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            state: Mutex::new(State { closed, ..State::default() }),
            changed: Condvar::new(),
        })
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.links.len()
    }

    /// This rank's address on the first connection there is.
    pub fn own_address(&self) -> Option<IpAddr> {
        self.links.iter().flatten().find_map(Link::own_address)
    }

    /// Tells all ranks of a fault.
    pub fn tell_fault(&self, generation: u16, fault: Fault) {
        self.tell_all(&Message::Fault { generation, fault });
    }

    /// Tells all ranks that this one leaves, having started so much.
    pub fn leave(&self, started: Counted) {
        self.tell_all(&Message::Bye { started });
    }

    /// What the operations of `ranks` wait for, as far as they say so by `end`, or until a fault is told.
    pub fn ask(&self, ranks: &[usize], end: Instant) -> Vec<Answer> {
        let mut state = lock(&self.state);
        state.questions += 1;
        let (id, faults) = (state.questions, state.faults);
        state.asked.insert(id, HashMap::new());
        drop(state);
        ranks.iter().for_each(|&rank| self.tell(rank, &Message::Ask { id }));
        let mut state = self.wait_until(end, |state| {
            let answered = |rank: &usize| state.closed[*rank] || state.asked[&id].contains_key(rank);
            state.faults != faults || ranks.iter().all(answered)
        });
        // What comes later is for nobody.
        let mut answers = state.asked.remove(&id).unwrap_or_default();
        ranks.iter().map(|rank| answers.remove(rank).unwrap_or(Answer::None)).collect()
    }

    /// Meets all ranks at a reset; `gone` are those that can't come.
    pub fn meet(&self, generation: u16, gone: Vec<usize>, deadline: Duration) -> Result<(), Error> {
        let started = Instant::now();
        let mut state = lock(&self.state);
        state.attempts += 1;
        let attempt = state.attempts;
        drop(state);
        self.tell(0, &Message::Arrived { attempt, generation, gone, deadline });
        let is_over = |state: &State| state.met.as_ref().is_some_and(|met| met.attempt == attempt);
        // Rank 0 decides, and is given a little longer to say so.
        let state =
            self.wait_until(started + deadline + meeting::GRACE, |state| is_over(state) || state.closed[0]);
        match &state.met {
            Some(met) if met.attempt == attempt && met.missing.is_empty() => Ok(()),
            Some(Met { missing, after, .. }) if is_over(&state) => {
                Err(Error::ResetIncomplete { missing: missing.clone(), after: *after })
            }
            _ => Err(Error::ResetIncomplete { missing: vec![0], after: started.elapsed() }),
        }
    }

    /// Brings `mine` to a gather of `ranks`; what each has brought, or else the ranks that have not.
    pub fn gather(
        &self,
        gather: Gather,
        ranks: &[usize],
        mine: &[u8],
        end: Instant,
    ) -> Result<Vec<Vec<u8>>, Absent> {
        for &rank in ranks {
            self.tell(rank, &Message::Bring { gather, bytes: mine.to_vec() });
        }
        let has = |state: &State, rank| state.brought.contains_key(&(gather, rank));
        let mut state = self.wait_until(end, |state| {
            let lost = ranks.iter().any(|&rank| state.closed[rank] && !has(state, rank));
            lost || ranks.iter().all(|&rank| has(state, rank))
        });
        let missing: Vec<usize> = ranks.iter().copied().filter(|&rank| !has(&state, rank)).collect();
        if !missing.is_empty() {
            let lost = missing.iter().copied().find(|&rank| state.closed[rank]);
            return Err(lost.map_or(Absent::Late(missing), Absent::Lost));
        }
        Ok(ranks.iter().filter_map(|&rank| state.brought.remove(&(gather, rank))).collect())
    }

    fn wait_until(&self, end: Instant, done: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        while !done(&state) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.changed.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state
    }

    fn tell_all(&self, message: &Message) {
        (0..self.links.len()).filter(|&rank| rank != self.rank).for_each(|rank| self.tell(rank, message));
    }

    /// Sends to one rank, or to itself. What does not go at once is the thread's.
    fn tell(&self, rank: usize, message: &Message) {
        match &self.links[rank] {
            Some(link) if link.send(message) => {}
            Some(_) => self.wake(),
            None => self.note(rank, message.clone()),
        }
    }

    /// Wakes the thread.
    fn wake(&self) {
        // It fails where the thread is awake already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Takes note of what `rank` says, where somebody here may wait for it.
    fn note(&self, rank: usize, message: Message) {
        let mut state = lock(&self.state);
        match message {
            Message::Answer { id, waits } => {
                let now = Instant::now();
                let since = |micros| now.checked_sub(Duration::from_micros(micros)).unwrap_or(now);
                let read =
                    |waits: Vec<_>| waits.into_iter().map(|(micros, wait)| (since(micros), wait)).collect();
                let answer = waits.map_or(Answer::Later, |waits| Answer::Waits(waits.map(read)));
                if let Some(answers) = state.asked.get_mut(&id) {
                    answers.insert(rank, answer);
                }
            }
            Message::Met { attempt, missing, after } => state.met = Some(Met { attempt, missing, after }),
            Message::Bring { gather, bytes } => {
                state.brought.insert((gather, rank), bytes);
            }
            Message::Arrived { attempt, generation, gone, deadline } => {
                let world = self.links.len();
                state.meeting.arrive(world, rank, meeting::Arrival { attempt, generation, deadline }, gone);
                drop(state);
                if self.hold_meeting().is_some() {
                    // The thread sleeps until then.
                    self.wake();
                }
                return;
            }
            Message::Fault { .. } => state.faults += 1,
            Message::Bye { .. } | Message::Ask { .. } => {}
        }
        drop(state);
        self.changed.notify_all();
    }

    /// At rank 0: ends the meeting if it is time. When it is next to be looked at.
    fn hold_meeting(&self) -> Option<Instant> {
        let mut state = lock(&self.state);
        let closed = state.closed.clone();
        let ended = state.meeting.end(&closed);
        let next = state.meeting.deadline();
        drop(state);
        for (rank, met) in ended {
            self.tell(rank, &met);
        }
        next
    }
}

/// Why a gather failed.
#[derive(Debug, PartialEq, Eq)]
pub enum Absent {
    /// These have not come.
    Late(Vec<usize>),
    /// This one is gone.
    Lost(usize),
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// The mesh of rank 0, with ranks that hear and say nothing.
    fn deaf(ranks: usize) -> (Mesh, Vec<TcpStream>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let link = |_| {
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (near, listener.accept().unwrap().0)
        };
        let (near, far): (Vec<_>, Vec<_>) = (1..ranks).map(link).unzip();
        let links = [None].into_iter().chain(near.into_iter().map(Some)).collect();
        (Mesh::new(0, links).unwrap(), far)
    }

    #[test]
    fn a_question_leaves_the_answers_to_others_alone() {
        let (mesh, _far) = deaf(3);
        let answer = |id| mesh.note(1, Message::Answer { id, waits: Some(Default::default()) });
        let nothing = || Answer::Waits(LaneWaits::default());
        let end = Instant::now() + Duration::from_secs(60);
        let until_asked = |id| {
            while !lock(&mesh.state).asked.contains_key(&id) {
                assert!(Instant::now() < end, "question {id} is not asked");
                thread::yield_now();
            }
        };
        thread::scope(|scope| {
            // Rank 2 keeps the first waiting when all is over for the second.
            let first = scope.spawn(|| mesh.ask(&[1, 2], end));
            until_asked(1);
            let second = scope.spawn(|| mesh.ask(&[1], end));
            until_asked(2);
            answer(1);
            answer(2);
            assert_eq!(second.join().unwrap(), [nothing()]);
            lock(&mesh.state).closed[2] = true;
            mesh.changed.notify_all();
            assert_eq!(first.join().unwrap(), [nothing(), Answer::None]);
        });
        answer(1);
        assert!(lock(&mesh.state).asked.is_empty());
    }
}
