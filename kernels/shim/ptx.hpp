// The seam of ptx.cuh on a CPU: the same functions, for kernels that run as lanes of the shim. Every function here is
// thin; lane_api.hpp declares what it stands on.
#pragma once
#include <bit>
#include <cmath>
#include <cstring>

#include "lane_api.hpp"

#define DEV inline
#define ROLLED

namespace railhop {
namespace ptx {

using shim::Loc;

// ---- special registers

DEV u32 tid() { return shim::thread_index(); }
DEV u32 ntid() { return shim::thread_count(); }
DEV u32 ctaid() { return shim::block_index(); }
DEV u32 nctaid() { return shim::block_count(); }
DEV u64 globaltimer(Loc loc = Loc::current()) { return shim::virtual_time(loc); }
DEV void nanosleep(u32 ns, Loc loc = Loc::current()) { shim::sleep(ns, loc); }
DEV u8* dynamic_smem() { return shim::shared_memory(); }

// ---- strong accesses to global memory

namespace detail {

template <typename T>
DEV T load(const T* p, int order, shim::Scope scope, Loc loc) {
    shim::before_strong(p, sizeof(T), scope, loc);
    T v = order == __ATOMIC_ACQUIRE ? __atomic_load_n(p, __ATOMIC_ACQUIRE) : __atomic_load_n(p, __ATOMIC_RELAXED);
    shim::after_load(p, v, order == __ATOMIC_RELAXED, loc);
    return v;
}

template <typename T>
DEV void store(T* p, T v, bool release, shim::Scope scope, Loc loc) {
    shim::before_strong(p, sizeof(T), scope, loc);
    T before = __atomic_load_n(p, __ATOMIC_RELAXED);
    if (release || shim::releases(scope))
        __atomic_store_n(p, v, __ATOMIC_RELEASE);
    else
        __atomic_store_n(p, v, __ATOMIC_RELAXED);
    shim::after_store(p, before, v, loc);
}

/// One read-modify-write: `change` gives the new value from the old one.
template <typename T, typename Change>
DEV T modify(T* p, bool acq_rel, shim::Scope scope, Loc loc, Change change) {
    shim::before_strong(p, sizeof(T), scope, loc);
    bool release = acq_rel || shim::releases(scope);
    T before = __atomic_load_n(p, __ATOMIC_RELAXED);
    T after = change(before);
    // Lanes of a shim never run at the same time: the exchange can't fail.
    if (acq_rel)
        __atomic_compare_exchange_n(p, &before, after, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    else if (release)
        __atomic_compare_exchange_n(p, &before, after, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
    else
        __atomic_compare_exchange_n(p, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    shim::after_atomic(p, before, after, !acq_rel, loc);
    return before;
}

}  // namespace detail

DEV u64 ld_acquire_sys(const u64* p, Loc loc = Loc::current()) {
    return detail::load(p, __ATOMIC_ACQUIRE, shim::Scope::Sys, loc);
}
DEV u32 ld_acquire_gpu(const u32* p, Loc loc = Loc::current()) {
    return detail::load(p, __ATOMIC_ACQUIRE, shim::Scope::Gpu, loc);
}
DEV u32 ld_relaxed_sys(const u32* p, Loc loc = Loc::current()) {
    return detail::load(p, __ATOMIC_RELAXED, shim::Scope::Sys, loc);
}
DEV void st_release_sys(u64* p, u64 v, Loc loc = Loc::current()) {
    detail::store(p, v, true, shim::Scope::Sys, loc);
}
DEV void st_release_sys(u32* p, u32 v, Loc loc = Loc::current()) {
    detail::store(p, v, true, shim::Scope::Sys, loc);
}
DEV void st_release_gpu(u64* p, u64 v, Loc loc = Loc::current()) {
    detail::store(p, v, true, shim::Scope::Gpu, loc);
}
/// Two 8-byte stores, each whole; nothing is promised between the two.
DEV void st_relaxed_sys_v2(u64* p, u64 first, u64 second, Loc loc = Loc::current()) {
    shim::before_strong(p, 16, shim::Scope::Sys, loc);
    u32 swapped = shim::coin();
    u64 values[2] = {first, second};
    detail::store(p + swapped, values[swapped], false, shim::Scope::Sys, loc);
    shim::preemption_point(loc);
    detail::store(p + (1 - swapped), values[1 - swapped], false, shim::Scope::Sys, loc);
}
DEV void fence_acq_rel_sys() { shim::fence(shim::Scope::Sys); }
DEV void fence_acq_rel_gpu() { shim::fence(shim::Scope::Gpu); }

/// The value before.
DEV u64 atom_add_relaxed_gpu(u64* p, u64 v, Loc loc = Loc::current()) {
    return detail::modify(p, false, shim::Scope::Gpu, loc, [v](u64 old) { return old + v; });
}
DEV u32 atom_add_acq_rel_gpu(u32* p, u32 v, Loc loc = Loc::current()) {
    return detail::modify(p, true, shim::Scope::Gpu, loc, [v](u32 old) { return old + v; });
}
DEV u32 atom_cas_relaxed_gpu(u32* p, u32 expected, u32 v, Loc loc = Loc::current()) {
    return detail::modify(p, false, shim::Scope::Gpu, loc, [=](u32 old) { return old == expected ? v : old; });
}
DEV void red_add_relaxed_gpu(u32* p, u32 v, Loc loc = Loc::current()) {
    detail::modify(p, false, shim::Scope::Gpu, loc, [v](u32 old) { return old + v; });
}
DEV void red_min_relaxed_gpu(u64* p, u64 v, Loc loc = Loc::current()) {
    detail::modify(p, false, shim::Scope::Gpu, loc, [v](u64 old) { return v < old ? v : old; });
}

// ---- warp and block

constexpr u32 ALL = 0xFFFFFFFFu;

DEV void bar_warp_sync(u32 mask = ALL, Loc loc = Loc::current()) {
    shim::collective(shim::Op::BarWarp, mask, 0, 0, loc);
}
DEV void bar_sync(u32 id, u32 threads, Loc loc = Loc::current()) { shim::block_barrier(id, threads, loc); }
/// The value of lane `lane`. Orders no memory.
DEV u32 shfl_sync_idx(u32 mask, u32 v, u32 lane, Loc loc = Loc::current()) {
    return shim::collective(shim::Op::ShflIdx, mask, v, lane, loc);
}
/// The value of the lane `delta` below, or its own where there is none.
DEV u32 shfl_sync_up(u32 mask, u32 v, u32 delta, Loc loc = Loc::current()) {
    return shim::collective(shim::Op::ShflUp, mask, v, delta, loc);
}
DEV u32 shfl_sync_bfly(u32 mask, u32 v, u32 lanes, Loc loc = Loc::current()) {
    return shim::collective(shim::Op::ShflBfly, mask, v, lanes, loc);
}
DEV u32 vote_sync_ballot(u32 mask, bool v, Loc loc = Loc::current()) {
    return shim::collective(shim::Op::Ballot, mask, v, 0, loc);
}
/// The lanes of `mask` that hold the same value.
DEV u32 match_any_sync(u32 mask, u32 v, Loc loc = Loc::current()) {
    return shim::collective(shim::Op::MatchAny, mask, v, 0, loc);
}
DEV u32 redux_sync_min(u32 mask, u32 v, Loc loc = Loc::current()) {
    return shim::collective(shim::Op::ReduxMin, mask, v, 0, loc);
}
DEV u32 redux_sync_max(u32 mask, u32 v, Loc loc = Loc::current()) {
    return shim::collective(shim::Op::ReduxMax, mask, v, 0, loc);
}
DEV u32 redux_sync_add(u32 mask, u32 v, Loc loc = Loc::current()) {
    return shim::collective(shim::Op::ReduxAdd, mask, v, 0, loc);
}
DEV u32 redux_sync_or(u32 mask, u32 v, Loc loc = Loc::current()) {
    return shim::collective(shim::Op::ReduxOr, mask, v, 0, loc);
}

// ---- shared-memory barriers and bulk copies

/// Here: the offset in the block's dynamic shared memory.
DEV u32 cvta_to_shared(const void* p, Loc loc = Loc::current()) { return shim::shared_offset(p, loc); }

namespace detail {
/// An atomic look at the barrier's bytes: with TSan, a race with an initialisation that isn't ordered before.
DEV void look(const u64* bar) { (void)__atomic_load_n(bar, __ATOMIC_RELAXED); }
}  // namespace detail

DEV void mbarrier_init(u64* bar, u32 arrivals, Loc loc = Loc::current()) {
    shim::mbarrier_init(bar, arrivals, loc);
    *bar = shim::MBARRIER_COOKIE;
}
/// Makes initialised barriers visible to bulk copies.
DEV void fence_mbarrier_init() { shim::mbarrier_fence_init(); }
DEV void mbarrier_arrive_expect_tx(u64* bar, u32 bytes, Loc loc = Loc::current()) {
    shim::mbarrier_arrive_expect_tx(bar, bytes, loc);
    detail::look(bar);
}
/// Whether the phase of this parity is complete. May suspend the thread for a time that the hardware bounds.
DEV bool mbarrier_try_wait_parity(u64* bar, u32 parity, Loc loc = Loc::current()) {
    bool complete = shim::mbarrier_try_wait(bar, parity, loc);
    detail::look(bar);
    return complete;
}
/// Global to shared; completes on `bar`.
DEV void cp_async_bulk_g2s(void* dst, const void* src, u32 bytes, u64* bar, Loc loc = Loc::current()) {
    shim::bulk_g2s(dst, src, bytes, bar, loc);
    detail::look(bar);
}
/// Shared to global; part of the thread's open bulk group.
DEV void cp_async_bulk_s2g(void* dst, const void* src, u32 bytes, Loc loc = Loc::current()) {
    shim::bulk_s2g(dst, src, bytes, loc);
}
DEV void cp_async_bulk_commit_group(Loc loc = Loc::current()) { shim::bulk_commit(loc); }
/// All but the thread's latest N bulk groups have completed: their writes are visible to the thread.
template <int N>
DEV void cp_async_bulk_wait_group(Loc loc = Loc::current()) {
    shim::bulk_wait(N, false, loc);
}
/// All but the thread's latest N bulk groups have read their sources.
template <int N>
DEV void cp_async_bulk_wait_group_read(Loc loc = Loc::current()) {
    shim::bulk_wait(N, true, loc);
}
/// Orders accesses of the generic proxy and of the async proxy, in which bulk copies run.
DEV void fence_proxy_async() { shim::fence_proxy_async(); }

// ---- arithmetic, each rounded on its own: the build turns contraction off

DEV float mov_f32(u32 bits) { return std::bit_cast<float>(bits); }
DEV u32 mov_b32(float v) { return std::bit_cast<u32>(v); }
DEV float add_rn(float a, float b) { return a + b; }
DEV float mul_rn(float a, float b) { return a * b; }
DEV float div_rn(float a, float b) { return a / b; }
namespace detail {
DEV u32 cvt_bf16(float v) {
    u32 bits = mov_b32(v);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

DEV u8 cvt_e4m3(float v) {
    u32 bits = mov_b32(v);
    u32 sign = (bits >> 24) & 0x80;
    u32 magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return 0x7F;
    if (magnitude >= 0x43E00000) return (u8)(sign | 0x7E);  // at least 448
    // Below 2^-6 codes are multiples of 2^-9, which is the unit of floats around 2^14: the sum rounds to one.
    if (magnitude < 0x3C800000) return (u8)(sign | (mov_b32(mov_f32(magnitude) + 16384.0f) & 0xF));
    u32 rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1);
    return (u8)(sign | ((rounded - 0x3C000000) >> 20));
}
}  // namespace detail

/// Two BF16 elements, `low` in the lower half: nearest even; NaN gives 0x7FFF.
DEV u32 cvt_rn_bf16x2(float high, float low) { return detail::cvt_bf16(high) << 16 | detail::cvt_bf16(low); }
/// Two E4M3 codes, `low` in the lower byte: nearest even, saturating at ±448; NaN gives 0x7F.
DEV u16 cvt_rn_satfinite_e4m3x2(float high, float low) {
    return (u16)(detail::cvt_e4m3(high) << 8 | detail::cvt_e4m3(low));
}
DEV u32 popc(u64 v) { return (u32)std::popcount(v); }
/// Index of the lowest set bit; `v` is not 0.
DEV u32 ctz(u32 v) { return (u32)std::countr_zero(v); }

}  // namespace ptx
}  // namespace railhop

/// An entry point with its parameters, registered under its name.
#define KERNEL(name, Params)                                                                                \
    static void name(const railhop::Params& p);                                                             \
    static const railhop::shim::Kernel name##_kernel{                                                       \
        #name, sizeof(railhop::Params),                                                                     \
        [](const void* params) { name(*static_cast<const railhop::Params*>(params)); }};                   \
    static void name(const railhop::Params& p)
