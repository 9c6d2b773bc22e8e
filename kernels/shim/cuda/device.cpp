// Errors, versions, devices and contexts.
#include <cstdio>
#include <cstring>

#include "machine.hpp"

using namespace railhop::cuda;

// ---- errors

namespace {

struct ResultText {
    Result result;
    const char* name;
    const char* text;
};

constexpr ResultText TEXTS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {PEER_ACCESS_UNSUPPORTED, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
     "peer access is not supported between these two devices"},
    {OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

const ResultText* find(Result result) {
    for (const ResultText& text : TEXTS)
        if (text.result == result) return &text;
    return nullptr;
}

}  // namespace

CUDA_API cuGetErrorName(Result result, const char** name) {
    const ResultText* found = find(result);
    *name = found ? found->name : nullptr;
    return found ? SUCCESS : INVALID_VALUE;
}

CUDA_API cuGetErrorString(Result result, const char** text) {
    const ResultText* found = find(result);
    *text = found ? found->text : nullptr;
    if (result == LAUNCH_FAILED && driver().failed) *text = driver().why.c_str();
    return found ? SUCCESS : INVALID_VALUE;
}

// ---- devices

CUDA_API cuDriverGetVersion(int* version) {
    *version = options().version;
    return SUCCESS;
}

CUDA_API cuInit(u32 flags) {
    if (flags) return INVALID_VALUE;
    if (options().devices == 0) return NO_DEVICE;
    Driver& d = driver();
    std::lock_guard lock(d.mutex);
    d.initialised = true;
    return SUCCESS;
}

CUDA_API cuDeviceGetCount(int* count) {
    return call([&](Driver&, auto&) {
        *count = options().devices;
        return SUCCESS;
    });
}

static bool is_device(Device device) { return device >= 0 && device < options().devices; }

CUDA_API cuDeviceGet(Device* device, int ordinal) {
    return call([&](Driver&, auto&) {
        if (!is_device(ordinal)) return INVALID_DEVICE;
        *device = ordinal;
        return SUCCESS;
    });
}

CUDA_API cuDeviceGetName(char* name, int length, Device device) {
    return call([&](Driver&, auto&) {
        if (!is_device(device)) return INVALID_DEVICE;
        if (length <= 0) return INVALID_VALUE;
        std::snprintf(name, (size_t)length, "Shim H100");
        return SUCCESS;
    });
}

CUDA_API cuDeviceGetPCIBusId(char* address, int length, Device device) {
    return call([&](Driver&, auto&) {
        if (!is_device(device)) return INVALID_DEVICE;
        char whole[16];
        int needed = std::snprintf(whole, sizeof whole, "0000:%02X:00.0", 0xA0 + device);
        if (length <= needed) return INVALID_VALUE;
        std::memcpy(address, whole, (size_t)needed + 1);
        return SUCCESS;
    });
}

CUDA_API cuDeviceTotalMem_v2(size_t* bytes, Device device) {
    return call([&](Driver&, auto&) {
        if (!is_device(device)) return INVALID_DEVICE;
        *bytes = (size_t)80 << 30;
        return SUCCESS;
    });
}

/// As an H100 has them.
static const std::map<int, int>& attributes() {
    static const auto* known = new std::map<int, int>{
        {1, 1024},                  // MAX_THREADS_PER_BLOCK
        {8, SHARED_DEFAULT},        // MAX_SHARED_MEMORY_PER_BLOCK
        {16, 132},                  // MULTIPROCESSOR_COUNT
        {39, THREADS_PER_SM},       // MAX_THREADS_PER_MULTIPROCESSOR
        {41, 1},                    // UNIFIED_ADDRESSING
        {75, 9},                    // COMPUTE_CAPABILITY_MAJOR
        {76, 0},                    // COMPUTE_CAPABILITY_MINOR
        {81, SHARED_PER_SM},        // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
        {97, SHARED_OPT_IN},        // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        {102, 1},                   // VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED
        {103, 1},                   // HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
        {110, 1},                   // GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
        {118, 100},                 // GPU_DIRECT_RDMA_WRITES_ORDERING
        {124, 1},                   // DMA_BUF_SUPPORTED
        {128, options().fabric != Options::Fabric::None},  // HANDLE_TYPE_FABRIC_SUPPORTED
    };
    return *known;
}

CUDA_API cuDeviceGetAttribute(int* value, int attribute, Device device) {
    return call([&](Driver&, auto&) {
        if (!is_device(device)) return INVALID_DEVICE;
        auto changed = options().attributes.find(attribute);
        auto found = attributes().find(attribute);
        if (changed == options().attributes.end() && found == attributes().end()) return INVALID_VALUE;
        *value = changed != options().attributes.end() ? changed->second : found->second;
        return SUCCESS;
    });
}

CUDA_API cuDeviceCanAccessPeer(int* can, Device device, Device peer) {
    return call([&](Driver&, auto&) {
        if (!is_device(device) || !is_device(peer)) return INVALID_DEVICE;
        *can = device != peer && options().peers;
        return SUCCESS;
    });
}

// ---- contexts

CUDA_API cuDevicePrimaryCtxRetain(Handle* context, Device device) {
    return call([&](Driver& d, auto&) {
        if (!is_device(device)) return INVALID_DEVICE;
        d.start();
        Handle& primary = d.primary[(u32)device];
        if (primary == 0) {
            // Another one each time: who kept the last one's handle is told that it is gone.
            primary = d.name();
            d.contexts[primary] = {(u32)device, 0};
        }
        ++d.contexts.at(primary).retained;
        *context = primary;
        return SUCCESS;
    });
}

/// How many of these belong to a context; none of them does afterwards.
template <typename Owned>
static size_t take(std::map<Handle, Owned>& all, Handle context) {
    return std::erase_if(all, [&](const auto& entry) { return entry.second.context == context; });
}

/// Whoever ends a context has given back what was made in it.
static void end_context(Driver& d, Handle context) {
    u32 device = d.contexts.at(context).device;
    size_t running = 0;
    for (auto& [queue, entries] : d.launched) running += queue.first == device && !d.idle(queue);
    for (auto& [handle, stream] : d.streams)
        if (stream.context == context) d.retired.push_back(stream.queue);
    size_t streams = take(d.streams, context), events = take(d.events, context), modules = take(d.modules, context);
    size_t pinned = take(d.host, context);
    take(d.functions, context);
    d.contexts.erase(context);
    d.primary.erase(device);
    size_t mapped = d.contexts.empty() ? d.ranges.size() + d.physicals.size() : 0;
    if (!d.failed && running + streams + events + modules + pinned + mapped)
        std::fprintf(stderr,
                     "libcuda: with the context of device %u go %zu streams (%zu at work), %zu events, %zu modules, "
                     "%zu pinned memories; %zu mappings and memories are left\n",
                     device, streams, running, events, modules, pinned, mapped);
}

CUDA_API cuDevicePrimaryCtxRelease_v2(Device device) {
    return call([&](Driver& d, auto&) {
        if (!is_device(device)) return INVALID_DEVICE;
        auto found = d.primary.find((u32)device);
        if (found == d.primary.end()) return INVALID_CONTEXT;
        if (--d.contexts.at(found->second).retained == 0) end_context(d, found->second);
        return SUCCESS;
    });
}

CUDA_API cuCtxGetCurrent(Handle* context) {
    return call_of_thread([&] {
        *context = current_context;
        return SUCCESS;
    });
}

CUDA_API cuCtxSetCurrent(Handle context) {
    return call([&](Driver& d, auto&) {
        if (context != 0 && !d.contexts.contains(context)) return INVALID_CONTEXT;
        current_context = context;
        return SUCCESS;
    });
}

static thread_local int capture_mode = 0;  // global

CUDA_API cuThreadExchangeStreamCaptureMode(int* mode) {
    return call_of_thread([&] {
        if (*mode < 0 || *mode > 2) return INVALID_VALUE;
        std::swap(capture_mode, *mode);
        return SUCCESS;
    });
}
