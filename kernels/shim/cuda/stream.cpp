// Streams, events, and what a stream does beside kernels: copies, clears, stores. These are entries of the machine's
// streams, so they come after what was enqueued before, and take their time.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "../random.hpp"
#include "machine.hpp"

using namespace railhop::cuda;

namespace {

constexpr int NON_BLOCKING = 1;
constexpr int GREATEST_PRIORITY = -5;

/// Of what the machine's thread does.
railhop::shim::Random& random() {
    static railhop::shim::Random random(options().seed);
    return random;
}

struct Copy {
    u8* to;
    const u8* from;
    u64 bytes;
    std::vector<u8> staged;  // what was read when the copy was enqueued
    u32 left = 0xF;          // pieces, as a mask

    /// Moves a piece or what is left, in any order. Words are torn.
    static int step(void* ctx) {
        Copy& copy = *(Copy*)ctx;
        bool whole = !random().one_in(2);
        do copy.move();
        while (whole && copy.left);
        if (copy.left) return 0;
        delete &copy;
        return 1;
    }

    void move() {
        u64 piece = (bytes / 4 + 3) / 4 * 4;
        u32 index = random().bit(left);
        u64 begin = std::min(bytes, piece * index);
        u64 end = index == 3 ? bytes : std::min(bytes, begin + piece);
        std::memcpy(to + begin, from + begin, end - begin);
        left &= ~(1u << index);
    }
};

struct Clear {
    u8* to;
    u8 value;
    u64 bytes;

    static int step(void* ctx) {
        Clear* clear = (Clear*)ctx;
        // Pages that nobody has are zero: much of what is cleared is never used.
        bool given_back = clear->value == 0 && madvise(clear->to, clear->bytes, MADV_REMOVE) == 0;
        if (!given_back) std::memset(clear->to, clear->value, clear->bytes);
        delete clear;
        return 1;
    }
};

struct Store {
    u64* to;
    u64 value;

    static int step(void* ctx) {
        Store* store = (Store*)ctx;
        __atomic_store_n(store->to, store->value, __ATOMIC_RELEASE);
        delete store;
        return 1;
    }
};

/// What stands at an address.
enum class Kind { Device, Pinned, Pageable, Wrong };

/// Wrong: not wholly in one memory, or not in this device's reach.
Kind kind_of(Driver& d, Address address, u64 bytes, u32 device) {
    auto mapped = holding(d.ranges, address);
    if (mapped != d.ranges.end()) {
        bool inside = address - mapped->first + bytes <= mapped->second.bytes;
        return inside && mapped->second.access.contains((int)device) ? Kind::Device : Kind::Wrong;
    }
    auto pinned = holding(d.host, address);
    if (pinned != d.host.end())
        return address - pinned->first + bytes <= pinned->second.bytes ? Kind::Pinned : Kind::Wrong;
    auto next_mapped = d.ranges.lower_bound(address);
    auto next_pinned = d.host.lower_bound(address);
    bool runs_into = (next_mapped != d.ranges.end() && next_mapped->first < address + bytes) ||
                     (next_pinned != d.host.end() && next_pinned->first < address + bytes);
    return runs_into || address < 4096 ? Kind::Wrong : Kind::Pageable;
}

bool is_known(Kind kind) { return kind == Kind::Device || kind == Kind::Pinned; }

}  // namespace

// ---- streams

CUDA_API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    return call_in_context([&](Driver&, auto&, Handle) {
        if (least) *least = 0;
        if (greatest) *greatest = GREATEST_PRIORITY;
        return SUCCESS;
    });
}

CUDA_API cuStreamCreateWithPriority(Handle* stream, u32 flags, int) {
    return call_in_context([&](Driver& d, auto&, Handle context) {
        if (flags > NON_BLOCKING) return INVALID_VALUE;
        // Others would wait for the default stream, and it for them.
        if (flags != NON_BLOCKING) return NOT_SUPPORTED;
        *stream = d.name();
        d.streams[*stream] = {context, d.new_queue(d.contexts.at(context).device)};
        return SUCCESS;
    });
}

CUDA_API cuStreamDestroy_v2(Handle stream) {
    return call_in_context([&](Driver& d, auto&, Handle) {
        auto found = d.streams.find(stream);
        if (found == d.streams.end()) return INVALID_HANDLE;
        d.retired.push_back(found->second.queue);
        d.streams.erase(found);
        return SUCCESS;
    });
}

CUDA_API cuStreamSynchronize(Handle stream) {
    return call_in_context([&](Driver& d, auto& lock, Handle context) {
        const Queue* queue = d.find(stream, context);
        if (!queue) return INVALID_HANDLE;
        return wait_for(d, lock, {*queue, d.launched[*queue]});
    });
}

CUDA_API cuStreamWaitEvent(Handle stream, Handle event, u32 flags) {
    return call_in_context([&](Driver& d, auto&, Handle context) {
        const Queue* found = d.find(stream, context);
        auto awaited = d.events.find(event);
        if (!found || awaited == d.events.end()) return INVALID_HANDLE;
        if (flags) return INVALID_VALUE;
        if (!awaited->second.recorded || d.ended(awaited->second.point)) return SUCCESS;
        auto [queue, entries] = awaited->second.point;
        railhop_shim_wait(d.shim, found->first, found->second, queue.first, queue.second, entries);
        ++d.launched[*found];
        return SUCCESS;
    });
}

// ---- events

CUDA_API cuEventCreate(Handle* event, u32 flags) {
    return call_in_context([&](Driver& d, auto&, Handle context) {
        if (flags > 7) return INVALID_VALUE;
        *event = d.name();
        d.events[*event] = {.context = context, .point = {}};
        return SUCCESS;
    });
}

CUDA_API cuEventDestroy_v2(Handle event) {
    return call_in_context([&](Driver& d, auto&, Handle) { return d.events.erase(event) ? SUCCESS : INVALID_HANDLE; });
}

CUDA_API cuEventRecord(Handle event, Handle stream) {
    return call_in_context([&](Driver& d, auto&, Handle context) {
        const Queue* queue = d.find(stream, context);
        auto found = d.events.find(event);
        if (!queue || found == d.events.end()) return INVALID_HANDLE;
        if (d.contexts.at(found->second.context).device != queue->first) return INVALID_HANDLE;
        found->second.recorded = true;
        found->second.point = {*queue, d.launched[*queue]};
        return SUCCESS;
    });
}

/// Whoever asks in vain sleeps a little: threads that poll would else keep the machine from the processor.
CUDA_API cuEventQuery(Handle event) {
    return call_in_context([&](Driver& d, auto& lock, Handle) {
        auto found = d.events.find(event);
        if (found == d.events.end()) return INVALID_HANDLE;
        if (!found->second.recorded || d.ended(found->second.point)) return SUCCESS;
        lock.unlock();
        std::this_thread::sleep_for(std::chrono::microseconds(100));
        return NOT_READY;
    });
}

// ---- what else a stream does

/// Between memories that CUDA knows it returns at once. What comes from other memory has been read when it returns;
/// what goes there has been written.
CUDA_API cuMemcpyAsync(Address to, Address from, size_t bytes, Handle stream) {
    return call_in_context([&](Driver& d, auto& lock, Handle context) {
        const Queue* found = d.find(stream, context);
        if (!found) return INVALID_HANDLE;
        if (bytes == 0) return SUCCESS;
        Queue queue = *found;
        Kind target = kind_of(d, to, bytes, queue.first), source = kind_of(d, from, bytes, queue.first);
        if (target == Kind::Wrong || source == Kind::Wrong) return INVALID_VALUE;
        Copy* copy = new Copy{(u8*)to, (const u8*)from, bytes, {}};
        if (!is_known(source) && is_known(target)) {
            copy->staged.assign(copy->from, copy->from + bytes);
            copy->from = copy->staged.data();
        }
        d.enqueue(queue, Copy::step, copy);
        return is_known(target) ? SUCCESS : wait_for(d, lock, {queue, d.launched[queue]});
    });
}

CUDA_API cuMemsetD8Async(Address to, u8 value, size_t bytes, Handle stream) {
    return call_in_context([&](Driver& d, auto&, Handle context) {
        const Queue* queue = d.find(stream, context);
        if (!queue) return INVALID_HANDLE;
        if (!is_known(kind_of(d, to, bytes, queue->first))) return INVALID_VALUE;
        d.enqueue(*queue, Clear::step, new Clear{(u8*)to, value, bytes});
        return SUCCESS;
    });
}

CUDA_API cuStreamWriteValue64_v2(Handle stream, Address to, u64 value, u32 flags) {
    return call_in_context([&](Driver& d, auto&, Handle context) {
        const Queue* queue = d.find(stream, context);
        if (!queue) return INVALID_HANDLE;
        if (flags || to % 8 || !is_known(kind_of(d, to, 8, queue->first))) return INVALID_VALUE;
        d.enqueue(*queue, Store::step, new Store{(u64*)to, value});
        return SUCCESS;
    });
}
