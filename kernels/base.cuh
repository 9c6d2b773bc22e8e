// What every role uses: memory by address, index words, the warp's own place.
#pragma once
#include "ptx.cuh"
#include "generated/wire.cuh"

namespace railhop {

constexpr u32 WARP = 32;
/// No rank, no row, no channel.
constexpr u32 NONE = 0xFFFFFFFFu;

template <class T>
DEV T* at(u64 address) {
    return reinterpret_cast<T*>(address);
}

DEV u64 entry(const Table& table, u32 i, u32 j) { return table.at + i * table.outer + j * table.inner; }

DEV u32 smaller(u32 a, u32 b) { return a < b ? a : b; }
DEV u32 larger(u32 a, u32 b) { return a < b ? b : a; }
DEV u32 divided_up(u32 n, u32 by) { return (n + by - 1) / by; }

// ---- index words: generation above, index below; see src/wire/word.rs

constexpr u64 INDEX_MASK = (1ull << INDEX_BITS) - 1;

/// Steps from `earlier` to `later`.
DEV u64 since(u64 later, u64 earlier) { return (later - earlier) & INDEX_MASK; }
DEV bool has_reached(u64 index, u64 target) { return since(index, target) < 1ull << (INDEX_BITS - 1); }
DEV u64 advanced(u64 index, u64 steps) { return (index + steps) & INDEX_MASK; }
DEV u64 word_of(const Params& p, u64 index) { return (u64)p.generation << INDEX_BITS | index; }
/// The index that `word` publishes; words of other generations are stale and read as the first index.
DEV u64 index_in(const Params& p, u64 word) {
    return word >> INDEX_BITS == p.generation ? word & INDEX_MASK : p.first_index;
}

/// Acquires an index that others publish at `address`.
DEV u64 load_index(const Params& p, u64 address) { return index_in(p, ptx::ld_acquire_sys(at<u64>(address))); }
/// Publishes an index to the rest of the node, after all that happened before.
DEV void signal(const Params& p, u64 address, u64 index) { ptx::st_release_sys(at<u64>(address), word_of(p, index)); }

// ---- ranks

DEV u32 rank_of(const Params& p, u32 node, u32 local) { return node * p.ranks_per_node + local; }
DEV u32 own_rank(const Params& p) { return rank_of(p, p.node, p.local); }
/// Address of the region of a rank of the own node.
DEV u64 peer_region(const Params& p, u32 local) { return at<u64>(p.peers)[local]; }
/// The ring of another node among those of a channel.
DEV u32 ring_of(const Params& p, u32 node) { return node < p.node ? node : node - 1; }

/// Whether two ranks started the same.
DEV bool same_start(const StartedRecord& a, const StartedRecord& b) {
    return a.epoch == b.epoch && a.plan == b.plan && a.config == b.config && a.kind == b.kind && a.hidden == b.hidden &&
           a.topk == b.topk && a.format == b.format;
}

// ---- tokens

/// A share of the rank's tokens: they are split into contiguous shares of sizes that differ by one at most.
struct TokenRange {
    u32 first;
    u32 count;

    /// The `part`th of `parts` shares.
    DEV TokenRange(const Params& p, u32 part, u32 parts)
        : first((u32)((u64)p.tokens * part / parts)), count((u32)((u64)p.tokens * (part + 1) / parts) - first) {}

    /// The tokens of a channel.
    DEV static TokenRange of_channel(const Params& p, u32 channel) { return TokenRange(p, channel, p.channels); }
};

/// The channel that owns a token of the rank: the last whose range starts at or before it.
DEV u32 channel_of(const Params& p, u32 token) { return (u32)((((u64)token + 1) * p.channels - 1) / p.tokens); }

/// Tokens that come along the rail from a node by a channel; none while the pair is not open.
DEV u32 run_tokens(const Params& p, u32 node, u32 channel) {
    return at<u32>(p.open)[node] != 0 ? at<u32>(p.plan_tokens)[node * p.channels + channel] : 0;
}

// ---- warps

/// A warp: its lane here, its place in the block and in the grid, its share of shared memory.
struct Warp {
    u32 lane;
    /// Consecutive numbers lie on different blocks, so that every block has its part of each role.
    u32 number;
    u32 count;
    u8* shared;

    DEV explicit Warp(const Params& p)
        : lane(ptx::tid() % WARP),
          number(ptx::tid() / WARP * ptx::nctaid() + ptx::ctaid()),
          count(ptx::ntid() / WARP * ptx::nctaid()),
          shared(ptx::dynamic_smem() + ptx::tid() / WARP * p.warp.bytes) {}
};

/// A value of lane `lane`, for all.
DEV u64 broadcast(u64 v, u32 lane) {
    const u32 low = ptx::shfl_sync_idx(ptx::ALL, (u32)v, lane);
    return (u64)ptx::shfl_sync_idx(ptx::ALL, (u32)(v >> 32), lane) << 32 | low;
}

/// The sum of the values of this lane and of those below. By all lanes.
DEV u32 sum_up_to(u32 lane, u32 v) {
    for (u32 delta = 1; delta < WARP; delta *= 2) {
        const u32 below = ptx::shfl_sync_up(ptx::ALL, v, delta);
        if (lane >= delta) v += below;
    }
    return v;
}

/// The lanes below.
DEV u32 lanes_below(u32 lane) { return (1u << lane) - 1; }

}  // namespace railhop
