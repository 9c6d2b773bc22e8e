// What the driver API stands on: one live machine for the process, and all that was made and not yet given back. A
// device is a rank of the machine, and all of them are one node.
#pragma once
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../shim.h"
#include "cuda.hpp"

namespace railhop::cuda {

/// What the environment says: see the README of the shim.
struct Options {
    Options();
    int version = 13000;
    int devices = 1;
    u64 seed = 1;
    u64 memory = 64ull << 30;
    bool peers = true;
    enum class Fabric { None, Denied, Granted } fabric = Fabric::None;
    std::map<int, int> attributes;
};
const Options& options();

constexpr u64 GRANULE = 2 << 20;
constexpr u32 SHARED_PER_SM = 228 << 10;
constexpr u32 SHARED_OPT_IN = 227 << 10;
constexpr u32 SHARED_DEFAULT = 48 << 10;
constexpr u32 SHARED_RESERVED = 1 << 10;  // of every block
constexpr u32 THREADS_PER_SM = 2048;
constexpr u32 BLOCKS_PER_SM = 32;
constexpr u32 REGISTERS_PER_SM = 64 << 10;
constexpr u32 REGISTERS = 128;  // of a thread: what 512 threads a block leave each
constexpr u32 THREADS = 512;    // of a block: every kernel's launch bound

/// A stream of the machine: device and number.
using Queue = std::pair<u32, u32>;

/// So many entries of a stream.
struct Point {
    Queue queue;
    u64 entries;
};

struct Context {
    u32 device;
    u32 retained;
};

struct Stream {
    Handle context;
    Queue queue;
};

struct Event {
    Handle context;
    bool recorded = false;
    Point point;
};

struct Module {
    Handle context;
    std::vector<Handle> functions;
};

struct Function {
    Handle module;
    Handle context;
    std::string name;
    u64 params;
    u32 shared = SHARED_DEFAULT;
    bool loaded = false;
};

/// Memory without an address: a file.
struct Physical {
    int descriptor;
    u64 bytes;
    int device;  // -1: another process's
    u32 handle_types;
    u32 handles = 1;
    u32 mappings = 0;
};

/// A range of addresses, and what is mapped there.
struct Range {
    u64 bytes;
    Handle physical = 0;
    std::set<int> access = {};  // devices
    bool known = false;    // the machine knows it, as
    u32 memory = 0;
};

struct HostMemory {
    Handle context;
    u64 bytes;
    u32 memory;
};

/// All of it. Never destroyed: the machine runs until the process has ended.
struct Driver {
    std::mutex mutex;
    std::atomic<bool> initialised = false;
    RailhopShim* shim = nullptr;
    std::atomic<bool> failed = false;  // for ever, as a device after a fault
    std::string why;                   // as cuGetErrorString has it from then on
    Handle last = 0x1000;
    std::map<Handle, Context> contexts;
    std::map<u32, Handle> primary;  // by device
    std::map<Handle, Stream> streams;
    std::map<Handle, Event> events;
    std::map<Handle, Module> modules;
    std::map<Handle, Function> functions;
    std::map<Handle, Physical> physicals;
    std::map<Address, Range> ranges;
    std::map<Address, HostMemory> host;
    std::map<Queue, u64> launched;  // entries
    std::vector<Queue> retired;     // to be used again once they are empty
    u64 used = 0;                   // bytes of device memory

    Handle name() { return last += 16; }
    /// Starts the machine unless it runs.
    void start();
    Queue new_queue(u32 device);
    bool ended(const Point& point) const {
        return railhop_shim_ended(shim, point.queue.first, point.queue.second) >= point.entries;
    }
    bool idle(Queue queue) { return ended({queue, launched[queue]}); }
    /// The queue of a stream, the context's default stream included.
    const Queue* find(Handle stream, Handle context);
    void enqueue(Queue queue, ShimStep step, void* ctx);
};
Driver& driver();

/// The calling thread's context; 0: none.
extern thread_local Handle current_context;

/// Memory by an address in it: end for none.
template <typename Memory>
typename std::map<Address, Memory>::iterator holding(std::map<Address, Memory>& memories, Address address) {
    auto found = memories.upper_bound(address);
    if (found == memories.begin()) return memories.end();
    --found;
    return address - found->first < found->second.bytes ? found : memories.end();
}

/// Waits until a point is reached. The lock is not held meanwhile.
Result wait_for(Driver& driver, std::unique_lock<std::mutex>& lock, Point point);
/// The same, for all that is on the streams of a context.
Result wait_for_context(Driver& driver, std::unique_lock<std::mutex>& lock, Handle context);

/// A call about the calling thread only, which takes no turns with others: `body()`.
template <typename Body>
Result call_of_thread(Body body) {
    return driver().initialised ? body() : NOT_INITIALIZED;
}

/// A call that works without a context: `body(driver, lock)`.
template <typename Body>
Result call(Body body) {
    Driver& d = driver();
    std::unique_lock lock(d.mutex);
    return d.initialised ? body(d, lock) : NOT_INITIALIZED;
}

/// A call that needs a context: `body(driver, lock, context)`. Once the machine has failed it fails.
template <typename Body>
Result call_in_context(Body body) {
    return call([&](Driver& d, std::unique_lock<std::mutex>& lock) {
        if (current_context == 0) return INVALID_CONTEXT;
        if (!d.contexts.contains(current_context)) return CONTEXT_IS_DESTROYED;
        return d.failed ? LAUNCH_FAILED : body(d, lock, current_context);
    });
}

}  // namespace railhop::cuda
