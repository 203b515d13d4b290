/* The library's face: which instruction set is used, torch's threads, and the exported functions that share rows among them.
 *
 * Threads come from the OpenMP runtime that torch itself calls: its entry points arrive as addresses, so that there is one pool and not two,
 * and this library needs no OpenMP to be built. Without them everything runs on the calling thread.
 */
#include <stdatomic.h>
#include <string.h>

#include "team.h"

#if defined(HAS_DOT_KERNELS) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif
#if defined(HAS_AVX_VNNI_KERNELS)
#include <cpuid.h>
#endif
#if defined(HAS_AMX_KERNELS)
#include <sys/syscall.h>
#include <unistd.h>
#endif

const struct kernels *native_kernels = NULL;

typedef void (*parallel_entry)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
typedef int (*thread_number_entry)(void);
static parallel_entry parallel = NULL;
static thread_number_entry thread_number = NULL, team_size = NULL;

EXPORTED int native_abi(void) { return NATIVE_ABI; }

/* The first 16 hex digits of the SHA-256 of the sources, in order of their names. */
#ifndef NATIVE_SOURCES
#define NATIVE_SOURCES ""
#endif
EXPORTED const char *native_sources(void) { return NATIVE_SOURCES; }

/* GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the runtime to use, or NULL for one thread. */
EXPORTED void native_use_threads(void *parallel_address, void *thread_number_address, void *team_size_address) {
    parallel = (parallel_entry)parallel_address;
    thread_number = (thread_number_entry)thread_number_address;
    team_size = (thread_number_entry)team_size_address;
}

#if defined(HAS_AVX_VNNI_KERNELS)
static int has_avx_vnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}
#endif

#if defined(HAS_AMX_KERNELS)
/* Whether the processor has tiles and the system lets this process use them: it saves 8 KB more of a thread, but only where it was asked to
 * (arch_prctl's ARCH_REQ_XCOMP_PERM for the state component of tile data). */
static int may_use_tiles(void) {
    unsigned a, b, c, d;
    const unsigned bfloat16 = 1u << 22, tiles = 1u << 24, int8 = 1u << 25;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bfloat16 | tiles | int8)) != (bfloat16 | tiles | int8)) return 0;
    return __builtin_cpu_supports("avx512bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif

#if defined(HAS_DOT_KERNELS)
/* Whether the processor has dot products of bytes: of Linux it is asked, elsewhere it is what the compiler was told. */
static int has_dots(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__ARM_FEATURE_DOTPROD)
    return 1;
#else
    return 0;
#endif
}
#endif

enum level { BASELINE = 0, AVX2 = 1, AVX_VNNI = 2, AVX512 = 3, AMX = 4, DOT_PRODUCTS = 5 };

/* The best that this machine can run. */
static enum level best_level(void) {
#if defined(HAS_X86_KERNELS)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return BASELINE;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vnni")) {
#if defined(HAS_AVX_VNNI_KERNELS)
        if (has_avx_vnni()) return AVX_VNNI;
#endif
        return AVX2;
    }
#if defined(HAS_AMX_KERNELS)
    if (may_use_tiles()) return AMX;
#endif
    return AVX512;
#elif defined(HAS_DOT_KERNELS)
    return has_dots() ? DOT_PRODUCTS : BASELINE;
#else
    return BASELINE;
#endif
}

/* Use the best kernels up to `level`, as binding.py counts them, and give their name. */
EXPORTED const char *native_choose(int level) {
    int best = best_level();
    level = level < best ? level : best;
    native_kernels = &kernels_baseline;
#if defined(HAS_X86_KERNELS)
    if (level >= AVX2) native_kernels = &kernels_avx2;
#if defined(HAS_AVX_VNNI_KERNELS)
    if (level == AVX_VNNI && has_avx_vnni()) native_kernels = &kernels_avxvnni;
#endif
    if (level >= AVX512) native_kernels = &kernels_avx512;
#if defined(HAS_AMX_KERNELS)
    if (level == AMX) native_kernels = &kernels_amx;
#endif
#elif defined(HAS_DOT_KERNELS)
    if (level == DOT_PRODUCTS) native_kernels = &kernels_dotprod;
#endif
    return native_kernels->name;
}

struct tasks {
    native_task task;
    void *context;
    int64_t count;
    atomic_llong next;
};

static void work(void *data) {
    struct tasks *tasks = data;
    int thread = thread_number();
    for (;;) {
        int64_t index = atomic_fetch_add_explicit(&tasks->next, 1, memory_order_relaxed);
        if (index >= tasks->count) return;
        tasks->task(tasks->context, index, thread);
    }
}

void native_parallel(native_task task, void *context, int64_t count, int threads) {
    if (!parallel || threads < 2 || count < 2) {
        for (int64_t index = 0; index < count; index++) task(context, index, 0);
        return;
    }
    struct tasks tasks = {.task = task, .context = context, .count = count};
    atomic_init(&tasks.next, 0);
    /* Always the whole team: a pool that changes its size starts and ends threads. */
    parallel(work, &tasks, (unsigned)threads, 0);
}

struct member_call {
    native_member member;
    void *context;
    struct team *team;
};

static void join_team(void *data) {
    struct member_call *call = data;
    call->member(call->context, call->team, thread_number(), team_size());
}

void native_team(native_member member, void *context, int threads) {
    struct team team;
    memset(&team, 0, sizeof team);
    if (!parallel || threads < 2) {
        member(context, &team, 0, 1);
        return;
    }
    struct member_call call = {member, context, &team};
    parallel(join_team, &call, (unsigned)threads, 0);
}

struct spans {
    native_span span;
    void *context;
    int64_t count, grain;
};

static void run_span(void *data, int64_t index, int thread) {
    (void)thread;
    struct spans *spans = data;
    int64_t begin = index * spans->grain, end = begin + spans->grain;
    spans->span(spans->context, begin, end < spans->count ? end : spans->count);
}

void native_parallel_spans(native_span span, void *context, int64_t count, int64_t grain, int threads) {
    int64_t even = (count + threads - 1) / (threads > 0 ? threads : 1);
    struct spans spans = {span, context, count, even > grain ? even : grain};
    native_parallel(run_span, &spans, (count + spans.grain - 1) / spans.grain, threads);
}

struct norm {
    int type;
    float eps;
    const void *x, *residual, *weight;
    void *out, *total;
    int64_t size;
};

static void norm_span(void *context, int64_t begin, int64_t end) {
    struct norm *n = context;
    native_kernels->add_rms_norm((enum element)n->type, n->x, n->residual, n->weight, n->eps, n->out, n->total, begin, end, n->size);
}

/* Elements below which a second thread costs more than it saves. */
#define GRAIN_ELEMENTS 16384

static int64_t grain_rows(int64_t size) { return size < GRAIN_ELEMENTS ? GRAIN_ELEMENTS / (size > 0 ? size : 1) : 1; }

EXPORTED void native_add_rms_norm(int type, const void *x, const void *residual, const void *weight, float eps, void *out, void *total,
                                  int64_t rows, int64_t size, int threads) {
    struct norm context = {type, eps, x, residual, weight, out, total, size};
    native_parallel_spans(norm_span, &context, rows, grain_rows(size), threads);
}

struct gated {
    int type;
    const void *gate_up;
    void *out;
    int64_t size;
};

static void gated_span(void *context, int64_t begin, int64_t end) {
    struct gated *g = context;
    native_kernels->swiglu((enum element)g->type, g->gate_up, g->out, begin, end, g->size);
}

EXPORTED void native_swiglu(int type, const void *gate_up, void *out, int64_t rows, int64_t size, int threads) {
    struct gated context = {type, gate_up, out, size};
    native_parallel_spans(gated_span, &context, rows, grain_rows(size), threads);
}

struct turned {
    int type;
    const void *x;
    int64_t row_stride, head_stride;
    const float *cos, *sin;
    void *out;
    int64_t heads, size, half;
};

static void turned_span(void *context, int64_t begin, int64_t end) {
    struct turned *t = context;
    native_kernels->rotate((enum element)t->type, t->x, t->row_stride, t->head_stride, t->cos, t->sin, t->out, begin, end, t->heads,
                           t->size, t->half);
}

EXPORTED void native_rotate(int type, const void *x, int64_t row_stride, int64_t head_stride, const void *cos, const void *sin, void *out,
                            int64_t rows, int64_t heads, int64_t size, int64_t half, int threads) {
    struct turned context = {type, x, row_stride, head_stride, cos, sin, out, heads, size, half};
    native_parallel_spans(turned_span, &context, rows, grain_rows(heads * size), threads);
}

struct gates {
    int type;
    const void *x;
    int64_t row_stride, head_stride;
    const void *logits;
    void *out;
    int64_t heads, size;
};

static void gates_span(void *context, int64_t begin, int64_t end) {
    struct gates *g = context;
    native_kernels->head_gate((enum element)g->type, g->x, g->row_stride, g->head_stride, g->logits, g->out, begin, end, g->heads, g->size);
}

EXPORTED void native_head_gate(int type, const void *x, int64_t row_stride, int64_t head_stride, const void *logits, void *out,
                               int64_t rows, int64_t heads, int64_t size, int threads) {
    struct gates context = {type, x, row_stride, head_stride, logits, out, heads, size};
    native_parallel_spans(gates_span, &context, rows, grain_rows(heads * size), threads);
}

struct tiles {
    const struct linear *linear;
    int64_t tiles, each;
    float *memory;
};

static void tile_task(void *context, int64_t index, int thread) {
    struct tiles *t = context;
    native_kernels->linear_tile(t->linear, index / t->tiles, index % t->tiles, t->memory + thread * t->each);
}

/* Floats of workspace that each thread needs for a linear layer. */
EXPORTED int64_t native_linear_scratch(void) { return native_kernels->linear_scratch(); }

/* Whether bfloat16 can be multiplied in pairs here. */
EXPORTED int native_has_pairs(void) {
#if defined(HAS_X86_KERNELS)
    return native_kernels->has_pairs && __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}

EXPORTED void native_linear(int type, int pairs, const void *x, int64_t rows, int64_t inputs, const void *weight, int packed, int64_t outputs,
                            const float *bias, int out_type, void *out, float *workspace, int threads) {
    struct linear linear = {.type = (enum element)type, .out_type = (enum element)out_type, .packed = packed, .pairs = pairs, .x = x, .bias = bias,
                            .weight = weight, .out = out, .rows = rows, .inputs = inputs, .outputs = outputs};
    struct tiles context = {&linear, (rows + HEIGHT - 1) / HEIGHT, native_kernels->linear_scratch(), workspace};
    int64_t strips = (outputs + COLUMNS - 1) / COLUMNS;
    native_parallel(tile_task, &context, strips * context.tiles, rows * inputs * outputs < GRAIN_ELEMENTS ? 1 : threads);
}
