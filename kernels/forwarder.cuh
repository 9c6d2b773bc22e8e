// The forwarder of dispatch: from the rail, or from the own input, to the final rows (D2, D3).
#pragma once
#include "placement.cuh"

namespace railhop {

/// Forwards what comes along the rail: one ring a step.
class Forwarder {
    const Params& p;
    const Warp& warp;
    Pipe& pipe;
    u32 parity;
    /// Final rows are kept once: a cached dispatch finds them there, where a combine may be reading them.
    bool keeps;
    u32 node = 0;
    u32 channel = 0;
    /// The ring's cursor, and the tokens of the run forwarded before, at the step's start.
    u32 cursor = 0;
    u32 forwarded = 0;

public:
    DEV Forwarder(const Params& params, const Warp& w, Pipe& stages)
        : p(params),
          warp(w),
          pipe(stages),
          parity(at<LaneState>(p.lane_state)->turn & 1),
          keeps(at<HandleState>(p.handle)->dispatched == 0) {}

    /// Forwards at most a chunk of the ring from a node.
    DEV Step step(u32 channel_number, u32 from, Wait& wait) {
        channel = channel_number;
        node = from;
        const u32 total = run_tokens(p, node, channel);
        u32& progress = at<u32>(p.incoming)[channel * p.nodes + node];
        forwarded = progress;
        if (forwarded == total) return Step::Done;
        const u64 taken = taken_index(p, channel, node);
        const u32 count = smaller(arrived(taken, wait), smaller(p.chunk, total - forwarded));
        if (count == 0) return Step::Blocked;
        cursor = (u32)taken;
        if (at<LaneState>(p.lane_state)->node_good) {
            Mover<Forwarder>(p, warp, pipe, *this, role::FORWARDER).run(count);
        }
        ptx::bar_warp_sync();
        if (warp.lane == 0) {
            release_slots(p, role::FORWARDER, channel, node, count);
            progress = forwarded + count;
        }
        ptx::bar_warp_sync();
        return Step::Moved;
    }

    // ---- the step's tokens, for the mover

    DEV bool encoded() const { return true; }
    DEV const u8* slot(u32 i) const { return recv_slot(p, channel, node, cursor + i); }
    DEV const u8* source(u32 i) const { return slot(i) + p.slot_row; }
    DEV void scales(u32 i, u8* row) const { copy_scales(p, warp.lane, slot(i), row); }

    DEV Target begin(u32 i) {
        const u32* header = reinterpret_cast<const u32*>(slot(i));
        const Wanted wanted(p, header, bases_of(p, node, channel), warp.lane);
        if (keeps) keep(i, wanted);
        return place_token(p, warp, parity, header, wanted, rank_of(p, node, p.local));
    }

private:
    /// Slots that can be read, for all lanes; the wait for the first. Bulk copies read them, so the proxy fence comes
    /// after the acquire.
    DEV u32 arrived(u64 taken, Wait& wait) {
        u64 tail = 0;
        if (warp.lane == 0) {
            tail = load_index(p, p.region + entry(p.tail_words, channel, node));
            ptx::fence_proxy_async();
        }
        tail = broadcast(tail, 0);
        ptx::bar_warp_sync();
        wait = {role::FORWARDER, channel, rank_of(p, node, p.local), waits::TAIL, advanced(taken, 1), tail};
        return (u32)since(tail, taken);
    }

    /// Keeps the token's final rows, ascending, for combine.
    DEV void keep(u32 i, const Wanted& wanted) {
        const u64 token = at<u32>(p.plan_first)[node * p.channels + channel] + forwarded + i;
        FinalRow* rows = at<FinalRow>(p.placed) + token * p.fan;
        const u32 count = ptx::popc(wanted.locals);
        if (wanted.leads) rows[wanted.position()] = {wanted.local, wanted.row};
        if (warp.lane >= count && warp.lane < p.fan) rows[warp.lane] = {NONE, NONE};
    }
};

/// Forwards tokens of the rank's own that its node wants; they skip hop 1. Any warp may take any token.
class OwnForwarder : public OwnTokens {
    Pipe& pipe;
    u32 parity;
    u32 next;
    u32 end;

public:
    /// The `part`th of `parts` shares of the tokens.
    DEV OwnForwarder(const Params& params, const Warp& w, Pipe& stages, u32 part, u32 parts)
        : OwnTokens(params, w), pipe(stages), parity(at<LaneState>(p.lane_state)->turn & 1) {
        const TokenRange share(p, part, parts);
        next = share.first;
        end = share.first + share.count;
        if (!at<LaneState>(p.lane_state)->node_good || at<u32>(p.open)[p.node] == 0) next = end;
    }

    /// Forwards at most a chunk.
    DEV Step step() {
        u32 count = 0;
        for (; next < end && count < p.chunk; next++) {
            const u32 node = node_of_entry(p, header_of(p, next), warp.lane);
            if (ptx::vote_sync_ballot(ptx::ALL, node == p.node) == 0) continue;
            if (warp.lane == 0) chosen[count] = {next, 0};
            count++;
        }
        if (count == 0) return Step::Done;
        ptx::bar_warp_sync();
        Mover<OwnForwarder>(p, warp, pipe, *this, role::FORWARDER).run(count);
        return Step::Moved;
    }

    DEV Target begin(u32 i) {
        const u32 token = chosen[i].token;
        const u32* header = header_of(p, token);
        const Wanted wanted(p, header, bases_of(p, p.node, channel_of(p, token)), warp.lane);
        return place_token(p, warp, parity, header, wanted, own_rank(p));
    }
};

}  // namespace railhop
