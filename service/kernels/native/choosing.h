/* Which far blocks an anchor's query reads: bounds of blocks, the best of them, bounds of their sub-blocks, the best of those, their keys.
 *
 * Invariant: ties are decided by the index, so a choice depends on its query alone.
 */
#include "bounds.h"
#include "panels_int8.h"

/* A number that orders scores as floats, then lower indices first; greater is better. */
INLINE int64_t rank_key(float score, int64_t index) {
    float plain = score + 0.0f;
    int32_t bits;
    memcpy(&bits, &plain, 4);
    return ((int64_t)(bits ^ ((bits >> 31) & 0x7fffffff)) << 32) | (0xffffffff - index);
}
INLINE int64_t ranked_index(int64_t key) { return 0xffffffff - (key & 0xffffffff); }

/* Put `key` at place `at` of a heap of `count` whose least is first. */
INLINE void sink_key(int64_t *heap, int64_t count, int64_t at, int64_t key) {
    for (int64_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= key) break;
        heap[at] = heap[child];
    }
    heap[at] = key;
}

/* Move the `keep` greatest of keys [count] to its front, in no order. */
static void keep_best(int64_t *keys, int64_t count, int64_t keep) {
    if (count <= keep || keep == 0) return;
    for (int64_t at = keep / 2 - 1; at >= 0; at--) sink_key(keys, keep, at, keys[at]);
    for (int64_t i = keep; i < count; i++)
        if (keys[i] > keys[0]) sink_key(keys, keep, 0, keys[i]);
}

/* Where the heap's steps, each a guess of the processor, would cost more than two passes over all keys. */
#define MANY_KEYS 256
#define BUCKETS 256

/* The same of many: only those that share a bucket of scores with the last one kept are compared with each other. Behind keys there is room for as
 * many once more. */
static void keep_best_of_many(int64_t *keys, int64_t count, int64_t keep) {
    if (count <= MANY_KEYS || count <= keep) {
        keep_best(keys, count, keep);
        return;
    }
    int64_t least = INT64_MAX, greatest = INT64_MIN, above = 0, level = 0, shift = 0, bucket = BUCKETS;
    for (int64_t i = 0; i < count; i++) {
        least = keys[i] < least ? keys[i] : least;
        greatest = keys[i] > greatest ? keys[i] : greatest;
    }
    const uint64_t range = (uint64_t)greatest - (uint64_t)least;
    while (range >> shift >= BUCKETS) shift++;
    int32_t sizes[BUCKETS] = {0};
    for (int64_t i = 0; i < count; i++) sizes[((uint64_t)keys[i] - (uint64_t)least) >> shift]++;
    while (above + sizes[bucket - 1] <= keep) above += sizes[--bucket];
    int64_t *level_keys = keys + count, taken = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t key = keys[i], in = (int64_t)(((uint64_t)key - (uint64_t)least) >> shift);
        keys[taken] = key, level_keys[level] = key;
        taken += in >= bucket, level += in == bucket - 1;
    }
    keep_best(level_keys, level, keep - above);
    memcpy(keys + taken, level_keys, (keep - above) * sizeof *keys);
}

/* Queries of one anchor and K/V head -> [group, size] float32. */
INLINE void take_queries(const struct choosing *c, int64_t anchor, int64_t head, float *out) {
    for (int64_t g = 0; g < c->group; g++)
        for (int64_t i = 0; i < c->size; i += WIDTH) {
            int64_t count = c->size - i < WIDTH ? c->size - i : WIDTH;
            int64_t at = (c->query_rows ? c->query_rows[anchor] : anchor) * c->query_strides[0] + (head * c->group + g) * c->query_strides[1] + i;
            store_some(FLOAT32, out + g * c->size + i, 0, load_some(c->query_type, c->query, at, count), count);
        }
}

/* Where the keys of a block lie, and how many bytes they have. */
INLINE const char *keys_of(const struct choosing *c, int64_t at, int64_t *bytes) {
    int64_t each = c->far_type == FLOAT32 ? 4 : c->far_type == STORED_INT8 || c->far_type == STORED_INT4 ? 1 : 2;
    *bytes = c->block_tokens * c->key_size * each;
    return (const char *)c->keys + at * *bytes;
}

/* Scales of WIDTH tokens from `token` on, those past the last being the last token's. */
INLINE vfloat scales_from(const uint16_t *scales, int64_t token, int64_t tokens) {
    if (tokens - token >= WIDTH) return load_some(FLOAT16, scales, token, WIDTH);
    vfloat x = splat(widen_half(scales[tokens - 1]));
    for (int64_t i = token; i < tokens; i++) x[i - token] = widen_half(scales[i]);
    return x;
}

/* Memory for keys' products: a panel of keys and products [2 * group, columns]; and where there are dot products of bytes the queries as sums of
 * two rows of bytes, the second of what the first leaves: 14 bits, which are exact enough to tell scores apart. */
struct products {
    float *panel, *scores, *scales;
    int32_t *sums;
    int8_t *steps;
};

#if HAS_STEPS
INLINE void split_queries(const struct choosing *c, const float *query, struct products *p) {
    const int64_t size = c->size, words = whole_words(size);
    for (int64_t g = 0; g < c->group; g++) {
        int8_t *first = p->steps + 2 * g * words;
        p->scales[2 * g] = step_query(query + g * size, size, first, p->sums + 2 * g);
        for (int64_t i = 0; i < size; i++) p->panel[i] = query[g * size + i] - p->scales[2 * g] * first[i];
        p->scales[2 * g + 1] = step_query(p->panel, size, first + words, p->sums + 2 * g + 1);
    }
}
#endif

/* Products of the queries with the keys of block and head `at`, without the scales of these -> p->scores, `rows` rows for each query, to be
 * added up; while the keys of `next` are fetched. Gives `rows`. */
INLINE int multiply_keys(const struct choosing *c, int64_t at, int64_t next, const float *query, const struct products *p) {
    const int64_t columns = whole_vectors(c->block_tokens), size = c->size;
    int64_t bytes;
    const char *keys = keys_of(c, at, &bytes);
    struct upcoming ahead = {keys_of(c, next, &bytes), (bytes + 63) / 64};
    if (c->key_scales) fetch_bytes(c->key_scales + next * c->block_tokens, c->block_tokens * 2);
#if HAS_STEPS
    if (c->far_type == STORED_INT8) {
        pack_key_steps(keys, c->key_size, c->block_tokens, size, (uint32_t *)p->panel, columns, &ahead);
        for (int64_t row = 0; row < 2 * c->group; row += ROWS)
            score_steps(2 * c->group - row < ROWS ? (int)(2 * c->group - row) : ROWS, columns, size, p->steps + row * whole_words(size),
                        p->scales + row, p->sums + row, (const uint32_t *)p->panel, p->scores + row * columns);
        return 2;
    }
#endif
    pack_keys(c->far_type, keys, bytes / c->block_tokens, c->block_tokens, size, p->panel, columns, &ahead);
    for (int64_t row = 0; row < c->group; row += ROWS)
        multiply_float32(c->group - row < ROWS ? (int)(c->group - row) : ROWS, columns / WIDTH, 0, size, query + row * size, size, p->panel,
                         columns, p->scores + row * columns, columns, NULL, NULL);
    return 1;
}

/* The largest product of queries [group, size] with a key of block and head `at` as it is kept, while those of `next` are fetched. */
INLINE float key_score(const struct choosing *c, int64_t at, int64_t next, const float *query, const struct products *p) {
    const int64_t columns = whole_vectors(c->block_tokens), rows = multiply_keys(c, at, next, query, p);
    vfloat best = splat(-INFINITY);
    for (int64_t token = 0; token < columns; token += WIDTH) {
        vfloat highest = splat(-INFINITY);
        for (int64_t g = 0; g < c->group; g++) {
            const float *scores = p->scores + g * rows * columns + token;
            highest = vmaximum(rows == 2 ? load_float(scores) + load_float(scores + columns) : load_float(scores), highest);
        }
        if (c->key_scales) highest *= scales_from(c->key_scales + at * c->block_tokens, token, c->block_tokens);
        best = vmaximum(highest, best);
    }
    return maximum_of_lanes(best);
}

/* Of the kept candidates' keys [count] the best `budget` by their highest product, to the front. */
INLINE void keep_best_products(const struct choosing *c, const int32_t *table, int64_t head, int64_t *keys, int64_t count, int64_t budget,
                               const float *query, float *memory) {
    if (count <= budget) return;
    const int64_t columns = whole_vectors(c->block_tokens), size = whole_vectors(c->size);
    struct products p = {.panel = memory, .scores = memory + size * columns};
    p.scales = p.scores + 2 * c->group * columns;
    p.sums = (int32_t *)(p.scales + 2 * c->group);
    p.steps = (int8_t *)(p.sums + 2 * c->group);
#if HAS_STEPS
    if (c->far_type == STORED_INT8) split_queries(c, query, &p);
#endif
    for (int64_t i = 0; i < count; i++) {
        int64_t index = ranked_index(keys[i]), next = ranked_index(keys[i + 1 < count ? i + 1 : i]);
        keys[i] = rank_key(key_score(c, table[index] * c->kv_heads + head, table[next] * c->kv_heads + head, query, &p), index);
    }
    keep_best(keys, count, budget);
}

/* The best `keep` of candidates indices [count] by these bounds of their blocks -> keys, in no order. Behind keys [count] there is room for as many. */
INLINE void rank_by_bounds(const struct choosing *c, const struct bounded *b, int64_t head, const int16_t *steps, float unit, int64_t keep,
                           int64_t *keys) {
    int32_t *products = (int32_t *)(keys + b->count);
    score_bounds(b, steps, c->size, c->group, products);
    const uint16_t *scales = c->bounds.scales + head * c->bounds.scale_strides[1];
    for (int64_t i = 0; i < b->count; i++) {
        float scale = unit * widen_half(scales[b->table[b->indices[i]] * c->bounds.scale_strides[0]]);
        keys[i] = rank_key((float)products[i] * scale, b->indices[i]);
    }
    keep_best_of_many(keys, b->count, keep);
}

/* See struct choosing. `memory` holds native_choose_bytes. */
static void choose_far(const struct choosing *c, int64_t anchor, int64_t head, char *memory, int64_t widest) {
    const int32_t *table = c->tables + c->sequences[anchor] * c->table_stride;
    int32_t *out = c->choices + ((c->places ? c->places[anchor] : anchor) * c->kv_heads + head) * c->most;
    int64_t candidates = c->ends[anchor] - c->sink_blocks, budget = c->budgets[anchor];
    candidates = candidates > 0 ? candidates : 0;
    int64_t chosen = candidates < budget ? candidates : budget;
    for (int64_t i = 0; i < c->most; i++) out[i] = i < chosen ? (int32_t)(c->sink_blocks + i) : -1;
    if (candidates <= budget || budget == 0) return;

    int64_t *keys = (int64_t *)memory;
    int32_t *indices = (int32_t *)(keys + 2 * widest);
    int16_t *steps = (int16_t *)(indices + 2 * ((widest + 1) / 2));
    float *query = (float *)(steps + c->group * signed_columns(c->size));
    take_queries(c, anchor, head, query);
    const float unit = sign_queries(query, c->group, c->size, steps);

    const struct far_bounds *f = &c->bounds;
    struct bounded bounds = {f->blocks + head * f->block_strides[1], f->block_strides[0], 1, table, indices, candidates};
    for (int64_t i = 0; i < candidates; i++) indices[i] = (int32_t)(c->sink_blocks + i);
    const int64_t kept = c->first_stage * budget < candidates ? c->first_stage * budget : candidates;
    rank_by_bounds(c, &bounds, head, steps, unit, kept, keys);

    const int64_t bytes = f->count * 2 * c->size;
    bounds = (struct bounded){f->parts + head * bytes, c->kv_heads * bytes, f->count, table, indices, kept};
    for (int64_t i = 0; i < kept; i++) indices[i] = (int32_t)ranked_index(keys[i]);
    const int64_t left = c->second_stage * budget < kept ? c->second_stage * budget : kept;
    rank_by_bounds(c, &bounds, head, steps, unit, left, keys);

    keep_best_products(c, table, head, keys, left, budget, query, query + c->group * c->size);
    for (int64_t i = 0; i < budget; i++) {
        int32_t index = (int32_t)ranked_index(keys[i]);
        int64_t to = i;
        for (; to > 0 && out[to - 1] > index; to--) out[to] = out[to - 1];
        out[to] = index;
    }
}
