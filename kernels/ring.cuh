// The two ends of a ring; the rings themselves lie in the receiver's region, the sender writes to a mirror in its own
// memory. Ordering, half at each end. Sender: a slot of the mirror is written only after acquiring the head (the peer
// has read the slot's last content) and the completion (the NIC has read it). Receiver: slots below an acquired tail
// hold their data; the head is published after they have been read.
#pragma once
#include "queue.cuh"

namespace railhop {

/// The sending end of the ring to a node.
struct SendEnd {
    u64 tail;
    u64 head;
    u64 completed;

    DEV SendEnd(const Params& p, u32 channel, u32 node)
        : tail(index_in(p, *at<u64>(p.region + entry(p.sent_words, channel, node)))),
          head(load_index(p, p.region + entry(p.head_words, channel, node))),
          completed(load_index(p, p.chunk_completions + 8 * (channel * p.nodes + node))) {}

    DEV u32 room(const Params& p) const {
        const u64 used = since(tail, head), unread = since(tail, completed);
        return p.slots - (u32)(used < unread ? unread : used);
    }

    /// What one more slot takes.
    DEV Wait wait(const Params& p, u32 role, u32 channel, u32 node) const {
        const bool credit = since(tail, completed) <= since(tail, head);
        const u64 expected = since(advanced(tail, 1), p.slots);
        return {role, channel, rank_of(p, node, p.local), credit ? waits::HEAD : waits::COMPLETION, expected,
                credit ? head : completed};
    }
};

/// Slot `cursor` of the mirror of the ring to a node.
DEV u8* send_slot(const Params& p, u32 channel, u32 node, u32 cursor) {
    return at<u8>(entry(p.send_rings, channel, ring_of(p, node))) + (u64)(cursor & (p.slots - 1)) * p.slot_pitch;
}

/// Slot `cursor` of the ring from a node.
DEV const u8* recv_slot(const Params& p, u32 channel, u32 node, u32 cursor) {
    return at<u8>(p.region + entry(p.rings, channel, ring_of(p, node))) + (u64)(cursor & (p.slots - 1)) * p.slot_pitch;
}

/// Publishes `count` slots that are complete in memory, by one thread: one command for each contiguous piece.
DEV void publish_slots(const Params& p, u32 role, u32 channel, u32 node, u32 count) {
    u64& sent = *at<u64>(p.region + entry(p.sent_words, channel, node));
    u64 tail = index_in(p, sent);
    while (count > 0) {
        const u32 piece = smaller(count, p.slots - ((u32)tail & (p.slots - 1)));
        tail = advanced(tail, piece);
        push(p, role, {opcode::CHUNK, node, channel, piece, tail});
        count -= piece;
    }
    sent = word_of(p, tail);
}

/// The receiving end's cursor.
DEV u64 taken_index(const Params& p, u32 channel, u32 node) {
    return index_in(p, *at<u64>(p.region + entry(p.taken_words, channel, node)));
}

/// Returns the credit for `count` slots that have been read, by one thread.
DEV void release_slots(const Params& p, u32 role, u32 channel, u32 node, u32 count) {
    u64& taken = *at<u64>(p.region + entry(p.taken_words, channel, node));
    const u64 head = advanced(index_in(p, taken), count);
    push(p, role, {opcode::CREDIT, node, channel, 0, head});
    taken = word_of(p, head);
}

}  // namespace railhop
