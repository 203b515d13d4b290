/* Attention of a tile of query rows over K/V blocks, one split of consecutive blocks at a time.
 *
 * Rows are (query token, query head of one K/V head), token by token, packed and scaled to log2 units. A block's keys are turned into a
 * panel once for all rows of the tile; then six rows at a time, or sixteen, are multiplied, weighed and mixed while panel and values
 * stay in the first level cache. Invariants: what is computed for a row is a chain of operations that depends on the row alone, so it gets
 * the same bits in every tile; keys that no row of a group of six sees are never mixed, whatever they hold
 * (in pairs of tokens: those that no row of the tile sees; a value that is not a number reaches all rows of its group then).
 */
#include "row_groups.h"
#include "visits.h"

/* Words of two tokens that no row of the tile sees, 0 .. from - 1 and to .. words - 1 of its values, become 0. */
INLINE void clear_value_pairs(float *values, int64_t from, int64_t to, int64_t words, int64_t columns) {
    if (from > 0) memset(values, 0, from * columns * sizeof *values);
    if (to < words) memset(values + to * columns, 0, (words - to) * columns * sizeof *values);
}

static void widen_scales(const uint16_t *scales, int64_t tokens, float *out) {
    for (int64_t i = 0; i < tokens; i += WIDTH)
        store_float(out + i, load_some(FLOAT16, scales, i, tokens - i < WIDTH ? tokens - i : WIDTH));
}

/* The scales behind the integers of tokens from .. to - 1 of a near block; 0 for all others, whatever stands there. */
static void gather_scales(const char *rows, int64_t token_bytes, int64_t size, int64_t from, int64_t to, int64_t columns, float *out) {
    memset(out, 0, columns * sizeof *out);
    for (int64_t token = from; token < to; token++) memcpy(out + token, rows + token * token_bytes + size, sizeof *out);
}

/* The first token of a block that some row of the tile sees. */
INLINE int64_t first_seen(const struct attention *a, const struct tile *tile, const struct place *here) {
    int64_t from = tile->first_position - a->window + 1 - here->start;
    return from < 0 ? 0 : from;
}

/* Scales of the tokens of a block that some row of the tile sees. */
static void load_scales(const struct attention *a, struct scratch *s, const struct tile *tile, const struct place *here, int64_t tokens) {
    if (here->key_scales) {
        widen_scales(here->key_scales, a->block_tokens, s->key_scales);
        widen_scales(here->value_scales, a->block_tokens, s->value_scales);
    } else {
        int64_t from = first_seen(a, tile, here);
        gather_scales(here->keys, here->key_stride, a->key_size, from, tokens, s->columns, s->key_scales);
        gather_scales(here->values, here->value_stride, a->value_size, from, tokens, s->columns, s->value_scales);
    }
}

/* What is fetched while a block is attended to: the keys and values of the next visit, or of what the next share begins with. */
INLINE void look_ahead(const struct attention *a, const struct scratch *s, const struct tile *tile, int64_t head, struct visit after,
                       struct upcoming *keys, struct upcoming *values) {
    if (after.entry >= tile->end_entry) {
        *keys = *values = (struct upcoming){NULL, 0};
        if (!s->after) return;
        tile = s->after->tile, head = s->after->head;
        after = visit_at(a, tile, head, first_entry(a, tile, s->after->split));
    }
    struct place next = find_place(a, tile, head, after);
    int64_t bytes = element_bytes(next.type);
    *keys = seen_lines(a, tile, next.start, next.keys, next.key_stride * bytes);
    *values = seen_lines(a, tile, next.start, next.values, next.value_stride * bytes);
}

/* The rows of one visit over the block it reads, while what `after` reads is fetched: the tokens of `runs` runs, or all (NULL). */
static void attend_block(const struct attention *a, struct scratch *s, const struct tile *tile, int64_t head, struct visit visit,
                         struct visit after, const int32_t *runs, int64_t count) {
    const int32_t whole[2] = {0, (int32_t)tile->tokens};
    if (!runs) runs = whole, count = 1;
    int64_t value_columns = whole_vectors(a->value_size), last_position = tile->first_position + tile->tokens - 1, rows = 0;
    for (int64_t i = 0; i < count; i++) rows += runs[2 * i + 1] * a->group;
    struct place here = find_place(a, tile, head, visit);
    int64_t tokens = last_position + 1 - here.start < a->block_tokens ? last_position + 1 - here.start : a->block_tokens;
    s->columns = whole_vectors(tokens);
    struct upcoming keys_ahead, values_ahead;
    look_ahead(a, s, tile, head, after, &keys_ahead, &values_ahead);
    const int scaled = here.type == STORED_INT8 || here.type == STORED_INT4;
    const int in_steps = HAS_STEPS && here.type == STORED_INT8 && a->kv_type == STORED_INT8;
    if (scaled) load_scales(a, s, tile, &here, tokens);
    enum element type = here.type;
    const void *mixed_from = here.values;
    int64_t stride = here.value_stride;
    if (a->pairs) {
        pack_key_pairs(type, here.keys, here.key_stride * element_bytes(type), tokens, a->key_size, (uint32_t *)s->panel,
                       s->columns, &keys_ahead);
        const int64_t from = here.key_scales ? 0 : first_seen(a, tile, &here);
        pack_value_pairs(type, here.values, stride, from, tokens, a->value_size, (uint32_t *)s->values, &values_ahead);
        if (a->tiles) clear_value_pairs(s->values, from / 2, (tokens + 1) / 2, (s->columns + 31) / 32 * 16, value_columns);
        mixed_from = s->values;
    } else if (in_steps) {
        pack_key_steps(here.keys, here.key_stride, tokens, a->key_size, (uint32_t *)s->panel, s->columns, &keys_ahead);
        pack_value_steps(here.values, here.value_stride, tokens, a->value_size, (uint32_t *)s->values);
        mixed_from = s->values;
    } else {
        pack_keys(here.type, here.keys, here.key_stride * element_bytes(here.type), tokens, a->key_size, s->panel, s->columns,
                  &keys_ahead);
        if (scaled || value_columns != a->value_size || (type != FLOAT32 && rows > 2 * ROWS)) {
            widen_values(type, here.values, stride, 0, tokens, a->value_size, s->values);
            type = FLOAT32, mixed_from = s->values, stride = value_columns;
        }
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t first = runs[2 * i] * a->group, last = first + runs[2 * i + 1] * a->group;
        /* Sums of bytes are exact, so few rows may do without tiles. */
        if (a->tiles && (a->pairs || (in_steps && last - first > ROWS)))
            attend_by_tiles(a, s, first, last - first, tile->first_position, here.start, scaled, &values_ahead);
        else
            for (int64_t row = first; row < last; row += ROWS)
                attend_rows(a, s, row, last - row < ROWS ? (int)(last - row) : ROWS, tile->first_position, here.start, type, mixed_from, stride,
                            scaled, &values_ahead);
    }
    fetch_upcoming(&values_ahead, values_ahead.lines);
}

/* All rows of a tile over one split of what it reads: s->maxima, s->mixed and s->totals hold the split's result. */
static void attend_split(const struct attention *a, struct scratch *s, const struct tile *tile, int64_t head, int64_t split) {
    int64_t value_columns = whole_vectors(a->value_size), rows = tile->tokens * a->group;
    int64_t end = (tile->first_split + split + 1) * a->split_blocks;
    end = end < tile->end_entry ? end : tile->end_entry;
    const int64_t far_end = end < tile->sinks + tile->far_count ? end : tile->sinks + tile->far_count;
    int64_t begun = -1;
    for (int64_t i = 0; i < rows; i++) s->maxima[i] = -INFINITY;
    memset(s->sums, 0, rows * WIDTH * sizeof(float));
    memset(s->mixed, 0, rows * value_columns * sizeof(float));
    begin_tiles(a);
    for (struct visit visit = visit_at(a, tile, head, first_entry(a, tile, split)), after; visit.entry < end; visit = after) {
        if (visit.far && begun != visit.entry) {
            begun = visit.entry;
            for (int64_t token = 0; token < tile->tokens; token++) s->cursors[token] = (int32_t)begun;
        }
        const int64_t count = visit.far ? take_runs(a, s, tile, head, visit, far_end) : 0;
        after = visit_after(a, s, tile, head, visit, far_end);
        attend_block(a, s, tile, head, visit, after, visit.far ? s->runs : NULL, count);
    }
    end_tiles(a);
    for (int64_t i = 0; i < rows; i++) s->totals[i] = sum_lanes(load_float(s->sums + i * WIDTH));
}

/* Query rows of a tile -> s->query [rows, key_size], scaled. */
static void pack_query(const struct attention *a, struct scratch *s, int64_t first_row, int64_t tokens, int64_t head) {
    float scale = a->pairs ? 1.0f : score_unit(a);
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t g = 0; g < a->group; g++) {
            int64_t at = (first_row + token) * a->query_strides[0] + (head * a->group + g) * a->query_strides[1];
            float *out = s->query + (token * a->group + g) * a->key_size;
            for (int64_t i = 0; i < a->key_size; i += WIDTH) {
                int64_t count = a->key_size - i < WIDTH ? a->key_size - i : WIDTH;
                vfloat x = load_some(a->query_type, a->query, at + i, count) * splat(scale);
                store_some(FLOAT32, out, i, x, count);
            }
        }
    if (a->pairs)
        for (int64_t row = 0; row < tokens * a->group; row++)
            pair_query(s->query + row * a->key_size, a->key_size, (uint32_t *)s->query + row * whole_pairs(a->key_size));
    if (HAS_STEPS && a->kv_type == STORED_INT8)
        for (int64_t row = 0; row < tokens * a->group; row++)
            s->query_scales[row] = step_query(s->query + row * a->key_size, a->key_size, s->query_steps + row * whole_words(a->key_size),
                                              s->query_sums + row);
}

/* Add a split's result (maximum, total and mixed [value_columns]) to a row's (the same); in the order of the splits. */
INLINE void join_row(float *maximum, float *total, float *mixed, float more_maximum, float more_total, const float *more, int64_t columns) {
    if (more_total == 0.0f) return;
    float highest = *maximum > more_maximum ? *maximum : more_maximum;
    float old = vexp2(splat(*maximum - highest))[0], new = vexp2(splat(more_maximum - highest))[0];
    *maximum = highest;
    *total = *total * old + more_total * new;
    for (int64_t i = 0; i < columns; i += WIDTH)
        store_float(mixed + i, load_float(mixed + i) * splat(old) + load_float(more + i) * splat(new));
}

static void start_rows(const struct attention *a, int64_t head, int64_t rows, float *maxima, float *totals, float *mixed) {
    memset(mixed, 0, rows * whole_vectors(a->value_size) * sizeof(float));
    for (int64_t i = 0; i < rows; i++) {
        maxima[i] = a->sinks ? a->sinks[head * a->group + i % a->group] * LOG2_E : -INFINITY;
        totals[i] = a->sinks ? 1.0f : 0.0f;
    }
}

static void join_rows(const struct attention *a, int64_t rows, float *maxima, float *totals, float *mixed, const float *more_maxima,
                      const float *more_totals, const float *more_mixed) {
    int64_t columns = whole_vectors(a->value_size);
    for (int64_t i = 0; i < rows; i++)
        join_row(maxima + i, totals + i, mixed + i * columns, more_maxima[i], more_totals[i], more_mixed + i * columns, columns);
}

static void finish_rows(const struct attention *a, int64_t first_row, int64_t rows, int64_t head, const float *totals, const float *mixed) {
    int64_t columns = whole_vectors(a->value_size);
    for (int64_t i = 0; i < rows; i++) {
        int64_t at = ((first_row + i / a->group) * a->kv_heads * a->group + head * a->group + i % a->group) * a->value_size;
        vfloat total = splat(totals[i] == 0.0f ? 1.0f : totals[i]);
        for (int64_t v = 0; v < a->value_size; v += WIDTH) {
            int64_t count = a->value_size - v < WIDTH ? a->value_size - v : WIDTH;
            store_some(a->query_type, a->out, at + v, load_float(mixed + i * columns + v) / total, count);
        }
    }
}

static void carve(const struct attention *a, float *memory, struct scratch *s) {
    int64_t columns = whole_vectors(a->block_tokens), value_columns = whole_vectors(a->value_size), rows = a->tile_rows;
    const int64_t most = a->tiles ? 2 * GROUP_ROWS : ROWS, beyond = a->tiles ? GROUP_ROWS : 0; /* rows that a group may lack */
    s->panel = memory;
    s->values = s->panel + a->key_size * columns;
    s->query = s->values + a->block_tokens * value_columns;
    s->scores = s->query + whole_vectors(rows * a->key_size);
    s->mixed = s->scores + most * columns;
    s->group = s->mixed + rows * value_columns;
    s->joined = s->group + beyond * value_columns;
    s->sums = s->joined + rows * value_columns;
    s->maxima = s->sums + rows * WIDTH;
    s->totals = s->maxima + rows;
    s->joined_maxima = s->totals + rows;
    s->joined_totals = s->joined_maxima + rows;
    s->key_scales = s->joined_totals + rows;
    s->value_scales = s->key_scales + columns;
    s->query_scales = s->value_scales + columns;
    s->query_sums = (int32_t *)(s->query_scales + rows);
    s->cursors = s->query_sums + rows;
    s->runs = s->cursors + rows;
    s->query_steps = (int8_t *)(s->runs + rows + rows % 2);
    s->weight_steps = (uint8_t *)(s->query_steps + whole_vectors((rows + beyond) * whole_words(a->key_size)));
}

static int64_t attention_scratch(const struct attention *a) {
    struct scratch s;
    carve(a, NULL, &s);
    return (float *)s.weight_steps + GROUP_ROWS * whole_lines(a->block_tokens) / 4 - (float *)NULL;
}

static int64_t attention_partial(const struct attention *a, const struct tile *tile) {
    return tile->tokens * a->group * (2 + whole_vectors(a->value_size));
}

/* One share: every split of a tile and head in order, or a run of them, whose results wait for the last run to join all. */
static void attention_share(const struct attention *a, const struct share *share, const struct share *after, float *memory) {
    const struct tile *tile = share->tile;
    const int64_t head = share->head, split = share->split;
    struct scratch s;
    carve(a, memory, &s);
    s.after = after;
    int64_t rows = tile->tokens * a->group, columns = whole_vectors(a->value_size);
    pack_query(a, &s, tile->first_row, tile->tokens, head);
    if (tile->parts) {
        int64_t size = attention_partial(a, tile), last = split + a->task_splits < tile->splits ? split + a->task_splits : tile->splits;
        float *parts = tile->parts + head * tile->splits * size;
        for (int64_t i = split; i < last; i++) {
            attend_split(a, &s, tile, head, i);
            float *part = parts + i * size;
            memcpy(part, s.maxima, rows * sizeof(float));
            memcpy(part + rows, s.totals, rows * sizeof(float));
            memcpy(part + 2 * rows, s.mixed, rows * columns * sizeof(float));
        }
        if (atomic_fetch_sub_explicit(&tile->pending[head], 1, memory_order_acq_rel) > 1) return;
        start_rows(a, head, rows, s.joined_maxima, s.joined_totals, s.joined);
        for (int64_t i = 0; i < tile->splits; i++, parts += size)
            join_rows(a, rows, s.joined_maxima, s.joined_totals, s.joined, parts, parts + rows, parts + 2 * rows);
    } else {
        start_rows(a, head, rows, s.joined_maxima, s.joined_totals, s.joined);
        for (int64_t i = 0; i < tile->splits; i++) {
            attend_split(a, &s, tile, head, i);
            join_rows(a, rows, s.joined_maxima, s.joined_totals, s.joined, s.maxima, s.totals, s.mixed);
        }
    }
    finish_rows(a, tile->first_row, rows, head, s.joined_totals, s.joined);
}
