// The reducer of combine: the nodes' partial sums become the token's row at its home rank (C2).
#pragma once
#include "combine_forwarder.cuh"

namespace railhop {

/// Reduces slices of the rank's tokens, each in its order. With rings a slice is a channel; without, any share will do.
class Reducer {
    const Params& p;
    const Warp& warp;
    Pipe& pipe;
    NodeCursor* cursors;
    u32 parity;
    /// Without rings: the warp's share of the tokens, and how many of them are done.
    TokenRange share;
    u32 share_done = 0;
    u32 channel = 0;
    u32 token = 0;

public:
    /// The `part`th of `parts` shares of the tokens is the warp's where there are no rings.
    DEV Reducer(const Params& params, const Warp& w, Pipe& stages, u32 part, u32 parts)
        : p(params),
          warp(w),
          pipe(stages),
          cursors(reinterpret_cast<NodeCursor*>(w.shared + p.warp.cursors)),
          parity(at<LaneState>(p.lane_state)->turn & 1),
          share(p, part, parts) {}

    /// Reduces what has come of a channel, at most a chunk; without rings, all of the warp's share.
    DEV Step step(u32 channel_number, Wait& wait) {
        channel = channel_number;
        const bool rings = p.nodes > 1;
        const TokenRange range = rings ? TokenRange::of_channel(p, channel) : share;
        u32& progress = at<u32>(p.incoming)[channel * p.nodes + p.node];
        const u32 done = rings ? progress : share_done;
        token = range.first + done;
        const u32 left = range.count - done;
        if (left == 0) return Step::Done;
        open_rings();
        const u32 count = rings ? choose(smaller(p.chunk, left), wait) : left;
        if (count == 0) return Step::Blocked;
        Summer<Reducer>(p, warp, pipe, *this, role::REDUCER, count).run();
        if (!rings) share_done += count;
        if (rings && warp.lane == 0) progress = done + count;
        close_rings();
        return Step::Moved;
    }

    // ---- the step's tokens, for the summer

    /// Terms in the order of (node, local rank).
    DEV Terms terms(u32 i, bool summing) {
        const Part part(*this, i);
        const u8* row = nullptr;
        const float* weights = nullptr;
        if (part.is_own) {
            const FinalRow place{part.wanted.local, part.wanted.row};
            row = output_row(p, parity, place);
            weights = output_weights(p, parity, place);
        }
        // Another lane may have held the node's entry of the token before.
        ptx::bar_warp_sync();
        if (part.is_remote) {
            NodeCursor& cursor = cursors[part.node];
            u32& slots = summing ? cursor.issued : cursor.position;
            const u8* slot = recv_slot(p, channel, part.node, cursor.cursor + slots++);
            row = slot + p.slot_row;
            weights = reinterpret_cast<const float*>(slot);
        }
        return ordered(part, row, weights);
    }

    DEV u8* begin(u32 i, const Terms& terms) const {
        if (p.weights > 0) {
            const float sum = sum_weights(p, warp.lane, terms);
            if (warp.lane < p.weights) at<float>(p.out_weights)[(u64)(token + i) * p.weights + warp.lane] = sum;
        }
        return at<u8>(p.out) + (u64)(token + i) * p.row_bytes;
    }

    DEV const u8* bias(u32 i) const {
        return p.bias == 0 ? nullptr : at<u8>(p.bias) + (u64)(token + i) * p.row_bytes;
    }

private:
    /// What the lane holds of a token: the first entry of a rank of the own node, or the first of another node.
    struct Part {
        Wanted wanted;
        u32 node;
        bool is_own;
        bool is_remote;

        DEV Part(const Reducer& r, u32 i)
            : wanted(r.p, header_of(r.p, r.token + i),
                     bases_of(r.p, r.p.node, channel_of(r.p, r.token + i)), r.warp.lane),
              node(node_of_entry(r.p, header_of(r.p, r.token + i), r.warp.lane)) {
            const u32 same = ptx::match_any_sync(ptx::ALL, node);
            is_own = wanted.leads;
            is_remote = node != NONE && node != r.p.node && ptx::ctz(same) == r.warp.lane;
        }

        /// Ascending nodes, and within the own node ascending local ranks.
        DEV u32 key(const Params& p) const {
            return is_own ? rank_of(p, node, wanted.local) : is_remote ? rank_of(p, node, 0) : NONE;
        }
    };

    /// What the lanes hold, brought into its order.
    DEV Terms ordered(const Part& part, const u8* row, const float* weights) const {
        const u32 key = part.key(p);
        u32 position = 0;
        ROLLED for (u32 k = 0; k < p.topk; k++) position += ptx::shfl_sync_idx(ptx::ALL, key, k) < key;
        Terms terms{ptx::popc(ptx::vote_sync_ballot(ptx::ALL, key != NONE)), 0, nullptr, nullptr};
        ROLLED for (u32 k = 0; k < p.topk; k++) {
            const u32 to = ptx::shfl_sync_idx(ptx::ALL, key == NONE ? NONE : position, k);
            if (to == NONE) continue;
            terms.own |= ptx::shfl_sync_idx(ptx::ALL, part.is_own, k) << to;
            const u64 row_k = broadcast((u64)row, k), weights_k = broadcast((u64)weights, k);
            if (to != warp.lane) continue;
            terms.row = at<const u8>(row_k);
            terms.weights = at<const float>(weights_k);
        }
        return terms;
    }

    /// What has come from each node. Bulk copies read it, so the proxy fence comes after the acquire.
    DEV void open_rings() {
        ptx::bar_warp_sync();
        ROLLED for (u32 node = warp.lane; node < p.nodes; node += WARP) {
            cursors[node] = NodeCursor{0, 0, 0, 0, 0, 0};
            if (node == p.node) continue;
            const u64 taken = taken_index(p, channel, node);
            const u64 tail = load_index(p, p.region + entry(p.tail_words, channel, node));
            cursors[node].cursor = (u32)taken;
            cursors[node].room = (u32)since(tail, taken);
        }
        ptx::fence_proxy_async();
        ptx::bar_warp_sync();
    }

    /// How many tokens from the next on have all their parts here, at most `most`; the wait for the first that lacks one.
    DEV u32 choose(u32 most, Wait& wait) {
        u32 count = 0;
        ROLLED for (; count < most; count++) {
            const u32 node = node_of_entry(p, header_of(p, token + count), warp.lane);
            const u32 same = ptx::match_any_sync(ptx::ALL, node);
            const bool needs = node != NONE && node != p.node && ptx::ctz(same) == warp.lane;
            const bool lacks = needs && cursors[node].chosen == cursors[node].room;
            const u32 lacking = ptx::vote_sync_ballot(ptx::ALL, lacks);
            if (lacking != 0) {
                await_tail(ptx::shfl_sync_idx(ptx::ALL, node, ptx::ctz(lacking)), wait);
                break;
            }
            if (needs) cursors[node].chosen++;
            ptx::bar_warp_sync();
        }
        return count;
    }

    DEV void await_tail(u32 node, Wait& wait) const {
        const u64 taken = taken_index(p, channel, node), room = cursors[node].room;
        const u64 seen = advanced(taken, room);
        wait = {role::REDUCER, channel, rank_of(p, node, p.local), waits::TAIL, advanced(seen, 1), seen};
    }

    /// Returns the credit for the slots that were read.
    DEV void close_rings() {
        ptx::bar_warp_sync();
        ROLLED for (u32 node = warp.lane; node < p.nodes; node += WARP) {
            if (cursors[node].issued > 0) release_slots(p, role::REDUCER, channel, node, cursors[node].issued);
        }
        ptx::bar_warp_sync();
    }
};

}  // namespace railhop
