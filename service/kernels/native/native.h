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

/* So many bytes in whole lines of the caches. */
INLINE int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* Counted up whenever an exported function changes; binding.py names the one it speaks to. */
#define NATIVE_ABI 16

/* The last two only in the cache: integers with a scale for each token, INT4 two in a byte, the even index in the low half. Of far blocks
 * the scales lie apart, in float16; a near block has INT8 only, and behind each token's integers their scale in float32. */
enum element { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, STORED_INT8 = 3, STORED_INT4 = 4 };

/* Bounds of the keys of far blocks, the largest and then the smallest of each feature, in units of a scale for each block and K/V head: of whole blocks int8
 * [2, size] and the scales float16, both by strides [block, head], so that a head's can lie one after the other; of `count` equal parts of each block int8
 * [F, kv_heads, count, 2, size]. */
struct far_bounds {
    int8_t *blocks, *parts;
    uint16_t *scales;
    int64_t block_strides[2], scale_strides[2], count;
};

/* Memory that is read soon, fetched line by line while something else is computed: what no hardware prefetcher follows, and a burst of
 * fetches would stall. */
struct upcoming {
    const char *at;
    int64_t lines;
};

/* Inputs that share a scale of int4 weights. */
#define GROUP 32
/* The fewest rows that matrix units multiply faster than vectors do, and what their inputs are a multiple of. */
#define MATRIX_ROWS 8
/* The fewest rows whose gates are applied within the product: memory passes then cost more than reading two halves of a weight at once. */
#define GATED_ROWS 64
#define MATRIX_INPUTS 64
/* Rows of a tile of matrix units. */
#define MATRIX_HEIGHT 16
enum quantisation { INT8 = 0, INT4 = 1 };

/* Quantised weights [outputs, inputs] in strips as quantised_strips.h says, inputs padded to a multiple of 4 (int8) or GROUP (int4). `scales`
 * (int8) and `bias` (or NULL) are float32 for every output, the scales padded to whole strips. binding.py has its twin. */
struct weights {
    int64_t kind, inputs, padded, outputs;
    const uint8_t *values;
    const float *scales, *bias;
};

/* How the rows of a product become tiles, as even as can be: of `rows` at most; up to `few` rows take `wide` strips at a time, more take `tall`:
 * as many sums as there are registers. */
struct tile_shape {
    int64_t rows, few, wide, tall;
};

/* A product under way: quantised rows x [rows, padded], their scales, and the sums of each row (int8) or of each of its groups (int4).
 * `matrices`: it is multiplied by matrix units, for which the rows lie as quantised_amx.h says; with `gated` only the SwiGLU of both halves
 * of what the weights give, gates first, is written: `outputs` is half of theirs. */
struct product {
    int64_t kind;
    const int8_t *x;
    const float *x_scales;
    const int32_t *x_sums;
    int64_t rows, padded;
    const uint8_t *weight;
    const float *scales, *bias;
    float *out;
    int64_t outputs;
    const struct tile_shape *shape;
    int matrices, gated;
};

/* Tiles that the rows of a product are split into, and the strips that a tile takes; matrix units take four. */
INLINE int64_t row_tiles(const struct product *p) { return (p->rows + p->shape->rows - 1) / p->shape->rows; }
INLINE int64_t tile_strips(const struct product *p) {
    int64_t count = row_tiles(p), most = count ? (p->rows + count - 1) / count : 0;
    return p->matrices ? 4 : most > p->shape->few ? p->shape->tall : p->shape->wide;
}
INLINE int64_t strip_bytes(const struct product *p) { return p->kind == INT8 ? 16 * p->padded : p->padded / GROUP * 288; }

/* Outputs of a panel of weights. */
#define COLUMNS 64
/* Rows of a tile, which share a panel that was turned. */
#define HEIGHT 96

/* A linear layer x [rows, inputs] float32 -> out [rows, outputs] of out_type. `weight` of `type` is [outputs, inputs], or packed: panels
 * [inputs, COLUMNS] of COLUMNS outputs each, padded at the end. `bias` [outputs] is float32 or NULL. With `pairs` an input is a word of two
 * bfloat16 in x and weight alike, multiplied by the processor's own dot products, and `type` is FLOAT32: words are moved as such. */
struct linear {
    enum element type, out_type;
    int packed, pairs;
    const void *x;
    const float *bias;
    const void *weight;
    void *out;
    int64_t rows, inputs, outputs;
};

/* See attention_call.h. */
struct attention;
struct tile;
struct share;
struct choosing;
/* See demoting_call.h. */
struct demoting;

/* One implementation of every kernel, filled by isa_*.c. `add_rms_norm`: x and residual [rows, size] -> out and total [rows, size],
 * total = x + residual, out = total / sqrt(mean(total²) + eps) * weight; residual may be NULL and total then is not written. */
struct kernels {
    const char *name;
    void (*add_rms_norm)(enum element type, const void *x, const void *residual, const void *weight, float eps, void *out, void *total,
                         int64_t begin, int64_t end, int64_t size);
    /* x [rows, heads, size] by its strides, cos and sin [rows, half] -> out, contiguous, which may be x; dimensions from 2 * half on are copied. */
    void (*rotate)(enum element type, const void *x, int64_t row_stride, int64_t head_stride, const float *cos, const float *sin, void *out,
                   int64_t begin, int64_t end, int64_t heads, int64_t size, int64_t half);
    /* gate_up [rows, 2 * size], gate first -> out [rows, size] = silu(gate) * up. */
    void (*swiglu)(enum element type, const void *gate_up, void *out, int64_t begin, int64_t end, int64_t size);
    /* out [rows, heads, size] by its strides times sigmoid(logits [rows, heads]) -> out, contiguous. */
    void (*head_gate)(enum element type, const void *x, int64_t row_stride, int64_t head_stride, const void *logits, void *out,
                      int64_t begin, int64_t end, int64_t heads, int64_t size);
    /* Floats that a thread needs for a linear layer, whether it takes pairs, and one tile of rows times one panel, see linear.h. */
    int64_t (*linear_scratch)(void);
    int has_pairs;
    void (*linear_tile)(const struct linear *linear, int64_t strip, int64_t tile, float *memory);
    /* Float32 x [count] -> out in `type`, rounded to nearest even; where there are products of bytes, to STORED_INT8 too, the scale behind. */
    void (*narrow)(enum element type, const float *x, void *out, int64_t count);
    /* The tiles of int8 and of int4 weights, and a row quantised as quantised_short.h says; the three functions are NULL where the instruction set
     * has no products of bytes. */
    struct tile_shape shapes[2];
    float (*quantise_row)(const float *x, int64_t inputs, int64_t padded, int64_t group, int8_t *out, int64_t line, int32_t *sums);
    /* All rows of a product times the strips begin .. end - 1, while `after` is fetched. */
    void (*int8_strips)(const struct product *product, int64_t begin, int64_t end, struct upcoming after);
    void (*int4_strips)(const struct product *product, int64_t begin, int64_t end, struct upcoming after);
    /* The same of a product by matrix units; NULL where there are none. */
    void (*int8_matrices)(const struct product *product, int64_t begin, int64_t end, struct upcoming after);
    /* Floats that a thread needs, and that the result of one split of one tile and head takes; then one share, while what the next one
     * (or NULL) begins with is fetched. */
    int64_t (*attention_scratch)(const struct attention *attention);
    int64_t (*attention_partial)(const struct attention *attention, const struct tile *tile);
    void (*attention_share)(const struct attention *attention, const struct share *share, const struct share *after, float *memory);
    /* Choose far blocks for anchors begin .. end - 1 and a K/V head, see choosing.h. */
    void (*choose_far)(const struct choosing *choosing, int64_t begin, int64_t end, int64_t head, char *memory);
    /* Move one near block of a K/V head into the far store, see demoting.h; `memory` is demoting_floats. */
    void (*demote)(const struct demoting *demoting, int64_t block, int64_t head, float *memory);
};

extern const struct kernels kernels_baseline;
#if defined(__x86_64__) || defined(_M_X64)
#define HAS_X86_KERNELS 1
extern const struct kernels kernels_avx2;
extern const struct kernels kernels_avx512;
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define HAS_AVX_VNNI_KERNELS 1
extern const struct kernels kernels_avxvnni;
#endif
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_AMX_KERNELS 1
extern const struct kernels kernels_amx;
#endif
#elif defined(__aarch64__)
#define HAS_DOT_KERNELS 1
extern const struct kernels kernels_dotprod;
#endif

/* The table in use; NULL before native_choose. */
extern const struct kernels *native_kernels;

/* Whether bfloat16 is multiplied in pairs by the table in use, on this processor. */
EXPORTED int native_has_pairs(void);

/* Runs task(context, index, thread) for every index in 0 .. count - 1, each once, on at most `threads` threads of torch's own pool.
 * `thread` is below `threads`. Tasks go to threads in no fixed order. */
typedef void (*native_task)(void *context, int64_t index, int thread);
void native_parallel(native_task task, void *context, int64_t count, int threads);

/* Splits 0 .. count - 1 into runs of at least `grain` and calls span(context, begin, end) for each. */
typedef void (*native_span)(void *context, int64_t begin, int64_t end);
void native_parallel_spans(native_span span, void *context, int64_t count, int64_t grain, int threads);

#endif
