/* What products of quantised weights have in common whatever the vectors are: how weights lie, how tiles are written out, and the walk over strips.
 *
 * Weights are strips of 16 outputs, one after the other. An int8 strip holds, for each four inputs, 64 bytes: weight + 128 of those inputs
 * for output 0, then output 1, ... An int4 strip holds, for each GROUP inputs, 256 bytes of pairs (weight + 8 of four inputs in the low
 * halves, of the next four in the high halves) and 16 float16 scales. Invariant: the integer sums are exact and what becomes of them is
 * rounded in one order, so a row's result depends neither on the rows beside it nor on the instruction set.
 */
#ifndef DEEPSEEK_QUANTISED_STRIPS_H
#define DEEPSEEK_QUANTISED_STRIPS_H

#include "native.h"

/* What the caches should fetch while a tile is computed: `lines` lines of 64 bytes in each step. */
struct ahead {
    const char *at;
    int lines;
};
INLINE struct ahead fetch(struct ahead ahead) {
    for (int line = 0; line < ahead.lines; line++, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
    return ahead;
}

/* A tile is R rows times C strips, its sums in registers named a<row>_<strip>: compilers spill arrays of vectors, so macros write out the
 * rows (ROWS_R) and the strips (STRIPS_C) of each step. */
#define ROWS_1(X, S) X(0, S)
#define ROWS_2(X, S) ROWS_1(X, S) X(1, S)
#define ROWS_3(X, S) ROWS_2(X, S) X(2, S)
#define ROWS_4(X, S) ROWS_3(X, S) X(3, S)
#define ROWS_5(X, S) ROWS_4(X, S) X(4, S)
#define ROWS_6(X, S) ROWS_5(X, S) X(5, S)
#define ROWS_7(X, S) ROWS_6(X, S) X(6, S)
#define ROWS_8(X, S) ROWS_7(X, S) X(7, S)
#define STRIPS_2(X, r) X(r, 0) X(r, 1)
#define STRIPS_3(X, r) STRIPS_2(X, r) X(r, 2)
#define STRIPS_4(X, r) STRIPS_3(X, r) X(r, 3)

/* One tile of rows and strips, from a row and an output on. */
typedef void (*tile)(const struct product *p, int64_t row, int64_t output, struct ahead ahead);

/* All rows times the strips begin .. end - 1, a tile's at a time. Each tile of rows fetches its share of what comes next, the following strips
 * or at last `after`, which hides the memory behind the products: 16 rows took 463 us without and 283 with it. */
INLINE void product_strips(const struct product *p, int64_t begin, int64_t end, const tile *tiles, struct upcoming after) {
    int64_t width = tile_strips(p), count = row_tiles(p), steps = (p->kind == INT8 ? p->padded / 4 : p->padded / 8) * count;
    for (int64_t strip = begin; strip < end; strip += width) {
        struct upcoming next = {(const char *)p->weight + (strip + width) * strip_bytes(p), width * strip_bytes(p) / 64};
        if (strip + width >= end) next = after;
        const int64_t share = (next.lines + steps - 1) / steps, each = steps / count * share;
        for (int64_t i = 0; i < count; i++) {
            int64_t row = p->rows * i / count;
            struct ahead ahead = {next.at, next.lines > 0 ? (int)share : 0};
            tiles[p->rows * (i + 1) / count - row](p, row, 16 * strip, ahead);
            next.at += 64 * each;
            next.lines -= each;
        }
    }
}

#endif
