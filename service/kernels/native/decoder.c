/* All layers of a decoder for one step, in one parallel region: norms, quantised products, rotation, far choices, paged attention and SwiGLU.
 *
 * A step of few rows is short calls: some 160 parallel regions for 20 layers took as long as their work. Here the threads stay in one
 * region and go from stage to stage together; while one ends a stage the others fetch the weights that they will multiply next. It
 * knows neither sequences nor where blocks come from. Invariant: every stage runs the kernel of the separate call on the same values, so
 * the results have the same bits.
 */
#include <string.h>

#include "attention_call.h"
#include "quantised_call.h"
#include "team.h"

/* What is fetched of a product at once: what memory gives while a few rows are normalised. */
#define ANNOUNCED_LINES 512

/* One layer: norm weights [dim] and [head_dim] (NULL where heads are not normed), the gate of its heads (panels of float32 [dim, COLUMNS] as
 * in linear.h, bias or NULL; NULL where heads are not gated), quantised products, and its keys and values with strides
 * [block, head, token]. decoder.py has its twin. */
struct layer {
    const float *attention_norm, *mlp_norm, *query_norm, *key_norm, *gate, *gate_bias;
    const struct weights *qkv, *out, *gate_up, *down;
    int64_t heads, kv_heads, head_dim, hidden, window, group;
    float scale, softcap;
    void *keys, *values;
    int64_t key_strides[3], value_strides[3];
    /* Where it reads far blocks: how many tokens share a choice (0: it reads none), sinks, its far store (NULL where what falls
     * out of the window is gone), the far group and its place there. */
    int64_t refresh, sink_blocks;
    const struct far_store *store;
    int64_t far_group, far_place;
};

/* Blocks [F, kv_heads, block_tokens, size] of a layer's far store; the sizes count elements, of integers bytes. */
struct far_store {
    int64_t type, key_size, value_size;
    const void *keys, *values;
    const uint16_t *key_scales, *value_scales;
    struct far_bounds bounds;
};

/* What the rows of a step read of a far group: tables [sequences, stride]; of each layer choices [anchors, kv_heads, most], `layer_choices`
 * apart; counts [anchors], anchors [rows] (NULL: nothing is read). Of the anchors `fresh` are chosen in the step, places[i] by the query of
 * row query_rows[i] of sequence sequences[i], with ends and budgets as in struct choosing; the choices of others are there. */
struct far_group {
    const int32_t *table;
    int64_t stride, most, layer_choices, fresh;
    int32_t *choices;
    const int32_t *counts;
    const int64_t *anchors, *places, *query_rows, *sequences;
    const int32_t *ends, *budgets;
};

/* Where the rows of one KV group stand: table [sequences, stride] and the block of each row. */
struct group {
    const int32_t *table;
    int64_t stride;
    const int64_t *block_ids;
};

/* One step. update [rows, dim] is replaced; residual [rows, dim] is added to; their sum is the result. cos and sin [rows, half]; `done`
 * counts layers. */
struct step {
    const struct layer *layers;
    const struct group *groups;
    const struct far_group *far_groups;
    int64_t first_stage, second_stage, layer_count, rows, dim, half, sequences, block_tokens, kv_type;
    float eps;
    float *update, *residual;
    const float *cos, *sin;
    const int64_t *offsets;
    const int32_t *starts, *contexts;
    int64_t *done;
};

/* Memory of a step: float rows for the widest layer, quantised rows, and attention's own. Normed rows are kept for gates alone; else a
 * thread has one of its `own`, which stays in its cache. */
struct memory {
    float *normed, *own, *qkv, *seen, *gate_up, *gates, *linear;
    char *quantised, *choosing, *attention;
    int64_t choosing_bytes, attention_bytes;
};

struct run {
    const struct step *step;
    struct memory memory;
    struct attention attention;
    struct batch batch;
};

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

/* Whether some row of the step reads far blocks in this layer. */
static int reads_far(const struct step *s, const struct layer *l) { return l->store && s->far_groups[l->far_group].anchors; }

static int64_t choosing_bytes_of(const struct step *s, const struct layer *l) {
    const struct far_group *far = s->far_groups + l->far_group;
    return native_choose_bytes(far->stride, s->second_stage, far->most, l->heads / l->kv_heads, l->head_dim, s->block_tokens);
}

static int32_t *choices_of(const struct step *s, const struct layer *l) {
    const struct far_group *far = s->far_groups + l->far_group;
    return far->choices + l->far_place * far->layer_choices;
}

static struct attention attention_of(const struct step *s, const struct layer *l, const struct memory *m) {
    struct attention a = {
        .query_type = FLOAT32, .kv_type = (enum element)s->kv_type, .query = m->qkv, .keys = l->keys, .values = l->values,
        .out = m->seen, .query_strides = {(l->heads + 2 * l->kv_heads) * l->head_dim, l->head_dim}, .kv_heads = l->kv_heads,
        .group = l->heads / l->kv_heads, .key_size = l->head_dim, .value_size = l->head_dim, .block_tokens = s->block_tokens,
        .window = l->window, .scale = l->scale, .softcap = l->softcap,
    };
    memcpy(a.key_strides, l->key_strides, sizeof a.key_strides);
    memcpy(a.value_strides, l->value_strides, sizeof a.value_strides);
    if (l->refresh) a.window = INT64_MAX / 2;
    if (reads_far(s, l)) {
        const struct far_store *store = l->store;
        a.far_type = (enum element)store->type, a.far_keys = store->keys, a.far_values = store->values;
        a.far_key_scales = store->key_scales, a.far_value_scales = store->value_scales;
        a.far_key_size = store->key_size, a.far_value_size = store->value_size, a.choices_stride = s->far_groups[l->far_group].most;
    }
    cut_attention(&a);
    return a;
}

static int64_t lay_out_layer(struct run *run, const struct layer *l, int threads) {
    const struct step *s = run->step;
    const struct group *group = s->groups + l->group;
    struct rows rows = {group->table, s->starts, s->contexts, group->stride, s->sequences};
    struct sparse sparse = {.window = l->window, .refresh = l->refresh, .sink_blocks = l->sink_blocks};
    if (reads_far(s, l)) {
        const struct far_group *far = s->far_groups + l->far_group;
        sparse.most = far->most, sparse.far_table_stride = far->stride, sparse.far_tables = far->table;
        sparse.choices = choices_of(s, l), sparse.counts = far->counts, sparse.anchors = far->anchors;
    }
    run->attention = attention_of(s, l, &run->memory);
    return lay_out_attention(&run->attention, l->refresh ? &sparse : NULL, &rows, run->memory.attention, run->memory.attention_bytes, threads, &run->batch);
}

/* The bytes that a step needs; `run` gets its places in `workspace`. */
static int64_t place_memory(struct run *run, char *workspace, int64_t bytes, int threads) {
    const struct step *s = run->step;
    int64_t heads = 0, seen = 0, hidden = 0, gates = 0, quantised = 0, choosing = 0, attention = 0;
    for (int64_t i = 0; i < s->layer_count; i++) {
        const struct layer *l = s->layers + i;
        heads = largest(heads, (l->heads + 2 * l->kv_heads) * l->head_dim);
        seen = largest(seen, l->heads * l->head_dim);
        hidden = largest(hidden, l->hidden);
        gates = l->gate ? largest(gates, l->heads) : gates;
        const struct weights *products[] = {l->qkv, l->out, l->gate_up, l->down};
        for (int p = 0; p < 4; p++) quantised = largest(quantised, (int64_t)quantised_bytes(products[p], s->rows));
        if (reads_far(s, l))
            choosing = largest(choosing, choosing_bytes_of(s, l));
        attention = largest(attention, lay_out_layer(run, l, threads));
    }
    char *at = (char *)(((uintptr_t)workspace + 63) / 64 * 64), *begin = at;
    run->memory.normed = (float *)at, at += gates ? whole_lines(s->rows * s->dim * 4) : 0;
    run->memory.own = (float *)at, at += whole_lines(threads * s->dim * 4);
    /* What attention leaves is read before the feed-forward writes, and the other way round: both have the same place. */
    run->memory.gate_up = (float *)at;
    char *end = at + whole_lines(s->rows * 2 * hidden * 4);
    float **rows[] = {&run->memory.qkv, &run->memory.seen, &run->memory.gates};
    int64_t sizes[] = {heads, seen, gates};
    for (int i = 0; i < 3; i++) *rows[i] = (float *)at, at += whole_lines(s->rows * sizes[i] * 4);
    at = at > end ? at : end;
    run->memory.linear = (float *)at, at += gates ? whole_lines(threads * native_kernels->linear_scratch() * 4) : 0;
    run->memory.quantised = at, at += whole_lines(quantised);
    run->memory.choosing = at, run->memory.choosing_bytes = choosing, at += threads * choosing;
    run->memory.attention = at, at += attention + 64;
    run->memory.attention_bytes = bytes >= at - begin + 64 ? attention + 64 : 0;
    return at - begin + 64;
}

/* Rotate queries and keys of one row where they lie and write its keys and values into their blocks. */
static void turn_row(const struct run *run, const struct layer *l, int64_t row) {
    const struct step *s = run->step;
    int64_t size = l->head_dim, turning = l->heads + l->kv_heads, bytes = s->kv_type == FLOAT32 ? 4 : s->kv_type == STORED_INT8 ? 1 : 2;
    float *heads = run->memory.qkv + row * (turning + l->kv_heads) * size;
    if (l->query_norm) {
        native_kernels->add_rms_norm(FLOAT32, heads, NULL, l->query_norm, s->eps, heads, NULL, 0, l->heads, size);
        float *keys = heads + l->heads * size;
        native_kernels->add_rms_norm(FLOAT32, keys, NULL, l->key_norm, s->eps, keys, NULL, 0, l->kv_heads, size);
    }
    native_kernels->rotate(FLOAT32, heads, 0, size, s->cos + row * s->half, s->sin + row * s->half, heads, 0, 1, turning, size, s->half);
    int64_t block = s->groups[l->group].block_ids[row], token = s->offsets[row];
    for (int64_t head = 0; head < l->kv_heads; head++) {
        int64_t key = block * l->key_strides[0] + head * l->key_strides[1] + token * l->key_strides[2];
        int64_t value = block * l->value_strides[0] + head * l->value_strides[1] + token * l->value_strides[2];
        native_kernels->narrow((enum element)s->kv_type, heads + (l->heads + head) * size, (char *)l->keys + key * bytes, size);
        native_kernels->narrow((enum element)s->kv_type, heads + (turning + head) * size, (char *)l->values + value * bytes, size);
    }
}

/* residual += update; the norm of the sum of one row becomes a row of the product, and is left in `normed`. */
static void norm_row(const struct run *run, const float *norm, const struct product *product, const struct weights *weights, int64_t row,
                     float *normed) {
    const struct step *s = run->step;
    float *update = s->update + row * s->dim, *residual = s->residual + row * s->dim;
    native_kernels->add_rms_norm(FLOAT32, update, residual, norm, s->eps, normed, residual, 0, 1, s->dim);
    quantise_into(product, weights, normed, row);
}

/* What the thread's first piece of a product begins with; of no product nothing. */
static struct upcoming first_piece(const struct product *product, int thread, int threads) {
    return product ? piece_beginning(product, thread, product_pieces(product, threads)) : (struct upcoming){NULL, 0};
}

/* Have the beginning of that fetched at once. */
static void announce(const struct product *product, int thread, int threads) {
    struct upcoming first = first_piece(product, thread, threads);
    int64_t lines = first.lines < ANNOUNCED_LINES ? first.lines : ANNOUNCED_LINES;
    for (int64_t line = 0; line < lines; line++) __builtin_prefetch(first.at + 64 * line, 0, 2);
}

/* A product, and while its last pieces are computed the beginning of the `following` one is fetched. */
static void multiply(struct team *team, const struct product *product, const struct product *following, int thread, int threads) {
    int64_t count = product_pieces(product, threads);
    SHARE_STAGE_AHEAD(piece, after, count)
        multiply_piece(product, piece, count, after < count ? piece_beginning(product, after, count) : first_piece(following, thread, threads));
    end_stage(team, threads);
}

/* Heads of all rows, and the logits of their gates: pieces of one product, then tiles of the other. */
static void project(const struct run *run, struct team *team, const struct layer *l, const struct product *qkv, int thread, int threads) {
    const struct memory *m = &run->memory;
    int64_t rows = run->step->rows, pieces = product_pieces(qkv, threads), tiles = (rows + HEIGHT - 1) / HEIGHT;
    struct linear gate = {.type = FLOAT32, .out_type = FLOAT32, .packed = 1, .x = m->normed, .bias = l->gate_bias, .weight = l->gate,
                          .out = m->gates, .rows = rows, .inputs = run->step->dim, .outputs = l->heads};
    SHARE_STAGE_AHEAD(task, after, pieces + (l->gate ? tiles * ((l->heads + COLUMNS - 1) / COLUMNS) : 0)) {
        if (task < pieces)
            multiply_piece(qkv, task, pieces, piece_beginning(qkv, after, pieces));
        else
            native_kernels->linear_tile(&gate, (task - pieces) / tiles, (task - pieces) % tiles,
                                        m->linear + thread * native_kernels->linear_scratch());
    }
    end_stage(team, threads);
}

/* What the heads of one row saw, each by its gate, becomes a row of the product. */
static void gate_row(const struct run *run, const struct layer *l, const struct product *product, int64_t row) {
    float *seen = run->memory.seen + row * l->heads * l->head_dim;
    if (l->gate) {
        const float *logits = run->memory.gates + row * l->heads;
        native_kernels->head_gate(FLOAT32, seen, 0, l->head_dim, logits, seen, 0, 1, l->heads, l->head_dim);
    }
    quantise_into(product, l->out, seen, row);
}

/* Choose far blocks for the step's fresh anchors, each by the query of one row. */
static void choose_blocks(const struct run *run, struct team *team, const struct layer *l, int thread, int threads) {
    const struct far_group *far = run->step->far_groups + l->far_group;
    const struct far_store *store = l->store;
    struct choosing choosing = {
        .query_type = FLOAT32, .query = run->memory.qkv, .far_type = store->type, .keys = store->keys, .key_scales = store->key_scales,
        .key_size = store->key_size, .block_tokens = run->step->block_tokens, .bounds = store->bounds,
        .tables = far->table, .ends = far->ends, .budgets = far->budgets, .sequences = far->sequences, .choices = choices_of(run->step, l),
        .query_strides = {(l->heads + 2 * l->kv_heads) * l->head_dim, l->head_dim}, .table_stride = far->stride, .kv_heads = l->kv_heads,
        .group = l->heads / l->kv_heads, .size = l->head_dim, .sink_blocks = l->sink_blocks, .most = far->most, .widest = far->stride,
        .first_stage = run->step->first_stage, .second_stage = run->step->second_stage, .query_rows = far->query_rows, .places = far->places,
    };
    char *memory = run->memory.choosing + thread * run->memory.choosing_bytes;
    const int64_t together = chosen_together(far->fresh, l->kv_heads, threads);
    SHARE_STAGE(task, (far->fresh + together - 1) / together * l->kv_heads) {
        const int64_t begin = task / l->kv_heads * together, end = begin + together;
        native_kernels->choose_far(&choosing, begin, end < far->fresh ? end : far->fresh, task % l->kv_heads, memory);
    }
    end_stage(team, threads);
}

static void run_step(void *context, struct team *team, int thread, int threads) {
    struct run *run = context;
    const struct step *s = run->step;
    struct memory *m = &run->memory;
    float *own = m->own + thread * s->dim;
    for (int64_t i = 0; i < s->layer_count; i++) {
        const struct layer *l = s->layers + i;
        struct product qkv = start_product(l->qkv, s->rows, m->quantised, m->qkv);
        struct product out = start_product(l->out, s->rows, m->quantised, s->update);
        struct product gate_up = start_gated_product(l->gate_up, s->rows, m->quantised, m->gate_up);
        struct product down = start_product(l->down, s->rows, m->quantised, s->update);
        struct product next = i + 1 < s->layer_count ? start_product(l[1].qkv, s->rows, m->quantised, m->qkv) : qkv;

        if (i == 0) announce(&qkv, thread, threads);
        SHARE_STAGE(row, s->rows) norm_row(run, l->attention_norm, &qkv, l->qkv, row, l->gate ? m->normed + row * s->dim : own);
        if (thread == threads - 1) lay_out_layer(run, l, threads);
        end_stage(team, threads);
        project(run, team, l, &qkv, thread, threads);
        SHARE_STAGE(row, s->rows) turn_row(run, l, row);
        end_stage(team, threads);
        if (reads_far(s, l)) choose_blocks(run, team, l, thread, threads);
        announce(&out, thread, threads);
        SHARE_STAGE_AHEAD(task, after, run->batch.count * l->kv_heads) run_attention_task(&run->batch, task, after, thread);
        end_stage(team, threads);
        SHARE_STAGE(row, s->rows) gate_row(run, l, &out, row);
        end_stage(team, threads);
        multiply(team, &out, &gate_up, thread, threads);
        SHARE_STAGE(row, s->rows) norm_row(run, l->mlp_norm, &gate_up, l->gate_up, row, own);
        end_stage(team, threads);
        multiply(team, &gate_up, &down, thread, threads);
        SHARE_STAGE(row, s->rows) {
            float *hidden = m->gate_up + row * gate_up.outputs;
            if (!gate_up.gated) native_kernels->swiglu(FLOAT32, hidden, hidden, 0, 1, l->hidden);
            quantise_into(&down, l->down, hidden, row);
        }
        end_stage(team, threads);
        multiply(team, &down, i + 1 < s->layer_count ? &next : NULL, thread, threads);
        if (thread == 0) *s->done += 1;
    }
}

/* Compute a step. Gives the bytes of workspace that it needs; where that is more than workspace_bytes nothing is computed. */
EXPORTED int64_t native_decoder_layers(const struct step *step, void *workspace, int64_t workspace_bytes, int threads) {
    struct run run = {.step = step};
    threads = threads > 1 ? threads : 1;
    int64_t needed = place_memory(&run, workspace, workspace_bytes, threads);
    if (needed <= workspace_bytes) native_team(run_step, &run, threads);
    return needed;
}
