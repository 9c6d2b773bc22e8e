// What kernels share with the host: rendered from src/wire, do not edit (UPDATE_GENERATED=1 cargo test --test generated).
#pragma once

// NVRTC lacks the builtin.
#if defined(__CUDACC_RTC__)
#define OFFSET_OF(type, field) __INTADDR__(&((type*)0)->field)
#else
#define OFFSET_OF(type, field) __builtin_offsetof(type, field)
#endif

namespace railhop {

/// Bits of an index in a word; the generation takes the rest.
constexpr u32 INDEX_BITS = 48;
/// Offset of the counts in a rail record's place.
constexpr u32 COUNTS_AT = 80;
/// Tokens a step moves at most.
constexpr u32 STEP_TOKENS = 32;
/// Bytes of a row that one load of combine brings.
constexpr u32 SUM_BYTES = 1024;
/// Elements that share a scale.
constexpr u32 GROUP = 128;

/// Kinds of operation.
namespace kind {
/// Counts are exchanged, no rows move.
constexpr u32 PLAN = 1;
/// Rows move by an existing plan.
constexpr u32 DISPATCH = 2;
/// Counts and rows.
constexpr u32 PLAN_DISPATCH = 3;
/// Expert outputs come home.
constexpr u32 COMBINE = 4;
}

/// How rows are made from the caller's.
namespace encode {
/// They are the caller's rows.
constexpr u32 COPY = 0;
/// E4M3 rows are the caller's; their scales are gathered.
constexpr u32 GATHER = 1;
/// BF16 rows are quantised, with f32 scales.
constexpr u32 QUANTISE_F32 = 2;
/// BF16 rows are quantised, with UE8M0 scales.
constexpr u32 QUANTISE_UE8M0 = 3;
}

/// Reasons that kernels find by themselves.
namespace reason {
/// An entry of `topk_idx` is no expert: token, position, entry, number of experts.
constexpr u32 EXPERT_OUT_OF_RANGE = 1;
/// The receive buffer is too small: rows needed, rows there.
constexpr u32 BUFFER_TOO_SMALL = 3;
/// The plan has not been dispatched.
constexpr u32 NOT_DISPATCHED = 10;
}

/// States of a verdict.
namespace verdict {
/// Every rank of the node started the same, and everything fits.
constexpr u32 GOOD = 0;
/// A rank's input was refused.
constexpr u32 REFUSED = 1;
/// A rank started something else.
constexpr u32 OUT_OF_STEP = 2;
}

/// How an operation ended.
namespace status {
/// It is complete.
constexpr u32 OK = 1;
/// A verdict was bad; the verdicts of all nodes say why.
constexpr u32 REFUSED = 2;
/// A fault ended it.
constexpr u32 FAULT = 3;
}

/// What a warp does.
namespace role {
/// Enter, counts, verdicts, arrivals.
constexpr u32 RECEIVER = 0;
/// Puts tokens on the rail.
constexpr u32 SENDER = 1;
/// Moves arrived tokens to their final rows; in combine sums a node's rows for the rail.
constexpr u32 FORWARDER = 2;
/// Sums the nodes' partial sums at home.
constexpr u32 REDUCER = 3;
}

/// What is waited for.
namespace waits {
/// An enter record.
constexpr u32 ENTER = 0;
/// The counts gathered by a local rank.
constexpr u32 GATHERED = 1;
/// A rail record.
constexpr u32 RAIL = 2;
/// A verdict.
constexpr u32 VERDICT = 3;
/// Arrivals.
constexpr u32 DONE = 4;
/// A tail.
constexpr u32 TAIL = 5;
/// Credit.
constexpr u32 HEAD = 6;
/// The local completion of a put.
constexpr u32 COMPLETION = 7;
/// Room in the command queue.
constexpr u32 COMMANDS = 8;
/// A bulk copy of the warp's own.
constexpr u32 COPY = 9;
}

/// What a command asks for.
namespace opcode {
/// Put slots of the send ring and signal the tail.
constexpr u32 CHUNK = 0;
/// Signal the head: credit for slots taken.
constexpr u32 CREDIT = 1;
/// Put the rail record (and counts) and signal it.
constexpr u32 RAIL = 2;
/// Put the verdict and signal it.
constexpr u32 VERDICT = 3;
}

/// Lowest bit of each field of a command's first half.
namespace command {
constexpr u32 PITCH = 0;
constexpr u32 COUNT = 20;
constexpr u32 CHANNEL = 36;
constexpr u32 NODE = 48;
constexpr u32 LANE = 60;
constexpr u32 OPCODE = 61;
constexpr u32 PITCH_UNIT = 16;
constexpr u32 PHASE_BIT = 63;
}

/// What was started, on the wire.
struct StartedRecord {
    /// Number of the operation on its communicator.
    u64 epoch;
    /// Epoch of the plan.
    u64 plan;
    /// Hash of the configuration.
    u64 config;
    /// Kind of operation.
    u32 kind;
    /// Elements per row.
    u32 hidden;
    /// Entries per token.
    u32 topk;
    /// Code of the row format.
    u32 format;
};
static_assert(sizeof(StartedRecord) == 40, "StartedRecord");
static_assert(OFFSET_OF(StartedRecord, epoch) == 0, "StartedRecord");
static_assert(OFFSET_OF(StartedRecord, plan) == 8, "StartedRecord");
static_assert(OFFSET_OF(StartedRecord, config) == 16, "StartedRecord");
static_assert(OFFSET_OF(StartedRecord, kind) == 24, "StartedRecord");
static_assert(OFFSET_OF(StartedRecord, hidden) == 28, "StartedRecord");
static_assert(OFFSET_OF(StartedRecord, topk) == 32, "StartedRecord");
static_assert(OFFSET_OF(StartedRecord, format) == 36, "StartedRecord");

/// Why an input was refused, on the wire; all zero for no reason.
struct ReasonRecord {
    /// See `reason`.
    u64 code;
    /// What the reason names.
    u64 args[4];
};
static_assert(sizeof(ReasonRecord) == 40, "ReasonRecord");
static_assert(OFFSET_OF(ReasonRecord, code) == 0, "ReasonRecord");
static_assert(OFFSET_OF(ReasonRecord, args) == 8, "ReasonRecord");

/// The parts of a receive buffer as offsets in its rank's region: what a peer is told, so that it derives none.
struct RecvParts {
    /// Elements.
    u64 x;
    /// Scales.
    u64 scales;
    /// Local expert indices.
    u64 topk_idx;
    /// Weights.
    u64 topk_weights;
    /// Source (rank, token).
    u64 source;
};
static_assert(sizeof(RecvParts) == 40, "RecvParts");
static_assert(OFFSET_OF(RecvParts, x) == 0, "RecvParts");
static_assert(OFFSET_OF(RecvParts, scales) == 8, "RecvParts");
static_assert(OFFSET_OF(RecvParts, topk_idx) == 16, "RecvParts");
static_assert(OFFSET_OF(RecvParts, topk_weights) == 24, "RecvParts");
static_assert(OFFSET_OF(RecvParts, source) == 32, "RecvParts");

/// Opens an operation towards the peers of the node: what was started, why it is poisoned (if it is), and
/// the buffer that peers will touch.
struct EnterRecord {
    /// What was started.
    StartedRecord started;
    /// Why the rank's input is invalid.
    ReasonRecord poison;
    /// Rows the buffer holds.
    u64 capacity;
    /// Where its parts lie.
    RecvParts parts;
};
static_assert(sizeof(EnterRecord) == 128, "EnterRecord");
static_assert(OFFSET_OF(EnterRecord, started) == 0, "EnterRecord");
static_assert(OFFSET_OF(EnterRecord, poison) == 40, "EnterRecord");
static_assert(OFFSET_OF(EnterRecord, capacity) == 80, "EnterRecord");
static_assert(OFFSET_OF(EnterRecord, parts) == 88, "EnterRecord");

/// Opens an operation towards a peer of the rail; the count block follows where the operation plans.
struct RailRecord {
    /// What was started.
    StartedRecord started;
    /// Why the rank's input is invalid.
    ReasonRecord poison;
};
static_assert(sizeof(RailRecord) == 80, "RailRecord");
static_assert(OFFSET_OF(RailRecord, started) == 0, "RailRecord");
static_assert(OFFSET_OF(RailRecord, poison) == 40, "RailRecord");

/// A node's verdict on an operation: good, refused for one rank's reason, or out of step.
struct VerdictRecord {
    /// The rank that speaks for the node, is refused, or is out of step.
    u32 rank;
    /// The rank that the one out of step differs from.
    u32 reference;
    /// See `verdict`.
    u64 state;
    /// Why it was refused.
    ReasonRecord reason;
    /// What `rank` started.
    StartedRecord started;
    /// What `reference` started.
    StartedRecord expected;
};
static_assert(sizeof(VerdictRecord) == 136, "VerdictRecord");
static_assert(OFFSET_OF(VerdictRecord, rank) == 0, "VerdictRecord");
static_assert(OFFSET_OF(VerdictRecord, reference) == 4, "VerdictRecord");
static_assert(OFFSET_OF(VerdictRecord, state) == 8, "VerdictRecord");
static_assert(OFFSET_OF(VerdictRecord, reason) == 16, "VerdictRecord");
static_assert(OFFSET_OF(VerdictRecord, started) == 56, "VerdictRecord");
static_assert(OFFSET_OF(VerdictRecord, expected) == 96, "VerdictRecord");

/// A table of equal things in memory: entry (i, j) is at `at + i * outer + j * inner`.
struct Table {
    /// Entry (0, 0).
    u64 at;
    /// Bytes from (i, j) to (i + 1, j).
    u64 outer;
    /// Bytes from (i, j) to (i, j + 1).
    u64 inner;
};
static_assert(sizeof(Table) == 24, "Table");
static_assert(OFFSET_OF(Table, at) == 0, "Table");
static_assert(OFFSET_OF(Table, outer) == 8, "Table");
static_assert(OFFSET_OF(Table, inner) == 16, "Table");

/// What the kernels of both lanes of a rank share.
struct RankState {
    /// Not 0 once a warp of this rank has reported a fault: all roles drain and return.
    u32 faulted;
    /// Keeps what follows aligned.
    u32 reserved;
    /// Commands reserved in the queue so far.
    u64 commands;
};
static_assert(sizeof(RankState) == 16, "RankState");
static_assert(OFFSET_OF(RankState, faulted) == 0, "RankState");
static_assert(OFFSET_OF(RankState, reserved) == 4, "RankState");
static_assert(OFFSET_OF(RankState, commands) == 8, "RankState");

/// One lane of a rank between and during operations. Only kernels advance it.
struct LaneState {
    /// Number of the next operation, modulo 2^48.
    u64 turn;
    /// Lowest index of an entry of `topk_idx` that is no expert; all ones if there is none.
    u64 invalid;
    /// Why this rank's input is invalid, as its records say.
    ReasonRecord poison;
    /// Whether the node's verdict is good (E3).
    u32 node_good;
    /// Whether the world's verdict is good (E4).
    u32 world_good;
    /// Warps that are done with the operation.
    u32 finished;
    /// Keeps the size a multiple of 8.
    u32 reserved;
};
static_assert(sizeof(LaneState) == 72, "LaneState");
static_assert(OFFSET_OF(LaneState, turn) == 0, "LaneState");
static_assert(OFFSET_OF(LaneState, invalid) == 8, "LaneState");
static_assert(OFFSET_OF(LaneState, poison) == 16, "LaneState");
static_assert(OFFSET_OF(LaneState, node_good) == 56, "LaneState");
static_assert(OFFSET_OF(LaneState, world_good) == 60, "LaneState");
static_assert(OFFSET_OF(LaneState, finished) == 64, "LaneState");
static_assert(OFFSET_OF(LaneState, reserved) == 68, "LaneState");

/// A plan, ahead of its tables.
struct HandleState {
    /// Number of the operation that made it.
    u64 plan;
    /// Not 0 once its rows have been dispatched, so that combine knows where they are.
    u32 dispatched;
    /// Tokens of the plan's rank.
    u32 tokens;
    /// Slots this rank puts on the rail, over all nodes.
    u32 sent;
    /// Slots that come to it along the rail.
    u32 forwarded;
    /// Its tokens that its own node wants.
    u32 own;
    /// Keeps the size a multiple of 8.
    u32 reserved;
};
static_assert(sizeof(HandleState) == 32, "HandleState");
static_assert(OFFSET_OF(HandleState, plan) == 0, "HandleState");
static_assert(OFFSET_OF(HandleState, dispatched) == 8, "HandleState");
static_assert(OFFSET_OF(HandleState, tokens) == 12, "HandleState");
static_assert(OFFSET_OF(HandleState, sent) == 16, "HandleState");
static_assert(OFFSET_OF(HandleState, forwarded) == 20, "HandleState");
static_assert(OFFSET_OF(HandleState, own) == 24, "HandleState");
static_assert(OFFSET_OF(HandleState, reserved) == 28, "HandleState");

/// A row of a token at a rank of the own node; `local` is all ones for no row.
struct FinalRow {
    /// The local rank.
    u32 local;
    /// The row in its receive buffer.
    u32 row;
};
static_assert(sizeof(FinalRow) == 8, "FinalRow");
static_assert(OFFSET_OF(FinalRow, local) == 0, "FinalRow");
static_assert(OFFSET_OF(FinalRow, row) == 4, "FinalRow");

/// Where an expert is.
struct ExpertPlace {
    /// Its rank's node.
    u32 node;
    /// Its rank's index in the node.
    u32 local;
    /// Its index among its rank's experts.
    u32 index;
    /// Its position in the expert part of the node's count block.
    u32 slot;
};
static_assert(sizeof(ExpertPlace) == 16, "ExpertPlace");
static_assert(OFFSET_OF(ExpertPlace, node) == 0, "ExpertPlace");
static_assert(OFFSET_OF(ExpertPlace, local) == 4, "ExpertPlace");
static_assert(OFFSET_OF(ExpertPlace, index) == 8, "ExpertPlace");
static_assert(OFFSET_OF(ExpertPlace, slot) == 12, "ExpertPlace");

/// What a kernel tells the host of a lane's operations.
struct Report {
    /// Operations whose counts are known: rows and entries per expert can be read.
    u64 planned;
    /// Operations that have ended: the status can be read.
    u64 ended;
    /// Rows this rank receives.
    u64 rows;
    /// See `status`.
    u32 status;
    /// Slots this rank puts on the rail in a dispatch.
    u32 sent;
};
static_assert(sizeof(Report) == 32, "Report");
static_assert(OFFSET_OF(Report, planned) == 0, "Report");
static_assert(OFFSET_OF(Report, ended) == 8, "Report");
static_assert(OFFSET_OF(Report, rows) == 16, "Report");
static_assert(OFFSET_OF(Report, status) == 24, "Report");
static_assert(OFFSET_OF(Report, sent) == 28, "Report");

/// The first fault that a warp of the rank met, and what it waited for.
struct FaultRecord {
    /// Not 0 once the rest is written.
    u32 written;
    /// Lane of the operation.
    u32 lane;
    /// Kind of operation.
    u32 kind;
    /// See `role`.
    u32 role;
    /// Channel; all ones for none.
    u32 channel;
    /// The rank that must move first.
    u32 peer;
    /// See `waits`.
    u32 what;
    /// Keeps what follows aligned.
    u32 reserved;
    /// Number of the operation on its lane.
    u64 epoch;
    /// The index that would end the wait.
    u64 expected;
    /// The index seen last.
    u64 seen;
};
static_assert(sizeof(FaultRecord) == 56, "FaultRecord");
static_assert(OFFSET_OF(FaultRecord, written) == 0, "FaultRecord");
static_assert(OFFSET_OF(FaultRecord, lane) == 4, "FaultRecord");
static_assert(OFFSET_OF(FaultRecord, kind) == 8, "FaultRecord");
static_assert(OFFSET_OF(FaultRecord, role) == 12, "FaultRecord");
static_assert(OFFSET_OF(FaultRecord, channel) == 16, "FaultRecord");
static_assert(OFFSET_OF(FaultRecord, peer) == 20, "FaultRecord");
static_assert(OFFSET_OF(FaultRecord, what) == 24, "FaultRecord");
static_assert(OFFSET_OF(FaultRecord, reserved) == 28, "FaultRecord");
static_assert(OFFSET_OF(FaultRecord, epoch) == 32, "FaultRecord");
static_assert(OFFSET_OF(FaultRecord, expected) == 40, "FaultRecord");
static_assert(OFFSET_OF(FaultRecord, seen) == 48, "FaultRecord");

/// A role's view of one node during a step.
struct NodeCursor {
    /// Low bits of the ring's cursor at the step's start.
    u32 cursor;
    /// Slots that may be written, or read.
    u32 room;
    /// Slots chosen for the step so far.
    u32 chosen;
    /// Slots whose copies have been issued so far.
    u32 issued;
    /// Next token of the stream, in the channel's order.
    u32 position;
    /// Keeps the size a multiple of 8.
    u32 reserved;
};
static_assert(sizeof(NodeCursor) == 24, "NodeCursor");
static_assert(OFFSET_OF(NodeCursor, cursor) == 0, "NodeCursor");
static_assert(OFFSET_OF(NodeCursor, room) == 4, "NodeCursor");
static_assert(OFFSET_OF(NodeCursor, chosen) == 8, "NodeCursor");
static_assert(OFFSET_OF(NodeCursor, issued) == 12, "NodeCursor");
static_assert(OFFSET_OF(NodeCursor, position) == 16, "NodeCursor");
static_assert(OFFSET_OF(NodeCursor, reserved) == 20, "NodeCursor");

/// The plan kernel's shared memory, ahead of its warps' running counts.
struct PlanShared {
    /// The rank's enter record.
    EnterRecord enter;
    /// The node's verdict.
    VerdictRecord verdict;
    /// Whether the last wait came to its end.
    u32 go_on;
    /// Keeps the size a multiple of 8.
    u32 reserved;
};
static_assert(sizeof(PlanShared) == 272, "PlanShared");
static_assert(OFFSET_OF(PlanShared, enter) == 0, "PlanShared");
static_assert(OFFSET_OF(PlanShared, verdict) == 128, "PlanShared");
static_assert(OFFSET_OF(PlanShared, go_on) == 264, "PlanShared");
static_assert(OFFSET_OF(PlanShared, reserved) == 268, "PlanShared");

/// A token chosen for a step.
struct Chosen {
    /// The token.
    u32 token;
    /// Bit k: a copy goes to the place of entry k.
    u32 entries;
};
static_assert(sizeof(Chosen) == 8, "Chosen");
static_assert(OFFSET_OF(Chosen, token) == 0, "Chosen");
static_assert(OFFSET_OF(Chosen, entries) == 4, "Chosen");

/// One warp's share of shared memory: stages for bulk copies and what the lanes of the warp share.
struct WarpMap {
    /// Bytes of a stage.
    u32 stage_bytes;
    /// Binary logarithm of the number of stages.
    u32 stages_log2;
    /// Offset of the stages.
    u32 stages;
    /// Offset of their barriers.
    u32 barriers;
    /// Offset of the two rows of scales (dispatch) or the two pieces of sums (combine) on their way out.
    u32 outgoing;
    /// Bytes of one of the two.
    u32 outgoing_bytes;
    /// Offset of the node cursors.
    u32 cursors;
    /// Offset of the step's tokens.
    u32 chosen;
    /// Bytes of the share.
    u32 bytes;
    /// Keeps the size a multiple of 8.
    u32 reserved;
};
static_assert(sizeof(WarpMap) == 40, "WarpMap");
static_assert(OFFSET_OF(WarpMap, stage_bytes) == 0, "WarpMap");
static_assert(OFFSET_OF(WarpMap, stages_log2) == 4, "WarpMap");
static_assert(OFFSET_OF(WarpMap, stages) == 8, "WarpMap");
static_assert(OFFSET_OF(WarpMap, barriers) == 12, "WarpMap");
static_assert(OFFSET_OF(WarpMap, outgoing) == 16, "WarpMap");
static_assert(OFFSET_OF(WarpMap, outgoing_bytes) == 20, "WarpMap");
static_assert(OFFSET_OF(WarpMap, cursors) == 24, "WarpMap");
static_assert(OFFSET_OF(WarpMap, chosen) == 28, "WarpMap");
static_assert(OFFSET_OF(WarpMap, bytes) == 32, "WarpMap");
static_assert(OFFSET_OF(WarpMap, reserved) == 36, "WarpMap");

/// One operation of one rank. Addresses are those of the rank's own mappings.
struct Params {
    /// Nodes of the world.
    u32 nodes;
    /// Ranks of a node.
    u32 ranks_per_node;
    /// The rank's node.
    u32 node;
    /// Its index there.
    u32 local;
    /// Channels.
    u32 channels;
    /// Slots of a ring, a power of two.
    u32 slots;
    /// Tokens published by one tail update.
    u32 chunk;
    /// 0: dispatch, 1: combine.
    u32 lane;
    /// See `kind`.
    u32 kind;
    /// Generation of all index words.
    u32 generation;
    /// Where indices start in a generation.
    u64 first_index;
    /// Nanoseconds that a wait may last.
    u64 deadline_ns;
    /// What is started; epoch and plan are the kernel's to fill in.
    StartedRecord started;
    /// Why the input is invalid, as far as the host can tell.
    ReasonRecord poison;
    /// Experts of the world.
    u32 num_experts;
    /// Experts of the rank.
    u32 own_experts;
    /// Tokens of the rank.
    u32 tokens;
    /// Entries per token.
    u32 topk;
    /// Bytes of a row as it moves.
    u32 row_bytes;
    /// Bytes of a row as the caller holds it.
    u32 input_bytes;
    /// Bytes from one row's scales to the next's, a multiple of 16; 0 for BF16.
    u32 scale_pitch;
    /// Scales of a row.
    u32 scale_groups;
    /// Bytes of a scale.
    u32 scale_bytes;
    /// See `encode`.
    u32 encode;
    /// Sums of weights that a combine returns per token.
    u32 weights;
    /// Final rows kept per forwarded token.
    u32 fan;
    /// 32-bit words of a header, and where in it the experts, the weights and the offsets start.
    u32 header_words;
    /// Index of the first expert in a header.
    u32 header_experts;
    /// Index of the first weight.
    u32 header_weights;
    /// Index of the first offset.
    u32 header_offsets;
    /// Offset of the row in a slot.
    u32 slot_row;
    /// Offset of the scales in a slot.
    u32 slot_scales;
    /// Bytes from slot to slot.
    u32 slot_pitch;
    /// Words of a count block.
    u32 count_words;
    /// Index of the number of tokens of channel 0 in a count block; rows for each local rank follow it.
    u32 count_tokens;
    /// Words from channel to channel.
    u32 count_channel;
    /// Index of the entries of the node's first expert.
    u32 count_experts;
    /// Index of the entries of the rank's first expert, from there.
    u32 count_own_expert;
    /// `i64 [tokens, topk]`.
    u64 topk_idx;
    /// `f32 [tokens, topk]`.
    u64 topk_weights;
    /// Rows [tokens, input_bytes].
    u64 x;
    /// Scales of E4M3 rows.
    u64 scales;
    /// Elements (f32, or words of four UE8M0 scales) between tokens.
    u64 scale_token_stride;
    /// Elements between groups (or words of four).
    u64 scale_group_stride;
    /// Bias of a combine, `BF16 [tokens, hidden]`; 0 for none.
    u64 bias;
    /// Combined rows, `BF16 [tokens, hidden]`.
    u64 out;
    /// Combined weights, `f32 [tokens, weights]`.
    u64 out_weights;
    /// Rows of the buffer that peers touch.
    u64 capacity;
    /// Its parts, as offsets in the region.
    RecvParts parts;
    /// Address of the region.
    u64 region;
    /// Addresses of the regions of the node, `u64 [ranks per node]`.
    u64 peers;
    /// Where each expert is: `ExpertPlace [experts]`.
    u64 placement;
    /// Offsets in a region: enter words, by (0, local).
    Table enter_words;
    /// Gathered words, by (0, local).
    Table gathered_words;
    /// Rail words, by (0, node).
    Table rail_words;
    /// Verdict words, by (0, node).
    Table verdict_words;
    /// Done words, by (channel, local).
    Table done_words;
    /// Tail words, by (channel, node).
    Table tail_words;
    /// Head words, by (channel, node).
    Table head_words;
    /// Private tails, by (channel, node).
    Table sent_words;
    /// Private heads, by (channel, node).
    Table taken_words;
    /// Enter records, by (parity, local).
    Table enter_records;
    /// Rail records and counts, by (parity, node).
    Table rail_records;
    /// Verdicts, by (parity, node).
    Table verdict_records;
    /// Rings, by (channel, peer): peers are the other nodes, ascending.
    Table rings;
    /// Addresses of the send rings, by (channel, peer).
    Table send_rings;
    /// Address of the rank's state.
    u64 rank_state;
    /// Address of the lane's state.
    u64 lane_state;
    /// `u32 [nodes]`.
    u64 open;
    /// `u32 [channels, nodes]`.
    u64 outgoing;
    /// `u32 [channels, nodes]`.
    u64 incoming;
    /// Addresses of the rail records to send, by (0, node).
    Table rail_outbox;
    /// Address of the verdict to send.
    u64 verdict_outbox;
    /// `u32 [world, count words]`.
    u64 gathered;
    /// `u32 [world]`.
    u64 agrees;
    /// Address of the command queue.
    u64 queue;
    /// Commands that fit, a power of two.
    u64 queue_capacity;
    /// Commands the proxy has taken.
    u64 taken;
    /// The host's abort flag.
    u64 abort;
    /// The fault record.
    u64 fault;
    /// The lane's report.
    u64 report;
    /// Entries for each expert, in the report.
    u64 report_experts;
    /// Verdicts, in the report.
    u64 report_verdicts;
    /// Completions of rail records, `u64 [nodes]`.
    u64 rail_completions;
    /// Completions of verdicts, `u64 [nodes]`.
    u64 verdict_completions;
    /// Completions of chunks, `u64 [channels, nodes]`.
    u64 chunk_completions;
    /// The plan's state.
    u64 handle;
    /// `u32 [tokens, header words]`.
    u64 headers;
    /// `u32 [channels, nodes]`.
    u64 plan_sends;
    /// `u32 [nodes, channels]`.
    u64 plan_tokens;
    /// `u32 [nodes, channels, ranks per node]`.
    u64 plan_bases;
    /// `u64 [ranks per node]`.
    u64 plan_rows;
    /// `u32 [nodes, channels]`.
    u64 plan_first;
    /// `FinalRow [forwarded, fan]`.
    u64 placed;
    /// Each warp's share of shared memory.
    WarpMap warp;
    /// Offset of the running counts in the plan kernel's shared memory.
    u32 plan_counts;
    /// Bytes of a warp's running counts.
    u32 plan_count_bytes;
};
static_assert(sizeof(Params) == 1000, "Params");
static_assert(OFFSET_OF(Params, nodes) == 0, "Params");
static_assert(OFFSET_OF(Params, ranks_per_node) == 4, "Params");
static_assert(OFFSET_OF(Params, node) == 8, "Params");
static_assert(OFFSET_OF(Params, local) == 12, "Params");
static_assert(OFFSET_OF(Params, channels) == 16, "Params");
static_assert(OFFSET_OF(Params, slots) == 20, "Params");
static_assert(OFFSET_OF(Params, chunk) == 24, "Params");
static_assert(OFFSET_OF(Params, lane) == 28, "Params");
static_assert(OFFSET_OF(Params, kind) == 32, "Params");
static_assert(OFFSET_OF(Params, generation) == 36, "Params");
static_assert(OFFSET_OF(Params, first_index) == 40, "Params");
static_assert(OFFSET_OF(Params, deadline_ns) == 48, "Params");
static_assert(OFFSET_OF(Params, started) == 56, "Params");
static_assert(OFFSET_OF(Params, poison) == 96, "Params");
static_assert(OFFSET_OF(Params, num_experts) == 136, "Params");
static_assert(OFFSET_OF(Params, own_experts) == 140, "Params");
static_assert(OFFSET_OF(Params, tokens) == 144, "Params");
static_assert(OFFSET_OF(Params, topk) == 148, "Params");
static_assert(OFFSET_OF(Params, row_bytes) == 152, "Params");
static_assert(OFFSET_OF(Params, input_bytes) == 156, "Params");
static_assert(OFFSET_OF(Params, scale_pitch) == 160, "Params");
static_assert(OFFSET_OF(Params, scale_groups) == 164, "Params");
static_assert(OFFSET_OF(Params, scale_bytes) == 168, "Params");
static_assert(OFFSET_OF(Params, encode) == 172, "Params");
static_assert(OFFSET_OF(Params, weights) == 176, "Params");
static_assert(OFFSET_OF(Params, fan) == 180, "Params");
static_assert(OFFSET_OF(Params, header_words) == 184, "Params");
static_assert(OFFSET_OF(Params, header_experts) == 188, "Params");
static_assert(OFFSET_OF(Params, header_weights) == 192, "Params");
static_assert(OFFSET_OF(Params, header_offsets) == 196, "Params");
static_assert(OFFSET_OF(Params, slot_row) == 200, "Params");
static_assert(OFFSET_OF(Params, slot_scales) == 204, "Params");
static_assert(OFFSET_OF(Params, slot_pitch) == 208, "Params");
static_assert(OFFSET_OF(Params, count_words) == 212, "Params");
static_assert(OFFSET_OF(Params, count_tokens) == 216, "Params");
static_assert(OFFSET_OF(Params, count_channel) == 220, "Params");
static_assert(OFFSET_OF(Params, count_experts) == 224, "Params");
static_assert(OFFSET_OF(Params, count_own_expert) == 228, "Params");
static_assert(OFFSET_OF(Params, topk_idx) == 232, "Params");
static_assert(OFFSET_OF(Params, topk_weights) == 240, "Params");
static_assert(OFFSET_OF(Params, x) == 248, "Params");
static_assert(OFFSET_OF(Params, scales) == 256, "Params");
static_assert(OFFSET_OF(Params, scale_token_stride) == 264, "Params");
static_assert(OFFSET_OF(Params, scale_group_stride) == 272, "Params");
static_assert(OFFSET_OF(Params, bias) == 280, "Params");
static_assert(OFFSET_OF(Params, out) == 288, "Params");
static_assert(OFFSET_OF(Params, out_weights) == 296, "Params");
static_assert(OFFSET_OF(Params, capacity) == 304, "Params");
static_assert(OFFSET_OF(Params, parts) == 312, "Params");
static_assert(OFFSET_OF(Params, region) == 352, "Params");
static_assert(OFFSET_OF(Params, peers) == 360, "Params");
static_assert(OFFSET_OF(Params, placement) == 368, "Params");
static_assert(OFFSET_OF(Params, enter_words) == 376, "Params");
static_assert(OFFSET_OF(Params, gathered_words) == 400, "Params");
static_assert(OFFSET_OF(Params, rail_words) == 424, "Params");
static_assert(OFFSET_OF(Params, verdict_words) == 448, "Params");
static_assert(OFFSET_OF(Params, done_words) == 472, "Params");
static_assert(OFFSET_OF(Params, tail_words) == 496, "Params");
static_assert(OFFSET_OF(Params, head_words) == 520, "Params");
static_assert(OFFSET_OF(Params, sent_words) == 544, "Params");
static_assert(OFFSET_OF(Params, taken_words) == 568, "Params");
static_assert(OFFSET_OF(Params, enter_records) == 592, "Params");
static_assert(OFFSET_OF(Params, rail_records) == 616, "Params");
static_assert(OFFSET_OF(Params, verdict_records) == 640, "Params");
static_assert(OFFSET_OF(Params, rings) == 664, "Params");
static_assert(OFFSET_OF(Params, send_rings) == 688, "Params");
static_assert(OFFSET_OF(Params, rank_state) == 712, "Params");
static_assert(OFFSET_OF(Params, lane_state) == 720, "Params");
static_assert(OFFSET_OF(Params, open) == 728, "Params");
static_assert(OFFSET_OF(Params, outgoing) == 736, "Params");
static_assert(OFFSET_OF(Params, incoming) == 744, "Params");
static_assert(OFFSET_OF(Params, rail_outbox) == 752, "Params");
static_assert(OFFSET_OF(Params, verdict_outbox) == 776, "Params");
static_assert(OFFSET_OF(Params, gathered) == 784, "Params");
static_assert(OFFSET_OF(Params, agrees) == 792, "Params");
static_assert(OFFSET_OF(Params, queue) == 800, "Params");
static_assert(OFFSET_OF(Params, queue_capacity) == 808, "Params");
static_assert(OFFSET_OF(Params, taken) == 816, "Params");
static_assert(OFFSET_OF(Params, abort) == 824, "Params");
static_assert(OFFSET_OF(Params, fault) == 832, "Params");
static_assert(OFFSET_OF(Params, report) == 840, "Params");
static_assert(OFFSET_OF(Params, report_experts) == 848, "Params");
static_assert(OFFSET_OF(Params, report_verdicts) == 856, "Params");
static_assert(OFFSET_OF(Params, rail_completions) == 864, "Params");
static_assert(OFFSET_OF(Params, verdict_completions) == 872, "Params");
static_assert(OFFSET_OF(Params, chunk_completions) == 880, "Params");
static_assert(OFFSET_OF(Params, handle) == 888, "Params");
static_assert(OFFSET_OF(Params, headers) == 896, "Params");
static_assert(OFFSET_OF(Params, plan_sends) == 904, "Params");
static_assert(OFFSET_OF(Params, plan_tokens) == 912, "Params");
static_assert(OFFSET_OF(Params, plan_bases) == 920, "Params");
static_assert(OFFSET_OF(Params, plan_rows) == 928, "Params");
static_assert(OFFSET_OF(Params, plan_first) == 936, "Params");
static_assert(OFFSET_OF(Params, placed) == 944, "Params");
static_assert(OFFSET_OF(Params, warp) == 952, "Params");
static_assert(OFFSET_OF(Params, plan_counts) == 992, "Params");
static_assert(OFFSET_OF(Params, plan_count_bytes) == 996, "Params");

/// How the making of an order ended.
namespace order {
/// It can be used.
constexpr u32 OK = 1;
/// More rows were received than `topk_idx` has.
constexpr u32 TOO_MANY_RECEIVED = 2;
/// An entry of `topk_idx` is neither an expert of this rank nor −1.
constexpr u32 EXPERT_OUT_OF_RANGE = 3;
/// More expanded rows than there is room for: the end of the last expert's rows says how many.
constexpr u32 TOO_MANY_ROWS = 4;
}

/// What expanded scales are.
namespace columns {
/// Not there.
constexpr u32 NONE = 0;
/// f32 as received, f32 [G, column pitch].
constexpr u32 F32 = 1;
/// UE8M0 widened to f32, f32 [G, column pitch].
constexpr u32 WIDENED = 2;
/// UE8M0, four to a word, u32 [G / 4 rounded up, column pitch].
constexpr u32 PACKED = 3;
}

/// An expert-major order, beside its tables. One that can't be used has no rows.
struct ExpertOrder {
    /// See `order`.
    u32 status;
    /// Received rows.
    u32 received;
    /// Expanded rows, padding included.
    u32 rows;
    /// Keeps what follows aligned.
    u32 reserved;
    /// Lowest index of an entry of `topk_idx` that is no expert; all ones if there is none.
    u64 invalid;
};
static_assert(sizeof(ExpertOrder) == 24, "ExpertOrder");
static_assert(OFFSET_OF(ExpertOrder, status) == 0, "ExpertOrder");
static_assert(OFFSET_OF(ExpertOrder, received) == 4, "ExpertOrder");
static_assert(OFFSET_OF(ExpertOrder, rows) == 8, "ExpertOrder");
static_assert(OFFSET_OF(ExpertOrder, reserved) == 12, "ExpertOrder");
static_assert(OFFSET_OF(ExpertOrder, invalid) == 16, "ExpertOrder");

/// Makes an expert-major order. Entries that there is room for, capacity * K, and E * (alignment - 1) come to
/// at most 2^31 - 1.
struct ExpertOrderParams {
    /// i32 [capacity, K]: experts of this rank, or −1.
    u64 topk_idx;
    /// u64: received rows.
    u64 received;
    /// The order made: `ExpertOrder`.
    u64 order;
    /// `u32 [E]`: rows of each expert, padding excluded.
    u64 counts;
    /// u32 [E + 1]: where each expert's rows start, then where the last ones end.
    u64 starts;
    /// u32 [capacity, K]: the expanded row of every entry; all ones where there is none.
    u64 expanded;
    /// u32 [expanded capacity]: the received row of every expanded row; all ones for padding.
    u64 sources;
    /// u32 [warps, E], of no use afterwards.
    u64 scratch;
    /// Received rows that there is room for.
    u32 capacity;
    /// Expanded rows that there is room for.
    u32 expanded_capacity;
    /// K, at least 1.
    u32 topk;
    /// E.
    u32 num_experts;
    /// What each expert's number of rows is padded to a multiple of, at least 1.
    u32 alignment;
    /// Keeps the size a multiple of 8.
    u32 reserved;
};
static_assert(sizeof(ExpertOrderParams) == 88, "ExpertOrderParams");
static_assert(OFFSET_OF(ExpertOrderParams, topk_idx) == 0, "ExpertOrderParams");
static_assert(OFFSET_OF(ExpertOrderParams, received) == 8, "ExpertOrderParams");
static_assert(OFFSET_OF(ExpertOrderParams, order) == 16, "ExpertOrderParams");
static_assert(OFFSET_OF(ExpertOrderParams, counts) == 24, "ExpertOrderParams");
static_assert(OFFSET_OF(ExpertOrderParams, starts) == 32, "ExpertOrderParams");
static_assert(OFFSET_OF(ExpertOrderParams, expanded) == 40, "ExpertOrderParams");
static_assert(OFFSET_OF(ExpertOrderParams, sources) == 48, "ExpertOrderParams");
static_assert(OFFSET_OF(ExpertOrderParams, scratch) == 56, "ExpertOrderParams");
static_assert(OFFSET_OF(ExpertOrderParams, capacity) == 64, "ExpertOrderParams");
static_assert(OFFSET_OF(ExpertOrderParams, expanded_capacity) == 68, "ExpertOrderParams");
static_assert(OFFSET_OF(ExpertOrderParams, topk) == 72, "ExpertOrderParams");
static_assert(OFFSET_OF(ExpertOrderParams, num_experts) == 76, "ExpertOrderParams");
static_assert(OFFSET_OF(ExpertOrderParams, alignment) == 80, "ExpertOrderParams");
static_assert(OFFSET_OF(ExpertOrderParams, reserved) == 84, "ExpertOrderParams");

/// Expands received rows and their scales. Rows and rows of scales are multiples of 16 bytes, at such
/// addresses.
struct ExpandParams {
    /// `ExpertOrder`.
    u64 order;
    /// The received row of every expanded row.
    u64 sources;
    /// Received rows.
    u64 x;
    /// Expanded rows. Padding is zero; what lies after the last row is left alone.
    u64 out;
    /// Scales of received rows.
    u64 scales;
    /// Expanded scales, column-major. Those of padding rows and after the last row are zero.
    u64 out_scales;
    /// Bytes of a row.
    u32 row_bytes;
    /// Bytes from one received row's scales to the next's.
    u32 scale_pitch;
    /// Scales of a row.
    u32 scale_groups;
    /// Elements from column to column, at least the number of expanded rows.
    u32 column_pitch;
    /// See `columns`.
    u32 columns;
    /// Keeps the size a multiple of 8.
    u32 reserved;
};
static_assert(sizeof(ExpandParams) == 72, "ExpandParams");
static_assert(OFFSET_OF(ExpandParams, order) == 0, "ExpandParams");
static_assert(OFFSET_OF(ExpandParams, sources) == 8, "ExpandParams");
static_assert(OFFSET_OF(ExpandParams, x) == 16, "ExpandParams");
static_assert(OFFSET_OF(ExpandParams, out) == 24, "ExpandParams");
static_assert(OFFSET_OF(ExpandParams, scales) == 32, "ExpandParams");
static_assert(OFFSET_OF(ExpandParams, out_scales) == 40, "ExpandParams");
static_assert(OFFSET_OF(ExpandParams, row_bytes) == 48, "ExpandParams");
static_assert(OFFSET_OF(ExpandParams, scale_pitch) == 52, "ExpandParams");
static_assert(OFFSET_OF(ExpandParams, scale_groups) == 56, "ExpandParams");
static_assert(OFFSET_OF(ExpandParams, column_pitch) == 60, "ExpandParams");
static_assert(OFFSET_OF(ExpandParams, columns) == 64, "ExpandParams");
static_assert(OFFSET_OF(ExpandParams, reserved) == 68, "ExpandParams");

/// Reduces the experts' outputs to one row per received row.
struct CollapseParams {
    /// `ExpertOrder`.
    u64 order;
    /// The expanded row of every entry.
    u64 expanded;
    /// BF16 [expanded rows, H], at an address that is a multiple of 16.
    u64 y;
    /// f32 [R, K]; 0 for none.
    u64 weights;
    /// BF16 [R, H], at an address that is a multiple of 16.
    u64 out;
    /// H, a multiple of 8.
    u32 hidden;
    /// K, at most 32.
    u32 topk;
};
static_assert(sizeof(CollapseParams) == 48, "CollapseParams");
static_assert(OFFSET_OF(CollapseParams, order) == 0, "CollapseParams");
static_assert(OFFSET_OF(CollapseParams, expanded) == 8, "CollapseParams");
static_assert(OFFSET_OF(CollapseParams, y) == 16, "CollapseParams");
static_assert(OFFSET_OF(CollapseParams, weights) == 24, "CollapseParams");
static_assert(OFFSET_OF(CollapseParams, out) == 32, "CollapseParams");
static_assert(OFFSET_OF(CollapseParams, hidden) == 40, "CollapseParams");
static_assert(OFFSET_OF(CollapseParams, topk) == 44, "CollapseParams");

/// Dequantises received rows.
struct DequantiseParams {
    /// E4M3 [R, H], at an address that is a multiple of 16.
    u64 x;
    /// Scales of the rows.
    u64 scales;
    /// f32 or BF16 [R, H], at an address that is a multiple of 16.
    u64 out;
    /// u64: received rows.
    u64 received;
    /// Rows that there is room for: no more are dequantised.
    u32 capacity;
    /// H, a multiple of 16.
    u32 hidden;
    /// Bytes from one row's scales to the next's, a multiple of a scale's.
    u32 scale_pitch;
    /// Bytes of a scale: 4 for f32, 1 for UE8M0.
    u32 scale_bytes;
    /// Bytes of an element of the result: 4 for f32, 2 for BF16.
    u32 out_bytes;
    /// Keeps the size a multiple of 8.
    u32 reserved;
};
static_assert(sizeof(DequantiseParams) == 56, "DequantiseParams");
static_assert(OFFSET_OF(DequantiseParams, x) == 0, "DequantiseParams");
static_assert(OFFSET_OF(DequantiseParams, scales) == 8, "DequantiseParams");
static_assert(OFFSET_OF(DequantiseParams, out) == 16, "DequantiseParams");
static_assert(OFFSET_OF(DequantiseParams, received) == 24, "DequantiseParams");
static_assert(OFFSET_OF(DequantiseParams, capacity) == 32, "DequantiseParams");
static_assert(OFFSET_OF(DequantiseParams, hidden) == 36, "DequantiseParams");
static_assert(OFFSET_OF(DequantiseParams, scale_pitch) == 40, "DequantiseParams");
static_assert(OFFSET_OF(DequantiseParams, scale_bytes) == 44, "DequantiseParams");
static_assert(OFFSET_OF(DequantiseParams, out_bytes) == 48, "DequantiseParams");
static_assert(OFFSET_OF(DequantiseParams, reserved) == 52, "DequantiseParams");

/// Copies bytes.
struct CopyParams {
    /// Where they are, a multiple of 16.
    u64 from;
    /// Where they go, a multiple of 16; the two do not overlap.
    u64 to;
    /// How many, a multiple of 16.
    u64 bytes;
};
static_assert(sizeof(CopyParams) == 24, "CopyParams");
static_assert(OFFSET_OF(CopyParams, from) == 0, "CopyParams");
static_assert(OFFSET_OF(CopyParams, to) == 8, "CopyParams");
static_assert(OFFSET_OF(CopyParams, bytes) == 16, "CopyParams");

}  // namespace railhop
