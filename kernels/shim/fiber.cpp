#include "fiber.hpp"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

// Saves the callee-saved registers and the stack pointer, takes those of the other fiber. The floating-point control
// words are never changed here, so they need no saving.
extern "C" __attribute__((visibility("hidden"))) void railhop_shim_swap_stacks(void** save, void* load);
asm(R"(
    .text
    .hidden railhop_shim_swap_stacks
    .globl railhop_shim_swap_stacks
    .type railhop_shim_swap_stacks, @function
railhop_shim_swap_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size railhop_shim_swap_stacks, .-railhop_shim_swap_stacks
)");

namespace railhop::shim {

namespace {
constexpr u64 CANARY = 0x5AFE57ACCA9A12E5;
constexpr u32 SAVED_REGISTERS = 6;
}  // namespace

void Fiber::prepare(u8* stack, size_t bytes, void (*entry)()) {
    bottom = stack;
    size = bytes;
    fake_stack = nullptr;
    void** top = (void**)(stack + bytes);
    *--top = nullptr;  // a return address that is never used; keeps the alignment the ABI asks for at entry
    *--top = (void*)entry;
    top -= SAVED_REGISTERS;
    std::memset(top, 0, SAVED_REGISTERS * sizeof(void*));
    stack_pointer = top;
}

SHIM_NO_TSAN void Fiber::entered([[maybe_unused]] Fiber& from) {
#if SHIM_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.size);
#endif
}

SHIM_NO_TSAN void Fiber::swap(Fiber& from, Fiber& to) {
#if SHIM_ASAN
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
    railhop_shim_swap_stacks(&from.stack_pointer, to.stack_pointer);
#if SHIM_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack, &to.bottom, &to.size);
#endif
}

FiberStacks& FiberStacks::operator=(FiberStacks&& other) noexcept {
    std::swap(base, other.base);
    std::swap(stacks, other.stacks);
    return *this;
}

FiberStacks::~FiberStacks() {
    if (!base) return;
#if SHIM_ASAN
    // Whoever gets these addresses next must not find the redzones of frames that were never left.
    __asan_unpoison_memory_region(base, stacks * STACK_BYTES);
#endif
    munmap(base, stacks * STACK_BYTES);
}

void FiberStacks::map(u32 count) {
    size_t bytes = count * STACK_BYTES;
    void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) {
        std::perror("railhop shim: no memory for the stacks of a block");
        std::abort();
    }
    madvise(mapping, bytes, MADV_NOHUGEPAGE);  // a lane touches the top page or two of its stack
    base = (u8*)mapping;
    stacks = count;
#if SHIM_ASAN
    __asan_unpoison_memory_region(base, bytes);
#endif
}

void FiberStacks::arm(u32 i) { std::memcpy(stack(i), &CANARY, sizeof CANARY); }
bool FiberStacks::intact(u32 i) const { return std::memcmp(stack(i), &CANARY, sizeof CANARY) == 0; }

// ---- sanitizers

#if SHIM_TSAN
namespace {
thread_local int quiet_depth = 0;
}  // namespace

SHIM_NO_TSAN void ignore_accesses(bool on) {
    if (on) {
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    } else {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    }
}

SHIM_NO_TSAN Quiet::Quiet() {
    if (quiet_depth++ == 0) ignore_accesses(true);
}
SHIM_NO_TSAN Quiet::~Quiet() {
    if (--quiet_depth == 0) ignore_accesses(false);
}
SHIM_NO_TSAN int Quiet::exchange(int depth) {
    int before = quiet_depth;
    quiet_depth = depth;
    return before;
}
SHIM_NO_TSAN int Quiet::pause() {
    int depth = exchange(0);
    if (depth) ignore_accesses(false);
    return depth;
}
SHIM_NO_TSAN void Quiet::resume(int depth) {
    if (depth) ignore_accesses(true);
    exchange(depth);
}

void TsanFiber::create(const char* name) {
    handle = __tsan_create_fiber(0);
    __tsan_set_fiber_name(handle, name);
}
void TsanFiber::destroy() {
    if (handle) __tsan_destroy_fiber(handle);
    handle = nullptr;
}
#else
void TsanFiber::create(const char*) {}
void TsanFiber::destroy() {}
#endif

SHIM_NO_TSAN void agent_read([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#if SHIM_TSAN
    ignore_accesses(false);
    __tsan_read_range(const_cast<void*>(address), bytes);
    ignore_accesses(true);
#endif
}
SHIM_NO_TSAN void agent_write([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#if SHIM_TSAN
    ignore_accesses(false);
    __tsan_write_range(address, bytes);
    ignore_accesses(true);
#endif
}

// Instrumented, unlike the above: TSan is to take the atomic for an access of the fiber.
u64 agent_load_acquire(const u64* address) {
#if SHIM_TSAN
    ignore_accesses(false);
    u64 value = __atomic_load_n(address, __ATOMIC_ACQUIRE);
    ignore_accesses(true);
    return value;
#else
    return __atomic_load_n(address, __ATOMIC_ACQUIRE);
#endif
}
void agent_store_release(u64* address, u64 value) {
#if SHIM_TSAN
    ignore_accesses(false);
    __atomic_store_n(address, value, __ATOMIC_RELEASE);
    ignore_accesses(true);
#else
    __atomic_store_n(address, value, __ATOMIC_RELEASE);
#endif
}

}  // namespace railhop::shim
