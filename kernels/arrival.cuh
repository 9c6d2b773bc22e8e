// The end of an operation (D4, C4, E4, E5): the warp that is done last speaks for the rank. No warp waits for another
// of its grid, so the grid may be scheduled as it fits.
#pragma once
#include "wait.cuh"

namespace railhop {

/// Counts the warp as done, with all its writes; whether it is the last.
DEV bool is_last(const Params& p, const Warp& warp) {
    ptx::bar_warp_sync();
    u32 last = 0;
    if (warp.lane == 0) {
        u32& finished = at<LaneState>(p.lane_state)->finished;
        last = ptx::atom_add_acq_rel_gpu(&finished, 1) == warp.count - 1;
        if (last) finished = 0;
    }
    last = ptx::shfl_sync_idx(ptx::ALL, last, 0);
    ptx::bar_warp_sync();
    return last != 0;
}

/// Index words that are waited for together: a table of `outers` by `inners` entries in memory from `base` on.
struct Awaited {
    u64 base;
    Table words;
    u32 outers;
    u32 inners;
    u32 what;
};

DEV bool all_of_them(u32) { return true; }

/// Waits until the words (i, j) with `counts(j)` have reached `target`; each is written by `rank(j)`. By one warp, each
/// lane its own words. Whether they have; if not, the rank is stopped.
template <class Rank, class Counts>
DEV bool await_words(const Params& p, u32 lane, const Awaited& a, u64 target, Rank rank, Counts counts) {
    Patience patience;
    u32 stopped = 0;
    for (u32 i = lane; i < a.outers * a.inners && stopped == 0; i += WARP) {
        const u32 outer = i / a.inners, inner = i % a.inners;
        if (!counts(inner)) continue;
        for (u64 seen; !has_reached(seen = load_index(p, a.base + entry(a.words, outer, inner)), target);) {
            const u32 channel = a.outers > 1 ? outer : NONE;
            stopped = !patience.rest(p, {role::RECEIVER, channel, rank(inner), a.what, target, seen});
            if (stopped != 0) break;
        }
    }
    ptx::bar_warp_sync();
    return ptx::redux_sync_or(ptx::ALL, stopped) == 0;
}

/// E4: waits for all verdicts and copies them for the host; whether all are good. By one warp. `stopped` is set where
/// the wait was cut short.
DEV bool await_verdicts(const Params& p, u32 lane, u64 target, u32 parity, bool& stopped) {
    const auto rank = [&](u32 node) { return rank_of(p, node, p.local); };
    const Awaited verdicts{p.region, p.verdict_words, 1, p.nodes, waits::VERDICT};
    stopped = !await_words(p, lane, verdicts, target, rank, all_of_them);
    if (stopped) return false;
    constexpr u32 WORDS = sizeof(VerdictRecord) / 8;
    for (u32 i = lane; i < p.nodes * WORDS; i += WARP) {
        const u64* record = at<u64>(p.region + entry(p.verdict_records, parity, i / WORDS));
        at<u64>(p.report_verdicts)[i] = record[i % WORDS];
    }
    const VerdictRecord& first = *at<VerdictRecord>(p.region + entry(p.verdict_records, parity, 0));
    u32 bad = 0;
    for (u32 node = lane; node < p.nodes; node += WARP) {
        const VerdictRecord& record = *at<VerdictRecord>(p.region + entry(p.verdict_records, parity, node));
        bad |= record.state != verdict::GOOD || !same_start(record.started, first.started);
    }
    return ptx::redux_sync_or(ptx::ALL, bad) == 0;
}

/// Ends the operation at this rank: the next one may start. By one warp.
DEV void end_operation(const Params& p, u32 lane, u32 how) {
    ptx::bar_warp_sync();
    if (lane != 0) return;
    LaneState& state = *at<LaneState>(p.lane_state);
    Report& report = *at<Report>(p.report);
    report.status = how;
    const u64 ended = advanced(state.turn, 1);
    if (how != status::FAULT) state.turn = ended;
    ptx::st_release_sys(&report.ended, ended);
}

/// The last warp's work after rows have moved: says so to the node, waits for the node's channels and, in a dispatch,
/// for the world's verdict.
DEV void arrive(const Params& p, const Warp& warp) {
    LaneState& state = *at<LaneState>(p.lane_state);
    const u64 target = advanced(state.turn, 1);
    const u32 parity = state.turn & 1;
    if (is_stopped_together(p, warp.lane)) return end_operation(p, warp.lane, status::FAULT);
    for (u32 i = warp.lane; i < p.channels * p.ranks_per_node; i += WARP) {
        const u64 word = entry(p.done_words, i / p.ranks_per_node, p.local);
        signal(p, peer_region(p, i % p.ranks_per_node) + word, target);
    }
    bool stopped = false, good = state.world_good != 0;
    if (p.lane == 0) good = await_verdicts(p, warp.lane, target, parity, stopped);
    if (!stopped && state.node_good) {
        const auto rank = [&](u32 local) { return rank_of(p, p.node, local); };
        const Awaited done{p.region, p.done_words, p.channels, p.ranks_per_node, waits::DONE};
        stopped = !await_words(p, warp.lane, done, target, rank, all_of_them);
    }
    HandleState& plan = *at<HandleState>(p.handle);
    if (warp.lane == 0 && !stopped && good && plan.dispatched == 0) plan.dispatched = 1;
    end_operation(p, warp.lane, stopped ? status::FAULT : good ? status::OK : status::REFUSED);
}

}  // namespace railhop
