// The shim's own test: every kernel that is right must run clean, every planted mistake must be reported.
//
//   selftest            all cases, each in a process of its own
//   selftest INDEX      one case in this process, with the reports on standard output
#include <sys/wait.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../ptx.hpp"
#include "../sanitizer.hpp"
#include "../shim.h"

using railhop::u16;
using railhop::u32;
using railhop::u64;
using railhop::u8;

namespace railhop {
struct Test {
    u32 rank;
    u32 wrong;
    u8* shared[3];
    u8* secret[3];
    u32* errors;
    u64* fifo;
    u64* taken;
    u32 capacity;
};
}  // namespace railhop
using railhop::Test;

namespace {

constexpr u32 RANKS = 3, BYTES = 65536, CAPACITY = 4;

/// What must come of a case: CLEAN, or a mistake that shows as a failed check with this text (REPORT), as wrong data or
/// a timeout seen by the kernel itself (DATA), as a race (RACE: only with TSan) or as a bad access (BAD: only with
/// ASan). Wrong data may need one of several seeds.
enum Expected { CLEAN, REPORT, DATA, RACE, BAD };

struct Case {
    const char* kernel;
    u32 wrong;
    Expected expected;
    const char* text = "";
    u32 grid = 1;
    u32 threads = 64;
    u32 resident = 0;
    const char* before = nullptr;  // a kernel launched before on the same stream
    bool lose = false;
    bool stalls = false;
};

const std::vector<Case> CASES = {
    {"strong", 0, CLEAN},
    {"strong", 1, REPORT, "unregistered memory"},
    {"strong", 2, REPORT, "only others may touch"},
    {"strong", 3, REPORT, "only others may touch"},
    {"strong", 4, REPORT, "gpu scope on shared memory"},
    {"strong", 5, REPORT, "misaligned strong access"},
    {"strong", 6, REPORT, "gpu scope on shared memory"},
    {"strong", 7, REPORT, "misaligned strong access"},
    {"collectives", 0, CLEAN},
    {"collectives", 1, REPORT, "calling lane is not in mask"},
    {"collectives", 2, REPORT, "divergent warp collective: "},
    {"collectives", 3, REPORT, "divergent warp collective: "},
    {"collectives", 4, REPORT, "takes no part"},
    {"collectives", 5, REPORT, "takes no part"},
    {"collectives", 6, CLEAN},
    {"barriers", 0, CLEAN},
    {"barriers", 1, DATA},
    {"barriers", 1, RACE},
    {"barriers", 2, REPORT, "thread counts differ"},
    {"barriers", 3, REPORT, "no such thread count"},
    {"barriers", 4, REPORT, "deadlock"},
    {"barriers", 5, REPORT, "no barrier 16"},
    {"messages", 0, CLEAN},
    {"messages", 1, RACE},
    {"messages", 2, RACE},
    {"messages", 3, RACE},
    {"messages", 4, RACE},
    {"messages", 5, RACE},
    {"messages", 6, CLEAN},
    {"pairs", 0, DATA},
    {"copy_rows", 0, CLEAN, "", 1, 64, 0, "fill_rows"},
    {"copy_rows", 1, REPORT, "not initialised", 1, 64, 0, "fill_rows"},
    {"copy_rows", 2, REPORT, "without fence_mbarrier_init", 1, 64, 0, "fill_rows"},
    {"copy_rows", 3, REPORT, "not initialised", 1, 64, 0, "fill_rows"},
    {"copy_rows", 4, REPORT, "multiples of 16", 1, 64, 0, "fill_rows"},
    {"copy_rows", 5, REPORT, "outside the block's shared memory", 1, 64, 0, "fill_rows"},
    {"copy_rows", 6, REPORT, "not in one memory", 1, 64, 0, "fill_rows"},
    {"copy_rows", 7, REPORT, "not in one memory", 1, 64, 0, "fill_rows"},
    {"copy_rows", 8, DATA, "", 1, 64, 0, "fill_rows"},
    {"copy_rows", 8, RACE, "", 1, 64, 0, "fill_rows"},
    {"copy_rows", 9, REPORT, "in flight", 1, 64, 0, "fill_rows"},
    {"copy_rows", 10, REPORT, "more arrivals", 1, 64, 0, "fill_rows"},
    {"copy_rows", 11, RACE, "", 1, 64, 0, "fill_rows"},
    {"copy_rows", 12, REPORT, "never committed", 1, 64, 0, "fill_rows"},
    {"copy_rows", 13, REPORT, "never waited", 1, 64, 0, "fill_rows"},
    {"copy_rows", 14, DATA, "", 1, 64, 0, "fill_rows"},
    {"copy_rows", 14, RACE, "", 1, 64, 0, "fill_rows"},
    {"forward_rows", 0, CLEAN},
    {"forward_rows", 1, RACE},
    {"forward_rows", 2, RACE},
    {"forward_rows", 3, BAD},
    {"forward_rows", 4, REPORT, "overwritten"},
    {"forward_rows", 5, REPORT, "initialised twice"},
    {"meet_all", 0, CLEAN, "", 4, 32, 4},
    {"meet_all", 1, DATA, "", 4, 32, 3, nullptr, false, true},
    {"meet_all", 2, REPORT, "livelock", 4, 32, 3},
    {"read_second", 0, CLEAN, "", 4, 32, 1, "write_first"},
    {"wait_in_vain", 0, CLEAN, "", 1, 32, 0, nullptr, false, true},
    {"put_rows", 0, CLEAN},
    {"put_rows", 1, RACE},
    {"put_rows", 2, DATA},
    {"put_rows", 2, RACE},
    {"put_rows", 3, DATA},
    {"put_rows", 4, DATA, "", 1, 64, 0, nullptr, true, true},
};

/// One world of a case.
struct World {
    const Case& test;
    RailhopShim* shim;
    std::vector<u8*> shared, secret;
    std::vector<u32> shared_id;

    World(const Case& test, u64 seed) : test(test) {
        // Ranks 0 and 1 share a node, rank 2 is on another one.
        ShimOptions options{seed, test.resident, std::getenv("TSAN_PER_WARP") != nullptr, 2, 0};
        shim = railhop_shim_new(&options);
        for (u32 rank = 0; rank < RANKS; ++rank) {
            for (auto* memories : {&shared, &secret}) {
                void* memory = nullptr;
                if (posix_memalign(&memory, 128, BYTES)) std::abort();
                std::memset(memory, 0, BYTES);
                memories->push_back((u8*)memory);
            }
            shared_id.push_back(railhop_shim_memory(shim, rank, shared[rank], BYTES, 1));
            railhop_shim_memory(shim, rank, secret[rank], BYTES, 0);
            railhop_shim_proxy(shim, rank, (uint64_t*)fifo(rank), CAPACITY, (uint64_t*)taken(rank), resolve, this);
        }
        if (test.lose) railhop_shim_lose(shim, (uint64_t*)shared[2]);
    }
    ~World() {
        railhop_shim_free(shim);
        for (u32 rank = 0; rank < RANKS; ++rank) std::free(shared[rank]), std::free(secret[rank]);
    }
    u64* fifo(u32 rank) { return (u64*)(shared[rank] + 60000 / 16 * 16); }
    u64* taken(u32 rank) { return (u64*)(shared[rank] + 62000 / 16 * 16); }
    u32* errors(u32 rank) { return (u32*)(secret[rank] + 64000); }

    static void resolve(void* ctx, uint32_t rank, uint64_t half0, uint64_t half1, ShimPosting* out) {
        World& world = *(World*)ctx;
        u64 i = half0 << 1 >> 1;
        if ((~half1 << 1 >> 1) != i) std::abort();
        *out = {.peer = 2, .queue = 0, .src = world.shared[rank] + 1024 + i % 4 * 1024,
                .dst = world.shared[2] + 1024 + i * 1024, .bytes = 1024, .word = (uint64_t*)world.shared[2],
                .value = i + 1, .completion = (uint64_t*)world.shared[rank], .completed = i + 1};
    }

    void launch(const char* kernel, u32 grid) {
        for (u32 rank = 0; rank < RANKS; ++rank) {
            Test p{rank, test.wrong, {}, {}, errors(rank), fifo(rank), taken(rank), CAPACITY};
            for (u32 r = 0; r < RANKS; ++r) p.shared[r] = shared[r], p.secret[r] = secret[r];
            if (railhop_shim_launch(shim, rank, 0, kernel, grid, test.threads, 8192, &p, sizeof p)) std::abort();
        }
    }

    /// Whether the run was clean; says what it was not.
    bool run() {
        if (test.before) launch(test.before, test.grid);
        launch(test.kernel, test.grid);
        if (railhop_shim_run(shim)) {
            std::printf("REPORT: %s\n", railhop_shim_report(shim));
            return false;
        }
        if (test.stalls != (*railhop_shim_stall(shim) != 0)) {
            std::printf("STALL: %s\n", railhop_shim_stall(shim));
            return false;
        }
        u32 wrong = 0;
        for (u32 rank = 0; rank < RANKS; ++rank) wrong += *errors(rank);
        if (wrong) std::printf("DATA: %u\n", wrong);
        if (!wrong && !std::strcmp(test.kernel, "put_rows") &&
            railhop_shim_traffic(shim, shared_id[2], SHIM_NIC_WRITTEN) != 24 * 1024) {
            std::printf("TRAFFIC\n");
            return false;
        }
        return wrong == 0;
    }
};

int run_case(const Case& test) {
    bool clean = true;
    for (u64 seed = 0; seed < (SHIM_TSAN ? 12 : 24) && clean; ++seed) clean = World(test, seed).run();
    return clean ? 0 : 1;
}

// ---- arithmetic against formulas that are plain to see

u16 bf16_by_search(float v) {
    if (std::isnan(v)) return 0x7FFF;
    u32 bits = std::bit_cast<u32>(v);
    u32 low = bits & 0xFFFF0000;
    double below = std::bit_cast<float>(low), above = std::bit_cast<float>(low + 0x10000);
    if (std::isinf(v)) return (u16)(bits >> 16);
    if (std::isinf(above)) above = std::copysign(std::ldexp(1.0, 128), v);
    double down = std::fabs(v - below), up = std::fabs(above - v);
    bool take_up = up < down || (up == down && (low >> 16 & 1));
    return (u16)((low >> 16) + take_up);
}

double e4m3_value(u32 code) {
    u32 exponent = code >> 3 & 15, fraction = code & 7;
    double v = exponent ? std::ldexp(8 + fraction, (int)exponent - 10) : std::ldexp(fraction, -9);
    return code & 0x80 ? -v : v;
}

u8 e4m3_by_search(float v) {
    if (std::isnan(v)) return 0x7F;
    u8 sign = std::signbit(v) ? 0x80 : 0;
    double magnitude = std::fabs((double)v);
    u32 best = 0;
    for (u32 code = 1; code <= 0x7E; ++code) {
        double distance = std::fabs(e4m3_value(code) - magnitude), least = std::fabs(e4m3_value(best) - magnitude);
        if (distance < least || (distance == least && code % 2 == 0)) best = code;
    }
    if (magnitude > 448) best = 0x7E;
    return (u8)(sign | best);
}

bool arithmetic() {
    u64 wrong = 0;
    auto check = [&](u32 bits) {
        float v = std::bit_cast<float>(bits);
        u32 halves = railhop::ptx::cvt_rn_bf16x2(-v, v);
        wrong += (halves & 0xFFFF) != bf16_by_search(v) || halves >> 16 != bf16_by_search(-v);
        u16 pair = railhop::ptx::cvt_rn_satfinite_e4m3x2(-v, v);
        wrong += (pair & 0xFF) != e4m3_by_search(v) || pair >> 8 != e4m3_by_search(-v);
    };
    // Every sign, exponent and upper fraction, with lower bits around each rounding boundary.
    for (u32 high = 0; high < 0x10000; ++high)
        for (u32 low : {0x0000u, 0x0001u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) check(high << 16 | low);
    using namespace railhop::ptx;
    volatile float a = 1 + 0x1p-12f, b = a, c = -(1 + 0x1p-11f);
    wrong += add_rn(mul_rn(a, b), c) != 0;  // a fused sum would give 2^-24
    wrong += div_rn(1, 3) != 0x1.555556p-2f;
    wrong += popc(~0ull) != 64 || ctz(8) != 3 || mov_b32(mov_f32(0x7FC01234)) != 0x7FC01234;
    if (wrong) std::printf("arithmetic: %llu wrong\n", wrong);
    return wrong == 0;
}

// ---- all cases

bool as_expected(const Case& test, int status, const std::string& output) {
    bool race = output.find("ThreadSanitizer: data race") != output.npos;
    bool bad = output.find("AddressSanitizer: ") != output.npos;
    switch (test.expected) {
        case CLEAN: return status == 0 && output.empty();
        case REPORT: return output.find("REPORT: ") != output.npos && output.find(test.text) != output.npos;
        case DATA: return output.find("DATA: ") != output.npos;
        case RACE: return race;
        case BAD: return bad;
    }
    return false;
}

bool run_all(const char* self) {
    u32 failed = !arithmetic(), done = 1, skipped = 0;
    for (size_t i = 0; i < CASES.size(); ++i) {
        const Case& test = CASES[i];
        if ((test.expected == RACE && !SHIM_TSAN) || (test.expected == BAD && !SHIM_ASAN) ||
            (test.expected == DATA && SHIM_TSAN && !test.text)) {
            ++skipped;
            continue;
        }
        std::string command = "timeout 60 " + std::string(self) + " " + std::to_string(i) + " 2>&1";
        FILE* pipe = popen(command.c_str(), "r");
        std::string output;
        char buffer[4096];
        while (size_t n = std::fread(buffer, 1, sizeof buffer, pipe)) output.append(buffer, n);
        int status = pclose(pipe);
        ++done;
        if (as_expected(test, status, output)) continue;
        ++failed;
        std::printf("FAILED: %s wrong=%u (case %zu): status %x, output:\n%.3000s\n", test.kernel, test.wrong, i, status,
                    output.c_str());
    }
    std::printf("%u checks, %u failed, %u need another flavour\n", done, failed, skipped);
    return failed == 0;
}

}  // namespace

int main(int count, char** arguments) {
    if (count == 1) return run_all(arguments[0]) ? 0 : 1;
    return run_case(CASES.at((size_t)std::atoi(arguments[1])));
}
