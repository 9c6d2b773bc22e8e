// The part of the CUDA driver API that the CUDA driver of `src/device/cuda` calls, declared by hand: names, numbers and
// layouts as its bindings have them. `tests/cuda_driver.rs` holds the layouts against these.
#pragma once
#include <cstddef>
#include <cstdint>

namespace railhop::cuda {

using u8 = unsigned char;
using u32 = unsigned int;
using u64 = unsigned long long;

/// CUresult.
enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    PEER_ACCESS_UNSUPPORTED = 217,
    OPERATING_SYSTEM = 304,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    CONTEXT_IS_DESTROYED = 709,
    LAUNCH_FAILED = 719,
    NOT_PERMITTED = 800,
    NOT_SUPPORTED = 801,
};

/// CUcontext, CUmodule, CUfunction, CUstream, CUevent and CUmemGenericAllocationHandle. No two are equal, whatever they
/// stand for, so that one taken for another is found out.
using Handle = u64;
/// CUdevice.
using Device = int;
/// CUdeviceptr.
using Address = u64;

constexpr Handle LEGACY_STREAM = 1;

/// CUmemLocation.
struct Location {
    int type;
    int id;
};
constexpr int LOCATION_DEVICE = 1;

/// CUmemAllocationProp.
struct AllocationProperties {
    int type;
    u32 handle_types;
    Location location;
    void* win32;
    u8 compression;
    u8 rdma;
    uint16_t usage;
    u8 reserved[4];
};
static_assert(sizeof(AllocationProperties) == 32 && offsetof(AllocationProperties, location) == 8 &&
              offsetof(AllocationProperties, rdma) == 25);
constexpr int ALLOCATION_PINNED = 1;
constexpr u32 BY_DESCRIPTOR = 1;
constexpr u32 BY_FABRIC = 8;
constexpr int RANGE_DMA_BUF = 1;

/// CUmemAccessDesc.
struct AccessDescription {
    Location location;
    int flags;
};
static_assert(sizeof(AccessDescription) == 12 && offsetof(AccessDescription, flags) == 8);
constexpr int ACCESS_READ_WRITE = 3;

/// CUmemFabricHandle: which process has the memory, and under which descriptor.
struct FabricHandle {
    char magic[16];
    int process;
    int descriptor;
    u8 unused[40];
};
static_assert(sizeof(FabricHandle) == 64);

/// CUlaunchConfig.
struct LaunchConfig {
    u32 grid[3];
    u32 block[3];
    u32 shared;
    Handle stream;
    void* attributes;
    u32 attribute_count;
};
static_assert(sizeof(LaunchConfig) == 56 && offsetof(LaunchConfig, shared) == 24 &&
              offsetof(LaunchConfig, stream) == 32 && offsetof(LaunchConfig, attribute_count) == 48);

}  // namespace railhop::cuda

#define CUDA_API extern "C" __attribute__((visibility("default"))) railhop::cuda::Result
