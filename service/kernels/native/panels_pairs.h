/* The products of attention over a cache of bfloat16 by dot products of two: query rows times keys, weights times values, sums in float32.
 *
 * Query rows and weights are rounded to bfloat16 too; a row's weights are summed as they were rounded, where values have no scales. Integers of far blocks are exact in
 * bfloat16, their scales are applied to scores and weights. Invariants: a row's bits do not depend on the rows beside it; values of tokens
 * that no row of the tile sees are taken as 0, whatever they hold.
 */
#ifndef DEEPSEEK_PANELS_PAIRS_H
#define DEEPSEEK_PANELS_PAIRS_H

#include "panels_int8.h"

INLINE int64_t whole_pairs(int64_t size) { return (size + 1) / 2; }

#if HAS_PAIRS
/* sum + dot products of two: written out like add_dots, which also keeps the instruction out of code for other processors. */
INLINE __m512 add_pairs(__m512 sum, __m512i a, __m512i b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

/* 32 bfloat16, rounded to nearest even: `low` first. */
INLINE __m512i narrow_pairs(__m512 low, __m512 high) {
    __m512i out;
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(out) : "v"(low), "v"(high));
    return out;
}

/* Float32 that 16 upper bits hold exactly -> words of two. */
INLINE vuint join_halves(vfloat low, vfloat high) { return ((vuint)high & 0xffff0000u) | ((vuint)low >> 16); }

/* A query row of float32 -> words [whole_pairs(size)], which may lie where the row does. */
INLINE void pair_query(const float *x, int64_t size, uint32_t *out) {
    for (int64_t i = 0; i < size; i += 2 * WIDTH) {
        int64_t first = size - i < WIDTH ? size - i : WIDTH, second = size - i - first < WIDTH ? size - i - first : WIDTH;
        vfloat low = load_some(FLOAT32, x, i, first), high = second ? load_some(FLOAT32, x, i + first, second) : splat(0.0f);
        __m512i words = narrow_pairs((__m512)low, (__m512)high);
        memcpy(out + i / 2, &words, whole_pairs(first + second) * sizeof *out);
    }
}

/* What one word of WIDTH keys holds, as words of two dimensions: `count` of them. */
INLINE void spread_pairs(enum element type, vuint word, uint32_t *panel, int64_t stride, int64_t count) {
    const int bits = type == STORED_INT8 ? 8 : 4;
    if (type == BFLOAT16) memcpy(panel, &word, sizeof word);
    if (type == STORED_INT8 || type == STORED_INT4)
#pragma GCC unroll 4
        for (int i = 0; i < 16 / bits; i++)
            if (i < count) {
                vuint low = word << (32 - bits - 2 * bits * i), high = word << (32 - 2 * bits - 2 * bits * i);
                vuint pair = join_halves(__builtin_convertvector((vint)low >> (32 - bits), vfloat),
                                         __builtin_convertvector((vint)high >> (32 - bits), vfloat));
                memcpy(panel + i * stride, &pair, sizeof pair);
            }
}

/* Keys [tokens, size] of one block and head -> words of two dimensions [whole_pairs(size), columns]; columns past the tokens repeat the last. */
INLINE void pack_key_pairs_of(enum element type, const char *keys, int64_t token_bytes, int64_t tokens, int64_t size, uint32_t *panel,
                              int64_t columns, struct upcoming *ahead) {
    const int64_t in_word = type == STORED_INT8 ? 4 : type == STORED_INT4 ? 8 : 2, row_bytes = size * 4 / in_word;
    for (int64_t column = 0; column < columns; column += WIDTH) {
        const char *rows[WIDTH];
        find_keys(keys, token_bytes, tokens, column, rows);
        for (int64_t at = 0; at < row_bytes; at += 4 * WIDTH) {
            vuint words[WIDTH];
            take_words(rows, row_bytes - at, words, ahead);
            const int64_t first = at / 4 * in_word / 2, count = whole_pairs(size) - first;
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                if (i * in_word / 2 < count)
                    spread_pairs(type, words[i], panel + (first + i * in_word / 2) * columns + column, columns, count - i * in_word / 2);
        }
    }
}

static void pack_key_pairs(enum element type, const char *keys, int64_t token_bytes, int64_t tokens, int64_t size, uint32_t *panel,
                           int64_t columns, struct upcoming *ahead) {
    if (type == BFLOAT16) pack_key_pairs_of(BFLOAT16, keys, token_bytes, tokens, size, panel, columns, ahead);
    if (type == STORED_INT8) pack_key_pairs_of(STORED_INT8, keys, token_bytes, tokens, size, panel, columns, ahead);
    if (type == STORED_INT4) pack_key_pairs_of(STORED_INT4, keys, token_bytes, tokens, size, panel, columns, ahead);
}

/* Dimensions i .. i + 31 of two tokens, or 0 of one that is NULL -> two vectors of words. */
INLINE void pair_values(const uint16_t *low, const uint16_t *high, int64_t i, int64_t size, __m512i words[2]) {
    const __mmask32 there = size - i >= 32 ? ~0u : (1u << (size - i)) - 1;
    __m512i a = low ? _mm512_maskz_loadu_epi16(there, low + i) : _mm512_setzero_si512();
    __m512i b = high ? _mm512_maskz_loadu_epi16(there, high + i) : _mm512_setzero_si512();
    /* Quarter q of them holds dimensions 8 q .. 8 q + 3 and 8 q + 4 .. 8 q + 7: turned, they come in order. */
    __m512i even = _mm512_unpacklo_epi16(a, b), odd = _mm512_unpackhi_epi16(a, b);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    words[0] = _mm512_permutex2var_epi64(even, first, odd);
    words[1] = _mm512_permutex2var_epi64(even, second, odd);
}

/* 16 integers as float32, `there` their bytes: of int4, two in one, the even index in the low half. */
INLINE __m512 widen_sixteen(enum element type, const int8_t *x, __mmask16 there) {
    if (type == STORED_INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, x)));
    const __m512i bytes = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, x));
    const __m512i spread = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), bytes);
    const __m512i shifts = _mm512_set1_epi64((int64_t)24 << 32 | 28);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sllv_epi32(spread, shifts), 28));
}

/* The same of integers, 16 dimensions. */
INLINE __m512i pair_integers(enum element type, const int8_t *low, const int8_t *high, int64_t i, int64_t size) {
    const int64_t count = size - i < WIDTH ? size - i : WIDTH, at = type == STORED_INT8 ? i : i / 2, bytes = type == STORED_INT8 ? count : (count + 1) / 2;
    const __mmask16 there = (__mmask16)((1u << bytes) - 1);
    const __m512 none = _mm512_setzero_ps();
    return (__m512i)join_halves((vfloat)(low ? widen_sixteen(type, low + at, there) : none), (vfloat)(high ? widen_sixteen(type, high + at, there) : none));
}

/* Values of the tokens from .. to - 1 -> words of two tokens [.., whole_vectors(size)], word i of which are tokens 2 i and 2 i + 1; the stride
 * counts elements, of integers bytes. */
static void pack_value_pairs(enum element type, const void *values, int64_t token_stride, int64_t from, int64_t to, int64_t size,
                             uint32_t *panel, struct upcoming *ahead) {
    const int64_t columns = whole_vectors(size), bytes = type == BFLOAT16 ? 2 : 1;
    for (int64_t token = from / 2 * 2; token < to; token += 2) {
        fetch_upcoming(ahead, 4);
        const char *row = (const char *)values + token * token_stride * bytes, *low = token < from ? NULL : row;
        const char *high = token + 1 < to ? row + token_stride * bytes : NULL;
        uint32_t *out = panel + token / 2 * columns;
        if (type == BFLOAT16)
            for (int64_t i = 0; i < size; i += 32) {
                __m512i words[2];
                pair_values((const uint16_t *)low, (const uint16_t *)high, i, size, words);
                _mm512_storeu_si512(out + i, words[0]);
                if (i + 16 < columns) _mm512_storeu_si512(out + i + 16, words[1]);
            }
        else
            for (int64_t i = 0; i < size; i += WIDTH)
                _mm512_storeu_si512(out + i, type == STORED_INT8
                                                 ? pair_integers(STORED_INT8, (const int8_t *)low, (const int8_t *)high, i, size)
                                                 : pair_integers(STORED_INT4, (const int8_t *)low, (const int8_t *)high, i, size));
    }
}

#define ZERO_PAIR(r, c) __m512 a##r##_##c = _mm512_setzero_ps();
#define ZERO_PAIRS(r, S) S(ZERO_PAIR, r)
#define SCORE_PAIR(r, c) a##r##_##c = add_pairs(a##r##_##c, w##c, value);
#define SCORE_PAIRS(r, S)                                                                  \
    {                                                                                      \
        const __m512i value = four_inputs((const int8_t *)(query + r * words + i)); \
        S(SCORE_PAIR, r)                                                                   \
    }
#define PUT_PAIR(r, c) _mm512_storeu_ps(scores + r * columns + 16 * c, a##r##_##c);
#define PUT_PAIRS(r, S) S(PUT_PAIR, r)
#define SCORE_PAIR_TILE(R, C)                                                                                                 \
    static void score_pairs_##R##x##C(int64_t words, const uint32_t *query, const uint32_t *panel, float *scores, int64_t columns) { \
        ROWS_##R(ZERO_PAIRS, STRIPS_##C)                                                                                      \
        int64_t i = 0;                                                                                                        \
        do {                                                                                                                  \
            STRIPS_##C(LOAD_PANEL, 0) ROWS_##R(SCORE_PAIRS, STRIPS_##C)                                                       \
        } while (++i < words);                                                                                                \
        ROWS_##R(PUT_PAIRS, STRIPS_##C)                                                                                       \
    }
#define BEGIN_PAIR(r, c) __m512 a##r##_##c = _mm512_mul_ps(_mm512_loadu_ps(mixed + r * columns + 16 * c), _mm512_set1_ps(factors[r]));
#define BEGIN_PAIRS(r, S) S(BEGIN_PAIR, r)
#define MIX_PAIRS(r, S)                                                                     \
    {                                                                                       \
        const __m512i value = four_inputs((const int8_t *)(weights + r * stride + i)); \
        S(SCORE_PAIR, r)                                                                    \
    }
#define KEEP_PAIR(r, c) _mm512_storeu_ps(mixed + r * columns + 16 * c, a##r##_##c);
#define KEEP_PAIRS(r, S) S(KEEP_PAIR, r)
#define MIX_PAIR_TILE(R, C)                                                                                                           \
    static void mix_pairs_##R##x##C(int64_t from, int64_t to, const uint32_t *weights, int64_t stride, const float *factors,          \
                                    const uint32_t *panel, float *mixed, int64_t columns, struct upcoming *ahead) {                   \
        ROWS_##R(BEGIN_PAIRS, STRIPS_##C)                                                                                             \
        int64_t i = from;                                                                                                             \
        do {                                                                                                                          \
            fetch_upcoming(ahead, 4);                                                                                                 \
            STRIPS_##C(LOAD_PANEL, 0) ROWS_##R(MIX_PAIRS, STRIPS_##C)                                                                 \
        } while (++i < to);                                                                                                           \
        ROWS_##R(KEEP_PAIRS, STRIPS_##C)                                                                                              \
    }
#define PAIR_TILES_OF(R) SCORE_PAIR_TILE(R, 1) SCORE_PAIR_TILE(R, 4) MIX_PAIR_TILE(R, 1) MIX_PAIR_TILE(R, 4)
PAIR_TILES_OF(1) PAIR_TILES_OF(2) PAIR_TILES_OF(3) PAIR_TILES_OF(4) PAIR_TILES_OF(5) PAIR_TILES_OF(6)

typedef void score_pair_tile(int64_t, const uint32_t *, const uint32_t *, float *, int64_t);
typedef void mix_pair_tile(int64_t, int64_t, const uint32_t *, int64_t, const float *, const uint32_t *, float *, int64_t, struct upcoming *);
static score_pair_tile *const score_pair_tiles[ROWS][2] = {{score_pairs_1x1, score_pairs_1x4}, {score_pairs_2x1, score_pairs_2x4},
                                                           {score_pairs_3x1, score_pairs_3x4}, {score_pairs_4x1, score_pairs_4x4},
                                                           {score_pairs_5x1, score_pairs_5x4}, {score_pairs_6x1, score_pairs_6x4}};
static mix_pair_tile *const mix_pair_tiles[ROWS][2] = {{mix_pairs_1x1, mix_pairs_1x4}, {mix_pairs_2x1, mix_pairs_2x4},
                                                       {mix_pairs_3x1, mix_pairs_3x4}, {mix_pairs_4x1, mix_pairs_4x4},
                                                       {mix_pairs_5x1, mix_pairs_5x4}, {mix_pairs_6x1, mix_pairs_6x4}};

/* Scores [rows, columns] of query rows in pairs over a panel of keys. */
static void score_pairs(int rows, int64_t columns, int64_t words, const uint32_t *query, const uint32_t *panel, float *scores) {
    for (int64_t column = 0; column < columns;) {
        int wide = columns - column >= 64;
        score_pair_tiles[rows - 1][wide](words, query, panel + column, scores + column, columns);
        column += wide ? 64 : 16;
    }
}

/* c [rows, columns] = factors * c + weights of the tokens from .. to - 1, rows `stride` words apart, times their values. */
static void mix_pairs(int rows, int64_t columns, int64_t from, int64_t to, const uint32_t *weights, int64_t stride, const float *factors,
                      const uint32_t *panel, float *mixed, struct upcoming *ahead) {
    for (int64_t column = 0; column < columns;) {
        int wide = columns - column >= 64;
        mix_pair_tiles[rows - 1][wide](from / 2, (to + 1) / 2, weights, stride, factors, panel + column, mixed + column, columns, ahead);
        column += wide ? 64 : 16;
    }
}

/* Scores of a row -> weights under the maximum `now`, in bfloat16 at the row's beginning, times the scales of the values; gives their sums. */
INLINE __m512 weigh_pairs_row(const int64_t columns, const struct weighing *w, float *scores, float now) {
    const __m512 top = _mm512_set1_ps(now), unit = _mm512_set1_ps(unit_left(w));
    __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int64_t i = 0; i < columns; i += 32) {
        __m512 low = exp2_short(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), unit, top)), high = _mm512_setzero_ps();
        if (i + 16 < columns) high = exp2_short(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i + 16), unit, top));
        __m512i rounded;
        if (w->value_scales) {
            total = _mm512_add_ps(total, _mm512_add_ps(low, high));
            low = _mm512_mul_ps(low, _mm512_loadu_ps(w->value_scales + i));
            if (i + 16 < columns) high = _mm512_mul_ps(high, _mm512_loadu_ps(w->value_scales + i + 16));
            rounded = narrow_pairs(low, high);
        } else {
            rounded = narrow_pairs(low, high);
            total = add_pairs(total, rounded, _mm512_set1_epi32(0x3f803f80));
        }
        _mm512_storeu_si512((char *)scores + 2 * i, rounded);
    }
    return total;
}

/* Rows of one block, row r of which sees the columns low[r] .. high[r] - 1: as weigh_steps; the weights lie where the scores did, each row's
 * at its beginning. */
INLINE void weigh_pairs_of(const int64_t columns, int rows, const struct weighing *w, float *scores, const int64_t *low, const int64_t *high,
                           float *maxima, float *sums, float *factors) {
    highest_scores(columns, rows, w, scores, low, high, maxima, factors);
    for (int r = 0; r < rows; r++) {
        if (low[r] < high[r])
            add_total(sums + r * WIDTH, factors[r], weigh_pairs_row(columns, w, scores + r * columns, maxima[r]));
        else
            memset(scores + r * columns, 0, (columns + 31) / 32 * 64);
    }
}

static void weigh_pairs(int rows, int64_t columns, const struct weighing *w, float *scores, const int64_t *low, const int64_t *high,
                        float *maxima, float *sums, float *factors) {
    if (columns == 64)
        weigh_pairs_of(64, rows, w, scores, low, high, maxima, sums, factors);
    else
        weigh_pairs_of(columns, rows, w, scores, low, high, maxima, sums, factors);
}
#else
/* Without dot products of bfloat16 keys and values are widened instead; nothing of these is called. */
#define pair_query(...) ((void)0)
#define pack_key_pairs(...) ((void)0)
#define pack_value_pairs(...) ((void)0)
#endif

#endif
