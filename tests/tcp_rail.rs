//! The rail over TCP: between rails over loopback, and against peers that stall, die, or send anything at all.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

#[path = "common/queue.rs"]
mod queue;
#[path = "common/tcp.rs"]
mod tcp;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use queue::{LIMIT, Memory, wait_until};
use railhop::fabric::mapped::Mapped;
use railhop::fabric::rail::{Completion, NetworkRail, Rail, RailError, TcpPeer, TcpRail};
use railhop::fabric::sim::Rng;
use railhop::wire::posting::Posting;
use railhop::wire::word::Word;
use rustix::net::sockopt::set_socket_linger;
use tcp::{Heard, connections};

/// Bytes of a rank's source and region.
const BYTES: usize = 1 << 20;

/// Unmapped by a region, on both sides of it.
const GUARD: usize = 4096;

/// Nobody writes it unless told to.
const UNTOUCHED: u64 = 0xa5a5_a5a5_a5a5_a5a5;

/// A rank with its memories, never freed so that no rail outlives them.
struct End {
    rail: TcpRail,
    source: &'static Memory,
    region: Mapped,
    around: &'static Memory,
    heard: Arc<Heard>,
}

fn leaked(bytes: usize, fill: u64) -> &'static Memory {
    let memory = Box::leak(Box::new(Memory::new(bytes)));
    (0..bytes / 8).for_each(|i| memory.word(8 * i).store(fill, Ordering::Relaxed));
    memory
}

fn end(rank: usize, peers: Vec<(usize, Vec<TcpStream>)>) -> End {
    let (source, around) = (leaked(BYTES, 0), leaked(BYTES + 2 * GUARD, UNTOUCHED));
    let base = around.word(GUARD).as_ptr().cast();
    // SAFETY: `around` is never freed, and there are atomics only.
    let region = unsafe { Mapped::new(base, BYTES) };
    let peers = peers.into_iter().map(|(rank, connections)| TcpPeer { rank, connections }).collect();
    let heard = Arc::new(Heard::default());
    // SAFETY: the memories are never freed; tests write sources and read targets when they may.
    let rail =
        unsafe { TcpRail::new(rank, source.mapped(), Arc::new(region), peers, heard.clone()) }.unwrap();
    End { rail, source, region, around, heard }
}

/// Two ranks with `count` connections.
fn pair(count: usize, buffer: Option<usize>) -> [End; 2] {
    let [ours, theirs] = connections(count, buffer);
    [end(0, vec![(1, ours)]), end(1, vec![(0, theirs)])]
}

/// A rank, and the other ends of its connections to rank 1.
fn against_raw(count: usize) -> (End, Vec<TcpStream>) {
    let [ours, theirs] = connections(count, None);
    for stream in &theirs {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
    }
    (end(0, vec![(1, ours)]), theirs)
}

impl End {
    fn word(&self, offset: usize) -> u64 {
        self.region.word(offset).unwrap().load(Ordering::Acquire)
    }

    fn await_word(&self, offset: usize, value: u64) {
        wait_until("the signal", || self.word(offset) == value);
    }

    fn await_lost(&self, peer: usize) -> Option<RailError> {
        wait_until("the loss", || !self.heard.lost().is_empty());
        let lost = self.heard.lost();
        assert_eq!((lost.len(), lost[0].0), (1, peer), "{lost:?}");
        lost[0].1.clone()
    }

    fn guards_hold(&self) -> bool {
        let ends = (0..GUARD).chain(GUARD + BYTES..2 * GUARD + BYTES).step_by(8);
        ends.into_iter().all(|at| self.around.word(at).load(Ordering::Relaxed) == UNTOUCHED)
    }

    /// Polls until nothing is under way.
    fn complete(&mut self) -> Vec<Completion> {
        let mut completions = Vec::new();
        wait_until("the completions", || {
            self.rail.poll(&mut completions).unwrap();
            self.rail.is_idle()
        });
        completions
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(100)
}

fn put(peer: usize, queue: usize, source: usize, target: usize, bytes: usize, value: u64) -> Posting {
    let completion = (bytes > 0).then_some(8 * queue);
    Posting { peer, queue, source, target, bytes, word: 8 * queue, completion, value: Word(value) }
}

/// All of the source to the end of the region.
fn flood(peer: usize, queue: usize, value: u64) -> Posting {
    put(peer, queue, 0, GUARD, BYTES - GUARD, value)
}

/// What the i-th byte of a message is.
fn byte(from: usize, queue: usize, message: u64, i: usize) -> u8 {
    (message.wrapping_mul(31) as usize + 101 * queue + 57 * from + i * 7) as u8
}

// ---- between rails

const QUEUES: usize = 6;
const SLOTS: u64 = 4;
const SLOT: usize = 9000;
const MESSAGES: u64 = 200;

/// One queue's rings in both directions, as one rank sees them: words are tails, then heads.
struct Stream {
    rank: usize,
    queue: usize,
    sent: u64,
    completed: u64,
    received: u64,
}

impl Stream {
    fn size(from: usize, queue: usize, message: u64) -> usize {
        let mut rng = Rng::new(message * 64 + queue as u64 * 2 + from as u64);
        match rng.below(4) {
            0 => rng.below(64) as usize,
            _ => rng.below(SLOT as u64 + 1) as usize,
        }
    }

    fn slot(&self, message: u64) -> usize {
        GUARD + (self.queue * SLOTS as usize + (message % SLOTS) as usize) * SLOT
    }

    /// Posts what credit and completions allow.
    fn send(&mut self, end: &mut End, postings: &mut Vec<Posting>) {
        let head = end.word(8 * (QUEUES + self.queue)).wrapping_sub(UNTOUCHED);
        while self.sent < MESSAGES && self.sent < head.min(self.completed) + SLOTS {
            let (at, message) = (self.slot(self.sent), self.sent);
            let bytes = Self::size(self.rank, self.queue, message);
            // SAFETY: the slot's last message has left.
            let slot = unsafe { end.source.mapped().slice_mut(at, bytes) };
            slot.iter_mut().enumerate().for_each(|(i, to)| *to = byte(self.rank, self.queue, message, i));
            self.sent += 1;
            let value = UNTOUCHED.wrapping_add(self.sent);
            let completion = Some(8 * self.queue);
            postings.push(Posting { completion, ..put(1 - self.rank, self.queue, at, at, bytes, value) });
        }
    }

    /// Checks what has come and gives credit for it.
    fn receive(&mut self, end: &End, postings: &mut Vec<Posting>) {
        let tail = end.word(8 * self.queue).wrapping_sub(UNTOUCHED);
        assert!(tail - self.received <= SLOTS);
        if tail == self.received {
            return;
        }
        let from = 1 - self.rank;
        for message in self.received..tail {
            let bytes = Self::size(from, self.queue, message);
            // SAFETY: the tail says that it is there, and there is no credit for it yet.
            let slot = unsafe { end.region.slice(self.slot(message), bytes) };
            let good = slot.iter().enumerate().all(|(i, &there)| there == byte(from, self.queue, message, i));
            assert!(good, "message {message} of queue {} to rank {}", self.queue, self.rank);
        }
        self.received = tail;
        let word = 8 * (QUEUES + self.queue);
        postings.push(Posting { word, ..put(from, self.queue, 0, 0, 0, UNTOUCHED.wrapping_add(tail)) });
    }

    fn is_over(&self) -> bool {
        self.received == MESSAGES && self.completed == MESSAGES
    }
}

/// Everything of one rank.
fn exchange(mut end: End, rank: usize) -> End {
    let stream = |queue| Stream { rank, queue, sent: 0, completed: 0, received: 0 };
    let mut streams: Vec<Stream> = (0..QUEUES).map(stream).collect();
    let (mut postings, mut completions) = (Vec::new(), Vec::new());
    wait_until("all messages", || {
        for stream in &mut streams {
            stream.receive(&end, &mut postings);
            stream.send(&mut end, &mut postings);
        }
        assert_eq!(end.rail.post(&postings), Ok(postings.len()));
        postings.clear();
        end.rail.poll(&mut completions).unwrap();
        for Completion { offset, value } in completions.drain(..) {
            let stream = &mut streams[offset / 8];
            stream.completed += 1;
            assert_eq!(value.0, UNTOUCHED.wrapping_add(stream.completed), "they come in order, one each");
        }
        streams.iter().all(Stream::is_over)
    });
    assert!(end.rail.drain(Instant::now() + LIMIT).is_empty());
    end
}

fn rings_in_both_directions(connections: usize, buffer: Option<usize>) {
    let threads = pair(connections, buffer).into_iter().enumerate();
    let threads: Vec<_> = threads.map(|(rank, end)| thread::spawn(move || exchange(end, rank))).collect();
    let ends: Vec<End> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    for end in &ends {
        assert!(end.guards_hold() && end.heard.signals() > 0);
        assert_eq!(end.heard.lost(), []);
    }
}

#[test]
fn rings_go_round_in_order() {
    rings_in_both_directions(1, None);
    rings_in_both_directions(4, None);
}

#[test]
fn rings_go_round_in_order_through_tiny_buffers() {
    rings_in_both_directions(1, Some(5000));
    rings_in_both_directions(3, Some(5000));
}

#[test]
fn completions_come_once_the_system_has_the_data() {
    const FLOODS: u64 = 16;
    let [ours, theirs] = connections(1, Some(1 << 16));
    let mut sender = end(0, vec![(1, ours)]);
    let floods: Vec<_> = (1..=FLOODS).map(|value| flood(1, 3, value)).collect();
    assert_eq!(sender.rail.post(&floods), Ok(floods.len()), "it has no limit of its own");
    thread::sleep(Duration::from_millis(20));
    let mut completions = Vec::new();
    sender.rail.poll(&mut completions).unwrap();
    assert!(completions.is_empty() && !sender.rail.is_idle(), "nobody reads");
    let receiver = end(1, vec![(0, theirs)]);
    let expected = (1..=FLOODS).map(|value| Completion { offset: 24, value: Word(value) });
    assert_eq!(sender.complete(), expected.collect::<Vec<_>>());
    receiver.await_word(24, FLOODS);
}

#[test]
fn signals_alone_have_no_completion() {
    let [mut sender, receiver] = pair(2, None);
    let signals: Vec<_> = (1..=10_000).map(|value| put(1, (value % 4) as usize, 0, 0, 0, value)).collect();
    assert_eq!(sender.rail.post(&signals), Ok(signals.len()));
    assert_eq!(sender.complete(), []);
    (0..4).for_each(|queue| receiver.await_word(8 * queue, 10_000 - (4 - queue as u64) % 4));
}

#[test]
fn drained_is_what_has_landed() {
    let [ours, theirs] = connections(2, None);
    let mut sender = end(0, vec![(1, ours)]);
    (0..BYTES / 8).for_each(|i| sender.source.word(8 * i).store(i as u64, Ordering::Relaxed));
    let postings = [0, 1].map(|queue| put(1, queue, GUARD, GUARD * (queue + 1), 512, 7));
    sender.rail.post(&postings).unwrap();
    assert_eq!(sender.rail.drain(soon()), [1], "it has left, and nobody has received it");
    sender.complete();
    let receiver = end(1, vec![(0, theirs)]);
    assert_eq!(sender.rail.drain(Instant::now() + LIMIT), [0; 0]);
    for queue in [0, 1] {
        assert_eq!(
            (receiver.word(8 * queue), receiver.word(GUARD * (queue + 1) + 8)),
            (7, GUARD as u64 / 8 + 1)
        );
    }
    drop(receiver);
    sender.await_lost(1);
    sender.rail.post(&[flood(1, 0, 8)]).unwrap();
    assert_eq!(sender.rail.drain(Instant::now() + LIMIT), [0; 0], "nobody waits for a peer that is lost");
}

#[test]
fn a_peer_that_is_stuck_holds_up_no_other() {
    let ([to_stuck, stuck], [ours, theirs]) = (connections(1, Some(1 << 16)), connections(1, None));
    let mut sender = end(0, vec![(2, to_stuck), (1, ours)]);
    let receiver = end(1, vec![(0, theirs)]);
    for value in 1..=10 {
        sender.rail.post(&[flood(2, 0, value), flood(1, 1, value)]).unwrap();
        receiver.await_word(8, value);
    }
    assert_eq!(sender.rail.drain(soon()), [2]);
    assert!(!sender.rail.is_idle());
    drop(stuck);
    assert_eq!(sender.await_lost(2), None);
    let completions = sender.complete();
    let values = |offset| completions.iter().filter(move |c| c.offset == offset).map(|c| c.value.0);
    assert!(values(0).eq(1..=10) && values(8).eq(1..=10), "{completions:?}");
    sender.rail.post(&[flood(1, 1, 11)]).unwrap();
    receiver.await_word(8, 11);
}

// ---- the end

#[test]
fn who_leaves_is_lost_once_after_what_it_has_sent() {
    let [mut leaving, mut staying] = pair(3, None);
    for queue in 0..6 {
        leaving.rail.post(&[flood(1, queue, 5)]).unwrap();
    }
    assert!(leaving.rail.drain(Instant::now() + LIMIT).is_empty());
    drop(leaving);
    assert_eq!(staying.await_lost(0), None);
    assert!((0..6).all(|queue| staying.word(8 * queue) == 5));
    // What is posted to nobody leaves its source all the same.
    let postings: Vec<_> = (1..=100).map(|value| flood(0, 2, value)).collect();
    staying.rail.post(&postings).unwrap();
    assert_eq!(staying.complete().len(), 100);
    assert_eq!(staying.heard.lost().len(), 1);
}

#[test]
fn who_leaves_does_not_wait_for_who_is_stuck() {
    let [ours, theirs] = connections(2, Some(1 << 16));
    let mut sender = end(0, vec![(1, ours)]);
    sender.rail.post(&[flood(1, 0, 1)]).unwrap();
    drop(sender);
    drop(theirs);
}

#[test]
fn a_process_that_dies_is_lost_when_its_last_connection_ends() {
    let (staying, mut theirs) = against_raw(3);
    drop(theirs.pop());
    set_socket_linger(&theirs[0], Some(Duration::ZERO)).unwrap();
    drop(theirs.remove(0));
    thread::sleep(Duration::from_millis(20));
    assert_eq!(staying.heard.lost(), []);
    // The other connection still works; its last frame is cut off.
    let posting = frame(*b"posting\n", [GUARD as u64, 16, 8, 3], &[1; 16]);
    theirs[0].write_all(&posting).unwrap();
    theirs[0].write_all(&frame(*b"posting\n", [8192, 16, 16, 4], &[2; 15])).unwrap();
    drop(theirs);
    assert_eq!(staying.await_lost(1), None);
    assert_eq!((staying.word(8), staying.word(16)), (3, UNTOUCHED));
    assert_eq!(staying.word(GUARD), 0x0101_0101_0101_0101);
}

#[test]
fn a_peer_that_no_longer_reads_is_lost_with_what_was_posted() {
    let (mut sender, theirs) = against_raw(2);
    (1..=20).for_each(|value| drop(sender.rail.post(&[flood(1, 0, value), flood(1, 1, value)])));
    drop(theirs);
    assert_eq!(sender.await_lost(1), None);
    assert_eq!(sender.complete().len(), 40);
}

// ---- what comes from the wire

/// A frame as it is on the wire: kind; target, bytes, word, value; data.
fn frame(kind: [u8; 8], words: [u64; 4], data: &[u8]) -> Vec<u8> {
    let words = words.iter().flat_map(|word| word.to_le_bytes());
    kind.into_iter().chain(words).chain(data.iter().copied()).collect()
}

#[test]
fn frames_may_come_in_any_pieces() {
    let (receiver, mut theirs) = against_raw(1);
    theirs[0].set_nodelay(true).unwrap();
    let mut rng = Rng::new(5);
    let mut stream = Vec::new();
    let mut expected = vec![0xa5; BYTES];
    for value in 1..=500u64 {
        let size = if rng.below(3) == 0 { 0 } else { rng.below(1500) as usize };
        let target = GUARD + rng.below((BYTES - GUARD - size) as u64) as usize;
        let data: Vec<u8> = (0..size).map(|i| byte(1, 0, value, i)).collect();
        expected[target..target + size].copy_from_slice(&data);
        let word = 8 * (value as usize % 4);
        expected[word..word + 8].copy_from_slice(&value.to_le_bytes());
        stream.extend(frame(*b"posting\n", [target as u64, size as u64, word as u64, value], &data));
    }
    let mut rest = &stream[..];
    while !rest.is_empty() {
        let most = [1, 50, 3000][rng.below(3) as usize];
        let (piece, later) = rest.split_at(rest.len().min(1 + rng.below(most) as usize));
        theirs[0].write_all(piece).unwrap();
        rest = later;
    }
    receiver.await_word(0, 500);
    // SAFETY: nothing more is on its way.
    assert!(unsafe { receiver.region.slice(0, BYTES) } == expected && receiver.guards_hold());
}

/// What is told of a peer that sends `garbage` after a good posting.
fn refused(garbage: &[u8]) -> String {
    let (mut receiver, mut theirs) = against_raw(2);
    theirs[0].write_all(&frame(*b"posting\n", [GUARD as u64, 8, 8, 3], &[1; 8])).unwrap();
    theirs[0].write_all(garbage).unwrap();
    let Some(RailError::Broken { peer: 1, reason }) = receiver.await_lost(1) else {
        panic!("{:?}", receiver.heard.lost())
    };
    assert_eq!(
        (receiver.word(8), receiver.word(GUARD)),
        (3, 0x0101_0101_0101_0101),
        "what came before counts"
    );
    assert!(receiver.guards_hold());
    let untouched = (16..GUARD).chain(GUARD + 8..BYTES).step_by(8).all(|at| receiver.word(at) == UNTOUCHED);
    assert!(untouched && receiver.word(0) == UNTOUCHED);
    for stream in &mut theirs {
        let end = stream.read(&mut [0; 64]);
        let is_end = |error: &std::io::Error| error.kind() == ErrorKind::ConnectionReset;
        assert!(matches!(end, Ok(0)) || end.as_ref().is_err_and(is_end), "{end:?}");
    }
    receiver.rail.post(&[flood(1, 0, 1), flood(1, 1, 1)]).unwrap();
    assert_eq!(receiver.complete().len(), 2);
    assert!(receiver.rail.drain(Instant::now() + LIMIT).is_empty());
    assert_eq!(receiver.heard.lost().len(), 1);
    reason
}

#[test]
fn garbage_is_refused_with_what_is_wrong() {
    let posting = |words| frame(*b"posting\n", words, &[9; 64]);
    let (bytes, most) = (BYTES as u64, u64::MAX);
    for (words, wrong) in [
        ([bytes, 8, 8, 1], format!("its posting of 8 bytes at {bytes}")),
        ([bytes - 7, 8, 8, 1], format!("its posting of 8 bytes at {}", bytes - 7)),
        ([0, bytes + 1, 8, 1], format!("its posting of {} bytes at 0", bytes + 1)),
        ([16, most, 8, 1], format!("its posting of {most} bytes at 16")),
        ([most, 1, 8, 1], format!("its posting of 1 bytes at {most}")),
        ([most - 7, 8, 8, 1], "not within".into()),
        ([most, most, most, most], "not within".into()),
        ([bytes + 1, 0, 8, 1], "not within".into()),
        ([16, 8, 9, 1], "a word at 9".into()),
        ([16, 8, 4, 1], "a word at 4".into()),
        ([16, 8, bytes, 1], format!("a word at {bytes}")),
        ([16, 8, bytes - 4, 1], "a word at".into()),
        ([16, 8, most - 7, 1], "a word at".into()),
    ] {
        let reason = refused(&posting(words));
        assert!(reason.contains(&wrong), "{words:?}: {reason}");
    }
    assert!(refused(b"GET / HTTP/1.1\r\nHost: railhop.example\r\n\r\n").contains("no frame"));
    assert!(refused(&[0; 40]).contains("no frame"));
    assert!(refused(&[0xff; 400]).contains("no frame"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, max_shrink_iters: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_nothing_outside_is_written(
        kinds in prop::collection::vec(0usize..6, 1..20),
        words in prop::collection::vec(prop_oneof![0u64..1 << 20, (1u64 << 20) - 64..(1 << 20) + 64, any::<u64>()], 80),
        noise in prop::collection::vec(any::<u8>(), 0..500),
    ) {
        let (receiver, mut theirs) = against_raw(1);
        let kind = |kind| [b"posting\n", b"posting\n", b"fence  \n", b"answer \n", b"posting\n", b"goodbye\n"][kind];
        for (i, kinds) in kinds.into_iter().map(kind).enumerate() {
            let words = *words[4 * i..].first_chunk().unwrap();
            // The rail may have ended already.
            let _ = theirs[0].write_all(&frame(*kinds, words, &noise));
        }
        let _ = theirs[0].shutdown(Shutdown::Write);
        wait_until("the loss", || !receiver.heard.lost().is_empty());
        prop_assert!(receiver.guards_hold());
        prop_assert_eq!(receiver.heard.lost().len(), 1);
    }
}

// ---- what is asked of it

#[test]
fn postings_that_can_not_be_are_refused() {
    let [mut sender, _receiver] = pair(1, None);
    let refused = |rail: &mut TcpRail, posting| match rail.post(&[posting]) {
        Err(RailError::OutOfRange { what, peer, .. }) => (what, peer),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&mut sender.rail, flood(0, 0, 1)), ("the region", 0), "no rank is its own peer");
    assert_eq!(refused(&mut sender.rail, flood(2, 0, 1)), ("the region", 2));
    assert_eq!(refused(&mut sender.rail, put(1, 0, BYTES - 8, 0, 9, 1)), ("the source", 1));
    assert_eq!(refused(&mut sender.rail, put(1, 0, usize::MAX, 0, 9, 1)), ("the source", 1));
}

#[test]
fn peers_that_can_not_be_are_refused() {
    let refused = |peers: Vec<(usize, usize)>| {
        let peer =
            |(rank, count)| TcpPeer { rank, connections: connections(count, None)[0].drain(..).collect() };
        let (memory, heard) = (leaked(64, 0).mapped(), Arc::new(Heard::default()));
        // SAFETY: never freed.
        let rail = unsafe {
            TcpRail::new(1, memory, Arc::new(memory), peers.into_iter().map(peer).collect(), heard)
        };
        rail.map(|_| ()).unwrap_err().to_string()
    };
    assert!(refused(vec![(0, 0)]).contains("0 connections to rank 0"));
    assert!(refused(vec![(0, 1), (1, 2)]).contains("2 connections to rank 1"));
    assert!(refused(vec![(0, 1), (0, 2)]).contains("2 connections to rank 0"));
}

#[test]
fn a_rail_without_peers_is_idle() {
    let mut alone = end(0, vec![]);
    assert!(alone.rail.is_idle() && alone.rail.drain(Instant::now()).is_empty());
}
