/* Which blocks the rows of a tile read and in which order: sinks, the far blocks that its tokens chose, near blocks; and where these lie.
 *
 * Invariant: whatever tokens share a tile, each of them meets its own blocks in the order of its own list.
 */
#ifndef DEEPSEEK_VISITS_H
#define DEEPSEEK_VISITS_H

#include "attention_call.h"

/* Where one head of a block lies: its keys and values, in which form, and the scales of far blocks; those of near ones lie in the block. */
struct place {
    enum element type;
    const char *keys, *values;
    const uint16_t *key_scales, *value_scales;
    int64_t start, key_stride, value_stride; /* position of its first token; elements between tokens, of integers bytes */
};

INLINE int64_t element_bytes(enum element type) { return type == FLOAT32 ? 4 : type == STORED_INT8 || type == STORED_INT4 ? 1 : 2; }

/* A block that rows of a tile read together, by its table index: a near one, all of them, or a far one, the tokens that chose it. A split's far blocks
 * come upwards once for all tokens, each of which has them in that order too, from `entry` on. */
struct visit {
    int64_t entry, block;
    int far;
};

/* The table index of the block that a far entry is for one token. */
INLINE int64_t chosen_block(const struct attention *a, const struct tile *tile, int64_t head, int64_t entry, int64_t token) {
    return tile->choices[(tile->anchors[token] * a->kv_heads + head) * a->choices_stride + entry - tile->sinks];
}

/* The visit at which an entry is begun. */
INLINE struct visit visit_at(const struct attention *a, const struct tile *tile, int64_t head, int64_t entry) {
    const int64_t beyond = entry - tile->sinks;
    if (beyond < 0) return (struct visit){entry, entry, 0};
    if (beyond >= tile->far_count) return (struct visit){entry, tile->near_start + beyond - tile->far_count, 0};
    struct visit visit = {entry, INT64_MAX, 1};
    for (int64_t token = 0; token < tile->tokens; token++) {
        int64_t block = chosen_block(a, tile, head, entry, token);
        visit.block = block < visit.block ? block : visit.block;
    }
    return visit;
}

/* Move the tokens that chose a far block on to their next entries, of s->cursors; their runs (first token and how many) -> s->runs; gives how many
 * there are. */
INLINE int64_t take_runs(const struct attention *a, struct scratch *s, const struct tile *tile, int64_t head, struct visit visit, int64_t end) {
    int64_t runs = 0, last = -2;
    for (int64_t token = 0; token < tile->tokens; token++) {
        if (s->cursors[token] >= end || chosen_block(a, tile, head, s->cursors[token], token) != visit.block) continue;
        s->cursors[token]++;
        if (token != last + 1) s->runs[2 * runs] = (int32_t)token, s->runs[2 * runs++ + 1] = 0;
        s->runs[2 * runs - 1]++;
        last = token;
    }
    return runs;
}

/* The visit after one whose runs are taken; far entries of the split end at `end`. */
INLINE struct visit visit_after(const struct attention *a, const struct scratch *s, const struct tile *tile, int64_t head, struct visit visit,
                                int64_t end) {
    if (!visit.far) return visit_at(a, tile, head, visit.entry + 1);
    visit.block = INT64_MAX;
    for (int64_t token = 0; token < tile->tokens; token++) {
        int64_t block = s->cursors[token] < end ? chosen_block(a, tile, head, s->cursors[token], token) : INT64_MAX;
        visit.block = block < visit.block ? block : visit.block;
    }
    return visit.block < INT64_MAX ? visit : visit_at(a, tile, head, end);
}

/* Where the block of a visit lies. */
INLINE struct place find_place(const struct attention *a, const struct tile *tile, int64_t head, struct visit visit) {
    if (visit.far) {
        int64_t at = tile->far_table[visit.block] * a->kv_heads + head, bytes = element_bytes(a->far_type), tokens = at * a->block_tokens;
        int scaled = a->far_type == STORED_INT8 || a->far_type == STORED_INT4;
        return (struct place){a->far_type,
                              (const char *)a->far_keys + tokens * a->far_key_size * bytes,
                              (const char *)a->far_values + tokens * a->far_value_size * bytes,
                              scaled ? a->far_key_scales + tokens : NULL,
                              scaled ? a->far_value_scales + tokens : NULL,
                              visit.block * a->block_tokens,
                              a->far_key_size,
                              a->far_value_size};
    }
    int64_t bytes = element_bytes(a->kv_type);
    return (struct place){a->kv_type,
                          (const char *)a->keys + (tile->table[visit.block] * a->key_strides[0] + head * a->key_strides[1]) * bytes,
                          (const char *)a->values + (tile->table[visit.block] * a->value_strides[0] + head * a->value_strides[1]) * bytes,
                          NULL,
                          NULL,
                          visit.block * a->block_tokens,
                          a->key_strides[2],
                          a->value_strides[2]};
}

/* The first entry of a split. */
INLINE int64_t first_entry(const struct attention *a, const struct tile *tile, int64_t split) {
    int64_t first = (tile->first_split + split) * a->split_blocks;
    return first > tile->first_entry ? first : tile->first_entry;
}

/* The lines that hold what a tile sees of a block from position `start` on, of which a token takes `token_bytes`. */
INLINE struct upcoming seen_lines(const struct attention *a, const struct tile *tile, int64_t start, const void *at, int64_t token_bytes) {
    int64_t tokens = tile->first_position + tile->tokens - start;
    return (struct upcoming){at, ((tokens < a->block_tokens ? tokens : a->block_tokens) * token_bytes + 63) / 64};
}

#endif
