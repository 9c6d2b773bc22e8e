// A warp's stages in shared memory: bulk copies bring rows there and take them on, several under way at a time.
#pragma once
#include "wait.cuh"

namespace railhop {

/// The stages. Loads complete on a barrier each; the n-th load uses stage n modulo their number. All lanes call
/// everything; lane 0 issues.
class Pipe {
    const Params& p;
    u32 lane;
    u8* stages;
    u64* barriers;
    u32 loaded = 0;
    u32 taken = 0;

    DEV u32 mask() const { return (1u << p.warp.stages_log2) - 1; }

public:
    DEV Pipe(const Params& params, const Warp& warp)
        : p(params),
          lane(warp.lane),
          stages(warp.shared + p.warp.stages),
          barriers(reinterpret_cast<u64*>(warp.shared + p.warp.barriers)) {
        if (lane <= mask()) ptx::mbarrier_init(barriers + lane, 1);
        ptx::fence_mbarrier_init();
        ptx::fence_proxy_async();
        ptx::bar_warp_sync();
    }

    /// How many loads may be under way.
    DEV u32 depth() const { return mask() + 1; }

    /// Starts to bring `bytes` to the next stage. All lanes are done with its last content, and are together.
    DEV void load(const void* source, u32 bytes) {
        const u32 stage = loaded++ & mask();
        if (lane == 0) {
            ptx::mbarrier_arrive_expect_tx(barriers + stage, bytes);
            ptx::cp_async_bulk_g2s(stages + stage * p.warp.stage_bytes, source, bytes, barriers + stage);
        }
    }

    /// The content of the next stage, once it is there. The wait ends, for the copy is this warp's own and the
    /// hardware completes it; should it not, the fault is reported, but leaving would free memory that is being written.
    DEV u8* take(u32 role) {
        const u32 stage = taken & mask(), parity = taken >> p.warp.stages_log2 & 1;
        Patience patience;
        while (!ptx::mbarrier_try_wait_parity(barriers + stage, parity)) {
            patience.rest(p, {role, NONE, own_rank(p), waits::COPY, taken, taken});
        }
        taken++;
        return stages + stage * p.warp.stage_bytes;
    }
};

}  // namespace railhop
