//! The rail over RDMA verbs. Most of it needs devices `rxe0` to `rxe2`: `ci/verbs` runs it where they are.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

#[path = "common/queue.rs"]
mod queue;
#[path = "common/rdma.rs"]
mod rdma;
#[path = "common/stream.rs"]
mod stream;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use railhop::fabric::proxy::{Patience, ProxyThread};
use railhop::fabric::rail::{Completion, NetworkRail, Rail as _, RailError, RdmaSysfs, VerbsError};
use railhop::wire::posting::Posting;
use railhop::wire::region::LANES;
use railhop::wire::word::Word;
use railhop::{Config, Topology, Verbs};
use rdma::{Ear, Memory, Rank, Setup, World, connect, head, signal, tail, wait_until};

// ---- without a device

#[test]
fn a_device_that_is_not_there_is_named_or_the_library_is() {
    let config = Verbs { device: Some("no-such-device".into()), ..Verbs::default() };
    let memory = Memory::new(4096);
    match World::default().setup_on(&config, 0, memory, memory).map(|_| ()).unwrap_err() {
        VerbsError::NoDevice { wanted, found } => {
            assert_eq!(wanted.as_deref(), Some("no-such-device"));
            assert!(!found.contains(&"no-such-device".to_string()));
        }
        VerbsError::NoLibrary(reason) => assert!(reason.contains("libibverbs.so.1"), "{reason}"),
        other => panic!("{other}"),
    }
}

// ---- what a configuration comes to

#[test]
#[ignore = "needs an RDMA device"]
fn what_is_not_there_is_refused_by_name() {
    let memory = Memory::new(4096);
    let refused = |config: Verbs| {
        World::default().setup_on(&config, 0, memory, memory).map(|_| ()).unwrap_err().to_string()
    };
    let config = World::default().config(0);
    let missing = refused(Verbs { device: Some("rxe9".into()), ..config.clone() });
    assert!(missing.contains("no RDMA device rxe9: found [\"rxe0\", \"rxe1\""), "{missing}");
    let port = refused(Verbs { port: Some(7), ..config.clone() });
    assert!(port.contains("device rxe0, port 7 is absent"), "{port}");
    let gid = refused(Verbs { gid: Some(200), ..config.clone() });
    assert!(gid.contains("device rxe0, port 1 has no GID at index 200"), "{gid}");
}

#[test]
#[ignore = "needs an RDMA device"]
fn ranks_of_a_node_take_devices_in_turn() {
    let memory = Memory::new(4096);
    let device = |rank| {
        let world = World { ranks: 8, ..World::default() };
        world.setup_on(&Verbs::default(), rank, memory, memory).unwrap().setup.device().to_string()
    };
    assert_eq!([0, 1, 2, 3, 4].map(device), ["rxe0", "rxe1", "rxe2", "rxe3", "rxe0"]);
}

#[test]
#[ignore = "needs an RDMA device"]
fn cards_that_cant_be_are_refused() {
    let world = World::default();
    let card = world.setup(1).unwrap().setup.card();
    let refused = |cards: &[(usize, Vec<u8>)]| {
        world.setup(0).unwrap().connect(cards).map(|_| ()).unwrap_err().to_string()
    };
    assert!(refused(&[]).contains("the card of rank 1 can't be used: it has not come"));
    assert!(refused(&[(1, card[..40].to_vec())]).contains("too few"));
    assert!(refused(&[(1, world.setup(0).unwrap().setup.card())]).contains("it is that of rank 0"));
}

// ---- carrying

const SLOTS: u64 = 8;
const SLOT: usize = 512;
const QUEUES: usize = 6;

fn slot(queue: usize, message: u64) -> usize {
    4096 + (queue * SLOTS as usize + (message % SLOTS) as usize) * SLOT
}

/// What word `i` of a message holds.
fn content(rank: usize, queue: usize, message: u64, i: usize) -> u64 {
    (message << 24 | (rank << 16 | queue << 8 | i) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// One end of rings in both directions between a rank and one peer.
struct Rings {
    rank: Rank,
    peer: usize,
    messages: u64,
    sent: [u64; QUEUES],
    completed: [u64; QUEUES],
    received: [u64; QUEUES],
}

impl Rings {
    fn new(rank: Rank, messages: u64) -> Self {
        let (peer, none) = (1 - rank.rank, [0; QUEUES]);
        Self { rank, peer, messages, sent: none, completed: none, received: none }
    }

    /// Sends what credit and completions allow, in one batch.
    fn send(&mut self) -> bool {
        let mut postings = Vec::new();
        for queue in 0..QUEUES {
            let credit = self.rank.region.load(head(queue)).min(self.completed[queue]) + SLOTS;
            for message in self.sent[queue]..credit.min(self.messages) {
                let at = slot(queue, message);
                for i in 0..SLOT / 8 {
                    let word = content(self.rank.rank, queue, message, i);
                    self.rank.source.word(at + 8 * i).store(word, Ordering::Relaxed);
                }
                postings.push(Posting {
                    peer: self.peer,
                    queue,
                    source: at,
                    target: at,
                    bytes: SLOT,
                    word: tail(queue),
                    completion: Some(queue),
                    value: Word(message + 1),
                });
                self.sent[queue] = message + 1;
            }
        }
        assert_eq!(self.rank.rail.post(&postings), Ok(postings.len()));
        !postings.is_empty()
    }

    /// Checks what has come, and gives credit for it.
    fn receive(&mut self) -> bool {
        let mut credits = Vec::new();
        for queue in 0..QUEUES {
            let there = self.rank.region.load(tail(queue));
            assert!(there <= self.received[queue] + SLOTS, "queue {queue}: {there} at once");
            for message in self.received[queue]..there {
                for i in 0..SLOT / 8 {
                    let word = self.rank.region.word(slot(queue, message) + 8 * i).load(Ordering::Relaxed);
                    let expected = content(self.peer, queue, message, i);
                    assert_eq!(word, expected, "word {i} of message {message} on queue {queue}");
                }
            }
            if there > self.received[queue] {
                self.received[queue] = there;
                credits.push(signal(self.peer, queue, head(queue), there));
            }
        }
        assert_eq!(self.rank.rail.post(&credits), Ok(credits.len()));
        !credits.is_empty()
    }

    fn complete(&mut self) -> bool {
        let mut completions = Vec::new();
        self.rank.rail.poll(&mut completions).unwrap();
        for Completion { offset: queue, value } in &completions {
            assert!(value.0 > self.completed[*queue], "completions come in the order of posting");
            self.completed[*queue] = value.0;
        }
        !completions.is_empty()
    }

    fn step(&mut self) -> bool {
        let moved = [self.receive(), self.complete(), self.send()];
        moved.contains(&true)
    }

    fn is_over(&self) -> bool {
        [self.sent, self.completed, self.received].iter().flatten().all(|&count| count == self.messages)
    }
}

/// Both ends' rings until all is over; `rest`: what an end does that has nothing to do, given the calls heard before.
fn exchange(world: &World, messages: u64, rest: impl Fn(&Rank, u64) + Sync) -> Vec<Rank> {
    let ends = world.connect().into_iter().map(|rank| Rings::new(rank, messages));
    let ends: Vec<Rings> = ends.collect();
    let run = |mut end: Rings| {
        let start = Instant::now();
        while !end.is_over() {
            assert!(start.elapsed() < rdma::LIMIT, "{:?} {:?}", end.sent, end.received);
            let heard = end.rank.ear.signals();
            if !end.step() {
                rest(&end.rank, heard);
            }
        }
        end.rank.drained();
        end.rank
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = ends.into_iter().map(|end| scope.spawn(|| run(end))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
#[ignore = "needs an RDMA device"]
fn sleepers_are_woken_by_signals_and_completions_behind_their_data() {
    let world = World { queue_pairs: 3, ..World::default() };
    // Nobody looks again but after a call.
    for rank in exchange(&world, 150, |rank, heard| rank.ear.wait(heard)) {
        assert!(rank.ear.losses().is_empty());
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn ranks_that_poll_are_not_woken() {
    let world = World { wakes: false, ..World::default() };
    for rank in exchange(&world, 100, |_, _| std::thread::yield_now()) {
        assert_eq!((rank.ear.signals(), rank.ear.losses()), (0, vec![]));
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn the_smaller_number_of_queue_pairs_counts() {
    let world = |queue_pairs| World { queue_pairs, ..World::default() };
    let mut ranks = connect(vec![world(4).setup(0).unwrap(), world(1).setup(1).unwrap()]);
    for rank in 0..2 {
        let peer = 1 - rank;
        let postings: Vec<_> = (0..8).map(|queue| signal(peer, queue, tail(queue), 7)).collect();
        assert_eq!(ranks[rank].rail.post(&postings), Ok(8));
        ranks[rank].drained();
        assert!((0..8).all(|queue| ranks[peer].region.load(tail(queue)) == 7));
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn what_has_no_room_waits_and_goes_on_by_itself() {
    const POSTINGS: u64 = 3000;
    for wakes in [true, false] {
        let mut ranks = World { wakes, bytes: 16 << 20, ..World::default() }.connect();
        // Far more than a queue pair has room for; no two of them can become one.
        let place = |i: u64| 4096 * (i as usize % 4096);
        for i in 0..POSTINGS {
            ranks[0].source.word(place(i) + 8).store(i, Ordering::Relaxed);
        }
        let posting = |i: u64| Posting {
            source: place(i) + 8,
            target: place(i) + 8,
            bytes: 8,
            completion: Some(i as usize),
            ..signal(1, 0, place(i), i + 1)
        };
        let postings: Vec<_> = (0..POSTINGS).map(posting).collect();
        assert_eq!(ranks[0].rail.post(&postings), Ok(POSTINGS as usize));
        // Nobody polls.
        wait_until("the last posting", || ranks[1].region.load(place(POSTINGS - 1)) == POSTINGS);
        assert!((0..POSTINGS).all(|i| ranks[1].region.load(place(i)) == i + 1));
        assert!((0..POSTINGS).all(|i| ranks[1].region.load(place(i) + 8) == i));
        let mut completions = Vec::new();
        wait_until("all completions", || {
            ranks[0].rail.poll(&mut completions).unwrap();
            completions.len() == POSTINGS as usize
        });
        let expected = |i: u64| Completion { offset: i as usize, value: Word(i + 1) };
        assert!(completions.into_iter().eq((0..POSTINGS).map(expected)));
        assert!(ranks[0].rail.is_idle());
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn pieces_from_many_places_become_one_behind_the_other() {
    const PIECES: usize = 30;
    let mut ranks = World::default().connect();
    let (mut postings, mut at) = (Vec::new(), 8192);
    for i in 0..PIECES {
        // Sources lie apart, in reverse; sizes differ.
        let (source, bytes) = (16384 * (PIECES - i), 8 * (1 + i));
        for word in 0..bytes / 8 {
            ranks[0].source.word(source + 8 * word).store((i << 8 | word) as u64, Ordering::Relaxed);
        }
        let value = Word(i as u64 + 1);
        postings.push(Posting {
            source,
            target: at,
            bytes,
            completion: Some(64),
            value,
            ..signal(1, 0, 0, 0)
        });
        at += bytes;
    }
    assert_eq!(ranks[0].rail.post(&postings), Ok(PIECES));
    ranks[0].drained();
    assert_eq!(ranks[1].region.load(0), PIECES as u64);
    for (i, posting) in postings.iter().enumerate() {
        for word in 0..posting.bytes / 8 {
            assert_eq!(ranks[1].region.load(posting.target + 8 * word), (i << 8 | word) as u64);
        }
    }
    let mut completions = Vec::new();
    ranks[0].rail.poll(&mut completions).unwrap();
    assert!(completions.iter().map(|completion| completion.value.0).eq(1..=PIECES as u64));
}

#[test]
#[ignore = "needs an RDMA device"]
fn two_peers_get_what_is_theirs_and_all_of_it_is_there_when_drained() {
    let mut ranks = World { ranks: 3, ..World::default() }.connect();
    for round in 1..=20 {
        for (from, rank) in ranks.iter_mut().enumerate() {
            let peers = (0..3).filter(|&peer| peer != from);
            let to = |peer: usize| {
                rank.source.word(64 * peer).store(round << 8 | (from << 4 | peer) as u64, Ordering::Relaxed);
                let (source, target) = (64 * peer, 8192 + 64 * from);
                Posting { source, target, bytes: 64, ..signal(peer, peer, 64 * from, round) }
            };
            let postings: Vec<_> = peers.map(to).collect();
            assert_eq!(rank.rail.post(&postings), Ok(2));
        }
        for rank in &mut ranks {
            rank.drained();
        }
        for (to, from) in
            (0..3).flat_map(|to| (0..3).map(move |from| (to, from))).filter(|(to, from)| to != from)
        {
            assert_eq!(ranks[to].region.load(64 * from), round);
            assert_eq!(ranks[to].region.load(8192 + 64 * from), round << 8 | (from << 4 | to) as u64);
        }
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn postings_out_of_range_are_refused() {
    let mut ranks = World { bytes: 8192, ..World::default() }.connect();
    let good = Posting { bytes: 64, ..signal(1, 0, 0, 1) };
    for (bad, name) in [
        (Posting { source: 8136, ..good }, "the source"),
        (Posting { target: usize::MAX, ..good }, "the target"),
        (Posting { word: 8192, ..good }, "the word"),
        (Posting { word: 4, ..good }, "the word"),
        (Posting { peer: 2, ..good }, "the region"),
    ] {
        let error = ranks[0].rail.post(&[bad]).unwrap_err();
        assert!(matches!(error, RailError::OutOfRange { what, .. } if what == name), "{error}");
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn proxies_exchange_rings_over_it() {
    const TOKENS: u64 = 200;
    let topology = Topology::new(2, 1).unwrap();
    let config = Config::builder(topology).experts(2).max_hidden(64).channels(2).ring_slots(stream::SLOTS);
    let config = config.pool_bytes(0).first_index(stream::FIRST).build().unwrap();
    let ranks = [0, 1].map(|rank| queue::Rank::leaked(&config, rank));
    let world = World { wakes: false, ..World::default() };
    let setups = ranks.map(|rank| {
        let (source, region) = (rank.mapped_private(), rank.mapped_region());
        world.setup_of(&world.config(rank.rank), rank.rank, source, region).unwrap()
    });
    let cards: Vec<_> = setups.iter().enumerate().map(|(rank, setup)| (rank, setup.card())).collect();
    let proxies: Vec<_> = setups
        .into_iter()
        .zip(ranks)
        .map(|(setup, rank)| {
            // SAFETY: `Stream` writes slots with credit and completion, and reads them below an acquired tail.
            let rail = unsafe { setup.connect(&cards, Arc::new(Ear::default())).unwrap() };
            ProxyThread::spawn(rank.proxy(rail), Patience::default(), None).unwrap()
        })
        .collect();
    let warps = ranks.iter().flat_map(|&rank| (0..2).map(move |channel| (rank, channel)));
    let warps: Vec<_> = warps
        .map(|(rank, channel)| {
            std::thread::spawn(move || {
                let mut streams = LANES.map(|lane| stream::Stream::new(rank, lane, channel, TOKENS));
                wait_until("all tokens", || {
                    streams.iter_mut().for_each(|stream| {
                        stream.send();
                        stream.receive();
                    });
                    streams.iter().all(stream::Stream::is_over)
                });
            })
        })
        .collect();
    warps.into_iter().for_each(|warp| warp.join().unwrap());
    proxies.into_iter().for_each(|proxy| proxy.stop().unwrap());
}

// ---- what breaks

/// Posts to a peer that is gone until the rail says so; what it says.
fn loss(rank: &mut Rank, peer: usize) -> String {
    let put = Posting { bytes: 64, completion: Some(0), ..signal(peer, 0, 0, 1) };
    assert_eq!(rank.rail.post(&[put; 3]), Ok(3));
    let (lost, reason) = rank.ear.loss();
    assert_eq!(lost, peer, "{reason}");
    reason
}

/// The peer is lost once and for all, nobody waits for it, and `other` is still reached.
fn assert_lost_alone(ranks: &mut [Rank], peer: usize, other: usize) {
    let put = Posting { bytes: 64, completion: Some(5), ..signal(peer, 1, 0, 9) };
    let mut completions = Vec::new();
    ranks[0].rail.poll(&mut completions).unwrap();
    assert_eq!(completions.len(), 3, "what was under way counts as done");
    assert_eq!(ranks[0].rail.post(&[put, Posting { peer: other, ..put }]), Ok(2));
    ranks[0].drained();
    completions.clear();
    ranks[0].rail.poll(&mut completions).unwrap();
    assert_eq!(completions.len(), 2);
    let region = ranks.iter().find(|rank| rank.rank == other).unwrap().region;
    assert_eq!(region.load(0), 9);
    assert_eq!(ranks[0].ear.losses().len(), 1, "said once");
}

#[test]
#[ignore = "needs an RDMA device"]
fn a_peer_that_is_gone_is_lost_alone() {
    let mut ranks = World { ranks: 3, ..World::default() }.impatient().connect();
    let gone = ranks.remove(1);
    drop(gone.rail);
    let reason = loss(&mut ranks[0], 1);
    let expected = "RDMA WRITE to rank 1: IBV_WC_RETRY_EXC_ERR (transport retry counter exceeded)";
    assert!(reason.contains("device rxe0, queue pair ") && reason.ends_with(expected), "{reason}");
    assert_lost_alone(&mut ranks, 1, 2);
}

#[test]
#[ignore = "needs an RDMA device"]
fn drain_names_who_has_not_got_it_all_by_then() {
    let mut ranks = World { ranks: 3, ..World::default() }.connect();
    let gone = ranks.remove(1);
    drop(gone.rail);
    ranks[0].rail.post(&[signal(1, 0, 0, 1), signal(2, 0, 0, 1)]).unwrap();
    let start = Instant::now();
    // Far less than a queue pair's patience.
    assert_eq!(ranks[0].rail.drain(start + Duration::from_millis(300)), [1]);
    assert_eq!(ranks[1].region.load(0), 1);
}

#[test]
#[ignore = "needs an RDMA device"]
fn a_wrong_key_loses_its_peer_alone() {
    /// Where a card has the region's key.
    const KEY: usize = 24;
    let world = World { ranks: 3, ..World::default() }.impatient();
    let setups: Vec<Setup> = (0..3).map(|rank| world.setup(rank).unwrap()).collect();
    let cards: Vec<_> = setups.iter().map(|setup| (setup.rank, setup.setup.card())).collect();
    let mut spoiled = cards.clone();
    spoiled[1].1[KEY + 1] ^= 0x40;
    let for_rank = |rank: usize| if rank == 0 { &spoiled } else { &cards };
    let mut ranks: Vec<Rank> = setups
        .into_iter()
        .map(|setup| {
            let cards = for_rank(setup.rank);
            setup.connect(cards).unwrap()
        })
        .collect();
    let reason = loss(&mut ranks[0], 1);
    assert!(reason.contains("RDMA WRITE to rank 1: IBV_WC_REM_ACCESS_ERR (remote access error)"), "{reason}");
    assert_lost_alone(&mut ranks, 1, 2);
}

#[test]
#[ignore = "needs an RDMA device"]
fn a_process_that_is_killed_is_lost() {
    let world = World::default().impatient();
    let setup = world.setup(0).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "peer_process", "--ignored", "--nocapture"])
        .env(PEER, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let card = said.find_map(|line| line.split_once(CARD).map(|(_, card)| from_hex(card))).expect("its card");
    writeln!(child.stdin.as_mut().unwrap(), "{}", hex(&setup.setup.card())).unwrap();
    let mut rank = setup.connect(&[(1, card)]).unwrap();
    assert!(said.any(|line| line.contains("connected")));
    rank.rail.post(&[signal(1, 0, 0, 1)]).unwrap();
    rank.drained();
    child.kill().unwrap();
    child.wait().unwrap();
    let reason = loss(&mut rank, 1);
    assert!(reason.contains("RDMA WRITE to rank 1: IBV_WC_RETRY_EXC_ERR"), "{reason}");
}

/// Makes a process the peer of another: see [`peer_process`].
const PEER: &str = "RAILHOP_TEST_VERBS_PEER";
const CARD: &str = "card of the peer: ";

#[test]
#[ignore = "the other process of a test"]
fn peer_process() {
    if std::env::var_os(PEER).is_none() {
        return;
    }
    let setup = World::default().impatient().setup(1).unwrap();
    println!("{CARD}{}", hex(&setup.setup.card()));
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let _rank = setup.connect(&[(0, from_hex(line.trim()))]).unwrap();
    println!("connected");
    // Until it is killed, or its parent is gone.
    std::io::stdin().read_line(&mut line).unwrap();
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
}

/// A network interface that is down until this is dropped.
struct LinkDown(&'static str);

impl LinkDown {
    fn new(interface: &'static str) -> Self {
        Self::set(interface, "down");
        Self(interface)
    }

    fn set(interface: &str, state: &str) {
        let status = Command::new("ip").args(["link", "set", interface, state]).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for LinkDown {
    fn drop(&mut self) {
        Self::set(self.0, "up");
        wait_until("the port", || RdmaSysfs::default().is_active("rxe1", 1));
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn a_link_that_is_cut_is_reported_at_both_ends() {
    let mut ranks = World::default().impatient().connect();
    let _down = LinkDown::new("v1");
    let (peer, reason) = ranks[1].ear.loss();
    assert_eq!(peer, 0);
    let expected = "the rail's own end is broken: device rxe1, port 1: IBV_EVENT_PORT_ERR (port error)";
    assert_eq!(reason, expected);
    let reason = loss(&mut ranks[0], 1);
    assert!(reason.contains("RDMA WRITE to rank 1: IBV_WC_RETRY_EXC_ERR"), "{reason}");
    ranks[0].drained();
    let refused = World::default().setup(1).map(|_| ()).unwrap_err();
    assert!(matches!(&refused, VerbsError::PortDown { device, .. } if device == "rxe1"), "{refused}");
}
