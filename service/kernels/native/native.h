/* What the files of the compiled kernels share: element types, the table of kernels that each instruction set fills, and threads.
 *
 * The kernels know neither Python nor torch: raw pointers in, raw pointers out; sizes count elements unless a name says bytes.
 * Invariant: a kernel gives the same bits for every number of threads.
 */
#ifndef DEEPSEEK_NATIVE_H
#define DEEPSEEK_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))

/* Counted up whenever an exported function changes; binding.py names the one it speaks to. */
#define NATIVE_ABI 1

enum element { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* One implementation of every kernel, filled by isa_*.c. `add_rms_norm`: x and residual [rows, size] -> out and total [rows, size],
 * total = x + residual, out = total / sqrt(mean(total²) + eps) * weight; residual may be NULL and total then is not written. */
struct kernels {
    const char *name;
    void (*add_rms_norm)(enum element type, const void *x, const void *residual, const void *weight, float eps, void *out, void *total,
                         int64_t begin, int64_t end, int64_t size);
    /* gate_up [rows, 2 * size], gate first -> out [rows, size] = silu(gate) * up. */
    void (*swiglu)(enum element type, const void *gate_up, void *out, int64_t begin, int64_t end, int64_t size);
};

extern const struct kernels kernels_baseline;
#if defined(__x86_64__) || defined(_M_X64)
#define HAS_X86_KERNELS 1
extern const struct kernels kernels_avx2;
extern const struct kernels kernels_avx512;
#endif

/* The table in use; NULL before native_choose. */
extern const struct kernels *native_kernels;

/* Runs task(context, index, thread) for every index in 0 .. count - 1, each once, on at most `threads` threads of torch's own pool.
 * `thread` is below `threads`. Tasks go to threads in no fixed order. */
typedef void (*native_task)(void *context, int64_t index, int thread);
void native_parallel(native_task task, void *context, int64_t count, int threads);

/* Splits 0 .. count - 1 into runs of at least `grain` and calls span(context, begin, end) for each. */
typedef void (*native_span)(void *context, int64_t begin, int64_t end);
void native_parallel_spans(native_span span, void *context, int64_t count, int64_t grain, int threads);

#endif
