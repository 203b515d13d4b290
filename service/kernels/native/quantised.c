/* Linear layers with quantised weights: rows are quantised, then strips of outputs are shared among the threads.
 *
 * It knows one layer at a time. Invariant: what a product needs beside its arguments lies in memory of the calling thread that is kept
 * from call to call.
 */
#include <stdlib.h>

#include "native.h"

/* Rows below which quantising is not worth a second thread, and how many pieces each thread's share of the strips is cut into: a thread
 * that the system holds up then delays a piece and not its half. */
#define GRAIN_ELEMENTS 32768
#define PIECES 4

static _Thread_local struct {
    char *bytes;
    size_t size;
} scratch;

static char *take_scratch(size_t size) {
    if (scratch.size < size) {
        free(scratch.bytes);
        scratch.bytes = aligned_alloc(64, (size + 4095) / 4096 * 4096);
        scratch.size = scratch.bytes ? size : 0;
    }
    return scratch.bytes;
}

/* Whether the chosen instruction set has these products. */
EXPORTED int native_has_quantised(void) { return native_kernels->int8_strips != NULL; }

struct rows {
    const float *x;
    const struct weights *weights;
    int64_t group;
    int8_t *out;
    float *scales;
    int32_t *sums;
};

static void quantise_span(void *context, int64_t begin, int64_t end) {
    const struct rows *r = context;
    int64_t inputs = r->weights->inputs, padded = r->weights->padded, groups = padded / r->group;
    for (int64_t row = begin; row < end; row++)
        r->scales[row] =
            native_kernels->quantise_row(r->x + row * inputs, inputs, padded, r->group, r->out + row * padded, r->sums + row * groups);
}

struct pieces {
    const struct product *product;
    int64_t strips, count;
};

static void multiply_piece(void *context, int64_t index, int thread) {
    (void)thread;
    const struct pieces *pieces = context;
    /* Begins at multiples of 12 strips suit tiles of 2, 3 and 4. */
    int64_t blocks = (pieces->strips + 11) / 12;
    int64_t begin = blocks * index / pieces->count * 12, end = blocks * (index + 1) / pieces->count * 12;
    if (end > pieces->strips) end = pieces->strips;
    if (begin >= end) return;
    (pieces->product->kind == INT8 ? native_kernels->int8_strips : native_kernels->int4_strips)(pieces->product, begin, end);
}

/* x [rows, inputs] times the weights, plus the bias: out [rows, outputs], all float32. 0, or -1 where there is no memory. */
EXPORTED int native_quantised_linear(const struct weights *weights, const float *x, float *out, int64_t rows, int threads) {
    int64_t padded = weights->padded, group = weights->kind == INT8 ? padded : GROUP, groups = padded / group;
    size_t values = ((size_t)(rows * padded) + 63) / 64 * 64;
    char *bytes = take_scratch(values + (size_t)rows * (4 + 4 * (size_t)groups));
    if (!bytes) return -1;
    struct rows quantised = {x, weights, group, (int8_t *)bytes, (float *)(bytes + values), (int32_t *)(bytes + values) + rows};
    int64_t grain = GRAIN_ELEMENTS / padded;
    native_parallel_spans(quantise_span, &quantised, rows, grain > 1 ? grain : 1, threads);
    struct product product = {
        .kind = weights->kind, .x = quantised.out, .x_scales = quantised.scales, .x_sums = quantised.sums, .rows = rows,
        .padded = padded, .weight = weights->values, .scales = weights->scales, .bias = weights->bias, .out = out,
        .outputs = weights->outputs,
    };
    int64_t strips = (weights->outputs + 15) / 16, blocks = (strips + 11) / 12, count = (int64_t)threads * PIECES;
    struct pieces pieces = {&product, strips, count < blocks ? count : blocks};
    native_parallel(multiply_piece, &pieces, pieces.count, threads);
    return 0;
}
