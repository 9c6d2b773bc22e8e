// What a lane may ask of the shim: the functions behind ptx.hpp. Nothing of the shim's own state is visible here, so
// that kernels compile against as little as possible.
#pragma once
#include <source_location>

namespace railhop {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

/// The unit of vector accesses: one 16-byte load or store.
struct alignas(16) V4 {
    u32 x, y, z, w;
};

namespace shim {

using Loc = std::source_location;

enum class Scope : u8 { Gpu, Sys };
enum class Op : u8 {
    BarWarp, ShflIdx, ShflUp, ShflBfly, Ballot, MatchAny, ReduxMin, ReduxMax, ReduxAdd, ReduxOr,
};

// ---- special registers
u32 thread_index();
u32 thread_count();
u32 block_index();
u32 block_count();
u64 virtual_time(Loc loc);
void sleep(u32 ns, Loc loc);
u8* shared_memory();
u32 shared_offset(const void* p, Loc loc);

// ---- strong accesses: checks before, bookkeeping after; the access itself is an atomic of the kernel's own code
/// Checks the access, and may let others run first.
void before_strong(const void* p, u32 bytes, Scope scope, Loc loc);
/// Lets others run when this lane only sees again what it has seen before.
void after_load(const void* p, u64 value, bool relaxed, Loc loc);
/// `before` and `after` are the values around a store or read-modify-write.
void after_store(const void* p, u64 before, u64 after, Loc loc);
void after_atomic(const void* p, u64 before, u64 after, bool relaxed, Loc loc);
/// Lets others run, sometimes.
void preemption_point(Loc loc);
/// One random bit.
bool coin();
void fence(Scope scope);
/// Whether a relaxed store of this scope publishes what came before the lane's last fence.
bool releases(Scope scope);

// ---- warp and block
u32 collective(Op op, u32 mask, u32 value, u32 operand, Loc loc);
void block_barrier(u32 id, u32 threads, Loc loc);

// ---- shared-memory barriers and bulk copies
/// What the 8 bytes of an initialised barrier hold; its state is the shim's own.
constexpr u64 MBARRIER_COOKIE = 0x4D42415252494552;
void mbarrier_init(u64* bar, u32 arrivals, Loc loc);
void mbarrier_fence_init();
void mbarrier_arrive_expect_tx(u64* bar, u32 bytes, Loc loc);
bool mbarrier_try_wait(u64* bar, u32 parity, Loc loc);
void bulk_g2s(void* dst, const void* src, u32 bytes, u64* bar, Loc loc);
void bulk_s2g(void* dst, const void* src, u32 bytes, Loc loc);
void bulk_commit(Loc loc);
void bulk_wait(u32 latest, bool read, Loc loc);
void fence_proxy_async();

// ---- kernels
/// A kernel as KERNEL registers it. The list is complete once the library is loaded and never changes afterwards.
struct Kernel {
    const char* name;
    u64 params_bytes;
    void (*body)(const void* params);
    const Kernel* next;

    Kernel(const char* name, u64 params_bytes, void (*body)(const void*));
    static const Kernel* find(const char* name);
};

}  // namespace shim
}  // namespace railhop
