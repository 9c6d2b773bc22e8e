//! The life of a world: signals, the first failure, the end.

use std::fs;
use std::io::{self, PipeWriter};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use super::output::Over;
use super::rank::{Ending, Rank};

/// What ranks get when the launcher does.
const FORWARDED: [i32; 8] = [SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGQUIT, SIGTSTP, SIGCONT];

/// What the launcher waits for.
pub enum Event {
    /// A rank could not be started: the code to exit with.
    NotStarted(u8),
    /// A rank has ended.
    Ended(usize, Ending),
    /// The launcher has got this signal.
    Signal(i32),
}

/// What starts and ends the ranks. All of them have ended when it is dropped.
pub struct Supervisor {
    grace: Duration,
    is_verbose: bool,
    ranks: Vec<Rank>,
    running: usize,
    /// The code of the first failure.
    failure: Option<u8>,
    /// When ranks are killed that have not ended since a failure. None: never, so far.
    end: Option<Instant>,
    sender: Sender<Event>,
    events: Receiver<Event>,
    over: Over,
    /// Dropped before the ranks: their output is waited for until it is over.
    running_mark: Option<PipeWriter>,
}

impl Supervisor {
    /// Signals are caught from now on.
    pub fn new(grace: Duration, is_verbose: bool) -> io::Result<Self> {
        let (sender, events) = channel();
        let (over, running_mark) = Over::new()?;
        let ignored = ignored_signals()?;
        let mut signals =
            Signals::new(FORWARDED.into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0))?;
        let to = sender.clone();
        thread::Builder::new().name("signals".into()).spawn(move || {
            // Nobody listens any more when the world is over.
            signals.forever().map(Event::Signal).try_for_each(|event| to.send(event).map_err(drop))
        })?;
        Ok(Self {
            grace,
            is_verbose,
            ranks: Vec::new(),
            running: 0,
            failure: None,
            end: None,
            sender,
            events,
            over,
            running_mark: Some(running_mark),
        })
    }

    /// What ends when the world does.
    pub fn over(&self) -> &Over {
        &self.over
    }

    /// Takes charge of a rank.
    pub fn add(&mut self, rank: Rank) -> io::Result<()> {
        if self.is_verbose {
            eprintln!("rank {} is process {}", rank.number, rank.pid().as_raw_pid());
        }
        let (number, sender) = (rank.number, self.sender.clone());
        rank.watch(move |ending| drop(sender.send(Event::Ended(number, ending))))?;
        self.running += 1;
        self.ranks.push(rank);
        Ok(())
    }

    /// Waits until all ranks have ended; the code to exit with.
    pub fn run(mut self) -> u8 {
        while self.running > 0 {
            let event = match self.end {
                Some(end) => self.events.recv_timeout(end.saturating_duration_since(Instant::now())),
                None => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match event {
                Ok(event) => self.notice(event),
                Err(RecvTimeoutError::Timeout) => self.kill(),
                Err(RecvTimeoutError::Disconnected) => unreachable!("a sender is held here"),
            }
        }
        self.failure.unwrap_or(0)
    }

    /// Does what an event asks for.
    pub fn notice(&mut self, event: Event) {
        match event {
            Event::NotStarted(code) => self.fail(code),
            Event::Ended(rank, ending) => self.ended(rank, ending),
            Event::Signal(signal) => self.forward(signal),
        }
    }

    fn ended(&mut self, rank: usize, ending: Ending) {
        self.running -= 1;
        let is_first_failure = ending != Ending::Code(0) && self.failure.is_none();
        if is_first_failure {
            crate::complain(format!("rank {rank} {ending}"));
            self.fail(ending.code());
        } else if self.is_verbose {
            eprintln!("rank {rank} {ending}");
        }
    }

    fn fail(&mut self, code: u8) {
        self.failure = Some(code);
        self.end = Instant::now().checked_add(self.grace);
        self.send(Signal::TERM);
        // One that is stopped would not notice.
        self.send(Signal::CONT);
    }

    fn kill(&mut self) {
        self.end = None;
        self.send(Signal::KILL);
    }

    fn forward(&mut self, signal: i32) {
        if let Some(signal) = Signal::from_named_raw(signal) {
            self.send(signal);
        }
        if signal == SIGTSTP {
            // Stops here, until somebody sends SIGCONT.
            let _ = emulate_default_handler(signal);
        }
    }

    fn send(&self, signal: Signal) {
        for rank in &self.ranks {
            rank.signal(signal);
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        // All are killed before the first is waited for.
        self.send(Signal::KILL);
        self.running_mark = None;
    }
}

/// The signals that this process was started to ignore, as `nohup` does: bit n − 1 is signal n. It goes on to.
fn ignored_signals() -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .ok_or_else(|| io::Error::other("/proc/self/status has no SigIgn"))
}
