/* Linear layers in one order of sums: an output is the chain ((x0 w0 + x1 w1) + x2 w2) + ..., the bias added last.
 *
 * Weights are read as panels of COLUMNS outputs, input by input: laid out so before, or turned piece by piece from rows of outputs.
 * Invariant: a row's bits depend on the row and the weight alone: not on the rows beside it, on threads, or on how the weight is laid out.
 */
#ifndef DEEPSEEK_LINEAR_H
#define DEEPSEEK_LINEAR_H

#include "amx.h"
#include "panels.h"

/* Inputs of a panel that stay in the second level cache while rows pass by. */
#define DEPTH 1024
/* How far ahead of its use a weight is fetched. */
#define AHEAD_BYTES 4096

static int64_t linear_scratch(void) { return (HEIGHT + DEPTH) * COLUMNS; }

INLINE void multiply_panel(enum element type, int rows, int64_t vectors, int64_t inputs, const float *x, int64_t x_stride, const void *panel,
                           int64_t stride, float *sums, const float *factors, struct upcoming *ahead) {
    if (type == FLOAT32) multiply_float32(rows, vectors, 0, inputs, x, x_stride, panel, stride, sums, COLUMNS, factors, ahead);
    if (type == BFLOAT16) multiply_bfloat16(rows, vectors, 0, inputs, x, x_stride, panel, stride, sums, COLUMNS, factors, ahead);
    if (type == FLOAT16) multiply_float16(rows, vectors, 0, inputs, x, x_stride, panel, stride, sums, COLUMNS, factors, ahead);
}

#if HAS_PAIRS
#define WITH_PAIRS __attribute__((target("avx512bf16")))

/* c [rows, vectors * 16] += x [rows, pairs] * panel [pairs, vectors * 16], an element of both being two bfloat16; not carried, c begins at 0. */
WITH_PAIRS INLINE void multiply_pair_tile(const int rows, const int vectors, int64_t pairs, const int32_t *restrict x, int64_t x_stride,
                                          const char *restrict panel, int64_t stride, float *restrict c, int carried,
                                          struct upcoming *ahead) {
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[r][v] = carried ? _mm512_loadu_ps(c + r * COLUMNS + 16 * v) : _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        __m512i column[VECTORS];
        fetch_upcoming(ahead, 4);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) column[v] = _mm512_loadu_si512(panel + (k * stride + 16 * v) * 4);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const __m512i value = _mm512_set1_epi32(x[r * x_stride + k]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)value, (__m512bh)column[v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(c + r * COLUMNS + 16 * v, sum[r][v]);
}

WITH_PAIRS INLINE void multiply_pair_rows(const int rows, int64_t vectors, int64_t pairs, const int32_t *x, int64_t x_stride,
                                          const char *panel, int64_t stride, float *c, int carried, struct upcoming *ahead) {
    int64_t v = 0;
    for (; vectors - v >= 4; v += 4) multiply_pair_tile(rows, 4, pairs, x, x_stride, panel + 64 * v, stride, c + 16 * v, carried, ahead);
    for (; v < vectors; v++) multiply_pair_tile(rows, 1, pairs, x, x_stride, panel + 64 * v, stride, c + 16 * v, carried, ahead);
}

WITH_PAIRS static void multiply_pairs(int rows, int64_t vectors, int64_t pairs, const int32_t *x, int64_t x_stride, const char *panel,
                                      int64_t stride, float *c, int carried, struct upcoming *ahead) {
    if (rows == 1) multiply_pair_rows(1, vectors, pairs, x, x_stride, panel, stride, c, carried, ahead);
    if (rows == 2) multiply_pair_rows(2, vectors, pairs, x, x_stride, panel, stride, c, carried, ahead);
    if (rows == 3) multiply_pair_rows(3, vectors, pairs, x, x_stride, panel, stride, c, carried, ahead);
    if (rows == 4) multiply_pair_rows(4, vectors, pairs, x, x_stride, panel, stride, c, carried, ahead);
    if (rows == 5) multiply_pair_rows(5, vectors, pairs, x, x_stride, panel, stride, c, carried, ahead);
    if (rows == 6) multiply_pair_rows(6, vectors, pairs, x, x_stride, panel, stride, c, carried, ahead);
}
#endif

#if defined(ISA_AMX)
/* Sixteen rows or fewer: c [rows, 16 tiles] += x [rows, pairs] * panel [pairs, 16 tiles], as multiply_pair_tile. */
static void multiply_pairs_1xn(int64_t tiles, int64_t pairs, const int32_t *x, int64_t x_stride, const int32_t *panel, int64_t stride,
                               float *c, int carried, struct upcoming *ahead) {
    if (carried) {
        LOAD_SOME_TILES(tiles, c, COLUMNS * 4)
    } else {
        ZERO_TILES
    }
    for (int64_t k = 0; k < pairs; k += 16) {
        const int32_t *columns = panel + k * stride;
        fetch_upcoming(ahead, 64);
        _tile_loadd(4, x + k, x_stride * 4);
        MULTIPLY_SOME_TILES(_tile_dpbf16ps, tiles, columns, stride * 4)
    }
    STORE_SOME_TILES(tiles, c, COLUMNS * 4)
}

/* Thirty-two rows and a whole panel, two tiles of columns at a time. */
static void multiply_pairs_2x4(int64_t pairs, const int32_t *x, int64_t x_stride, const int32_t *panel, float *c, int carried,
                               struct upcoming *ahead) {
    const int64_t stride = COLUMNS * 4, below = MATRIX_HEIGHT * COLUMNS;
    for (int half = 0; half < COLUMNS; half += 32) {
        float *sums = c + half;
        if (carried) {
            _tile_loadd(0, sums, stride);
            _tile_loadd(1, sums + 16, stride);
            _tile_loadd(2, sums + below, stride);
            _tile_loadd(3, sums + below + 16, stride);
        } else {
            ZERO_TILES
        }
        for (int64_t k = 0; k < pairs; k += 16) {
            const int32_t *columns = panel + k * COLUMNS + half;
            fetch_upcoming(ahead, 32);
            _tile_loadd(4, x + k, x_stride * 4);
            _tile_loadd(6, columns, stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, columns + 16, stride);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, x + MATRIX_HEIGHT * x_stride + k, x_stride * 4);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums, stride);
        _tile_stored(1, sums + 16, stride);
        _tile_stored(2, sums + below, stride);
        _tile_stored(3, sums + below + 16, stride);
    }
}

/* Rows of a tile by matrix units: by thirty-two, by sixteen, and what is left over. */
static void multiply_pairs_by_tiles(int64_t rows, int64_t vectors, int64_t pairs, const int32_t *x, int64_t x_stride, const int32_t *panel,
                                    int64_t stride, float *c, int carried, struct upcoming *ahead) {
    use_shapes();
    for (int64_t row = 0; row < rows;) {
        const int64_t count = rows - row >= 32 && vectors * 16 == COLUMNS ? 32 : at_most(rows - row, MATRIX_HEIGHT);
        if (count < MATRIX_HEIGHT) use_rows(count);
        if (count == 32)
            multiply_pairs_2x4(pairs, x + row * x_stride, x_stride, panel, c + row * COLUMNS, carried, ahead);
        else
            multiply_pairs_1xn(vectors, pairs, x + row * x_stride, x_stride, panel, stride, c + row * COLUMNS, carried, ahead);
        row += count;
    }
    _tile_release();
}
#endif

static void linear_tile(const struct linear *p, int64_t strip, int64_t tile, float *memory) {
    static const float ones[ROWS] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
    const int64_t begin = tile * HEIGHT, end = begin + HEIGHT < p->rows ? begin + HEIGHT : p->rows, bytes = p->type == FLOAT32 ? 4 : 2;
    const int64_t output = strip * COLUMNS, count = p->outputs - output < COLUMNS ? p->outputs - output : COLUMNS;
    const int64_t vectors = (count + WIDTH - 1) / WIDTH, stride = p->packed ? COLUMNS : vectors * WIDTH;
    float *sums = memory, *turned = memory + HEIGHT * COLUMNS;
    if (p->inputs == 0) memset(sums, 0, HEIGHT * COLUMNS * sizeof *sums);
    for (int64_t from = 0; from < p->inputs; from += DEPTH) {
        const int64_t inputs = p->inputs - from < DEPTH ? p->inputs - from : DEPTH;
        const char *panel = (const char *)p->weight + (p->packed ? output * p->inputs + from * COLUMNS : output * p->inputs + from) * bytes;
        struct upcoming ahead = {panel + AHEAD_BYTES, p->packed ? inputs * COLUMNS * bytes / 64 : 0};
        if (!p->packed) pack_keys(p->type, panel, p->inputs * bytes, count, inputs, turned, stride, &ahead);
#if defined(ISA_AMX)
        if (p->pairs && p->inputs % 16 == 0) {
            const int32_t *x = (const int32_t *)p->x + begin * p->inputs + from;
            multiply_pairs_by_tiles(end - begin, vectors, inputs, x, p->inputs, (const int32_t *)(p->packed ? panel : (const char *)turned),
                                    stride, sums, from > 0, &ahead);
            continue;
        }
#endif
        for (int64_t row = begin; row < end; row += ROWS) {
            int rows = end - row < ROWS ? (int)(end - row) : ROWS;
            const float *x = (const float *)p->x + row * p->inputs + from;
#if HAS_PAIRS
            if (p->pairs) {
                multiply_pairs(rows, vectors, inputs, (const int32_t *)x, p->inputs, p->packed ? panel : (const char *)turned, stride,
                               sums + (row - begin) * COLUMNS, from > 0, &ahead);
                continue;
            }
#endif
            multiply_panel(p->packed ? p->type : FLOAT32, rows, vectors, inputs, x, p->inputs,
                           p->packed ? (const void *)panel : turned, stride, sums + (row - begin) * COLUMNS, from ? ones : NULL, &ahead);
        }
    }
    for (int64_t row = begin; row < end; row++)
        for (int64_t i = 0; i < count; i += WIDTH) {
            int64_t some = count - i < WIDTH ? count - i : WIDTH;
            vfloat value = load_float(sums + (row - begin) * COLUMNS + i);
            if (p->bias) value += load_some(FLOAT32, p->bias, output + i, some);
            store_some(p->out_type, p->out, row * p->outputs + output + i, value, some);
        }
}

#endif
