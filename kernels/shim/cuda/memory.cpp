// Memory of devices, which is mapped by hand: files without a name, mapped where both kernels and copies reach them.
// Pinned memory of the host.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <climits>
#include <cstdio>
#include <cstring>

#include "machine.hpp"

using namespace railhop::cuda;

namespace {

constexpr char FILE_NAME[] = "shim-cuda";
constexpr char FABRIC_MAGIC[16] = "shim-cuda";
constexpr u32 KINDS = BY_DESCRIPTOR | BY_FABRIC;

Result check(const AllocationProperties& properties) {
    if (properties.type != ALLOCATION_PINNED || properties.location.type != LOCATION_DEVICE) return INVALID_VALUE;
    if (properties.location.id < 0 || properties.location.id >= options().devices) return INVALID_DEVICE;
    if (properties.handle_types & ~KINDS || properties.compression || properties.usage) return INVALID_VALUE;
    if (properties.handle_types & BY_FABRIC) {
        if (options().fabric == Options::Fabric::None) return NOT_SUPPORTED;
        if (options().fabric == Options::Fabric::Denied) return NOT_PERMITTED;
    }
    return SUCCESS;
}

/// What nobody has written yet is full of this, here and there.
void spoil(int descriptor, u64 bytes) {
    static const std::string junk(4096, '\xA5');
    for (u64 at = 0; at < bytes; at += 256 << 10) (void)!pwrite(descriptor, junk.data(), junk.size(), (off_t)at);
}

void drop_unused(Driver& d, std::map<Handle, Physical>::iterator physical) {
    if (physical->second.handles || physical->second.mappings) return;
    if (physical->second.device >= 0) d.used -= physical->second.bytes;
    close(physical->second.descriptor);
    d.physicals.erase(physical);
}

/// Tells the machine what is mapped there now, and who reaches it. Memory that is only its own device's, and can't
/// leave it, is private.
void announce(Driver& d, Address address, Range& range) {
    const Physical& physical = d.physicals.at(range.physical);
    u32 device = physical.device >= 0 ? (u32)physical.device : (u32)*range.access.begin();
    bool shared = physical.handle_types || physical.device < 0 || range.access != std::set{physical.device};
    u32 memory = railhop_shim_memory(d.shim, device, (void*)address, range.bytes, shared);
    if (range.known) railhop_shim_forget(d.shim, range.memory);
    range.memory = memory;
    range.known = true;
}

/// The file that a path or descriptor of another process stands for; -1 where it is no such memory.
int adopt(int descriptor, u64* bytes) {
    char path[64], name[PATH_MAX];
    std::snprintf(path, sizeof path, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(path, name, sizeof name - 1);
    if (length <= 0) return -1;
    name[length] = 0;
    struct stat file;
    if (!std::strstr(name, FILE_NAME) || fstat(descriptor, &file) != 0) return -1;
    *bytes = (u64)file.st_size;
    return fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
}

}  // namespace

// ---- memory without an address

CUDA_API cuMemGetAllocationGranularity(size_t* bytes, const AllocationProperties* properties, int option) {
    return call([&](Driver&, auto&) {
        if (option < 0 || option > 1) return INVALID_VALUE;
        if (Result result = check(*properties)) return result;
        *bytes = GRANULE;
        return SUCCESS;
    });
}

CUDA_API cuMemCreate(Handle* handle, size_t bytes, const AllocationProperties* properties, u64 flags) {
    return call([&](Driver& d, auto&) {
        if (flags || bytes == 0 || bytes % GRANULE) return INVALID_VALUE;
        if (Result result = check(*properties)) return result;
        if (bytes > options().memory || d.used > options().memory - bytes) return OUT_OF_MEMORY;
        int descriptor = memfd_create(FILE_NAME, MFD_CLOEXEC);
        if (descriptor < 0) return OPERATING_SYSTEM;
        if (ftruncate(descriptor, (off_t)bytes) != 0) {
            close(descriptor);
            return OUT_OF_MEMORY;
        }
        spoil(descriptor, bytes);
        d.used += bytes;
        *handle = d.name();
        d.physicals[*handle] = {descriptor, bytes, properties->location.id, properties->handle_types};
        return SUCCESS;
    });
}

CUDA_API cuMemRelease(Handle handle) {
    return call([&](Driver& d, auto&) {
        auto found = d.physicals.find(handle);
        if (found == d.physicals.end() || found->second.handles == 0) return INVALID_VALUE;
        --found->second.handles;
        drop_unused(d, found);
        return SUCCESS;
    });
}

CUDA_API cuMemRetainAllocationHandle(Handle* handle, void* address) {
    return call([&](Driver& d, auto&) {
        auto found = holding(d.ranges, (Address)address);
        if (found == d.ranges.end() || !found->second.physical) return INVALID_VALUE;
        *handle = found->second.physical;
        ++d.physicals.at(*handle).handles;
        return SUCCESS;
    });
}

CUDA_API cuMemExportToShareableHandle(void* to, Handle handle, u32 kind, u64 flags) {
    return call([&](Driver& d, auto&) {
        auto found = d.physicals.find(handle);
        if (found == d.physicals.end() || found->second.handles == 0 || flags) return INVALID_VALUE;
        const Physical& physical = found->second;
        if (!(physical.handle_types & kind)) return INVALID_VALUE;
        if (kind == BY_DESCRIPTOR) {
            int descriptor = fcntl(physical.descriptor, F_DUPFD_CLOEXEC, 0);
            if (descriptor < 0) return OPERATING_SYSTEM;
            *(int*)to = descriptor;
            return SUCCESS;
        }
        if (kind != BY_FABRIC) return INVALID_VALUE;
        FabricHandle fabric = {};
        std::memcpy(fabric.magic, FABRIC_MAGIC, sizeof fabric.magic);
        fabric.process = getpid();
        fabric.descriptor = physical.descriptor;
        std::memcpy(to, &fabric, sizeof fabric);
        return SUCCESS;
    });
}

/// A dma-buf is the memory's file here: no NIC takes it for one.
CUDA_API cuMemGetHandleForAddressRange(void* handle, Address address, size_t bytes, int kind, u64 flags) {
    return call([&](Driver& d, auto&) {
        auto range = holding(d.ranges, address);
        if (range == d.ranges.end() || !range->second.physical || kind != RANGE_DMA_BUF || flags) return INVALID_VALUE;
        if (address != range->first || bytes > range->second.bytes || bytes % 4096 || bytes == 0) return INVALID_VALUE;
        int descriptor = fcntl(d.physicals.at(range->second.physical).descriptor, F_DUPFD_CLOEXEC, 0);
        if (descriptor < 0) return OPERATING_SYSTEM;
        *(int*)handle = descriptor;
        return SUCCESS;
    });
}

CUDA_API cuMemImportFromShareableHandle(Handle* handle, void* from, u32 kind) {
    return call([&](Driver& d, auto&) {
        u64 bytes = 0;
        int descriptor = -1;
        if (kind == BY_DESCRIPTOR) {
            descriptor = adopt((int)(intptr_t)from, &bytes);
        } else if (kind == BY_FABRIC) {
            if (options().fabric != Options::Fabric::Granted) return NOT_PERMITTED;
            FabricHandle fabric;
            std::memcpy(&fabric, from, sizeof fabric);
            if (std::memcmp(fabric.magic, FABRIC_MAGIC, sizeof fabric.magic) != 0) return INVALID_VALUE;
            char path[64];
            std::snprintf(path, sizeof path, "/proc/%d/fd/%d", fabric.process, fabric.descriptor);
            int opened = open(path, O_RDWR | O_CLOEXEC);
            descriptor = adopt(opened, &bytes);
            if (opened >= 0) close(opened);
        }
        if (descriptor < 0) return INVALID_VALUE;
        *handle = d.name();
        d.physicals[*handle] = {descriptor, bytes, -1, 0};
        return SUCCESS;
    });
}

// ---- addresses. A range holds one mapping, as large as itself: nothing here asks for more.

CUDA_API cuMemAddressReserve(Address* address, size_t bytes, size_t alignment, Address, u64 flags) {
    return call([&](Driver& d, auto&) {
        if (flags || bytes == 0 || bytes % GRANULE || (alignment & (alignment - 1)) || alignment > GRANULE)
            return INVALID_VALUE;
        u64 room = bytes + GRANULE;
        void* found = mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED) return OUT_OF_MEMORY;
        Address start = (Address)found, aligned = (start + GRANULE - 1) / GRANULE * GRANULE;
        if (aligned > start) munmap(found, aligned - start);
        if (start + room > aligned + bytes) munmap((void*)(aligned + bytes), start + room - aligned - bytes);
        *address = aligned;
        d.ranges[aligned] = {.bytes = bytes};
        return SUCCESS;
    });
}

CUDA_API cuMemAddressFree(Address address, size_t bytes) {
    return call([&](Driver& d, auto&) {
        auto found = d.ranges.find(address);
        if (found == d.ranges.end() || found->second.bytes != bytes || found->second.physical) return INVALID_VALUE;
        munmap((void*)address, bytes);
        d.ranges.erase(found);
        return SUCCESS;
    });
}

CUDA_API cuMemMap(Address address, size_t bytes, size_t offset, Handle handle, u64 flags) {
    return call([&](Driver& d, auto&) {
        auto range = d.ranges.find(address);
        auto physical = d.physicals.find(handle);
        if (range == d.ranges.end() || range->second.bytes != bytes || range->second.physical) return INVALID_VALUE;
        if (physical == d.physicals.end() || physical->second.handles == 0) return INVALID_VALUE;
        if (physical->second.bytes != bytes || offset || flags) return INVALID_VALUE;
        // Nobody may touch it yet.
        int file = physical->second.descriptor;
        if (mmap((void*)address, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED)
            return OPERATING_SYSTEM;
        range->second.physical = handle;
        ++physical->second.mappings;
        return SUCCESS;
    });
}

CUDA_API cuMemSetAccess(Address address, size_t bytes, const AccessDescription* descriptions, size_t count) {
    return call([&](Driver& d, auto&) {
        auto found = d.ranges.find(address);
        if (found == d.ranges.end() || found->second.bytes != bytes || !found->second.physical || count == 0)
            return INVALID_VALUE;
        int owner = d.physicals.at(found->second.physical).device;
        std::set<int> access = found->second.access;
        for (size_t i = 0; i < count; ++i) {
            const auto& [location, flags] = descriptions[i];
            if (location.type != LOCATION_DEVICE || flags != ACCESS_READ_WRITE) return INVALID_VALUE;
            if (location.id < 0 || location.id >= options().devices) return INVALID_DEVICE;
            if (owner >= 0 && location.id != owner && !options().peers) return PEER_ACCESS_UNSUPPORTED;
            access.insert(location.id);
        }
        if (!d.shim) return INVALID_CONTEXT;
        if (mprotect((void*)address, bytes, PROT_READ | PROT_WRITE) != 0) return OPERATING_SYSTEM;
        found->second.access = access;
        announce(d, address, found->second);
        return SUCCESS;
    });
}

CUDA_API cuMemUnmap(Address address, size_t bytes) {
    return call([&](Driver& d, auto&) {
        auto found = d.ranges.find(address);
        if (found == d.ranges.end() || found->second.bytes != bytes || !found->second.physical) return INVALID_VALUE;
        if (found->second.known) railhop_shim_forget(d.shim, found->second.memory);
        int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
        void* room = mmap((void*)address, bytes, PROT_NONE, kind, -1, 0);
        if (room == MAP_FAILED) return OPERATING_SYSTEM;
        auto physical = d.physicals.find(found->second.physical);
        found->second = {.bytes = bytes};
        --physical->second.mappings;
        drop_unused(d, physical);
        return SUCCESS;
    });
}

// ---- the host's

CUDA_API cuMemHostAlloc(void** memory, size_t bytes, u32 flags) {
    return call_in_context([&](Driver& d, auto&, Handle context) {
        if (bytes == 0 || flags > 7) return INVALID_VALUE;
        void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (found == MAP_FAILED) return OUT_OF_MEMORY;
        std::memset(found, 0xA5, bytes);
        u32 id = railhop_shim_memory(d.shim, d.contexts.at(context).device, found, bytes, 1);
        d.host[(Address)found] = {context, bytes, id};
        *memory = found;
        return SUCCESS;
    });
}

CUDA_API cuMemHostGetDevicePointer_v2(Address* address, void* memory, u32 flags) {
    return call_in_context([&](Driver& d, auto&, Handle) {
        if (flags || holding(d.host, (Address)memory) == d.host.end()) return INVALID_VALUE;
        *address = (Address)memory;
        return SUCCESS;
    });
}

/// Waits for every kernel of the device, as CUDA does.
CUDA_API cuMemFreeHost(void* memory) {
    return call_in_context([&](Driver& d, auto& lock, Handle context) {
        if (!d.host.contains((Address)memory)) return INVALID_VALUE;
        if (Result result = wait_for_context(d, lock, context)) return result;
        auto found = d.host.find((Address)memory);
        if (found == d.host.end()) return INVALID_VALUE;
        railhop_shim_forget(d.shim, found->second.memory);
        munmap(memory, found->second.bytes);
        d.host.erase(found);
        return SUCCESS;
    });
}
