// The memories that a shim knows, and who may touch them.
#pragma once
#include <atomic>
#include <mutex>
#include <vector>

#include "lane_api.hpp"

namespace railhop::shim {

struct Memory {
    u32 id;
    u32 rank;
    bool shared;
    const u8* base;
    u64 bytes;
    u64 traffic[4] = {};  // by ShimTraffic

    bool contains(const void* p, u64 n) const {
        u64 offset = (u64)((const u8*)p - base);
        return (const u8*)p >= base && offset <= bytes && n <= bytes - offset;
    }
};

class Memories {
public:
    /// May be called by any thread, while others find: whoever has been told of the memory finds it.
    u32 add(u32 rank, const void* base, u64 bytes, bool shared);
    /// As `add`: whoever has been told that the memory is gone finds it no more.
    void forget(u32 id);
    /// The one memory that holds all `bytes` at `p`, or null.
    Memory* find(const void* p, u64 bytes);
    Memory* get(u32 id);

private:
    void adopt();

    std::mutex mutex;
    std::vector<Memory> added;   // not in `by_base` yet
    std::vector<u32> forgotten;  // perhaps still there
    u32 count = 0;
    std::atomic<bool> more = false;  // something was added or forgotten
    std::vector<Memory> by_base;
    u32 last = 0;  // index of the last hit: accesses come in runs
};

}  // namespace railhop::shim
