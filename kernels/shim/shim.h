// C interface of the CPU shim, for dlopen. A shim is one simulated machine: ranks with their memories, streams, proxies
// and NICs. A shim belongs to one thread at a time; several threads may each run their own. While one thread runs a
// live shim, others may call railhop_shim_memory, forget, launch, wait, call, ended and stop.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RAILHOP_SHIM_API __attribute__((visibility("default")))

typedef struct RailhopShim RailhopShim;

struct ShimOptions {
    uint64_t seed;           // of every random choice; 0: no random choices, everything in order
    uint32_t resident;       // blocks of a rank that run at the same time; 0: no limit
    uint32_t tsan_per_warp;  // one TSan fiber a warp instead of one a lane: less exact, far cheaper
    uint32_t ranks_per_node; // 0: all ranks on one node
    uint32_t live;           // time is real, and other threads take part: see the README
};

// What a FIFO entry stands for: a put of `bytes` (may be 0) from `src` to `dst`, then `value` into `word` (may be null)
// at the peer, and `completed` into `completion` (may be null) at home, some time after `src` has been read.
struct ShimPosting {
    uint32_t peer;
    uint32_t queue;
    const void* src;
    void* dst;
    uint64_t bytes;
    uint64_t* word;
    uint64_t value;
    uint64_t* completion;
    uint64_t completed;
};

typedef void (*ShimResolve)(void* ctx, uint32_t rank, uint64_t half0, uint64_t half1, struct ShimPosting* out);

RAILHOP_SHIM_API RailhopShim* railhop_shim_new(const struct ShimOptions* options);
RAILHOP_SHIM_API void railhop_shim_free(RailhopShim* shim);

// Registers memory of a rank and returns its id. `shared`: others touch it too (peers on the node, the NIC, the host).
RAILHOP_SHIM_API uint32_t railhop_shim_memory(RailhopShim* shim, uint32_t rank, void* base, uint64_t bytes,
                                              uint32_t shared);

// The memory with this id is gone: whoever touches it from now on touches nothing that is registered.
RAILHOP_SHIM_API void railhop_shim_forget(RailhopShim* shim, uint32_t memory);

// Bytes of a kernel's parameters; -1: unknown kernel.
RAILHOP_SHIM_API int64_t railhop_shim_params(const char* kernel);

// Queues a kernel on a stream of a rank; `params` is copied. 0, or -1: unknown kernel, wrong size, or no such shape.
RAILHOP_SHIM_API int railhop_shim_launch(RailhopShim* shim, uint32_t rank, uint32_t stream, const char* kernel,
                                         uint32_t grid, uint32_t block, uint32_t smem_bytes, const void* params,
                                         uint64_t params_bytes);

// Queues an entry on a stream of a rank that ends when `count` entries of the other stream have ended.
RAILHOP_SHIM_API void railhop_shim_wait(RailhopShim* shim, uint32_t rank, uint32_t stream, uint32_t other_rank,
                                        uint32_t other_stream, uint64_t count);

// A part of some work for the thread that runs the shim: not 0 when that was the last one. It must not call the shim.
typedef int (*ShimStep)(void* ctx);

// Queues work on a stream of a live shim: `step` is called once a sweep or less, from its turn on until it has ended.
RAILHOP_SHIM_API void railhop_shim_call(RailhopShim* shim, uint32_t rank, uint32_t stream, ShimStep step, void* ctx);

// Entries of a stream, of whatever kind, that have ended so far: all that they wrote is visible to the caller.
RAILHOP_SHIM_API uint64_t railhop_shim_ended(RailhopShim* shim, uint32_t rank, uint32_t stream);

// Attaches the proxy of a rank to its command FIFO of `capacity` (a power of two) entries of two halves each.
RAILHOP_SHIM_API void railhop_shim_proxy(RailhopShim* shim, uint32_t rank, uint64_t* fifo, uint64_t capacity,
                                         uint64_t* taken, ShimResolve resolve, void* ctx);

// From now on, signals to `word` are lost.
RAILHOP_SHIM_API void railhop_shim_lose(RailhopShim* shim, uint64_t* word);

// Runs until every launched kernel has ended and the agents are idle: 0, or 1 with a report. After 1 the shim only
// serves its reports. After 0 it may be given further launches and run again. A live shim runs until it is stopped, or
// until a check has failed; after a stop it only serves to be freed, with whatever still runs.
RAILHOP_SHIM_API int railhop_shim_run(RailhopShim* shim);

// Stops a live shim, now or as soon as it runs.
RAILHOP_SHIM_API void railhop_shim_stop(RailhopShim* shim);

// The failed check or deadlock; "" if none. Valid until the next call with this shim.
RAILHOP_SHIM_API const char* railhop_shim_report(RailhopShim* shim);

// Where everyone was when the last run first stood still for a virtual second; "" if it never did.
RAILHOP_SHIM_API const char* railhop_shim_stall(RailhopShim* shim);

enum ShimTraffic {
    SHIM_BULK_READ = 0,
    SHIM_BULK_WRITTEN = 1,
    SHIM_NIC_READ = 2,
    SHIM_NIC_WRITTEN = 3,
};
// Bytes so far by kind (ShimTraffic); 0 for an unknown memory or kind.
RAILHOP_SHIM_API uint64_t railhop_shim_traffic(RailhopShim* shim, uint32_t memory, uint32_t what);

#ifdef __cplusplus
}
#endif
