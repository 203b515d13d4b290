/* The products and layouts that attention is made of: six rows times a panel, keys turned into a panel, values widened to float32.
 *
 * Invariant: what is computed for a row is a chain of operations that depends on the row alone, so it has the same bits among any others.
 */
#ifndef DEEPSEEK_PANELS_H
#define DEEPSEEK_PANELS_H

#include "vector.h"

/* Rows and vectors of the product kept in registers. */
#define ROWS 6
#if WIDTH == 16 || defined(__aarch64__)
#define VECTORS 4
#else
#define VECTORS 2
#endif

INLINE void fetch_upcoming(struct upcoming *ahead, int64_t lines) {
    int64_t now = ahead->lines < lines ? ahead->lines : lines;
    for (int64_t line = 0; line < now; line++) __builtin_prefetch(ahead->at + line * 64, 0, 2);
    ahead->at += now * 64;
    ahead->lines -= now;
}

/* c [rows, vectors * WIDTH] = factors * c + a [rows, from .. to] * b [from .. to, vectors * WIDTH]; without factors c is not read. */
INLINE void multiply_tile(const int rows, const int vectors, enum element type, int64_t from, int64_t to, const float *restrict a,
                          int64_t a_stride, const void *restrict b, int64_t b_stride, float *restrict c, int64_t c_stride,
                          const float *factors, struct upcoming *ahead) {
    vfloat sum[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[r][v] = factors ? load_float(c + r * c_stride + v * WIDTH) * splat(factors[r]) : splat(0.0f);
    for (int64_t k = from; k < to; k++) {
        vfloat column[VECTORS];
        if (ahead) fetch_upcoming(ahead, 4);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) column[v] = load(type, b, k * b_stride + v * WIDTH);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            vfloat x = splat(a[r * a_stride + k]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[r][v] += x * column[v];
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store_float(c + r * c_stride + v * WIDTH, sum[r][v]);
}

INLINE void multiply_rows(const int rows, enum element type, int64_t vectors, int64_t from, int64_t to, const float *a, int64_t a_stride,
                          const void *b, int64_t b_stride, float *c, int64_t c_stride, const float *factors, struct upcoming *ahead) {
    int64_t bytes = type == FLOAT32 ? 4 : 2;
    for (int64_t v = 0; v < vectors;) {
        const void *part = (const char *)b + v * WIDTH * bytes;
        float *to_part = c + v * WIDTH;
        if (vectors - v >= VECTORS) {
            multiply_tile(rows, VECTORS, type, from, to, a, a_stride, part, b_stride, to_part, c_stride, factors, v ? NULL : ahead);
            v += VECTORS;
        } else if (VECTORS > 2 && vectors - v >= 2) {
            multiply_tile(rows, 2, type, from, to, a, a_stride, part, b_stride, to_part, c_stride, factors, v ? NULL : ahead);
            v += 2;
        } else {
            multiply_tile(rows, 1, type, from, to, a, a_stride, part, b_stride, to_part, c_stride, factors, v ? NULL : ahead);
            v += 1;
        }
    }
}

#define MULTIPLY(name, type)                                                                                                              \
    static void name(int rows, int64_t vectors, int64_t from, int64_t to, const float *a, int64_t a_stride, const void *b,                \
                     int64_t b_stride, float *c, int64_t c_stride, const float *factors, struct upcoming *ahead) { \
        if (rows == 1) multiply_rows(1, type, vectors, from, to, a, a_stride, b, b_stride, c, c_stride, factors, ahead);                  \
        if (rows == 2) multiply_rows(2, type, vectors, from, to, a, a_stride, b, b_stride, c, c_stride, factors, ahead);                  \
        if (rows == 3) multiply_rows(3, type, vectors, from, to, a, a_stride, b, b_stride, c, c_stride, factors, ahead);                  \
        if (rows == 4) multiply_rows(4, type, vectors, from, to, a, a_stride, b, b_stride, c, c_stride, factors, ahead);                  \
        if (rows == 5) multiply_rows(5, type, vectors, from, to, a, a_stride, b, b_stride, c, c_stride, factors, ahead);                  \
        if (rows == 6) multiply_rows(6, type, vectors, from, to, a, a_stride, b, b_stride, c, c_stride, factors, ahead);                  \
    }
MULTIPLY(multiply_float32, FLOAT32)
MULTIPLY(multiply_bfloat16, BFLOAT16)
MULTIPLY(multiply_float16, FLOAT16)

INLINE int64_t whole_vectors(int64_t count) { return (count + WIDTH - 1) / WIDTH * WIDTH; }

/* WIDTH words of 4 bytes from each of WIDTH rows -> out[i] holds word i of every row. */
INLINE void transpose_words(const char *const rows[WIDTH], vuint out[WIDTH]) {
#if defined(ISA_AVX512)
    /* Loads that broadcast a quarter of a row put it into its place; what is left are two steps within quarters. */
    __m512 t[16], u[16];
    for (int q = 0; q < 4; q++)
        for (int i = 0; i < 4; i++) {
            __m512 x = _mm512_broadcast_f32x4(_mm_loadu_ps((const float *)(rows[i] + 16 * q)));
            x = _mm512_mask_broadcast_f32x4(x, 0x00f0, _mm_loadu_ps((const float *)(rows[4 + i] + 16 * q)));
            x = _mm512_mask_broadcast_f32x4(x, 0x0f00, _mm_loadu_ps((const float *)(rows[8 + i] + 16 * q)));
            t[4 * q + i] = _mm512_mask_broadcast_f32x4(x, 0xf000, _mm_loadu_ps((const float *)(rows[12 + i] + 16 * q)));
        }
    for (int q = 0; q < 4; q++) {
        u[4 * q] = _mm512_unpacklo_ps(t[4 * q], t[4 * q + 1]);
        u[4 * q + 1] = _mm512_unpackhi_ps(t[4 * q], t[4 * q + 1]);
        u[4 * q + 2] = _mm512_unpacklo_ps(t[4 * q + 2], t[4 * q + 3]);
        u[4 * q + 3] = _mm512_unpackhi_ps(t[4 * q + 2], t[4 * q + 3]);
    }
    for (int q = 0; q < 4; q++) {
        out[4 * q] = (vuint)_mm512_unpacklo_pd((__m512d)u[4 * q], (__m512d)u[4 * q + 2]);
        out[4 * q + 1] = (vuint)_mm512_unpackhi_pd((__m512d)u[4 * q], (__m512d)u[4 * q + 2]);
        out[4 * q + 2] = (vuint)_mm512_unpacklo_pd((__m512d)u[4 * q + 1], (__m512d)u[4 * q + 3]);
        out[4 * q + 3] = (vuint)_mm512_unpackhi_pd((__m512d)u[4 * q + 1], (__m512d)u[4 * q + 3]);
    }
#elif defined(ISA_AVX2)
    __m256 t[8], u[8];
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 4; i++)
            t[4 * h + i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps((const float *)(rows[i] + 16 * h))),
                                                _mm_loadu_ps((const float *)(rows[4 + i] + 16 * h)), 1);
    for (int h = 0; h < 2; h++) {
        u[4 * h] = _mm256_unpacklo_ps(t[4 * h], t[4 * h + 1]);
        u[4 * h + 1] = _mm256_unpackhi_ps(t[4 * h], t[4 * h + 1]);
        u[4 * h + 2] = _mm256_unpacklo_ps(t[4 * h + 2], t[4 * h + 3]);
        u[4 * h + 3] = _mm256_unpackhi_ps(t[4 * h + 2], t[4 * h + 3]);
    }
    for (int h = 0; h < 2; h++) {
        out[4 * h] = (vuint)_mm256_unpacklo_pd((__m256d)u[4 * h], (__m256d)u[4 * h + 2]);
        out[4 * h + 1] = (vuint)_mm256_unpackhi_pd((__m256d)u[4 * h], (__m256d)u[4 * h + 2]);
        out[4 * h + 2] = (vuint)_mm256_unpacklo_pd((__m256d)u[4 * h + 1], (__m256d)u[4 * h + 3]);
        out[4 * h + 3] = (vuint)_mm256_unpackhi_pd((__m256d)u[4 * h + 1], (__m256d)u[4 * h + 3]);
    }
#else
    uint32_t words[WIDTH][WIDTH], turned[WIDTH][WIDTH];
    for (int i = 0; i < WIDTH; i++) memcpy(words[i], rows[i], sizeof words[i]);
    for (int i = 0; i < WIDTH; i++)
        for (int j = 0; j < WIDTH; j++) turned[j][i] = words[i][j];
    memcpy(out, turned, sizeof turned);
#endif
}

/* The keys of WIDTH columns from `column` on; those past the tokens are the last token once more. */
INLINE void find_keys(const char *keys, int64_t token_bytes, int64_t tokens, int64_t column, const char *rows[WIDTH]) {
    for (int i = 0; i < WIDTH; i++) rows[i] = keys + (column + i < tokens ? column + i : tokens - 1) * token_bytes;
}

/* The next WIDTH words of WIDTH keys, of which `left` bytes are left and what is missing counts as 0; the keys go on behind them. */
INLINE void take_words(const char *rows[WIDTH], int64_t left, vuint words[WIDTH], struct upcoming *ahead) {
    char rest[WIDTH][4 * WIDTH];
    const char *from[WIDTH];
    if (left < 4 * WIDTH) memset(rest, 0, sizeof rest);
    for (int i = 0; i < WIDTH; i++) from[i] = left < 4 * WIDTH ? memcpy(rest[i], rows[i], left) : rows[i];
    transpose_words(from, words);
    fetch_upcoming(ahead, WIDTH * WIDTH / 16);
    for (int i = 0; i < WIDTH; i++) rows[i] += 4 * WIDTH;
}

/* The dimensions that one word of WIDTH keys holds, as float32 rows of the panel: `count` of them. */
INLINE void spread_word(enum element type, vuint word, float *panel, int64_t stride, int64_t count) {
    if (type == FLOAT32) {
        store_float(panel, (vfloat)word);
    } else if (type == BFLOAT16) {
        store_float(panel, (vfloat)(word << 16));
        if (count > 1) store_float(panel + stride, (vfloat)(word & 0xffff0000u));
    } else if (type == STORED_INT8) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            if (i < count) store_float(panel + i * stride, __builtin_convertvector((vint)(word << (24 - 8 * i)) >> 24, vfloat));
    } else if (type == STORED_INT4) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            if (i < count) store_float(panel + i * stride, __builtin_convertvector((vint)(word << (28 - 4 * i)) >> 28, vfloat));
    } else {
        store_float(panel, widen_float16(__builtin_convertvector(word & 0xffffu, vhalf)));
        if (count > 1) store_float(panel + stride, widen_float16(__builtin_convertvector(word >> 16, vhalf)));
    }
}

/* Keys [tokens, size] of one block and head -> panel [size, columns]; columns past the tokens repeat the last token. */
INLINE void pack_keys_of(enum element type, const char *keys, int64_t token_bytes, int64_t tokens, int64_t size, float *panel,
                         int64_t columns, struct upcoming *ahead) {
    const int64_t in_word = type == FLOAT32 ? 1 : type == STORED_INT8 ? 4 : type == STORED_INT4 ? 8 : 2, row_bytes = size * 4 / in_word;
    for (int64_t column = 0; column < columns; column += WIDTH) {
        const char *rows[WIDTH];
        find_keys(keys, token_bytes, tokens, column, rows);
        for (int64_t at = 0; at < row_bytes; at += 4 * WIDTH) {
            vuint words[WIDTH];
            take_words(rows, row_bytes - at, words, ahead);
            int64_t first = at / 4 * in_word, count = size - first < WIDTH * in_word ? size - first : WIDTH * in_word;
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                if (i * in_word < count)
                    spread_word(type, words[i], panel + (first + i * in_word) * columns + column, columns, count - i * in_word);
        }
    }
}

static void pack_keys(enum element type, const char *keys, int64_t token_bytes, int64_t tokens, int64_t size, float *panel,
                      int64_t columns, struct upcoming *ahead) {
    if (type == FLOAT32) pack_keys_of(FLOAT32, keys, token_bytes, tokens, size, panel, columns, ahead);
    if (type == BFLOAT16) pack_keys_of(BFLOAT16, keys, token_bytes, tokens, size, panel, columns, ahead);
    if (type == FLOAT16) pack_keys_of(FLOAT16, keys, token_bytes, tokens, size, panel, columns, ahead);
    if (type == STORED_INT8) pack_keys_of(STORED_INT8, keys, token_bytes, tokens, size, panel, columns, ahead);
    if (type == STORED_INT4) pack_keys_of(STORED_INT4, keys, token_bytes, tokens, size, panel, columns, ahead);
}

/* One token's `size` integers as float32, without their scale. */
static void widen_integers(enum element type, const int8_t *bytes, int64_t size, float *out) {
    if (type == STORED_INT8) {
        int64_t whole = size / WIDTH * WIDTH;
        for (int64_t i = 0; i < whole; i += WIDTH) store_float(out + i, widen_bytes(bytes + i));
        for (int64_t i = whole; i < size; i++) out[i] = bytes[i];
    } else {
        for (int64_t i = 0; i < size / 2; i++) {
            out[2 * i] = (int8_t)(bytes[i] << 4) >> 4;
            out[2 * i + 1] = bytes[i] >> 4;
        }
    }
}

/* Values from .. to of [tokens, size] -> float32 [tokens, whole vectors of size]; strides count elements, of integers bytes. */
static void widen_values(enum element type, const void *values, int64_t token_stride, int64_t from, int64_t to, int64_t size, float *out) {
    int64_t stride = whole_vectors(size), whole = size / WIDTH * WIDTH;
    for (int64_t token = from; token < to; token++) {
        if (type == STORED_INT8 || type == STORED_INT4) {
            const int8_t *bytes = (const int8_t *)values + token * token_stride;
            widen_integers(type, bytes, size, out + token * stride);
            continue;
        }
        for (int64_t i = 0; i < whole; i += WIDTH) {
            int64_t at = token * token_stride + i;
            store_float(out + token * stride + i, type == FLOAT32    ? load(FLOAT32, values, at)
                                                  : type == BFLOAT16 ? load(BFLOAT16, values, at)
                                                                     : load(FLOAT16, values, at));
        }
        if (whole < size) store_float(out + token * stride + whole, load_some(type, values, token * token_stride + whole, size - whole));
    }
}

#endif
