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

/* One anchor and K/V head while it chooses. Candidates count from the first one behind the sinks; `left` of them are in list, and what they scored last
 * in products, each at its own place; keys [found] are those whose keys have been compared. Queries [group, size], and as whole numbers in `unit`: as bounds
 * meet them, and as halves of bytes to meet bounds and keys. */
struct asking {
    int64_t candidates, budget, left, found;
    int32_t *out, *list, *products;
    int64_t *keys;
    float *query, unit;
    int16_t *steps;
    struct halves of_bounds, of_keys;
};

/* What anchors share or use one after the other: keys [2 * widest] and a list [widest] of candidates, a mask of the anchors that ask for each, whole
 * numbers [group * size], and of a block's keys a panel, its scales [columns] and products [group, columns]. */
struct choosing_room {
    int64_t *keys;
    int32_t *list;
    uint32_t *masks;
    int16_t *steps;
    float *panel, *scales, *scores;
};

/* Whether keys are multiplied as the bytes that they are. */
INLINE int compares_bytes(const struct choosing *c) { return HAS_STEPS && c->far_type == STORED_INT8; }

/* Start an anchor with all its candidates left, or none where it may choose all and has. */
INLINE void begin_asking(const struct choosing *c, int64_t anchor, int64_t head, struct asking *a, const struct choosing_room *r) {
    const int64_t candidates = c->ends[anchor] - c->sink_blocks, columns = signed_columns(c->size);
    a->out = c->choices + ((c->places ? c->places[anchor] : anchor) * c->kv_heads + head) * c->most;
    a->candidates = candidates > 0 ? candidates : 0, a->budget = c->budgets[anchor], a->left = a->found = 0;
    const int64_t chosen = a->candidates < a->budget ? a->candidates : a->budget;
    for (int64_t i = 0; i < c->most; i++) a->out[i] = i < chosen ? (int32_t)(c->sink_blocks + i) : -1;
    if (a->candidates <= a->budget || a->budget == 0) return;
    a->left = a->candidates;
    take_queries(c, anchor, head, a->query);
    a->unit = sign_queries(a->query, c->group, c->size, a->steps);
    halve_steps(a->steps, c->group, columns, 2 * c->size, &a->of_bounds);
    if (!compares_bytes(c)) return;
    for (int64_t g = 0; g < c->group; g++)
        for (int64_t i = 0; i < c->size; i++)
            r->steps[g * c->size + i] = (int16_t)(a->steps[g * columns + i] + a->steps[g * columns + c->size + i]);
    halve_steps(r->steps, c->group, c->size, c->size, &a->of_keys);
}

/* The candidates that any of the anchors has in its list, upwards -> r->list; masks tell which do. Gives how many there are. */
INLINE int64_t join_lists(const struct asking *asked, int count, const struct choosing_room *r) {
    int64_t end = 0, joined = 0;
    for (int a = 0; a < count; a++) end = asked[a].left && asked[a].candidates > end ? asked[a].candidates : end;
    memset(r->masks, 0, end * sizeof *r->masks);
    for (int a = 0; a < count; a++)
        for (int64_t i = 0; i < asked[a].left; i++) r->masks[asked[a].list[i]] |= 1u << a;
    for (int64_t i = 0; i < end; i++)
        if (r->masks[i]) r->list[joined++] = (int32_t)i;
    return joined;
}

/* Of each anchor's list the best `stage` for each block that it may choose, by these bounds of their blocks. */
INLINE void keep_by_bounds(const struct choosing *c, struct bounded *b, int64_t head, int64_t stage, struct asking *asked, int count,
                           const struct choosing_room *r) {
    if (HAS_STEPS && count >= PANEL_ANCHORS) {
        struct halves halves[CHOSEN_TOGETHER];
        int32_t *outs[CHOSEN_TOGETHER];
        for (int a = 0; a < count; a++) halves[a] = asked[a].of_bounds, outs[a] = asked[a].products;
        b->candidates = r->list, b->count = join_lists(asked, count, r);
        score_bounds_together(b, halves, count, c->size, c->group, r->masks, (uint32_t *)r->panel, outs);
    }
    const uint16_t *scales = c->bounds.scales + head * c->bounds.scale_strides[1];
    for (int a = 0; a < count; a++) {
        struct asking *one = asked + a;
        if (!one->left) continue;
        if (!(HAS_STEPS && count >= PANEL_ANCHORS)) {
            b->candidates = one->list, b->count = one->left;
            score_bounds(b, one->steps, c->size, c->group, one->products);
        }
        for (int64_t i = 0; i < one->left; i++) {
            const int32_t candidate = one->list[i];
            float scale = one->unit * widen_half(scales[b->table[candidate] * c->bounds.scale_strides[0]]);
            r->keys[i] = rank_key((float)one->products[candidate] * scale, candidate);
        }
        const int64_t kept = stage * one->budget < one->left ? stage * one->budget : one->left;
        keep_best(r->keys, one->left, kept);
        one->left = kept;
        for (int64_t i = 0; i < kept; i++) one->list[i] = (int32_t)ranked_index(r->keys[i]);
    }
}

/* Keys of block and head `at` -> r->panel, and their scales -> r->scales, while those of `next` are fetched; columns past the last token repeat it. */
INLINE void pack_candidate(const struct choosing *c, int64_t at, int64_t next, const struct choosing_room *r) {
    const int64_t tokens = c->block_tokens, columns = whole_vectors(tokens);
    int64_t bytes;
    const char *keys = keys_of(c, at, &bytes);
    struct upcoming ahead = {keys_of(c, next, &bytes), (bytes + 63) / 64};
    if (c->key_scales) {
        fetch_bytes(c->key_scales + next * tokens, tokens * 2);
        for (int64_t i = 0; i < tokens; i += WIDTH)
            store_float(r->scales + i, load_some(FLOAT16, c->key_scales + at * tokens, i, tokens - i < WIDTH ? tokens - i : WIDTH));
        for (int64_t i = tokens; i < columns; i++) r->scales[i] = r->scales[tokens - 1];
    }
    if (compares_bytes(c))
        pack_key_steps(keys, c->key_size, tokens, c->size, (uint32_t *)r->panel, columns, &ahead);
    else
        pack_keys(c->far_type, keys, bytes / tokens, tokens, c->size, r->panel, columns, &ahead);
}

/* The largest product of the queries with a key of the block in r->panel, as it is kept. */
INLINE float key_score(const struct choosing *c, const struct asking *a, const struct choosing_room *r) {
    const int64_t columns = whole_vectors(c->block_tokens), size = c->size;
    if (compares_bytes(c)) return best_scaled_product(c->group, &a->of_keys, (const uint32_t *)r->panel, columns, r->scales) * a->unit;
    for (int64_t row = 0; row < c->group; row += ROWS)
        multiply_float32(c->group - row < ROWS ? (int)(c->group - row) : ROWS, columns / WIDTH, 0, size, a->query + row * size, size, r->panel,
                         columns, r->scores + row * columns, columns, NULL, NULL);
    vfloat best = splat(-INFINITY);
    for (int64_t i = 0; i < columns; i += WIDTH) {
        vfloat highest = load_float(r->scores + i);
        for (int64_t row = 1; row < c->group; row++) highest = vmaximum(load_float(r->scores + row * columns + i), highest);
        best = vmaximum(c->key_scales ? highest * load_float(r->scales + i) : highest, best);
    }
    return maximum_of_lanes(best);
}

/* Compare the candidates of each anchor's list by their keys; a block is packed once for all anchors that ask for it. */
INLINE void compare_keys(const struct choosing *c, const int32_t *table, int64_t head, struct asking *asked, int count,
                         const struct choosing_room *r) {
    const int64_t joined = join_lists(asked, count, r);
    for (int64_t i = 0; i < joined; i++) {
        const int64_t candidate = r->list[i], next = r->list[i + 1 < joined ? i + 1 : i], at = table[candidate] * c->kv_heads + head;
        pack_candidate(c, at, table[next] * c->kv_heads + head, r);
        for (uint32_t mask = r->masks[candidate]; mask; mask &= mask - 1) {
            struct asking *a = asked + __builtin_ctz(mask);
            a->keys[a->found++] = rank_key(key_score(c, a, r), candidate);
        }
    }
}

/* Choose for anchors of one sequence. */
INLINE void choose_together(const struct choosing *c, int64_t begin, int count, int64_t head, struct asking *asked, const struct choosing_room *r) {
    const int32_t *table = c->tables + c->sequences[begin] * c->table_stride + c->sink_blocks;
    const struct far_bounds *f = &c->bounds;
    const int64_t bytes = f->count * 2 * c->size;
    for (int a = 0; a < count; a++) {
        begin_asking(c, begin + a, head, asked + a, r);
        for (int64_t i = 0; i < asked[a].left; i++) asked[a].list[i] = (int32_t)i;
    }
    struct bounded blocks = {f->blocks + head * f->block_strides[1], f->block_strides[0], 1, table, NULL, 0};
    keep_by_bounds(c, &blocks, head, c->first_stage, asked, count, r);
    struct bounded parts = {f->parts + head * bytes, c->kv_heads * bytes, f->count, table, NULL, 0};
    keep_by_bounds(c, &parts, head, c->second_stage, asked, count, r);
    compare_keys(c, table, head, asked, count, r);
    for (struct asking *a = asked; a < asked + count; a++) {
        if (!a->left) continue;
        keep_best(a->keys, a->left, a->budget);
        for (int64_t i = 0; i < a->budget; i++) {
            int32_t index = (int32_t)(c->sink_blocks + ranked_index(a->keys[i]));
            int64_t to = i;
            for (; to > 0 && a->out[to - 1] > index; to--) a->out[to] = a->out[to - 1];
            a->out[to] = index;
        }
    }
}

/* Give `bytes` of memory, in whole lines. */
INLINE void *take_lines(char **memory, int64_t bytes) {
    char *taken = *memory;
    *memory += whole_lines(bytes);
    return taken;
}

INLINE struct halves take_halves(char **memory, int64_t heads, int64_t size) {
    const int64_t words = whole_words(size) / 4;
    int8_t *bytes = take_lines(memory, heads * 8 * words);
    return (struct halves){bytes, take_lines(memory, heads * 4), words};
}

/* Choose for anchors begin .. end - 1, CHOSEN_TOGETHER at most; see struct choosing. `memory` is native_choose_bytes. */
static void choose_far(const struct choosing *c, int64_t begin, int64_t end, int64_t head, char *memory) {
    const int64_t columns = whole_vectors(c->block_tokens), size = c->size, group = c->group;
    const int64_t panel = whole_vectors(size) * columns * 4, of_bounds = 2 * whole_vectors(size) * PANEL_COLUMNS;
    struct asking asked[CHOSEN_TOGETHER];
    struct choosing_room r;
    r.keys = take_lines(&memory, 2 * c->widest * 8);
    r.list = take_lines(&memory, c->widest * 4);
    r.masks = take_lines(&memory, c->widest * 4);
    r.steps = take_lines(&memory, group * size * 2);
    r.panel = take_lines(&memory, panel > of_bounds ? panel : of_bounds);
    r.scales = take_lines(&memory, columns * 4);
    r.scores = take_lines(&memory, group * columns * 4);
    for (int64_t a = 0; a < end - begin; a++) {
        asked[a].list = take_lines(&memory, c->widest * 4);
        asked[a].products = take_lines(&memory, c->widest * 4);
        asked[a].keys = take_lines(&memory, 2 * most_compared(c->widest, c->second_stage, c->most) * 8);
        asked[a].query = take_lines(&memory, group * size * 4);
        asked[a].steps = take_lines(&memory, group * signed_columns(size) * 2);
        asked[a].of_bounds = take_halves(&memory, group, 2 * size);
        asked[a].of_keys = take_halves(&memory, group, size);
    }
    for (int64_t from = begin, to; from < end; from = to) {
        for (to = from + 1; to < end && c->sequences[to] == c->sequences[from];) to++;
        choose_together(c, from, (int)(to - from), head, asked + (from - begin), &r);
    }
}
