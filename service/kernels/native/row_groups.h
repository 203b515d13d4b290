/* A group of query rows over one block of keys and values, in the form that the cache and the processor have in common.
 *
 * Six rows share what is in registers; sixteen go through the tiles of AMX. Invariant: what is computed for a row is a chain of operations
 * that depends on the row alone, whichever rows share its group.
 */
#ifndef DEEPSEEK_ROW_GROUPS_H
#define DEEPSEEK_ROW_GROUPS_H

#include "attention_call.h"
#include "panels_pairs.h"

/* What a product of a query and a key is multiplied by: log2 units, but for a cap, which is applied to what it was. */
INLINE float score_unit(const struct attention *a) { return a->softcap > 0 ? a->scale : a->scale * LOG2_E; }

/* Which columns of a block rows from row0 of the tile on see: low .. high - 1 of each, from .. to - 1 of all. */
struct sight {
    int64_t low[GROUP_ROWS], high[GROUP_ROWS], from, to;
};

INLINE void see(const struct attention *a, int64_t row0, int rows, int64_t first_position, int64_t block_start, struct sight *sight) {
    int64_t *low = sight->low, *high = sight->high, from = a->block_tokens, to = 0;
    int64_t position = first_position + row0 / a->group - 1, left = 0;
    for (int r = 0; r < rows; r++, left--) {
        if (left == 0) position += 1, left = r ? a->group : a->group - row0 % a->group;
        low[r] = position - a->window + 1 > block_start ? position - a->window + 1 - block_start : 0;
        high[r] = position + 1 - block_start < a->block_tokens ? position + 1 - block_start : a->block_tokens;
        if (low[r] >= high[r]) continue;
        from = low[r] < from ? low[r] : from;
        to = high[r] > to ? high[r] : to;
    }
    sight->from = from, sight->to = to;
}

INLINE struct weighing weighing_of(const struct attention *a, const struct scratch *s, int scaled) {
    return (struct weighing){scaled ? s->key_scales : NULL, scaled ? s->value_scales : NULL, a->softcap, a->pairs ? score_unit(a) : 1.0f};
}

/* A group of a tile's rows, at row0, what it sees of a block, and where its scores are. */
struct group {
    int64_t row0;
    int rows;
    struct sight sight;
    float *scores;
};

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
static void score_pair_group(const struct attention *a, const struct scratch *s, const struct group *g) {
    const int64_t words = a->key_size / 2, columns = s->columns, stride = columns * 4;
    const uint32_t *query = (const uint32_t *)s->query + g->row0 * words;
    TILES_READ_MEMORY
    for (int64_t column = 0; column < columns; column += 64) {
        const int64_t tiles = at_most((columns - column) / 16, 4);
        ZERO_TILES
        for (int64_t i = 0; i < words; i += 16) {
            const uint32_t *keys = (const uint32_t *)s->panel + i * columns + column;
            _tile_loadd(4, query + i, words * 4);
            MULTIPLY_SOME_TILES(_tile_dpbf16ps, tiles, keys, stride)
        }
        float *to = g->scores + column;
        STORE_SOME_TILES(tiles, to, stride)
    }
}

/* mixed [16, value_columns] += weights, where the scores were, times the values. */
static void mix_pair_group(const struct attention *a, const struct scratch *s, const struct group *g, float *mixed) {
    const int64_t columns = whole_vectors(a->value_size), words = (s->columns + 31) / 32 * 16, stride = columns * 4;
    TILES_READ_MEMORY
    for (int64_t column = 0; column < columns; column += 64) {
        const int64_t tiles = at_most((columns - column) / 16, 4);
        float *to = mixed + column;
        LOAD_SOME_TILES(tiles, to, stride)
        for (int64_t i = 0; i < words; i += 16) {
            const uint32_t *values = (const uint32_t *)s->values + i * columns + column;
            _tile_loadd(4, g->scores + i, s->columns * 4);
            MULTIPLY_SOME_TILES(_tile_dpbf16ps, tiles, values, stride)
        }
        STORE_SOME_TILES(tiles, to, stride)
    }
}

/* Weigh and mix a group whose scores are there. Rows that are missing from it are computed beside it from whatever stands there, and dropped. */
static void finish_pair_group(const struct attention *a, struct scratch *s, const struct group *g, const struct weighing *how) {
    const int64_t columns = whole_vectors(a->value_size);
    float factors[GROUP_ROWS], *mixed = s->mixed + g->row0 * columns, *to = g->rows == GROUP_ROWS ? mixed : s->group;
    weigh_pairs(g->rows, s->columns, how, g->scores, g->sight.low, g->sight.high, s->maxima + g->row0, s->sums + g->row0 * WIDTH, factors);
    for (int r = 0; r < g->rows; r++)
        if (factors[r] != 1.0f || to != mixed)
            for (int64_t i = 0; i < columns; i += WIDTH)
                store_float(to + r * columns + i, load_float(mixed + r * columns + i) * splat(factors[r]));
    mix_pair_group(a, s, g, to);
    if (to != mixed) memcpy(mixed, to, g->rows * columns * sizeof *to);
}

/* The same of keys in 8 bits: sums [16, columns] of steps, where scores come to be. */
static void score_step_group(const struct attention *a, const struct scratch *s, const struct group *g) {
    const int64_t columns = s->columns, stride = columns * 4;
    TILES_READ_MEMORY
    for (int64_t column = 0; column < columns; column += 64) {
        const int64_t tiles = at_most((columns - column) / 16, 4);
        ZERO_TILES
        for (int64_t i = 0; i < a->key_size; i += LINE_BYTES) {
            const uint32_t *keys = (const uint32_t *)s->panel + i / 4 * columns + column;
            _tile_loadd(4, s->query_steps + g->row0 * a->key_size + i, a->key_size);
            MULTIPLY_SOME_TILES(_tile_dpbsud, tiles, keys, stride)
        }
        float *to = g->scores + column;
        STORE_SOME_TILES(tiles, to, stride)
    }
}

/* Sums of steps become scores. */
static void scale_step_group(const struct scratch *s, const struct group *g) {
    for (int r = 0; r < g->rows; r++) {
        const __m512i offset = _mm512_set1_epi32(128 * s->query_sums[g->row0 + r]);
        const __m512 scale = _mm512_set1_ps(s->query_scales[g->row0 + r]);
        for (int64_t i = 0; i < s->columns; i += WIDTH) {
            float *at = g->scores + r * s->columns + i;
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

static void finish_step_group(const struct attention *a, struct scratch *s, const struct group *g, const struct weighing *how) {
    float factors[GROUP_ROWS], scales[GROUP_ROWS];
    scale_step_group(s, g);
    weigh_steps(g->rows, s->columns, how, g->scores, g->sight.low, g->sight.high, s->maxima + g->row0, s->sums + g->row0 * WIDTH, factors,
                s->weight_steps, whole_lines(s->columns), scales);
    mix_step_group(a, s, g->rows, scales, factors, s->mixed + g->row0 * whole_vectors(a->value_size));
}

/* Rows over one block, group by group: the tiles multiply the next one's scores while vectors weigh those of the one before. */
static void attend_by_tiles(const struct attention *a, struct scratch *s, int64_t first_row, int64_t rows, int64_t first_position,
                            int64_t block_start, int scaled, struct upcoming *ahead) {
    const struct weighing how = weighing_of(a, s, scaled);
    const int64_t lines = ahead->lines / ((rows + GROUP_ROWS - 1) / GROUP_ROWS) + 1;
    struct group groups[2], *before = NULL;
    for (int64_t row = 0, at = 0; row < rows; row += GROUP_ROWS) {
        struct group *now = groups + at;
        now->row0 = first_row + row, now->rows = (int)at_most(rows - row, GROUP_ROWS), now->scores = s->scores + at * GROUP_ROWS * s->columns;
        see(a, now->row0, now->rows, first_position, block_start, &now->sight);
        if (now->sight.from >= now->sight.to) continue;
        (a->pairs ? score_pair_group : score_step_group)(a, s, now);
        fetch_upcoming(ahead, lines);
        if (before) (a->pairs ? finish_pair_group : finish_step_group)(a, s, before, &how);
        before = now, at = !at;
    }
    if (before) (a->pairs ? finish_pair_group : finish_step_group)(a, s, before, &how);
}
#else
#define begin_tiles(a) ((void)0)
#define end_tiles(a) ((void)0)
#define attend_by_tiles(...) ((void)0)
#endif

/* Six rows or fewer, at row0 of the tile, over one block whose keys lie in the panel. */
static void attend_rows(const struct attention *a, struct scratch *s, int64_t row0, int rows, int64_t first_position, int64_t block_start,
                        enum element type, const void *values, int64_t value_stride, int scaled, struct upcoming *ahead) {
    const int64_t columns = s->columns, value_columns = whole_vectors(a->value_size);
    struct sight sight;
    see(a, row0, rows, first_position, block_start, &sight);
    const int64_t *low = sight.low, *high = sight.high, from = sight.from, to = sight.to;
    if (from >= to) return;
    float *scores = s->scores, *mixed = s->mixed + row0 * value_columns, factors[ROWS];
    const struct weighing how = weighing_of(a, s, scaled);
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
        float steps[ROWS];
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
