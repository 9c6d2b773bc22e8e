//! Memory of a rank on a device beside its region: every offset and size from one pass, as for the region.
//!
//! - *Private* memory is touched by the rank's kernels alone, but for what a NIC reads of it (outboxes, send rings).
//! - The *mailbox* lies in host-visible memory: commands, completions, reports, the fault record.
//! - A *handle* holds one plan.
//! - Each warp's share of *shared memory* is laid out by [`WarpMap`].

use super::record::{EnterRecord, RailRecord, ReasonRecord, VerdictRecord};
use super::region::{LANES, Lane, RegionMap, WordId};
use super::render::{device_codes, device_struct};
use super::shape::{RowShape, header_words};
use super::word::Index;
use super::{LINE, align_up};
use crate::config::Config;
pub use crate::config::Staging;
use crate::error::{Kind, Role, Wait};

device_struct! {
    /// A table of equal things in memory: entry (i, j) is at `at + i * outer + j * inner`.
    Table {
        /// Entry (0, 0).
        pub at: u64,
        /// Bytes from (i, j) to (i + 1, j).
        pub outer: u64,
        /// Bytes from (i, j) to (i, j + 1).
        pub inner: u64,
    }
}

impl Table {
    /// The table whose entry (i, j) is at `place(i, j)`, which is linear in both.
    pub fn of(place: impl Fn(usize, usize) -> usize) -> Self {
        let at = place(0, 0);
        Self { at: at as u64, outer: (place(1, 0) - at) as u64, inner: (place(0, 1) - at) as u64 }
    }

    /// The same table in memory that starts at `address`.
    pub fn from(self, address: u64) -> Self {
        Self { at: self.at + address, ..self }
    }
}

device_struct! {
    /// What the kernels of both lanes of a rank share.
    RankState {
        /// Not 0 once a warp of this rank has reported a fault: all roles drain and return.
        pub faulted: u32,
        /// Keeps what follows aligned.
        pub reserved: u32,
        /// Commands reserved in the queue so far.
        pub commands: u64,
    }
}

device_struct! {
    /// One lane of a rank between and during operations. Only kernels advance it.
    LaneState {
        /// Number of the next operation, modulo 2^48.
        pub turn: u64,
        /// Lowest index of an entry of `topk_idx` that is no expert; all ones if there is none.
        pub invalid: u64,
        /// Why this rank's input is invalid, as its records say.
        pub poison: ReasonRecord,
        /// Whether the node's verdict is good (E3).
        pub node_good: u32,
        /// Whether the world's verdict is good (E4).
        pub world_good: u32,
        /// Warps that are done with the operation.
        pub finished: u32,
        /// Keeps the size a multiple of 8.
        pub reserved: u32,
    }
}

device_struct! {
    /// A plan, ahead of its tables.
    HandleState {
        /// Number of the operation that made it.
        pub plan: u64,
        /// Not 0 once its rows have been dispatched, so that combine knows where they are.
        pub dispatched: u32,
        /// Tokens of the plan's rank.
        pub tokens: u32,
        /// Slots this rank puts on the rail, over all nodes.
        pub sent: u32,
        /// Slots that come to it along the rail.
        pub forwarded: u32,
        /// Its tokens that its own node wants.
        pub own: u32,
        /// Keeps the size a multiple of 8.
        pub reserved: u32,
    }
}

device_struct! {
    /// A row of a token at a rank of the own node; `local` is all ones for no row.
    FinalRow {
        /// The local rank.
        pub local: u32,
        /// The row in its receive buffer.
        pub row: u32,
    }
}

device_struct! {
    /// Where an expert is.
    ExpertPlace {
        /// Its rank's node.
        pub node: u32,
        /// Its rank's index in the node.
        pub local: u32,
        /// Its index among its rank's experts.
        pub index: u32,
        /// Its position in the expert part of the node's count block.
        pub slot: u32,
    }
}

device_struct! {
    /// What a kernel tells the host of a lane's operations.
    Report {
        /// Operations whose counts are known: rows and entries per expert can be read.
        pub planned: u64,
        /// Operations that have ended: the status can be read.
        pub ended: u64,
        /// Rows this rank receives.
        pub rows: u64,
        /// See `status`.
        pub status: u32,
        /// Slots this rank puts on the rail in a dispatch.
        pub sent: u32,
    }
}

impl Report {
    /// What `ended` holds until the operation has: no index is so large.
    pub const UNDER_WAY: u64 = u64::MAX;
}

device_codes! {
    /// How an operation ended.
    status {
        /// It is complete.
        OK = 1,
        /// A verdict was bad; the verdicts of all nodes say why.
        REFUSED = 2,
        /// A fault ended it.
        FAULT = 3,
    }
}

device_struct! {
    /// The first fault that a warp of the rank met, and what it waited for.
    FaultRecord {
        /// Not 0 once the rest is written.
        pub written: u32,
        /// Lane of the operation.
        pub lane: u32,
        /// Kind of operation.
        pub kind: u32,
        /// See `role`.
        pub role: u32,
        /// Channel; all ones for none.
        pub channel: u32,
        /// The rank that must move first.
        pub peer: u32,
        /// See `waits`.
        pub what: u32,
        /// Keeps what follows aligned.
        pub reserved: u32,
        /// Number of the operation on its lane.
        pub epoch: u64,
        /// The index that would end the wait.
        pub expected: u64,
        /// The index seen last.
        pub seen: u64,
    }
}

impl FaultRecord {
    /// The kind of operation and what was waited for.
    pub fn read(&self) -> (Kind, Wait) {
        let role = match self.role {
            role::SENDER => Role::Sender,
            role::FORWARDER => Role::Forwarder,
            role::REDUCER => Role::Reducer,
            _ => Role::Receiver,
        };
        let channel = (self.channel != u32::MAX).then_some(self.channel as usize);
        let (peer, what) = (self.peer as usize, wait_name(self.what));
        let wait = Wait { role, channel, peer, what, expected: self.expected, seen: self.seen };
        (Kind::from_code(self.kind).unwrap_or(Kind::Plan), wait)
    }
}

device_codes! {
    /// What a warp does.
    role {
        /// Enter, counts, verdicts, arrivals.
        RECEIVER = 0,
        /// Puts tokens on the rail.
        SENDER = 1,
        /// Moves arrived tokens to their final rows; in combine sums a node's rows for the rail.
        FORWARDER = 2,
        /// Sums the nodes' partial sums at home.
        REDUCER = 3,
    }
}

device_codes! {
    /// What is waited for.
    waits {
        /// An enter record.
        ENTER = 0,
        /// The counts gathered by a local rank.
        GATHERED = 1,
        /// A rail record.
        RAIL = 2,
        /// A verdict.
        VERDICT = 3,
        /// Arrivals.
        DONE = 4,
        /// A tail.
        TAIL = 5,
        /// Credit.
        HEAD = 6,
        /// The local completion of a put.
        COMPLETION = 7,
        /// Room in the command queue.
        COMMANDS = 8,
        /// A bulk copy of the warp's own.
        COPY = 9,
    }
}

/// What a wait is called in faults.
fn wait_name(code: u32) -> &'static str {
    match code {
        waits::ENTER => WordId::Enter { local: 0 }.name(),
        waits::GATHERED => WordId::Gathered { local: 0 }.name(),
        waits::RAIL => WordId::Rail { node: 0 }.name(),
        waits::VERDICT => WordId::Verdict { node: 0 }.name(),
        waits::DONE => WordId::Done { local: 0, channel: 0 }.name(),
        waits::TAIL => WordId::Tail { channel: 0, node: 0 }.name(),
        waits::HEAD => WordId::Head { channel: 0, node: 0 }.name(),
        waits::COMPLETION => "completion of a put",
        waits::COMMANDS => "room in the command queue",
        _ => "bulk copy",
    }
}

/// Hands out consecutive lines.
#[derive(Default)]
struct Lines {
    end: usize,
}

impl Lines {
    fn take(&mut self, bytes: usize) -> usize {
        let start = self.end;
        self.end = align_up(start + bytes, LINE);
        start
    }
}

/// Offsets in a rank's private memory.
#[derive(Debug, Clone)]
pub struct PrivateMap {
    /// [`RankState`].
    pub rank: usize,
    /// By lane.
    pub lanes: [PrivateLane; 2],
    /// Count blocks of all source ranks, gathered from the node: `[world, words]`.
    pub gathered: usize,
    /// By source rank, whether its counts are believed: `u32 [world]`.
    pub agrees: usize,
    /// Send rings: the mirror of the rings in a region, from [`RegionMap::rings`] on.
    pub send_rings: usize,
    /// Size in bytes. It starts zeroed but for the [`PrivateMap::first_turns`].
    pub bytes: usize,
}

/// Offsets of one lane in private memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct PrivateLane {
    /// [`LaneState`].
    pub state: usize,
    /// By node, whether the pair with that rail peer is open (E2): `u32 [nodes]`.
    pub open: usize,
    /// Progress of each stream out of this rank in the current operation: `u32 [channels, nodes]`.
    pub outgoing: usize,
    /// Progress of each stream into this rank: `u32 [channels, nodes]`.
    pub incoming: usize,
    /// Rail records with their counts, for each node: `[nodes]` of [`RegionMap::rail_bytes`].
    pub rails: usize,
    /// The node's verdict.
    pub verdict: usize,
}

impl PrivateMap {
    /// The map for worlds of `config`, whose regions are laid out by `region`.
    pub fn new(config: &Config, region: &RegionMap) -> Self {
        let topology = config.topology();
        let (nodes, world) = (topology.nodes(), topology.world_size());
        let mut lines = Lines::default();
        let rank = lines.take(size_of::<RankState>());
        let lanes = LANES.map(|_| PrivateLane {
            state: lines.take(size_of::<LaneState>()),
            open: lines.take(4 * nodes),
            outgoing: lines.take(4 * config.channels() * nodes),
            incoming: lines.take(4 * config.channels() * nodes),
            rails: lines.take(nodes * region.rail_bytes()),
            verdict: lines.take(size_of::<VerdictRecord>()),
        });
        let gathered = lines.take(4 * world * region.counts().words);
        let agrees = lines.take(4 * world);
        let send_rings = lines.take(region.memory.rings);
        Self { rank, lanes, gathered, agrees, send_rings, bytes: lines.end }
    }

    /// What is not zero at first: offsets, and the turns that lie there.
    pub fn first_turns(&self, config: &Config) -> [(usize, u64); 2] {
        let first = Index::new(config.first_index).get();
        self.lanes.map(|lane| (lane.state + std::mem::offset_of!(LaneState, turn), first))
    }
}

/// Commands that fit the queue, a power of two.
pub const QUEUE_CAPACITY: usize = 1024;

/// Offsets in a rank's mailbox.
#[derive(Debug, Clone)]
pub struct MailboxMap {
    /// The queue: [`QUEUE_CAPACITY`] commands of two u64.
    pub queue: usize,
    /// Commands the proxy has taken, u64.
    pub taken: usize,
    /// Not 0 once the host wants all roles to return, u32.
    pub abort: usize,
    /// [`FaultRecord`].
    pub fault: usize,
    /// By lane.
    pub lanes: [MailboxLane; 2],
    /// Reports: each operation under way writes one of its own, so that none is lost before the host has read it.
    pub reports: [ReportMap; REPORTS],
    /// Size in bytes. It starts zeroed.
    pub bytes: usize,
}

/// Operations of a rank that may be under way at a time.
pub const REPORTS: usize = 32;

/// Offsets of one report in the mailbox. It starts zeroed.
#[derive(Debug, Clone, Copy)]
pub struct ReportMap {
    /// [`Report`].
    pub report: usize,
    /// Entries for each expert of this rank: u32.
    pub experts: usize,
    /// The verdicts of all nodes: [`VerdictRecord`] `[nodes]`.
    pub verdicts: usize,
}

/// Offsets of one lane in the mailbox.
#[derive(Debug, Clone, Copy)]
pub struct MailboxLane {
    /// Index words that the proxy writes when a put has left its source: the operation of the last rail record,
    /// `u64 [nodes]`.
    pub rails: usize,
    /// The operation of the last verdict, `u64 [nodes]`.
    pub sent_verdicts: usize,
    /// The tail after the last chunk, `u64 [channels, nodes]`.
    pub chunks: usize,
}

impl MailboxMap {
    /// The map for `rank` of worlds of `config`.
    pub fn new(config: &Config, rank: usize) -> Self {
        let nodes = config.topology().nodes();
        let mut lines = Lines::default();
        let queue = lines.take(16 * QUEUE_CAPACITY);
        let (taken, abort, fault) = (lines.take(8), lines.take(4), lines.take(size_of::<FaultRecord>()));
        let reports = std::array::from_fn(|_| ReportMap {
            report: lines.take(size_of::<Report>()),
            experts: lines.take(4 * config.placement().experts_of(rank).len()),
            verdicts: lines.take(nodes * size_of::<VerdictRecord>()),
        });
        let lanes = LANES.map(|_| MailboxLane {
            rails: lines.take(8 * nodes),
            sent_verdicts: lines.take(8 * nodes),
            chunks: lines.take(8 * config.channels() * nodes),
        });
        Self { queue, taken, abort, fault, lanes, reports, bytes: lines.end }
    }
}

/// Offsets in a rank's tables, which no kernel writes.
#[derive(Debug, Clone)]
pub struct TableMap {
    /// Addresses of the regions of the node, `u64 [ranks per node]`.
    pub peers: usize,
    /// [`expert_places`].
    pub placement: usize,
    /// Size in bytes.
    pub bytes: usize,
}

impl TableMap {
    /// The map for worlds of `config`.
    pub fn new(config: &Config) -> Self {
        let mut lines = Lines::default();
        Self {
            peers: lines.take(8 * config.topology().ranks_per_node()),
            placement: lines.take(size_of::<ExpertPlace>() * config.placement().num_experts()),
            bytes: lines.end,
        }
    }
}

/// Offsets in the memory of a plan: O(tokens) beside tables of the world's size.
#[derive(Debug, Clone)]
pub struct HandleMap {
    /// [`HandleState`].
    pub state: usize,
    /// Slot headers of the own tokens: `u32 [tokens, header words]`.
    pub headers: usize,
    /// Tokens this rank puts, `u32 [channels, nodes]`; the own node's column counts what skips hop 1.
    pub sends: usize,
    /// Tokens that come along the rail, `u32 [nodes, channels]`.
    pub tokens: usize,
    /// First row of each run, `u32 [nodes, channels, ranks per node]`.
    pub bases: usize,
    /// Rows each local rank receives, `u64 [ranks per node]`.
    pub rows: usize,
    /// First token of each run among those forwarded from other nodes, `u32 [nodes, channels]`.
    pub first: usize,
    /// Final rows of the tokens forwarded: [`FinalRow`] `[forwarded, fan]`.
    pub placed: usize,
    /// Tokens `placed` has room for.
    pub forwarded: usize,
    /// Final rows kept per token: a token has at most min(topk, ranks per node) on a node.
    pub fan: usize,
    /// Size in bytes. It starts zeroed.
    pub bytes: usize,
}

impl HandleMap {
    /// The map for `tokens` tokens of `topk` entries at a rank that forwards at most `forwarded` tokens of others.
    pub fn new(config: &Config, tokens: usize, topk: usize, forwarded: usize) -> Self {
        let topology = config.topology();
        let runs = topology.nodes() * config.channels();
        let fan = topk.min(topology.ranks_per_node());
        let mut lines = Lines::default();
        Self {
            state: lines.take(size_of::<HandleState>()),
            headers: lines.take(4 * tokens * header_words(topk)),
            sends: lines.take(4 * runs),
            tokens: lines.take(4 * runs),
            bases: lines.take(4 * runs * topology.ranks_per_node()),
            rows: lines.take(8 * topology.ranks_per_node()),
            first: lines.take(4 * runs),
            placed: lines.take(size_of::<FinalRow>() * forwarded * fan),
            forwarded,
            fan,
            bytes: lines.end,
        }
    }
}

/// Where each expert is: the table that kernels look experts up in.
pub fn expert_places(config: &Config) -> Vec<ExpertPlace> {
    let (topology, placement) = (config.topology(), config.placement());
    let mut places = vec![ExpertPlace { node: 0, local: 0, index: 0, slot: 0 }; placement.num_experts()];
    for node in 0..topology.nodes() {
        let mut slot = 0;
        for local in 0..topology.ranks_per_node() {
            for (index, &expert) in placement.experts_of(topology.rank(node, local)).iter().enumerate() {
                let (node, local, index) = (node as u32, local as u32, index as u32);
                places[expert as usize] = ExpertPlace { node, local, index, slot };
                slot += 1;
            }
        }
    }
    places
}

device_struct! {
    /// A role's view of one node during a step.
    NodeCursor {
        /// Low bits of the ring's cursor at the step's start.
        pub cursor: u32,
        /// Slots that may be written, or read.
        pub room: u32,
        /// Slots chosen for the step so far.
        pub chosen: u32,
        /// Slots whose copies have been issued so far.
        pub issued: u32,
        /// Next token of the stream, in the channel's order.
        pub position: u32,
        /// Keeps the size a multiple of 8.
        pub reserved: u32,
    }
}

device_struct! {
    /// A token chosen for a step.
    Chosen {
        /// The token.
        pub token: u32,
        /// Bit k: a copy goes to the place of entry k.
        pub entries: u32,
    }
}

device_struct! {
    /// The plan kernel's shared memory, ahead of its warps' running counts.
    PlanShared {
        /// The rank's enter record.
        pub enter: EnterRecord,
        /// The node's verdict.
        pub verdict: VerdictRecord,
        /// Whether the last wait came to its end.
        pub go_on: u32,
        /// Keeps the size a multiple of 8.
        pub reserved: u32,
    }
}

impl PlanShared {
    /// Where the warps' running counts start.
    pub const COUNTS_AT: usize = align_up(size_of::<Self>(), 16);

    /// Bytes of a warp's running counts, for every rank and node.
    pub fn warp_bytes(config: &Config) -> usize {
        align_up(4 * (config.topology().world_size() + config.topology().nodes()), 16)
    }

    /// Bytes a block of `warps` warps needs.
    pub fn bytes(config: &Config, warps: usize) -> usize {
        Self::COUNTS_AT + warps * Self::warp_bytes(config)
    }
}

/// Tokens a step moves at most: one for each lane.
pub const STEP_TOKENS: usize = 32;

/// Bytes of a row that one load of combine brings: 16 sums in registers of each of 32 lanes.
pub const SUM_BYTES: usize = 1024;

device_struct! {
    /// One warp's share of shared memory: stages for bulk copies and what the lanes of the warp share.
    WarpMap {
        /// Bytes of a stage.
        pub stage_bytes: u32,
        /// Binary logarithm of the number of stages.
        pub stages_log2: u32,
        /// Offset of the stages.
        pub stages: u32,
        /// Offset of their barriers.
        pub barriers: u32,
        /// Offset of the two rows of scales (dispatch) or the two pieces of sums (combine) on their way out.
        pub outgoing: u32,
        /// Bytes of one of the two.
        pub outgoing_bytes: u32,
        /// Offset of the node cursors.
        pub cursors: u32,
        /// Offset of the step's tokens.
        pub chosen: u32,
        /// Bytes of the share.
        pub bytes: u32,
        /// Keeps the size a multiple of 8.
        pub reserved: u32,
    }
}

impl Staging {
    /// Stages for combine: what must be in flight to hide `latency_ns` at `gigabytes_per_s` over `blocks` blocks of
    /// `warps` warps, and at least four pieces of rows a warp.
    pub fn for_combine(gigabytes_per_s: f64, latency_ns: f64, blocks: usize, warps: usize) -> Self {
        let in_flight = gigabytes_per_s * latency_ns / (blocks * warps) as f64;
        let stages = (in_flight / SUM_BYTES as f64).ceil().clamp(4.0, 32.0) as usize;
        Self { stage_bytes: SUM_BYTES, stages: stages.next_power_of_two() }
    }
}

impl WarpMap {
    /// The share of a warp that works with `staging` on rows of `shape` in a lane of worlds of `config`.
    pub fn new(config: &Config, lane: Lane, staging: Staging, shape: &RowShape) -> Self {
        let outgoing_bytes = match lane {
            Lane::Dispatch => shape.scale_pitch(),
            Lane::Combine => SUM_BYTES,
        };
        let mut end = 0;
        let mut take = |bytes: usize, align: usize| {
            let start = align_up(end, align);
            end = start + bytes;
            start as u32
        };
        let stages = take(staging.stages * staging.stage_bytes, 128);
        let barriers = take(8 * staging.stages, 8);
        let outgoing = take(2 * outgoing_bytes, 16);
        let cursors = take(size_of::<NodeCursor>() * config.topology().nodes(), 8);
        let chosen = take(size_of::<Chosen>() * STEP_TOKENS, 8);
        let bytes = take(0, 128);
        let (stage_bytes, stages_log2) = (staging.stage_bytes as u32, staging.stages.ilog2());
        let outgoing_bytes = outgoing_bytes as u32;
        Self {
            stage_bytes,
            stages_log2,
            stages,
            barriers,
            outgoing,
            outgoing_bytes,
            cursors,
            chosen,
            bytes,
            reserved: 0,
        }
    }
}

/// Offset of the counts in a rail record's place.
pub const COUNTS_AT: usize = size_of::<RailRecord>();

const _: () = assert!(size_of::<LaneState>().is_multiple_of(8) && COUNTS_AT.is_multiple_of(4));

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Topology;

    #[test]
    fn tables_are_the_maps() {
        let config = Config::builder(Topology::new(3, 5).unwrap()).experts(20).channels(4).pool_bytes(64);
        let map = RegionMap::new(&config.build().unwrap());
        type Id = fn(usize, usize) -> WordId;
        let ids: [(Id, usize, usize); 9] = [
            (|_, local| WordId::Enter { local }, 1, 5),
            (|_, local| WordId::Gathered { local }, 1, 5),
            (|_, node| WordId::Rail { node }, 1, 3),
            (|_, node| WordId::Verdict { node }, 1, 3),
            (|channel, local| WordId::Done { local, channel }, 4, 5),
            (|channel, node| WordId::Tail { channel, node }, 4, 3),
            (|channel, node| WordId::Head { channel, node }, 4, 3),
            (|channel, node| WordId::Sent { channel, node }, 4, 3),
            (|channel, node| WordId::Taken { channel, node }, 4, 3),
        ];
        let check = |place: &dyn Fn(usize, usize) -> usize, outers: usize, inners: usize| {
            let table = Table::of(place);
            for (i, j) in (0..outers).flat_map(|i| (0..inners).map(move |j| (i, j))) {
                assert_eq!(table.at + i as u64 * table.outer + j as u64 * table.inner, place(i, j) as u64);
            }
        };
        for lane in LANES {
            for (id, outers, inners) in ids {
                check(&|i, j| map.word(lane, id(i, j)), outers, inners);
            }
            check(&|parity, local| map.enter(lane, parity, local), 2, 5);
            check(&|parity, node| map.rail(lane, parity, node), 2, 3);
            check(&|parity, node| map.verdict(lane, parity, node), 2, 3);
            check(&|channel, peer| map.ring_place(lane, channel, peer), 4, 2);
        }
    }
}
