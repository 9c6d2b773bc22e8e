// Moves rows: each is read once, piece by piece through the warp's stages, and written once per target.
#pragma once
#include "encode.cuh"
#include "pipe.cuh"

namespace railhop {

/// Where a lane's copy of a row goes; null for lanes without one.
struct Target {
    u8* row;
    u8* scales;
};

/// The tokens of one step. A role implements it:
/// - `source(i)`: the caller's row, or the row in a slot, of token i.
/// - `begin(i)`: by all lanes, before the token's first piece is written: what else goes to the targets; returns the
///   lane's target.
/// - `scales(i, row)`: by all lanes, where rows are not quantised on the way: writes the token's scales to `row`.
/// `quantised`: whether its sources are rows to be quantised.
template <class Tokens>
class Mover {
    const Params& p;
    const Warp& warp;
    Pipe& pipe;
    Tokens& tokens;
    u32 role;
    bool quantise;
    u32 bytes;
    u32 pieces;

public:
    DEV Mover(const Params& params, const Warp& w, Pipe& stages, Tokens& step, u32 role_code)
        : p(params),
          warp(w),
          pipe(stages),
          tokens(step),
          role(role_code),
          quantise(step.encoded() ? false : quantises(params)),
          bytes(step.encoded() ? params.row_bytes : params.input_bytes),
          pieces(divided_up(bytes, params.warp.stage_bytes)) {}

    /// Moves `count` tokens. When it returns, all their bytes are where they belong, visible to every lane.
    DEV void run(u32 count) {
        // One stage less than there are: the copies out of the last one need not be waited for at once.
        u32 feed = 0, feed_piece = 0;
        ROLLED for (u32 ahead = pipe.depth() - 1; ahead > 0 && feed < count; ahead--) load(feed, feed_piece);
        ROLLED for (u32 i = 0; i < count; i++) {
            const Target target = tokens.begin(i);
            u8* scales = scale_row(i);
            if (p.scale_pitch > 0 && !quantise) tokens.scales(i, scales);
            ROLLED for (u32 piece = 0; piece < pieces; piece++) {
                write(target, piece, scales);
                ptx::cp_async_bulk_commit_group();
                // The copies of the piece before have read their stage, which the next load takes.
                ptx::cp_async_bulk_wait_group_read<1>();
                ptx::bar_warp_sync();
                if (feed < count) load(feed, feed_piece);
            }
        }
        ptx::cp_async_bulk_wait_group<0>();
        ptx::bar_warp_sync();
    }

private:
    DEV u32 piece_bytes(u32 piece) const {
        return smaller(p.warp.stage_bytes, bytes - piece * p.warp.stage_bytes);
    }

    /// Two rows take turns: when the second next token writes to one, the copies of the last have read it.
    DEV u8* scale_row(u32 i) const { return warp.shared + p.warp.outgoing + i % 2 * p.warp.outgoing_bytes; }

    DEV void load(u32& i, u32& piece) {
        pipe.load(tokens.source(i) + (u64)piece * p.warp.stage_bytes, piece_bytes(piece));
        if (++piece == pieces) {
            piece = 0;
            i++;
        }
    }

    DEV void write(const Target& target, u32 piece, u8* scales) {
        u8* stage = pipe.take(role);
        u32 offset = piece * p.warp.stage_bytes, size = piece_bytes(piece);
        if (quantise) {
            quantise_stage(p, warp.lane, stage, size, scales + offset / (2 * GROUP) * p.scale_bytes);
            offset /= 2;
            size /= 2;
        }
        const bool last = piece + 1 == pieces && p.scale_pitch > 0;
        if (quantise || last) {
            // What lanes wrote to shared memory, bulk copies of other lanes read.
            ptx::fence_proxy_async();
            ptx::bar_warp_sync();
        }
        if (target.row == nullptr) return;
        ptx::cp_async_bulk_s2g(target.row + offset, stage, size);
        if (last) ptx::cp_async_bulk_s2g(target.scales, scales, p.scale_pitch);
    }
};

/// The padding of scale rows is zero, here and so wherever they go.
DEV void clear_scale_rows(const Params& p, const Warp& warp) {
    V4* rows = reinterpret_cast<V4*>(warp.shared + p.warp.outgoing);
    for (u32 i = warp.lane; i < 2 * p.warp.outgoing_bytes / sizeof(V4); i += WARP) rows[i] = V4{0, 0, 0, 0};
    ptx::bar_warp_sync();
}

}  // namespace railhop
