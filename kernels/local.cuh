// What kernels without communication share: a warp's part of the rows, and how many loads a lane has in flight.
#pragma once
#include "base.cuh"
#include "numeric.cuh"

namespace railhop {

/// A warp of a grid that takes rows `number`, `number + count` and so on.
struct Share {
    u32 lane;
    u32 number;
    u32 count;

    DEV Share()
        : lane(ptx::tid() % WARP),
          number(ptx::ctaid() * (ptx::ntid() / WARP) + ptx::tid() / WARP),
          count(ptx::nctaid() * (ptx::ntid() / WARP)) {}
};

/// Loads that a lane issues before it uses the first.
constexpr u32 BATCH = 4;

/// What a warp does at a time of a row made of units, one unit a lane and load.
constexpr u32 BLOCK = BATCH * WARP;

/// Unit `i` of a lane in the block that starts at unit `block`.
DEV u32 unit_of(u32 block, u32 i, u32 lane) { return block + i * WARP + lane; }

}  // namespace railhop
