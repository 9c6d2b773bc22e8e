//! A seeded simulator: a whole world in one thread and in virtual time, for tests.
//!
//! It keeps the one promise of [`Port`] and breaks whatever else it may. What a role publishes to one rank
//! forms a *queue*, which outlives operations as the role does. Its signals arrive in order, each after the
//! writes before it; the writes between two signals arrive torn and in any order. Queues overtake each other,
//! some are slow, some ranks are slow, and any of them may stall. Signals can be lost, for good.
//!
//! Nothing polls: a task that is blocked sleeps until its rank sees a signal or another of its tasks has
//! moved. So when nothing is left to do, whatever still sleeps would sleep forever, and that is reported.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::sync::Arc;

use half::bf16;

use crate::config::Config;
use crate::error::{Error, Started, Wait};
use crate::proto::plan::{Plan, Routing};
use crate::proto::{Buffer, Input, Op, OpSpec, Port, Progress, Step, Task};
use crate::wire::region::{LANES, Lane, RegionMap, WordId};
use crate::wire::shape::{RecvLayout, RowShape};
use crate::wire::{LINE, align_up};

/// A world that still moves at this virtual time comes to no end.
const DEADLINE: u64 = 1 << 34;
/// The usual delay is below this, a stall takes up to [`STALL`].
const DELAY: u64 = 1 << 8;
const STALL: u64 = 1 << 16;
/// How much slower the slow ranks and queues are.
const SLOW: u64 = 64;

/// A task that will never move again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stuck {
    /// Its rank.
    pub rank: usize,
    /// Its operation.
    pub started: Started,
    /// What it waits for; none where its operation's receiver has to move first.
    pub wait: Option<Wait>,
}

/// A world.
pub struct Sim {
    config: Arc<Config>,
    map: Arc<RegionMap>,
    generation: u16,
    rng: Rng,
    now: u64,
    agenda: BinaryHeap<Reverse<(u64, Actor)>>,
    ranks: Vec<Rank>,
    /// By (rank, lane, task, receiving rank).
    queues: Vec<Queue>,
    operations: Vec<Operation>,
    /// Words, by rank and offset, whose signals are lost.
    lost: Vec<(usize, usize)>,
}

/// What can be due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Actor {
    Queue(usize),
    Task { operation: usize, task: usize },
}

#[derive(Default)]
struct Rank {
    memory: Vec<u64>,
    private: RefCell<BTreeMap<usize, u64>>,
    /// Bytes of the pool lent.
    lent: usize,
    epoch: u64,
    turns: [u64; LANES.len()],
    /// By lane: the active operation and those queued behind it.
    lanes: [VecDeque<usize>; LANES.len()],
    pace: u64,
    stalled_until: u64,
}

struct Queue {
    pace: u64,
    events: VecDeque<Event>,
}

enum Event {
    Write { at: usize, bytes: Vec<u8> },
    Signal { word: usize, value: u64 },
}

struct Operation {
    op: Arc<Op>,
    tasks: Vec<(Task, State)>,
    input: Option<Arc<[bf16]>>,
    combined: BTreeMap<usize, Combined>,
}

type Combined = (Vec<bf16>, Vec<f32>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Due,
    Asleep(Option<Wait>),
    Done,
}

impl Sim {
    /// A world of `config` in which everything that is left to chance follows from `seed`.
    pub fn new(config: Config, seed: u64) -> Self {
        let (map, world) = (RegionMap::new(&config), config.topology().world_size());
        let mut rng = Rng::new(seed);
        let mut pace = || if rng.below(8) == 0 { SLOW } else { 1 };
        let words = map.memory.region.div_ceil(size_of::<u64>());
        let rank = || Rank { memory: vec![0; words], pace: pace(), ..Rank::default() };
        let ranks = std::iter::repeat_with(rank).take(world).collect();
        let queues = (0..world * LANES.len() * (1 + config.channels()) * world)
            .map(|_| Queue { pace: pace(), events: VecDeque::new() })
            .collect();
        Self {
            config: Arc::new(config),
            map: Arc::new(map),
            generation: 1,
            rng,
            now: 0,
            agenda: BinaryHeap::new(),
            ranks,
            queues,
            operations: Vec::new(),
            lost: Vec::new(),
        }
    }

    /// Loses every signal of the word `id` of `rank` from now on.
    pub fn lose(&mut self, rank: usize, lane: Lane, id: WordId) {
        self.lost.push((rank, self.map.word(lane, id)));
    }

    /// A buffer for `capacity` rows of `shape` at `rank`, never lent again.
    ///
    /// # Panics
    /// The pool is exhausted.
    pub fn buffer(&mut self, rank: usize, shape: RowShape, capacity: usize) -> Buffer {
        let lent = &mut self.ranks[rank].lent;
        let offset = self.map.pool + *lent;
        let layout = RecvLayout::new(shape, capacity);
        *lent += align_up(layout.bytes, LINE);
        assert!(*lent <= self.map.memory.pool, "Config::pool_bytes is too small");
        Buffer::new(&layout, offset)
    }

    /// The region of `rank`.
    pub fn region(&self, rank: usize) -> &[u8] {
        bytemuck::cast_slice(&self.ranks[rank].memory)
    }

    /// The region of `rank`, as its caller writes it.
    pub fn region_mut(&mut self, rank: usize) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.ranks[rank].memory)
    }

    /// The plan that the next operation of `rank` makes for `routing`.
    pub fn plan(&self, rank: usize, routing: Routing) -> Arc<Plan> {
        let id = (0, self.generation, self.ranks[rank].epoch);
        Arc::new(Plan::new(&self.config, self.map.counts(), id, routing))
    }

    /// Starts an operation, behind the earlier ones of its rank and lane; returns its number. Epoch and
    /// configuration of `spec` are filled in here.
    pub fn start(&mut self, rank: usize, mut spec: OpSpec, input: Option<Arc<[bf16]>>) -> usize {
        let (id, own) = (self.operations.len(), &mut self.ranks[rank]);
        let lane = Lane::of(spec.started.kind) as usize;
        (spec.started.epoch, spec.started.config) = (own.epoch, self.config.agreement());
        let (config, map, turn) = (self.config.clone(), self.map.clone(), own.turns[lane]);
        let op = Arc::new(Op::new(config, map, rank, self.generation, turn, spec));
        own.epoch += 1;
        own.turns[lane] += 1;
        own.lanes[lane].push_back(id);
        let tasks = Task::table(&op).into_iter().map(|task| (task, State::Asleep(None))).collect();
        self.operations.push(Operation { op, tasks, input, combined: BTreeMap::new() });
        self.wake(rank);
        id
    }

    /// Runs until nothing can move. Calls `finished` with each operation that is over at its rank; it may
    /// start others.
    ///
    /// # Errors
    /// Every task that waits for something that will never come.
    pub fn run(&mut self, mut finished: impl FnMut(&mut Self, usize)) -> Result<(), Vec<Stuck>> {
        while let Some(Reverse((due, actor))) = self.agenda.pop() {
            assert!(due < DEADLINE, "the world moves, but comes to no end");
            self.now = due;
            match actor {
                Actor::Queue(queue) => self.arrive(queue),
                Actor::Task { operation, task } if self.step(operation, task) => finished(self, operation),
                Actor::Task { .. } => {}
            }
        }
        let stuck = self.stuck();
        if stuck.is_empty() { Ok(()) } else { Err(stuck) }
    }

    /// What the world came to in an operation that is over; what its rank agreed to so far in another.
    pub fn result(&self, operation: usize) -> Option<&Result<(), Error>> {
        self.operations[operation].op.result()
    }

    /// The rows, and the weights where asked for, that a combine has delivered.
    pub fn combined(&self, operation: usize) -> Combined {
        let (rows, weights): (Vec<_>, Vec<_>) = self.operations[operation].combined.values().cloned().unzip();
        (rows.concat(), weights.concat())
    }

    /// The collective reset: whatever is under way is gone, signals arrive again, and a new generation starts
    /// on the memory as it lies there.
    pub fn reset(&mut self) {
        self.generation += 1;
        self.agenda.clear();
        self.lost.clear();
        self.queues.iter_mut().for_each(|queue| queue.events.clear());
        for rank in &mut self.ranks {
            (rank.epoch, rank.turns, rank.lanes) = Default::default();
        }
    }

    /// Makes every sleeping task of `rank` look again.
    fn wake(&mut self, rank: usize) {
        for id in self.ranks[rank].active() {
            for task in 0..self.operations[id].tasks.len() {
                if let State::Asleep(_) = self.operations[id].tasks[task].1 {
                    self.schedule(id, task);
                }
            }
        }
    }

    fn schedule(&mut self, operation: usize, task: usize) {
        let Operation { op, tasks, .. } = &mut self.operations[operation];
        tasks[task].1 = State::Due;
        let rank = &self.ranks[op.rank];
        let due = rank.stalled_until.max(self.now + self.rng.delay(rank.pace));
        self.agenda.push(Reverse((due, Actor::Task { operation, task })));
    }

    /// Steps a task; whether its operation is over with it.
    fn step(&mut self, id: usize, task: usize) -> bool {
        let Operation { op, tasks, input, combined } = &mut self.operations[id];
        let (rank, lane) = (op.rank, op.lane() as usize);
        let (sent, combined) = (RefCell::default(), RefCell::new(combined));
        let port = SimPort { ranks: &self.ranks, rank, input: input.as_deref(), sent, combined };
        let progress = tasks[task].0.step(&port);
        let sent = port.sent.into_inner();
        tasks[task].1 = match progress {
            Progress::Moved => State::Due,
            Progress::Blocked(wait) => State::Asleep(Some(wait)),
            Progress::Pending => State::Asleep(None),
            Progress::Done => State::Done,
        };
        let over = tasks.iter().all(|(_, state)| *state == State::Done);
        for (to, event) in sent {
            let tasks = 1 + self.config.channels();
            self.send(((rank * LANES.len() + lane) * tasks + task) * self.ranks.len() + to, event);
        }
        if progress == Progress::Moved {
            self.schedule(id, task);
        }
        if over {
            self.ranks[rank].lanes[lane].pop_front();
        }
        if matches!(progress, Progress::Moved | Progress::Done) {
            self.wake(rank);
        }
        if self.rng.below(256) == 0 {
            self.ranks[rank].stalled_until = self.now + self.rng.below(STALL);
        }
        over
    }

    fn send(&mut self, queue: usize, event: Event) {
        let events = &mut self.queues[queue].events;
        let idle = events.is_empty();
        match event {
            Event::Write { at, mut bytes } => {
                let tear = self.rng.below(2 * bytes.len() as u64) as usize;
                if (1..bytes.len()).contains(&tear) {
                    events.push_back(Event::Write { at: at + tear, bytes: bytes.split_off(tear) });
                }
                events.push_back(Event::Write { at, bytes });
            }
            signal => events.push_back(signal),
        }
        if idle {
            self.expect(queue);
        }
    }

    fn expect(&mut self, queue: usize) {
        let due = self.now + self.rng.delay(self.queues[queue].pace);
        self.agenda.push(Reverse((due, Actor::Queue(queue))));
    }

    /// One of the writes before the queue's next signal arrives, or that signal if there are none left.
    fn arrive(&mut self, index: usize) {
        let (to, events) = (index % self.ranks.len(), &mut self.queues[index].events);
        let writes = events.iter().take_while(|event| matches!(event, Event::Write { .. })).count();
        let next = self.rng.below(writes.max(1) as u64) as usize;
        let event = events.remove(next).expect("a queue is due only while it holds events");
        let more = !events.is_empty();
        match event {
            Event::Write { at, bytes } => self.region_mut(to)[at..at + bytes.len()].copy_from_slice(&bytes),
            Event::Signal { word, .. } if self.lost.contains(&(to, word)) => {}
            Event::Signal { word, value } => {
                self.ranks[to].memory[word / size_of::<u64>()] = value;
                self.wake(to);
            }
        }
        if more {
            self.expect(index);
        }
    }

    fn stuck(&self) -> Vec<Stuck> {
        let operations = self.ranks.iter().flat_map(Rank::active).map(|id| &self.operations[id]);
        let stuck = operations.flat_map(|operation| {
            let (rank, started) = (operation.op.rank, operation.op.started);
            operation.tasks.iter().filter_map(move |(_, state)| match *state {
                State::Asleep(wait) => Some(Stuck { rank, started, wait }),
                State::Due | State::Done => None,
            })
        });
        stuck.collect()
    }
}

impl Rank {
    /// The operations under way, one per lane.
    fn active(&self) -> impl Iterator<Item = usize> + use<> {
        self.lanes.each_ref().map(|lane| lane.front().copied()).into_iter().flatten()
    }
}

/// The port of one step: what the role publishes is kept aside until the step is over.
struct SimPort<'a> {
    ranks: &'a [Rank],
    rank: usize,
    input: Option<&'a [bf16]>,
    sent: RefCell<Vec<(usize, Event)>>,
    combined: RefCell<&'a mut BTreeMap<usize, Combined>>,
}

impl Port for SimPort<'_> {
    fn load(&self, word: usize) -> u64 {
        let own = &self.ranks[self.rank];
        let private = own.private.borrow().get(&word).copied();
        private.unwrap_or_else(|| own.memory[word / size_of::<u64>()])
    }

    fn set(&self, word: usize, value: u64) {
        self.ranks[self.rank].private.borrow_mut().insert(word, value);
    }

    fn signal(&self, rank: usize, word: usize, value: u64) {
        self.sent.borrow_mut().push((rank, Event::Signal { word, value }));
    }

    fn put(&self, rank: usize, mut offset: usize, parts: &[&[u8]]) {
        for part in parts {
            self.store(rank, offset, part);
            offset += part.len();
        }
    }

    fn store(&self, rank: usize, offset: usize, bytes: &[u8]) {
        self.sent.borrow_mut().push((rank, Event::Write { at: offset, bytes: bytes.to_vec() }));
    }

    fn own(&self, offset: usize, len: usize) -> &[u8] {
        self.peer(self.rank, offset, len)
    }

    fn peer(&self, rank: usize, offset: usize, len: usize) -> &[u8] {
        &bytemuck::cast_slice(&self.ranks[rank].memory)[offset..offset + len]
    }

    fn input(&self) -> Input<'_> {
        self.input.map_or(Input::None, Input::Bf16)
    }

    fn emit(&self, token: usize, row: &[bf16], weights: &[f32]) {
        let before = self.combined.borrow_mut().insert(token, (row.to_vec(), weights.to_vec()));
        assert!(before.is_none(), "token {token} was delivered twice");
    }
}

/// A small generator of seeded numbers (SplitMix64).
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// The numbers that follow from `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `bound`; 0 if `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((u128::from(mixed ^ (mixed >> 31)) * u128::from(bound)) >> 64) as u64
    }

    fn delay(&mut self, pace: u64) -> u64 {
        match self.below(64) {
            0 => self.below(STALL),
            _ => self.below(DELAY) * pace,
        }
    }
}
