// Modules, functions, launches. Whatever the image, the kernels are the shim's.
#include <algorithm>
#include <cstring>

#include "machine.hpp"

using namespace railhop::cuda;

namespace {

constexpr u8 ELF[] = {0x7F, 'E', 'L', 'F'};
constexpr u8 FAT[] = {0x50, 0xED, 0x55, 0xBA};
constexpr int MAX_DYNAMIC_SHARED = 8;
constexpr int SHARED_CARVEOUT = 9;

/// Blocks of a function that a multiprocessor has room for.
int resident(const Function& function, int threads, u64 shared) {
    if (threads <= 0 || (u32)threads > THREADS || shared > function.shared) return 0;
    u32 whole = ((u32)threads + 31) / 32 * 32;
    u64 most = std::min<u64>(BLOCKS_PER_SM, THREADS_PER_SM / whole);
    most = std::min<u64>(most, REGISTERS_PER_SM / (REGISTERS * whole));
    return (int)std::min(most, SHARED_PER_SM / (shared + SHARED_RESERVED));
}

}  // namespace

CUDA_API cuModuleLoadDataEx(Handle* module, const void* image, u32 options, void*, void*) {
    return call_in_context([&](Driver& d, auto&, Handle context) {
        if (!image || options) return INVALID_VALUE;
        if (std::memcmp(image, ELF, sizeof ELF) != 0 && std::memcmp(image, FAT, sizeof FAT) != 0) return INVALID_IMAGE;
        *module = d.name();
        d.modules[*module] = {context, {}};
        return SUCCESS;
    });
}

CUDA_API cuModuleUnload(Handle module) {
    return call_in_context([&](Driver& d, auto& lock, Handle context) {
        auto found = d.modules.find(module);
        if (found == d.modules.end()) return INVALID_HANDLE;
        for (Handle function : found->second.functions) d.functions.erase(function);
        d.modules.erase(found);
        return wait_for_context(d, lock, context);
    });
}

CUDA_API cuModuleGetFunction(Handle* function, Handle module, const char* name) {
    return call_in_context([&](Driver& d, auto&, Handle context) {
        auto found = d.modules.find(module);
        if (found == d.modules.end()) return INVALID_HANDLE;
        int64_t params = railhop_shim_params(name);
        if (params < 0) return NOT_FOUND;
        *function = d.name();
        d.functions[*function] = {module, context, name, (u64)params};
        found->second.functions.push_back(*function);
        return SUCCESS;
    });
}

CUDA_API cuFuncLoad(Handle function) {
    return call_in_context([&](Driver& d, auto& lock, Handle context) {
        if (!d.functions.contains(function)) return INVALID_HANDLE;
        // Code is loaded when nothing runs.
        Result result = wait_for_context(d, lock, context);
        if (auto found = d.functions.find(function); found != d.functions.end()) found->second.loaded = true;
        return result;
    });
}

CUDA_API cuFuncGetParamInfo(Handle function, size_t index, size_t* offset, size_t* bytes) {
    return call([&](Driver& d, auto&) {
        auto found = d.functions.find(function);
        if (found == d.functions.end()) return INVALID_HANDLE;
        if (index != 0) return INVALID_VALUE;
        *offset = 0;
        if (bytes) *bytes = found->second.params;
        return SUCCESS;
    });
}

CUDA_API cuFuncSetAttribute(Handle function, int attribute, int value) {
    return call_in_context([&](Driver& d, auto&, Handle) {
        auto found = d.functions.find(function);
        if (found == d.functions.end()) return INVALID_HANDLE;
        if (attribute == SHARED_CARVEOUT) return value >= -1 && value <= 100 ? SUCCESS : INVALID_VALUE;
        if (attribute != MAX_DYNAMIC_SHARED || value < 0 || (u32)value > SHARED_OPT_IN) return INVALID_VALUE;
        found->second.shared = (u32)value;
        return SUCCESS;
    });
}

CUDA_API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Handle function, int threads, size_t shared) {
    return call_in_context([&](Driver& d, auto&, Handle) {
        auto found = d.functions.find(function);
        if (found == d.functions.end()) return INVALID_HANDLE;
        if (threads <= 0) return INVALID_VALUE;
        *blocks = resident(found->second, threads, shared);
        return SUCCESS;
    });
}

CUDA_API cuLaunchKernelEx(const LaunchConfig* config, Handle handle, void** params, void** extra) {
    return call_in_context([&](Driver& d, auto& lock, Handle context) {
        auto found = d.functions.find(handle);
        if (found == d.functions.end() || found->second.context != context) return INVALID_HANDLE;
        const Queue* queue = d.find(config->stream, context);
        if (!queue || queue->first != d.contexts.at(context).device) return INVALID_HANDLE;
        if (!params || !params[0] || extra || config->attribute_count) return INVALID_VALUE;
        for (int i = 1; i < 3; ++i)
            if (config->grid[i] != 1 || config->block[i] != 1) return NOT_SUPPORTED;
        Queue target = *queue;
        Function function = found->second;
        if (!config->grid[0] || !config->block[0] || config->block[0] > THREADS || config->shared > function.shared)
            return INVALID_VALUE;
        // A function that is not loaded yet makes its launch wait.
        if (!function.loaded)
            if (Result result = wait_for_context(d, lock, context)) return result;
        // The device's ranks are one to the machine.
        int launched = railhop_shim_launch(d.shim, target.first, target.second, function.name.c_str(), config->grid[0],
                                           config->block[0], config->shared, params[0], function.params);
        if (launched != 0) return INVALID_VALUE;
        ++d.launched[target];
        return SUCCESS;
    });
}
