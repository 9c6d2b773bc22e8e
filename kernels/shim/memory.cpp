#include "memory.hpp"

#include <algorithm>

namespace railhop::shim {

u32 Memories::add(u32 rank, const void* base, u64 bytes, bool shared) {
    Memory memory{(u32)by_base.size(), rank, shared, (const u8*)base, bytes};
    auto after = [](const u8* p, const Memory& m) { return p < m.base; };
    by_base.insert(std::upper_bound(by_base.begin(), by_base.end(), memory.base, after), memory);
    return memory.id;
}

Memory* Memories::find(const void* p, u64 bytes) {
    if (by_base.empty()) return nullptr;
    if (by_base[last].contains(p, bytes)) return &by_base[last];
    auto after = [](const u8* at, const Memory& m) { return at < m.base; };
    auto it = std::upper_bound(by_base.begin(), by_base.end(), (const u8*)p, after);
    if (it == by_base.begin() || !(--it)->contains(p, bytes)) return nullptr;
    last = (u32)(it - by_base.begin());
    return &*it;
}

Memory* Memories::get(u32 id) {
    for (Memory& memory : by_base)
        if (memory.id == id) return &memory;
    return nullptr;
}

}  // namespace railhop::shim
