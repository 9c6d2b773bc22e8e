// The only file that knows PTX: one instruction per function, named as the ISA names it. It is also the seam of the
// CPU shim, which implements the same functions (kernels/shim/ptx.hpp) so that the roles run unchanged on a CPU.
//
// Names: qualifiers that never vary here are left out (`.global`, `.shared::cta`); where one name would stand for
// several types, the type is an overload. Memory order and scope are always in the name. What has no function here
// (weak loads and stores, integer arithmetic) is plain C++.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

namespace railhop {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

#define DEV __device__ __forceinline__
/// Ahead of a loop that must not be unrolled: its body is large, and code that does not fit the cache is slow.
#define ROLLED _Pragma("unroll 1")

/// The unit of vector accesses: one 16-byte load or store.
struct alignas(16) V4 {
    u32 x, y, z, w;
};

namespace ptx {

// ---- special registers

DEV u32 tid() { return threadIdx.x; }
DEV u32 ntid() { return blockDim.x; }
DEV u32 ctaid() { return blockIdx.x; }
DEV u32 nctaid() { return gridDim.x; }
DEV u64 globaltimer() {
    u64 ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns)::"memory");
    return ns;
}
DEV void nanosleep(u32 ns) { asm volatile("nanosleep.u32 %0;" ::"r"(ns) : "memory"); }

/// The block's dynamic shared memory, aligned to 128 bytes.
DEV u8* dynamic_smem() {
    extern __shared__ __align__(128) u8 smem[];
    return smem;
}

// ---- strong accesses to global memory

DEV u64 ld_acquire_sys(const u64* p) {
    u64 v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
DEV u32 ld_acquire_gpu(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEV u32 ld_relaxed_sys(const u32* p) {
    u32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEV void st_release_sys(u64* p, u64 v) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
DEV void st_release_sys(u32* p, u32 v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEV void st_release_gpu(u64* p, u64 v) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
/// Two 8-byte stores, each whole; nothing is promised between the two.
DEV void st_relaxed_sys_v2(u64* p, u64 first, u64 second) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(p), "l"(first), "l"(second) : "memory");
}
DEV void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
DEV void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

/// The value before.
DEV u64 atom_add_relaxed_gpu(u64* p, u64 v) {
    u64 old;
    asm volatile("atom.add.relaxed.gpu.global.u64 %0, [%1], %2;" : "=l"(old) : "l"(p), "l"(v) : "memory");
    return old;
}
DEV u32 atom_add_acq_rel_gpu(u32* p, u32 v) {
    u32 old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}
DEV u32 atom_cas_relaxed_gpu(u32* p, u32 expected, u32 v) {
    u32 old;
    asm volatile("atom.cas.relaxed.gpu.global.b32 %0, [%1], %2, %3;" : "=r"(old) : "l"(p), "r"(expected), "r"(v) : "memory");
    return old;
}
DEV void red_add_relaxed_gpu(u32* p, u32 v) {
    asm volatile("red.add.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEV void red_min_relaxed_gpu(u64* p, u64 v) {
    asm volatile("red.min.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

// ---- warp and block

constexpr u32 ALL = 0xFFFFFFFFu;

DEV void bar_warp_sync(u32 mask = ALL) { asm volatile("bar.warp.sync %0;" ::"r"(mask) : "memory"); }
DEV void bar_sync(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
/// The value of lane `lane`. Orders no memory.
DEV u32 shfl_sync_idx(u32 mask, u32 v, u32 lane) {
    u32 r;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, %3;" : "=r"(r) : "r"(v), "r"(lane), "r"(mask));
    return r;
}
/// The value of the lane `delta` below, or its own where there is none.
DEV u32 shfl_sync_up(u32 mask, u32 v, u32 delta) {
    u32 r;
    asm volatile("shfl.sync.up.b32 %0, %1, %2, 0x0, %3;" : "=r"(r) : "r"(v), "r"(delta), "r"(mask));
    return r;
}
DEV u32 shfl_sync_bfly(u32 mask, u32 v, u32 lanes) {
    u32 r;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, %3;" : "=r"(r) : "r"(v), "r"(lanes), "r"(mask));
    return r;
}
DEV u32 vote_sync_ballot(u32 mask, bool v) {
    u32 r;
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.ballot.b32 %0, p, %2; }" : "=r"(r) : "r"((u32)v), "r"(mask));
    return r;
}
/// The lanes of `mask` that hold the same value.
DEV u32 match_any_sync(u32 mask, u32 v) {
    u32 r;
    asm volatile("match.any.sync.b32 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(mask));
    return r;
}
DEV u32 redux_sync_min(u32 mask, u32 v) {
    u32 r;
    asm volatile("redux.sync.min.u32 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(mask));
    return r;
}
DEV u32 redux_sync_max(u32 mask, u32 v) {
    u32 r;
    asm volatile("redux.sync.max.u32 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(mask));
    return r;
}
DEV u32 redux_sync_add(u32 mask, u32 v) {
    u32 r;
    asm volatile("redux.sync.add.u32 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(mask));
    return r;
}
DEV u32 redux_sync_or(u32 mask, u32 v) {
    u32 r;
    asm volatile("redux.sync.or.b32 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(mask));
    return r;
}

// ---- shared-memory barriers and bulk copies

DEV u32 cvta_to_shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEV void mbarrier_init(u64* bar, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(cvta_to_shared(bar)), "r"(arrivals) : "memory");
}
/// Makes initialised barriers visible to bulk copies.
DEV void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void mbarrier_arrive_expect_tx(u64* bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(cvta_to_shared(bar)), "r"(bytes) : "memory");
}
/// Whether the phase of this parity is complete. May suspend the thread for a time that the hardware bounds.
DEV bool mbarrier_try_wait_parity(u64* bar, u32 parity) {
    u32 done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(cvta_to_shared(bar)), "r"(parity)
        : "memory");
    return done != 0;
}
/// Global to shared; completes on `bar`.
DEV void cp_async_bulk_g2s(void* dst, const void* src, u32 bytes, u64* bar) {
    asm volatile("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(cvta_to_shared(dst)),
                 "l"(src), "r"(bytes), "r"(cvta_to_shared(bar))
                 : "memory");
}
/// Shared to global; part of the thread's open bulk group.
DEV void cp_async_bulk_s2g(void* dst, const void* src, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(cvta_to_shared(src)), "r"(bytes) : "memory");
}
DEV void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// All but the thread's latest N bulk groups have completed: their writes are visible to the thread.
template <int N>
DEV void cp_async_bulk_wait_group() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
/// All but the thread's latest N bulk groups have read their sources.
template <int N>
DEV void cp_async_bulk_wait_group_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
/// Orders accesses of the generic proxy and of the async proxy, in which bulk copies run.
DEV void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// ---- arithmetic, each rounded on its own: nothing is ever fused

DEV float add_rn(float a, float b) {
    float r;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
DEV float mul_rn(float a, float b) {
    float r;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
DEV float div_rn(float a, float b) {
    float r;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
/// Two BF16 elements, `low` in the lower half: nearest even; NaN gives 0x7FFF.
DEV u32 cvt_rn_bf16x2(float high, float low) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
/// Two E4M3 codes, `low` in the lower byte: nearest even, saturating at ±448; NaN gives 0x7F.
DEV u16 cvt_rn_satfinite_e4m3x2(float high, float low) {
    u16 r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
    return r;
}
DEV float mov_f32(u32 bits) { return __uint_as_float(bits); }
DEV u32 mov_b32(float v) { return __float_as_uint(v); }
DEV u32 popc(u64 v) { return (u32)__popcll((i64)v); }
/// Index of the lowest set bit; `v` is not 0.
DEV u32 ctz(u32 v) { return (u32)__ffs((i32)v) - 1; }

}  // namespace ptx
}  // namespace railhop

/// An entry point with its parameters: at most 16 warps, so at most 128 registers a thread.
#define KERNEL(name, Params) extern "C" __global__ void __launch_bounds__(512, 1) name(const __grid_constant__ railhop::Params p)

#else
#include "shim/ptx.hpp"
#endif
