// PieceSums rows in a fixed order: each contribution is read once, piece by piece through the warp's stages, and the sum is
// written once. What is under way at a time crosses pieces, contributions and tokens alike.
#pragma once
#include "numeric.cuh"
#include "pipe.cuh"

namespace railhop {

/// What a token's row is summed from, in the order of the lanes: lane j holds the j-th term.
struct Terms {
    u32 count;
    /// Lanes whose terms are the own node's, neighbours: summed on their own as other nodes summed theirs.
    u32 own;
    const u8* row;
    /// The weights that go with the row, where they are summed.
    const float* weights;

    /// Whether term `i` is the own node's.
    DEV bool is_own(u32 i) const { return own >> i & 1; }
    /// Whether term `i` is the last of the own node's.
    DEV bool ends_own(u32 i) const { return (own >> i & 3) == 1; }
};

/// Sum number `lane` of the terms' weights, in the order in which rows are summed. By all lanes.
DEV float sum_weights(const Params& p, u32 lane, const Terms& terms) {
    float total = 0.0f, node = 0.0f;
    ROLLED for (u32 i = 0; i < terms.count; i++) {
        const float* weights = at<const float>(broadcast((u64)terms.weights, i));
        const float weight = lane < p.weights ? weights[lane] : 0.0f;
        if (terms.is_own(i)) node = ptx::add_rn(node, weight);
        if (!terms.is_own(i)) total = ptx::add_rn(total, weight);
        if (terms.ends_own(i)) total = ptx::add_rn(total, node);
    }
    return total;
}

/// Registers of a lane: the sums of the elements it has of a piece.
constexpr u32 VECTORS = SUM_BYTES / (WARP * sizeof(V4));
constexpr u32 SUMS = VECTORS * 8;

struct PieceSums {
    float v[SUMS];

    DEV void clear() {
        for (u32 i = 0; i < SUMS; i++) v[i] = 0.0f;
    }

    /// Adds the lane's elements of a piece of `bytes`.
    DEV void add(const u8* piece, u32 bytes, u32 lane) {
        for (u32 i = 0; i < VECTORS; i++) {
            const u32 offset = (i * WARP + lane) * sizeof(V4);
            if (offset >= bytes) continue;
            const V4 x = *reinterpret_cast<const V4*>(piece + offset);
            const u32 words[4] = {x.x, x.y, x.z, x.w};
            for (u32 k = 0; k < 4; k++) {
                float* sum = v + i * 8 + k * 2;
                sum[0] = ptx::add_rn(sum[0], widen_bf16(words[k]));
                sum[1] = ptx::add_rn(sum[1], widen_high_bf16(words[k]));
            }
        }
    }

    DEV void add(const PieceSums& other) {
        for (u32 i = 0; i < SUMS; i++) v[i] = ptx::add_rn(v[i], other.v[i]);
    }

    /// Rounds the lane's elements into a piece.
    DEV void round(u8* piece, u32 bytes, u32 lane) const {
        for (u32 i = 0; i < VECTORS; i++) {
            const u32 offset = (i * WARP + lane) * sizeof(V4);
            if (offset >= bytes) continue;
            u32 words[4];
            for (u32 k = 0; k < 4; k++) {
                const float* sum = v + i * 8 + k * 2;
                words[k] = pack_bf16(sum[0], sum[1]);
            }
            *reinterpret_cast<V4*>(piece + offset) = V4{words[0], words[1], words[2], words[3]};
        }
    }
};

/// The tokens of one step. A role implements it, each function called by all lanes:
/// - `terms(i, summing)`: what token i is summed from; asked for twice, to feed the stages and (`summing`) to sum.
/// - `begin(i, terms)`: what goes beside the row; returns where the sum goes, the same for all lanes.
/// - `bias(i)`: a row to add last, or null.
template <class Tokens>
class Summer {
    const Params& p;
    const Warp& warp;
    Pipe& pipe;
    Tokens& tokens;
    u32 role;
    u32 count;
    // Where feeding has come to.
    Terms fed{};
    u32 fed_token = 0;
    u32 fed_piece = 0;
    u32 fed_term = 0;
    // Pieces that went out.
    u32 written = 0;

public:
    DEV Summer(const Params& params, const Warp& w, Pipe& stages, Tokens& step, u32 role_code, u32 step_tokens)
        : p(params), warp(w), pipe(stages), tokens(step), role(role_code), count(step_tokens) {}

    /// PieceSums the step's tokens. When it returns, all sums are where they belong, visible to every lane.
    DEV void run() {
        enter_token();
        ROLLED for (u32 ahead = pipe.depth(); ahead > 0 && fed_token < count; ahead--) feed();
        ROLLED for (u32 i = 0; i < count; i++) {
            const Terms terms = tokens.terms(i, true);
            u8* to = tokens.begin(i, terms);
            const u8* bias = tokens.bias(i);
            ROLLED for (u32 offset = 0; offset < p.row_bytes; offset += SUM_BYTES) {
                const u32 bytes = smaller(SUM_BYTES, p.row_bytes - offset);
                write(sum(terms, bytes, bias == nullptr ? nullptr : bias + offset), to + offset, bytes);
            }
        }
        ptx::cp_async_bulk_wait_group<0>();
        ptx::bar_warp_sync();
    }

private:
    /// Moves on to the next token that has anything to read.
    DEV void enter_token() {
        ROLLED for (; fed_token < count; fed_token++) {
            fed = tokens.terms(fed_token, false);
            if (fed.count > 0) return;
        }
    }

    /// Loads the next piece of the next row: for each piece of a token, that of all its rows. All lanes are together.
    DEV void feed() {
        const u8* row = at<const u8>(broadcast((u64)fed.row, fed_term));
        const u32 offset = fed_piece * SUM_BYTES;
        pipe.load(row + offset, smaller(SUM_BYTES, p.row_bytes - offset));
        if (++fed_term < fed.count) return;
        fed_term = 0;
        if (++fed_piece * SUM_BYTES < p.row_bytes) return;
        fed_piece = 0;
        fed_token++;
        enter_token();
    }

    DEV PieceSums sum(const Terms& terms, u32 bytes, const u8* bias) {
        PieceSums total, node;
        total.clear();
        node.clear();
        ROLLED for (u32 term = 0; term < terms.count; term++) {
            const u8* stage = pipe.take(role);
            if (terms.is_own(term)) node.add(stage, bytes, warp.lane);
            if (!terms.is_own(term)) total.add(stage, bytes, warp.lane);
            if (terms.ends_own(term)) total.add(node);
            // All lanes have read the stage, which the next load takes.
            ptx::bar_warp_sync();
            if (fed_token < count) feed();
        }
        if (bias != nullptr) total.add(bias, bytes, warp.lane);
        return total;
    }

    /// Two pieces take turns on their way out.
    DEV void write(const PieceSums& total, u8* to, u32 bytes) {
        u8* piece = warp.shared + p.warp.outgoing + written++ % 2 * p.warp.outgoing_bytes;
        ptx::cp_async_bulk_wait_group_read<1>();
        ptx::bar_warp_sync();
        total.round(piece, bytes, warp.lane);
        ptx::fence_proxy_async();
        ptx::bar_warp_sync();
        if (warp.lane == 0) ptx::cp_async_bulk_s2g(to, piece, bytes);
        ptx::cp_async_bulk_commit_group();
    }
};

}  // namespace railhop
