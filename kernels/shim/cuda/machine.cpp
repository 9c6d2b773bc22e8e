// The machine and its thread; what the environment says.
#include "machine.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace railhop::cuda {

thread_local Handle current_context = 0;

// ---- options

static u64 number(const char* name, u64 otherwise) {
    const char* text = std::getenv(name);
    return text && *text ? std::strtoull(text, nullptr, 0) : otherwise;
}

Options::Options() {
    version = (int)number("SHIM_CUDA_VERSION", (u64)version);
    devices = (int)number("SHIM_CUDA_DEVICES", (u64)devices);
    seed = number("SHIM_CUDA_SEED", seed);
    memory = number("SHIM_CUDA_MEMORY", memory);
    peers = number("SHIM_CUDA_PEERS", 1) != 0;
    const char* text = std::getenv("SHIM_CUDA_FABRIC");
    if (text && std::strcmp(text, "denied") == 0) fabric = Fabric::Denied;
    if (text && std::strcmp(text, "granted") == 0) fabric = Fabric::Granted;
    // NUMBER=VALUE, with commas between.
    for (const char* at = std::getenv("SHIM_CUDA_ATTRIBUTES"); at && *at; at = std::strchr(at, ',')) {
        if (*at == ',') ++at;
        char* end;
        long name = std::strtol(at, &end, 0);
        if (*end == '=') attributes[(int)name] = (int)std::strtol(end + 1, nullptr, 0);
    }
}

const Options& options() {
    static const Options* found = new Options;
    return *found;
}

// ---- the machine

Driver& driver() {
    static Driver* all = new Driver;
    return *all;
}

void Driver::start() {
    if (shim) return;
    ShimOptions machine = {};
    machine.seed = options().seed;
    machine.live = 1;
    shim = railhop_shim_new(&machine);
    std::thread([this] {
        pthread_setname_np(pthread_self(), "shim cuda");
        if (railhop_shim_run(shim) == 0) return;
        // Nothing of it is changed any more, and whoever sees `failed` sees it whole.
        why = std::string("unspecified launch failure: ") + railhop_shim_report(shim);
        std::fprintf(stderr, "libcuda: %s\n", why.c_str());
        failed = true;
    }).detach();
}

Queue Driver::new_queue(u32 device) {
    auto usable = [&](Queue queue) { return queue.first == device && (failed || idle(queue)); };
    auto found = std::find_if(retired.begin(), retired.end(), usable);
    if (found != retired.end()) {
        Queue queue = *found;
        retired.erase(found);
        return queue;
    }
    // The default stream is number 0.
    auto end = launched.lower_bound({device + 1, 0});
    u32 next = end == launched.begin() || std::prev(end)->first.first != device ? 1 : std::prev(end)->first.second + 1;
    launched[{device, next}] = 0;
    return {device, next};
}

const Queue* Driver::find(Handle stream, Handle context) {
    if (stream == 0 || stream == LEGACY_STREAM) {
        auto entry = launched.try_emplace({contexts.at(context).device, 0}).first;
        return &entry->first;
    }
    auto found = streams.find(stream);
    return found == streams.end() ? nullptr : &found->second.queue;
}

void Driver::enqueue(Queue queue, ShimStep step, void* ctx) {
    railhop_shim_call(shim, queue.first, queue.second, step, ctx);
    ++launched[queue];
}

Result wait_for(Driver& driver, std::unique_lock<std::mutex>& lock, Point point) {
    lock.unlock();
    Result result = SUCCESS;
    for (u32 round = 0; !driver.ended(point); ++round) {
        if (driver.failed) {
            result = LAUNCH_FAILED;
            break;
        }
        if (round < 16)
            sched_yield();
        else
            std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    lock.lock();
    return result;
}

Result wait_for_context(Driver& driver, std::unique_lock<std::mutex>& lock, Handle context) {
    std::vector<Point> points;
    for (auto& [queue, entries] : driver.launched)
        if (queue.first == driver.contexts.at(context).device) points.push_back({queue, entries});
    for (const Point& point : points)
        if (Result result = wait_for(driver, lock, point)) return result;
    return SUCCESS;
}

}  // namespace railhop::cuda
