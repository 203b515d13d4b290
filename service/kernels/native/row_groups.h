/* A group of query rows over one block of keys and values, in the form that the cache and the processor have in common.
 *
 * Six rows share what is in registers; sixteen are a tile of AMX. Invariant: what is computed for a row is a chain of operations that depends on
 * the row alone, whichever rows share its group.
 */
#ifndef DEEPSEEK_ROW_GROUPS_H
#define DEEPSEEK_ROW_GROUPS_H

#include "attention_call.h"
#include "panels_pairs.h"


/* Whether a block that is read as `type` goes through tiles: far blocks beside a cache of int8 do not. */
INLINE int by_tiles(const struct attention *a, enum element type) { return a->tiles && (a->pairs || type == STORED_INT8); }

/* What a product of a query and a key is multiplied by: log2 units, but for a cap, which is applied to what it was. */
INLINE float score_unit(const struct attention *a) { return a->softcap > 0 ? a->scale : a->scale * LOG2_E; }

/* Which columns of a block rows from row0 of the tile on see: low .. high - 1 of each, from .. to - 1 of all. */
struct sight {
    int64_t low[GROUP_ROWS], high[GROUP_ROWS], from, to;
};

INLINE void see(const struct attention *a, int64_t row0, int rows, int64_t first_position, int64_t block_start, struct sight *sight) {
    int64_t *low = sight->low, *high = sight->high, from = a->block_tokens, to = 0;
    for (int r = 0; r < rows; r++) {
        int64_t position = first_position + (row0 + r) / a->group;
        low[r] = position - a->window + 1 > block_start ? position - a->window + 1 - block_start : 0;
        high[r] = position + 1 - block_start < a->block_tokens ? position + 1 - block_start : a->block_tokens;
        if (low[r] >= high[r]) continue;
        from = low[r] < from ? low[r] : from;
        to = high[r] > to ? high[r] : to;
    }
    sight->from = from, sight->to = to;
}

#if defined(ISA_AMX)
#include "amx.h"

/* Around whatever goes through the tiles. */
INLINE void begin_tiles(const struct attention *a) {
    if (a->tiles) use_shapes();
}
INLINE void end_tiles(const struct attention *a) {
    if (a->tiles) _tile_release();
}

/* Scores [16, columns] of the rows of a group over a panel of keys. */
static void score_pair_group(const struct attention *a, const struct scratch *s, int64_t row0) {
    const int64_t words = a->key_size / 2, columns = s->columns, stride = columns * 4;
    const uint32_t *query = (const uint32_t *)s->query + row0 * words;
    TILES_READ_MEMORY
    for (int64_t column = 0; column < columns; column += 64) {
        const int64_t tiles = at_most((columns - column) / 16, 4);
        ZERO_TILES
        for (int64_t i = 0; i < words; i += 16) {
            const uint32_t *keys = (const uint32_t *)s->panel + i * columns + column;
            _tile_loadd(4, query + i, words * 4);
            MULTIPLY_SOME_TILES(_tile_dpbf16ps, tiles, keys, stride)
        }
        float *to = s->scores + column;
        STORE_SOME_TILES(tiles, to, stride)
    }
}

/* mixed [16, value_columns] += weights, where the scores were, times the values. */
static void mix_pair_group(const struct attention *a, const struct scratch *s, float *mixed) {
    const int64_t columns = whole_vectors(a->value_size), words = (s->columns + 31) / 32 * 16, stride = columns * 4;
    TILES_READ_MEMORY
    for (int64_t column = 0; column < columns; column += 64) {
        const int64_t tiles = at_most((columns - column) / 16, 4);
        float *to = mixed + column;
        LOAD_SOME_TILES(tiles, to, stride)
        for (int64_t i = 0; i < words; i += 16) {
            const uint32_t *values = (const uint32_t *)s->values + i * columns + column;
            _tile_loadd(4, s->scores + i, s->columns * 4);
            MULTIPLY_SOME_TILES(_tile_dpbf16ps, tiles, values, stride)
        }
        STORE_SOME_TILES(tiles, to, stride)
    }
}

/* Rows that are missing from a group are computed beside it from whatever stands there, and dropped. */
static void attend_pair_group(const struct attention *a, struct scratch *s, int64_t row0, int rows, const struct weighing *how,
                            const struct sight *sight, struct upcoming *ahead) {
    const int64_t columns = whole_vectors(a->value_size), lines = (ahead->lines + 3) / 4;
    float factors[GROUP_ROWS], *mixed = s->mixed + row0 * columns, *to = rows == GROUP_ROWS ? mixed : s->group;
    fetch_upcoming(ahead, lines);
    score_pair_group(a, s, row0);
    fetch_upcoming(ahead, lines);
    weigh_pairs(rows, s->columns, how, s->scores, sight->low, sight->high, s->maxima + row0, s->sums + row0 * WIDTH, factors);
    fetch_upcoming(ahead, lines);
    for (int r = 0; r < rows; r++)
        if (factors[r] != 1.0f || to != mixed)
            for (int64_t i = 0; i < columns; i += WIDTH)
                store_float(to + r * columns + i, load_float(mixed + r * columns + i) * splat(factors[r]));
    mix_pair_group(a, s, to);
    fetch_upcoming(ahead, lines);
    if (to != mixed) memcpy(mixed, to, rows * columns * sizeof *to);
}

/* The same of keys in 8 bits: sums [16, columns] of steps, where scores come to be. */
static void score_step_group(const struct attention *a, struct scratch *s, int64_t row0, int rows) {
    const int64_t columns = s->columns, stride = columns * 4;
    TILES_READ_MEMORY
    for (int64_t column = 0; column < columns; column += 64) {
        const int64_t tiles = at_most((columns - column) / 16, 4);
        ZERO_TILES
        for (int64_t i = 0; i < a->key_size; i += LINE_BYTES) {
            const uint32_t *keys = (const uint32_t *)s->panel + i / 4 * columns + column;
            _tile_loadd(4, s->query_steps + row0 * a->key_size + i, a->key_size);
            MULTIPLY_SOME_TILES(_tile_dpbsud, tiles, keys, stride)
        }
        float *to = s->scores + column;
        STORE_SOME_TILES(tiles, to, stride)
    }
    for (int r = 0; r < rows; r++) {
        const __m512i offset = _mm512_set1_epi32(128 * s->query_sums[row0 + r]);
        const __m512 scale = _mm512_set1_ps(s->query_scales[row0 + r]);
        for (int64_t i = 0; i < columns; i += WIDTH) {
            float *at = s->scores + r * columns + i;
            _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(at), offset)), scale));
        }
    }
}

/* mixed = factors * mixed + steps of weights, each a `scales`, times values in 8 bits. */
static void mix_step_group(const struct attention *a, struct scratch *s, int rows, const float *scales, const float *factors, float *mixed) {
    const int64_t columns = whole_vectors(a->value_size), tokens = whole_lines(s->columns), stride = columns * 4;
    TILES_READ_MEMORY
    for (int64_t column = 0; column < columns; column += 64) {
        const int64_t tiles = at_most((columns - column) / 16, 4);
        ZERO_TILES
        for (int64_t i = 0; i < tokens; i += LINE_BYTES) {
            const uint32_t *values = (const uint32_t *)s->values + i / 4 * columns + column;
            _tile_loadd(4, s->weight_steps + i, tokens);
            MULTIPLY_SOME_TILES(_tile_dpbusd, tiles, values, stride)
        }
        float *to = s->group + column;
        STORE_SOME_TILES(tiles, to, stride)
    }
    for (int r = 0; r < rows; r++) {
        const __m512 scale = _mm512_set1_ps(scales[r]), factor = _mm512_set1_ps(factors[r]);
        for (int64_t i = 0; i < columns; i += WIDTH) {
            float *at = mixed + r * columns + i;
            const __m512 sums = _mm512_cvtepi32_ps(_mm512_loadu_si512(s->group + r * columns + i));
            _mm512_storeu_ps(at, _mm512_fmadd_ps(sums, scale, _mm512_mul_ps(_mm512_loadu_ps(at), factor)));
        }
    }
}

static void attend_step_group(const struct attention *a, struct scratch *s, int64_t row0, int rows, const struct weighing *how,
                              const struct sight *sight, struct upcoming *ahead) {
    const int64_t lines = (ahead->lines + 2) / 3;
    float factors[GROUP_ROWS], scales[GROUP_ROWS];
    fetch_upcoming(ahead, lines);
    score_step_group(a, s, row0, rows);
    fetch_upcoming(ahead, lines);
    weigh_steps(rows, s->columns, how, s->scores, sight->low, sight->high, s->maxima + row0, s->sums + row0 * WIDTH, factors, s->weight_steps,
                whole_lines(s->columns), scales);
    fetch_upcoming(ahead, lines);
    mix_step_group(a, s, rows, scales, factors, s->mixed + row0 * whole_vectors(a->value_size));
}
#else
#define begin_tiles(a) ((void)0)
#define end_tiles(a) ((void)0)
#endif

/* A group of rows, at row0 of the tile, over one block whose keys lie in the panel. */
static void attend_rows(const struct attention *a, struct scratch *s, int64_t row0, int rows, int64_t first_position, int64_t block_start,
                        enum element type, const void *values, int64_t value_stride, int scaled, struct upcoming *ahead) {
    const int64_t columns = s->columns, value_columns = whole_vectors(a->value_size);
    struct sight sight;
    see(a, row0, rows, first_position, block_start, &sight);
    const int64_t *low = sight.low, *high = sight.high, from = sight.from, to = sight.to;
    if (from >= to) return;
    float *scores = s->scores, *mixed = s->mixed + row0 * value_columns, factors[GROUP_ROWS];
    const struct weighing how = {scaled ? s->key_scales : NULL, scaled ? s->value_scales : NULL, a->softcap, a->pairs ? score_unit(a) : 1.0f};
#if defined(ISA_AMX)
    if (by_tiles(a, type) && (a->pairs || rows > ROWS)) { /* products of bytes are exact: few rows take fewer steps without tiles */
        (a->pairs ? attend_pair_group : attend_step_group)(a, s, row0, rows, &how, &sight, ahead);
        return;
    }
#endif
#if HAS_PAIRS
    if (a->pairs) {
        const int64_t words = whole_pairs(a->key_size);
        score_pairs(rows, columns, words, (const uint32_t *)s->query + row0 * words, (const uint32_t *)s->panel, scores);
        weigh_pairs(rows, columns, &how, scores, low, high, s->maxima + row0, s->sums + row0 * WIDTH, factors);
        mix_pairs(rows, value_columns, from, to, (const uint32_t *)scores, columns, factors, values, mixed, ahead);
        return;
    }
#endif
#if HAS_STEPS
    if (type == STORED_INT8) {
        float steps[GROUP_ROWS];
        score_steps(rows, columns, a->key_size, s->query_steps + row0 * whole_words(a->key_size), s->query_scales + row0,
                    s->query_sums + row0, (const uint32_t *)s->panel, scores);
        weigh_steps(rows, columns, &how, scores, low, high, s->maxima + row0, s->sums + row0 * WIDTH, factors, s->weight_steps, columns, steps);
        mix_steps(rows, value_columns, from, to, s->weight_steps, columns, steps, factors, values, mixed, ahead);
        return;
    }
#endif
    multiply_float32(rows, columns / WIDTH, 0, a->key_size, s->query + row0 * a->key_size, a->key_size, s->panel, columns, scores, columns,
                     NULL, NULL);
    weigh_rows(rows, columns, &how, scores, low, high, s->maxima + row0, s->sums + row0 * WIDTH, factors);
    if (type == FLOAT32)
        multiply_float32(rows, value_columns / WIDTH, from, to, scores, columns, values, value_stride, mixed, value_columns, factors, ahead);
    else if (type == BFLOAT16)
        multiply_bfloat16(rows, value_columns / WIDTH, from, to, scores, columns, values, value_stride, mixed, value_columns, factors, ahead);
    else
        multiply_float16(rows, value_columns / WIDTH, from, to, scores, columns, values, value_stride, mixed, value_columns, factors, ahead);
}

#endif
