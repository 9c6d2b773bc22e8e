// Reduces the experts' outputs, in expert-major order, to one row per received row: a warp to a row, f32 sums in
// registers, each operation rounded on its own.
#pragma once
#include "local.cuh"

namespace railhop {

/// Elements of a unit.
constexpr u32 SUMMED = 8;

/// The sums of one lane's part of a block.
struct Sums {
    float of[BATCH][SUMMED];
};

DEV void add_two(float* sums, float weight, u32 two) {
    sums[0] = ptx::add_rn(sums[0], ptx::mul_rn(weight, widen_bf16(two)));
    sums[1] = ptx::add_rn(sums[1], ptx::mul_rn(weight, widen_high_bf16(two)));
}

/// Adds a weighted row's part of the block that starts at unit `block`.
DEV void add_block(Sums& sums, const V4* row, float weight, u32 block, u32 units, u32 lane) {
    V4 loaded[BATCH] = {};
    for (u32 i = 0; i < BATCH; i++) {
        const u32 unit = unit_of(block, i, lane);
        if (unit < units) loaded[i] = row[unit];
    }
    for (u32 i = 0; i < BATCH; i++) {
        add_two(sums.of[i], weight, loaded[i].x);
        add_two(sums.of[i] + 2, weight, loaded[i].y);
        add_two(sums.of[i] + 4, weight, loaded[i].z);
        add_two(sums.of[i] + 6, weight, loaded[i].w);
    }
}

DEV void write_block(const Sums& sums, V4* out, u32 block, u32 units, u32 lane) {
    for (u32 i = 0; i < BATCH; i++) {
        const float* of = sums.of[i];
        const u32 unit = unit_of(block, i, lane);
        if (unit >= units) continue;
        out[unit] = V4{pack_bf16(of[0], of[1]), pack_bf16(of[2], of[3]), pack_bf16(of[4], of[5]),
                       pack_bf16(of[6], of[7])};
    }
}

/// Sums the terms of a received row in the order of its entries; without terms it is +0.0.
DEV void collapse_row(const CollapseParams& p, u32 lane, u64 received) {
    // Lane k holds entry k: there are no more entries than lanes.
    const u64 entry = received * p.topk + lane;
    const u32 row = lane < p.topk ? at<u32>(p.expanded)[entry] : NONE;
    const bool weighted = p.weights != 0 && row != NONE;
    const u32 weight = weighted ? at<u32>(p.weights)[entry] : ptx::mov_b32(1.0f);
    const u32 terms = ptx::vote_sync_ballot(ptx::ALL, row != NONE);
    const u32 units = p.hidden / SUMMED;
    for (u32 block = 0; block < units; block += BLOCK) {
        Sums sums = {};
        for (u32 left = terms; left != 0; left &= left - 1) {
            const u32 k = ptx::ctz(left);
            const u64 term = ptx::shfl_sync_idx(ptx::ALL, row, k);
            const float scale = ptx::mov_f32(ptx::shfl_sync_idx(ptx::ALL, weight, k));
            add_block(sums, at<V4>(p.y + term * p.hidden * 2), scale, block, units, lane);
        }
        write_block(sums, at<V4>(p.out + received * p.hidden * 2), block, units, lane);
    }
}

/// Collapses the rows of an order.
DEV void collapse_rows(const CollapseParams& p) {
    const Share share;
    const u32 received = at<ExpertOrder>(p.order)->received;
    for (u32 r = share.number; r < received; r += share.count) collapse_row(p, share.lane, r);
}

}  // namespace railhop
