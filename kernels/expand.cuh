// Received rows and their scales in expert-major order: a warp to an expanded row, and to 32 rows of scales, which
// become columns.
#pragma once
#include "local.cuh"

namespace railhop {

/// Copies a row, or fills it with zeros where there is no source.
DEV void expand_row(const ExpandParams& p, u32 lane, u64 row) {
    const u32 source = at<u32>(p.sources)[row];
    const V4* from = at<V4>(p.x + (u64)source * p.row_bytes);
    V4* to = at<V4>(p.out + row * p.row_bytes);
    const u32 units = p.row_bytes / sizeof(V4);
    for (u32 block = 0; block < units; block += BLOCK) {
        V4 loaded[BATCH] = {};
        for (u32 i = 0; i < BATCH; i++) {
            const u32 unit = unit_of(block, i, lane);
            if (unit < units && source != NONE) loaded[i] = from[unit];
        }
        for (u32 i = 0; i < BATCH; i++) {
            const u32 unit = unit_of(block, i, lane);
            if (unit < units) to[unit] = loaded[i];
        }
    }
}

/// Four UE8M0 scales from group `group` on, without what lies behind a row's last.
DEV u32 groups_inside(const ExpandParams& p, u32 word, u32 group) {
    const u32 left = p.scale_groups - group;
    return left < 4 ? word & ((1u << 8 * left) - 1) : word;
}

/// Writes a word of a row's scales where it belongs in `out_scales`. A row without source has zeros there.
DEV void write_scales(const ExpandParams& p, u32 row, bool none, u32 word, u32 index) {
    u32* out = at<u32>(p.out_scales) + row;
    if (p.columns == columns::F32) {
        if (index < p.scale_groups) out[(u64)index * p.column_pitch] = word;
        return;
    }
    const u32 first = 4 * index;
    if (first >= p.scale_groups) return;
    if (p.columns == columns::PACKED) {
        out[(u64)index * p.column_pitch] = groups_inside(p, word, first);
        return;
    }
    for (u32 i = 0; i < 4 && first + i < p.scale_groups; i++) {
        out[(u64)(first + i) * p.column_pitch] = none ? 0 : widen_ue8m0(word >> 8 * i & 0xFF);
    }
}

/// The scales of one expanded row, by one lane: lanes of neighbouring rows write neighbouring words.
DEV void expand_scales(const ExpandParams& p, u32 row, u32 source) {
    const V4* from = at<V4>(p.scales + (u64)source * p.scale_pitch);
    const bool none = source == NONE;
    for (u32 i = 0; i < p.scale_pitch / sizeof(V4); i++) {
        const V4 four = none ? V4{0, 0, 0, 0} : from[i];
        write_scales(p, row, none, four.x, 4 * i);
        write_scales(p, row, none, four.y, 4 * i + 1);
        write_scales(p, row, none, four.z, 4 * i + 2);
        write_scales(p, row, none, four.w, 4 * i + 3);
    }
}

/// Expands rows; of scales also what lies between the last row and the end of a column: zeros.
DEV void expand_rows(const ExpandParams& p) {
    const Share share;
    const u32 rows = at<ExpertOrder>(p.order)->rows;
    for (u32 row = share.number; row < rows; row += share.count) expand_row(p, share.lane, row);
    if (p.columns == columns::NONE) return;
    for (u32 tile = share.number; tile < divided_up(p.column_pitch, WARP); tile += share.count) {
        const u32 row = tile * WARP + share.lane;
        if (row < p.column_pitch) expand_scales(p, row, row < rows ? at<u32>(p.sources)[row] : NONE);
    }
}

}  // namespace railhop
