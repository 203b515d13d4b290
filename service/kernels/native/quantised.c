/* Linear layers with quantised weights: rows are quantised, then strips of outputs are shared among the threads.
 *
 * It knows one layer at a time. Invariant: what a product needs beside its arguments lies in memory of the calling thread that is kept
 * from call to call.
 */
#include <stdlib.h>

#include "quantised_call.h"

/* Rows below which quantising is not worth a second thread, and how many pieces each thread's share of the strips is cut into: a thread
 * that the system holds up then delays a piece and not its half. */
#define GRAIN_ELEMENTS 32768
#define PIECES 8

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

static int by_matrices(const struct weights *weights, int64_t rows) {
    return native_kernels->int8_matrices && weights->kind == INT8 && weights->padded % MATRIX_INPUTS == 0 && rows >= MATRIX_ROWS;
}

/* Bytes of the quantised rows alone, in whole lines of 64. */
static size_t rows_bytes(const struct weights *weights, int64_t rows) {
    if (by_matrices(weights, rows)) rows = (rows + MATRIX_HEIGHT - 1) / MATRIX_HEIGHT * MATRIX_HEIGHT;
    return ((size_t)(rows * weights->padded) + 63) / 64 * 64;
}

size_t quantised_bytes(const struct weights *weights, int64_t rows) {
    int64_t groups = weights->kind == INT8 ? 1 : weights->padded / GROUP;
    return rows_bytes(weights, rows) + (size_t)rows * (4 + 4 * (size_t)groups);
}

struct product start_product(const struct weights *weights, int64_t rows, char *memory, float *out) {
    char *scales = memory + rows_bytes(weights, rows);
    return (struct product){
        .kind = weights->kind, .x = (int8_t *)memory, .x_scales = (float *)scales, .x_sums = (int32_t *)scales + rows, .rows = rows,
        .padded = weights->padded, .weight = weights->values, .scales = weights->scales, .bias = weights->bias, .out = out,
        .outputs = weights->outputs, .shape = native_kernels->shapes + weights->kind,
        .matrices = by_matrices(weights, rows),
    };
}

struct product start_gated_product(const struct weights *weights, int64_t rows, char *memory, float *out) {
    struct product p = start_product(weights, rows, memory, out);
    if (p.matrices && rows >= GATED_ROWS && p.outputs % 32 == 0) p.gated = 1, p.outputs /= 2;
    return p;
}

void quantise_into(const struct product *p, const struct weights *weights, const float *x, int64_t row) {
    int64_t group = p->kind == INT8 ? p->padded : GROUP;
    const int64_t tile = row / MATRIX_HEIGHT * MATRIX_HEIGHT, line = p->matrices ? MATRIX_HEIGHT * MATRIX_INPUTS : MATRIX_INPUTS;
    int8_t *values = (int8_t *)p->x + (p->matrices ? tile * p->padded + (row - tile) * MATRIX_INPUTS : row * p->padded);
    int32_t *sums = (int32_t *)p->x_sums + row * (p->padded / group);
    ((float *)p->x_scales)[row] = native_kernels->quantise_row(x, weights->inputs, p->padded, group, values, line, sums);
}

/* Tiles of strips that the outputs take, and the first strip of a piece. */
static int64_t tiles_of(const struct product *p) { return (p->outputs + 16 * tile_strips(p) - 1) / (16 * tile_strips(p)); }
static int64_t piece_strip(const struct product *p, int64_t index, int64_t count) { return tiles_of(p) * index / count * tile_strips(p); }

int64_t product_pieces(const struct product *product, int threads) {
    int64_t tiles = tiles_of(product), count = (int64_t)threads * PIECES;
    return count < tiles ? count : tiles;
}

struct upcoming piece_beginning(const struct product *product, int64_t index, int64_t count) {
    if (index >= count) return (struct upcoming){NULL, 0};
    int64_t begin = piece_strip(product, index, count), left = (product->outputs + 15) / 16 - begin, width = tile_strips(product);
    int64_t lines = (left < width ? left : width) * strip_bytes(product) / 64;
    return (struct upcoming){(const char *)product->weight + begin * strip_bytes(product), lines};
}

void multiply_piece(const struct product *product, int64_t index, int64_t count, struct upcoming after) {
    int64_t strips = (product->outputs + 15) / 16, begin = piece_strip(product, index, count), end = piece_strip(product, index + 1, count);
    if (end > strips) end = strips;
    if (begin >= end) return;
    if (product->matrices)
        native_kernels->int8_matrices(product, begin, end, after);
    else
        (product->kind == INT8 ? native_kernels->int8_strips : native_kernels->int4_strips)(product, begin, end, after);
}

struct rows {
    const float *x;
    const struct weights *weights;
    const struct product *product;
};

static void quantise_span(void *context, int64_t begin, int64_t end) {
    const struct rows *r = context;
    for (int64_t row = begin; row < end; row++) quantise_into(r->product, r->weights, r->x + row * r->weights->inputs, row);
}

struct pieces {
    const struct product *product;
    int64_t count;
};

static void run_piece(void *context, int64_t index, int thread) {
    (void)thread;
    const struct pieces *pieces = context;
    multiply_piece(pieces->product, index, pieces->count, (struct upcoming){NULL, 0});
}

/* x [rows, inputs] times the weights, plus the bias: out [rows, outputs], all float32. 0, or -1 where there is no memory. */
EXPORTED int native_quantised_linear(const struct weights *weights, const float *x, float *out, int64_t rows, int threads) {
    char *memory = take_scratch(quantised_bytes(weights, rows));
    if (!memory) return -1;
    struct product product = start_product(weights, rows, memory, out);
    struct rows quantised = {x, weights, &product};
    int64_t grain = GRAIN_ELEMENTS / weights->padded;
    native_parallel_spans(quantise_span, &quantised, rows, grain > 1 ? grain : 1, threads);
    struct pieces pieces = {&product, product_pieces(&product, threads)};
    native_parallel(run_piece, &pieces, pieces.count, threads);
    return 0;
}

/* Rows ids [count] of an int8 weight, widened: out [count, inputs]. */
EXPORTED void native_int8_rows(const struct weights *weights, const int64_t *ids, float *out, int64_t count) {
    for (int64_t row = 0; row < count; row++, out += weights->inputs) {
        const uint8_t *lane = weights->values + ids[row] / 16 * 16 * weights->padded + ids[row] % 16 * 4;
        float scale = weights->scales[ids[row]];
        for (int64_t i = 0; i < weights->inputs; i++) out[i] = (float)(lane[i / 4 * 64 + i % 4] - 128) * scale;
    }
}
