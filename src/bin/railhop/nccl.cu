// The kernels of the NCCL baseline. Rows are BF16, and vectors of 16 bytes; every array of ranks is in rank order.

typedef unsigned int u32;
typedef unsigned long long u64;

// Block d finds the tokens of rank d, in order: their list [tokens], counts[d] of it used, and for each token its
// place in the list, slots[token, d], or -1.
extern "C" __global__ void count(const long long* topk_idx, const u32* owner, u32 tokens, u32 topk, u32* lists,
                                 int* slots, u32* counts) {
    __shared__ u32 in_warp[32];
    const u32 target = blockIdx.x, ranks = gridDim.x;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 found = 0;
    for (u32 first = 0; first < tokens; first += blockDim.x) {
        const u32 token = first + threadIdx.x;
        bool wanted = false;
        for (u32 k = 0; token < tokens && k < topk; k++)
            wanted |= owner[topk_idx[(u64)token * topk + k]] == target;
        const u32 votes = __ballot_sync(0xffffffffu, wanted);
        if (lane == 0) in_warp[warp] = __popc(votes);
        __syncthreads();
        u32 at = found + __popc(votes & ((1u << lane) - 1));
        for (u32 w = 0; w < blockDim.x / 32; w++) {
            if (w < warp) at += in_warp[w];
            found += in_warp[w];
        }
        if (wanted) lists[(u64)target * tokens + at] = token;
        if (token < tokens) slots[(u64)token * ranks + target] = wanted ? (int)at : -1;
        __syncthreads();
    }
    if (threadIdx.x == 0) counts[target] = found;
}

// Block (n, d) copies the n-th token of rank d, with its experts and weights, to its place in the order of sending.
extern "C" __global__ void pack(const uint4* x, const long long* topk_idx, const float* topk_weights,
                                const u32* lists, const u32* counts, u32 tokens, u32 topk, u32 vectors,
                                uint4* rows, u32* meta) {
    const u32 n = blockIdx.x, target = blockIdx.y;
    if (n >= counts[target]) return;
    u64 to = n;
    for (u32 rank = 0; rank < target; rank++) to += counts[rank];
    const u64 token = lists[(u64)target * tokens + n];
    for (u32 i = threadIdx.x; i < vectors; i += blockDim.x) rows[to * vectors + i] = x[token * vectors + i];
    for (u32 k = threadIdx.x; k < topk; k += blockDim.x) {
        meta[to * 2 * topk + k] = (u32)topk_idx[token * topk + k];
        meta[to * 2 * topk + topk + k] = __float_as_uint(topk_weights[token * topk + k]);
    }
}

static __device__ u32 rounded(float sum) {
    const u32 bits = __float_as_uint(sum);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static __device__ void add(float* sums, u32 pair) {
    sums[0] += __uint_as_float(pair << 16);
    sums[1] += __uint_as_float(pair & 0xffff0000u);
}

static __device__ u32 packed(const float* sums) { return rounded(sums[0]) | rounded(sums[1]) << 16; }

// Block t adds the rows that have come back for token t, in rank order.
extern "C" __global__ void sum(const uint4* returned, const int* slots, const u32* counts, u32 ranks, u32 vectors,
                               uint4* out) {
    __shared__ u64 rows[32];  // a token has at most 32 experts
    __shared__ u32 copies;
    const u64 token = blockIdx.x;
    if (threadIdx.x == 0) {
        u64 start = 0;
        u32 found = 0;
        for (u32 rank = 0; rank < ranks; start += counts[rank++]) {
            const int slot = slots[token * ranks + rank];
            if (slot >= 0) rows[found++] = start + slot;
        }
        copies = found;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < vectors; i += blockDim.x) {
        float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (u32 copy = 0; copy < copies; copy++) {
            const uint4 row = returned[rows[copy] * vectors + i];
            add(sums, row.x);
            add(sums + 2, row.y);
            add(sums + 4, row.z);
            add(sums + 6, row.w);
        }
        out[token * vectors + i] = make_uint4(packed(sums), packed(sums + 2), packed(sums + 4), packed(sums + 6));
    }
}
