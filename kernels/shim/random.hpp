// The one source of random choices of a shim.
#pragma once
#include "lane_api.hpp"

namespace railhop::shim {

class Random {
public:
    /// Seed 0 chooses nothing: every draw below gives its first or never-taken outcome.
    explicit Random(u64 seed) : on(seed != 0), state(seed * 0x9E3779B97F4A7C15ull + 0x2545F4914F6CDD1Dull) {
        for (int i = 0; i < 8; ++i) next();
    }
    bool enabled() const { return on; }
    /// In 0..n.
    u32 below(u32 n) { return on && n > 1 ? (u32)((next() >> 32) * n >> 32) : 0; }
    bool one_in(u32 n) { return on && below(n) == 0; }
    /// Index of a random set bit of `mask`, which is not 0.
    u32 bit(u32 mask) {
        for (u32 skip = below((u32)__builtin_popcount(mask)); skip > 0; --skip) mask &= mask - 1;
        return (u32)__builtin_ctz(mask);
    }

private:
    u64 next() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return state;
    }
    bool on;
    u64 state;
};

}  // namespace railhop::shim
