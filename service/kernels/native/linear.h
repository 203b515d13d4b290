/* Linear layers in one order of sums: an output is the chain ((x0 w0 + x1 w1) + x2 w2) + ..., the bias added last.
 *
 * Weights are read as panels of COLUMNS outputs, input by input: laid out so before, or turned piece by piece from rows of outputs.
 * Invariant: a row's bits depend on the row and the weight alone: not on the rows beside it, on threads, or on how the weight is laid out.
 */
#ifndef DEEPSEEK_LINEAR_H
#define DEEPSEEK_LINEAR_H

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
        for (int64_t row = begin; row < end; row += ROWS) {
            int rows = end - row < ROWS ? (int)(end - row) : ROWS;
            multiply_panel(p->packed ? p->type : FLOAT32, rows, vectors, inputs, p->x + row * p->inputs + from, p->inputs,
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
