// Commands to the proxy, which does on the rail what a kernel can't. The ordering argument's half at this end: a
// command is stored after a system-scope release of all that happened before, and its place is reused only after the
// proxy's index, acquired, says that it has been read. The other half stands in src/wire/command.rs.
#pragma once
#include "wait.cuh"

namespace railhop {

struct Command {
    u32 opcode;
    u32 node;
    u32 channel;
    u32 count;
    u64 index;
};

/// Pushes a command, by one thread. Does nothing once the rank is stopped. It may wait for room: the proxy, which
/// waits for no kernel, makes it, so no ring's progress depends on another's here.
DEV void push(const Params& p, u32 role, const Command& c) {
    using namespace command;
    const u64 place = ptx::atom_add_relaxed_gpu(&at<RankState>(p.rank_state)->commands, 1);
    Patience patience;
    for (u64 taken; place - (taken = ptx::ld_acquire_sys(at<u64>(p.taken))) >= p.queue_capacity;) {
        const u64 expected = place + 1 - p.queue_capacity;
        if (!patience.rest(p, {role, c.channel, own_rank(p), waits::COMMANDS, expected, taken})) return;
    }
    // Lap 0 has phase 1: zeroed memory holds no command.
    const u64 phase = (u64)((place & p.queue_capacity) == 0) << PHASE_BIT;
    const u64 first = (u64)c.opcode << OPCODE | (u64)p.lane << LANE | (u64)c.node << NODE | (u64)c.channel << CHANNEL |
                      (u64)c.count << COUNT | (u64)(p.slot_pitch / PITCH_UNIT) << PITCH;
    ptx::fence_acq_rel_sys();
    ptx::st_relaxed_sys_v2(at<u64>(p.queue) + 2 * (place & (p.queue_capacity - 1)), phase | first, phase | c.index);
}

}  // namespace railhop
