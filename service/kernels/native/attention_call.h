/* What a call of paged attention is and how it is cut: shared by attention.c, which lays it out, and attention.h, which computes it. */
#ifndef DEEPSEEK_ATTENTION_CALL_H
#define DEEPSEEK_ATTENTION_CALL_H

#include <stdatomic.h>

#include "native.h"

/* One call of paged attention. Strides count elements: keys and values [block, head, token], queries [row, head]; the last dimension is
 * contiguous. `group` query heads share a K/V head; `window` is INT64_MAX / 2 for none, `softcap` 0 for none, `sinks` [heads] or NULL. */
struct attention {
    enum element query_type, kv_type;
    const void *query, *keys, *values;
    void *out;
    const float *sinks;
    int64_t query_strides[2], key_strides[3], value_strides[3];
    int64_t kv_heads, group, key_size, value_size, block_tokens, window, split_blocks, task_splits, tile_rows;
    float scale, softcap;
};

/* `tokens` consecutive query tokens of one sequence, all in one task for each K/V head (parts NULL) or with a task for each `task_splits`
 * of the `splits` splits from first_split on; they see the blocks first_block .. end_block - 1 at most. pending [kv_heads] counts tasks. */
struct tile {
    int64_t first_row, tokens, first_position, first_block, end_block, first_split, splits;
    const int32_t *table;
    float *parts;
    atomic_llong *pending;
};

/* Memory of one thread; all float32. */
struct scratch {
    float *panel, *values, *query, *scores, *mixed, *joined, *sums, *maxima, *totals, *joined_maxima, *joined_totals;
};

#endif
