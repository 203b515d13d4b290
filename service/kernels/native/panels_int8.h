/* The products of attention over keys and values in 8 bits, by VNNI's dot products of four: query rows in steps times keys, weights in steps
 * times values.
 *
 * dpbusd takes one unsigned operand: keys with 128 added, of which the row's own sum then is taken off 128 times, and weights, which are
 * not negative. Scales of rows are applied to the sums; scales of tokens go into scores and weights before. Invariants: integer sums are
 * exact, so a row's bits do not depend on the rows beside it; a weight of 0 takes nothing from its value, whatever that is.
 */
#ifndef DEEPSEEK_PANELS_INT8_H
#define DEEPSEEK_PANELS_INT8_H

#include "weighing.h"

/* Rows of the largest group that is weighed together. */
#define GROUP_ROWS 16

INLINE int64_t whole_words(int64_t size) { return (size + 3) / 4 * 4; }

#if defined(ISA_AVX512)
#include "quantised.h"
#define HAS_STEPS 1

/* A query row -> steps [whole_words(size)], their sum, and the scale, which is returned. */
INLINE float step_query(const float *x, int64_t size, int8_t *out, int32_t *sum) {
    return quantise_row(x, size, whole_words(size), whole_words(size), out, 64, sum);
}

/* Rows [size] of bytes -> words of four dimensions [whole_words(size) / 4, columns], 128 added to each byte; the rows go on behind them. */
INLINE void pack_step_rows(const char *rows[WIDTH], int64_t size, uint32_t *panel, int64_t columns, struct upcoming *ahead) {
    const vuint flip = (vuint)_mm512_set1_epi8((char)0x80);
    const int64_t bytes = whole_words(size);
    for (int64_t at = 0; at < bytes; at += 4 * WIDTH) {
        vuint words[WIDTH];
        take_words(rows, size - at, words, ahead);
        int64_t count = (bytes - at) / 4 < WIDTH ? (bytes - at) / 4 : WIDTH;
        for (int i = 0; i < count; i++) {
            vuint word = words[i] ^ flip;
            memcpy(panel + (at / 4 + i) * columns, &word, sizeof word);
        }
    }
}

/* Keys [tokens, size] of one block and head -> such words. */
static void pack_key_steps(const char *keys, int64_t token_bytes, int64_t tokens, int64_t size, uint32_t *panel, int64_t columns,
                           struct upcoming *ahead) {
    for (int64_t column = 0; column < columns; column += WIDTH) {
        const char *rows[WIDTH];
        find_keys(keys, token_bytes, tokens, column, rows);
        pack_step_rows(rows, size, panel + column, columns, ahead);
    }
}

/* Values [tokens, size] -> words of four tokens [tokens / 4, whole_vectors(size)], the last token once more where there are none. */
static void pack_value_steps(const char *values, int64_t token_bytes, int64_t tokens, int64_t size, uint32_t *panel) {
    int64_t columns = whole_vectors(size);
    for (int64_t token = 0; token < tokens; token += 4) {
        for (int64_t at = 0; at < size; at += 64) {
            __m512i row[4];
            __mmask64 there = size - at >= 64 ? ~0ull : (1ull << (size - at)) - 1;
            for (int i = 0; i < 4; i++)
                row[i] = _mm512_maskz_loadu_epi8(there, values + (token + i < tokens ? token + i : tokens - 1) * token_bytes + at);
            __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]), high01 = _mm512_unpackhi_epi8(row[0], row[1]);
            __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]), high23 = _mm512_unpackhi_epi8(row[2], row[3]);
            /* Quarter q of words[j] holds the dimensions 16 q + 4 j .. 16 q + 4 j + 3: turned, they come in order. */
            __m512i w0 = _mm512_unpacklo_epi16(low01, low23), w1 = _mm512_unpackhi_epi16(low01, low23);
            __m512i w2 = _mm512_unpacklo_epi16(high01, high23), w3 = _mm512_unpackhi_epi16(high01, high23);
            __m512i a = _mm512_shuffle_i32x4(w0, w1, 0x44), b = _mm512_shuffle_i32x4(w2, w3, 0x44);
            __m512i c = _mm512_shuffle_i32x4(w0, w1, 0xee), d = _mm512_shuffle_i32x4(w2, w3, 0xee);
            __m512i ordered[4] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd), _mm512_shuffle_i32x4(c, d, 0x88),
                                  _mm512_shuffle_i32x4(c, d, 0xdd)};
            for (int q = 0; q < 4 && at + 16 * q < columns; q++)
                _mm512_storeu_si512(panel + token / 4 * columns + at + 16 * q, ordered[q]);
        }
    }
}

/* Tiles of R rows times C vectors by the macros of quantised.h, which name every register: of arrays compilers make copies. */
#define STRIPS_1(X, r) X(r, 0)
#define LOAD_PANEL(r, c) const __m512i w##c = _mm512_loadu_si512(panel + i * columns + 16 * c);
#define SCORE_ONE(r, c) a##r##_##c = add_dots(a##r##_##c, w##c, value);
#define SCORE_ROW(r, S)                                               \
    {                                                                 \
        const __m512i value = four_inputs(query + 4 * (words * r + i)); \
        S(SCORE_ONE, r)                                                 \
    }
#define PUT_SCORE(r, c) \
    _mm512_storeu_ps(scores + r * columns + 16 * c, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(a##r##_##c, offset)), scale));
#define PUT_SCORES(r, S)                                         \
    {                                                            \
        const __m512i offset = _mm512_set1_epi32(128 * sums[r]); \
        const __m512 scale = _mm512_set1_ps(scales[r]);          \
        S(PUT_SCORE, r)                                          \
    }
#define SCORE_TILE(R, C)                                                                                                              \
    static void score_tile_##R##x##C(int64_t words, const int8_t *query, const float *scales, const int32_t *sums, const uint32_t *panel, \
                                     float *scores, int64_t columns) {                                                                \
        ROWS_##R(ZERO_ROW_8, STRIPS_##C)                                                                                              \
        int64_t i = 0;                                                                                                                \
        do {                                                                                                                          \
            STRIPS_##C(LOAD_PANEL, 0) ROWS_##R(SCORE_ROW, STRIPS_##C)                                                                 \
        } while (++i < words);                                                                                                                             \
        ROWS_##R(PUT_SCORES, STRIPS_##C)                                                                                              \
    }
#define MIX_ONE(r, c) a##r##_##c = add_dots(a##r##_##c, value, w##c);
#define MIX_ROW(r, S)                                                                    \
    {                                                                                    \
        const __m512i value = four_inputs((const int8_t *)steps + r * step_stride + 4 * i); \
        S(MIX_ONE, r)                                                                    \
    }
#define PUT_MIXED(r, c)                                                                                                               \
    {                                                                                                                                 \
        float *at = mixed + r * columns + 16 * c;                                                                                     \
        _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(a##r##_##c), scale, _mm512_mul_ps(_mm512_loadu_ps(at), factor)));     \
    }
#define PUT_ROW_MIXED(r, S)                                                                         \
    {                                                                                               \
        const __m512 scale = _mm512_set1_ps(scales[r]), factor = _mm512_set1_ps(factors[r]);        \
        S(PUT_MIXED, r)                                                                             \
    }
#define MIX_TILE(R, C)                                                                                                                \
    static void mix_tile_##R##x##C(int64_t from, int64_t to, const uint8_t *steps, int64_t step_stride, const float *scales,          \
                                   const float *factors, const uint32_t *panel, float *mixed, int64_t columns, struct upcoming *ahead) { \
        ROWS_##R(ZERO_ROW_8, STRIPS_##C)                                                                                              \
        int64_t i = from;                                                                                                             \
        do {                                                                                                                          \
            fetch_upcoming(ahead, 4);                                                                                                 \
            STRIPS_##C(LOAD_PANEL, 0) ROWS_##R(MIX_ROW, STRIPS_##C)                                                                   \
        } while (++i < to);                                                                                                           \
        ROWS_##R(PUT_ROW_MIXED, STRIPS_##C)                                                                                           \
    }
#define TILES_OF(R) SCORE_TILE(R, 1) SCORE_TILE(R, 4) MIX_TILE(R, 1) MIX_TILE(R, 4)
TILES_OF(1) TILES_OF(2) TILES_OF(3) TILES_OF(4) TILES_OF(5) TILES_OF(6)

typedef void score_tile(int64_t, const int8_t *, const float *, const int32_t *, const uint32_t *, float *, int64_t);
typedef void mix_tile(int64_t, int64_t, const uint8_t *, int64_t, const float *, const float *, const uint32_t *, float *, int64_t,
                      struct upcoming *);
static score_tile *const score_tiles[ROWS][2] = {{score_tile_1x1, score_tile_1x4}, {score_tile_2x1, score_tile_2x4},
                                                 {score_tile_3x1, score_tile_3x4}, {score_tile_4x1, score_tile_4x4},
                                                 {score_tile_5x1, score_tile_5x4}, {score_tile_6x1, score_tile_6x4}};
static mix_tile *const mix_tiles[ROWS][2] = {{mix_tile_1x1, mix_tile_1x4}, {mix_tile_2x1, mix_tile_2x4}, {mix_tile_3x1, mix_tile_3x4},
                                             {mix_tile_4x1, mix_tile_4x4}, {mix_tile_5x1, mix_tile_5x4}, {mix_tile_6x1, mix_tile_6x4}};

/* Scores [rows, columns] of query rows in steps over a panel of keys, without the scales of the keys. */
static void score_steps(int rows, int64_t columns, int64_t size, const int8_t *query, const float *scales, const int32_t *sums,
                        const uint32_t *panel, float *scores) {
    for (int64_t column = 0; column < columns;) {
        int wide = columns - column >= 64;
        score_tiles[rows - 1][wide](whole_words(size) / 4, query, scales, sums, panel + column, scores + column, columns);
        column += wide ? 64 : 16;
    }
}

/* c [rows, columns] = factors * c + steps [rows, from .. to] of weights, each a `scales`, times values. */
static void mix_steps(int rows, int64_t columns, int64_t from, int64_t to, const uint8_t *steps, int64_t step_stride, const float *scales,
                      const float *factors, const uint32_t *panel, float *mixed, struct upcoming *ahead) {
    for (int64_t column = 0; column < columns;) {
        int wide = columns - column >= 64;
        mix_tiles[rows - 1][wide](from / 4, (to + 3) / 4, steps, step_stride, scales, factors, panel + column, mixed + column, columns, ahead);
        column += wide ? 64 : 16;
    }
}

/* Scores of a row under the maximum `now` -> weights times the scales of the values, in their place; gives the largest, and their sums without
 * scales. */
INLINE float weigh_steps_row(const int64_t columns, const struct weighing *w, float *scores, float now, __m512 *total) {
    const __m512 top = _mm512_set1_ps(now);
    __m512 sum = _mm512_setzero_ps();
    __m512i largest = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int64_t i = 0; i < columns; i += 16) {
        __m512 weight = exp2_short(_mm512_sub_ps(_mm512_loadu_ps(scores + i), top));
        sum = _mm512_add_ps(sum, weight);
        weight = _mm512_mul_ps(weight, _mm512_loadu_ps(w->value_scales + i));
        largest = _mm512_max_epu32(largest, (__m512i)weight);
        _mm512_storeu_ps(scores + i, weight);
    }
    uint32_t bits = _mm512_reduce_max_epu32(largest);
    float most;
    memcpy(&most, &bits, sizeof most);
    *total = sum;
    return most;
}

/* Weights of a row -> steps of 0 .. 255, of which one is returned (not a number where one of the weights is). */
INLINE float step_weights(const int64_t columns, const float *weights, float most, uint8_t *steps) {
    const __m512 inverse = _mm512_set1_ps(most > 0 ? 255.0f / most : 0.0f);
#pragma GCC unroll 4
    for (int64_t i = 0; i < columns; i += 16)
        _mm_storeu_si128((__m128i *)(steps + i),
                         _mm512_cvtusepi32_epi8(_mm512_cvtps_epu32(_mm512_mul_ps(_mm512_loadu_ps(weights + i), inverse))));
    return most / 255.0f;
}

/* Rows of one block, row r of which sees the columns low[r] .. high[r] - 1: as weigh_rows, `steps` [rows, stride] and a step
 * of each. Rows that see nothing get steps of 0, as do columns that there are not. Each stage takes all rows, whose chains then run side by side. */
INLINE void weigh_steps_of(const int64_t columns, int rows, const struct weighing *w, float *scores, const int64_t *low, const int64_t *high,
                           float *maxima, float *sums, float *factors, uint8_t *steps, int64_t stride, float *step) {
    float most[GROUP_ROWS];
    highest_scores(columns, rows, w, scores, low, high, maxima, factors);
    for (int r = 0; r < rows; r++) {
        if (low[r] >= high[r]) continue;
        __m512 total;
        most[r] = weigh_steps_row(columns, w, scores + r * columns, maxima[r], &total);
        add_total(sums + r * WIDTH, factors[r], total);
    }
    for (int r = 0; r < rows; r++) {
        if (columns < stride || low[r] >= high[r]) memset(steps + r * stride, 0, stride);
        step[r] = low[r] < high[r] ? step_weights(columns, scores + r * columns, most[r], steps + r * stride) : 0.0f;
    }
}

static void weigh_steps(int rows, int64_t columns, const struct weighing *w, float *scores, const int64_t *low, const int64_t *high,
                        float *maxima, float *sums, float *factors, uint8_t *steps, int64_t stride, float *step) {
    if (columns == 64)
        weigh_steps_of(64, rows, w, scores, low, high, maxima, sums, factors, steps, stride, step);
    else
        weigh_steps_of(columns, rows, w, scores, low, high, maxima, sums, factors, steps, stride, step);
}
#else
#define HAS_STEPS 0
/* Without dot products of bytes keys and values are widened instead; nothing of these is called. */
INLINE float step_query(const float *x, int64_t size, int8_t *out, int32_t *sum) { return (void)x, (void)size, (void)out, (void)sum, 0.0f; }
#define pack_key_steps(...) ((void)0)
#define pack_value_steps(...) ((void)0)
#endif

#endif
