// The second half of the plan: from the counts of all source ranks to every run's first row (E3). Order at a rank is
// by (source rank, channel, token), so places are prefix sums.
#pragma once
#include "count.cuh"

namespace railhop {

class Gatherer {
    const Params& p;
    u32 thread;
    u32 threads;
    u32 lane;
    u32 warp;

public:
    DEV explicit Gatherer(const Params& params)
        : p(params), thread(ptx::tid()), threads(ptx::ntid()), lane(thread % WARP), warp(thread / WARP) {}

    /// Copies the count blocks of believed sources from the ranks of the node, each from the one on its own rail.
    DEV void copy(u32 parity) const {
        const u32 world = p.nodes * p.ranks_per_node;
        ROLLED for (u32 source = 0; source < world; source++) {
            if (!agrees(source)) continue;
            const u64 region = peer_region(p, source % p.ranks_per_node);
            const u32* counts = at<u32>(region + entry(p.rail_records, parity, source / p.ranks_per_node) + COUNTS_AT);
            for (u32 i = thread; i < p.count_words; i += threads) block(source)[i] = counts[i];
        }
    }

    /// First rows of the own rail's runs, rows of each local rank, tokens along the own rail, entries per expert.
    DEV void sum() const {
        for (u32 local = warp; local < p.ranks_per_node; local += threads / WARP) sum_rows(local);
        for (u32 run = thread; run < p.nodes * p.channels; run += threads) {
            const u32 source = rank_of(p, run / p.channels, p.local);
            at<u32>(p.plan_tokens)[run] = count(source, p.count_tokens + run % p.channels * p.count_channel);
        }
        for (u32 expert = thread; expert < p.own_experts; expert += threads) {
            u32 entries = 0;
            for (u32 source = 0; source < p.nodes * p.ranks_per_node; source++) {
                entries += count(source, p.count_experts + p.count_own_expert + expert);
            }
            at<u32>(p.report_experts)[expert] = entries;
        }
    }

    /// Where each run's tokens start among those forwarded, and the totals that kernels split their warps by. By one
    /// warp, after `sum`.
    DEV void total() const {
        const u32 runs = p.nodes * p.channels;
        u32 sent = 0, own = 0, forwarded = 0;
        for (u32 first = 0; first < runs; first += WARP) {
            const u32 run = first + lane;
            const bool is_own = run / p.channels == p.node;
            const u32 tokens = run < runs ? at<u32>(p.plan_tokens)[run] : 0;
            const u32 foreign = is_own ? 0 : tokens;
            const u32 end = forwarded + sum_up_to(lane, foreign);
            if (run < runs) at<u32>(p.plan_first)[run] = end - foreign;
            forwarded = ptx::shfl_sync_idx(ptx::ALL, end, WARP - 1);
            own += is_own ? tokens : 0;
            if (run < runs && run % p.nodes != p.node) sent += at<u32>(p.plan_sends)[run];
        }
        sent = ptx::redux_sync_add(ptx::ALL, sent);
        own = ptx::redux_sync_add(ptx::ALL, own);
        if (lane != 0) return;
        HandleState& plan = *at<HandleState>(p.handle);
        plan.sent = sent;
        plan.own = own;
        plan.forwarded = forwarded;
    }

private:
    DEV u32* block(u32 source) const { return at<u32>(p.gathered) + (u64)source * p.count_words; }
    DEV bool agrees(u32 source) const { return at<u32>(p.agrees)[source] != 0; }
    DEV u32 count(u32 source, u32 entry) const { return agrees(source) ? block(source)[entry] : 0; }

    /// All runs for one local rank, by one warp.
    DEV void sum_rows(u32 local) const {
        const u32 runs = p.nodes * p.ranks_per_node * p.channels;
        u32 rows = 0;
        for (u32 first = 0; first < runs; first += WARP) {
            const u32 run = first + lane, source = run / p.channels, channel = run % p.channels;
            const u32 own = run < runs ? count(source, rows_entry(p, channel, local)) : 0;
            const u32 end = rows + sum_up_to(lane, own);
            if (run < runs && source % p.ranks_per_node == p.local) {
                const u32 on_rail = source / p.ranks_per_node * p.channels + channel;
                at<u32>(p.plan_bases)[on_rail * p.ranks_per_node + local] = end - own;
            }
            rows = ptx::shfl_sync_idx(ptx::ALL, end, WARP - 1);
        }
        if (lane == 0) at<u64>(p.plan_rows)[local] = rows;
    }
};

}  // namespace railhop
