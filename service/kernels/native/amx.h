/* AMX's eight tile registers of 16 rows of 64 bytes: 0 - 3 hold sums, 4 and 5 rows of what is multiplied, 6 and 7 columns.
 *
 * A tile of columns lies as the products of quantised.h, panels_int8.h and panels_pairs.h read them anyway: words of four bytes or two
 * bfloat16 of 16 columns, 16 words after the other.
 */
#ifndef DEEPSEEK_AMX_H
#define DEEPSEEK_AMX_H

#include "native.h"

#if defined(ISA_AMX)
#include <immintrin.h>

/* Bytes of a tile's row, and of all 16. */
#define LINE_BYTES 64
#define TILE_BYTES (MATRIX_HEIGHT * LINE_BYTES)
/* GCC's own intrinsics do not say which memory they read: what was written before has to be there. */
#define TILES_READ_MEMORY __asm__ volatile("" ::: "memory");
/* The four tiles of sums, by number, as the intrinsics ask. */
#define ZERO_TILES  \
    _tile_zero(0);  \
    _tile_zero(1);  \
    _tile_zero(2);  \
    _tile_zero(3);
#define STORE_TILES(to, stride)       \
    _tile_stored(0, (to)[0], stride); \
    _tile_stored(1, (to)[1], stride); \
    _tile_stored(2, (to)[2], stride); \
    _tile_stored(3, (to)[3], stride);

/* The first `tiles` of them only. */
#define LOAD_SOME_TILES(tiles, from, stride)                \
    _tile_loadd(0, from, stride);                           \
    if ((tiles) > 1) _tile_loadd(1, (from) + 16, stride);   \
    if ((tiles) > 2) _tile_loadd(2, (from) + 32, stride);   \
    if ((tiles) > 3) _tile_loadd(3, (from) + 48, stride);
#define STORE_SOME_TILES(tiles, to, stride)                 \
    _tile_stored(0, to, stride);                            \
    if ((tiles) > 1) _tile_stored(1, (to) + 16, stride);    \
    if ((tiles) > 2) _tile_stored(2, (to) + 32, stride);    \
    if ((tiles) > 3) _tile_stored(3, (to) + 48, stride);

/* Sums += tile 4 times the first `tiles` tiles of columns from `from` on, by one of the processor's products. */
#define MULTIPLY_SOME_TILES(product, tiles, from, stride) \
    _tile_loadd(6, from, stride);                         \
    product(0, 4, 6);                                     \
    if ((tiles) > 1) {                                    \
        _tile_loadd(7, (from) + 16, stride);              \
        product(1, 4, 7);                                 \
    }                                                     \
    if ((tiles) > 2) {                                    \
        _tile_loadd(6, (from) + 32, stride);              \
        product(2, 4, 6);                                 \
    }                                                     \
    if ((tiles) > 3) {                                    \
        _tile_loadd(7, (from) + 48, stride);              \
        product(3, 4, 7);                                 \
    }

/* The shapes of the registers, as the processor loads them. */
struct shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Whole tiles in all registers, or `rows` rows in those of sums and rows. */
INLINE void use_rows(int64_t rows) {
    struct shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) shapes.row_bytes[i] = LINE_BYTES, shapes.rows[i] = (uint8_t)(i < 6 ? rows : MATRIX_HEIGHT);
    TILES_READ_MEMORY
    _tile_loadconfig(&shapes);
}

INLINE void use_shapes(void) { use_rows(MATRIX_HEIGHT); }

INLINE int64_t at_most(int64_t count, int64_t most) { return count < most ? count : most; }
#endif

#endif
