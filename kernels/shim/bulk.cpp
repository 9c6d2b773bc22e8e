// What lanes do with bulk copies and the barriers that count them; copy_engine.cpp moves the bytes.
#include <algorithm>

#include "world.hpp"

namespace railhop::shim {

// ---- mbarriers

static bool in_shared_memory(const Block& block, const void* p, u64 bytes) {
    u64 offset = (u64)((const u8*)p - block.smem);
    return (const u8*)p >= block.smem && offset <= block.launch->smem_bytes &&
           bytes <= block.launch->smem_bytes - offset;
}

static u16& mbarrier_slot(Lane& lane, const u64* address, Loc loc) {
    Block& block = block_of(lane);
    if (!in_shared_memory(block, address, 8)) fail(lane, "mbarrier outside the block's shared memory", loc);
    if ((u64)address % 8 != 0) fail(lane, "misaligned mbarrier", loc);
    return block.mbarrier_at[(u64)((const u8*)address - block.smem) / 8];
}

static Mbarrier& find_mbarrier(Lane& lane, const u64* address, Loc loc) {
    u16 slot = mbarrier_slot(lane, address, loc);
    if (!slot) fail(lane, "use of an mbarrier that is not initialised", loc);
    if (*address != MBARRIER_COOKIE) fail(lane, "the bytes of an mbarrier were overwritten", loc);
    return *block_of(lane).mbarriers[slot - 1];
}

void mbarrier_init(u64* address, u32 arrivals, Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    Block& block = block_of(lane);
    u16& slot = mbarrier_slot(lane, address, loc);
    if (slot) fail(lane, "mbarrier initialised twice", loc);
    if (arrivals == 0 || arrivals >= 1u << 20) fail(lane, "mbarrier_init: no such arrival count", loc);
    auto bar = std::make_unique<Mbarrier>();
    bar->address = address;
    bar->arrivals = bar->pending = arrivals;
    bar->initialiser = &lane;
    block.mbarriers.push_back(std::move(bar));
    slot = (u16)block.mbarriers.size();
}

void mbarrier_fence_init() {
    Quiet quiet;
    Lane& lane = current();
    for (auto& bar : block_of(lane).mbarriers)
        if (bar->initialiser == &lane) bar->fenced = true;
}

void advance_phase(Block& block, Mbarrier& bar) {
    if (bar.pending != 0 || bar.transactions != 0) return;
    bar.pending = bar.arrivals;
    bar.unobserved |= bar.carries;
    bar.carries = false;
    bar.phase ^= 1;
    block.mbarrier_completed = true;
    block.shim->progress = true;
}

void mbarrier_arrive_expect_tx(u64* address, u32 bytes, Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    Mbarrier& bar = find_mbarrier(lane, address, loc);
    if (bar.pending == 0) fail(lane, "more arrivals at an mbarrier than its phase counts", loc);
    bar.complete[bar.phase].release();
    bar.transactions += bytes;
    if (bar.transactions >= 1 << 20) fail(lane, "an mbarrier can't count so many bytes", loc);
    --bar.pending;
    advance_phase(block_of(lane), bar);
}

bool mbarrier_try_wait(u64* address, u32 parity, Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    Shim& shim = shim_of(lane);
    Mbarrier& bar = find_mbarrier(lane, address, loc);
    parity &= 1;
    if (bar.phase == parity) {
        lane.mbarrier = &bar;
        lane.parity = parity;
        u64 patience = 500 + shim.random.below(4000);
        sleep_until(lane, Wait::Mbarrier, shim.now + patience, "mbarrier_try_wait_parity", loc);
        if (bar.phase == parity) return false;
    }
    bar.complete[parity].acquire();
    bar.unobserved = false;
    lane.fenced[0] = lane.fenced[1] = false;
    return true;
}

// ---- bulk copies

/// The checks that both directions share, and the copy itself, without its way of completing.
static BulkCopy& issue(Lane& lane, void* dst, const void* src, u32 bytes, const void* shared_side,
                       const void* global_side, Loc loc) {
    Block& block = block_of(lane);
    Shim& shim = *block.shim;
    if (((u64)dst | (u64)src | bytes) % 16 != 0)
        fail(lane, "bulk copy: addresses and size must be multiples of 16", loc);
    if (bytes == 0) fail(lane, "bulk copy of no bytes", loc);
    if (!in_shared_memory(block, shared_side, bytes)) fail(lane, "bulk copy outside the block's shared memory", loc);
    const Memory* memory = shim.memories.find(global_side, bytes);
    if (!memory || !shim.may_touch(block.rank, *memory))
        fail(lane, "bulk copy: " + hex((u64)global_side) + " and " + std::to_string(bytes) +
                       " bytes are not in one memory that this rank may touch", loc);

    std::unique_ptr<BulkCopy> copy;
    if (shim.spare_copies.empty()) {
        copy = std::make_unique<BulkCopy>();
    } else {
        copy = std::move(shim.spare_copies.back());
        shim.spare_copies.pop_back();
        copy->issued.clear();
        copy->visible.clear();
    }
    copy->dst = (u8*)dst;
    copy->src = (const u8*)src;
    copy->bytes = bytes;
    u32 pieces = std::min(1 + shim.random.below(BulkCopy::MAX_PIECES), bytes / 16);
    copy->piece_bytes = (bytes / 16 + pieces - 1) / pieces * 16;
    pieces = (bytes + copy->piece_bytes - 1) / copy->piece_bytes;
    copy->unread = copy->unwritten = (1u << pieces) - 1;
    copy->patience = 1u << shim.random.below(5);
    copy->mbarrier = nullptr;
    copy->group = nullptr;
    copy->issuer = &lane;
    copy->loc = loc;
    copy->buffer.resize(std::max<size_t>(copy->buffer.size(), bytes));

    copy->issued.release();
    block.proxy_view.as([&] {
        block.proxy.acquire();
        block.async_writes.acquire();
        copy->visible.release();
    });
    shim.progress = true;
    block.copies.push_back(std::move(copy));
    return *block.copies.back();
}

void bulk_g2s(void* dst, const void* src, u32 bytes, u64* address, Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    Mbarrier& bar = find_mbarrier(lane, address, loc);
    if (!bar.fenced) fail(lane, "bulk copy on an mbarrier initialised without fence_mbarrier_init", loc);
    BulkCopy& copy = issue(lane, dst, src, bytes, dst, src, loc);
    copy.mbarrier = &bar;
    bar.carries = true;
    bar.last_copy = loc;
}

void bulk_s2g(void* dst, const void* src, u32 bytes, Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    BulkCopy& copy = issue(lane, dst, src, bytes, src, dst, loc);
    if (!lane.open_group) lane.open_group = new BulkGroup;
    copy.group = lane.open_group;
    copy.group->used = true;
    ++copy.group->unread;
    ++copy.group->incomplete;
    lane.loc = loc;
}

void bulk_commit(Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    lane.groups.push_back(lane.open_group ? lane.open_group : new BulkGroup);
    lane.open_group = nullptr;
    lane.loc = loc;
}

static u32 groups_waited_for(const Lane& lane) {
    u32 committed = (u32)lane.groups.size();
    return committed > lane.wait_latest ? committed - lane.wait_latest : 0;
}

bool groups_done(const Lane& lane) {
    u32 count = groups_waited_for(lane);
    for (u32 i = lane.wait_read ? lane.reads_known : 0; i < count; ++i)
        if (lane.wait_read ? lane.groups[i]->unread : lane.groups[i]->incomplete) return false;
    return true;
}

void bulk_wait(u32 latest, bool read, Loc loc) {
    Quiet quiet;
    Lane& lane = current();
    lane.wait_latest = latest;
    lane.wait_read = read;
    if (!groups_done(lane)) {
        lane.doing = read ? "cp_async_bulk_wait_group_read" : "cp_async_bulk_wait_group";
        lane.loc = loc;
        lane.wait = Wait::Bulk;
        lane.warp->ready &= ~(1u << lane.index);
        give_way(lane);
    }
    lane.fenced[0] = lane.fenced[1] = false;
    u32 count = groups_waited_for(lane);
    if (read) {
        for (u32 i = lane.reads_known; i < count; ++i) lane.groups[i]->read.acquire();
        lane.reads_known = std::max(lane.reads_known, count);
        return;
    }
    for (u32 i = 0; i < count; ++i) {
        lane.groups[i]->read.acquire();
        lane.groups[i]->written.acquire();
        delete lane.groups[i];
    }
    lane.groups.erase(lane.groups.begin(), lane.groups.begin() + count);
    lane.reads_known -= std::min(lane.reads_known, count);
}

void fence_proxy_async() {
    Quiet quiet;
    block_of(current()).proxy.release();
}

void end_of_lane_copies(Lane& lane) {
    if (lane.open_group) fail(lane, "thread exits with bulk copies in flight: never committed to a group", lane.loc);
    for (u32 i = lane.reads_known; i < lane.groups.size(); ++i)
        if (lane.groups[i]->used)
            fail(lane, "thread exits with bulk copies in flight: it never waited for their group", lane.loc);
}

}  // namespace railhop::shim
