// Final rows: where the tokens of a run go at the ranks of the own node (D2).
#pragma once
#include "sender.cuh"

namespace railhop {

/// The ranks of the own node that want a token, by the lanes that hold its entries: the first entry of each rank leads.
struct Wanted {
    u32 local;
    u32 row;
    bool leads;
    /// Bit l: local rank l wants the token.
    u64 locals;

    /// Of `header`, whose run has its rows at each local rank from `bases` on.
    DEV Wanted(const Params& p, const u32* header, const u32* bases, u32 lane) : local(NONE), row(NONE) {
        const i32 expert = lane < p.topk ? (i32)header[p.header_experts + lane] : -1;
        if (expert >= 0) {
            const ExpertPlace place = at<ExpertPlace>(p.placement)[expert];
            if (place.node == p.node) local = place.local;
        }
        if (local != NONE) row = bases[local] + header[p.header_offsets + lane];
        const u32 same = ptx::match_any_sync(ptx::ALL, local);
        leads = local != NONE && ptx::ctz(same) == lane;
        const u32 low = leads && local < 32 ? 1u << local : 0, high = leads && local >= 32 ? 1u << (local - 32) : 0;
        locals = (u64)ptx::redux_sync_or(ptx::ALL, high) << 32 | ptx::redux_sync_or(ptx::ALL, low);
    }

    /// How many wanting ranks have a smaller index: the row's position in ascending order.
    DEV u32 position() const { return ptx::popc(locals & ((1ull << local) - 1)); }
};

/// First row at each local rank of the run that comes from the own rail's rank on `node` by `channel`.
DEV const u32* bases_of(const Params& p, u32 node, u32 channel) {
    return at<u32>(p.plan_bases) + (node * p.channels + channel) * p.ranks_per_node;
}

/// The buffer of a rank of the own node, as its enter record says.
DEV const RecvParts& parts_of(const Params& p, u32 parity, u32 local) {
    return at<EnterRecord>(p.region + entry(p.enter_records, parity, local))->parts;
}

/// Writes what goes with a row (local experts, weights, source) to every rank that wants the token; returns where the
/// lane's copy of the row goes. By all lanes.
DEV Target place_token(const Params& p, const Warp& warp, u32 parity, const u32* header, const Wanted& wanted, u32 source) {
    const i32 expert = warp.lane < p.topk ? (i32)header[p.header_experts + warp.lane] : -1;
    const u32 weight = warp.lane < p.topk ? header[p.header_weights + warp.lane] : 0;
    const u32 index = expert >= 0 ? at<ExpertPlace>(p.placement)[expert].index : NONE;
    const u32 origin = warp.lane == 0 ? source : header[0];
    for (u32 leaders = ptx::vote_sync_ballot(ptx::ALL, wanted.leads); leaders != 0; leaders &= leaders - 1) {
        const u32 local = ptx::shfl_sync_idx(ptx::ALL, wanted.local, ptx::ctz(leaders));
        const u64 row = ptx::shfl_sync_idx(ptx::ALL, wanted.row, ptx::ctz(leaders));
        const RecvParts& parts = parts_of(p, parity, local);
        const u64 region = peer_region(p, local);
        if (warp.lane < p.topk) {
            const bool here = wanted.local == local;
            at<u32>(region + parts.topk_idx)[row * p.topk + warp.lane] = here ? index : NONE;
            at<u32>(region + parts.topk_weights)[row * p.topk + warp.lane] = here ? weight : 0;
        }
        if (warp.lane < 2) at<u32>(region + parts.source)[2 * row + warp.lane] = origin;
    }
    if (!wanted.leads) return {nullptr, nullptr};
    const RecvParts& parts = parts_of(p, parity, wanted.local);
    const u64 region = peer_region(p, wanted.local);
    return {at<u8>(region + parts.x) + (u64)wanted.row * p.row_bytes,
            at<u8>(region + parts.scales) + (u64)wanted.row * p.scale_pitch};
}

}  // namespace railhop
