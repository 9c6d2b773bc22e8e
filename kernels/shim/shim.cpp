// The C interface.
#include "shim.h"

#include <cstring>
#include <memory>

#include "world.hpp"

using namespace railhop::shim;
using railhop::u32;

struct RailhopShim {
    explicit RailhopShim(const ShimOptions& options) : shim(options) {}
    Shim shim;
};

extern "C" {

RailhopShim* railhop_shim_new(const ShimOptions* options) {
    Quiet quiet;
    return new RailhopShim(*options);
}

void railhop_shim_free(RailhopShim* shim) {
    Quiet quiet;
    delete shim;
}

uint32_t railhop_shim_memory(RailhopShim* shim, uint32_t rank, void* base, uint64_t bytes, uint32_t shared) {
    Quiet quiet;
    return shim->shim.memories.add(rank, base, bytes, shared != 0);
}

void railhop_shim_forget(RailhopShim* shim, uint32_t memory) {
    Quiet quiet;
    shim->shim.memories.forget(memory);
}

int64_t railhop_shim_params(const char* name) {
    Quiet quiet;
    const Kernel* kernel = Kernel::find(name);
    return kernel ? (int64_t)kernel->params_bytes : -1;
}

int railhop_shim_launch(RailhopShim* handle, uint32_t rank, uint32_t stream_id, const char* name, uint32_t grid,
                        uint32_t block, uint32_t smem_bytes, const void* params, uint64_t params_bytes) {
    Quiet quiet;
    const Kernel* kernel = Kernel::find(name);
    if (!kernel || kernel->params_bytes != params_bytes || grid == 0 || block == 0 || block > 1024) return -1;
    auto launch = std::make_unique<Launch>();
    launch->kernel = kernel;
    launch->rank = rank;
    launch->grid = grid;
    launch->threads = block;
    launch->smem_bytes = smem_bytes;
    launch->params.resize(params_bytes / 16 + 1);
    std::memcpy(launch->params.data(), params, params_bytes);
    handle->shim.submit({rank, stream_id}, std::move(launch));
    return 0;
}

void railhop_shim_wait(RailhopShim* shim, uint32_t rank, uint32_t stream, uint32_t other_rank, uint32_t other_stream,
                       uint64_t count) {
    Quiet quiet;
    auto launch = std::make_unique<Launch>();
    launch->rank = rank;
    launch->awaited = {other_rank, other_stream};
    launch->awaited_entries = count;
    shim->shim.submit({rank, stream}, std::move(launch));
}

void railhop_shim_call(RailhopShim* shim, uint32_t rank, uint32_t stream, ShimStep step, void* ctx) {
    Quiet quiet;
    auto launch = std::make_unique<Launch>();
    launch->rank = rank;
    launch->step = step;
    launch->context = ctx;
    shim->shim.submit({rank, stream}, std::move(launch));
}

uint64_t railhop_shim_ended(RailhopShim* shim, uint32_t rank, uint32_t stream) {
    Quiet quiet;
    return shim->shim.inbox.ended({rank, stream});
}

void railhop_shim_stop(RailhopShim* shim) {
    Quiet quiet;
    shim->shim.inbox.stop();
}

void railhop_shim_proxy(RailhopShim* shim, uint32_t rank, uint64_t* fifo, uint64_t capacity, uint64_t* taken,
                        ShimResolve resolve, void* ctx) {
    Quiet quiet;
    shim->shim.network.attach(rank, (railhop::u64*)fifo, capacity, (railhop::u64*)taken, resolve, ctx);
}

void railhop_shim_lose(RailhopShim* shim, uint64_t* word) {
    Quiet quiet;
    shim->shim.network.lose(word);
}

int railhop_shim_run(RailhopShim* shim) { return shim->shim.run(); }

const char* railhop_shim_report(RailhopShim* shim) { return shim->shim.report.c_str(); }

const char* railhop_shim_stall(RailhopShim* shim) { return shim->shim.stall.c_str(); }

uint64_t railhop_shim_traffic(RailhopShim* shim, uint32_t memory, uint32_t what) {
    Quiet quiet;
    const Memory* found = shim->shim.memories.get(memory);
    return found && what < 4 ? found->traffic[what] : 0;
}

}  // extern "C"
