// Live machines: real time, and other OS threads beside the scheduler's.
#include "live.hpp"

#include <sched.h>
#include <time.h>

#include <algorithm>

#include "world.hpp"

namespace railhop::shim {

namespace {

constexpr u32 NEWS_PATIENCE = 16;  // sweeps: lanes that poll much never stop seeing news
constexpr u64 AWAKE = 16;          // silent sweeps before the scheduler sleeps
constexpr u32 FREEZE = 16;         // sweeps that a warp stands still at most

u64 real_time() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (u64)time.tv_sec * 1'000'000'000 + (u64)time.tv_nsec;
}

}  // namespace

// ---- the inbox

Inbox::Inbox() = default;
Inbox::~Inbox() = default;

void Inbox::push(StreamId stream, std::unique_ptr<Launch> launch) {
    std::lock_guard lock(mutex);
    entries.emplace_back(stream, std::move(launch));
    changed.notify_all();
}

void Inbox::stop() {
    std::lock_guard lock(mutex);
    stopping = true;
    changed.notify_all();
}

std::vector<Entry> Inbox::take() {
    std::lock_guard lock(mutex);
    return std::exchange(entries, {});
}

bool Inbox::stopped() {
    std::lock_guard lock(mutex);
    return stopping;
}

void Inbox::wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return !quiet(); });
}

void Inbox::wait_for(std::chrono::microseconds most) {
    std::unique_lock lock(mutex);
    changed.wait_for(lock, most, [&] { return !quiet(); });
}

void Inbox::entry_ended(StreamId stream) {
    std::lock_guard lock(mutex);
    ++ends[stream];
}

u64 Inbox::ended(StreamId stream) {
    std::lock_guard lock(mutex);
    auto found = ends.find(stream);
    return found == ends.end() ? 0 : found->second;
}

// ---- the machine

u64 Shim::freeze(u32 sweeps) {
    return sweep_number + random.below(options.live ? std::min(sweeps, FREEZE) : sweeps);
}

/// Queues what other threads have sent. Who sent it is ordered before its lanes.
void Shim::drain_inbox() {
    for (Entry& entry : inbox.take()) {
        entry.launch->begun.release();
        enqueue(entry.stream, std::move(entry.launch));
    }
}

/// Lets other threads have the core when there was nothing to do.
void Shim::rest() {
    if (idle_sweeps < AWAKE)
        sched_yield();
    else
        inbox.wait_for(std::chrono::microseconds(std::min<u64>(50 * (idle_sweeps / AWAKE), 200)));
}

void Shim::run_live() {
    now = real_time();
    while (!failed && !inbox.stopped()) {
        drain_inbox();
        if (!start_blocks() && network.idle()) {
            inbox.wait();
        } else {
            sweep();
            network.step(*this);
            finish_blocks();
            if (count_sweep(NEWS_PATIENCE)) rest();
        }
        now = real_time();
    }
}

}  // namespace railhop::shim
