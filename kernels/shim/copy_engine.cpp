// The asynchronous side of bulk copies: pieces move late, in any order, and what orders them is made explicit.
#include <algorithm>
#include <cstring>

#include "world.hpp"

namespace railhop::shim {

static void wake_bulk_wait(Lane& lane) {
    if (lane.wait != Wait::Bulk || !groups_done(lane)) return;
    lane.wait = Wait::None;
    lane.warp->ready |= 1u << lane.index;
}

/// One turn of a block's copy engine.
void Shim::run_copies(Block& block) {
    auto& copies = block.copies;
    for (size_t i = 0; i < copies.size() && !failed;) {
        if (!move_piece(block, *copies[i])) {
            ++i;
            continue;
        }
        spare_copies.push_back(std::move(copies[i]));
        if (i + 1 < copies.size()) copies[i] = std::move(copies.back());
        copies.pop_back();
    }
}

/// Moves none, one or several pieces of a copy; whether that was the last of it.
bool Shim::move_piece(Block& block, BulkCopy& copy) {
    if (!calm() && random.enabled() && random.below(copy.patience) != 0) return false;
    do {
        u32 readable = copy.unread;
        u32 writable = copy.unwritten & ~copy.unread;
        u32 piece = random.bit(readable | writable);
        if (readable >> piece & 1)
            read_piece(block, copy, piece);
        else
            write_piece(block, copy, piece);
        progress = true;
    } while (copy.unwritten && random.one_in(4));
    return copy.unwritten == 0;
}

void Shim::read_piece(Block& block, BulkCopy& copy, u32 piece) {
    u32 offset = piece * copy.piece_bytes;
    u32 bytes = std::min(copy.piece_bytes, copy.bytes - offset);
    const u8* src = copy.src + offset;
    bool last = (copy.unread &= ~(1u << piece)) == 0;
    copy.issuer->warp->copy_reader.as([&] {
        copy.visible.acquire();
        agent_read(src, bytes);
        // Straight to whoever waits for the copy, not to its write side: that would order the reads of earlier copies
        // before the writes of later ones, which nothing does.
        if (copy.group) copy.group->read.release();
        if (copy.mbarrier) copy.mbarrier->complete[copy.mbarrier->phase].release();
        block.launch->stream_order->release();
        end.release();
    });
    std::memcpy(copy.buffer.data() + offset, src, bytes);
    if (copy.mbarrier) memories.find(src, bytes)->traffic[SHIM_BULK_READ] += bytes;
    if (last && copy.group) {
        --copy.group->unread;
        wake_bulk_wait(*copy.issuer);
    }
}

void Shim::write_piece(Block& block, BulkCopy& copy, u32 piece) {
    u32 offset = piece * copy.piece_bytes;
    u32 bytes = std::min(copy.piece_bytes, copy.bytes - offset);
    u8* dst = copy.dst + offset;
    Mbarrier* bar = copy.mbarrier;
    copy.issuer->warp->copy_writer.as([&] {
        copy.issued.acquire();
        agent_write(dst, bytes);
        block.async_writes.release();
        if (copy.group) copy.group->written.release();
        if (bar) bar->complete[bar->phase].release();
        block.launch->stream_order->release();
        end.release();
    });
    std::memcpy(dst, copy.buffer.data() + offset, bytes);
    copy.unwritten &= ~(1u << piece);
    if (copy.group) {
        memories.find(dst, bytes)->traffic[SHIM_BULK_WRITTEN] += bytes;
        if (copy.unwritten == 0) {
            --copy.group->incomplete;
            wake_bulk_wait(*copy.issuer);
        }
    } else {
        bar->transactions -= bytes;
        advance_phase(block, *bar);
    }
}

void Shim::end_of_block_copies(Block& block) {
    std::string where = "rank " + std::to_string(block.rank) + " block " + std::to_string(block.index) + " of kernel " +
                        block.launch->kernel->name + ": block ends with bulk copies in flight: ";
    for (auto& copy : block.copies)
        if (copy->mbarrier) return stop(where + "a copy to shared memory issued at " + place(copy->loc));
    for (auto& bar : block.mbarriers)
        if (bar->unobserved)
            return stop(where + "nobody waited for the copies issued up to " + place(bar->last_copy));
}

}  // namespace railhop::shim
