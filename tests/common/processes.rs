//! Ranks as processes: a test binary runs itself once for each, and hears what they say. Nothing of them is left in the
//! end, or the test fails.

#![allow(dead_code, reason = "every test file takes what it needs")]

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use railhop::bootstrap::{Member, Store, StoreConfig};
use railhop::error::Fault;
use railhop::{Carrier, Config, Network, Topology, Verbs};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

/// The deadline of every wait in these worlds.
pub const DEADLINE: Duration = Duration::from_secs(2);

/// How much later than that the last survivor may know. Over RDMA these tests run in an emulated machine, which takes
/// seconds for what a real one does at once.
pub fn late() -> Duration {
    Duration::from_secs(if is_over_rdma() { 10 } else { 1 })
}

const PART: &str = "RAILHOP_TEST_PART";

/// What carries hop 1, if not TCP: `verbs`, with a device `rxe0`, `rxe1`, … for each node.
const CARRIER: &str = "RAILHOP_TEST_CARRIER";

/// What a rank says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Event {
    /// It is in the world.
    Joined,
    /// It is about to do what it is there for; whether an operation of its own is under way.
    Acts { under_way: bool },
    /// An operation has failed.
    Fault(Fault),
    /// An operation has failed in another way.
    Refused(String),
    /// It could not join, and knew after so long.
    NotJoined { error: String, after: Duration },
    /// So many ranks, itself among them, have come to what the oracle says.
    Worked(usize),
    /// It has ended, in these words of the system; nothing follows.
    Ended(String),
}

/// What a rank has said, and when, in microseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Said {
    pub rank: usize,
    pub at: u64,
    pub event: Event,
}

/// Microseconds of a clock that all processes have.
pub fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("it is later").as_micros() as u64
}

/// In a rank's process: says `event` to the test.
pub fn say(rank: usize, event: Event) {
    let line = serde_json::to_string(&Said { rank, at: now(), event }).expect("it can be written");
    // Also ends the line that the test harness has begun.
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{line}").and_then(|()| out.flush()).expect("the test listens");
}

/// In a rank's process: what the test wants of it.
pub fn part<T: for<'de> Deserialize<'de>>() -> T {
    let text = env::var(PART).expect("started by another test");
    serde_json::from_str(&text).expect("written by another test")
}

/// In a rank's process: the configuration of a world of this shape. Rings are small, so that operations wait for them.
pub fn config(nodes: usize, ranks_per_node: usize) -> Config {
    let topology = Topology::new(nodes, ranks_per_node).unwrap();
    let experts = 2 * topology.world_size();
    let config = Config::builder(topology).experts(experts).max_hidden(512).max_topk(4).channels(2);
    let config = config.worker_budget(2).ring_slots(8).chunk_tokens(2).pool_bytes(64 << 20);
    config.network(network(ranks_per_node)).deadline(DEADLINE).build().unwrap()
}

/// Whether worlds of several nodes are to run over RDMA.
pub fn is_over_rdma() -> bool {
    env::var(CARRIER).is_ok_and(|carrier| carrier == "verbs")
}

fn network(ranks_per_node: usize) -> Network {
    if is_over_rdma() {
        let node = Member::from_environment().map_or(0, |member| member.rank / ranks_per_node);
        let verbs = Verbs { device: Some(format!("rxe{node}")), ..Verbs::default() };
        return Network { carrier: Carrier::Verbs, verbs, ..Network::default() };
    }
    Network { carrier: Carrier::Tcp, ..Network::default() }
}

/// In a rank's process: the store's configuration.
pub fn store_config() -> StoreConfig {
    StoreConfig::of(&Member::from_environment().unwrap(), 42, DEADLINE).unwrap()
}

/// In a rank's process: the world's ranks by the store.
pub fn store() -> Store {
    // Processes start when the machine has time for them.
    Store::connect(&StoreConfig { deadline: 10 * DEADLINE, ..store_config() }).unwrap()
}

/// In a rank's process: sends itself a signal.
pub fn raise(signal: Signal) {
    kill_process(rustix::process::getpid(), signal).expect("a process may signal itself");
    // It may take another thread's attention first.
    thread::sleep(Duration::from_millis(100));
}

/// How ranks are started.
pub struct Start<'a, T> {
    pub world_size: usize,
    /// What they are to do.
    pub part: &'a T,
    /// Where rank 0 serves, if not on this machine's loopback.
    pub host: Ipv4Addr,
    /// By rank: the network namespace it is in, if it has one.
    pub namespace: &'a dyn Fn(usize) -> Option<String>,
}

/// A world of processes. It ends with the test.
pub struct Processes {
    ranks: Vec<Child>,
    said: Receiver<Said>,
    owned: Owned,
    port: u16,
    host: Ipv4Addr,
}

impl Processes {
    /// Starts the test `a_rank_of_its_own` of this binary once for each rank.
    pub fn start<T: Serialize>(start: &Start<T>) -> Self {
        let (sender, said) = channel();
        let port = quiet_port();
        let spawn = |rank| {
            let mut child = command(start, rank, port).stdout(Stdio::piped()).spawn().unwrap();
            let (out, sender) = (child.stdout.take().expect("piped"), sender.clone());
            thread::spawn(move || listen(rank, out, &sender));
            child
        };
        let ranks = (0..start.world_size).map(spawn).collect();
        Self { ranks, said, owned: Owned::default(), port, host: start.host }
    }

    /// On this machine's loopback.
    pub fn here<T: Serialize>(world_size: usize, part: &T) -> Self {
        Self::start(&Start { world_size, part, host: Ipv4Addr::LOCALHOST, namespace: &|_| None })
    }

    /// What is said next.
    pub fn hear(&mut self, end: Instant) -> Said {
        let left = end.saturating_duration_since(Instant::now());
        let mut said = match self.said.recv_timeout(left) {
            Ok(said) => said,
            Err(RecvTimeoutError::Timeout) => panic!("the ranks hang"),
            Err(RecvTimeoutError::Disconnected) => panic!("no rank is left"),
        };
        match &mut said.event {
            Event::Ended(how) => *how = self.ranks[said.rank].wait().unwrap().to_string(),
            _ => self.owned.add(&self.ranks),
        }
        said
    }

    /// Sends a signal to a rank, which has not been waited for.
    pub fn signal(&self, rank: usize, signal: Signal) {
        kill_process(Pid::from_child(&self.ranks[rank]), signal).expect("it is still there");
    }

    /// Notes what the processes have, so that [`Processes::leftovers`] finds it.
    pub fn look(&mut self) {
        self.owned.add(&self.ranks);
    }

    /// What is left of the processes, all of which have ended.
    pub fn leftovers(&mut self) -> Vec<String> {
        let running = |child: &mut Child| !child.try_wait().is_ok_and(|status| status.is_some());
        let mut left: Vec<String> = self
            .ranks
            .iter_mut()
            .filter_map(|child| running(child).then(|| format!("process {}", child.id())))
            .collect();
        left.extend(self.owned.left());
        if TcpListener::bind((self.host, self.port)).is_err() {
            left.push(format!("port {}", self.port));
        }
        left
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.ranks {
            // Fails where it has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn command<T: Serialize>(start: &Start<T>, rank: usize, port: u16) -> Command {
    let test = env::current_exe().unwrap();
    let mut command = match (start.namespace)(rank) {
        None => Command::new(test),
        Some(namespace) => {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &namespace]).arg(test);
            command
        }
    };
    let part = serde_json::to_string(start.part).expect("it can be written");
    let (size, store) = (start.world_size.to_string(), format!("{}:{port}", start.host));
    command.args(["--exact", "a_rank_of_its_own", "--ignored", "--nocapture"]).env_clear();
    let kept = ["PATH", CARRIER].into_iter().filter_map(|name| Some((name, env::var_os(name)?)));
    command.envs(kept);
    command.env("RAILHOP_RANK", rank.to_string()).env("RAILHOP_LOCAL_RANK", rank.to_string());
    command.env("RAILHOP_WORLD_SIZE", &size).env("RAILHOP_LOCAL_SIZE", &size);
    command.env("RAILHOP_STORE", &store).env("RAILHOP_JOB_ID", store).env(PART, part);
    command
}

/// Passes on what a rank says until it ends.
fn listen(rank: usize, out: ChildStdout, to: &Sender<Said>) {
    for line in BufReader::new(out).lines().map_while(Result::ok) {
        if let Ok(said) = serde_json::from_str(&line)
            && to.send(said).is_err()
        {
            return;
        }
    }
    // How it has ended is for those who wait for the process.
    let _ = to.send(Said { rank, at: now(), event: Event::Ended(String::new()) });
}

/// The words in which the system says that a process has ended well, and that it was killed.
pub fn well() -> String {
    std::process::ExitStatus::from_raw(0).to_string()
}

pub fn killed() -> String {
    std::process::ExitStatus::from_raw(Signal::KILL.as_raw()).to_string()
}

/// A port that nobody has and that the system does not give to outgoing connections: it is to be free again at the end.
pub fn quiet_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = (std::process::id() % 90) as u16 * 100;
    loop {
        let port = 10_000 + (start + NEXT.fetch_add(1, Ordering::Relaxed)) % 9_000;
        if TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
            return port;
        }
    }
}

/// What processes have had that could outlive them.
#[derive(Default)]
struct Owned {
    /// Inodes of shared memory.
    memory: BTreeSet<String>,
    /// Inodes of sockets.
    sockets: BTreeSet<String>,
}

impl Owned {
    fn add(&mut self, processes: &[Child]) {
        for child in processes {
            let at = format!("/proc/{}", child.id());
            self.memory.extend(memory_of(&at));
            let links = fs::read_dir(format!("{at}/fd")).into_iter().flatten().flatten();
            let links = links.filter_map(|link| fs::read_link(link.path()).ok());
            let sockets = links
                .filter_map(|to| to.to_str()?.strip_prefix("socket:[")?.strip_suffix(']').map(String::from));
            self.sockets.extend(sockets);
        }
    }

    fn left(&self) -> Vec<String> {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let mapped = processes.flat_map(|process| {
            let at = process.path().display().to_string();
            memory_of(&at).into_iter().map(move |inode| (inode, at.clone()))
        });
        let mapped = mapped.filter(|(inode, _)| self.memory.contains(inode));
        let mut left: Vec<_> = mapped.map(|(_, at)| format!("shared memory in {at}")).collect();
        for (table, column) in [("tcp", 9), ("tcp6", 9), ("unix", 6)] {
            let text = fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
            let has = |line: &&str| {
                line.split_whitespace().nth(column).is_some_and(|inode| self.sockets.contains(inode))
            };
            left.extend(text.lines().filter(has).map(|line| format!("{table} socket {line}")));
        }
        let named = fs::read_dir("/dev/shm").into_iter().flatten().flatten().map(|file| file.file_name());
        left.extend(
            named.filter_map(|name| Some(name.to_str().filter(|name| name.contains("railhop"))?.into())),
        );
        left
    }
}

/// Inodes of railhop's shared memory that the process at this place in /proc maps.
fn memory_of(process: &str) -> Vec<String> {
    let maps = fs::read_to_string(format!("{process}/maps")).unwrap_or_default();
    let ours = maps.lines().filter(|line| line.contains("/memfd:railhop"));
    ours.filter_map(|line| line.split_whitespace().nth(4).map(String::from)).collect()
}
