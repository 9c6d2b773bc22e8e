//! Kernels on the CPU shim: machines whose ranks run the kernels' own source, driven as the CUDA engine drives a
//! device.

#![allow(dead_code, reason = "every test file takes what it needs")]
#![allow(unsafe_code, reason = "the shim is C++, bound by hand")]

mod driver;
mod library;
mod memory;

#[allow(unused_imports, reason = "not every test file has engines")]
pub use driver::{drivers, drivers_with, limits};
#[allow(unused_imports, reason = "few test files need CUDA")]
pub use library::cuda_folder;
pub use library::{Grid, Options, Shim, Traffic};
pub use memory::Memory;

use std::ffi::c_void;
use std::sync::Arc;

use bytemuck::Pod;
use railhop::Config;
use railhop::error::{Kind, Reason};
use railhop::wire::command::Command;
use railhop::wire::device::{
    FaultRecord, HandleMap, LaneState, MailboxMap, PlanShared, PrivateMap, Report, Staging, WarpMap,
    expert_places,
};
use railhop::wire::kernel::{Addresses, Input, Maps, Operation, Params};
use railhop::wire::record::VerdictRecord;
use railhop::wire::region::{Lane, RegionMap, WordId};
use railhop::wire::shape::{RecvLayout, RecvParts, RowShape};

use library::ShimPosting;

/// Commands that fit a queue here: so few that queues are full now and then, and go through many laps.
const QUEUE: usize = 8;

/// How kernels are launched.
#[derive(Debug, Clone, Copy)]
pub struct Launch {
    /// The SM budget.
    pub blocks: usize,
    pub warps: usize,
    pub dispatch: Staging,
    pub combine: Staging,
}

impl Default for Launch {
    fn default() -> Self {
        let dispatch = Staging { stage_bytes: 512, stages: 4 };
        Self { blocks: 2, warps: 4, dispatch, combine: Staging { stage_bytes: 1024, stages: 4 } }
    }
}

/// One rank's memory on its device.
pub struct Device {
    pub region: Memory,
    pub private: Memory,
    pub mailbox: Memory,
    peers: Memory,
    placement: Memory,
    /// Ids of region and private memory in the shim.
    pub ids: (u32, u32),
    /// Bytes of the pool lent.
    lent: usize,
}

/// A plan on a device.
pub struct Plan {
    pub map: HandleMap,
    pub memory: Arc<Memory>,
    pub tokens: usize,
}

/// What is started at a rank.
pub struct Start<'a> {
    pub kind: Kind,
    pub shape: RowShape,
    pub plan: &'a Plan,
    /// Experts and weights, for what plans.
    pub routing: Option<(u64, u64)>,
    pub input: Input,
    pub weights: usize,
    pub poison: Option<Reason>,
    pub buffer: (usize, RecvParts),
}

/// A world on a simulated machine. The shim is dropped before the memory it was told of.
pub struct Machine {
    shim: Shim,
    pub config: Arc<Config>,
    pub map: Arc<RegionMap>,
    pub private_map: PrivateMap,
    pub mailbox_maps: Vec<MailboxMap>,
    pub devices: Vec<Device>,
    pub generation: u16,
    pub launch: Launch,
    /// What proxies know; their addresses were given away.
    proxies: Vec<Arc<Proxy>>,
    /// Whatever kernels may still read.
    kept: Vec<(u32, Arc<Memory>)>,
}

struct Proxy {
    config: Arc<Config>,
    map: Arc<RegionMap>,
    private_map: PrivateMap,
    mailbox_map: MailboxMap,
    generation: u16,
    rank: usize,
    private: u64,
    mailbox: u64,
    regions: Vec<u64>,
}

unsafe extern "C" fn resolve(context: *mut c_void, _: u32, first: u64, second: u64, out: *mut ShimPosting) {
    // SAFETY: the context is a `Proxy` of the machine that owns the shim; `out` is the shim's to be filled.
    let (proxy, out) = unsafe { (&*context.cast::<Proxy>(), &mut *out) };
    let Proxy { config, map, private_map, mailbox_map, .. } = proxy;
    let maps = Maps { config, region: map, private: private_map, mailbox: mailbox_map };
    let posting = Command::read([first, second]).posting(maps, proxy.rank, proxy.generation);
    let peer = proxy.regions[posting.peer];
    *out = ShimPosting {
        peer: posting.peer as u32,
        queue: posting.queue as u32,
        src: (proxy.private + posting.source as u64) as *const c_void,
        dst: (peer + posting.target as u64) as *mut c_void,
        bytes: posting.bytes as u64,
        word: (peer + posting.word as u64) as *mut u64,
        value: posting.value.0,
        completion: posting
            .completion
            .map_or(std::ptr::null_mut(), |at| (proxy.mailbox + at as u64) as *mut u64),
        completed: posting.value.0,
    };
}

impl Machine {
    pub fn new(config: &Config, seed: u64) -> Self {
        Self::with_options(config, Options { seed, ..Options::default() })
    }

    pub fn with_options(config: &Config, options: Options) -> Self {
        let topology = config.topology();
        let (config, map) = (Arc::new(config.clone()), Arc::new(RegionMap::new(config)));
        let tsan_per_warp = u32::from(std::env::var("RAILHOP_TSAN_PER_WARP").is_ok_and(|value| value == "1"));
        let ranks_per_node = topology.ranks_per_node() as u32;
        let shim = Shim::new(Options { ranks_per_node, tsan_per_warp, ..options });
        let private_map = PrivateMap::new(&config, &map);
        let mailbox_maps: Vec<_> =
            (0..topology.world_size()).map(|rank| MailboxMap::new(&config, rank)).collect();
        let regions: Vec<_> = mailbox_maps.iter().map(|_| Memory::new(map.memory.region)).collect();
        let addresses: Vec<u64> = regions.iter().map(Memory::address).collect();
        let places = expert_places(&config);
        let device = |(rank, region): (usize, Memory)| {
            let node = topology.node_of(rank) * topology.ranks_per_node();
            Device {
                region,
                private: Memory::new(private_map.bytes),
                mailbox: Memory::new(mailbox_maps[rank].bytes),
                peers: Memory::of(&addresses[node..node + topology.ranks_per_node()]),
                placement: Memory::of(&places),
                ids: (0, 0),
                lent: 0,
            }
        };
        let devices = regions.into_iter().enumerate().map(device).collect();
        let mut machine = Self {
            shim,
            config,
            map,
            private_map,
            mailbox_maps,
            devices,
            generation: 1,
            launch: Launch::default(),
            proxies: Vec::new(),
            kept: Vec::new(),
        };
        machine.register();
        machine.set_turns();
        machine
    }

    fn register(&mut self) {
        let regions: Vec<u64> = self.devices.iter().map(|device| device.region.address()).collect();
        for (rank, device) in self.devices.iter_mut().enumerate() {
            let add = |memory: &Memory, shared| {
                self.shim.memory(rank, memory.address(), memory.bytes().len(), shared)
            };
            device.ids = (add(&device.region, true), add(&device.private, false));
            add(&device.mailbox, true);
            add(&device.peers, false);
            add(&device.placement, false);
            let mailbox_map = self.mailbox_maps[rank].clone();
            let (queue, taken) = (mailbox_map.queue as u64, mailbox_map.taken as u64);
            let proxy = Arc::new(Proxy {
                config: self.config.clone(),
                map: self.map.clone(),
                private_map: self.private_map.clone(),
                mailbox_map,
                generation: self.generation,
                rank,
                private: device.private.address(),
                mailbox: device.mailbox.address(),
                regions: regions.clone(),
            });
            let context = Arc::as_ptr(&proxy).cast_mut().cast();
            let mailbox = device.mailbox.address();
            // SAFETY: `resolve` takes a `Proxy`; the machine keeps it, and drops the shim first.
            unsafe { self.shim.proxy(rank, (mailbox + queue, QUEUE), mailbox + taken, resolve, context) };
            self.proxies.push(proxy);
        }
    }

    /// Turns start at the first index.
    fn set_turns(&mut self) {
        let turns = self.private_map.first_turns(&self.config);
        for device in &mut self.devices {
            turns.into_iter().for_each(|(at, turn)| device.private.write(at, &[turn]));
        }
    }

    pub fn maps(&self, rank: usize) -> Maps<'_> {
        let (private, mailbox) = (&self.private_map, &self.mailbox_maps[rank]);
        Maps { config: &self.config, region: &self.map, private, mailbox }
    }

    /// Memory that kernels of `rank` may read and write as long as the machine lives; its address.
    pub fn keep<T: Pod>(&mut self, rank: usize, values: &[T]) -> u64 {
        self.adopt(rank, Memory::of(values)).address()
    }

    /// The shim knows memory by its address for ever, so it is never given back.
    fn adopt(&mut self, rank: usize, memory: Memory) -> Arc<Memory> {
        let id = self.shim.memory(rank, memory.address(), memory.bytes().len(), false);
        self.kept.push((id, Arc::new(memory)));
        self.kept.last().expect("just pushed").1.clone()
    }

    fn kept_at(&self, address: u64) -> usize {
        self.kept.iter().position(|(_, memory)| memory.address() == address).expect("kept memory")
    }

    /// The shim's id of memory that `keep` gave.
    pub fn id_of(&self, address: u64) -> u32 {
        self.kept[self.kept_at(address)].0
    }

    pub fn traffic_of(&self, address: u64, what: Traffic) -> usize {
        self.shim.traffic(self.id_of(address), what)
    }

    /// Overwrites memory that `keep` gave.
    pub fn rewrite<T: Pod>(&mut self, address: u64, values: &[T]) {
        let at = self.kept_at(address);
        Arc::get_mut(&mut self.kept[at].1).expect("nobody else's").write(0, values);
    }

    /// What lies in memory that `keep` gave.
    pub fn kept<T: Pod>(&self, address: u64, len: usize) -> Vec<T> {
        self.kept[self.kept_at(address)].1.slice(0, len)
    }

    pub fn plan(&mut self, rank: usize, tokens: usize, topk: usize, forwarded: usize) -> Plan {
        let map = HandleMap::new(&self.config, tokens, topk, forwarded);
        let memory = self.adopt(rank, Memory::new(map.bytes));
        Plan { map, memory, tokens }
    }

    /// A buffer from the pool, never lent again: its offset.
    pub fn buffer(&mut self, rank: usize, shape: RowShape, capacity: usize) -> (usize, RecvLayout) {
        let layout = RecvLayout::new(shape, capacity);
        let device = &mut self.devices[rank];
        let offset = self.map.pool + device.lent;
        device.lent += layout.bytes.next_multiple_of(128);
        assert!(device.lent <= self.map.memory.pool, "the pool is too small");
        (offset, layout)
    }

    /// The parameters of an operation.
    pub fn params(&self, rank: usize, start: &Start<'_>) -> Params {
        let (device, lane) = (&self.devices[rank], Lane::of(start.kind));
        let staging = if lane == Lane::Dispatch { self.launch.dispatch } else { self.launch.combine };
        let (topk_idx, topk_weights) = start.routing.unwrap_or_default();
        let operation = Operation {
            kind: start.kind,
            rank,
            generation: self.generation,
            shape: start.shape,
            tokens: start.plan.tokens,
            topk_idx,
            topk_weights,
            input: start.input,
            weights: start.weights,
            poison: start.poison,
            capacity: start.buffer.0,
            parts: start.buffer.1,
            handle: (&start.plan.map, start.plan.memory.address()),
            warp: WarpMap::new(&self.config, lane, staging, &start.shape),
            report: lane as usize,
        };
        let addresses = Addresses {
            region: device.region.address(),
            private: device.private.address(),
            mailbox: device.mailbox.address(),
            peers: device.peers.address(),
            placement: device.placement.address(),
        };
        Params { queue_capacity: QUEUE as u64, ..Params::new(self.maps(rank), &addresses, &operation) }
    }

    /// Queues the kernels of an operation.
    pub fn start(&self, rank: usize, start: &Start<'_>) {
        let params = self.params(rank, start);
        self.enqueue(rank, start.kind, &params);
    }

    /// Queues the kernels of an operation again, as a replayed graph does: with the same parameters.
    pub fn enqueue(&self, rank: usize, kind: Kind, params: &Params) {
        let lane = Lane::of(kind);
        let Launch { blocks, warps, .. } = self.launch;
        let shared = PlanShared::bytes(&self.config, warps);
        self.shim.launch(rank, lane as usize, "plan", Grid { blocks: 1, warps, shared }, params);
        let grid = Grid { blocks, warps, shared: warps * params.warp.bytes as usize };
        match kind {
            Kind::Plan => {}
            Kind::Dispatch | Kind::PlanDispatch => {
                self.shim.launch(rank, lane as usize, "dispatch", grid, params)
            }
            Kind::Combine => self.shim.launch(rank, lane as usize, "combine", grid, params),
        }
    }

    pub fn run(&self) -> Result<(), String> {
        self.shim.run()
    }

    pub fn shim(&self) -> &Shim {
        &self.shim
    }

    /// Loses all signals of a word of `rank` from now on.
    pub fn lose(&self, rank: usize, lane: Lane, word: WordId) {
        self.shim.lose(self.devices[rank].region.address() + self.map.word(lane, word) as u64);
    }

    pub fn report(&self, rank: usize, lane: Lane) -> Report {
        self.devices[rank].mailbox.read(self.mailbox_maps[rank].reports[lane as usize].report)
    }

    /// Entries for each expert of the rank, as the last plan counted them.
    pub fn experts(&self, rank: usize) -> Vec<u32> {
        let at = self.mailbox_maps[rank].reports[Lane::Dispatch as usize].experts;
        self.devices[rank].mailbox.slice(at, self.config.placement().experts_of(rank).len())
    }

    pub fn verdicts(&self, rank: usize, lane: Lane) -> Vec<VerdictRecord> {
        let at = self.mailbox_maps[rank].reports[lane as usize].verdicts;
        self.devices[rank].mailbox.slice(at, self.config.topology().nodes())
    }

    pub fn fault(&self, rank: usize) -> Option<FaultRecord> {
        let record: FaultRecord = self.devices[rank].mailbox.read(self.mailbox_maps[rank].fault);
        (record.written != 0).then_some(record)
    }

    /// The index that the last operation of a lane ended with.
    pub fn turn(&self, rank: usize, lane: Lane) -> u64 {
        let state: LaneState = self.devices[rank].private.read(self.private_map.lanes[lane as usize].state);
        state.turn
    }
}
