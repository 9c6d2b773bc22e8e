//! The cost of a ring's bookkeeping: credit, publish, available, release for chunks of tokens, without data.

use std::sync::atomic::{AtomicU64, Ordering};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use railhop::error::Role;
use railhop::proto::{Input, Port, RecvRing, RingEnd, SendRing};
use railhop::wire::word::Index;

/// Words only: both ends live in one memory.
struct Words([AtomicU64; 4]);

impl Port for Words {
    fn load(&self, word: usize) -> u64 {
        self.0[word].load(Ordering::Acquire)
    }

    fn set(&self, word: usize, value: u64) {
        self.0[word].store(value, Ordering::Relaxed);
    }

    fn signal(&self, _rank: usize, word: usize, value: u64) {
        self.0[word].store(value, Ordering::Release);
    }

    fn put(&self, _rank: usize, _offset: usize, _parts: &[&[u8]]) {}

    fn store(&self, _rank: usize, _offset: usize, _bytes: &[u8]) {}

    fn own(&self, _offset: usize, _len: usize) -> &[u8] {
        &[]
    }

    fn peer(&self, _rank: usize, _offset: usize, _len: usize) -> &[u8] {
        &[]
    }

    fn input(&self) -> Input<'_> {
        Input::None
    }

    fn emit(&self, _token: usize, _row: &[bf16], _weights: &[f32]) {}
}

const TAIL: usize = 0;
const HEAD: usize = 1;

fn end(theirs: usize, ours: usize, kept: usize) -> RingEnd {
    let (slots, pitch, first) = (16, 16, Index::new(0));
    RingEnd { peer: 0, channel: 0, slots_at: 0, slots, pitch, theirs, ours, kept, generation: 1, first }
}

fn ring(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring");
    for chunk in [1, 4, 16] {
        group.throughput(Throughput::Elements(chunk as u64));
        group.bench_function(BenchmarkId::new("chunk", chunk), |b| {
            let port = Words(std::array::from_fn(|_| AtomicU64::new(0)));
            let mut sender = SendRing::new(&port, end(HEAD, TAIL, 2));
            let mut receiver = RecvRing::new(&port, end(TAIL, HEAD, 3));
            b.iter(|| {
                sender.credit(&port, chunk, Role::Sender).expect("everything was released");
                sender.publish(&port, chunk);
                let ready = receiver.available(&port, chunk, Role::Forwarder).expect("just published");
                receiver.take(ready);
                receiver.release(&port);
            });
        });
    }
}

criterion_group!(benches, ring);
criterion_main!(benches);
