/* Paged attention: which tiles a batch has, how their work is shared among threads, and the exported function.
 *
 * A slice of one tile (decode rows are that) is shared split by split, so that one long sequence keeps every thread busy; of longer slices
 * each tile is one task for each K/V head. Which it is changes no bit: splits lie at multiples of SPLIT_TOKENS and are joined in order.
 */
#include <string.h>

#include "attention_call.h"

#define SPLIT_TOKENS 512
/* Consecutive splits go to one thread as far as this many tasks a thread are left: a task's first block comes from memory unannounced. */
#define TASKS_PER_THREAD 8
/* Query rows that share a panel of keys: turning the keys costs 5 % of the products then, and all of it fits the second level cache. */
#define TILE_ROWS 96

struct task {
    struct tile *tile;
    int64_t split;
};

struct batch {
    const struct attention *attention;
    const struct task *tasks;
    float *scratch;
    int64_t scratch_floats;
};

static void run_task(void *context, int64_t index, int thread) {
    struct batch *batch = context;
    const struct task *task = batch->tasks + index / batch->attention->kv_heads;
    native_kernels->attention_task(batch->attention, task->tile, index % batch->attention->kv_heads, task->split,
                                   batch->scratch + thread * batch->scratch_floats);
}

struct sizes {
    int64_t tiles, tasks, parts;
};

static int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

/* Fill one tile of rows first_row .. first_row + tokens - 1 whose first stands at first_position. */
static void fill_tile(const struct attention *a, struct tile *tile, const int32_t *table, int64_t first_row, int64_t tokens,
                      int64_t first_position) {
    int64_t first_block = maximum(0, first_position - a->window + 1) / a->block_tokens;
    int64_t end_block = (first_position + tokens - 1) / a->block_tokens + 1;
    int64_t first_split = first_block / a->split_blocks;
    *tile = (struct tile){first_row,   tokens, first_position, first_block, end_block, first_split,
                          (end_block + a->split_blocks - 1) / a->split_blocks - first_split,
                          table,       NULL,   NULL};
}

/* Tiles and tasks of the batch, counted (tiles NULL) or filled in; rows that see nothing are set to 0 when filled in. */
static struct sizes lay_out(const struct attention *a, const int32_t *tables, int64_t table_stride, const int32_t *starts,
                            const int32_t *contexts, int64_t sequences, struct tile *tiles, struct task *tasks, float *parts,
                            atomic_llong *pending) {
    struct sizes sizes = {0, 0, 0};
    int64_t tile_tokens = maximum(1, a->tile_rows / a->group), partial = native_kernels->attention_partial(a);
    int64_t row_bytes = a->kv_heads * a->group * a->value_size * (a->query_type == FLOAT32 ? 4 : 2);
    for (int64_t s = 0; s < sequences; s++) {
        int64_t shift = contexts[s] - starts[s + 1], first = maximum(starts[s], -shift), last = starts[s + 1];
        if (tiles && first > starts[s]) memset((char *)a->out + starts[s] * row_bytes, 0, (minimum(first, last) - starts[s]) * row_bytes);
        /* From the last tile on: it has the most to read, and what is long is best begun first. */
        int64_t count = first < last ? (last - first + tile_tokens - 1) / tile_tokens : 0;
        for (int64_t i = count - 1; i >= 0; i--) {
            struct tile tile;
            int64_t row = first + i * tile_tokens;
            fill_tile(a, &tile, tables + s * table_stride, row, minimum(tile_tokens, last - row), row + shift);
            int shared = count == 1 && tile.splits > 1;
            int64_t runs = shared ? (tile.splits + a->task_splits - 1) / a->task_splits : 1;
            if (tiles) {
                tile.parts = shared ? parts + sizes.parts : NULL;
                tile.pending = pending + sizes.tiles * a->kv_heads;
                for (int64_t head = 0; head < a->kv_heads; head++) atomic_init(tile.pending + head, runs);
                tiles[sizes.tiles] = tile;
                for (int64_t run = 0; run < runs; run++)
                    tasks[sizes.tasks + run] = (struct task){tiles + sizes.tiles, run * a->task_splits};
            }
            sizes.tiles += 1;
            sizes.tasks += runs;
            sizes.parts += shared ? tile.splits * a->kv_heads * partial : 0;
        }
    }
    return sizes;
}

static char *aligned(char *p) { return (char *)(((uintptr_t)p + 63) / 64 * 64); }

/* See `paged_attention` in reference.py. Strides count elements. Gives the bytes of workspace that the call needs; where that is more than
 * workspace_bytes nothing is computed. */
EXPORTED int64_t native_paged_attention(int query_type, const void *query, int64_t query_row, int64_t query_head, int kv_type,
                                        const void *keys, int64_t key_block, int64_t key_head, int64_t key_token, const void *values,
                                        int64_t value_block, int64_t value_head, int64_t value_token, const int32_t *tables,
                                        int64_t table_stride, const int32_t *starts, const int32_t *contexts, int64_t sequences,
                                        int64_t kv_heads, int64_t group, int64_t key_size, int64_t value_size, int64_t block_tokens,
                                        float scale, int64_t window, float softcap, const float *sinks, void *out, void *workspace,
                                        int64_t workspace_bytes, int threads) {
    struct attention a = {
        .query_type = query_type, .kv_type = kv_type, .query = query, .keys = keys, .values = values, .out = out, .sinks = sinks,
        .query_strides = {query_row, query_head}, .key_strides = {key_block, key_head, key_token},
        .value_strides = {value_block, value_head, value_token}, .kv_heads = kv_heads, .group = group, .key_size = key_size,
        .value_size = value_size, .block_tokens = block_tokens, .window = window, .scale = scale, .softcap = softcap,
        .split_blocks = maximum(1, SPLIT_TOKENS / block_tokens), .task_splits = 1, .tile_rows = maximum(TILE_ROWS, group)};
    struct sizes sizes = lay_out(&a, tables, table_stride, starts, contexts, sequences, NULL, NULL, NULL, NULL);
    if (sizes.tasks * kv_heads > TASKS_PER_THREAD * threads) {
        a.task_splits = sizes.tasks * kv_heads / (TASKS_PER_THREAD * maximum(1, threads));
        sizes = lay_out(&a, tables, table_stride, starts, contexts, sequences, NULL, NULL, NULL, NULL);
    }
    int64_t scratch_floats = (native_kernels->attention_scratch(&a) + 15) / 16 * 16;
    struct tile *tiles = (struct tile *)aligned(workspace);
    struct task *tasks = (struct task *)(tiles + sizes.tiles);
    atomic_llong *pending = (atomic_llong *)(tasks + sizes.tasks);
    float *parts = (float *)aligned((char *)(pending + sizes.tiles * kv_heads));
    float *scratch = (float *)aligned((char *)(parts + sizes.parts));
    int64_t needed = (char *)(scratch + maximum(1, threads) * scratch_floats) - (char *)workspace;
    if (needed > workspace_bytes) return needed;
    lay_out(&a, tables, table_stride, starts, contexts, sequences, tiles, tasks, parts, pending);
    struct batch batch = {&a, tasks, scratch, scratch_floats};
    native_parallel(run_task, &batch, sizes.tasks * kv_heads, threads);
    return needed;
}
