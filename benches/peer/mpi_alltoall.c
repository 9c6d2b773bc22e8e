// Side-by-side peer for railhop: MoE dispatch and combine on plain MPI, the way a framework
// without an all-to-all library does it.
//
//   plan      per-token destination ranks, MPI_Alltoall of counts, prefix sums
//   dispatch  pack by destination, MPI_Alltoallv, unpack into dense x / idx / weights
//   combine   MPI_Alltoallv of expert outputs back, f32 sum in ascending rank order, bf16
//
// Routing (reproducible by any other program): rank r owns one splitmix64 stream whose state
// starts at seed ^ (r * 0x9E3779B97F4A7C15). Tokens 0..T-1 consume it in order. For each token
// pool = [0, 1, .., E-1]; for j in 0..K: i = j + next() % (E - j), swap pool[i] and pool[j],
// topk_idx[j] = pool[j]. Then for j in 0..K: w[j] = f32((next() >> 40) + 1) * 2^-24, and every
// w[j] is divided by the f32 sum of the K weights, added in order of j.
// Experts are owned contiguously; the first E mod W ranks own one more.
#define _GNU_SOURCE
#include <getopt.h>
#include <mpi.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define GOLDEN 0x9E3779B97F4A7C15ull
#define MAX_RANKS 64  // destinations of a token are one 64-bit mask
#define WARMUPS 2
#define SUM_BLOCK 1024  // f32 accumulator of 4 KiB: stays in L1 next to the rows being added
#define HUGE_PAGE ((size_t)2 << 20)
#define COPY_BYTES ((size_t)64 << 20)

typedef uint16_t bf16;

typedef struct {
    int tokens, hidden, experts, topk, iters;
    uint64_t seed;
    bool json, split;
} Options;

typedef struct {
    Options opt;
    int rank, ranks;
    size_t row_bytes, meta_bytes;  // meta: topk_idx (int32 K), then weights (f32 K)
    MPI_Datatype row_type, meta_type, record_type;

    int *owner;  // expert -> rank
    bf16 *tokens;
    int32_t *topk_idx;
    float *topk_weight;

    // Plan. slot[] lists, token by token and by ascending destination rank, where each copy
    // of a token lies in the send order (destination rank, token).
    uint64_t *dest_mask;
    int *slot;
    int send_count[MAX_RANKS], send_start[MAX_RANKS], sent;
    int recv_count[MAX_RANKS], recv_start[MAX_RANKS], received;

    // Exchange buffers. Records are row then meta; --split sends rows and meta apart.
    char *send_records, *recv_records, *send_meta, *recv_meta;
    bf16 *x;  // received rows, by (source rank, source token)
    int32_t *x_idx;
    float *x_weight;
    bf16 *returned;  // expert outputs back home, in send order
    bf16 *combined;

    MPI_Comm copiers;  // ranks 0 and 1; null elsewhere
    char *copy_from, *copy_to;
} Job;

static void fail(const char *message) {
    fprintf(stderr, "mpi_alltoall: %s\n", message);
    MPI_Abort(MPI_COMM_WORLD, 2);
    exit(2);
}

static uint64_t next_random(uint64_t *state) {
    uint64_t z = (*state += GOLDEN);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// Huge pages spare both the copies and the kernel's page pinning; writing every byte takes
// the page faults out of the timed part.
static void *allocate(size_t bytes) {
    size_t rounded = (bytes + HUGE_PAGE) / HUGE_PAGE * HUGE_PAGE;
    void *memory = aligned_alloc(HUGE_PAGE, rounded);
    if (!memory) fail("out of memory");
    madvise(memory, rounded, MADV_HUGEPAGE);
    memset(memory, 0, rounded);
    return memory;
}

// ---- inputs -----------------------------------------------------------------------------

static void assign_experts(int *owner, int experts, int ranks) {
    int expert = 0;
    for (int rank = 0; rank < ranks; rank++) {
        int owned = experts / ranks + (rank < experts % ranks);
        for (int i = 0; i < owned; i++) owner[expert++] = rank;
    }
}

static void route_token(const Options *opt, uint64_t *state, int32_t *pool, int32_t *idx,
                        float *weight) {
    for (int e = 0; e < opt->experts; e++) pool[e] = e;
    for (int j = 0; j < opt->topk; j++) {
        int i = j + (int)(next_random(state) % (uint64_t)(opt->experts - j));
        idx[j] = pool[i];
        pool[i] = pool[j];  // pool[j] is never looked at again: half a swap is enough
    }
    float sum = 0;
    for (int j = 0; j < opt->topk; j++) {
        weight[j] = (float)((next_random(state) >> 40) + 1) * 0x1p-24f;
        sum += weight[j];
    }
    for (int j = 0; j < opt->topk; j++) weight[j] /= sum;
}

static void route_rank(const Options *opt, int rank, int32_t *idx, float *weight) {
    uint64_t state = opt->seed ^ ((uint64_t)rank * GOLDEN);
    int32_t *pool = allocate((size_t)opt->experts * sizeof *pool);
    for (int t = 0; t < opt->tokens; t++) {
        size_t at = (size_t)t * opt->topk;
        route_token(opt, &state, pool, idx + at, weight + at);
    }
    free(pool);
}

// Finite values of magnitude 0.5 to 2 with random sign and mantissa, the same on every rank
// for the same (rank, token), so that a receiver can check what it got.
static void fill_row(const Options *opt, int rank, int token, bf16 *row) {
    uint64_t state = ~opt->seed ^ ((uint64_t)rank << 40) ^ ((uint64_t)token << 16);
    uint64_t bits = 0;
    for (int h = 0; h < opt->hidden; h++, bits >>= 16) {
        if (h % 4 == 0) bits = next_random(&state);
        row[h] = (bf16)((bits & 0x80FF) | 0x3F00);
    }
}

static void make_inputs(Job *job) {
    const Options *opt = &job->opt;
    size_t picks = (size_t)opt->tokens * opt->topk;
    job->owner = allocate((size_t)opt->experts * sizeof(int));
    job->tokens = allocate(opt->tokens * job->row_bytes);
    job->topk_idx = allocate(picks * sizeof(int32_t));
    job->topk_weight = allocate(picks * sizeof(float));
    job->dest_mask = allocate((size_t)opt->tokens * sizeof(uint64_t));
    job->slot = allocate(picks * sizeof(int));
    job->combined = allocate(opt->tokens * job->row_bytes);
    assign_experts(job->owner, opt->experts, job->ranks);
    route_rank(opt, job->rank, job->topk_idx, job->topk_weight);
    for (int t = 0; t < opt->tokens; t++)
        fill_row(opt, job->rank, t, job->tokens + (size_t)t * opt->hidden);
}

static void make_types(Job *job) {
    job->row_bytes = (size_t)job->opt.hidden * sizeof(bf16);
    job->meta_bytes = (size_t)job->opt.topk * (sizeof(int32_t) + sizeof(float));
    MPI_Type_contiguous((int)job->row_bytes, MPI_BYTE, &job->row_type);
    MPI_Type_contiguous((int)job->meta_bytes, MPI_BYTE, &job->meta_type);
    MPI_Type_contiguous((int)(job->row_bytes + job->meta_bytes), MPI_BYTE, &job->record_type);
    MPI_Type_commit(&job->row_type);
    MPI_Type_commit(&job->meta_type);
    MPI_Type_commit(&job->record_type);
}

// The routing does not change between iterations, so sizes from the first plan are exact.
static void make_buffers(Job *job) {
    size_t sent = (size_t)job->sent, received = (size_t)job->received;
    size_t record_bytes = job->row_bytes + (job->opt.split ? 0 : job->meta_bytes);
    job->send_records = allocate(sent * record_bytes);
    if (job->opt.split) {
        job->send_meta = allocate(sent * job->meta_bytes);
        job->recv_meta = allocate(received * job->meta_bytes);
    } else {
        job->recv_records = allocate(received * record_bytes);
    }
    job->x = allocate(received * job->row_bytes);
    job->x_idx = allocate(received * job->opt.topk * sizeof(int32_t));
    job->x_weight = allocate(received * job->opt.topk * sizeof(float));
    job->returned = allocate(sent * job->row_bytes);

    int color = job->rank < 2 ? 0 : MPI_UNDEFINED;
    MPI_Comm_split(MPI_COMM_WORLD, color, job->rank, &job->copiers);
    if (job->copiers == MPI_COMM_NULL) return;
    job->copy_from = allocate(COPY_BYTES);
    job->copy_to = allocate(COPY_BYTES);
}

// ---- plan -------------------------------------------------------------------------------

static int prefix_sum(const int *count, int *start, int n) {
    int total = 0;
    for (int i = 0; i < n; i++) {
        start[i] = total;
        total += count[i];
    }
    return total;
}

static void plan(Job *job) {
    const int tokens = job->opt.tokens, topk = job->opt.topk;
    memset(job->send_count, 0, sizeof job->send_count);
    for (int t = 0; t < tokens; t++) {
        uint64_t mask = 0;
        for (int j = 0; j < topk; j++)
            mask |= 1ull << job->owner[job->topk_idx[(size_t)t * topk + j]];
        job->dest_mask[t] = mask;
        for (; mask; mask &= mask - 1) job->send_count[__builtin_ctzll(mask)]++;
    }
    MPI_Alltoall(job->send_count, 1, MPI_INT, job->recv_count, 1, MPI_INT, MPI_COMM_WORLD);
    job->sent = prefix_sum(job->send_count, job->send_start, job->ranks);
    job->received = prefix_sum(job->recv_count, job->recv_start, job->ranks);

    int cursor[MAX_RANKS], n = 0;
    memcpy(cursor, job->send_start, sizeof cursor);
    for (int t = 0; t < tokens; t++)
        for (uint64_t mask = job->dest_mask[t]; mask; mask &= mask - 1)
            job->slot[n++] = cursor[__builtin_ctzll(mask)]++;
}

// ---- dispatch ---------------------------------------------------------------------------

static void exchange(Job *job, const void *from, void *to, MPI_Datatype type) {
    MPI_Alltoallv(from, job->send_count, job->send_start, type, to, job->recv_count,
                  job->recv_start, type, MPI_COMM_WORLD);
}

// Token by token: a row is read from memory once and is in cache for its further copies.
static void pack(Job *job, char *rows, size_t row_stride, char *meta, size_t meta_stride) {
    const size_t topk = (size_t)job->opt.topk, half = job->meta_bytes / 2;
    const int *slot = job->slot;
    for (int t = 0; t < job->opt.tokens; t++) {
        const bf16 *row = job->tokens + (size_t)t * job->opt.hidden;
        for (int copies = __builtin_popcountll(job->dest_mask[t]); copies > 0; copies--) {
            size_t at = (size_t)*slot++;
            char *to = meta + at * meta_stride;
            memcpy(rows + at * row_stride, row, job->row_bytes);
            memcpy(to, job->topk_idx + (size_t)t * topk, half);
            memcpy(to + half, job->topk_weight + (size_t)t * topk, half);
        }
    }
}

static void unpack_meta(Job *job, size_t i, const char *meta) {
    const size_t half = job->meta_bytes / 2, at = i * (size_t)job->opt.topk;
    memcpy(job->x_idx + at, meta, half);
    memcpy(job->x_weight + at, meta + half, half);
}

static void dispatch_records(Job *job) {
    const size_t stride = job->row_bytes + job->meta_bytes;
    pack(job, job->send_records, stride, job->send_records + job->row_bytes, stride);
    exchange(job, job->send_records, job->recv_records, job->record_type);
    for (size_t i = 0; i < (size_t)job->received; i++) {
        const char *record = job->recv_records + i * stride;
        memcpy(job->x + i * job->opt.hidden, record, job->row_bytes);
        unpack_meta(job, i, record + job->row_bytes);
    }
}

// Rows arrive in their final order, so they can land in x with no unpacking copy, at the
// price of a second (small) exchange.
static void dispatch_split(Job *job) {
    pack(job, job->send_records, job->row_bytes, job->send_meta, job->meta_bytes);
    exchange(job, job->send_meta, job->recv_meta, job->meta_type);
    exchange(job, job->send_records, job->x, job->row_type);
    for (size_t i = 0; i < (size_t)job->received; i++)
        unpack_meta(job, i, job->recv_meta + i * job->meta_bytes);
}

static void dispatch(Job *job) { job->opt.split ? dispatch_split(job) : dispatch_records(job); }

// ---- combine ----------------------------------------------------------------------------

static inline float to_f32(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// Round to nearest even; the sums are finite.
static inline bf16 to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bf16)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

static void sum_block(const bf16 *returned, size_t hidden, const int *slot, int copies,
                      int length, bf16 *restrict out) {
    float sum[SUM_BLOCK];
    const bf16 *first = returned + (size_t)slot[0] * hidden;
    for (int h = 0; h < length; h++) sum[h] = to_f32(first[h]);
    for (int c = 1; c < copies; c++) {
        const bf16 *row = returned + (size_t)slot[c] * hidden;
        for (int h = 0; h < length; h++) sum[h] += to_f32(row[h]);
    }
    for (int h = 0; h < length; h++) out[h] = to_bf16(sum[h]);
}

static void combine(Job *job) {
    MPI_Alltoallv(job->x, job->recv_count, job->recv_start, job->row_type, job->returned,
                  job->send_count, job->send_start, job->row_type, MPI_COMM_WORLD);
    const int hidden = job->opt.hidden, *slot = job->slot;
    for (int t = 0; t < job->opt.tokens; t++) {
        int copies = __builtin_popcountll(job->dest_mask[t]);
        bf16 *out = job->combined + (size_t)t * hidden;
        for (int h = 0; h < hidden; h += SUM_BLOCK) {
            int length = hidden - h < SUM_BLOCK ? hidden - h : SUM_BLOCK;
            sum_block(job->returned + h, (size_t)hidden, slot, copies, length, out + h);
        }
        slot += copies;
    }
}

static void whole_iteration(Job *job) {
    plan(job);
    dispatch(job);
    combine(job);
}

// ---- verification -----------------------------------------------------------------------

static uint64_t destinations(const Job *job, const int32_t *idx) {
    uint64_t mask = 0;
    for (int j = 0; j < job->opt.topk; j++) mask |= 1ull << job->owner[idx[j]];
    return mask;
}

// Rebuilds what every source should have sent here and compares it in (source, token) order.
static bool received_is_right(const Job *job) {
    const Options *opt = &job->opt;
    const size_t topk = (size_t)opt->topk, half = job->meta_bytes / 2;
    int32_t *idx = allocate(opt->tokens * half);
    float *weight = allocate(opt->tokens * half);
    bf16 *row = allocate(job->row_bytes);
    bool right = true;
    size_t n = 0;
    for (int source = 0; source < job->ranks; source++) {
        route_rank(opt, source, idx, weight);
        for (int t = 0; t < opt->tokens && right; t++) {
            if (!(destinations(job, idx + t * topk) >> job->rank & 1)) continue;
            fill_row(opt, source, t, row);
            right = n < (size_t)job->received &&
                    !memcmp(job->x + n * opt->hidden, row, job->row_bytes) &&
                    !memcmp(job->x_idx + n * topk, idx + t * topk, half) &&
                    !memcmp(job->x_weight + n * topk, weight + t * topk, half);
            n++;
        }
    }
    free(idx);
    free(weight);
    free(row);
    return right && n == (size_t)job->received;
}

// Independent of to_bf16: the nearer of the two neighbours, the even one on a tie.
static bf16 nearest_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bf16 toward_zero = (bf16)(bits >> 16), away = toward_zero + 1;
    double below = (double)value - to_f32(toward_zero), above = (double)to_f32(away) - value;
    if (value < 0) below = -below, above = -above;
    if (below == above) return toward_zero & 1 ? away : toward_zero;
    return below < above ? toward_zero : away;
}

// Experts return their input, so a token's result is its row added once per destination.
static bool combined_is_right(const Job *job) {
    const size_t hidden = (size_t)job->opt.hidden;
    for (size_t i = 0; i < job->opt.tokens * hidden; i++) {
        size_t t = i / hidden;
        uint64_t mask = destinations(job, job->topk_idx + t * job->opt.topk);
        float sum = to_f32(job->tokens[i]);
        for (mask &= mask - 1; mask; mask &= mask - 1) sum += to_f32(job->tokens[i]);
        if (job->combined[i] != nearest_bf16(sum)) return false;
    }
    return true;
}

static bool verified_everywhere(const Job *job) {
    int right = received_is_right(job) && combined_is_right(job), all = 0;
    if (!right) fprintf(stderr, "mpi_alltoall: rank %d: wrong result\n", job->rank);
    MPI_Allreduce(&right, &all, 1, MPI_INT, MPI_LAND, MPI_COMM_WORLD);
    return all;
}

// ---- memcpy rate ------------------------------------------------------------------------

// An MPI_Barrier would poll and take the cores from the ranks that are being measured.
static void sleeping_barrier(void) {
    MPI_Request request;
    int done = 0;
    MPI_Ibarrier(MPI_COMM_WORLD, &request);
    for (;;) {
        MPI_Test(&request, &done, MPI_STATUS_IGNORE);
        if (done) return;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

// Ranks 0 and 1 copy at the same time while the others sleep. Returns this rank's rate in
// GB/s, reads plus writes; 0 on a rank that does not copy.
static double copy_rate(const Job *job) {
    double rate = 0;
    sleeping_barrier();
    if (job->copiers != MPI_COMM_NULL) {
        MPI_Barrier(job->copiers);
        double start = MPI_Wtime();
        memcpy(job->copy_to, job->copy_from, COPY_BYTES);
        rate = 2.0 * COPY_BYTES / (MPI_Wtime() - start) / 1e9;
    }
    sleeping_barrier();
    return rate;
}

// ---- timing and report ------------------------------------------------------------------

enum { PLAN, DISPATCH, COMBINE, TOTAL, PHASES };
static const char *const phase_name[PHASES] = {"plan", "dispatch", "combine", "total"};
static void (*const phase_run[PHASES])(Job *) = {plan, dispatch, combine, whole_iteration};

// On rank 0, samples[phase * iters + i] becomes the time of the slowest rank in ms, and
// rates[i] the memcpy rate of both copiers, taken in every iteration because the rate of a
// shared machine drifts within a run.
static void measure(Job *job, double *samples, double *rates) {
    const int iters = job->opt.iters;
    double *my_samples = allocate((size_t)PHASES * iters * sizeof(double));
    double *my_rates = allocate((size_t)iters * sizeof(double));
    for (int i = -WARMUPS; i < iters; i++) {
        for (int phase = 0; phase < PHASES; phase++) {
            MPI_Barrier(MPI_COMM_WORLD);
            double start = MPI_Wtime();
            phase_run[phase](job);
            if (i >= 0) my_samples[phase * iters + i] = (MPI_Wtime() - start) * 1e3;
        }
        double rate = copy_rate(job);
        if (i >= 0) my_rates[i] = rate;
    }
    MPI_Reduce(my_samples, samples, PHASES * iters, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    MPI_Reduce(my_rates, rates, iters, MPI_DOUBLE, MPI_SUM, 0, MPI_COMM_WORLD);
    free(my_samples);
    free(my_rates);
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(const double *sorted, int n) {
    return (sorted[(n - 1) / 2] + sorted[n / 2]) / 2;
}

static double p99(const double *sorted, int n) { return sorted[(n * 99 + 99) / 100 - 1]; }

static void report(const Job *job, double *samples, double *rates, double per_token) {
    const Options *opt = &job->opt;
    const int n = opt->iters;
    for (int p = 0; p < PHASES; p++) qsort(samples + p * n, n, sizeof *samples, ascending);
    qsort(rates, n, sizeof *rates, ascending);
    double rate = job->ranks * (double)opt->tokens / (median(samples + TOTAL * n, n) / 1e3);
    const char *shape = opt->json ? "{\"ranks\":%d,\"tokens\":%d,\"hidden\":%d,\"experts\":%d,"
                                    "\"topk\":%d"
                                  : "%d ranks, %d tokens x %d, %d experts, top-%d\n";
    const char *phase = opt->json ? ",\"%s\":{\"median_ms\":%.4f,\"p99_ms\":%.4f}"
                                  : "%-9s median %9.3f ms   p99 %9.3f ms\n";
    const char *tail = opt->json ? ",\"tokens_per_s\":%.1f,\"destinations_per_token\":%.4f,"
                                   "\"memcpy_gbs\":%.2f}\n"
                                 : "%.0f tokens/s, %.2f destinations per token, memcpy %.1f GB/s\n";
    printf(shape, job->ranks, opt->tokens, opt->hidden, opt->experts, opt->topk);
    for (int p = 0; p < PHASES; p++)
        printf(phase, phase_name[p], median(samples + p * n, n), p99(samples + p * n, n));
    printf(tail, rate, per_token, median(rates, n));
}

static double destinations_per_token(const Job *job) {
    double sent = job->sent, sum = 0;
    MPI_Reduce(&sent, &sum, 1, MPI_DOUBLE, MPI_SUM, 0, MPI_COMM_WORLD);
    return sum / ((double)job->ranks * job->opt.tokens);
}

// ---- command line -----------------------------------------------------------------------

static int positive(const char *text) {
    char *end;
    long value = strtol(text, &end, 10);
    if (*end || value < 1 || value > 1 << 20) fail("options take whole numbers of at least 1");
    return (int)value;
}

static Options parse(int argc, char **argv) {
    Options opt = {.tokens = 512, .hidden = 7168, .experts = 64, .topk = 8, .iters = 20, .seed = 1};
    static const struct option known[] = {
        {"tokens", required_argument, NULL, 't'}, {"hidden", required_argument, NULL, 'h'},
        {"experts", required_argument, NULL, 'e'}, {"topk", required_argument, NULL, 'k'},
        {"iters", required_argument, NULL, 'i'}, {"seed", required_argument, NULL, 's'},
        {"split", no_argument, NULL, 'p'}, {"json", no_argument, NULL, 'j'},
        {0}};
    for (int c; (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (c) {
            case 't': opt.tokens = positive(optarg); break;
            case 'h': opt.hidden = positive(optarg); break;
            case 'e': opt.experts = positive(optarg); break;
            case 'k': opt.topk = positive(optarg); break;
            case 'i': opt.iters = positive(optarg); break;
            case 's': opt.seed = strtoull(optarg, NULL, 0); break;
            case 'p': opt.split = true; break;
            case 'j': opt.json = true; break;
            default: fail("usage: --tokens T --hidden H --experts E --topk K --iters I "
                          "--seed S [--split] [--json]");
        }
    }
    if (optind != argc || opt.topk > opt.experts) fail("stray argument, or topk above experts");
    return opt;
}

int main(int argc, char **argv) {
    static Job job;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &job.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &job.ranks);
    if (job.ranks > MAX_RANKS) fail("at most 64 ranks");
    job.opt = parse(argc, argv);
    make_types(&job);
    make_inputs(&job);
    plan(&job);
    make_buffers(&job);

    double *samples = allocate((size_t)PHASES * job.opt.iters * sizeof(double));
    double *rates = allocate((size_t)job.opt.iters * sizeof(double));
    measure(&job, samples, rates);
    bool right = verified_everywhere(&job);
    double per_token = destinations_per_token(&job);
    if (right && job.rank == 0) report(&job, samples, rates, per_token);
    MPI_Finalize();
    return right ? 0 : 1;
}
