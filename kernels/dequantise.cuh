// E4M3 rows to f32 or BF16 rows, a warp to a row.
#pragma once
#include "local.cuh"

namespace railhop {

/// Elements that a lane takes at a time. They share a scale.
constexpr u32 DEQUANTISED = 8;

/// Writes the values of eight codes, the first in the lowest byte, as f32 or as BF16.
DEV void write_dequantised(const DequantiseParams& p, u64 codes, float scale, u64 element) {
    float values[DEQUANTISED];
    for (u32 i = 0; i < DEQUANTISED; i++) values[i] = dequantised((u32)(codes >> 8 * i) & 0xFF, scale);
    V4* out = at<V4>(p.out + element * p.out_bytes);
    if (p.out_bytes == 2) {
        *out = V4{pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]), pack_bf16(values[4], values[5]),
                  pack_bf16(values[6], values[7])};
        return;
    }
    for (u32 i = 0; i < 2; i++) {
        const float* four = values + 4 * i;
        out[i] = V4{ptx::mov_b32(four[0]), ptx::mov_b32(four[1]), ptx::mov_b32(four[2]), ptx::mov_b32(four[3])};
    }
}

DEV void dequantise_row(const DequantiseParams& p, u32 lane, u64 row) {
    const u64* codes = at<u64>(p.x + row * p.hidden);
    const u8* scales = at<u8>(p.scales + row * p.scale_pitch);
    const u32 units = p.hidden / DEQUANTISED;
    for (u32 block = 0; block < units; block += BLOCK) {
        u64 loaded[BATCH] = {};
        float scale[BATCH] = {};
        for (u32 i = 0; i < BATCH; i++) {
            const u32 unit = unit_of(block, i, lane);
            if (unit >= units) continue;
            loaded[i] = codes[unit];
            scale[i] = read_scale(scales, unit * DEQUANTISED / GROUP, p.scale_bytes);
        }
        for (u32 i = 0; i < BATCH; i++) {
            const u32 unit = unit_of(block, i, lane);
            if (unit < units) write_dequantised(p, loaded[i], scale[i], row * p.hidden + unit * DEQUANTISED);
        }
    }
}

/// Dequantises the received rows, as many as there is room for.
DEV void dequantise_rows(const DequantiseParams& p) {
    const Share share;
    const u64 received = *at<u64>(p.received);
    const u32 rows = received < p.capacity ? (u32)received : p.capacity;
    for (u32 row = share.number; row < rows; row += share.count) dequantise_row(p, share.lane, row);
}

}  // namespace railhop
