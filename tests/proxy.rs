//! The proxy against the kernels' end of the queue, played by threads that tear and delay as a device may.

#![allow(unsafe_code)]

#[path = "common/queue.rs"]
mod queue;
#[path = "common/stream.rs"]
mod stream;
#[cfg(target_os = "linux")]
#[path = "common/tcp.rs"]
mod tcp;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use queue::{LIMIT, Rank, wait_until};
use railhop::fabric::proxy::{Patience, ProxyError, ProxyThread};
use railhop::fabric::rail::{Completion, LocalRail, NullRail, Rail, RailError};
#[cfg(target_os = "linux")]
use railhop::fabric::rail::{TcpPeer, TcpRail};
use railhop::fabric::sim::Rng;
use railhop::wire::command::{Command, opcode};
use railhop::wire::device::QUEUE_CAPACITY;
use railhop::wire::posting::Posting;
use railhop::wire::region::{LANES, Lane};
use railhop::wire::word::{Index, Word};
use railhop::{Config, Topology};
use stream::{FIRST, SLOTS, Stream};

fn config(nodes: usize, ranks_per_node: usize, first_index: u64) -> Config {
    let topology = Topology::new(nodes, ranks_per_node).unwrap();
    let builder = Config::builder(topology).experts(nodes).max_hidden(64).channels(3).ring_slots(SLOTS);
    builder.pool_bytes(0).first_index(first_index).build().unwrap()
}

fn world(nodes: usize) -> &'static Rank {
    Rank::leaked(&config(nodes, 1, 0), 0)
}

/// Sends rail records: no two of them are ever merged.
fn record(node: usize, index: u64) -> Command {
    let (opcode, lane, index) = (opcode::RAIL, Lane::Dispatch, Index::new(index));
    Command { opcode, lane, node, channel: 0, count: 0, pitch: 0, index }
}

fn chunk(node: usize, channel: usize, count: usize, tail: u64) -> Command {
    Command { opcode: opcode::CHUNK, channel, count, pitch: 64, ..record(node, tail) }
}

fn credit(node: usize, channel: usize, head: u64) -> Command {
    Command { opcode: opcode::CREDIT, channel, ..record(node, head) }
}

/// Keeps what is posted; completes nothing.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<Posting>>>);

impl Recorder {
    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn take(&self) -> Vec<Posting> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Rail for Recorder {
    fn post(&mut self, postings: &[Posting]) -> Result<usize, RailError> {
        self.0.lock().unwrap().extend(postings);
        Ok(postings.len())
    }

    fn poll(&mut self, _: &mut Vec<Completion>) -> Result<(), RailError> {
        Ok(())
    }

    fn is_idle(&self) -> bool {
        true
    }
}

fn indices(postings: &[Posting]) -> Vec<(usize, u64)> {
    postings.iter().map(|p| (p.peer, p.value.index_in(1).unwrap().get())).collect()
}

fn spawn<R: Rail + 'static>(rank: &'static Rank, rail: R) -> ProxyThread {
    ProxyThread::spawn(rank.proxy(rail), Patience::default(), None).unwrap()
}

/// A delay as between the stores of a device: mostly none.
fn dawdle(rng: &mut Rng) {
    match rng.below(64) {
        0 => thread::sleep(Duration::from_micros(rng.below(50))),
        1..8 => thread::yield_now(),
        _ => {}
    }
}

// ---- the queue

#[test]
fn commands_come_in_order_over_many_laps_however_their_halves_land() {
    const COMMANDS: u64 = 20 * QUEUE_CAPACITY as u64 + 77;
    let (rank, recorder) = (world(3), Recorder::default());
    let proxy = spawn(rank, recorder.clone());
    let producer = thread::spawn(move || {
        let mut rng = Rng::new(1);
        for i in 0..COMMANDS {
            let order = if rng.below(2) == 0 { [0, 1] } else { [1, 0] };
            rank.push_torn(&record(1 + i as usize % 2, i), order, || dawdle(&mut rng));
        }
    });
    producer.join().unwrap();
    wait_until("the last command", || rank.taken() == COMMANDS);
    proxy.stop().unwrap();
    assert!(indices(&recorder.take()).into_iter().eq((0..COMMANDS).map(|i| (1 + i as usize % 2, i))));
}

#[test]
fn producers_keep_their_own_order_in_a_crowd() {
    const EACH: u64 = 5000;
    let (rank, recorder) = (world(2), Recorder::default());
    let proxy = spawn(rank, recorder.clone());
    let producer = |number: u64| {
        thread::spawn(move || {
            let mut rng = Rng::new(number);
            for i in 0..EACH {
                let order = if rng.below(2) == 0 { [0, 1] } else { [1, 0] };
                rank.push_torn(&record(1, number << 40 | i), order, || dawdle(&mut rng));
            }
        })
    };
    let producers: Vec<_> = (0..3).map(producer).collect();
    producers.into_iter().for_each(|producer| producer.join().unwrap());
    wait_until("all commands", || recorder.len() == 3 * EACH as usize);
    proxy.stop().unwrap();
    let seen = indices(&recorder.take());
    for number in 0..3 {
        let own = seen.iter().filter(|(_, index)| index >> 40 == number).map(|(_, index)| index & 0xffff);
        assert!(own.eq(0..EACH));
    }
}

#[test]
fn half_a_command_is_none() {
    let (rank, recorder) = (world(2), Recorder::default());
    let mut proxy = rank.proxy(recorder.clone());
    for (i, order) in [[0, 1], [1, 0]].into_iter().enumerate() {
        rank.push_torn(&record(1, i as u64), order, || assert!(!proxy.step().unwrap().moved()));
        assert_eq!(proxy.step().unwrap().commands, 1);
    }
    // What the last lap left behind is not believed in this one.
    for i in 2..QUEUE_CAPACITY as u64 {
        rank.push(&record(1, i));
    }
    while proxy.step().unwrap().moved() {}
    rank.push_torn(&record(1, 9), [1, 0], || assert!(!proxy.step().unwrap().moved()));
    assert_eq!((proxy.step().unwrap().commands, rank.taken()), (1, QUEUE_CAPACITY as u64 + 1));
    assert_eq!(recorder.take().len(), QUEUE_CAPACITY + 1);
}

#[test]
fn a_full_queue_makes_kernels_wait_and_loses_nothing() {
    const MORE: usize = 100;
    let (rank, recorder) = (world(2), Recorder::default());
    let mut proxy = rank.proxy(recorder.clone());
    let pushed = Arc::new(AtomicUsize::new(0));
    let producer = thread::spawn({
        let pushed = pushed.clone();
        move || {
            for i in 0..QUEUE_CAPACITY + MORE {
                rank.push(&record(1, i as u64));
                pushed.fetch_add(1, Ordering::Release);
            }
        }
    });
    wait_until("a full queue", || pushed.load(Ordering::Acquire) == QUEUE_CAPACITY);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(pushed.load(Ordering::Acquire), QUEUE_CAPACITY, "there is no room until the proxy says so");
    wait_until("all commands", || {
        proxy.step().unwrap();
        recorder.len() == QUEUE_CAPACITY + MORE
    });
    producer.join().unwrap();
    assert!(
        indices(&recorder.take()).into_iter().map(|(_, index)| index).eq(0..(QUEUE_CAPACITY + MORE) as u64)
    );
}

#[test]
fn a_proxy_goes_on_where_the_last_one_stopped() {
    let (rank, recorder) = (world(2), Recorder::default());
    for i in 0..5 {
        let mut proxy = rank.proxy(recorder.clone());
        rank.push(&record(1, i));
        assert_eq!(proxy.step().unwrap().commands, 1);
    }
    assert_eq!(indices(&recorder.take()), (0..5).map(|i| (1, i)).collect::<Vec<_>>());
}

// ---- what commands come to

#[test]
fn completions_are_written_where_kernels_look_once_the_source_is_read() {
    let rank = world(2);
    let mut proxy = rank.proxy(NullRail::new(64, 1 << 20, 3));
    let lane = rank.mailbox_map.lanes[0];
    let words = [lane.chunks + 8 * (2 * 2 + 1), lane.rails + 8, lane.sent_verdicts + 8];
    let read = || words.map(|word| rank.mailbox.word(word).load(Ordering::Acquire));
    rank.push(&chunk(1, 2, 3, 3));
    rank.push(&record(1, 4));
    rank.push(&Command { opcode: opcode::VERDICT, ..record(1, 5) });
    rank.push(&credit(1, 2, 6));
    for _ in 0..2 {
        assert_eq!(proxy.step().unwrap().completions, 0);
    }
    assert_eq!((read(), rank.taken(), proxy.is_idle()), ([0; 3], 4, false));
    assert_eq!(proxy.step().unwrap().completions, 3, "credit has none");
    assert_eq!((read(), proxy.is_idle()), ([3, 4, 5].map(|index| Word::new(1, Index::new(index)).0), true));
}

#[test]
fn chunks_that_lie_behind_each_other_are_one_put_with_the_last_tail() {
    let (rank, recorder) = (world(3), Recorder::default());
    let mut proxy = rank.proxy(recorder.clone());
    let pushed = [
        chunk(1, 0, 2, 2),
        chunk(1, 0, 3, 5),
        chunk(1, 0, 3, 8), // up to the ring's end
        chunk(1, 0, 2, 10),
        chunk(1, 1, 2, 2), // another channel
        chunk(2, 1, 2, 2), // another peer
        chunk(2, 1, 2, 4),
        credit(1, 0, 1),
        credit(1, 0, 4),
        credit(2, 0, 1),
        chunk(2, 1, 1, 5), // not adjacent to the one it lies behind
    ];
    pushed.iter().for_each(|command| rank.push(command));
    let drained = proxy.step().unwrap();
    assert_eq!((drained.commands, drained.postings), (pushed.len(), 7));
    let postings = recorder.take();
    let sizes: Vec<_> = postings.iter().map(|p| p.bytes / 64).collect();
    assert_eq!(sizes, [8, 2, 2, 4, 0, 0, 1]);
    assert_eq!(indices(&postings), [(1, 8), (1, 10), (1, 2), (2, 4), (1, 4), (2, 1), (2, 5)]);
}

#[test]
fn large_chunks_are_not_merged() {
    let (rank, recorder) = (world(2), Recorder::default());
    let mut proxy = rank.proxy(recorder.clone()).merge_up_to(4 * 64);
    (1..=3).for_each(|i| rank.push(&chunk(1, 0, 2, 2 * i)));
    proxy.step().unwrap();
    assert_eq!(recorder.take().iter().map(|p| p.bytes / 64).collect::<Vec<_>>(), [4, 2]);
}

#[test]
fn a_rail_without_room_gets_the_rest_later_and_in_order() {
    let rank = world(3);
    // Room for one chunk and its signal.
    let mut proxy = rank.proxy(NullRail::new(2, 1 << 20, 5));
    for i in 1..=20 {
        rank.push(&chunk(1, 0, 1, i));
        rank.push(&chunk(2, 0, 1, i));
    }
    let (start, word) = (Instant::now(), |node: usize| rank.mailbox_map.lanes[0].chunks + 8 * node);
    let mut seen = [0; 2];
    while seen != [20; 2] {
        assert!(start.elapsed() < LIMIT);
        assert!(proxy.step().unwrap().postings <= 1);
        let now = [1, 2].map(|node| Word(rank.mailbox.word(word(node)).load(Ordering::Acquire)));
        let now = now.map(|word| word.index_in(1).map_or(0, Index::get));
        assert!(now.iter().zip(seen).all(|(&now, seen)| now == seen || now == seen + 1));
        seen = now;
    }
    assert_eq!(proxy.rail().built(), 80);
}

// ---- what makes no sense

#[test]
fn garbage_is_refused_by_the_name_of_its_field() {
    let good = chunk(1, 0, 1, 1);
    let cases = [
        ("node", Command { node: 0, ..good }),
        ("node", Command { node: 3, ..good }),
        ("node", Command { node: 4095, ..record(1, 0) }),
        ("channel", Command { channel: 3, ..good }),
        ("channel", Command { channel: 4095, ..credit(1, 0, 0) }),
        ("channel", Command { channel: 1, ..record(1, 0) }),
        ("count", Command { count: 0, ..good }),
        ("count", Command { count: 2, ..good }),
        ("count", Command { count: SLOTS + 1, index: Index::new(0), ..good }),
        ("count", Command { count: 65535, ..good }),
        ("count", Command { count: 1, ..credit(1, 0, 0) }),
        ("count", Command { count: 2, ..record(1, 0) }),
        ("count", Command { opcode: opcode::VERDICT, count: 1, ..record(1, 0) }),
        ("pitch", Command { pitch: 0, ..good }),
        ("pitch", Command { pitch: 1 << 20, ..good }),
    ];
    for (field, command) in cases {
        refused(field, command.halves(true), good);
    }
    let [first, second] = good.halves(true);
    refused("index", [first, second | 1 << 50], good);
}

/// `garbage` is refused again and again, and what came before it is posted.
fn refused(field: &str, garbage: [u64; 2], good: Command) {
    let (rank, recorder) = (world(3), Recorder::default());
    let mut proxy = rank.proxy(recorder.clone());
    rank.push(&good);
    rank.push_raw(garbage);
    rank.push(&good);
    assert_eq!(proxy.step().unwrap().commands, 1);
    for _ in 0..2 {
        let Err(ProxyError::Command(error)) = proxy.step() else { panic!("{field} was believed") };
        assert_eq!((error.field, error.place, error.rank), (field, 1, 0), "{error}");
    }
    assert_eq!((recorder.len(), rank.taken()), (1, 1));
}

proptest! {
    // The failing command is printed whole.
    #![proptest_config(ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn whatever_is_posted_lies_in_memory(first: u64, second: u64, likely in 0u64..16, nodes in 1usize..4) {
        static WORLDS: LazyLock<[&Rank; 3]> = LazyLock::new(|| [1, 2, 3].map(world));
        let (rank, recorder) = (WORLDS[nodes - 1], Recorder::default());
        // Often with fields that make sense, or almost all would be refused by their node.
        let mask = match likely { 0 => u64::MAX, n => 3 << 61 | 3 << 48 | 3 << 36 | n << 20 | 1 << 60 | 0xf };
        rank.push_raw([first & mask, second & 0xffff_ffff_ffff]);
        let drained = rank.proxy(recorder.clone()).step();
        rank.skip();
        if drained.is_ok() {
            let posting = recorder.take()[0];
            prop_assert!(posting.peer < nodes && posting.peer != 0);
            prop_assert!(posting.source + posting.bytes <= rank.private_map.bytes);
            prop_assert!(posting.target + posting.bytes <= rank.map.memory.region);
            prop_assert!(posting.word + 8 <= rank.map.memory.region && posting.word % 8 == 0);
            prop_assert!(posting.completion.is_none_or(|at| at + 8 <= rank.mailbox_map.bytes && at % 8 == 0));
        }
    }
}

#[test]
fn a_mailbox_that_is_too_small_is_refused() {
    let (rank, other) = (world(2), world(300));
    let (config, map) = (other.config.clone(), other.map.clone());
    let small =
        railhop::fabric::proxy::Proxy::new(config, map, 0, 1, rank.mapped_private(), Recorder::default());
    assert_eq!(small.map(|_| ()).unwrap_err().field, "mailbox bytes");
}

// ---- the thread

/// A rail that ends badly.
enum Bad {
    Fails,
    Panics,
}

impl Rail for Bad {
    fn post(&mut self, postings: &[Posting]) -> Result<usize, RailError> {
        match self {
            Self::Fails => {
                Err(RailError::Broken { peer: postings[0].peer, reason: "retries exceeded".into() })
            }
            Self::Panics => panic!("no such queue pair"),
        }
    }

    fn poll(&mut self, _: &mut Vec<Completion>) -> Result<(), RailError> {
        Ok(())
    }

    fn is_idle(&self) -> bool {
        true
    }
}

fn failure(rail: Bad, command: Command) -> ProxyError {
    let rank = world(2);
    let proxy = spawn(rank, rail);
    rank.push(&command);
    wait_until("the failure", || proxy.failure().is_some());
    wait_until("the kernels' end", || rank.is_aborted());
    proxy.stop().unwrap_err()
}

#[test]
fn failures_come_out_and_end_the_kernels() {
    let broken = RailError::Broken { peer: 1, reason: "retries exceeded".into() };
    assert_eq!(failure(Bad::Fails, record(1, 0)), ProxyError::Rail(broken));
    assert_eq!(failure(Bad::Panics, record(1, 0)), ProxyError::Panicked("no such queue pair".into()));
    let ProxyError::Command(error) = failure(Bad::Fails, record(0, 0)) else {
        panic!("the own node was believed")
    };
    assert_eq!(error.field, "node");
}

#[test]
fn a_rail_that_goes_out_of_range_is_told_so() {
    let (rank, other) = (world(2), world(2));
    // SAFETY: nothing is carried: there is no such region.
    let rail = unsafe { LocalRail::new(rank.mapped_private(), vec![other.mapped_region()]) };
    rank.push(&chunk(1, 0, 1, 1));
    let error = rank.proxy(rail).step().unwrap_err();
    assert!(
        matches!(error, ProxyError::Rail(RailError::OutOfRange { what: "the region", peer: 1, .. })),
        "{error}"
    );
}

#[test]
fn it_stops_at_once_idle_or_busy() {
    let patience = Patience { longest_sleep: Duration::from_secs(3600), ..Patience::default() };
    let rank = world(2);
    let idle = ProxyThread::spawn(rank.proxy(Recorder::default()), patience, None).unwrap();
    thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    drop(idle);
    assert!(start.elapsed() < LIMIT, "it is woken to stop");

    let (rank, over) = (world(2), Arc::new(AtomicBool::new(false)));
    let busy = spawn(rank, NullRail::new(1024, 4096, 1));
    let producer = thread::spawn({
        let over = over.clone();
        move || {
            for i in 0.. {
                // Never more than fits, or it would wait for a proxy that is gone.
                while i - rank.taken() >= QUEUE_CAPACITY as u64 / 2 {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    thread::yield_now();
                }
                rank.push(&chunk(1, 0, 1, i + 1));
            }
        }
    });
    wait_until("some laps", || rank.taken() > 3 * QUEUE_CAPACITY as u64);
    let start = Instant::now();
    busy.stop().unwrap();
    assert!(start.elapsed() < LIMIT);
    let taken = rank.taken();
    thread::sleep(Duration::from_millis(5));
    assert_eq!(rank.taken(), taken, "nothing is taken after it has stopped");
    over.store(true, Ordering::Relaxed);
    producer.join().unwrap();
}

#[test]
fn a_core_is_kept_or_refused() {
    let spawn = |core| ProxyThread::spawn(world(2).proxy(Recorder::default()), Patience::default(), core);
    for core in [1023, usize::MAX] {
        let error = spawn(Some(core)).map(|_| ()).unwrap_err();
        assert_eq!((error.field, error.value), ("core", core as u64));
    }
    #[cfg(target_os = "linux")]
    {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
        let first = allowed.split(['-', ',']).next().unwrap().parse().unwrap();
        spawn(Some(first)).unwrap().stop().unwrap();
    }
}

#[test]
fn a_sleeping_proxy_is_woken() {
    let patience = Patience { longest_sleep: Duration::from_secs(3600), ..Patience::default() };
    let (rank, recorder) = (world(2), Recorder::default());
    let proxy = ProxyThread::spawn(rank.proxy(recorder.clone()), patience, None).unwrap();
    // Its sleep is now of hundreds of milliseconds.
    thread::sleep(Duration::from_millis(2000));
    rank.push(&record(1, 0));
    let start = Instant::now();
    proxy.wake();
    wait_until("the command", || recorder.len() == 1);
    assert!(start.elapsed() < Duration::from_millis(200), "{:?}", start.elapsed());
}

/// Nanoseconds that the thread called `name` has run.
#[cfg(target_os = "linux")]
fn cpu_time(name: &str) -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let named = |task: &std::path::PathBuf| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name)
    };
    let task = tasks.into_iter().find(named).expect("the thread runs");
    let stat = std::fs::read_to_string(task.join("schedstat")).unwrap();
    Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
}

#[test]
#[cfg(target_os = "linux")]
fn a_silent_proxy_leaves_the_cores_to_others_yet_answers_in_time() {
    // A rank that no other test has, so that its thread is found by name.
    let rank = Rank::leaked(&config(2, 32, 0), 41);
    let recorder = Recorder::default();
    let proxy = spawn(rank, recorder.clone());
    thread::sleep(Duration::from_millis(100));
    let (start, before) = (Instant::now(), cpu_time("proxy-41"));
    thread::sleep(Duration::from_millis(1000));
    let share = (cpu_time("proxy-41") - before).as_secs_f64() / start.elapsed().as_secs_f64();
    assert!(share < 0.05, "a silent proxy took {share:.3} of a core");
    let mut latest = Duration::ZERO;
    for i in 0..5 {
        thread::sleep(Duration::from_millis(50));
        let start = Instant::now();
        rank.push(&record(0, i));
        wait_until("the command", || recorder.len() == i as usize + 1);
        latest = latest.max(start.elapsed());
    }
    println!("a silent proxy takes {:.2} % of a core and answers within {latest:?}", 100.0 * share);
    // Two thousandths of a second by itself; the rest is for a machine that is busy otherwise.
    assert!(latest < Duration::from_millis(500), "{latest:?}");
    proxy.stop().unwrap();
}

// ---- two ranks

const TOKENS: u64 = 3000;

/// All streams of two ranks, whose proxies post to what `rails` makes.
fn exchange<R: Rail + 'static>(rails: impl FnOnce([&'static Rank; 2]) -> [R; 2]) {
    let config = config(2, 1, FIRST);
    let ranks = [0, 1].map(|rank| Rank::leaked(&config, rank));
    let proxies: Vec<_> = ranks.into_iter().zip(rails(ranks)).map(|(rank, rail)| spawn(rank, rail)).collect();
    let warp = |rank: &'static Rank, channel: usize| {
        thread::spawn(move || {
            let mut streams = LANES.map(|lane| Stream::new(rank, lane, channel, TOKENS));
            wait_until("all tokens", || {
                streams.iter_mut().for_each(|stream| {
                    stream.send();
                    stream.receive();
                });
                streams.iter().all(Stream::is_over)
            });
        })
    };
    let warps: Vec<_> = ranks.iter().flat_map(|&rank| (0..3).map(move |channel| (rank, channel))).collect();
    let warps: Vec<_> = warps.into_iter().map(|(rank, channel)| warp(rank, channel)).collect();
    warps.into_iter().for_each(|warp| warp.join().unwrap());
    proxies.into_iter().for_each(|proxy| proxy.stop().unwrap());
}

// SAFETY, of both rails: `Stream` writes slots with credit and completion, and reads them below an acquired tail.

#[test]
fn two_ranks_exchange_rings_of_chunks() {
    exchange(|ranks| {
        let regions = || ranks.iter().map(|rank| rank.mapped_region()).collect();
        // SAFETY: as above.
        ranks.map(|rank| unsafe { LocalRail::new(rank.mapped_private(), regions()) })
    });
}

#[test]
#[cfg(target_os = "linux")]
fn two_ranks_exchange_rings_of_chunks_over_tcp() {
    exchange(|ranks| {
        let mut ends = tcp::connections(2, None).into_iter();
        ranks.map(|Rank { rank, .. }| {
            let peer = TcpPeer { rank: 1 - rank, connections: ends.next().expect("two ends") };
            let (source, region) = (ranks[*rank].mapped_private(), ranks[*rank].mapped_region());
            // SAFETY: as above.
            unsafe {
                TcpRail::new(*rank, source, Arc::new(region), vec![peer], Arc::new(tcp::Heard::default()))
            }
            .unwrap()
        })
    });
}
