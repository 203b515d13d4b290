/* Demoting near blocks into the far store: the exported functions, which share blocks and K/V heads among threads.
 *
 * A block and head is written by one thread, from its own rows alone, so the bytes do not depend on who is demoted with it.
 */
#include "demoting_call.h"

/* Elements below which a second thread costs more than it saves. */
#define GRAIN_ELEMENTS 16384

struct demoting_batch {
    const struct demoting *demoting;
    float *memory;
    int64_t each;
};

static void demote_task(void *context, int64_t index, int thread) {
    struct demoting_batch *b = context;
    int64_t heads = b->demoting->kv_heads;
    native_kernels->demote(b->demoting, index / heads, index % heads, b->memory + thread * b->each);
}

static int all_below(const int64_t *ids, int64_t count, int64_t limit) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= limit) return 0;
    return 1;
}

/* Floats of workspace that each thread needs. */
EXPORTED int64_t native_demote_scratch(int near_type, int64_t block_tokens, int64_t parts, int64_t key_size, int64_t value_size) {
    return demoting_floats(block_tokens, parts, key_size, near_type == STORED_INT8 ? block_tokens * (key_size + value_size) : 0);
}

/* See `demote` in reference_sparse.py. Gives 0, and writes nothing, where an id is not one of the near_blocks or far_blocks. */
EXPORTED int native_demote(int near_type, int far_type, const void *keys, int64_t key_block, int64_t key_head, int64_t key_token,
                           const void *values, int64_t value_block, int64_t value_head, int64_t value_token, void *far_keys,
                           void *far_values, void *key_scales, void *value_scales, const struct far_bounds *bounds,
                           const int64_t *near_ids, const int64_t *far_ids, int64_t count, int64_t near_blocks, int64_t far_blocks,
                           int64_t kv_heads, int64_t block_tokens, int64_t key_size, int64_t value_size, float *workspace, int threads) {
    struct demoting demoting = {
        .near_type = near_type, .far_type = far_type,
        .keys = {keys, {key_block, key_head, key_token}, far_keys, key_scales, key_size},
        .values = {values, {value_block, value_head, value_token}, far_values, value_scales, value_size},
        .bounds = *bounds, .near_ids = near_ids, .far_ids = far_ids,
        .kv_heads = kv_heads, .block_tokens = block_tokens,
    };
    if (!all_below(near_ids, count, near_blocks) || !all_below(far_ids, count, far_blocks)) return 0;
    struct demoting_batch batch = {&demoting, workspace, native_demote_scratch(near_type, block_tokens, bounds->count, key_size, value_size)};
    int64_t elements = count * kv_heads * block_tokens * (key_size + value_size);
    native_parallel(demote_task, &batch, count * kv_heads, elements < GRAIN_ELEMENTS ? 1 : threads);
    return 1;
}
