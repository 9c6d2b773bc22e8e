// What lanes do to themselves and to each other: giving way, strong accesses, collectives, named barriers.
#include <cstdio>
#include <cstring>

#include "world.hpp"

namespace railhop::shim {

namespace {

// Static storage of the library rather than __tls_get_addr: this is read on every call from a kernel.
thread_local Lane* running __attribute__((tls_model("initial-exec"))) = nullptr;

const char* op_name(Op op) {
    switch (op) {
        case Op::BarWarp: return "bar_warp_sync";
        case Op::ShflIdx: return "shfl_sync_idx";
        case Op::ShflUp: return "shfl_sync_up";
        case Op::ShflBfly: return "shfl_sync_bfly";
        case Op::Ballot: return "vote_sync_ballot";
        case Op::MatchAny: return "match_any_sync";
        case Op::ReduxMin: return "redux_sync_min";
        case Op::ReduxMax: return "redux_sync_max";
        case Op::ReduxAdd: return "redux_sync_add";
        case Op::ReduxOr: return "redux_sync_or";
    }
    return "?";
}

}  // namespace

SHIM_NO_TSAN Lane& current() { return *running; }
SHIM_NO_TSAN void set_current(Lane* lane) { running = lane; }

// ---- giving way

SHIM_NO_TSAN void give_way(Lane& lane) {
#if SHIM_TSAN
    Fiber& self = lane.fiber;
    Fiber& main = lane.warp->block->shim->main;
    void* main_tsan = lane.warp->block->shim->main_tsan.handle;
    int depth = Quiet::pause();
    __tsan_switch_to_fiber(main_tsan, 1);
    Fiber::swap(self, main);
    Quiet::resume(depth);
#else
    Fiber::swap(lane.fiber, lane.warp->block->shim->main);
#endif
}

void yield(Lane& lane, const char* doing, Loc loc, const void* watched) {
    lane.doing = doing;
    lane.loc = loc;
    lane.watched = watched;
    lane.loads_in_a_row = 0;
    u32 bit = 1u << lane.index;
    lane.warp->ready &= ~bit;
    lane.warp->yielded |= bit;
    give_way(lane);
    lane.watched = nullptr;
}

void sleep_until(Lane& lane, Wait wait, u64 wake, const char* doing, Loc loc) {
    Warp& warp = *lane.warp;
    lane.doing = doing;
    lane.loc = loc;
    lane.wait = wait;
    lane.wake = wake;
    u32 bit = 1u << lane.index;
    if (!warp.sleeping || wake < warp.next_wake) warp.next_wake = wake;
    warp.ready &= ~bit;
    warp.sleeping |= bit;
    give_way(lane);
}

/// Leaves every mask: some rendezvous makes the lane ready again.
static void block_lane(Lane& lane, Wait wait, const char* doing, Loc loc) {
    lane.doing = doing;
    lane.loc = loc;
    lane.wait = wait;
    lane.warp->ready &= ~(1u << lane.index);
    give_way(lane);
}

void fail(Lane& lane, std::string text, Loc loc) {
    Block& block = block_of(lane);
    block.shim->stop("rank " + std::to_string(block.rank) + " block " + std::to_string(block.index) + " warp " +
                     std::to_string(lane.warp->index) + " lane " + std::to_string(lane.index) + " of kernel " +
                     block.launch->kernel->name + ": " + text + " (" + place(loc) + ")");
    std::string().swap(text);  // nothing on this stack will ever be destroyed
    for (;;) give_way(lane);  // never resumed: the run is over
}

std::string place(Loc loc) {
    const char* file = loc.file_name();
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(loc.line());
}

std::string hex(u64 value) {
    char text[24];
    std::snprintf(text, sizeof text, "0x%llx", value);
    return text;
}

// ---- special registers

u32 thread_index() {
    Quiet quiet;
    return current().thread;
}
u32 thread_count() {
    Quiet quiet;
    return block_of(current()).launch->threads;
}
u32 block_index() {
    Quiet quiet;
    return block_of(current()).index;
}
u32 block_count() {
    Quiet quiet;
    return block_of(current()).launch->grid;
}
u8* shared_memory() {
    Quiet quiet;
    return block_of(current()).smem;
}

u32 shared_offset(const void* p, Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    Block& block = block_of(lane);
    u64 offset = (u64)((const u8*)p - block.smem);
    if (offset >= block.launch->smem_bytes) fail(lane, "address outside the block's shared memory", loc);
    return (u32)offset;
}

u64 virtual_time(Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    // Whoever asks for the time again and again waits for it to pass.
    if (lane.time_read == shim_of(lane).now) yield(lane, "reads the time", loc);
    return lane.time_read = shim_of(lane).now;
}

void sleep(u32 ns, Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    sleep_until(lane, Wait::Time, shim_of(lane).now + ns, "nanosleep", loc);
}

// ---- strong accesses

void preemption_point(Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    Shim& shim = shim_of(lane);
    if (!shim.calm() && shim.random.one_in(8)) yield(lane, "preempted", loc);
}

bool coin() {
    Quiet quiet;
    return shim_of(current()).random.one_in(2);
}

void before_strong(const void* p, u32 bytes, Scope scope, Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    Shim& shim = shim_of(lane);
    if ((u64)p % bytes != 0) fail(lane, "misaligned strong access to " + hex((u64)p), loc);
    const Memory* memory = shim.memories.find(p, bytes);
    if (!memory) fail(lane, "strong access to unregistered memory " + hex((u64)p), loc);
    if (!shim.may_touch(block_of(lane).rank, *memory))
        fail(lane, "strong access to memory that only others may touch: " + hex((u64)p) + " of rank " +
                       std::to_string(memory->rank), loc);
    if (scope == Scope::Gpu && memory->shared) fail(lane, "gpu scope on shared memory " + hex((u64)p), loc);
    if (!shim.calm() && shim.random.one_in(8)) yield(lane, "preempted", loc);
}

static void remember_relaxed_read([[maybe_unused]] Lane& lane, [[maybe_unused]] const void* p) {
#if SHIM_TSAN
    lane.relaxed_read[lane.relaxed_reads++ % 8] = p;
#endif
}

void after_load(const void* p, u64 value, bool relaxed, Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    if (relaxed) remember_relaxed_read(lane, p);
    bool repeats = lane.history.repeats(p, value);
    if (!repeats) shim_of(lane).news = true;
    // However a lane polls, and whatever its history has no room for, others get their turn.
    if (repeats || ++lane.loads_in_a_row == 64) yield(lane, "polls", loc, p);
}

void after_store(const void*, u64 before, u64 after, Loc) {
    Quiet quiet;
    if (before != after) shim_of(current()).progress = true;
}

void after_atomic(const void* p, u64 before, u64 after, bool relaxed, Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    if (relaxed) remember_relaxed_read(lane, p);
    if (before != after)
        shim_of(lane).progress = true;
    else if (lane.history.repeats(p, before))
        yield(lane, "tries an atomic in vain", loc, p);
}

// TSan knows no fences. A fence after relaxed reads acquires what was released to the places they read; relaxed stores
// after it release, until the lane next orders itself with others in another way (that is what `fenced` is cleared by).
void fence([[maybe_unused]] Scope scope) {
#if SHIM_TSAN
    Quiet quiet;
    Lane& lane = current();
    for (const void*& p : lane.relaxed_read) {
        if (p) __tsan_acquire(const_cast<void*>(p));
        p = nullptr;
    }
    lane.fenced[(u32)Scope::Gpu] = true;
    lane.fenced[(u32)Scope::Sys] |= scope == Scope::Sys;
#endif
}

bool releases([[maybe_unused]] Scope scope) {
#if SHIM_TSAN
    Quiet quiet;
    return current().fenced[(u32)scope];
#else
    return false;
#endif
}

static void unfence([[maybe_unused]] Lane& lane) {
#if SHIM_TSAN
    lane.fenced[0] = lane.fenced[1] = false;
#endif
}

// ---- warp collectives

/// What all participants of a vote or reduction get.
static u32 combine(const Collective& c) {
    u32 result = c.op == Op::ReduxMin ? ~0u : 0;
    for (u32 rest = c.arrived; rest; rest &= rest - 1) {
        u32 lane = (u32)__builtin_ctz(rest);
        u32 v = c.value[lane];
        switch (c.op) {
            case Op::Ballot: result |= (u32)(v != 0) << lane; break;
            case Op::ReduxMin: result = v < result ? v : result; break;
            case Op::ReduxMax: result = v > result ? v : result; break;
            case Op::ReduxAdd: result += v; break;
            case Op::ReduxOr: result |= v; break;
            default: break;
        }
    }
    return result;
}

/// Lets the participants go on if all are here. Lanes that have exited are not waited for.
static bool close_collective(Warp& warp, u32 slot) {
    Collective& c = warp.collectives[slot];
    if (c.arrived != (c.mask & ~warp.exited)) return false;
    if (c.op >= Op::Ballot && c.op != Op::MatchAny) c.result = combine(c);
    c.unread = c.arrived;
    warp.collectives_open &= ~(1u << slot);
    warp.ready |= c.arrived;
    return true;
}

/// Fails if the lane is about to wait for lanes that already wait for it elsewhere.
static void check_divergence(Lane& lane, Op op, u32 mask, u32 arrived, Loc loc) {
    Warp& warp = *lane.warp;
    for (u32 rest = warp.collectives_open; rest; rest &= rest - 1) {
        const Collective& c = warp.collectives[__builtin_ctz(rest)];
        bool other = c.mask != mask || c.op != op;
        if (other && (c.mask >> lane.index & 1) && (c.arrived & mask & ~arrived))
            fail(lane, std::string("divergent warp collective: ") + op_name(op) + " with mask " + hex(mask) +
                           " meets " + op_name(c.op) + " with mask " + hex(c.mask) + " of " + place(c.first), loc);
    }
}

/// The open collective that this call takes part in, or a new one.
static u32 join_collective(Lane& lane, Op op, u32 mask, Loc loc) {
    Warp& warp = *lane.warp;
    for (u32 rest = warp.collectives_open; rest; rest &= rest - 1) {
        u32 slot = (u32)__builtin_ctz(rest);
        Collective& c = warp.collectives[slot];
        if (c.mask != mask || c.op != op) continue;
        if (warp.collectives_open & (warp.collectives_open - 1)) check_divergence(lane, op, mask, c.arrived, loc);
        return slot;
    }
    check_divergence(lane, op, mask, 0, loc);
    u32 slot = (u32)__builtin_ctz(~warp.collectives_used);
    warp.collectives_used |= 1u << slot;
    warp.collectives_open |= 1u << slot;
    Collective& c = warp.collectives[slot];
    c.op = op;
    c.mask = mask;
    c.arrived = 0;
    c.first = loc;
    if (op == Op::BarWarp) c.order.clear();
    return slot;
}

static u32 value_of_lane(Lane& lane, const Collective& c, u32 source, Loc loc) {
    if (!(c.arrived >> source & 1))
        fail(lane, std::string(op_name(c.op)) + " from lane " + std::to_string(source) +
                       ", which takes no part in it", loc);
    return c.value[source];
}

static u32 outcome(Lane& lane, const Collective& c, u32 operand, Loc loc) {
    u32 value = c.value[lane.index];
    switch (c.op) {
        case Op::BarWarp: return 0;
        case Op::ShflIdx: return value_of_lane(lane, c, operand & 31, loc);
        case Op::ShflUp: return operand > lane.index ? value : value_of_lane(lane, c, lane.index - operand, loc);
        case Op::ShflBfly: return value_of_lane(lane, c, (lane.index ^ operand) & 31, loc);
        case Op::MatchAny: {
            u32 same = 0;
            for (u32 i = 0; i < 32; ++i) same |= (u32)(c.value[i] == value) << i;
            return same & c.arrived;
        }
        default: return c.result;
    }
}

u32 collective(Op op, u32 mask, u32 value, u32 operand, Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    Warp& warp = *lane.warp;
    u32 bit = 1u << lane.index;
    if (!(mask & bit)) fail(lane, std::string(op_name(op)) + ": the calling lane is not in mask " + hex(mask), loc);
    u32 slot = join_collective(lane, op, mask, loc);
    Collective& c = warp.collectives[slot];
    c.value[lane.index] = value;
    c.arrived |= bit;
    if (op == Op::BarWarp) c.order.release();
    if (!close_collective(warp, slot)) block_lane(lane, Wait::Collective, op_name(op), loc);
    if (op == Op::BarWarp) {
        c.order.acquire();
        unfence(lane);
    }
    u32 result = outcome(lane, c, operand, loc);
    c.unread &= ~bit;
    if (!c.unread) warp.collectives_used &= ~(1u << slot);
    return result;
}

void end_of_lane_collectives(Lane& lane) {
    Warp& warp = *lane.warp;
    warp.ready &= ~(1u << lane.index);
    warp.exited |= 1u << lane.index;
    for (u32 rest = warp.collectives_open; rest; rest &= rest - 1) close_collective(warp, (u32)__builtin_ctz(rest));
}

// ---- named barriers

void block_barrier(u32 id, u32 threads, Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    Block& block = block_of(lane);
    if (id >= 16) fail(lane, "bar_sync: no barrier " + std::to_string(id), loc);
    if (threads % 32 != 0 || threads == 0 || threads > block.launch->threads)
        fail(lane, "bar_sync: no such thread count: " + std::to_string(threads), loc);
    NamedBarrier& bar = block.barriers[id];
    if (bar.waiting.empty()) {
        bar.threads = threads;
        bar.first = loc;
    } else if (bar.threads != threads) {
        fail(lane, "bar_sync: thread counts differ: " + std::to_string(threads) + " here, " +
                       std::to_string(bar.threads) + " at " + place(bar.first), loc);
    }
    SyncToken& order = bar.order[bar.generation & 1];
    order.release();
    if (bar.waiting.size() + 1 == threads) {
        for (Lane* other : bar.waiting) other->warp->ready |= 1u << other->index;
        bar.waiting.clear();
        ++bar.generation;
        block.shim->news = true;
    } else {
        bar.waiting.push_back(&lane);
        block_lane(lane, Wait::Barrier, "bar_sync", loc);
    }
    order.acquire();
    unfence(lane);
}

// ---- kernels

namespace {
const Kernel* kernels = nullptr;
}

Kernel::Kernel(const char* name, u64 params_bytes, void (*body)(const void*))
    : name(name), params_bytes(params_bytes), body(body), next(kernels) {
    kernels = this;
}

const Kernel* Kernel::find(const char* name) {
    for (const Kernel* kernel = kernels; kernel; kernel = kernel->next)
        if (std::strcmp(kernel->name, name) == 0) return kernel;
    return nullptr;
}

}  // namespace railhop::shim
