// The sender of dispatch: hop 1 (D1).
//
// A warp serves whole channels. In a step it walks a channel's tokens: each is read once and written to the mirror of
// every remote ring that wants it and has room. A node without room falls behind and catches up later, at the price of
// another read of the token; it holds up no other.
#pragma once
#include "move.cuh"
#include "ring.cuh"

namespace railhop {

DEV const u32* header_of(const Params& p, u32 token) { return at<u32>(p.headers) + (u64)token * p.header_words; }

/// The node of entry `lane` of a header, `NONE` where the entry is masked or there is none.
DEV u32 node_of_entry(const Params& p, const u32* header, u32 lane) {
    if (lane >= p.topk) return NONE;
    const i32 expert = (i32)header[p.header_experts + lane];
    return expert < 0 ? NONE : at<ExpertPlace>(p.placement)[expert].node;
}

/// A step's tokens that come from the own input, as a mover asks for them.
struct OwnTokens {
    const Params& p;
    const Warp& warp;
    Chosen* chosen;

    DEV OwnTokens(const Params& params, const Warp& w)
        : p(params), warp(w), chosen(reinterpret_cast<Chosen*>(w.shared + p.warp.chosen)) {}

    DEV bool encoded() const { return false; }
    DEV const u8* source(u32 i) const { return at<u8>(p.x) + (u64)chosen[i].token * p.input_bytes; }
    DEV void scales(u32 i, u8* row) const { gather_scales(p, warp.lane, chosen[i].token, row); }
};

class Sender : public OwnTokens {
    Pipe& pipe;
    NodeCursor* cursors;
    u32 channel = 0;

public:
    DEV Sender(const Params& params, const Warp& w, Pipe& stages)
        : OwnTokens(params, w), pipe(stages), cursors(reinterpret_cast<NodeCursor*>(w.shared + p.warp.cursors)) {}

    /// Sends at most a chunk to each node; what happened, for all lanes.
    DEV Step step(u32 channel_number, Wait& wait) {
        channel = channel_number;
        const TokenRange range = TokenRange::of_channel(p, channel);
        open_rings(range);
        const u32 count = choose(range);
        Mover<Sender>(p, warp, pipe, *this, role::SENDER).run(count);
        return close_rings(range, count, wait);
    }

    /// The header goes to every target; it lies in the plan as it lies in slots.
    DEV Target begin(u32 i) {
        const Chosen token = chosen[i];
        const u32* header = header_of(p, token.token);
        u8* slot = nullptr;
        if (token.entries >> warp.lane & 1) {
            const u32 node = node_of_entry(p, header, warp.lane);
            NodeCursor& cursor = cursors[node];
            slot = send_slot(p, channel, node, cursor.cursor + cursor.issued++);
        }
        const u32 pieces = p.header_words / 4;
        V4 piece{0, 0, 0, 0};
        if (warp.lane < pieces) piece = reinterpret_cast<const V4*>(header)[warp.lane];
        for (u32 targets = token.entries; targets != 0; targets &= targets - 1) {
            V4* to = at<V4>(broadcast((u64)slot, ptx::ctz(targets)));
            if (warp.lane < pieces) to[warp.lane] = piece;
        }
        if (slot == nullptr) return {nullptr, nullptr};
        return {slot + p.slot_row, slot + p.slot_scales};
    }

private:
    DEV u32& progress(u32 node) const { return at<u32>(p.outgoing)[channel * p.nodes + node]; }

    /// A node takes part while its pair is open and it has not seen all of the channel.
    DEV void open_rings(const TokenRange& range) {
        ROLLED for (u32 node = warp.lane; node < p.nodes; node += WARP) {
            NodeCursor& cursor = cursors[node];
            cursor = NodeCursor{0, 0, 0, 0, progress(node), 0};
            if (node == p.node || at<u32>(p.open)[node] == 0) cursor.position = range.count;
            if (cursor.position == range.count) continue;
            const SendEnd end(p, channel, node);
            cursor.cursor = (u32)end.tail;
            cursor.room = end.room(p);
        }
        ptx::bar_warp_sync();
    }

    DEV static bool has_room(const NodeCursor& cursor) { return cursor.chosen < cursor.room; }

    /// The earliest token that some node with room has not seen, `NONE` if there is none.
    DEV u32 earliest(const TokenRange& range) const {
        u32 position = NONE;
        ROLLED for (u32 node = warp.lane; node < p.nodes; node += WARP) {
            const NodeCursor& cursor = cursors[node];
            if (has_room(cursor) && cursor.position < range.count) position = smaller(position, cursor.position);
        }
        return ptx::redux_sync_min(ptx::ALL, position);
    }

    /// Chooses the step's tokens, and for each the nodes it goes to now.
    DEV u32 choose(const TokenRange& range) {
        u32 count = 0;
        ROLLED while (count < STEP_TOKENS) {
            const u32 position = earliest(range);
            if (position == NONE) break;
            const u32 token = range.first + position;
            const u32 node = node_of_entry(p, header_of(p, token), warp.lane);
            const bool leads = ptx::ctz(ptx::match_any_sync(ptx::ALL, node)) == warp.lane && node != NONE;
            const bool goes = leads && has_room(cursors[node]) && cursors[node].position == position;
            // The step ends with the first full chunk: a node whose ring has room does not fall behind.
            if (ptx::vote_sync_ballot(ptx::ALL, goes && cursors[node].chosen == p.chunk) != 0) break;
            const u32 entries = ptx::vote_sync_ballot(ptx::ALL, goes);
            pass(position);
            if (goes) cursors[node].chosen++;
            ptx::bar_warp_sync();
            if (entries == 0) continue;
            if (warp.lane == 0) chosen[count] = {token, entries};
            count++;
        }
        ptx::bar_warp_sync();
        return count;
    }

    /// All nodes with room are past the token at `position`, whether they want it or not.
    DEV void pass(u32 position) {
        ptx::bar_warp_sync();
        ROLLED for (u32 node = warp.lane; node < p.nodes; node += WARP) {
            NodeCursor& cursor = cursors[node];
            if (has_room(cursor) && cursor.position == position) cursor.position++;
        }
        ptx::bar_warp_sync();
    }

    /// Publishes what is complete, keeps the progress, and says what is missing.
    DEV Step close_rings(const TokenRange& range, u32 count, Wait& wait) {
        u32 blocked = NONE;
        ROLLED for (u32 node = warp.lane; node < p.nodes; node += WARP) {
            const NodeCursor& cursor = cursors[node];
            progress(node) = cursor.position;
            if (cursor.issued > 0) publish_slots(p, role::SENDER, channel, node, cursor.issued);
            if (cursor.position < range.count) blocked = node;
        }
        ptx::bar_warp_sync();
        blocked = ptx::redux_sync_min(ptx::ALL, blocked);
        if (blocked == NONE) return Step::Done;
        if (count > 0) return Step::Moved;
        wait = SendEnd(p, channel, blocked).wait(p, role::SENDER, channel, blocked);
        return Step::Blocked;
    }
};

}  // namespace railhop
