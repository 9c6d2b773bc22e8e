// Which warps take which role: in proportion to the plan's exact counts, read when a kernel starts.
#pragma once
#include "base.cuh"

namespace railhop {

/// A warp's place among those of its role.
struct RoleShare {
    bool first_role;
    u32 index;
    u32 count;
};

/// Splits the grid's warps between two roles with `first` and `second` to do. Of two warps or more, a role with anything
/// to do has at least one; the first role has at most `first_streams`, for it can't use more.
DEV RoleShare split_warps(const Warp& warp, u64 first, u64 second, u32 first_streams) {
    u64 share = first == 0 ? 0 : second == 0 ? warp.count : first * warp.count / (first + second);
    if (first > 0 && share == 0) share = 1;
    if (second > 0 && share == warp.count) share = warp.count - 1;
    const u32 firsts = smaller((u32)share, first_streams);
    const bool is_first = warp.number < firsts;
    if (is_first) return {true, warp.number, firsts};
    return {false, warp.number - firsts, warp.count - firsts};
}

}  // namespace railhop
