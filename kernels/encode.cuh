// From the caller's rows to rows as they move: quantising in place in a stage, and rows of scales.
#pragma once
#include "base.cuh"
#include "numeric.cuh"

namespace railhop {

DEV bool quantises(const Params& p) { return p.encode >= encode::QUANTISE_F32; }

/// Quantises `bytes` of a BF16 row in a stage: codes take the place of the first half, scales go to `scales`, from
/// that of the stage's first group on. A stage holds whole groups, but for a row's last. Sixteen lanes take a group,
/// and a lane eight elements; two groups at a time, in ascending order, are read before their codes are written, so
/// codes never overtake elements.
DEV void quantise_stage(const Params& p, u32 lane, u8* stage, u32 bytes, u8* scales) {
    for (u32 first = 0; first < bytes; first += WARP * sizeof(V4)) {
        const u32 offset = first + lane * sizeof(V4);
        const bool inside = offset < bytes;
        const V4 x = inside ? *reinterpret_cast<const V4*>(stage + offset) : V4{0, 0, 0, 0};
        u32 peak = finite_peak(x);
        for (u32 lanes = 8; lanes > 0; lanes /= 2) {
            const u32 other = ptx::shfl_sync_bfly(ptx::ALL, peak, lanes);
            peak = larger(peak, other);
        }
        const Fit fit = p.encode == encode::QUANTISE_F32 ? fit_f32(peak) : fit_ue8m0(peak);
        ptx::bar_warp_sync();
        if (!inside) continue;
        *reinterpret_cast<u64*>(stage + offset / 2) = encode8(x, fit.gain);
        if (lane % 16 != 0) continue;
        const u32 group = offset / (2 * GROUP);
        if (p.encode == encode::QUANTISE_F32) {
            reinterpret_cast<float*>(scales)[group] = fit.scale;
        } else {
            scales[group] = (u8)(ptx::mov_b32(fit.scale) >> 23);
        }
    }
}

/// Gathers the scales of a token of ready E4M3 rows into a dense row.
DEV void gather_scales(const Params& p, u32 lane, u32 token, u8* row) {
    for (u32 group = lane; group < p.scale_groups; group += WARP) {
        const u64 element = token * p.scale_token_stride;
        if (p.scale_bytes == 4) {
            reinterpret_cast<u32*>(row)[group] = at<u32>(p.scales)[element + group * p.scale_group_stride];
        } else {
            // Four exponents to a word, the lowest byte first.
            const u32 word = at<u32>(p.scales)[element + group / 4 * p.scale_group_stride];
            row[group] = (u8)(word >> 8 * (group % 4));
        }
    }
}

/// Copies a row of scales from a slot.
DEV void copy_scales(const Params& p, u32 lane, const u8* slot, u8* row) {
    const V4* from = reinterpret_cast<const V4*>(slot + p.slot_scales);
    for (u32 i = lane; i < p.scale_pitch / sizeof(V4); i += WARP) reinterpret_cast<V4*>(row)[i] = from[i];
}

}  // namespace railhop
