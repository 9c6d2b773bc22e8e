// The proxies that take commands from the ranks' FIFOs, and the NICs that carry them out.
#pragma once
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <tuple>
#include <vector>

#include "lane_api.hpp"
#include "sanitizer.hpp"
#include "shim.h"

namespace railhop::shim {

struct Shim;

/// A posting on its way. Data moves in pieces, each read at some time and written at some later time.
struct Transfer {
    static constexpr u32 MAX_PIECES = 4;
    ShimPosting posting;
    u64 piece_bytes;
    u32 unread;     // pieces, as a mask
    u32 unwritten;  // pieces, as a mask
    bool signalled;
    bool completed;
    u64 due;  // virtual time of its next step
    std::vector<u8> buffer;
    SyncToken posted;  // from the proxy to the reader
    SyncToken data;    // from the reader to the writer
};

/// What is under way from a rank to a peer on one queue: written and signalled in order of posting.
struct NicQueue {
    u32 rank;
    u32 peer;
    u32 queue;
    std::deque<std::unique_ptr<Transfer>> transfers;
    TsanFiber reader, writer;
};

struct Proxy {
    u32 rank;
    u64* fifo;
    u64 capacity;
    u64* taken_word;
    ShimResolve resolve;
    void* ctx;
    u64 taken = 0;
    u64 published = 0;
    TsanFiber tsan;
};

class Network {
public:
    void attach(u32 rank, u64* fifo, u64 capacity, u64* taken_word, ShimResolve resolve, void* ctx);
    void lose(const void* word) { lost.insert(word); }
    /// Must be called when a run starts: what the host did before is before what the agents do.
    void begin(SyncToken& from_host);
    /// One turn of every agent.
    void step(Shim& shim);
    /// Nothing is under way and no FIFO holds a command.
    bool idle();
    /// The earliest time at which a transfer goes on, or the latest time there is.
    u64 next_due() const;
    void end(SyncToken& to_host);
    void destroy_fibers();

private:
    void take(Shim& shim, Proxy& proxy);
    void publish(Shim& shim, Proxy& proxy);
    void post(Shim& shim, Proxy& proxy, const ShimPosting& posting);
    void step(Shim& shim, NicQueue& queue);
    void move(Shim& shim, NicQueue& queue, Transfer& transfer, bool first);
    void signal(NicQueue& queue, Transfer& transfer);
    void complete(NicQueue& queue, Transfer& transfer);

    std::deque<Proxy> proxies;
    std::map<std::tuple<u32, u32, u32>, NicQueue> queues;
    std::vector<NicQueue*> busy;
    std::set<const void*> lost;
};

}  // namespace railhop::shim
