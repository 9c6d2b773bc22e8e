// What the shim tells ThreadSanitizer and AddressSanitizer; all of it compiles to nothing in the plain flavour.
//
// TSan sees every lane and every agent as a thread of its own ("TSan fiber"), switched without synchronisation. Order
// between them exists only where a SyncToken (or an atomic access of the kernel) creates it, so a missing CUDA ordering
// edge is a race whatever the schedule was. The shim's own state is touched by all of them: Quiet hides that.
#pragma once
#include <cstddef>
#include <cstdlib>

#if defined(__SANITIZE_THREAD__)
#define SHIM_TSAN 1
#define SHIM_NO_TSAN __attribute__((no_sanitize("thread")))
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#else
#define SHIM_TSAN 0
#define SHIM_NO_TSAN
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SHIM_ASAN 1
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
void __asan_unpoison_memory_region(void const volatile* address, size_t size);
}
#else
#define SHIM_ASAN 0
#endif

namespace railhop::shim {

#if SHIM_TSAN
/// Whether TSan ignores the accesses of the current TSan fiber; calls nest.
void ignore_accesses(bool on);
#endif

/// While one lives, TSan ignores the accesses of the current TSan fiber. Must not live across a switch of fibers:
/// Quiet::pause and Quiet::resume stand around every switch.
class Quiet {
public:
#if SHIM_TSAN
    Quiet();
    ~Quiet();
    /// Ends ignoring on this TSan fiber and returns the depth to resume with.
    static int pause();
    static void resume(int depth);
    /// Replaces the depth without telling TSan: the ignore state is the fiber's, the depth is the OS thread's.
    static int exchange(int depth);
#else
    Quiet() {}
    ~Quiet() {}
#endif
    Quiet(const Quiet&) = delete;
    Quiet& operator=(const Quiet&) = delete;
};

/// A happens-before edge: everything before a release is before what follows a later acquire. Releases accumulate.
class SyncToken {
public:
#if SHIM_TSAN
    SyncToken() : word(std::malloc(8)) {}
    ~SyncToken() { std::free(word); }
    void acquire() { __tsan_acquire(word); }
    void release() { __tsan_release(word); }
    /// Forgets all releases: TSan drops what it knows of freed memory.
    void clear() {
        std::free(word);
        word = std::malloc(8);
    }
    SyncToken(const SyncToken&) = delete;
    SyncToken& operator=(const SyncToken&) = delete;

private:
    void* word;
#else
    void acquire() {}
    void release() {}
    void clear() {}
#endif
};

/// A thread as TSan sees it.
class TsanFiber {
public:
    void create(const char* name);
    void destroy();
    void* handle = nullptr;

    /// Runs `body` as this fiber. Of what it does TSan sees only the use of tokens and the agent_* accesses below.
    template <typename Body>
    SHIM_NO_TSAN void as(Body body) const {
#if SHIM_TSAN
        void* caller = __tsan_get_current_fiber();
        __tsan_switch_to_fiber(handle, 1);
        ignore_accesses(true);
        body();
        ignore_accesses(false);
        __tsan_switch_to_fiber(caller, 1);
#else
        body();
#endif
    }
};

/// Reads and writes of an agent as TSan is to see them; the bytes themselves are moved by the caller.
void agent_read(const void* address, size_t bytes);
void agent_write(void* address, size_t bytes);
/// Strong accesses of an agent.
unsigned long long agent_load_acquire(const unsigned long long* address);
void agent_store_release(unsigned long long* address, unsigned long long value);

}  // namespace railhop::shim
