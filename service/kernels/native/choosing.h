/* Which far blocks an anchor's query reads: bounds of blocks, the best of them, bounds of their sub-blocks, the best of those, their keys.
 *
 * Anchors of a sequence that are asked together share what is packed. Invariant: a choice depends on its query alone; ties are decided by the index.
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

/* Move the `keep` greatest of a few keys [count] to their front, in no order. */
static void keep_best_of_few(int64_t *keys, int64_t count, int64_t keep) {
    if (count <= keep || keep == 0) return;
    for (int64_t at = keep / 2 - 1; at >= 0; at--) sink_key(keys, keep, at, keys[at]);
    for (int64_t i = keep; i < count; i++)
        if (keys[i] > keys[0]) sink_key(keys, keep, 0, keys[i]);
}

/* From how many on a heap's steps, each a guess of the processor, cost more than passes over all keys. */
#define MANY_KEYS 64
#define BUCKETS 256

/* The same of any number: only those that share a bucket of scores with the last one kept are compared with each other. Behind keys there is room for
 * as many once more. */
static void keep_best(int64_t *keys, int64_t count, int64_t keep) {
    if (count < MANY_KEYS || count <= keep) {
        keep_best_of_few(keys, count, keep);
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
    keep_best_of_few(level_keys, level, keep - above);
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

/* One anchor and K/V head while it chooses: its queries [group, size] and, where there are dot products of bytes, each of them as the sum of two rows
 * of bytes, the second of what the first leaves: 14 bits, which are exact enough to tell scores apart. keys [left] are the candidates whose keys are
 * compared, and then the `found` that have been. */
struct asking {
    int32_t *out;
    int64_t candidates, budget, left, found;
    int64_t *keys;
    float *query, *scales;
    int32_t *sums;
    int8_t *steps;
};

/* What anchors have one after the other: keys [2 * widest] and indices [widest] of candidates, queries as bounds meet them, a mask of the anchors that
 * compare each candidate, a panel of keys and products [2 * group, columns]. */
struct choosing_room {
    int64_t *keys;
    int32_t *indices;
    int16_t *steps;
    uint32_t *masks;
    float *panel, *scores;
};

#if HAS_STEPS
INLINE void split_queries(const struct choosing *c, const struct asking *a, float *rest) {
    const int64_t size = c->size, words = whole_words(size);
    for (int64_t g = 0; g < c->group; g++) {
        int8_t *first = a->steps + 2 * g * words;
        a->scales[2 * g] = step_query(a->query + g * size, size, first, a->sums + 2 * g);
        for (int64_t i = 0; i < size; i++) rest[i] = a->query[g * size + i] - a->scales[2 * g] * first[i];
        a->scales[2 * g + 1] = step_query(rest, size, first + words, a->sums + 2 * g + 1);
    }
}
#endif

/* Whether keys are multiplied as the bytes that they are. */
INLINE int compares_bytes(const struct choosing *c) { return HAS_STEPS && c->far_type == STORED_INT8; }

/* Keys of block and head `at` -> r->panel, while those of `next` are fetched. */
INLINE void pack_candidate(const struct choosing *c, int64_t at, int64_t next, const struct choosing_room *r) {
    const int64_t columns = whole_vectors(c->block_tokens);
    int64_t bytes;
    const char *keys = keys_of(c, at, &bytes);
    struct upcoming ahead = {keys_of(c, next, &bytes), (bytes + 63) / 64};
    if (c->key_scales) fetch_bytes(c->key_scales + next * c->block_tokens, c->block_tokens * 2);
    if (compares_bytes(c))
        pack_key_steps(keys, c->key_size, c->block_tokens, c->size, (uint32_t *)r->panel, columns, &ahead);
    else
        pack_keys(c->far_type, keys, bytes / c->block_tokens, c->block_tokens, c->size, r->panel, columns, &ahead);
}

/* Products of the queries with the keys in r->panel, without the scales of these -> r->scores, `rows` rows for each query, to be added up; gives
 * `rows`. */
INLINE int multiply_keys(const struct choosing *c, const struct asking *a, const struct choosing_room *r) {
    const int64_t columns = whole_vectors(c->block_tokens), size = c->size, rows = (compares_bytes(c) ? 2 : 1) * c->group;
    for (int64_t row = 0; row < rows; row += ROWS) {
        const int count = rows - row < ROWS ? (int)(rows - row) : ROWS;
#if HAS_STEPS
        if (compares_bytes(c)) {
            score_steps(count, columns, size, a->steps + row * whole_words(size), a->scales + row, a->sums + row, (const uint32_t *)r->panel,
                        r->scores + row * columns);
            continue;
        }
#endif
        multiply_float32(count, columns / WIDTH, 0, size, a->query + row * size, size, r->panel, columns, r->scores + row * columns, columns, NULL,
                         NULL);
    }
    return (int)(rows / c->group);
}

/* The largest product of the queries with a key of block and head `at`, as it is kept and lies in r->panel. */
INLINE float key_score(const struct choosing *c, const struct asking *a, int64_t at, const struct choosing_room *r) {
    const int64_t columns = whole_vectors(c->block_tokens), rows = multiply_keys(c, a, r);
    vfloat best = splat(-INFINITY);
    for (int64_t token = 0; token < columns; token += WIDTH) {
        vfloat highest = splat(-INFINITY);
        for (int64_t g = 0; g < c->group; g++) {
            const float *scores = r->scores + g * rows * columns + token;
            highest = vmaximum(rows == 2 ? load_float(scores) + load_float(scores + columns) : load_float(scores), highest);
        }
        if (c->key_scales) highest *= scales_from(c->key_scales + at * c->block_tokens, token, c->block_tokens);
        best = vmaximum(highest, best);
    }
    return maximum_of_lanes(best);
}

/* Scores of the candidates that each of a [count] compares, by their keys: a block is packed once for all that do. */
INLINE void compare_keys(const struct choosing *c, const int32_t *table, int64_t head, struct asking *asked, int count,
                         const struct choosing_room *r) {
    int64_t end = 0, blocks = 0;
    for (int a = 0; a < count; a++) end = asked[a].left && asked[a].candidates > end ? asked[a].candidates : end;
    memset(r->masks, 0, end * sizeof *r->masks);
    for (int a = 0; a < count; a++)
        for (int64_t i = 0; i < asked[a].left; i++) r->masks[ranked_index(asked[a].keys[i]) - c->sink_blocks] |= 1u << a;
    for (int64_t i = 0; i < end; i++)
        if (r->masks[i]) r->indices[blocks++] = (int32_t)i;
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t index = c->sink_blocks + r->indices[i], next = c->sink_blocks + r->indices[i + 1 < blocks ? i + 1 : i];
        const int64_t at = table[index] * c->kv_heads + head;
        pack_candidate(c, at, table[next] * c->kv_heads + head, r);
        for (uint32_t mask = r->masks[r->indices[i]]; mask; mask &= mask - 1) {
            struct asking *a = asked + __builtin_ctz(mask);
            a->keys[a->found++] = rank_key(key_score(c, a, at, r), index);
        }
    }
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
    keep_best(keys, b->count, keep);
}

/* The candidates that one anchor compares by their keys -> a->keys [left]; where there are no more than it may choose it has chosen them. */
INLINE void ask_bounds(const struct choosing *c, int64_t anchor, int64_t head, struct asking *a, const struct choosing_room *r) {
    const int32_t *table = c->tables + c->sequences[anchor] * c->table_stride;
    const int64_t candidates = c->ends[anchor] - c->sink_blocks;
    a->out = c->choices + ((c->places ? c->places[anchor] : anchor) * c->kv_heads + head) * c->most;
    a->candidates = candidates > 0 ? candidates : 0, a->budget = c->budgets[anchor], a->left = a->found = 0;
    const int64_t chosen = a->candidates < a->budget ? a->candidates : a->budget;
    for (int64_t i = 0; i < c->most; i++) a->out[i] = i < chosen ? (int32_t)(c->sink_blocks + i) : -1;
    if (a->candidates <= a->budget || a->budget == 0) return;

    take_queries(c, anchor, head, a->query);
    const float unit = sign_queries(a->query, c->group, c->size, r->steps);
    const struct far_bounds *f = &c->bounds;
    struct bounded bounds = {f->blocks + head * f->block_strides[1], f->block_strides[0], 1, table, r->indices, a->candidates};
    for (int64_t i = 0; i < a->candidates; i++) r->indices[i] = (int32_t)(c->sink_blocks + i);
    const int64_t kept = c->first_stage * a->budget < a->candidates ? c->first_stage * a->budget : a->candidates;
    rank_by_bounds(c, &bounds, head, r->steps, unit, kept, r->keys);

    const int64_t bytes = f->count * 2 * c->size;
    bounds = (struct bounded){f->parts + head * bytes, c->kv_heads * bytes, f->count, table, r->indices, kept};
    for (int64_t i = 0; i < kept; i++) r->indices[i] = (int32_t)ranked_index(r->keys[i]);
    a->left = c->second_stage * a->budget < kept ? c->second_stage * a->budget : kept;
    rank_by_bounds(c, &bounds, head, r->steps, unit, a->left, r->keys);
    memcpy(a->keys, r->keys, a->left * sizeof *a->keys);
#if HAS_STEPS
    if (compares_bytes(c)) split_queries(c, a, r->panel);
#endif
}

/* Give `bytes` of memory, in whole lines. */
INLINE void *take_lines(char **memory, int64_t bytes) {
    char *taken = *memory;
    *memory += whole_lines(bytes);
    return taken;
}

/* Choose for anchors begin .. end - 1, CHOSEN_TOGETHER at most; see struct choosing. `memory` is native_choose_bytes. */
static void choose_far(const struct choosing *c, int64_t begin, int64_t end, int64_t head, char *memory) {
    const int64_t columns = whole_vectors(c->block_tokens), size = c->size, group = c->group;
    struct asking asked[CHOSEN_TOGETHER];
    struct choosing_room r;
    r.keys = take_lines(&memory, 2 * c->widest * 8);
    r.indices = take_lines(&memory, c->widest * 4);
    r.masks = take_lines(&memory, c->widest * 4);
    r.steps = take_lines(&memory, group * signed_columns(size) * 2);
    r.panel = take_lines(&memory, whole_vectors(size) * columns * 4);
    r.scores = take_lines(&memory, 2 * group * columns * 4);
    for (int a = 0; a < end - begin; a++) {
        asked[a].keys = take_lines(&memory, c->second_stage * c->most * 8);
        asked[a].query = take_lines(&memory, group * size * 4);
        asked[a].scales = take_lines(&memory, 2 * group * 4);
        asked[a].sums = take_lines(&memory, 2 * group * 4);
        asked[a].steps = take_lines(&memory, 2 * group * whole_words(size));
        ask_bounds(c, begin + a, head, asked + a, &r);
    }
    for (int64_t from = begin, to; from < end; from = to) {
        const int64_t sequence = c->sequences[from];
        for (to = from + 1; to < end && c->sequences[to] == sequence;) to++;
        compare_keys(c, c->tables + sequence * c->table_stride, head, asked + (from - begin), (int)(to - from), &r);
    }
    for (int a = 0; a < end - begin; a++) {
        if (!asked[a].left) continue;
        keep_best(asked[a].keys, asked[a].left, asked[a].budget);
        int32_t *out = asked[a].out;
        for (int64_t i = 0; i < asked[a].budget; i++) {
            int32_t index = (int32_t)ranked_index(asked[a].keys[i]);
            int64_t to = i;
            for (; to > 0 && out[to - 1] > index; to--) out[to] = out[to - 1];
            out[to] = index;
        }
    }
}
