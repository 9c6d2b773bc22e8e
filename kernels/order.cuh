// The expert-major order of received rows, by one block: counts by warp and expert, their prefix sums, then every
// entry's row. The order is that of src/api/expert_major.rs: nothing in it depends on which warp is faster.
#pragma once
#include "local.cuh"

namespace railhop {

/// The entries of one warp, consecutive, and the warp's number for each expert: first how many it has, later its next
/// row.
struct Slice {
    u32 lane;
    u32 first;
    u32 end;
    u32* numbers;

    DEV Slice(const ExpertOrderParams& p, u32 entries) : lane(ptx::tid() % WARP) {
        const u32 warp = ptx::tid() / WARP, warps = ptx::ntid() / WARP;
        const u32 size = divided_up(divided_up(entries, WARP), warps) * WARP;
        first = smaller(warp * size, entries);
        end = smaller(first + size, entries);
        numbers = at<u32>(p.scratch) + (u64)warp * p.num_experts;
    }
};

DEV void block_sync() { ptx::bar_sync(0, ptx::ntid()); }

/// Calls `visit(entry, expert)` for the entries of a slice, by all lanes and in order: each call is of the warp's next
/// 32 entries, of which the lanes past the end have none. Experts that are none here are `NONE`.
template <class Visit>
DEV void visit_entries(const ExpertOrderParams& p, const Slice& slice, Visit visit) {
    const u32* topk_idx = at<u32>(p.topk_idx);
    for (u32 block = slice.first; block < slice.end; block += BLOCK) {
        u32 experts[BATCH];
        for (u32 i = 0; i < BATCH; i++) {
            const u32 entry = unit_of(block, i, slice.lane);
            experts[i] = entry < slice.end ? topk_idx[entry] : NONE;
        }
        for (u32 i = 0; i < BATCH; i++) visit(unit_of(block, i, slice.lane), experts[i]);
    }
}

/// Takes a number of its expert for each lane, ascending by lane. `expert` may be `NONE`: that lane takes none.
DEV u32 take_number(const Slice& slice, u32 expert) {
    const u32 peers = ptx::match_any_sync(ptx::ALL, expert);
    const u32 leader = ptx::ctz(peers);
    u32 number = 0;
    if (expert != NONE && slice.lane == leader) {
        number = slice.numbers[expert];
        slice.numbers[expert] = number + ptx::popc(peers);
    }
    // The next to lead this expert's lanes may be another.
    ptx::bar_warp_sync();
    return ptx::shfl_sync_idx(ptx::ALL, number, leader) + ptx::popc(peers & lanes_below(slice.lane));
}

/// Starts the order of the rows that the device has counted.
DEV void begin_order(const ExpertOrderParams& p, ExpertOrder& order) {
    const u64 received = *at<u64>(p.received);
    const bool fits = received <= p.capacity;
    order.status = fits ? order::OK : order::TOO_MANY_RECEIVED;
    order.received = fits ? (u32)received : 0;
    order.rows = 0;
    order.invalid = ~0ull;
}

DEV void count_entries(const ExpertOrderParams& p, ExpertOrder& order, const Slice& slice) {
    for (u32 expert = slice.lane; expert < p.num_experts; expert += WARP) slice.numbers[expert] = 0;
    ptx::bar_warp_sync();
    visit_entries(p, slice, [&](u32 entry, u32 expert) {
        const bool invalid = expert != NONE && expert >= p.num_experts;
        if (invalid) ptx::red_min_relaxed_gpu(&order.invalid, entry);
        take_number(slice, invalid ? NONE : expert);
    });
}

/// From the counts of the warps to each expert's count, and for each warp the entries before its own.
DEV void add_counts(const ExpertOrderParams& p) {
    u32* counts = at<u32>(p.counts);
    for (u32 expert = ptx::tid(); expert < p.num_experts; expert += ptx::ntid()) {
        u32* number = at<u32>(p.scratch) + expert;
        u32 before = 0;
        for (u32 warp = 0; warp < ptx::ntid() / WARP; warp++, number += p.num_experts) {
            const u32 count = *number;
            *number = before;
            before += count;
        }
        counts[expert] = before;
    }
}

/// Where each expert's rows start, by one warp; returns where the last ones end.
DEV u32 lay_out_experts(const ExpertOrderParams& p, u32 lane) {
    const u32* counts = at<u32>(p.counts);
    u32* starts = at<u32>(p.starts);
    u32 end = 0;
    for (u32 first = 0; first < p.num_experts; first += WARP) {
        const u32 expert = first + lane;
        const bool inside = expert < p.num_experts;
        const u32 rows = inside ? divided_up(counts[expert], p.alignment) * p.alignment : 0;
        const u32 sum = sum_up_to(lane, rows);
        if (inside) starts[expert] = end + sum - rows;
        end += ptx::shfl_sync_idx(ptx::ALL, sum, WARP - 1);
    }
    if (lane == 0) starts[p.num_experts] = end;
    return end;
}

/// Whether rows can be placed; without, there are none, so that what uses the order does nothing.
DEV void judge_order(const ExpertOrderParams& p, ExpertOrder& order, u32 rows) {
    if (order.status == order::OK && order.invalid != ~0ull) order.status = order::EXPERT_OUT_OF_RANGE;
    if (order.status == order::OK && rows > p.expanded_capacity) order.status = order::TOO_MANY_ROWS;
    const bool good = order.status == order::OK;
    order.rows = good ? rows : 0;
    if (!good) order.received = 0;
}

DEV void place_entries(const ExpertOrderParams& p, const Slice& slice) {
    const u32* starts = at<u32>(p.starts);
    for (u32 expert = slice.lane; expert < p.num_experts; expert += WARP) slice.numbers[expert] += starts[expert];
    ptx::bar_warp_sync();
    u32* expanded = at<u32>(p.expanded);
    u32* sources = at<u32>(p.sources);
    visit_entries(p, slice, [&](u32 entry, u32 expert) {
        const u32 row = take_number(slice, expert);
        if (entry >= slice.end) return;
        expanded[entry] = expert == NONE ? NONE : row;
        if (expert != NONE) sources[row] = entry / p.topk;
    });
}

/// Padding rows have no source.
DEV void place_padding(const ExpertOrderParams& p, u32 lane) {
    const u32* counts = at<u32>(p.counts);
    const u32* starts = at<u32>(p.starts);
    u32* sources = at<u32>(p.sources);
    for (u32 expert = ptx::tid() / WARP; expert < p.num_experts; expert += ptx::ntid() / WARP) {
        const u32 end = starts[expert + 1];
        for (u32 row = starts[expert] + counts[expert] + lane; row < end; row += WARP) sources[row] = NONE;
    }
}

/// Makes the order, by one block.
DEV void order_rows(const ExpertOrderParams& p) {
    ExpertOrder& order = *at<ExpertOrder>(p.order);
    if (ptx::tid() == 0) begin_order(p, order);
    block_sync();
    const Slice slice(p, order.received * p.topk);
    count_entries(p, order, slice);
    block_sync();
    add_counts(p);
    block_sync();
    if (ptx::tid() < WARP) {
        const u32 rows = lay_out_experts(p, slice.lane);
        if (slice.lane == 0) judge_order(p, order, rows);
    }
    block_sync();
    if (order.status != order::OK) return;
    place_entries(p, slice);
    place_padding(p, slice.lane);
}

}  // namespace railhop
