#include "nic.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "world.hpp"

namespace railhop::shim {

namespace {

constexpr u64 PHASE = 1ull << 63;

/// Whether both halves of the FIFO's next entry carry the phase of its lap. An entry of zeros is empty in lap 0.
bool present(const Proxy& proxy, bool acquire, u64 (&halves)[2]) {
    u64 lap = proxy.taken / proxy.capacity;
    u64 expected = (lap & 1) ? 0 : PHASE;
    const u64* entry = proxy.fifo + 2 * (proxy.taken % proxy.capacity);
    for (u32 i = 0; i < 2; ++i) {
        halves[i] = acquire ? agent_load_acquire(entry + i) : __atomic_load_n(entry + i, __ATOMIC_RELAXED);
        if ((halves[i] & PHASE) != expected) return false;
    }
    return true;
}

/// Nanoseconds until the next step: mostly short, sometimes long.
u64 delay(Random& random) {
    if (!random.enabled()) return 1000;
    if (random.one_in(256)) return random.below(2'000'000);
    if (random.one_in(16)) return random.below(50'000);
    return random.below(2'000);
}

std::string name(const NicQueue& queue) {
    return "NIC of rank " + std::to_string(queue.rank) + ", queue " + std::to_string(queue.queue) + " to rank " +
           std::to_string(queue.peer);
}

}  // namespace

void Network::attach(u32 rank, u64* fifo, u64 capacity, u64* taken_word, ShimResolve resolve, void* ctx) {
    Proxy& proxy = proxies.emplace_back(rank, fifo, capacity, taken_word, resolve, ctx);
    proxy.tsan.create(("proxy of rank " + std::to_string(rank)).c_str());
}

void Network::begin(SyncToken& from_host) {
    for (Proxy& proxy : proxies) proxy.tsan.as([&] { from_host.acquire(); });
}

void Network::end(SyncToken& to_host) {
    for (Proxy& proxy : proxies) proxy.tsan.as([&] { to_host.release(); });
    for (auto& [key, queue] : queues) {
        queue.reader.as([&] { to_host.release(); });
        queue.writer.as([&] { to_host.release(); });
    }
}

void Network::destroy_fibers() {
    for (Proxy& proxy : proxies) proxy.tsan.destroy();
    for (auto& [key, queue] : queues) {
        queue.reader.destroy();
        queue.writer.destroy();
    }
}

bool Network::idle() {
    if (!busy.empty()) return false;
    u64 halves[2];
    for (Proxy& proxy : proxies)
        if (proxy.published != proxy.taken || present(proxy, false, halves)) return false;
    return true;
}

u64 Network::next_due() const {
    u64 earliest = ~0ull;
    for (const NicQueue* queue : busy)
        for (const auto& transfer : queue->transfers) earliest = std::min(earliest, transfer->due);
    return earliest;
}

void Network::step(Shim& shim) {
    for (Proxy& proxy : proxies) {
        if (shim.failed) return;
        if (!shim.calm() && shim.random.one_in(4)) continue;
        take(shim, proxy);
        if (shim.calm() || !shim.random.one_in(4)) publish(shim, proxy);
    }
    u32 first = shim.random.below((u32)busy.size());
    for (size_t i = 0; i < busy.size() && !shim.failed; ++i) step(shim, *busy[(first + i) % busy.size()]);
    std::erase_if(busy, [](NicQueue* queue) { return queue->transfers.empty(); });
}

// ---- the proxy

void Network::take(Shim& shim, Proxy& proxy) {
    do {
        u64 halves[2];
        bool found = false;
        proxy.tsan.as([&] { found = present(proxy, true, halves); });
        if (!found) return;
        ShimPosting posting{};
        proxy.resolve(proxy.ctx, proxy.rank, halves[0], halves[1], &posting);
        post(shim, proxy, posting);
        ++proxy.taken;
        shim.progress = true;
    } while (!shim.failed && !shim.random.one_in(4));
}

void Network::publish(Shim& shim, Proxy& proxy) {
    if (proxy.published == proxy.taken) return;
    proxy.tsan.as([&] { agent_store_release(proxy.taken_word, proxy.taken); });
    proxy.published = proxy.taken;
    shim.progress = true;
}

void Network::post(Shim& shim, Proxy& proxy, const ShimPosting& posting) {
    auto check = [&](const void* p, u64 bytes, u32 rank, const char* what) {
        const Memory* memory = shim.memories.find(p, bytes);
        // A NIC reads whatever was registered with it at home, and writes only where others may.
        if (memory && memory->rank == rank && (memory->shared || rank == proxy.rank)) return true;
        shim.stop("NIC of rank " + std::to_string(proxy.rank) + ": " + what + " " + hex((u64)p) + " (" +
                  std::to_string(bytes) + " bytes) is not in memory open to it of rank " + std::to_string(rank));
        return false;
    };
    u64 n = posting.bytes;
    if (n && !(check(posting.src, n, proxy.rank, "source") && check(posting.dst, n, posting.peer, "destination")))
        return;
    if (posting.word && !check(posting.word, 8, posting.peer, "signal word")) return;
    if (posting.completion && !check(posting.completion, 8, proxy.rank, "completion word")) return;
    if (((u64)posting.word | (u64)posting.completion) % 8 != 0)
        return shim.stop("NIC of rank " + std::to_string(proxy.rank) + ": a signal or completion word is not aligned");

    auto [it, added] = queues.try_emplace({proxy.rank, posting.peer, posting.queue});
    NicQueue& queue = it->second;
    if (added) {
        queue.rank = proxy.rank;
        queue.peer = posting.peer;
        queue.queue = posting.queue;
        queue.reader.create((name(queue) + ", reader").c_str());
        queue.writer.create((name(queue) + ", writer").c_str());
    }
    auto transfer = std::make_unique<Transfer>();
    transfer->posting = posting;
    u64 pieces = n == 0 ? 0 : std::min<u64>(1 + shim.random.below(Transfer::MAX_PIECES), n);
    transfer->piece_bytes = pieces ? (n + pieces - 1) / pieces : 0;
    if (pieces) pieces = (n + transfer->piece_bytes - 1) / transfer->piece_bytes;
    transfer->unread = transfer->unwritten = (1u << pieces) - 1;
    transfer->signalled = posting.word == nullptr;
    transfer->completed = posting.completion == nullptr;
    transfer->due = shim.now + delay(shim.random);
    transfer->buffer.resize(n);
    proxy.tsan.as([&] { transfer->posted.release(); });
    if (queue.transfers.empty()) busy.push_back(&queue);
    queue.transfers.push_back(std::move(transfer));
}

// ---- the NIC

void Network::step(Shim& shim, NicQueue& queue) {
    bool writes_open = true;       // every earlier transfer has been written and signalled
    bool completions_open = true;  // every earlier transfer has been completed
    for (auto& owned : queue.transfers) {
        Transfer& transfer = *owned;
        if (shim.now >= transfer.due) {
            bool can_complete = completions_open && !transfer.completed && transfer.unread == 0;
            bool can_move = transfer.unread != 0 || (writes_open && (transfer.unwritten != 0 || !transfer.signalled));
            if (can_complete && (!can_move || !shim.random.one_in(2)))
                complete(queue, transfer);
            else if (can_move)
                move(shim, queue, transfer, writes_open);
            if (can_complete || can_move) {
                shim.progress = true;
                transfer.due = shim.now + delay(shim.random);
            }
        }
        writes_open = writes_open && transfer.unwritten == 0 && transfer.signalled;
        completions_open = completions_open && transfer.completed;
    }
    auto over = [](const Transfer& t) { return t.unread == 0 && t.unwritten == 0 && t.signalled && t.completed; };
    while (!queue.transfers.empty() && over(*queue.transfers.front())) queue.transfers.pop_front();
}

/// Reads a piece, or (`first`: in turn) writes a piece that has been read, or signals when all are written.
void Network::move(Shim& shim, NicQueue& queue, Transfer& transfer, bool first) {
    u32 writable = first ? transfer.unwritten & ~transfer.unread : 0;
    if (transfer.unread == 0 && transfer.unwritten == 0) {
        signal(queue, transfer);
        return;
    }
    u32 piece = shim.random.bit(transfer.unread | writable);
    bool reads = transfer.unread >> piece & 1;
    u64 offset = piece * transfer.piece_bytes;
    u64 bytes = std::min(transfer.piece_bytes, transfer.posting.bytes - offset);
    u8* data = transfer.buffer.data() + offset;
    const u8* src = (const u8*)transfer.posting.src + offset;
    u8* dst = (u8*)transfer.posting.dst + offset;
    if (reads) {
        queue.reader.as([&] {
            transfer.posted.acquire();
            agent_read(src, bytes);
            transfer.data.release();
        });
        std::memcpy(data, src, bytes);
        transfer.unread &= ~(1u << piece);
        shim.memories.find(src, bytes)->traffic[SHIM_NIC_READ] += bytes;
    } else {
        queue.writer.as([&] {
            transfer.data.acquire();
            agent_write(dst, bytes);
        });
        std::memcpy(dst, data, bytes);
        transfer.unwritten &= ~(1u << piece);
        shim.memories.find(dst, bytes)->traffic[SHIM_NIC_WRITTEN] += bytes;
    }
}

void Network::signal(NicQueue& queue, Transfer& transfer) {
    const ShimPosting& posting = transfer.posting;
    // A signal without data still carries what the proxy was told before.
    queue.writer.as([&] {
        transfer.posted.acquire();
        if (!lost.contains(posting.word)) agent_store_release((u64*)posting.word, posting.value);
    });
    transfer.signalled = true;
}

void Network::complete(NicQueue& queue, Transfer& transfer) {
    const ShimPosting& posting = transfer.posting;
    queue.reader.as([&] { agent_store_release((u64*)posting.completion, posting.completed); });
    transfer.completed = true;
}

}  // namespace railhop::shim
