// The plain copy by multiprocessors: what kernels that move rows are compared with.
#pragma once
#include "local.cuh"

namespace railhop {

/// Vectors that a thread loads before it stores the first.
constexpr u32 COPIED = 8;

/// Copies, a tile to a block in turn; of a tile, one vector in `threads` to a thread.
DEV void copy_bytes(const CopyParams& p) {
    const V4* from = at<V4>(p.from);
    V4* to = at<V4>(p.to);
    const u32 threads = ptx::ntid();
    const u64 vectors = p.bytes / sizeof(V4), tile = (u64)threads * COPIED;
    ROLLED for (u64 start = ptx::ctaid() * tile; start < vectors; start += ptx::nctaid() * tile) {
        const u64 first = start + ptx::tid();
        if (start + tile > vectors) {
            ROLLED for (u64 i = first; i < vectors; i += threads) to[i] = from[i];
            return;
        }
        V4 loaded[COPIED];
        for (u32 i = 0; i < COPIED; i++) loaded[i] = from[first + (u64)i * threads];
        for (u32 i = 0; i < COPIED; i++) to[first + (u64)i * threads] = loaded[i];
    }
}

}  // namespace railhop
