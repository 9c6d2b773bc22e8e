// Tiny kernels for the shim's own test. Most come in two: `p.wrong` 0 is right, any other value plants one mistake that
// the shim must report (selftest.cpp says how).
#include "../../ptx.cuh"

namespace railhop {

struct Test {
    u32 rank;
    u32 wrong;
    u8* shared[3];  // by rank; rank 2 may be on another node
    u8* secret[3];  // memories of one rank only
    u32* errors;    // in own secret memory
    u64* fifo;
    u64* taken;
    u32 capacity;
};

using namespace ptx;

DEV void expect(const Test& p, bool holds) {
    if (!holds) red_add_relaxed_gpu(p.errors, 1);
}

/// Waits for at most 100 virtual seconds.
DEV bool wait_for(const u64* word, u64 value) {
    u64 start = globaltimer();
    while (ld_acquire_sys(word) != value) {
        if (globaltimer() - start > 100'000'000'000ull) return false;
        nanosleep(200);
    }
    return true;
}

/// Fills 1 KiB with what only this seed gives.
DEV void fill(u8* at, u32 seed) {
    for (u32 i = 0; i < 256; ++i) ((u32*)at)[i] = seed * 1000 + i;
}
DEV bool filled(const u8* at, u32 seed) {
    for (u32 i = 0; i < 256; ++i)
        if (((const u32*)at)[i] != seed * 1000 + i) return false;
    return true;
}

}  // namespace railhop

using namespace railhop;
using namespace railhop::ptx;

// ---- strong accesses: one lane of rank 0

KERNEL(strong, Test) {
    if (p.rank || ctaid() || tid()) return;
    u64 outside = 0;
    switch (p.wrong) {
        case 1: st_release_sys(&outside, 1); break;
        case 2: st_release_sys((u64*)p.secret[1], 1); break;
        case 3: st_release_sys((u64*)p.shared[2], 1); break;
        case 4: st_release_gpu((u64*)p.shared[0], 1); break;
        case 5: st_release_sys((u64*)(p.shared[0] + 4), 1); break;
        case 6: ld_acquire_gpu((u32*)p.shared[1]); break;
        case 7: st_relaxed_sys_v2((u64*)(p.shared[0] + 8), 1, 2); break;
    }
    u64* word = (u64*)p.secret[0] + 8;
    st_release_gpu(word, 5);
    expect(p, atom_add_relaxed_gpu(word, 3) == 5);
    red_min_relaxed_gpu(word, 9);
    expect(p, ld_acquire_sys(word) == 8);
    red_min_relaxed_gpu(word, 2);
    expect(p, ld_acquire_sys(word) == 2);
    u32* small = (u32*)(word + 1);
    st_release_sys(small, 6);
    expect(p, atom_add_acq_rel_gpu(small, 1) == 6);
    expect(p, atom_cas_relaxed_gpu(small, 6, 9) == 7);
    expect(p, atom_cas_relaxed_gpu(small, 7, 9) == 7);
    expect(p, ld_relaxed_sys(small) == 9);
    st_release_sys((u64*)p.shared[1] + 8, 4);
}

// ---- collectives: one block of two warps

KERNEL(collectives, Test) {
    u32 lane = tid() % 32;
    u32 even = 0x55555555, odd = ~even;
    u32 mine = lane % 2 ? odd : even;
    for (u32 round = 0; round < 10; ++round) {
        expect(p, shfl_sync_idx(ALL, lane * 3, (lane + round) & 31) == ((lane + round) & 31) * 3);
        expect(p, shfl_sync_up(ALL, lane, 4) == (lane < 4 ? lane : lane - 4));
        expect(p, shfl_sync_bfly(ALL, lane, 8) == (lane ^ 8));
        expect(p, vote_sync_ballot(ALL, lane % 3 == 0) == 0x49249249);
        expect(p, redux_sync_min(mine, lane + 7) == 7 + lane % 2);
        expect(p, redux_sync_max(mine, lane) == 30 + lane % 2);
        expect(p, redux_sync_add(mine, lane) == (lane % 2 ? 256 : 240));
        expect(p, redux_sync_or(ALL, 1u << lane) == ALL);
        expect(p, match_any_sync(ALL, lane % 2) == mine);
        bar_warp_sync();
    }
    if (lane == 31) {
        if (p.wrong == 1) shfl_sync_idx(1, 0, 0);
        if (p.wrong == 2) bar_warp_sync(0x80000001);
        if (p.wrong == 3) vote_sync_ballot(ALL, true);
        if (p.wrong == 6) return;
    }
    if (p.wrong == 4) shfl_sync_idx(mine, 0, lane ^ 1);
    if (p.wrong == 5 && lane == 0) return;
    if (p.wrong == 5) shfl_sync_idx(ALL, 0, 0);
    bar_warp_sync();  // lanes that have exited are not waited for
}

// ---- named barriers: one block of 64

KERNEL(barriers, Test) {
    u32* at = (u32*)dynamic_smem();
    for (u32 round = 0; round < 10; ++round) {
        at[tid()] = round * 100 + tid();
        if (p.wrong != 1) bar_sync(1, 64);
        expect(p, at[63 - tid()] == round * 100 + 63 - tid());
        bar_sync(2, 64);
    }
    if (p.wrong == 2) bar_sync(3, tid() % 2 ? 32 : 64);
    if (p.wrong == 3) bar_sync(3, 48);
    if (p.wrong == 4 && tid() != 5) bar_sync(3, 64);
    if (p.wrong == 5) bar_sync(16, 64);
}

// ---- messages: rank 0 writes rank 1's memory with generic stores and releases a word there

KERNEL(messages, Test) {
    if (ctaid()) return;
    u8* data = p.shared[1] + 1024;
    u64* word = (u64*)p.shared[1];
    u32 lane = tid() % 32;
    if (tid() >= 32) return;
    if (p.rank == 0) {
        ((u32*)data)[lane] = lane * 7;
        if (p.wrong != 1) bar_warp_sync();
        if (lane == 0 && p.wrong == 2) st_relaxed_sys_v2(word, 1, 1);
        if (lane == 0 && p.wrong == 3) fence_acq_rel_gpu(), st_relaxed_sys_v2(word, 1, 1);
        if (lane == 0 && p.wrong == 0) fence_acq_rel_sys(), st_relaxed_sys_v2(word, 1, 1);
        if (lane == 0 && (p.wrong == 1 || p.wrong > 3)) st_release_sys(word, 1);
    } else if (p.rank == 1) {
        if (lane == 0) {
            if (p.wrong == 4)
                while (ld_relaxed_sys((u32*)word) != 1) nanosleep(100);
            else
                expect(p, wait_for(word, 1));
        }
        if (p.wrong == 5)
            shfl_sync_idx(ALL, 0, 0);
        else
            bar_warp_sync();
        expect(p, ((u32*)data)[31 - lane] == (31 - lane) * 7);
    }
}

/// Rank 0 stores pairs, rank 1 looks at them: `errors` counts the times it saw half a pair.
KERNEL(pairs, Test) {
    if (ctaid() || tid()) return;
    u64* pair = (u64*)p.shared[1] + 2;
    if (p.rank == 0) {
        for (u64 i = 1; i <= 50; ++i) st_relaxed_sys_v2(pair, i, i);
    } else if (p.rank == 1) {
        for (u64 second = 0; second != 50;) {
            u64 first = ld_acquire_sys(pair);
            second = ld_acquire_sys(pair + 1);
            expect(p, first >= second);
        }
    }
}

// ---- bulk copies: each block moves rows from its rank's secret memory to the next rank's shared memory

constexpr u32 ROW = 1024, ROWS = 12, STAGES = 2;

KERNEL(fill_rows, Test) {
    for (u32 row = tid(); row < ROWS; row += ntid()) fill(p.secret[p.rank] + 1024 + row * ROW, p.rank * 100 + row);
}

KERNEL(copy_rows, Test) {
    if (ctaid() || tid() >= 32 || p.rank > 1) return;
    u32 lane = tid();
    u8* smem = dynamic_smem();
    u64* bars = (u64*)(smem + STAGES * ROW);
    if (lane == 0) {
        for (u32 i = 0; i < STAGES; ++i)
            if (p.wrong != 1) mbarrier_init(bars + i, 1);
        if (p.wrong != 2) fence_mbarrier_init();
    }
    if (p.wrong != 3) bar_warp_sync();
    u8* from = p.secret[p.rank] + 1024;
    u8* to = p.shared[1 - p.rank] + 1024;
    if (p.wrong == 4) from += 8;
    if (p.wrong == 5 && lane == 0) cp_async_bulk_s2g(to, smem + 8192 - ROW + 16, ROW);
    if (p.wrong == 6 && lane == 0) cp_async_bulk_s2g(p.shared[0] + 65536 - 16, smem, ROW);
    if (p.wrong == 7 && lane == 0) cp_async_bulk_s2g(p.secret[1 - p.rank], smem, ROW);
    for (u32 row = 0; row < ROWS; ++row) {
        u32 i = row % STAGES, parity = row / STAGES % 2;
        u8* stage = smem + i * ROW;
        if (lane == 0) {
            if (p.wrong != 8) cp_async_bulk_wait_group_read<STAGES - 1>();
            mbarrier_arrive_expect_tx(bars + i, ROW);
            cp_async_bulk_g2s(stage, from + row * ROW, ROW, bars + i);
        }
        if (p.wrong == 9 && row == ROWS - 1) return;
        if (p.wrong != 10)
            while (!mbarrier_try_wait_parity(bars + i, parity)) {}
        // A touch through the generic proxy by all lanes.
        for (u32 k = lane; k < 256; k += 32) ((u32*)stage)[k] += 5;
        if (p.wrong != 11) fence_proxy_async();
        bar_warp_sync();
        if (lane == 0) {
            cp_async_bulk_s2g(to + row * ROW, stage, ROW);
            if (p.wrong != 12 || row != ROWS - 1) cp_async_bulk_commit_group();
        }
    }
    if (lane == 0) {
        if (p.wrong == 14) cp_async_bulk_wait_group_read<0>();
        else if (p.wrong != 13) cp_async_bulk_wait_group<0>();
        st_release_sys((u64*)p.shared[1 - p.rank], 1);
        expect(p, wait_for((u64*)p.shared[p.rank], 1));
    }
    bar_warp_sync();
    for (u32 row = lane; row < ROWS; row += 32) {
        const u32* got = (const u32*)(p.shared[p.rank] + 1024 + row * ROW);
        for (u32 k = 0; k < 256; ++k) expect(p, got[k] == ((1 - p.rank) * 100 + row) * 1000 + k + 5);
    }
}

/// Rank 0 writes rows into rank 1's memory with generic stores, rank 1 copies them on with bulk copies.
KERNEL(forward_rows, Test) {
    if (ctaid() || tid() || p.rank > 1) return;
    u8* rows = p.shared[1] + 1024;
    u64* word = (u64*)p.shared[1];
    if (p.rank == 0) {
        fill(rows, 3);
        st_release_sys(word, 1);
        return;
    }
    u8* smem = dynamic_smem();
    u64* bar = (u64*)(smem + ROW);
    mbarrier_init(bar, 1);
    fence_mbarrier_init();
    if (p.wrong == 2) fence_proxy_async();
    expect(p, wait_for(word, 1));
    if (p.wrong == 0) fence_proxy_async();
    mbarrier_arrive_expect_tx(bar, ROW);
    cp_async_bulk_g2s(smem, rows, ROW, bar);
    while (!mbarrier_try_wait_parity(bar, 0)) {}
    expect(p, filled(smem, 3));
    if (p.wrong == 3) ((u32*)smem)[4096] = 1;
    if (p.wrong == 4) *bar = 0;
    if (p.wrong == 4) mbarrier_arrive_expect_tx(bar, 0);
    if (p.wrong == 5) mbarrier_init(bar, 1);
}

// ---- streams and residency

/// Every block counts itself and waits for all: needs as many places as blocks.
KERNEL(meet_all, Test) {
    if (tid()) return;
    u32* count = (u32*)p.secret[p.rank] + 16;
    atom_add_acq_rel_gpu(count, 1);
    if (p.wrong == 2)
        while (ld_acquire_gpu(count) != nctaid()) {}
    u64 start = globaltimer();
    while (ld_acquire_gpu(count) != nctaid())
        if (globaltimer() - start > 100'000'000'000ull) return expect(p, false);
}

KERNEL(write_first, Test) { ((u32*)(p.secret[p.rank] + 1024))[ctaid() * ntid() + tid()] = tid(); }
KERNEL(read_second, Test) {
    u32 other = (ctaid() + 1) % nctaid();
    expect(p, ((u32*)(p.secret[p.rank] + 1024))[other * ntid() + tid()] == tid());
}

/// Nobody ever writes the word.
KERNEL(wait_in_vain, Test) {
    if (ctaid() == 0 && tid() == 0 && p.rank == 0) expect(p, !wait_for((u64*)p.shared[0], 1));
}

// ---- proxy and NIC: rank 0 puts rows into rank 2's memory, through a FIFO shorter than the number of rows

DEV void command(const Test& p, u64 index, u64 what) {
    u64 phase = (index / p.capacity) & 1 ? 0 : 1ull << 63;
    u64 start = globaltimer();
    while (index - ld_acquire_sys(p.taken) >= p.capacity)
        if (globaltimer() - start > 100'000'000'000ull) return expect(p, false);
    if (p.wrong != 1) fence_acq_rel_sys();
    st_relaxed_sys_v2(p.fifo + 2 * (index % p.capacity), what | phase, (~what & ~(1ull << 63)) | phase);
}

KERNEL(put_rows, Test) {
    if (ctaid() || tid() || p.rank == 1) return;
    constexpr u32 PUTS = 24, SLOTS = 4;
    if (p.rank == 0) {
        for (u32 i = 0; i < PUTS; ++i) {
            // The source slot is free again when the put that used it is complete.
            if (i >= SLOTS && p.wrong != 2) {
                u64 start = globaltimer();
                while (ld_acquire_sys((u64*)p.shared[0]) < i + 1 - SLOTS)
                    if (globaltimer() - start > 100'000'000'000ull) return expect(p, false);
            }
            fill(p.shared[0] + 1024 + i % SLOTS * ROW, i);
            command(p, i, i);
        }
        expect(p, wait_for((u64*)p.shared[0], PUTS));
    } else {
        for (u32 i = 0; i < PUTS; ++i) {
            u64 start = globaltimer();
            while (ld_acquire_sys((u64*)p.shared[2]) < i + 1)
                if (globaltimer() - start > 200'000'000'000ull) return expect(p, false);
            if (p.wrong == 3) i = PUTS - 1;
            expect(p, filled(p.shared[2] + 1024 + i * ROW, i));
        }
    }
}
