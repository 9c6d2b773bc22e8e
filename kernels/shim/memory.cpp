#include "memory.hpp"

#include <algorithm>

namespace railhop::shim {

u32 Memories::add(u32 rank, const void* base, u64 bytes, bool shared) {
    std::lock_guard lock(mutex);
    added.push_back({count, rank, shared, (const u8*)base, bytes});
    more.store(true, std::memory_order_release);
    return count++;
}

void Memories::forget(u32 id) {
    std::lock_guard lock(mutex);
    forgotten.push_back(id);
    more.store(true, std::memory_order_release);
}

void Memories::adopt() {
    std::lock_guard lock(mutex);
    auto after = [](const u8* p, const Memory& m) { return p < m.base; };
    for (const Memory& memory : added)
        by_base.insert(std::upper_bound(by_base.begin(), by_base.end(), memory.base, after), memory);
    added.clear();
    for (u32 id : forgotten) std::erase_if(by_base, [&](const Memory& memory) { return memory.id == id; });
    forgotten.clear();
    last = 0;
    more.store(false, std::memory_order_relaxed);
}

Memory* Memories::find(const void* p, u64 bytes) {
    if (more.load(std::memory_order_acquire)) adopt();
    if (by_base.empty()) return nullptr;
    if (by_base[last].contains(p, bytes)) return &by_base[last];
    auto after = [](const u8* at, const Memory& m) { return at < m.base; };
    auto it = std::upper_bound(by_base.begin(), by_base.end(), (const u8*)p, after);
    if (it == by_base.begin() || !(--it)->contains(p, bytes)) return nullptr;
    last = (u32)(it - by_base.begin());
    return &*it;
}

Memory* Memories::get(u32 id) {
    adopt();
    for (Memory& memory : by_base)
        if (memory.id == id) return &memory;
    return nullptr;
}

}  // namespace railhop::shim
