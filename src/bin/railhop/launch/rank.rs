//! A rank as a process.

// What a process does between fork and exec can only be said unsafely.
#![allow(unsafe_code)]

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};

use railhop::bootstrap::Member;
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, getpid, getppid, kill_process_group, set_parent_process_death_signal,
    waitid,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use signal_hook::low_level::signal_name;

use super::output::{Over, Stream, forward};

/// What ranks run.
pub struct Program<'a> {
    /// Its name and arguments.
    pub words: &'a [OsString],
    /// Whether lines say whose they are.
    pub is_prefixed: bool,
}

/// A program that can't be started.
#[derive(Debug, thiserror::Error)]
#[error("can't start {program:?} as rank {rank}: {error}")]
pub struct NotStarted {
    program: OsString,
    rank: usize,
    error: io::Error,
}

impl NotStarted {
    /// What shells exit with: 127 if there is no such program, else 126.
    pub fn code(&self) -> u8 {
        if self.error.kind() == io::ErrorKind::NotFound { 127 } else { 126 }
    }
}

impl Program<'_> {
    /// Starts `member`, in the network namespace that is given. Called on the main thread: ranks end when the thread
    /// that started them does.
    pub fn start(&self, member: &Member, namespace: Option<File>, over: &Over) -> Result<Rank, NotStarted> {
        let (name, arguments) = self.words.split_first().expect("a program is required");
        let mut command = Command::new(name);
        command.args(arguments).stdin(Stdio::null());
        for variable in Member::variables() {
            command.env_remove(variable);
        }
        command.envs(member.explicit_variables());
        if self.is_prefixed {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        // A group of its own: what a terminal sends reaches it once, by way of the launcher.
        command.process_group(0);
        let launcher = getpid();
        // SAFETY: after fork only this thread is there, and locks and the heap may be as other threads have left them.
        // The closure makes system calls on values that it owns; it takes no lock and allocates nothing.
        unsafe { command.pre_exec(move || prepare(launcher, namespace.as_ref())) };
        match command.spawn() {
            Ok(child) => Ok(Rank::new(member.rank, child, over)),
            Err(error) => Err(NotStarted { program: name.clone(), rank: member.rank, error }),
        }
    }
}

/// Makes a forked process die with the launcher, and moves it into its node's network.
fn prepare(launcher: Pid, namespace: Option<&File>) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid() != Some(launcher) {
        // It has died already, before its death could have been told.
        return Err(Errno::SRCH.into());
    }
    if let Some(namespace) = namespace {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    }
    Ok(())
}

/// A rank that was started. Its process is not reaped before it is dropped, so its number stays its own.
pub struct Rank {
    /// Which one.
    pub number: usize,
    child: Child,
    output: Vec<JoinHandle<()>>,
}

impl Rank {
    fn new(number: usize, mut child: Child, over: &Over) -> Self {
        let out = child.stdout.take().map(|pipe| forward(pipe, Stream::Stdout, number, over));
        let err = child.stderr.take().map(|pipe| forward(pipe, Stream::Stderr, number, over));
        Self { number, child, output: out.into_iter().chain(err).collect() }
    }

    /// The number of its process, and of the process group that it leads.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends a signal to it and to the processes that it has started, as far as they have stayed in its group.
    pub fn signal(&self, signal: Signal) {
        // What it can fail of: all of them have ended.
        let _ = kill_process_group(self.pid(), signal);
    }

    /// Calls `told` when it has ended.
    pub fn watch(&self, told: impl FnOnce(Ending) + Send + 'static) -> io::Result<()> {
        let pid = self.pid();
        let wait = move || {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            let status = retry_on_intr(|| waitid(WaitId::Pid(pid), options))
                .expect("only dropping the rank reaps it")
                .expect("waitid waits");
            told(match (status.exit_status(), status.terminating_signal()) {
                (_, Some(signal)) => Ending::Signal(signal),
                (code, None) => Ending::Code(code.unwrap_or(0)),
            });
        };
        thread::Builder::new().name(format!("wait {}", self.number)).spawn(wait).map(drop)
    }
}

impl Drop for Rank {
    /// Ends it, if it has not ended, and all of its group.
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
        for thread in self.output.drain(..) {
            let _ = thread.join();
        }
    }
}

/// How a rank has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Ending {
    /// The code that a launcher exits with for it, as shells do.
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => code as u8,
            Self::Signal(signal) => 128 + signal as u8,
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Code(code) => write!(f, "ended with exit code {code}"),
            Self::Signal(signal) => match signal_name(signal) {
                Some(name) => write!(f, "was ended by {name}"),
                None => write!(f, "was ended by signal {signal}"),
            },
        }
    }
}
