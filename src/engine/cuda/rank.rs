//! One rank: its memory, streams, reports and proxy.

#![allow(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use bytemuck::bytes_of;

use super::poll;
use super::start::Run;
use crate::config::{Config, Cuda, Rails};
use crate::device::{Driver, Event, Grid, Kernel, Memory, Place, RawStream, Stream};
use crate::engine::completion::lock;
use crate::engine::control::Counted;
use crate::error::{ConfigError, DeviceError, Error};
use crate::fabric::mapped::Mapped;
use crate::fabric::proxy::{MERGE_BYTES, Patience, Proxy, ProxyThread};
use crate::fabric::rail::{DeviceRail, Inbox, Outbox, Rail, Reached, StagedRail};
use crate::numeric::ScaleFormat;
use crate::wire::device::{
    HandleMap, MailboxMap, PlanShared, PrivateMap, REPORTS, TableMap, WarpMap, expert_places,
};
use crate::wire::kernel::{Addresses, Maps};
use crate::wire::region::{LANES, Lane, RegionMap};
use crate::wire::shape::{RowFormat, RowShape};

/// Pinned memory for what goes by way of the host, at least.
const STAGING_BYTES: usize = 4 << 20;

/// One rank of this process. What kernels, the proxy and streams use is dropped after them.
pub struct Rank {
    proxy: Mutex<Option<ProxyThread>>,
    streams: [Stream; 2],
    transfers: Mutex<Stream>,
    lanes: [Mutex<LaneQueue>; 2],
    slots: Slots,
    /// A point in a caller's stream.
    pub(super) mark: Mutex<Event>,
    pub(super) rank: usize,
    pub(super) driver: Arc<dyn Driver>,
    pub(super) addresses: Addresses,
    config: Arc<Config>,
    region_map: Arc<RegionMap>,
    private_map: PrivateMap,
    pub(super) mailbox_map: MailboxMap,
    pub(super) mailbox: Mapped,
    /// A plan of no tokens for each lane, for operations whose input is invalid.
    blanks: Memory,
    region: Memory,
    private: Memory,
    _mailbox: Memory,
    tables: Memory,
}

/// What has been enqueued on a lane and is not known to be over, in order.
#[derive(Default)]
pub struct LaneQueue {
    pub runs: VecDeque<Arc<Run>>,
    /// Operations of this generation started by the host: on every rank the same ones, in the same order.
    pub started: u64,
    /// Where the last one was enqueued.
    pub stream: Option<RawStream>,
}

/// A report's place, and the event after the kernels that write it.
pub struct Slot {
    pub report: usize,
    pub event: Event,
}

/// The reports that no operation is using.
struct Slots {
    free: Mutex<Vec<Slot>>,
    given: Condvar,
}

impl Rank {
    /// Takes all memory of a rank that it will ever have.
    pub fn new(
        config: &Arc<Config>,
        region_map: &Arc<RegionMap>,
        rank: usize,
        driver: Arc<dyn Driver>,
    ) -> Result<Self, Error> {
        let private_map = PrivateMap::new(config, region_map);
        let mailbox_map = MailboxMap::new(config, rank);
        let memory = |place, bytes| Memory::new(&driver, place, bytes);
        let region = memory(Place::Shared, region_map.memory.region)?;
        let private = memory(Place::Device, private_map.bytes)?;
        let mailbox = memory(Place::Host, mailbox_map.bytes)?;
        let tables = memory(Place::Device, TableMap::new(config).bytes)?;
        let blanks = memory(Place::Device, LANES.len() * blank_bytes(config))?;
        // SAFETY: pinned memory of this rank, dropped after whoever has the copy that the proxy gets; words are
        // accessed atomically by kernels and host.
        let mapped = unsafe { Mapped::new(mailbox.address() as *mut u8, mailbox.bytes()) };
        let slot = |report| Ok(Slot { report, event: Event::new(&driver)? });
        let free = (0..REPORTS).map(slot).collect::<Result<Vec<_>, DeviceError>>()?;
        let maps = TableMap::new(config);
        let addresses = Addresses {
            region: region.address(),
            private: private.address(),
            mailbox: mailbox.address(),
            peers: tables.address() + maps.peers as u64,
            placement: tables.address() + maps.placement as u64,
        };
        Ok(Self {
            proxy: Mutex::new(None),
            streams: [Stream::new(&driver)?, Stream::new(&driver)?],
            transfers: Mutex::new(Stream::new(&driver)?),
            lanes: Default::default(),
            mark: Mutex::new(Event::new(&driver)?),
            slots: Slots { free: Mutex::new(free), given: Condvar::new() },
            rank,
            driver,
            addresses,
            config: config.clone(),
            region_map: region_map.clone(),
            private_map,
            mailbox_map,
            mailbox: mapped,
            blanks,
            region,
            private,
            _mailbox: mailbox,
            tables,
        })
    }

    /// Tells kernels where the regions of the node are, where all of them are in this process.
    pub fn connect_to(&self, ranks: &BTreeMap<usize, Self>) -> Result<(), Error> {
        let topology = self.config.topology();
        let node = topology.node_of(self.rank);
        let local = (0..topology.ranks_per_node()).map(|local| &ranks[&topology.rank(node, local)]);
        let peers = local.map(|peer| peer.region.reached_by(&*self.driver));
        self.connect(&peers.collect::<Result<Vec<u64>, _>>()?)
    }

    /// Tells kernels where the regions of the node are: addresses by local rank.
    pub fn connect(&self, peers: &[u64]) -> Result<(), Error> {
        let (map, table) = (TableMap::new(&self.config), self.tables.address());
        let places = expert_places(&self.config);
        // SAFETY: nothing runs yet; both tables are as large as what goes there.
        unsafe {
            self.upload(table + map.peers as u64, bytemuck::cast_slice(peers))?;
            self.upload(table + map.placement as u64, bytemuck::cast_slice(&places))
        }
    }

    /// What the node reaches.
    pub fn region(&self) -> &Memory {
        &self.region
    }

    /// What its kernels alone touch, but for what carries hop 1.
    pub fn private(&self) -> &Memory {
        &self.private
    }

    /// Starts a generation: whatever kernels and proxy have left is wiped, and a new proxy begins on `rail`, where there
    /// is one, on one of `cores`, if there are any.
    pub fn open(&self, generation: u16, rail: Option<Box<dyn Rail>>, cores: &[usize]) -> Result<(), Error> {
        let map = &self.private_map;
        // SAFETY: no kernel and no proxy of this rank runs, and nobody else touches its private memory.
        unsafe {
            self.upload(self.addresses.private, &vec![0; map.send_rings])?;
            for (at, turn) in map.first_turns(&self.config) {
                self.upload(self.addresses.private + at as u64, bytes_of(&turn))?;
            }
        }
        self.mailbox.clear(0, self.mailbox_map.bytes);
        // Ranks may have come to the reset with different numbers.
        self.lanes.iter().for_each(|lane| lock(lane).started = 0);
        let Some(rail) = rail else { return Ok(()) };
        let proxy = self.proxy(generation, rail)?;
        let core = (!cores.is_empty()).then(|| cores[self.rank % cores.len()]);
        *lock(&self.proxy) = Some(ProxyThread::spawn(proxy, Patience::default(), core)?);
        Ok(())
    }

    fn proxy(&self, generation: u16, rail: Box<dyn Rail>) -> Result<Proxy<Box<dyn Rail>>, ConfigError> {
        let (config, map) = (self.config.clone(), self.region_map.clone());
        Proxy::new(config, map, self.rank, generation, self.mailbox, rail)
    }

    /// The ranks on the other end of the rail.
    fn rail_peers<'a>(&self, ranks: &'a BTreeMap<usize, Self>) -> impl Iterator<Item = &'a Self> + use<'a> {
        let topology = self.config.topology();
        let (own, local) = (topology.node_of(self.rank), topology.local_of(self.rank));
        let nodes = (0..topology.nodes()).filter(move |&node| node != own);
        nodes.map(move |node| &ranks[&topology.rank(node, local)])
    }

    /// A rail between ranks of this process.
    pub fn rail(&self, ranks: &BTreeMap<usize, Self>, rails: Rails) -> Result<Box<dyn Rail>, Error> {
        if rails == Rails::Any {
            match self.device_rail(ranks) {
                Err(DeviceError::Unsupported { what, .. }) => {
                    tracing::info!(rank = self.rank, what, "the rail goes by way of the host");
                }
                rail => return Ok(Box::new(rail?)),
            }
        }
        Ok(Box::new(self.staged_rail(ranks)?))
    }

    fn device_rail(&self, ranks: &BTreeMap<usize, Self>) -> Result<DeviceRail, DeviceError> {
        let mut regions = vec![None; ranks.len()];
        for peer in self.rail_peers(ranks) {
            let address = peer.region.reached_by(&*self.driver)?;
            regions[peer.rank] = Some(Reached { address, bytes: peer.region.bytes() });
        }
        // SAFETY: the rail goes with the proxy, which is stopped before any rank's memory is freed; what kernels
        // post keeps to the protocol.
        unsafe { DeviceRail::new(&self.driver, (&self.private).into(), regions) }
    }

    fn staged_rail(&self, ranks: &BTreeMap<usize, Self>) -> Result<StagedRail, DeviceError> {
        let mut inboxes: Vec<_> = ranks.keys().map(|_| None).collect();
        for peer in self.rail_peers(ranks) {
            // SAFETY: as for the rail between devices.
            inboxes[peer.rank] = Some(unsafe { Inbox::new(&peer.driver, (&peer.region).into())? });
        }
        // The largest put is a chunk of the largest slots, or a rail record; merged ones are no larger than a chunk may
        // be, or than they are merged to.
        let chunk = self.config.ring_slots()
            * LANES.map(|lane| self.region_map.max_pitch(lane)).into_iter().max().unwrap_or(0);
        let bytes = (2 * chunk.max(self.region_map.rail_bytes()).max(MERGE_BYTES)).max(STAGING_BYTES);
        // SAFETY: as above.
        let outbox = unsafe { Outbox::new(&self.driver, (&self.private).into(), bytes)? };
        Ok(StagedRail::new(outbox, inboxes))
    }

    /// Ends a generation: lets the proxy do what was asked of it, for `limit` at most, and stops it.
    pub fn close(&self, limit: Duration) -> Result<(), String> {
        let Some(proxy) = lock(&self.proxy).take() else { return Ok(()) };
        proxy.wake();
        let quiet = proxy.quiet_steps() + 2;
        let settled = poll(limit, || proxy.quiet_steps() >= quiet || proxy.failure().is_some());
        proxy.stop().map_err(|error| error.to_string())?;
        if settled { Ok(()) } else { Err("it did not come to its end".into()) }
    }

    /// Why the proxy has stopped, if it has.
    pub fn proxy_failure(&self) -> Option<String> {
        lock(&self.proxy).as_ref().and_then(|proxy| proxy.failure().map(ToString::to_string))
    }

    /// Commands are about to come.
    pub fn wake_proxy(&self) {
        if let Some(proxy) = &*lock(&self.proxy) {
            proxy.wake();
        }
    }

    /// Tells the rank's kernels to return.
    pub fn abort(&self) {
        let flag = self.mailbox.flag(self.mailbox_map.abort).expect("in the map");
        flag.store(1, Ordering::Release);
    }

    pub fn maps(&self) -> Maps<'_> {
        let (private, mailbox) = (&self.private_map, &self.mailbox_map);
        Maps { config: &self.config, region: &self.region_map, private, mailbox }
    }

    pub fn lane(&self, lane: Lane) -> &Mutex<LaneQueue> {
        &self.lanes[lane as usize]
    }

    pub fn stream(&self, lane: Lane) -> RawStream {
        self.streams[lane as usize].raw()
    }

    /// The plan of no tokens of a lane: where it lies.
    pub fn blank(&self, lane: Lane) -> u64 {
        self.blanks.address() + (lane as usize * blank_bytes(&self.config)) as u64
    }

    /// The run of a lane that ends next.
    pub fn first_run(&self, lane: Lane) -> Option<Arc<Run>> {
        lock(self.lane(lane)).runs.front().cloned()
    }

    /// Forgets it.
    pub fn drop_first_run(&self, lane: Lane) {
        // What it keeps is dropped after the lock.
        let _over = lock(self.lane(lane)).runs.pop_front();
    }

    /// Operations started in this generation, by lane.
    pub fn started(&self) -> Counted {
        LANES.map(|lane| lock(self.lane(lane)).started)
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.lanes.iter().all(|lane| lock(lane).runs.is_empty())
    }

    /// Breaks the cycle of runs that are never taken: what they keep holds the world.
    pub fn forget_runs(&self) {
        self.lanes.iter().for_each(|lane| lock(lane).runs.clear());
    }

    /// A report that no other operation uses; it says that its operation is under way.
    ///
    /// # Errors
    /// None becomes free in time.
    pub fn take_slot(&self, limit: Duration) -> Result<Slot, DeviceError> {
        let free = lock(&self.slots.free);
        let waited = self.slots.given.wait_timeout_while(free, limit, |free| free.is_empty());
        let (mut free, _) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        let reason = "no report has become free within the deadline";
        let slot = free.pop().ok_or_else(|| DeviceError::Call { call: "start", reason: reason.into() })?;
        self.expect_report(slot.report);
        Ok(slot)
    }

    pub fn give_slot(&self, slot: Slot) {
        lock(&self.slots.free).push(slot);
        self.slots.given.notify_one();
    }

    /// Copies now.
    ///
    /// # Safety
    /// As for [`Driver::copy`], until the call returns.
    pub unsafe fn transfer(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's.
        unsafe { lock(&self.transfers).copy_now(to, from, bytes) }.map_err(Error::from)
    }

    /// Copies from the host now.
    ///
    /// # Safety
    /// Nobody else touches the target.
    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), Error> {
        // SAFETY: the caller's.
        unsafe { self.transfer(to, from.as_ptr() as u64, from.len()) }
    }
}

/// Bytes of a plan of no tokens.
fn blank_bytes(config: &Config) -> usize {
    HandleMap::new(config, 0, config.max_topk, 0).bytes
}

/// The grids of the kernels of an operation, for rows of `shape`.
pub struct Grids {
    pub plan: Grid,
    pub rows: Grid,
    pub warp: WarpMap,
}

impl Grids {
    pub fn new(config: &Config, cuda: &Cuda, lane: Lane, shape: &RowShape) -> Self {
        let staging = if lane == Lane::Dispatch { cuda.dispatch } else { cuda.combine };
        let warp = WarpMap::new(config, lane, staging, shape);
        let shared = PlanShared::bytes(config, cuda.plan_warps);
        Self {
            plan: Grid { blocks: 1, warps: cuda.plan_warps, shared },
            rows: Grid { blocks: cuda.blocks, warps: cuda.warps, shared: cuda.warps * warp.bytes as usize },
            warp,
        }
    }
}

/// Makes kernels ready for the largest rows, and sees that all blocks of this process which wait for each other run at the
/// same time. Each of its ranks has a driver.
pub fn check_devices(config: &Config, cuda: &Cuda, drivers: &[Arc<dyn Driver>]) -> Result<(), Error> {
    let widest = |format| RowShape { hidden: config.max_hidden, topk: config.max_topk, format };
    let mut ranks = BTreeMap::<u64, usize>::new();
    drivers.iter().for_each(|driver| *ranks.entry(driver.limits().device).or_default() += 1);
    for driver in drivers {
        let limits = driver.limits();
        let mut resident = usize::MAX;
        for (lane, kernel) in [(Lane::Dispatch, Kernel::Dispatch), (Lane::Combine, Kernel::Combine)] {
            let plain = Grids::new(config, cuda, lane, &widest(RowFormat::Bf16));
            for grid in [plain.plan, plain.rows] {
                check_shared(grid, limits.shared)?;
            }
            // Rows with scales take more. Whether that fits is seen when there are any.
            let scaled = Grids::new(config, cuda, lane, &widest(RowFormat::Fp8(ScaleFormat::F32)));
            let most = Grid { shared: scaled.rows.shared.min(limits.shared), ..scaled.rows };
            driver.prepare(Kernel::Plan, plain.plan)?;
            resident = resident.min(driver.prepare(kernel, most)?);
        }
        let here = ranks[&limits.device];
        // A plan's block comes before its lane's others, and is gone by then.
        let (device, blocks) = (limits.name.clone(), concurrent_lanes(cuda).len() * cuda.blocks);
        if here * blocks > resident {
            return Err(DeviceError::NotResident { device, ranks: here, blocks, resident }.into());
        }
        // Each lane has a stream, and so have transfers and the rail.
        let streams = here * (LANES.len() + 2);
        if here > 1 && streams > limits.connections {
            let what = format!(
                "{here} ranks have {streams} streams, and its connections are {}: set \
                 CUDA_DEVICE_MAX_CONNECTIONS to {streams} or more (32 at most)",
                limits.connections
            );
            return Err(DeviceError::Unsupported { device, what }.into());
        }
    }
    Ok(())
}

/// The lanes that may run at the same time.
pub fn concurrent_lanes(cuda: &Cuda) -> &'static [Lane] {
    if cuda.overlap { &LANES } else { &LANES[..1] }
}

/// A block of `grid` gets its shared memory.
pub fn check_shared(grid: Grid, most: usize) -> Result<(), ConfigError> {
    if grid.shared <= most {
        return Ok(());
    }
    let reason = format!("a block needs {} bytes of shared memory, the device has {most}", grid.shared);
    let nearest = Some((grid.warps * most / grid.shared) as u64).filter(|&warps| warps > 0);
    Err(ConfigError { field: "warps", value: grid.warps as u64, reason, nearest })
}
