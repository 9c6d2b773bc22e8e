//! What the rail over RDMA verbs carries from one device to another: chunks of 57344 bytes (four BF16 rows of 7168), each
//! with its signal, as far as credit goes, which the other end gives.
//!
//!   verbs [--messages N] [--window CHUNKS]
//!
//! Prints MB/s. Needs the devices `rxe0` and `rxe1`: `ci/verbs --bench` runs it where they are, beside `ib_write_bw`. Both
//! ends sleep until their rail calls.

#[path = "../tests/common/rdma.rs"]
mod rdma;

use std::thread;
use std::time::Instant;

use railhop::fabric::rail::{Rail as _, VerbsError};
use railhop::wire::posting::Posting;
use railhop::wire::word::Word;
use rdma::{Rank, World, connect, signal};

const CHUNK: usize = 57344;

/// Offsets of the index words.
const TAIL: usize = 0;
const HEAD: usize = 64;
const RING: usize = 4096;

#[derive(Clone, Copy)]
struct Load {
    messages: u64,
    window: u64,
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |name: &str, default: u64| {
        let at = arguments.iter().position(|argument| argument == name);
        at.map_or(default, |at| arguments[at + 1].parse().expect("a number"))
    };
    let test = arguments.iter().any(|argument| argument == "--test");
    let default = if test { 20 } else { 1000 };
    let load = Load { messages: number("--messages", default), window: number("--window", 32) };
    match stream(load) {
        Ok(rate) => println!("{rate:.2} MB/s"),
        Err(error) if test => println!("nothing to measure: {error}"),
        Err(error) => panic!("{error}"),
    }
}

/// Bytes per microsecond from the first posting until all of it is at the other end.
fn stream(load: Load) -> Result<f64, VerbsError> {
    let bytes = RING + load.window as usize * CHUNK;
    let world = World { bytes, ..World::default() };
    let setups = (0..2).map(|rank| world.setup(rank)).collect::<Result<_, _>>()?;
    let mut ranks = connect(setups).into_iter();
    let (mut sender, mut receiver) = (ranks.next().expect("rank 0"), ranks.next().expect("rank 1"));
    let start = Instant::now();
    // Both stay until both are done: the last acknowledgement may have to be sent again.
    thread::scope(|scope| {
        scope.spawn(|| receive(&mut receiver, load));
        send(&mut sender, load);
    });
    let micros = start.elapsed().as_secs_f64() * 1e6;
    Ok(load.messages as f64 * CHUNK as f64 / micros)
}

fn send(rank: &mut Rank, load: Load) {
    let (mut sent, mut credit) = (0, 0);
    while credit < load.messages {
        let heard = rank.ear.signals();
        credit = rank.region.load(HEAD);
        let next = (credit + load.window).min(load.messages);
        // As on the host, whose memory is free again when the peer has given credit: nobody waits for completions.
        let posting = |message: u64| {
            let at = RING + (message % load.window) as usize * CHUNK;
            let value = Word(message + 1);
            Posting { source: at, target: at, bytes: CHUNK, value, ..signal(1, 0, TAIL, 0) }
        };
        let postings: Vec<_> = (sent..next).map(posting).collect();
        rank.rail.post(&postings).expect("the rail carries");
        rank.rail.poll(&mut Vec::new()).expect("the rail carries");
        if postings.is_empty() && credit < load.messages {
            rank.ear.wait(heard);
        }
        sent = next;
    }
}

fn receive(rank: &mut Rank, load: Load) {
    let mut received = 0;
    while received < load.messages {
        let heard = rank.ear.signals();
        let there = rank.region.load(TAIL);
        if there == received {
            rank.ear.wait(heard);
            continue;
        }
        received = there;
        rank.rail.post(&[signal(0, 0, HEAD, received)]).expect("the rail carries");
    }
    rank.drained();
}
