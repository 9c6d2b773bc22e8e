// What other OS threads tell a live machine, and what they may ask of it.
#pragma once
#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "lane_api.hpp"

namespace railhop::shim {

struct Launch;

/// Rank and number.
using StreamId = std::pair<u32, u32>;

/// What is to be queued on a stream.
struct Entry {
    StreamId stream;
    std::unique_ptr<Launch> launch;
};

/// Every function may be called by any thread.
class Inbox {
public:
    Inbox();
    ~Inbox();
    void push(StreamId stream, std::unique_ptr<Launch> launch);
    void stop();
    /// What has come, in order.
    std::vector<Entry> take();
    bool stopped();
    /// Sleeps until something has come, or a stop.
    void wait();
    /// The same, for so long at most.
    void wait_for(std::chrono::microseconds most);
    /// Counts an entry that has ended: whoever sees the count sees all that it did.
    void entry_ended(StreamId stream);
    u64 ended(StreamId stream);

private:
    bool quiet() const { return entries.empty() && !stopping; }

    std::mutex mutex;
    std::condition_variable changed;
    std::vector<Entry> entries;
    std::map<StreamId, u64> ends;
    bool stopping = false;
};

}  // namespace railhop::shim
