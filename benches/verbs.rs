//! What the rail over RDMA verbs carries from one device to another: by each queue pair a ring as worlds of processes have
//! it, of BF16 rows of 7168, each chunk with its signal, as far as credit goes, which the other end gives.
//!
//!   verbs [--queue-pairs N] [--chunks N]
//!
//! Prints MB/s and the size of a chunk. Needs the devices `rxe0` and `rxe1`: `ci/verbs --bench` runs it where they are,
//! beside `ib_write_bw`. Both ends sleep until their rail calls.

#[path = "../tests/common/rdma.rs"]
mod rdma;

use std::thread;
use std::time::Instant;

use railhop::fabric::rail::{Rail as _, VerbsError};
use railhop::wire::posting::Posting;
use railhop::{Network, Verbs};
use rdma::{Rank, World, connect, head, signal, tail};

const CHUNK: usize = Network::CHUNK_TOKENS * 2 * 7168;

/// Chunks of a ring.
const WINDOW: u64 = (Network::RING_SLOTS / Network::CHUNK_TOKENS) as u64;

/// Where rings begin: behind the index words.
const RINGS: usize = 4096;

fn slot(ring: usize, chunk: u64) -> usize {
    RINGS + (ring as u64 * WINDOW + chunk % WINDOW) as usize * CHUNK
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |name: &str, default: usize| {
        let at = arguments.iter().position(|argument| argument == name);
        at.map_or(default, |at| arguments[at + 1].parse().expect("a number"))
    };
    let test = arguments.iter().any(|argument| argument == "--test");
    let rings = number("--queue-pairs", Verbs::default().queue_pairs);
    let chunks = number("--chunks", if test { 20 } else { 500 });
    match stream(rings, (chunks / rings) as u64) {
        Ok(rate) => println!("{rate:.2} MB/s by {CHUNK} bytes"),
        Err(error) if test => println!("nothing to measure: {error}"),
        Err(error) => panic!("{error}"),
    }
}

/// Bytes per microsecond, of so many chunks for each ring, from the first posting until all of it is at the other end.
fn stream(rings: usize, chunks: u64) -> Result<f64, VerbsError> {
    let world = World { bytes: slot(rings, 0), queue_pairs: rings, ..World::default() };
    let setups = (0..2).map(|rank| world.setup(rank)).collect::<Result<_, _>>()?;
    let mut ranks = connect(setups).into_iter();
    let (mut sender, mut receiver) = (ranks.next().expect("rank 0"), ranks.next().expect("rank 1"));
    let start = Instant::now();
    // Both stay until both are done: the last acknowledgement may have to be sent again.
    thread::scope(|scope| {
        scope.spawn(|| receive(&mut receiver, rings, chunks));
        send(&mut sender, rings, chunks);
    });
    let micros = start.elapsed().as_secs_f64() * 1e6;
    Ok((rings as u64 * chunks) as f64 * CHUNK as f64 / micros)
}

fn send(rank: &mut Rank, rings: usize, chunks: u64) {
    let (mut sent, mut credits) = (vec![0; rings], vec![0; rings]);
    let mut postings = Vec::new();
    while credits.iter().any(|&credit| credit < chunks) {
        let heard = rank.ear.signals();
        for ring in 0..rings {
            credits[ring] = rank.region.load(head(ring));
            let next = (credits[ring] + WINDOW).min(chunks);
            // As on the host, whose memory is free again when the peer has given credit: nobody waits for completions.
            postings.extend((sent[ring]..next).map(|chunk| {
                let at = slot(ring, chunk);
                Posting { source: at, target: at, bytes: CHUNK, ..signal(1, ring, tail(ring), chunk + 1) }
            }));
            sent[ring] = next;
        }
        rank.rail.post(&postings).expect("the rail carries");
        rank.rail.poll(&mut Vec::new()).expect("the rail carries");
        if postings.is_empty() && credits.iter().any(|&credit| credit < chunks) {
            rank.ear.wait(heard);
        }
        postings.clear();
    }
}

fn receive(rank: &mut Rank, rings: usize, chunks: u64) {
    let mut received = vec![0; rings];
    let mut credits = Vec::new();
    while received.iter().any(|&received| received < chunks) {
        let heard = rank.ear.signals();
        for (ring, received) in received.iter_mut().enumerate() {
            let there = rank.region.load(tail(ring));
            if there > *received {
                *received = there;
                credits.push(signal(0, ring, head(ring), there));
            }
        }
        if credits.is_empty() {
            rank.ear.wait(heard);
        }
        rank.rail.post(&credits).expect("the rail carries");
        credits.clear();
    }
    rank.drained();
}
