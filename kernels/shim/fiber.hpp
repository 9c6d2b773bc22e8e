// Stacks and the switch between them.
#pragma once
#include <cstddef>

#include "lane_api.hpp"
#include "sanitizer.hpp"

namespace railhop::shim {

/// The saved half of a switch.
struct Fiber {
    void* stack_pointer = nullptr;
    const void* bottom = nullptr;
    size_t size = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's

    /// Makes the next switch to this fiber enter `entry`, which never returns.
    void prepare(u8* stack, size_t bytes, void (*entry)());
    /// To be called first on a fiber that has just been entered; `from` is the one that switched to it.
    static void entered(Fiber& from);
    /// Saves the running fiber in `from` and goes on in `to`.
    static void swap(Fiber& from, Fiber& to);
};

/// The stacks of a block's lanes, in one mapping.
class FiberStacks {
public:
    static constexpr size_t STACK_BYTES = SHIM_ASAN ? 256 << 10 : SHIM_TSAN ? 128 << 10 : 64 << 10;

    FiberStacks() = default;
    FiberStacks(FiberStacks&& other) noexcept { *this = static_cast<FiberStacks&&>(other); }
    FiberStacks& operator=(FiberStacks&& other) noexcept;
    ~FiberStacks();

    void map(u32 stacks);
    u32 count() const { return stacks; }
    u8* stack(u32 i) const { return base + i * STACK_BYTES; }
    void arm(u32 i);
    /// Whether stack `i` never reached its lowest word since it was armed.
    bool intact(u32 i) const;

private:
    u8* base = nullptr;
    u32 stacks = 0;
};

}  // namespace railhop::shim
