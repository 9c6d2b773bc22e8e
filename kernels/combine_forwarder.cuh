// The forwarder of combine: a node's sum for each token of its rail, on its way home (C1).
#pragma once
#include "outputs.cuh"
#include "sum.cuh"

namespace railhop {

/// Sums for one home rank and channel a step.
class CombineForwarder {
    const Params& p;
    const Warp& warp;
    Pipe& pipe;
    u32 parity;
    u32 channel = 0;
    u32 home = 0;
    u32 cursor = 0;
    u32 done = 0;

public:
    DEV CombineForwarder(const Params& params, const Warp& w, Pipe& stages)
        : p(params), warp(w), pipe(stages), parity(at<LaneState>(p.lane_state)->turn & 1) {}

    /// Sends at most a chunk to the rank of the own rail on a node.
    DEV Step step(u32 channel_number, u32 home_node, Wait& wait) {
        channel = channel_number;
        home = home_node;
        const u32 total = run_tokens(p, home, channel);
        u32& progress = at<u32>(p.outgoing)[channel * p.nodes + home];
        done = progress;
        if (done == total) return Step::Done;
        const u32 count = smaller(room(wait), smaller(p.chunk, total - done));
        if (count == 0) return Step::Blocked;
        Summer<CombineForwarder>(p, warp, pipe, *this, role::FORWARDER, count).run();
        if (warp.lane == 0) {
            publish_slots(p, role::FORWARDER, channel, home, count);
            progress = done + count;
        }
        ptx::bar_warp_sync();
        return Step::Moved;
    }

    // ---- the step's tokens, for the summer

    DEV Terms terms(u32 i, bool) const {
        const FinalRow mine = place(i);
        const u32 rows = ptx::vote_sync_ballot(ptx::ALL, mine.local != NONE);
        if (mine.local == NONE) return {ptx::popc(rows), rows, nullptr, nullptr};
        return {ptx::popc(rows), rows, output_row(p, parity, mine), output_weights(p, parity, mine)};
    }

    DEV u8* begin(u32 i, const Terms& terms) const {
        u8* slot = send_slot(p, channel, home, cursor + i);
        if (p.weights > 0) {
            const float sum = sum_weights(p, warp.lane, terms);
            if (warp.lane < p.weights) reinterpret_cast<float*>(slot)[warp.lane] = sum;
        }
        return slot + p.slot_row;
    }

    DEV const u8* bias(u32) const { return nullptr; }

private:
    /// The lane's final row of the token, ascending by local rank.
    DEV FinalRow place(u32 i) const {
        const u64 token = at<u32>(p.plan_first)[home * p.channels + channel] + done + i;
        return warp.lane < p.fan ? at<FinalRow>(p.placed)[token * p.fan + warp.lane] : FinalRow{NONE, NONE};
    }

    /// Slots that may be written, for all lanes; the wait for the first.
    DEV u32 room(Wait& wait) {
        u32 slots = 0, tail = 0;
        if (warp.lane == 0) {
            const SendEnd end(p, channel, home);
            slots = end.room(p);
            tail = (u32)end.tail;
            wait = end.wait(p, role::FORWARDER, channel, home);
        }
        cursor = ptx::shfl_sync_idx(ptx::ALL, tail, 0);
        slots = ptx::shfl_sync_idx(ptx::ALL, slots, 0);
        ptx::bar_warp_sync();
        return slots;
    }
};

}  // namespace railhop
