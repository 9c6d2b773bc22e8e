//! The parameters of the communication kernels: sizes, offsets and addresses of one operation of one rank, so that a
//! kernel derives none of them. Nothing in them changes when a captured operation is replayed.

use bytemuck::Zeroable;

use super::device::{
    COUNTS_AT, FinalRow, HandleMap, MailboxMap, PlanShared, PrivateMap, QUEUE_CAPACITY, STEP_TOKENS,
    SUM_BYTES, Table, WarpMap,
};
use super::record::{EnterRecord, RailRecord, ReasonRecord, StartedRecord, VerdictRecord};
use super::region::{Lane, RegionMap, WordId};
use super::render::{DeviceStruct, device_codes, device_struct};
use super::shape::{CombineSlot, DispatchSlot, Header, RecvParts, RowFormat, RowShape, header_words};
use super::word::{INDEX_BITS, Index};
use super::{command, device, local, record};
use crate::config::Config;
use crate::error::{Kind, Reason, Started};
use crate::numeric::{GROUP, ScaleFormat, scale_groups};

device_codes! {
    /// How rows are made from the caller's.
    encode {
        /// They are the caller's rows.
        COPY = 0,
        /// E4M3 rows are the caller's; their scales are gathered.
        GATHER = 1,
        /// BF16 rows are quantised, with f32 scales.
        QUANTISE_F32 = 2,
        /// BF16 rows are quantised, with UE8M0 scales.
        QUANTISE_UE8M0 = 3,
    }
}

device_codes! {
    /// Kinds of operation.
    kind {
        /// Counts are exchanged, no rows move.
        PLAN = 1,
        /// Rows move by an existing plan.
        DISPATCH = 2,
        /// Counts and rows.
        PLAN_DISPATCH = 3,
        /// Expert outputs come home.
        COMBINE = 4,
    }
}

device_struct! {
    /// One operation of one rank. Addresses are those of the rank's own mappings.
    Params {
        /// Nodes of the world.
        pub nodes: u32,
        /// Ranks of a node.
        pub ranks_per_node: u32,
        /// The rank's node.
        pub node: u32,
        /// Its index there.
        pub local: u32,
        /// Channels.
        pub channels: u32,
        /// Slots of a ring, a power of two.
        pub slots: u32,
        /// Tokens published by one tail update.
        pub chunk: u32,
        /// 0: dispatch, 1: combine.
        pub lane: u32,
        /// See `kind`.
        pub kind: u32,
        /// Generation of all index words.
        pub generation: u32,
        /// Where indices start in a generation.
        pub first_index: u64,
        /// Nanoseconds that a wait may last.
        pub deadline_ns: u64,
        /// What is started; epoch and plan are the kernel's to fill in.
        pub started: StartedRecord,
        /// Why the input is invalid, as far as the host can tell.
        pub poison: ReasonRecord,

        /// Experts of the world.
        pub num_experts: u32,
        /// Experts of the rank.
        pub own_experts: u32,
        /// Tokens of the rank.
        pub tokens: u32,
        /// Entries per token.
        pub topk: u32,
        /// Bytes of a row as it moves.
        pub row_bytes: u32,
        /// Bytes of a row as the caller holds it.
        pub input_bytes: u32,
        /// Bytes from one row's scales to the next's, a multiple of 16; 0 for BF16.
        pub scale_pitch: u32,
        /// Scales of a row.
        pub scale_groups: u32,
        /// Bytes of a scale.
        pub scale_bytes: u32,
        /// See `encode`.
        pub encode: u32,
        /// Sums of weights that a combine returns per token.
        pub weights: u32,
        /// Final rows kept per forwarded token.
        pub fan: u32,
        /// 32-bit words of a header, and where in it the experts, the weights and the offsets start.
        pub header_words: u32,
        /// Index of the first expert in a header.
        pub header_experts: u32,
        /// Index of the first weight.
        pub header_weights: u32,
        /// Index of the first offset.
        pub header_offsets: u32,
        /// Offset of the row in a slot.
        pub slot_row: u32,
        /// Offset of the scales in a slot.
        pub slot_scales: u32,
        /// Bytes from slot to slot.
        pub slot_pitch: u32,
        /// Words of a count block.
        pub count_words: u32,
        /// Index of the number of tokens of channel 0 in a count block; rows for each local rank follow it.
        pub count_tokens: u32,
        /// Words from channel to channel.
        pub count_channel: u32,
        /// Index of the entries of the node's first expert.
        pub count_experts: u32,
        /// Index of the entries of the rank's first expert, from there.
        pub count_own_expert: u32,

        /// `i64 [tokens, topk]`.
        pub topk_idx: u64,
        /// `f32 [tokens, topk]`.
        pub topk_weights: u64,
        /// Rows [tokens, input_bytes].
        pub x: u64,
        /// Scales of E4M3 rows.
        pub scales: u64,
        /// Elements (f32, or words of four UE8M0 scales) between tokens.
        pub scale_token_stride: u64,
        /// Elements between groups (or words of four).
        pub scale_group_stride: u64,
        /// Bias of a combine, `BF16 [tokens, hidden]`; 0 for none.
        pub bias: u64,
        /// Combined rows, `BF16 [tokens, hidden]`.
        pub out: u64,
        /// Combined weights, `f32 [tokens, weights]`.
        pub out_weights: u64,
        /// Rows of the buffer that peers touch.
        pub capacity: u64,
        /// Its parts, as offsets in the region.
        pub parts: RecvParts,

        /// Address of the region.
        pub region: u64,
        /// Addresses of the regions of the node, `u64 [ranks per node]`.
        pub peers: u64,
        /// Where each expert is: `ExpertPlace [experts]`.
        pub placement: u64,
        /// Offsets in a region: enter words, by (0, local).
        pub enter_words: Table,
        /// Gathered words, by (0, local).
        pub gathered_words: Table,
        /// Rail words, by (0, node).
        pub rail_words: Table,
        /// Verdict words, by (0, node).
        pub verdict_words: Table,
        /// Done words, by (channel, local).
        pub done_words: Table,
        /// Tail words, by (channel, node).
        pub tail_words: Table,
        /// Head words, by (channel, node).
        pub head_words: Table,
        /// Private tails, by (channel, node).
        pub sent_words: Table,
        /// Private heads, by (channel, node).
        pub taken_words: Table,
        /// Enter records, by (parity, local).
        pub enter_records: Table,
        /// Rail records and counts, by (parity, node).
        pub rail_records: Table,
        /// Verdicts, by (parity, node).
        pub verdict_records: Table,
        /// Rings, by (channel, peer): peers are the other nodes, ascending.
        pub rings: Table,
        /// Addresses of the send rings, by (channel, peer).
        pub send_rings: Table,

        /// Address of the rank's state.
        pub rank_state: u64,
        /// Address of the lane's state.
        pub lane_state: u64,
        /// `u32 [nodes]`.
        pub open: u64,
        /// `u32 [channels, nodes]`.
        pub outgoing: u64,
        /// `u32 [channels, nodes]`.
        pub incoming: u64,
        /// Addresses of the rail records to send, by (0, node).
        pub rail_outbox: Table,
        /// Address of the verdict to send.
        pub verdict_outbox: u64,
        /// `u32 [world, count words]`.
        pub gathered: u64,
        /// `u32 [world]`.
        pub agrees: u64,

        /// Address of the command queue.
        pub queue: u64,
        /// Commands that fit, a power of two.
        pub queue_capacity: u64,
        /// Commands the proxy has taken.
        pub taken: u64,
        /// The host's abort flag.
        pub abort: u64,
        /// The fault record.
        pub fault: u64,
        /// The lane's report.
        pub report: u64,
        /// Entries for each expert, in the report.
        pub report_experts: u64,
        /// Verdicts, in the report.
        pub report_verdicts: u64,
        /// Completions of rail records, `u64 [nodes]`.
        pub rail_completions: u64,
        /// Completions of verdicts, `u64 [nodes]`.
        pub verdict_completions: u64,
        /// Completions of chunks, `u64 [channels, nodes]`.
        pub chunk_completions: u64,

        /// The plan's state.
        pub handle: u64,
        /// `u32 [tokens, header words]`.
        pub headers: u64,
        /// `u32 [channels, nodes]`.
        pub plan_sends: u64,
        /// `u32 [nodes, channels]`.
        pub plan_tokens: u64,
        /// `u32 [nodes, channels, ranks per node]`.
        pub plan_bases: u64,
        /// `u64 [ranks per node]`.
        pub plan_rows: u64,
        /// `u32 [nodes, channels]`.
        pub plan_first: u64,
        /// `FinalRow [forwarded, fan]`.
        pub placed: u64,

        /// Each warp's share of shared memory.
        pub warp: WarpMap,
        /// Offset of the running counts in the plan kernel's shared memory.
        pub plan_counts: u32,
        /// Bytes of a warp's running counts.
        pub plan_count_bytes: u32,
    }
}

/// The maps of one rank.
#[derive(Debug, Clone, Copy)]
pub struct Maps<'a> {
    /// The world.
    pub config: &'a Config,
    /// The region's.
    pub region: &'a RegionMap,
    /// The private memory's.
    pub private: &'a PrivateMap,
    /// The mailbox's.
    pub mailbox: &'a MailboxMap,
}

/// Where a rank's kernels find its memory.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// The region.
    pub region: u64,
    /// The private memory.
    pub private: u64,
    /// The mailbox.
    pub mailbox: u64,
    /// Addresses of the regions of the node, `u64 [ranks per node]`.
    pub peers: u64,
    /// `ExpertPlace [experts]`.
    pub placement: u64,
}

/// The caller's rows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Input {
    /// Rows [tokens, H]: BF16, or E4M3 with `scales`.
    pub x: u64,
    /// Scales of E4M3 rows; 0 for BF16 rows.
    pub scales: u64,
    /// Elements between tokens and between groups.
    pub scale_strides: (u64, u64),
    /// Bias of a combine; 0 for none.
    pub bias: u64,
    /// Combined rows.
    pub out: u64,
    /// Combined weights.
    pub out_weights: u64,
}

/// One operation of one rank.
#[derive(Debug, Clone, Copy)]
pub struct Operation<'a> {
    /// Its kind.
    pub kind: Kind,
    /// Its rank.
    pub rank: usize,
    /// Generation of its words.
    pub generation: u16,
    /// Shape of the rows; the BF16 shape of the outputs for a combine.
    pub shape: RowShape,
    /// Tokens of the rank.
    pub tokens: usize,
    /// `i64 [tokens, topk]`; for what plans.
    pub topk_idx: u64,
    /// `f32 [tokens, topk]`; for what plans.
    pub topk_weights: u64,
    /// Rows in and out.
    pub input: Input,
    /// Sums of weights that a combine returns per token: 0 or topk.
    pub weights: usize,
    /// Why the input is invalid.
    pub poison: Option<Reason>,
    /// Rows of the buffer that peers touch.
    pub capacity: usize,
    /// Its parts.
    pub parts: RecvParts,
    /// The plan's map, and where it lies.
    pub handle: (&'a HandleMap, u64),
    /// Each warp's share of shared memory.
    pub warp: WarpMap,
    /// Which of the mailbox's reports it writes.
    pub report: usize,
}

impl Params {
    /// The parameters of `op`.
    pub fn new(maps: Maps<'_>, at: &Addresses, op: &Operation<'_>) -> Self {
        let mut params = Self::zeroed();
        params.set_world(maps.config, op);
        params.set_shape(maps, op);
        params.set_input(op);
        params.set_region(maps.region, at, op);
        params.set_private(maps, at);
        params.set_mailbox(maps, at, op.report);
        params.set_handle(op);
        params.warp = op.warp;
        params
    }

    fn set_world(&mut self, config: &Config, op: &Operation<'_>) {
        let topology = config.topology();
        self.nodes = topology.nodes() as u32;
        self.ranks_per_node = topology.ranks_per_node() as u32;
        self.node = topology.node_of(op.rank) as u32;
        self.local = topology.local_of(op.rank) as u32;
        self.channels = config.channels() as u32;
        self.slots = config.ring_slots() as u32;
        self.chunk = config.chunk_tokens().min(STEP_TOKENS) as u32;
        self.lane = Lane::of(op.kind) as u32;
        self.kind = op.kind as u32;
        self.generation = op.generation.into();
        self.first_index = Index::new(config.first_index).get();
        self.deadline_ns = u64::try_from(config.deadline().as_nanos()).unwrap_or(u64::MAX);
        let plan = op.kind == Kind::Plan;
        self.started = StartedRecord::from(&Started {
            kind: op.kind,
            epoch: 0,
            hidden: if plan { 0 } else { op.shape.hidden as u32 },
            topk: op.shape.topk as u32,
            format: if plan { 0 } else { op.shape.format.code() | u32::from(op.weights > 0) << 8 },
            plan: 0,
            config: config.agreement(),
        });
        self.poison = op.poison.into();
        self.num_experts = config.placement().num_experts() as u32;
        self.own_experts = config.placement().experts_of(op.rank).len() as u32;
        let before =
            (0..topology.local_of(op.rank)).map(|local| topology.rank(topology.node_of(op.rank), local));
        self.plan_counts = PlanShared::COUNTS_AT as u32;
        self.plan_count_bytes = PlanShared::warp_bytes(config) as u32;
        self.count_own_expert = before.map(|rank| config.placement().experts_of(rank).len() as u32).sum();
    }

    fn set_shape(&mut self, maps: Maps<'_>, op: &Operation<'_>) {
        let (shape, topk) = (&op.shape, op.shape.topk);
        self.tokens = op.tokens as u32;
        self.topk = topk as u32;
        self.row_bytes = shape.row_bytes() as u32;
        self.scale_pitch = shape.scale_pitch() as u32;
        let ready = op.input.scales != 0;
        (self.encode, self.input_bytes, self.scale_bytes) = match shape.format {
            RowFormat::Bf16 => (encode::COPY, self.row_bytes, 0),
            RowFormat::Fp8(format) if ready => (encode::GATHER, self.row_bytes, format.bytes() as u32),
            RowFormat::Fp8(ScaleFormat::F32) => (encode::QUANTISE_F32, 2 * self.row_bytes, 4),
            RowFormat::Fp8(ScaleFormat::Ue8m0) => (encode::QUANTISE_UE8M0, 2 * self.row_bytes, 1),
        };
        self.scale_groups = if self.scale_pitch > 0 { scale_groups(shape.hidden) as u32 } else { 0 };
        self.weights = op.weights as u32;
        self.header_words = header_words(topk) as u32;
        [self.header_experts, self.header_weights, self.header_offsets] = Header::<&[u32]>::parts(topk);
        let (dispatch, combine) = (DispatchSlot::new(shape), CombineSlot::new(shape.hidden, op.weights));
        (self.slot_row, self.slot_scales, self.slot_pitch) = match Lane::of(op.kind) {
            Lane::Dispatch => (dispatch.row as u32, dispatch.scales as u32, dispatch.pitch as u32),
            Lane::Combine => (combine.row as u32, combine.pitch as u32, combine.pitch as u32),
        };
        let counts = maps.region.counts();
        self.count_words = counts.words as u32;
        self.count_tokens = counts.tokens(0) as u32;
        self.count_channel = (counts.tokens(1) - counts.tokens(0)) as u32;
        self.count_experts = counts.experts() as u32;
    }

    fn set_input(&mut self, op: &Operation<'_>) {
        let Input { x, scales, scale_strides, bias, out, out_weights } = op.input;
        (self.topk_idx, self.topk_weights) = (op.topk_idx, op.topk_weights);
        (self.x, self.scales, self.bias, self.out, self.out_weights) = (x, scales, bias, out, out_weights);
        (self.scale_token_stride, self.scale_group_stride) = scale_strides;
        (self.capacity, self.parts) = (op.capacity as u64, op.parts);
    }

    fn set_region(&mut self, map: &RegionMap, at: &Addresses, op: &Operation<'_>) {
        let lane = Lane::of(op.kind);
        let word = |id: &dyn Fn(usize, usize) -> WordId| Table::of(|i, j| map.word(lane, id(i, j)));
        (self.region, self.peers, self.placement) = (at.region, at.peers, at.placement);
        self.enter_words = word(&|_, local| WordId::Enter { local });
        self.gathered_words = word(&|_, local| WordId::Gathered { local });
        self.rail_words = word(&|_, node| WordId::Rail { node });
        self.verdict_words = word(&|_, node| WordId::Verdict { node });
        self.done_words = word(&|channel, local| WordId::Done { local, channel });
        self.tail_words = word(&|channel, node| WordId::Tail { channel, node });
        self.head_words = word(&|channel, node| WordId::Head { channel, node });
        self.sent_words = word(&|channel, node| WordId::Sent { channel, node });
        self.taken_words = word(&|channel, node| WordId::Taken { channel, node });
        self.enter_records = Table::of(|parity, local| map.enter(lane, parity, local));
        self.rail_records = Table::of(|parity, node| map.rail(lane, parity, node));
        self.verdict_records = Table::of(|parity, node| map.verdict(lane, parity, node));
        self.rings = Table::of(|channel, peer| map.ring_place(lane, channel, peer));
    }

    fn set_private(&mut self, maps: Maps<'_>, at: &Addresses) {
        let lane = &maps.private.lanes[self.lane as usize];
        let address = |offset: usize| at.private + offset as u64;
        self.rank_state = address(maps.private.rank);
        self.lane_state = address(lane.state);
        self.open = address(lane.open);
        self.outgoing = address(lane.outgoing);
        self.incoming = address(lane.incoming);
        self.rail_outbox = Table::of(|_, node| lane.rails + node * maps.region.rail_bytes()).from(at.private);
        self.verdict_outbox = address(lane.verdict);
        self.gathered = address(maps.private.gathered);
        self.agrees = address(maps.private.agrees);
        let mirror = at.private + maps.private.send_rings as u64;
        self.send_rings = Table { at: self.rings.at - maps.region.rings() as u64, ..self.rings }.from(mirror);
    }

    fn set_mailbox(&mut self, maps: Maps<'_>, at: &Addresses, report: usize) {
        let (lane, report) = (&maps.mailbox.lanes[self.lane as usize], &maps.mailbox.reports[report]);
        let address = |offset: usize| at.mailbox + offset as u64;
        self.queue = address(maps.mailbox.queue);
        self.queue_capacity = QUEUE_CAPACITY as u64;
        self.taken = address(maps.mailbox.taken);
        self.abort = address(maps.mailbox.abort);
        self.fault = address(maps.mailbox.fault);
        self.report = address(report.report);
        self.report_experts = address(report.experts);
        self.report_verdicts = address(report.verdicts);
        self.rail_completions = address(lane.rails);
        self.verdict_completions = address(lane.sent_verdicts);
        self.chunk_completions = address(lane.chunks);
    }

    fn set_handle(&mut self, op: &Operation<'_>) {
        let (map, at) = op.handle;
        let address = |offset: usize| at + offset as u64;
        self.fan = map.fan as u32;
        self.handle = address(map.state);
        self.headers = address(map.headers);
        self.plan_sends = address(map.sends);
        self.plan_tokens = address(map.tokens);
        self.plan_bases = address(map.bases);
        self.plan_rows = address(map.rows);
        self.plan_first = address(map.first);
        self.placed = address(map.placed);
    }
}

const _: () = {
    assert!(kind::PLAN == Kind::Plan as u32 && kind::DISPATCH == Kind::Dispatch as u32);
    assert!(kind::PLAN_DISPATCH == Kind::PlanDispatch as u32 && kind::COMBINE == Kind::Combine as u32);
};

/// `kernels/generated/wire.cuh`: what kernels know of this module.
pub fn header() -> String {
    let mut text = String::from(
        "// What kernels share with the host: rendered from src/wire, do not edit (UPDATE_GENERATED=1 cargo test --test \
         generated).\n#pragma once\n\n\
         // NVRTC lacks the builtin.\n#if defined(__CUDACC_RTC__)\n\
         #define OFFSET_OF(type, field) __INTADDR__(&((type*)0)->field)\n#else\n\
         #define OFFSET_OF(type, field) __builtin_offsetof(type, field)\n#endif\n\nnamespace railhop {\n\n",
    );
    let constants = [
        ("INDEX_BITS", "bits of an index in a word; the generation takes the rest", INDEX_BITS as usize),
        ("COUNTS_AT", "offset of the counts in a rail record's place", COUNTS_AT),
        ("STEP_TOKENS", "tokens a step moves at most", STEP_TOKENS),
        ("SUM_BYTES", "bytes of a row that one load of combine brings", SUM_BYTES),
        ("GROUP", "elements that share a scale", GROUP),
    ];
    for (name, doc, value) in constants {
        text += &format!("/// {}{}.\nconstexpr u32 {name} = {value};\n", doc[..1].to_uppercase(), &doc[1..]);
    }
    let parts = [
        kind::declaration(),
        encode::declaration(),
        record::reason::declaration(),
        record::verdict::declaration(),
        device::status::declaration(),
        device::role::declaration(),
        device::waits::declaration(),
        command::opcode::declaration(),
        command::Command::declaration(),
        StartedRecord::declaration(),
        ReasonRecord::declaration(),
        RecvParts::declaration(),
        EnterRecord::declaration(),
        RailRecord::declaration(),
        VerdictRecord::declaration(),
        Table::declaration(),
        device::RankState::declaration(),
        device::LaneState::declaration(),
        device::HandleState::declaration(),
        FinalRow::declaration(),
        device::ExpertPlace::declaration(),
        device::Report::declaration(),
        device::FaultRecord::declaration(),
        device::NodeCursor::declaration(),
        PlanShared::declaration(),
        device::Chosen::declaration(),
        WarpMap::declaration(),
        Params::declaration(),
        local::order::declaration(),
        local::columns::declaration(),
        local::ExpertOrder::declaration(),
        local::ExpertOrderParams::declaration(),
        local::ExpandParams::declaration(),
        local::CollapseParams::declaration(),
        local::DequantiseParams::declaration(),
        local::CopyParams::declaration(),
    ];
    for part in parts {
        text += "\n";
        text += &part;
    }
    text + "\n}  // namespace railhop\n"
}
