// The first half of the plan: every token's slot header, and the counts that peers need. One warp walks a channel, so
// offsets within runs follow from running counts; what is summed over channels is a sum and nothing else.
#pragma once
#include "base.cuh"

namespace railhop {

/// The count block for a node, behind the rail record to it.
DEV u32* counts_for(const Params& p, u32 node) { return at<u32>(entry(p.rail_outbox, 0, node) + COUNTS_AT); }

/// Rows of a channel for a local rank, in a count block.
DEV u32 rows_entry(const Params& p, u32 channel, u32 local) {
    return p.count_tokens + channel * p.count_channel + 1 + local;
}

class Counter {
    const Params& p;
    u32 lane;
    /// Rows so far, by rank, then tokens so far, by node.
    u32* rows;
    u32* tokens;

public:
    DEV Counter(const Params& params, u32 warp, u32 warp_lane)
        : p(params),
          lane(warp_lane),
          rows(reinterpret_cast<u32*>(ptx::dynamic_smem() + p.plan_counts + warp * p.plan_count_bytes)),
          tokens(rows + p.nodes * p.ranks_per_node) {}

    /// Counts one channel's tokens and writes their headers.
    DEV void count(u32 channel) {
        for (u32 i = lane; i < p.nodes * (p.ranks_per_node + 1); i += WARP) rows[i] = 0;
        ptx::bar_warp_sync();
        const TokenRange range = TokenRange::of_channel(p, channel);
        for (u32 i = 0; i < range.count; i++) count_token(range.first + i);
        for (u32 rank = lane; rank < p.nodes * p.ranks_per_node; rank += WARP) {
            const u32 node = rank / p.ranks_per_node;
            counts_for(p, node)[rows_entry(p, channel, rank % p.ranks_per_node)] = rows[rank];
        }
        for (u32 node = lane; node < p.nodes; node += WARP) {
            counts_for(p, node)[p.count_tokens + channel * p.count_channel] = tokens[node];
            at<u32>(p.plan_sends)[channel * p.nodes + node] = tokens[node];
        }
        ptx::bar_warp_sync();
    }

private:
    DEV void count_token(u32 token) {
        const u64 index = (u64)token * p.topk + lane;
        const i32 expert = lane < p.topk ? checked(at<i64>(p.topk_idx)[index], index) : -1;
        u32 rank = NONE, node = NONE;
        if (expert >= 0) {
            const ExpertPlace place = at<ExpertPlace>(p.placement)[expert];
            node = place.node;
            rank = rank_of(p, node, place.local);
            ptx::red_add_relaxed_gpu(counts_for(p, node) + p.count_experts + place.slot, 1);
        }
        const u32 same_rank = ptx::match_any_sync(ptx::ALL, rank), same_node = ptx::match_any_sync(ptx::ALL, node);
        const u32 offset = expert >= 0 ? rows[rank] : 0;
        write_header(token, expert, offset);
        ptx::bar_warp_sync();
        if (expert >= 0 && ptx::ctz(same_rank) == lane) rows[rank]++;
        if (expert >= 0 && ptx::ctz(same_node) == lane) tokens[node]++;
        ptx::bar_warp_sync();
    }

    /// The entry as a header holds it; one that is no expert counts as masked, and poisons the operation.
    DEV i32 checked(i64 expert, u64 index) const {
        if (expert >= -1 && expert < (i64)p.num_experts) return (i32)expert;
        ptx::red_min_relaxed_gpu(&at<LaneState>(p.lane_state)->invalid, index);
        return -1;
    }

    DEV void write_header(u32 token, i32 expert, u32 offset) const {
        u32* header = at<u32>(p.headers) + (u64)token * p.header_words;
        if (lane == 0) header[0] = token;
        if (lane < p.topk) {
            header[p.header_experts + lane] = (u32)expert;
            header[p.header_weights + lane] = at<u32>(p.topk_weights)[(u64)token * p.topk + lane];
            header[p.header_offsets + lane] = offset;
        }
        // The padding is the same wherever a header is made.
        if (p.header_offsets + p.topk + lane < p.header_words) header[p.header_offsets + p.topk + lane] = 0;
    }
};

}  // namespace railhop
