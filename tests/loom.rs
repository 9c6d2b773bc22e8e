//! Models of what the threads of an engine share, run through every interleaving that loom tells apart:
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom`.

#![cfg(loom)]
#![allow(unsafe_code)]

use std::time::Duration;

use half::bf16;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::thread;
use railhop::error::Role;
use railhop::fabric::doorbell::{Bell, Doorbell};
use railhop::proto::{Input, Port, RecvRing, RingEnd, SendRing};
use railhop::wire::word::Index;

const SENDER: usize = 0;
const RECEIVER: usize = 1;
const TAIL: usize = 0;
const HEAD: usize = 1;
const SENT: usize = 2;
const TAKEN: usize = 3;
const SLOT: usize = size_of::<u64>();

/// The words and slots of one ring, shared by the two ends.
struct Memory {
    words: [AtomicU64; 4],
    slots: Vec<UnsafeCell<[u8; SLOT]>>,
    /// With what a signal is stored.
    publish: Ordering,
}

// SAFETY: that slots are never accessed by two threads at once is what the model checks.
unsafe impl Sync for Memory {}

impl Port for Memory {
    fn load(&self, word: usize) -> u64 {
        self.words[word].load(Ordering::Acquire)
    }

    fn set(&self, word: usize, value: u64) {
        self.words[word].store(value, Ordering::Relaxed);
    }

    fn signal(&self, _: usize, word: usize, value: u64) {
        self.words[word].store(value, self.publish);
    }

    fn put(&self, _: usize, offset: usize, parts: &[&[u8]]) {
        self.slots[offset / SLOT].with_mut(|slot| {
            // SAFETY: loom has just checked that nobody else accesses the slot.
            unsafe { (*slot).copy_from_slice(parts[0]) }
        });
    }

    fn own(&self, offset: usize, len: usize) -> &[u8] {
        // SAFETY: loom has just checked that nobody writes the slot; its next write is checked against this.
        self.slots[offset / SLOT].with(|slot| unsafe { &(&*slot)[..len] })
    }

    fn store(&self, _: usize, _: usize, _: &[u8]) {
        unreachable!("rings are hop 1")
    }

    fn peer(&self, _: usize, _: usize, _: usize) -> &[u8] {
        unreachable!("rings are hop 1")
    }

    fn input(&self) -> Input<'_> {
        Input::None
    }

    fn emit(&self, _: usize, _: &[bf16], _: &[f32]) {
        unreachable!("rings deliver nothing")
    }
}

fn end(peer: usize, slots: usize) -> RingEnd {
    let (theirs, ours, kept) = if peer == RECEIVER { (HEAD, TAIL, SENT) } else { (TAIL, HEAD, TAKEN) };
    let first = Index::new(u64::MAX);
    RingEnd { peer, channel: 0, slots_at: 0, slots, pitch: SLOT, theirs, ours, kept, generation: 1, first }
}

fn send(memory: &Memory, ring: &mut SendRing, tokens: std::ops::Range<u64>) {
    while ring.credit(memory, tokens.clone().count(), Role::Sender).is_err() {
        thread::yield_now();
    }
    for (ahead, token) in tokens.clone().enumerate() {
        memory.put(ring.peer(), ring.slot(ahead), &[&token.to_le_bytes()]);
    }
    ring.publish(memory, tokens.count());
}

fn receive(memory: &Memory, ring: &mut RecvRing, tokens: std::ops::Range<u64>) {
    for token in tokens {
        while ring.available(memory, 1, Role::Forwarder).is_err() {
            thread::yield_now();
        }
        assert_eq!(memory.own(ring.slot(), SLOT), token.to_le_bytes());
        ring.take(1);
        ring.release(memory);
    }
}

/// Runs `model` through its interleavings, of at most `preemptions` preemptions each.
fn check(preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(model);
}

/// Three tokens in chunks of `chunk` through a ring of `slots`, across the wrap; the third in an operation of its
/// own, whose ends go on where the first operation's stopped.
fn ring(slots: usize, chunk: usize, publish: Ordering) {
    check(Some(4), move || {
        let slot = || UnsafeCell::new([0; SLOT]);
        let slots_of = (0..slots).map(|_| slot()).collect();
        let memory = Arc::new(Memory { words: Default::default(), slots: slots_of, publish });
        let sender = thread::spawn({
            let memory = memory.clone();
            move || {
                let mut ring = SendRing::new(&*memory, end(RECEIVER, slots));
                (0..2).step_by(chunk).for_each(|token| {
                    send(&memory, &mut ring, token..token + chunk as u64);
                });
                send(&memory, &mut SendRing::new(&*memory, end(RECEIVER, slots)), 2..3);
            }
        });
        receive(&memory, &mut RecvRing::new(&*memory, end(SENDER, slots)), 0..2);
        receive(&memory, &mut RecvRing::new(&*memory, end(SENDER, slots)), 2..3);
        sender.join().unwrap();
    });
}

#[test]
fn tokens_pass_a_ring_of_one_slot() {
    ring(1, 1, Ordering::Release);
}

#[test]
fn tokens_pass_a_ring_of_two_slots() {
    ring(2, 1, Ordering::Release);
    ring(2, 2, Ordering::Release);
}

/// The models above can fail: a signal that doesn't carry the data before it is caught.
#[test]
#[should_panic(expected = "Causality violation")]
fn a_signal_without_order_is_caught() {
    ring(1, 1, Ordering::Relaxed);
}

/// A worker looks for work and sleeps if there is none; the ringer publishes work and rings. Loom's waits never
/// time out, so a lost wake-up is a deadlock.
fn doorbell(workers: usize, preemptions: Option<usize>) {
    check(preemptions, move || {
        let shared = Arc::new((Doorbell::default(), AtomicBool::new(false)));
        let workers: Vec<_> = (0..workers)
            .map(|_| {
                let shared = shared.clone();
                thread::spawn(move || {
                    let (doorbell, work) = &*shared;
                    loop {
                        let ticket = doorbell.ticket();
                        if work.load(Ordering::Acquire) {
                            break;
                        }
                        doorbell.wait(ticket, Duration::MAX);
                    }
                })
            })
            .collect();
        shared.1.store(true, Ordering::Release);
        shared.0.ring();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}

#[test]
fn no_wake_up_is_lost() {
    doorbell(1, None);
    doorbell(2, Some(2));
}
