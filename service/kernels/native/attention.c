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
/* With matrix units turning takes longer than multiplying: four times as many, where there still is work for every thread then. */
#define MOST_TILE_ROWS 384

struct task {
    struct tile *tile;
    int64_t split;
};

/* From the end on: the last tiles of a slice have the most to read, and what is long is best begun first. */
static struct share share_of(const struct batch *batch, int64_t index) {
    const struct task *task = batch->tasks + batch->count - 1 - index / batch->attention->kv_heads;
    return (struct share){task->tile, index % batch->attention->kv_heads, task->split};
}

void run_attention_task(const struct batch *batch, int64_t index, int64_t after, int thread) {
    int there = after < batch->count * batch->attention->kv_heads;
    struct share share = share_of(batch, index), next = there ? share_of(batch, after) : share;
    native_kernels->attention_share(batch->attention, &share, there ? &next : NULL, batch->scratch + thread * batch->scratch_floats);
}

static void run_task(void *context, int64_t index, int thread) { run_attention_task(context, index, INT64_MAX, thread); }

struct sizes {
    int64_t tiles, tasks, parts;
};

static int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

/* Where the window of the row at `position` starts, and how many far blocks row `row` of the batch reads. */
static int64_t window_start(const struct attention *a, const struct sparse *sparse, int64_t position) {
    return maximum(position / sparse->refresh * sparse->refresh - sparse->window + 1, 0) / a->block_tokens;
}
static int64_t far_count(const struct sparse *sparse, int64_t row, int64_t start) {
    int64_t choice = sparse->anchors && start ? sparse->anchors[row] : -1;
    return choice < 0 ? 0 : sparse->counts[choice];
}

/* Rows from `row` on, before `last`, that one tile of a window + far batch takes, and what they read: the same number of far blocks, each
 * anchor its own, and the same near blocks, which then are turned into panels once for all of them. */
static void fill_sparse(const struct attention *a, const struct sparse *sparse, int64_t sequence, int64_t row, int64_t last, int64_t shift,
                        struct tile *tile) {
    int64_t start = window_start(a, sparse, row + shift), most = minimum(tile->tokens, last - row), tokens = 1;
    tile->far_count = far_count(sparse, row, start);
    while (tokens < most && window_start(a, sparse, row + tokens + shift) == start &&
           far_count(sparse, row + tokens, start) == tile->far_count)
        tokens++;
    tile->tokens = tokens;
    tile->near_start = start;
    tile->sinks = minimum(sparse->sink_blocks, start);
    tile->anchors = sparse->anchors ? sparse->anchors + row : NULL;
    tile->choices = sparse->choices;
    tile->far_table = sparse->far_tables + sequence * sparse->far_table_stride;
}

/* One tile of the rows from `row` on, before `last`; the row r of the batch stands at position r + shift. */
static struct tile fill_tile(const struct attention *a, const struct sparse *sparse, int64_t sequence, const int32_t *table, int64_t row,
                             int64_t last, int64_t shift) {
    struct tile tile = {.first_row = row, .tokens = minimum(maximum(1, a->tile_rows / a->group), last - row), .first_position = row + shift,
                        .table = table};
    if (sparse) fill_sparse(a, sparse, sequence, row, last, shift, &tile);
    int64_t end_block = (tile.first_position + tile.tokens - 1) / a->block_tokens + 1;
    tile.first_entry = maximum(0, tile.first_position - a->window + 1) / a->block_tokens;
    tile.end_entry = tile.sinks + tile.far_count + end_block - tile.near_start;
    tile.first_split = tile.first_entry / a->split_blocks;
    tile.splits = (tile.end_entry + a->split_blocks - 1) / a->split_blocks - tile.first_split;
    return tile;
}

/* Tiles and tasks of the batch, counted (tiles NULL) or filled in; rows that see nothing are set to 0 when filled in. */
static struct sizes lay_out(const struct attention *a, const struct sparse *sparse, const struct rows *rows, struct tile *tiles,
                            struct task *tasks, float *parts, atomic_llong *pending) {
    struct sizes sizes = {0, 0, 0};
    int64_t row_bytes = a->kv_heads * a->group * a->value_size * (a->query_type == FLOAT32 ? 4 : 2);
    for (int64_t s = 0; s < rows->sequences; s++) {
        int64_t begin = rows->starts[s], last = rows->starts[s + 1], shift = rows->contexts[s] - last, first = maximum(begin, -shift);
        if (tiles && first > begin) memset((char *)a->out + begin * row_bytes, 0, (minimum(first, last) - begin) * row_bytes);
        for (int64_t row = first; row < last;) {
            struct tile tile = fill_tile(a, sparse, s, rows->tables + s * rows->table_stride, row, last, shift);
            int shared = row == first && row + tile.tokens == last && tile.splits > 1;
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
            sizes.parts += shared ? tile.splits * a->kv_heads * native_kernels->attention_partial(a, &tile) : 0;
            row += tile.tokens;
        }
    }
    return sizes;
}

static char *aligned(char *p) { return (char *)(((uintptr_t)p + 63) / 64 * 64); }

static int held_by_bfloat16(enum element type) { return type == BFLOAT16 || type == STORED_INT8 || type == STORED_INT4; }

void cut_attention(struct attention *a) {
    a->pairs = a->kv_type == BFLOAT16 && (!a->far_keys || held_by_bfloat16(a->far_type)) && native_has_pairs();
    a->tiles = native_kernels->int8_matrices && a->block_tokens % 16 == 0 &&
               ((a->pairs && a->key_size % 32 == 0) || (a->kv_type == STORED_INT8 && a->key_size % 64 == 0));
    a->split_blocks = maximum(1, SPLIT_TOKENS / a->block_tokens);
    a->task_splits = 1;
    a->tile_rows = maximum(a->tiles ? MOST_TILE_ROWS : TILE_ROWS, a->group);
}

int64_t lay_out_attention(struct attention *a, const struct sparse *sparse, const struct rows *rows, void *workspace,
                          int64_t workspace_bytes, int threads, struct batch *batch) {
    struct sizes sizes = lay_out(a, sparse, rows, NULL, NULL, NULL, NULL);
    threads = threads > 1 ? threads : 1;
    if (a->tile_rows > maximum(TILE_ROWS, a->group) && sizes.tiles * a->kv_heads < TASKS_PER_THREAD * threads) {
        a->tile_rows = maximum(TILE_ROWS, a->group);
        sizes = lay_out(a, sparse, rows, NULL, NULL, NULL, NULL);
    }
    if (sizes.tasks * a->kv_heads > TASKS_PER_THREAD * threads) {
        a->task_splits = sizes.tasks * a->kv_heads / (TASKS_PER_THREAD * threads);
        sizes = lay_out(a, sparse, rows, NULL, NULL, NULL, NULL);
    }
    int64_t scratch_floats = (native_kernels->attention_scratch(a) + 15) / 16 * 16;
    struct tile *tiles = (struct tile *)aligned(workspace);
    struct task *tasks = (struct task *)(tiles + sizes.tiles);
    atomic_llong *pending = (atomic_llong *)(tasks + sizes.tasks);
    float *parts = (float *)aligned((char *)(pending + sizes.tiles * a->kv_heads));
    float *scratch = (float *)aligned((char *)(parts + sizes.parts));
    int64_t needed = (char *)(scratch + threads * scratch_floats) - (char *)workspace;
    if (needed > workspace_bytes) return needed;
    lay_out(a, sparse, rows, tiles, tasks, parts, pending);
    *batch = (struct batch){a, tasks, sizes.tasks, scratch, scratch_floats};
    return needed;
}

static int64_t attend(struct attention *a, const struct sparse *sparse, const struct rows *rows, void *workspace, int64_t workspace_bytes,
                      int threads) {
    cut_attention(a);
    struct batch batch;
    int64_t needed = lay_out_attention(a, sparse, rows, workspace, workspace_bytes, threads, &batch);
    if (needed <= workspace_bytes) native_parallel(run_task, &batch, batch.count * a->kv_heads, threads);
    return needed;
}

#define ATTENTION_ARGUMENTS                                                                                                                \
    int query_type, const void *query, int64_t query_row, int64_t query_head, int kv_type, const void *keys, int64_t key_block,            \
        int64_t key_head, int64_t key_token, const void *values, int64_t value_block, int64_t value_head, int64_t value_token,             \
        const int32_t *tables, int64_t table_stride, const int32_t *starts, const int32_t *contexts, int64_t sequences, int64_t kv_heads,  \
        int64_t group, int64_t key_size, int64_t value_size, int64_t block_tokens, float scale, int64_t window, float softcap,             \
        const float *sinks, void *out

#define ATTENTION                                                                                                                          \
    {.query_type = query_type, .kv_type = kv_type, .query = query, .keys = keys, .values = values, .out = out, .sinks = sinks,             \
     .query_strides = {query_row, query_head}, .key_strides = {key_block, key_head, key_token},                                            \
     .value_strides = {value_block, value_head, value_token}, .kv_heads = kv_heads, .group = group, .key_size = key_size,                  \
     .value_size = value_size, .block_tokens = block_tokens, .window = window, .scale = scale, .softcap = softcap}

/* See `paged_attention` in reference.py. Strides count elements. Gives the bytes of workspace that the call needs; where that is more than
 * workspace_bytes nothing is computed. */
EXPORTED int64_t native_paged_attention(ATTENTION_ARGUMENTS, void *workspace, int64_t workspace_bytes, int threads) {
    struct attention a = ATTENTION;
    struct rows rows = {tables, starts, contexts, table_stride, sequences};
    return attend(&a, NULL, &rows, workspace, workspace_bytes, threads);
}

/* See `window_sparse_attention` in reference_sparse.py; anchors NULL where nothing is far. The far sizes are those of struct attention. */
EXPORTED int64_t native_window_sparse_attention(ATTENTION_ARGUMENTS, int64_t refresh, int64_t sink_blocks, int far_type,
                                                const void *far_keys, const void *far_values, const void *far_key_scales,
                                                const void *far_value_scales, int64_t far_key_size, int64_t far_value_size,
                                                const int32_t *far_tables, int64_t far_table_stride, const int32_t *choices, int64_t most,
                                                const int32_t *counts, const int64_t *anchors, void *workspace, int64_t workspace_bytes,
                                                int threads) {
    struct attention a = ATTENTION;
    struct rows rows = {tables, starts, contexts, table_stride, sequences};
    struct sparse sparse = {window, refresh, sink_blocks, most, far_table_stride, far_tables, choices, counts, anchors};
    a.window = INT64_MAX / 2;
    a.far_type = far_type, a.far_keys = far_keys, a.far_values = far_values;
    a.far_key_scales = far_key_scales, a.far_value_scales = far_value_scales;
    a.far_key_size = far_key_size, a.far_value_size = far_value_size, a.choices_stride = most;
    return attend(&a, &sparse, &rows, workspace, workspace_bytes, threads);
}

struct choosing_batch {
    const struct choosing *choosing;
    int64_t anchors, together;
    char *memory;
    int64_t each;
};

static void choose_task(void *context, int64_t index, int thread) {
    struct choosing_batch *b = context;
    const int64_t heads = b->choosing->kv_heads, begin = index / heads * b->together;
    const int64_t end = begin + b->together < b->anchors ? begin + b->together : b->anchors;
    native_kernels->choose_far(b->choosing, begin, end, index % heads, b->memory + thread * b->each);
}

/* What choose_far of choosing.h takes, vectors being as wide as they come. */
EXPORTED int64_t native_choose_bytes(int64_t widest, int64_t second_stage, int64_t most, int64_t group, int64_t size, int64_t block_tokens) {
    const int64_t compared = most_compared(widest, second_stage, most);
    const int64_t columns = (block_tokens + 15) / 16 * 16, vectors = (size + 15) / 16 * 16, tall = columns > 64 ? columns : 64;
    const int64_t shared = whole_lines(2 * widest * 8) + 2 * whole_lines(widest * 4) + whole_lines(group * size * 2) +
                           whole_lines(vectors * tall * 4) + whole_lines(columns * 4) + whole_lines(group * columns * 4);
    const int64_t own = 2 * whole_lines(widest * 4) + whole_lines(2 * compared * 8) + whole_lines(group * size * 4) +
                        whole_lines(group * signed_columns(size) * 2) + whole_lines(group * 4 * vectors) + whole_lines(group * 2 * vectors) +
                        2 * whole_lines(group * 4);
    return shared + CHOSEN_TOGETHER * own;
}

/* See `choose_far` in reference_sparse.py. */
EXPORTED void native_choose_far(int query_type, const void *query, int64_t query_row, int64_t query_head, int far_type, const void *keys,
                                const void *key_scales, const struct far_bounds *bounds, const int32_t *tables, int64_t table_stride,
                                const int64_t *sequences, const int32_t *ends, const int32_t *budgets, int32_t *choices, int64_t anchors,
                                int64_t kv_heads, int64_t group, int64_t size, int64_t block_tokens, int64_t key_size, int64_t sink_blocks,
                                int64_t most, int64_t first_stage, int64_t second_stage, int64_t widest, void *workspace, int threads) {
    struct choosing choosing = {
        .query_type = query_type, .query = query, .query_strides = {query_row, query_head}, .far_type = far_type, .keys = keys,
        .key_scales = key_scales, .bounds = *bounds, .tables = tables, .table_stride = table_stride, .sequences = sequences, .ends = ends,
        .budgets = budgets, .choices = choices, .kv_heads = kv_heads, .group = group, .size = size, .block_tokens = block_tokens,
        .key_size = key_size, .sink_blocks = sink_blocks, .most = most, .widest = widest, .first_stage = first_stage,
        .second_stage = second_stage,
    };
    const int64_t together = chosen_together(anchors, kv_heads, threads);
    struct choosing_batch batch = {&choosing, anchors, together, workspace, native_choose_bytes(widest, second_stage, most, group, size, block_tokens)};
    native_parallel(choose_task, &batch, (anchors + together - 1) / together * kv_heads, threads);
}
