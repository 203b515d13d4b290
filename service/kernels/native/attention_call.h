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
    /* Far blocks [F, kv_heads, block_tokens, size], contiguous; the sizes count elements, of integers bytes. Scales float16, or NULL. */
    enum element far_type;
    const void *far_keys, *far_values;
    const uint16_t *far_key_scales, *far_value_scales;
    int64_t far_key_size, far_value_size, choices_stride;
    /* Whether products are of pairs of bfloat16, see panels_pairs.h, and whether these go through matrix units, see row_groups.h. */
    int pairs, tiles;
};

/* `tokens` consecutive query tokens of one sequence, all in one task for each K/V head (parts NULL) or with a task for each `task_splits`
 * of the `splits` splits from first_split on. What they read are entries first_entry .. end_entry - 1 of a list: `sinks` near blocks from 0 on,
 * `far_count` far blocks (of each token those of its anchor in anchors [tokens]: for head h from choices + (anchor * kv_heads + h) *
 * choices_stride on, ids by far_table), then near blocks from near_start on; without the first two an entry is a block. pending [kv_heads]
 * counts tasks. */
struct tile {
    int64_t first_row, tokens, first_position, first_entry, end_entry, first_split, splits, sinks, far_count, near_start;
    const int32_t *table, *far_table, *choices;
    const int64_t *anchors;
    float *parts;
    atomic_llong *pending;
};

/* Memory of one thread; all float32 but what is left when attention is computed in 8 bits: query rows, sums of each, and weights. In pairs of
 * bfloat16 `panel`, `values` and `query` are words of two, and so are weights, where scores were. `group` is what tiles mix of a group that
 * is not whole. */
struct scratch {
    float *panel, *values, *query, *scores, *mixed, *group, *joined, *sums, *maxima, *totals, *joined_maxima, *joined_totals, *key_scales, *value_scales;
    float *query_scales;
    int32_t *query_sums;
    int32_t *cursors, *runs; /* of each token of a tile the far entry that it comes to; runs of tokens that read a far block together */
    int8_t *query_steps;
    uint8_t *weight_steps;
    int64_t columns;           /* tokens of the block at hand that some row sees, in whole vectors */
    const struct share *after; /* what the thread takes next, or NULL */
};

/* What the rows of a window + far batch share beyond `struct attention`; anchors [T] int64, -1 for none; counts [A], choices [A, kv_heads, most]. */
struct sparse {
    int64_t window, refresh, sink_blocks, most, far_table_stride;
    const int32_t *far_tables, *choices, *counts;
    const int64_t *anchors;
};

/* Rows of a batch: tables [sequences, table_stride], starts [sequences + 1], contexts [sequences]. */
struct rows {
    const int32_t *tables, *starts, *contexts;
    int64_t table_stride, sequences;
};

/* What one thread takes at a time: of a tile and K/V head every split, or where these are shared a run of them from `split` on. */
struct share {
    const struct tile *tile;
    int64_t head, split;
};

struct task;

/* A call laid out in its workspace: `tasks` tasks for each K/V head, which may run in any order. */
struct batch {
    const struct attention *attention;
    const struct task *tasks;
    int64_t count;
    float *scratch;
    int64_t scratch_floats;
};

/* Lay the call out in `workspace`; the bytes that it needs. Where that is more than workspace_bytes nothing is done. */
int64_t lay_out_attention(struct attention *a, const struct sparse *sparse, const struct rows *rows, void *workspace,
                          int64_t workspace_bytes, int threads, struct batch *batch);

/* Task `index`, below count * kv_heads, of a call, while what task `after` begins with is fetched, nothing where there is none; `thread` is
 * below `threads` of its layout. */
void run_attention_task(const struct batch *batch, int64_t index, int64_t after, int thread);

/* The constants of the cutting, see attention.c. */
void cut_attention(struct attention *a);

/* One call that chooses far blocks. query [A, kv_heads * group, size]; far blocks' keys [F, kv_heads, block_tokens, key_size], which counts
 * elements, of integers bytes, with scales float16 [F, kv_heads, block_tokens] or NULL; see struct far_bounds; sequences [A], ends and budgets [A];
 * choices [A, kv_heads, most]. Candidates are the entries sink_blocks .. end - 1. Anchor a asks by row query_rows[a] and its choices come to places[a];
 * NULL for a itself. `widest` is at least every number of candidates. */
struct choosing {
    enum element query_type, far_type;
    const void *query, *keys;
    const uint16_t *key_scales;
    struct far_bounds bounds;
    const int32_t *tables, *ends, *budgets;
    const int64_t *sequences;
    int32_t *choices;
    int64_t query_strides[2], table_stride, kv_heads, group, size, block_tokens, key_size, sink_blocks, most, widest, first_stage,
        second_stage;
    const int64_t *query_rows, *places;
};

/* Positive and negative parts of a query [size], as choosing multiplies them with bounds: padded to what one step takes. */
#define BOUND_STEPS 32
INLINE int64_t signed_columns(int64_t size) { return (2 * size + BOUND_STEPS - 1) / BOUND_STEPS * BOUND_STEPS; }

/* The most anchors that choose together, and how many of a call do: four tasks a thread are left, so that none waits long for the last. */
#define CHOSEN_TOGETHER 16
INLINE int64_t chosen_together(int64_t anchors, int64_t kv_heads, int64_t threads) {
    int64_t together = anchors * kv_heads / (4 * threads);
    return together < 1 ? 1 : together < CHOSEN_TOGETHER ? together : CHOSEN_TOGETHER;
}

/* The most candidates of an anchor that are compared by their keys. */
INLINE int64_t most_compared(int64_t widest, int64_t second_stage, int64_t most) {
    return second_stage * most < widest ? second_stage * most : widest;
}

/* Bytes that choosing needs for each thread; see struct choosing. */
EXPORTED int64_t native_choose_bytes(int64_t widest, int64_t second_stage, int64_t most, int64_t group, int64_t size, int64_t block_tokens);

#endif
