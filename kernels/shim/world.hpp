// The state of a simulated machine: lanes in warps in blocks of launches, and the shim that owns them all.
//
// Everything here is touched by every lane and by the scheduler, all on one OS thread; of a live machine other threads
// only touch `inbox`, and add to `memories`. Functions that lanes enter hold a Quiet, so that TSan sees the kernel's
// accesses only.
#pragma once
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "fiber.hpp"
#include "lane_api.hpp"
#include "live.hpp"
#include "memory.hpp"
#include "nic.hpp"
#include "random.hpp"
#include "sanitizer.hpp"
#include "shim.h"

namespace railhop::shim {

struct Block;
struct Lane;
struct Shim;
struct Warp;

// ---- bulk copies (copy_engine.cpp)

/// What one cp.async.bulk.commit_group closed.
struct BulkGroup {
    u32 unread = 0;      // copies that still read their source
    u32 incomplete = 0;  // copies that still write
    bool used = false;   // holds any copy
    SyncToken read;
    SyncToken written;
};

struct Mbarrier {
    u64* address;
    u32 arrivals;
    u32 pending;
    i64 transactions = 0;  // expected minus arrived bytes
    u32 phase = 0;         // parity of the phase that is open
    bool fenced = false;   // made visible to the async proxy
    bool unobserved = false;  // a phase with bytes completed and nobody has seen that
    bool carries = false;     // the open phase has bytes
    const Lane* initialiser;
    Loc last_copy;
    SyncToken complete[2];  // by parity of the phase
};

/// One bulk copy in flight: it moves in pieces, each read at some time and written at some later time.
struct BulkCopy {
    static constexpr u32 MAX_PIECES = 4;
    u8* dst;
    const u8* src;
    u32 bytes;
    u32 piece_bytes;
    u32 unread;     // pieces, as a mask
    u32 unwritten;  // pieces, as a mask
    u32 patience;   // one chance in this many to move a piece each time it is asked
    Mbarrier* mbarrier;  // of a copy to shared memory
    BulkGroup* group;    // of a copy to global memory
    Lane* issuer;
    Loc loc;
    std::vector<u8> buffer;
    SyncToken issued;   // what the issuing thread knew
    SyncToken visible;  // what the async proxy had been shown when the copy was issued
};

// ---- execution

enum class Wait : u8 { None, Mbarrier, Bulk, Collective, Barrier, Time };

/// Recent strong loads of a lane: one that matches has found nothing new.
struct LoadHistory {
    static constexpr u32 SLOTS = 16;
    const void* address[SLOTS] = {};
    u64 value[SLOTS] = {};

    /// Whether the lane saw the same value there lately; remembers it.
    bool repeats(const void* p, u64 v) {
        u32 slot = (u32)((u64)p >> 3 ^ (u64)p >> 7) % SLOTS;
        bool same = address[slot] == p && value[slot] == v;
        address[slot] = p;
        value[slot] = v;
        return same;
    }
};

struct Lane {
    Fiber fiber;
    TsanFiber tsan;
    Warp* warp = nullptr;
    u32 index = 0;
    u32 thread = 0;
    Wait wait = Wait::None;
    u64 wake = 0;  // virtual time at which a sleeping lane goes on whatever happened
    // Where the lane last gave way, for reports.
    const char* doing = "not started";
    Loc loc;
    const void* watched = nullptr;
    // Mbarrier waits.
    Mbarrier* mbarrier = nullptr;
    u32 parity = 0;
    // Bulk groups, oldest first; the first `reads_known` have been waited for by wait_group.read.
    std::vector<BulkGroup*> groups;
    BulkGroup* open_group = nullptr;
    u32 reads_known = 0;
    u32 wait_latest = 0;
    bool wait_read = false;
    // Order of strong relaxed accesses (TSan flavour).
    bool fenced[2] = {};  // by Scope
    u32 relaxed_reads = 0;
    const void* relaxed_read[8] = {};

    LoadHistory history;
    u32 loads_in_a_row = 0;  // since the lane last gave way by itself
    u64 time_read = 0;
};

/// One open or completed warp collective.
struct Collective {
    Op op;
    u32 mask;
    u32 arrived;
    u32 unread;  // lanes that have not taken their result yet
    u32 result;  // of votes and reductions
    u32 value[32];
    Loc first;
    SyncToken order;
};

struct Warp {
    Block* block = nullptr;
    u32 index = 0;
    // Every live lane is in exactly one of these masks, or blocked in a rendezvous and in none.
    u32 ready = 0;
    u32 yielded = 0;   // ready again at the warp's next turn
    u32 sleeping = 0;  // waits for a time, or for an mbarrier until a time
    u32 exited = 0;
    u64 next_wake = 0;     // lower bound of the sleeping lanes' wake times
    u64 frozen_until = 0;  // sweep
    u32 collectives_open = 0;  // masks over `collectives`
    u32 collectives_used = 0;
    TsanFiber copy_reader, copy_writer;
    // Each live lane holds at most one collective, so there are never more.
    Collective collectives[32];
    Lane lanes[32];
};

struct NamedBarrier {
    u32 threads = 0;
    u32 generation = 0;
    std::vector<Lane*> waiting;
    Loc first;
    SyncToken order[2];  // by parity of the generation: late leavers must not see the next one's arrivals
};

/// What a stream holds: a kernel, or (without blocks) a wait for another stream, or other work.
struct Launch {
    const Kernel* kernel;
    u32 rank;
    u32 grid;
    u32 threads;
    u32 smem_bytes;
    std::vector<V4> params;
    std::vector<u32> order;  // blocks in the order in which they start
    u32 started = 0;
    u32 ended = 0;
    StreamId awaited;         // the stream waited for,
    u64 awaited_entries = 0;  // until so many of its entries have ended
    ShimStep step = nullptr;  // of other work
    void* context = nullptr;
    SyncToken begun;          // from the host to the lanes
    SyncToken* stream_order;  // from the blocks of a launch to those of the next one on its stream
};

struct Block {
    Shim* shim = nullptr;
    Launch* launch = nullptr;
    u32 rank = 0;
    u32 index = 0;
    u32 live = 0;
    bool mbarrier_completed = false;  // some phase completed since the sleepers were last looked at
    u8* smem = nullptr;
    FiberStacks stacks;
    std::vector<std::unique_ptr<Warp>> warps;
    NamedBarrier barriers[16];
    std::vector<std::unique_ptr<Mbarrier>> mbarriers;
    std::vector<u16> mbarrier_at;  // by 8-byte word of shared memory: 1 + index, or 0
    std::vector<std::unique_ptr<BulkCopy>> copies;
    SyncToken proxy;         // generic accesses shown to the async proxy by fence.proxy.async
    SyncToken async_writes;  // writes of the block's own completed copies
    TsanFiber proxy_view;    // carries both to a copy's `visible` when it is issued
};

struct Stream {
    std::deque<std::unique_ptr<Launch>> launches;  // the front one runs
    SyncToken order;
};

struct Shim {
    explicit Shim(const ShimOptions& options);
    ~Shim();

    ShimOptions options;
    Random random;
    Memories memories;
    Network network;
    Inbox inbox;
    std::map<StreamId, Stream> streams;
    std::vector<std::unique_ptr<Block>> blocks;  // resident ones
    std::vector<u32> resident;                   // by rank
    std::vector<FiberStacks> spare_stacks;
    std::vector<std::unique_ptr<BulkCopy>> spare_copies;
    std::string report;
    std::string stall;
    bool failed = false;

    // ---- time
    u64 now = 1'000'000;
    u64 sweep_number = 0;
    u64 idle_sweeps = 0;  // since something last changed
    u64 idle_since = 0;   // virtual time of that
    u64 step = 0;
    bool progress = false;  // this sweep changed something
    bool news = false;      // this sweep some lane saw a value it had not seen lately
    u32 news_sweeps = 0;    // idle ones in a row in which only that happened

    Fiber main;
    TsanFiber main_tsan;
    SyncToken end;  // from everything that ran to the host

    /// Long without progress: no more random delays, so that whoever can still move something does.
    bool calm() const { return idle_sweeps >= 8; }
    bool may_touch(u32 rank, const Memory& memory) const;
    u32 node(u32 rank) const { return options.ranks_per_node ? rank / options.ranks_per_node : 0; }

    // ---- scheduler.cpp
    int run();
    void run_to_end();
    void submit(StreamId stream, std::unique_ptr<Launch> launch);
    void enqueue(StreamId stream, std::unique_ptr<Launch> launch);
    bool start_blocks();
    void pop_ended(StreamId id, Stream& stream);
    bool step_once(Launch& launch);
    void start_block(Launch& launch, u32 index);
    bool finish_blocks();
    void finish_block(Block& block);
    void release_block(Block& block);
    bool sweep();
    void wake_sleepers(Block& block);
    void visit(Warp& warp);
    void resume(Lane& lane);
    bool count_sweep(u32 news_patience);
    void advance_time();
    std::string where_everyone_is() const;
    std::string describe(const void* p) const;
    void stop(const std::string& text);

    // ---- live.cpp
    void run_live();
    void drain_inbox();
    void rest();
    /// The sweep until which a warp may be frozen that should stand still for up to `sweeps`.
    u64 freeze(u32 sweeps);

    // ---- copy_engine.cpp
    void run_copies(Block& block);
    bool move_piece(Block& block, BulkCopy& copy);
    void read_piece(Block& block, BulkCopy& copy, u32 piece);
    void write_piece(Block& block, BulkCopy& copy, u32 piece);
    void end_of_block_copies(Block& block);
};

/// The lane that runs on this OS thread now.
Lane& current();
inline Block& block_of(Lane& lane) { return *lane.warp->block; }
inline Shim& shim_of(Lane& lane) { return *lane.warp->block->shim; }

/// Gives the processor back to the scheduler; the caller has put the lane into the mask (or none) that says when it
/// goes on.
void give_way(Lane& lane);
/// Gives way until the warp's next turn.
void yield(Lane& lane, const char* doing, Loc loc, const void* watched = nullptr);
/// Gives way until `wake`, or until what `wait` says.
void sleep_until(Lane& lane, Wait wait, u64 wake, const char* doing, Loc loc);
/// Ends the run with a failed check at this lane.
[[noreturn]] void fail(Lane& lane, std::string text, Loc loc);

/// Opens the barrier's next phase if the open one has all its arrivals and bytes.
void advance_phase(Block& block, Mbarrier& bar);
/// Whether all but the lane's latest groups have completed (or read their sources), as it waits for.
bool groups_done(const Lane& lane);
/// Fails if the lane leaves bulk copies behind.
void end_of_lane_copies(Lane& lane);
/// Takes the lane out of its warp; lets collectives go on that waited for it.
void end_of_lane_collectives(Lane& lane);

std::string place(Loc loc);
std::string hex(u64 value);

}  // namespace railhop::shim
