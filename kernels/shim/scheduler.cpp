// The one scheduler of a shim: sweeps over all resident blocks and agents, and the virtual time between sweeps.
// live.cpp has what differs where time is real.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "world.hpp"

namespace railhop::shim {

void set_current(Lane* lane);

namespace {

constexpr u64 STEP = 100;                            // ns a sweep while things happen
constexpr u64 LONGEST_STEP = 1ull << 36;             // ns
constexpr u64 STALL = 1'000'000'000;                 // ns without progress after which places are taken down
constexpr u64 LIVELOCK = 10'000 * 1'000'000'000ull;  // ns without progress after which the run is given up
constexpr u32 NEWS_PATIENCE = 1000;                  // sweeps

/// Where a lane's fiber begins; it ends in give_way, never to be resumed.
void lane_main() {
    Lane* lane;
    void (*body)(const void*);
    const void* params;
    {
        Quiet quiet;
        lane = &current();
        Block& block = block_of(*lane);
        Launch& launch = *block.launch;
        Fiber::entered(block.shim->main);
        launch.begun.acquire();
        launch.stream_order->acquire();
        body = launch.kernel->body;
        params = launch.params.data();
    }
    body(params);
    {
        Quiet quiet;
        Block& block = block_of(*lane);
        end_of_lane_copies(*lane);
        if (!block.stacks.intact(lane->thread)) fail(*lane, "stack overflow", lane->loc);
        block.launch->stream_order->release();
        block.shim->end.release();
        end_of_lane_collectives(*lane);
        --block.live;
        block.shim->progress = true;
        give_way(*lane);
    }
    std::abort();
}

std::string lane_name(const Lane& lane, bool whole_warp) {
    const Block& block = *lane.warp->block;
    std::string name = "rank " + std::to_string(block.rank) + " block " + std::to_string(block.index) + " warp " +
                       std::to_string(lane.warp->index);
    return whole_warp ? name : name + " lane " + std::to_string(lane.index);
}

}  // namespace

Shim::Shim(const ShimOptions& options) : options(options), random(options.seed) {}

Shim::~Shim() {
    Quiet quiet;
    for (auto& block : blocks) release_block(*block);
    network.destroy_fibers();
}

bool Shim::may_touch(u32 rank, const Memory& memory) const {
    return memory.rank == rank || (memory.shared && node(memory.rank) == node(rank));
}

void Shim::stop(const std::string& text) {
    if (!failed) report = text;
    failed = true;
}

// ---- streams

void Shim::submit(StreamId stream, std::unique_ptr<Launch> launch) {
    if (options.live)
        inbox.push(stream, std::move(launch));
    else
        enqueue(stream, std::move(launch));
}

void Shim::enqueue(StreamId id, std::unique_ptr<Launch> launch) {
    Stream& stream = streams[id];
    launch->order.resize(launch->grid);
    std::iota(launch->order.begin(), launch->order.end(), 0);
    for (u32 i = launch->grid; random.enabled() && i > 1; --i)
        std::swap(launch->order[i - 1], launch->order[random.below(i)]);
    launch->stream_order = &stream.order;
    stream.launches.push_back(std::move(launch));
}

/// Takes what has ended off a stream's front.
void Shim::pop_ended(StreamId id, Stream& stream) {
    while (!stream.launches.empty()) {
        Launch& front = *stream.launches.front();
        if (front.ended < front.grid) return;
        if (front.step && !step_once(front)) return;
        if (front.awaited_entries && inbox.ended(front.awaited) < front.awaited_entries) return;
        stream.launches.pop_front();
        // Threads that ask hear of it; what they then launch, and what waited on this stream, comes after it.
        if (options.live) stream.order.acquire();
        inbox.entry_ended(id);
        if (options.live && !stream.launches.empty()) stream.launches.front()->begun.release();
    }
}

/// Does a part of what is no kernel, now or another time; whether it has ended.
bool Shim::step_once(Launch& launch) {
    if (!calm() && random.one_in(4)) return false;
    launch.begun.acquire();
    launch.stream_order->acquire();
    bool ended = launch.step(launch.context) != 0;
    launch.stream_order->release();
    progress = true;
    return ended;
}

// ---- blocks

/// Starts what its stream and the rank's free places allow; whether anything is left to start or to wait for.
bool Shim::start_blocks() {
    bool launches = false;
    for (auto& [key, stream] : streams) {
        pop_ended(key, stream);
        if (stream.launches.empty()) continue;
        launches = true;
        if (!calm() && random.one_in(2)) continue;
        Launch& launch = *stream.launches.front();
        if (resident.size() <= launch.rank) resident.resize(launch.rank + 1);
        while (launch.started < launch.grid && (!options.resident || resident[launch.rank] < options.resident))
            start_block(launch, launch.order[launch.started]);
    }
    return launches;
}

void Shim::start_block(Launch& launch, u32 index) {
    auto owned = std::make_unique<Block>();
    Block& block = *owned;
    block.shim = this;
    block.launch = &launch;
    block.rank = launch.rank;
    block.index = index;
    block.live = launch.threads;
    void* smem = nullptr;
    if (posix_memalign(&smem, 128, std::max(launch.smem_bytes, 1u)) != 0) std::abort();
    block.smem = (u8*)std::memset(smem, 0xA5, launch.smem_bytes);
    block.mbarrier_at.resize(launch.smem_bytes / 8 + 1);
    for (auto& spare : spare_stacks)
        if (spare.count() >= launch.threads) {
            block.stacks = std::move(spare);
            spare = std::move(spare_stacks.back());
            spare_stacks.pop_back();
            break;
        }
    if (!block.stacks.count()) block.stacks.map(launch.threads);
    std::string place = "rank " + std::to_string(block.rank) + " block " + std::to_string(index);
    block.proxy_view.create((place + " proxy view").c_str());
    block.proxy_view.as([&] {  // what came before the kernel is visible in every proxy
        launch.begun.acquire();
        launch.stream_order->acquire();
    });
    u64 frozen_until = random.one_in(4) ? freeze(100) : 0;
    for (u32 w = 0; w * 32 < launch.threads; ++w) {
        block.warps.push_back(std::make_unique<Warp>());
        Warp& warp = *block.warps.back();
        warp.block = &block;
        warp.index = w;
        warp.frozen_until = frozen_until;
        std::string warp_place = place + " warp " + std::to_string(w);
        warp.copy_reader.create((warp_place + " copy engine, reader").c_str());
        warp.copy_writer.create((warp_place + " copy engine, writer").c_str());
        for (u32 i = 0; i < 32; ++i) {
            Lane& lane = warp.lanes[i];
            lane.warp = &warp;
            lane.index = i;
            lane.thread = w * 32 + i;
            if (lane.thread >= launch.threads) {
                warp.exited |= 1u << i;
                continue;
            }
            warp.ready |= 1u << i;
            block.stacks.arm(lane.thread);
            lane.fiber.prepare(block.stacks.stack(lane.thread), FiberStacks::STACK_BYTES, lane_main);
            if (options.tsan_per_warp && i > 0)
                lane.tsan.handle = warp.lanes[0].tsan.handle;
            else
                lane.tsan.create(lane_name(lane, options.tsan_per_warp).c_str());
        }
    }
    ++launch.started;
    ++resident[launch.rank];
    progress = true;
    blocks.push_back(std::move(owned));
}

/// Ends the blocks whose lanes and copies have; whether there was one.
bool Shim::finish_blocks() {
    bool any = false;
    for (size_t i = 0; i < blocks.size() && !failed;) {
        Block& block = *blocks[i];
        if (block.live == 0) {
            bool to_shared = false;
            for (auto& copy : block.copies) to_shared |= copy->mbarrier != nullptr;
            if (block.copies.empty() || to_shared) end_of_block_copies(block);
        }
        if (block.live || !block.copies.empty() || failed) {
            ++i;
            continue;
        }
        finish_block(block);
        std::swap(blocks[i], blocks.back());
        blocks.pop_back();
        any = true;
    }
    return any;
}

void Shim::finish_block(Block& block) {
    ++block.launch->ended;
    --resident[block.rank];
    progress = true;
    release_block(block);
}

void Shim::release_block(Block& block) {
    for (auto& warp : block.warps) {
        for (Lane& lane : warp->lanes) {
            for (BulkGroup* group : lane.groups) delete group;
            delete lane.open_group;
            if (lane.tsan.handle && (lane.index == 0 || !options.tsan_per_warp)) lane.tsan.destroy();
        }
        warp->copy_reader.destroy();
        warp->copy_writer.destroy();
    }
    block.proxy_view.destroy();
    std::free(block.smem);
    block.smem = nullptr;
    // Under a sanitizer stacks are mapped anew: it must forget what the last lane did there.
    if (!SHIM_TSAN && !SHIM_ASAN && !failed) spare_stacks.push_back(std::move(block.stacks));
}

// ---- one sweep

SHIM_NO_TSAN void Shim::resume(Lane& lane) {
    set_current(&lane);
#if SHIM_TSAN
    Fiber& self = main;
    Fiber& other = lane.fiber;
    void* tsan = lane.tsan.handle;
    int depth = Quiet::exchange(0);
    __tsan_switch_to_fiber(tsan, 1);
    Fiber::swap(self, other);  // the lane switches TSan back before it gives way
    Quiet::exchange(depth);
#else
    Fiber::swap(main, lane.fiber);
#endif
    set_current(nullptr);
}

void Shim::wake_sleepers(Block& block) {
    bool completed = block.mbarrier_completed;
    block.mbarrier_completed = false;
    for (auto& owned : block.warps) {
        Warp& warp = *owned;
        if (!warp.sleeping || !(completed || now >= warp.next_wake)) continue;
        warp.next_wake = ~0ull;
        for (u32 rest = warp.sleeping; rest; rest &= rest - 1) {
            u32 i = (u32)__builtin_ctz(rest);
            Lane& lane = warp.lanes[i];
            if (now >= lane.wake || (lane.wait == Wait::Mbarrier && lane.mbarrier->phase != lane.parity)) {
                lane.wait = Wait::None;
                warp.sleeping &= ~(1u << i);
                warp.ready |= 1u << i;
            } else {
                warp.next_wake = std::min(warp.next_wake, lane.wake);
            }
        }
    }
}

/// A warp's turn: its lanes run in any order until none is ready, or until the turn is cut short.
void Shim::visit(Warp& warp) {
    warp.ready |= warp.yielded;
    warp.yielded = 0;
    while (warp.ready && !failed) {
        resume(warp.lanes[random.bit(warp.ready)]);
        if (!calm() && random.one_in(128)) break;
    }
}

/// One turn of everyone; whether anyone can still do anything.
bool Shim::sweep() {
    ++sweep_number;
    if (!blocks.empty() && random.one_in(32)) {
        Block& block = *blocks[random.below((u32)blocks.size())];
        block.warps[random.below((u32)block.warps.size())]->frozen_until = freeze(300);
    }
    bool alive = false;
    u32 count = (u32)blocks.size();
    u32 first = random.below(count);
    for (u32 i = 0; i < count && !failed; ++i) {
        Block& block = *blocks[random.one_in(2) ? random.below(count) : (first + i) % count];
        wake_sleepers(block);
        u32 warps = (u32)block.warps.size();
        u32 first_warp = random.below(warps);
        for (u32 j = 0; j < warps && !failed; ++j) {
            Warp& warp = *block.warps[(first_warp + j) % warps];
            if (calm() || sweep_number >= warp.frozen_until) visit(warp);
        }
        if (!block.copies.empty()) run_copies(block);
    }
    for (auto& block : blocks) {
        alive |= !block->copies.empty() || block->live == 0;
        for (auto& warp : block->warps) alive |= (warp->ready | warp->yielded | warp->sleeping) != 0;
    }
    return alive;
}

/// Whether the sweep changed nothing, and news alone has come for too long.
bool Shim::count_sweep(u32 news_patience) {
    bool hold = news && news_sweeps < news_patience;
    news_sweeps = news && !progress ? news_sweeps + 1 : 0;
    bool silent = !progress && !hold;
    if (progress) idle_sweeps = 0;
    if (silent) ++idle_sweeps;
    progress = news = false;
    return silent;
}

void Shim::advance_time() {
    if (progress) {
        idle_since = now;
        step = STEP;
    }
    if (count_sweep(NEWS_PATIENCE) && calm()) step = std::min(2 * step, LONGEST_STEP);
    u64 due = network.next_due();
    u64 next = now + step;
    now = due > now && due < next ? due : next;
    if (now - idle_since >= STALL && stall.empty()) stall = where_everyone_is();
    if (now - idle_since >= LIVELOCK)
        stop("livelock: nothing has happened for " + std::to_string(LIVELOCK / STALL) + " virtual seconds\n" +
             where_everyone_is());
}

// ---- a run

int Shim::run() {
    Quiet quiet;
    if (failed) return 1;
    stall.clear();
    idle_sweeps = news_sweeps = 0;
    idle_since = now;
    step = STEP;
#if SHIM_TSAN
    main_tsan.handle = __tsan_get_current_fiber();
#endif
    SyncToken from_host;
    from_host.release();
    network.begin(from_host);
    for (auto& [key, stream] : streams)
        for (auto& launch : stream.launches) launch->begun.release();
    if (options.live)
        run_live();
    else
        run_to_end();
    network.end(end);
    for (auto& block : blocks)  // of a failed or stopped run: what they did is over too
        for (auto& warp : block->warps)
            for (Lane& lane : warp->lanes)
                if (lane.tsan.handle) lane.tsan.as([&] { end.release(); });
    end.acquire();
    return failed ? 1 : 0;
}

void Shim::run_to_end() {
    while (!failed) {
        bool launches = start_blocks();
        if (!launches && network.idle()) break;
        bool alive = sweep();
        network.step(*this);
        finish_blocks();
        bool waits_for_start = blocks.empty() && launches;
        if (!alive && !waits_for_start && !progress && !failed && network.idle() && !blocks.empty() && !news)
            stop("deadlock: nothing can run\n" + where_everyone_is());
        advance_time();
    }
}

// ---- reports

static bool same_place(const Lane& a, const Lane& b) {
    return a.doing == b.doing && a.loc.line() == b.loc.line() && a.watched == b.watched;
}

std::string Shim::where_everyone_is() const {
    constexpr u32 MOST = 400;
    std::string text;
    u32 lines = 0;
    for (auto& block : blocks)
        for (auto& warp : block->warps)
            for (u32 rest = ~warp->exited; rest;) {
                const Lane& lane = warp->lanes[__builtin_ctz(rest)];
                u32 group = 0;
                for (u32 i = 0; i < 32; ++i)
                    if ((rest >> i & 1) && same_place(lane, warp->lanes[i])) group |= 1u << i;
                rest &= ~group;
                if (++lines > MOST) continue;
                text += lane_name(lane, true) + " lanes " + hex(group) + " of kernel " + block->launch->kernel->name +
                        ": " + lane.doing;
                if (lane.watched) text += " " + hex((u64)lane.watched) + describe(lane.watched);
                if (lane.loc.line()) text += " (" + place(lane.loc) + ")";
                text += "\n";
            }
    for (auto& [key, stream] : streams)
        for (auto& launch : stream.launches)
            if (launch->started < launch->grid)
                text += "rank " + std::to_string(launch->rank) + ": " + std::to_string(launch->grid - launch->started) +
                        " blocks of kernel " + launch->kernel->name + " not started\n";
    if (lines > MOST) text += "and " + std::to_string(lines - MOST) + " more\n";
    return text;
}

/// Which memory an address is in, and what stands there.
std::string Shim::describe(const void* p) const {
    const Memory* memory = const_cast<Memories&>(memories).find(p, 4);
    if (!memory) return "";
    u32 value;
    std::memcpy(&value, p, sizeof value);
    return " (memory " + std::to_string(memory->id) + " of rank " + std::to_string(memory->rank) + " + " +
           std::to_string((const u8*)p - memory->base) + ", low word " + std::to_string(value) + ")";
}

}  // namespace railhop::shim
