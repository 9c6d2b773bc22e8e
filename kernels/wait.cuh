// Every wait has an end: the deadline, or somebody else's fault. The first warp of a rank that runs out of time leaves
// a record of what it waited for; all roles of the rank then return, with nothing of theirs under way.
#pragma once
#include "base.cuh"

namespace railhop {

/// What a step of a role came to.
enum class Step : u32 {
    /// Something moved; there may be more.
    Moved,
    /// Nothing could move.
    Blocked,
    /// There is nothing left to do.
    Done,
};

/// One wait of one role: what it needs, from whom, and how far that is.
struct Wait {
    u32 role;
    u32 channel;
    u32 peer;
    u32 what;
    u64 expected;
    u64 seen;
};

/// Whether the rank's operations are to end. The own flag is cheap; the host's lies across PCIe, so only warps that
/// have nothing to do look at it.
DEV bool is_stopped(const Params& p) {
    return ptx::ld_acquire_gpu(&at<RankState>(p.rank_state)->faulted) != 0 || ptx::ld_relaxed_sys(at<u32>(p.abort)) != 0;
}

/// The same for a warp whose lanes must agree.
DEV bool is_stopped_together(const Params& p, u32 lane) {
    u32 stopped = 0;
    if (lane == 0) stopped = is_stopped(p);
    return ptx::shfl_sync_idx(ptx::ALL, stopped, 0) != 0;
}

/// Stops the rank. The first fault stays.
DEV void report_fault(const Params& p, const Wait& wait) {
    if (ptx::atom_cas_relaxed_gpu(&at<RankState>(p.rank_state)->faulted, 0, 1) != 0) return;
    FaultRecord& record = *at<FaultRecord>(p.fault);
    record.lane = p.lane;
    record.kind = p.kind;
    record.role = wait.role;
    record.channel = wait.channel;
    record.peer = wait.peer;
    record.what = wait.what;
    record.epoch = at<LaneState>(p.lane_state)->turn;
    record.expected = wait.expected;
    record.seen = wait.seen;
    ptx::st_release_sys(&record.written, 1);
}

/// How long nothing has moved.
class Patience {
    static constexpr u32 SHORTEST_NS = 32;
    static constexpr u32 LONGEST_NS = 1024;
    u64 moved_at = ptx::globaltimer();
    u32 pause = SHORTEST_NS;

public:
    DEV void moved() {
        moved_at = ptx::globaltimer();
        pause = SHORTEST_NS;
    }

    /// For one thread that found nothing to do: rests, or says that it must return.
    DEV bool rest(const Params& p, const Wait& wait) {
        if (is_stopped(p)) return false;
        if (ptx::globaltimer() - moved_at > p.deadline_ns) {
            report_fault(p, wait);
            return false;
        }
        ptx::nanosleep(pause);
        pause = smaller(2 * pause, LONGEST_NS);
        return true;
    }

    /// For a whole warp; the wait of lane 0 counts.
    DEV bool rest_together(const Params& p, const Wait& wait, u32 lane) {
        u32 go_on = 1;
        if (lane == 0) go_on = rest(p, wait);
        return ptx::shfl_sync_idx(ptx::ALL, go_on, 0) != 0;
    }
};

}  // namespace railhop
