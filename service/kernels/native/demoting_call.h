/* What a call that demotes near blocks into the far store is: shared by demoting.c, which shares it among threads, and demoting.h. */
#ifndef DEEPSEEK_DEMOTING_CALL_H
#define DEEPSEEK_DEMOTING_CALL_H

#include "native.h"

/* Keys or values of both stores. Near blocks lie by their strides [block, head, token], which count elements (of integers bytes); far blocks [F, kv_heads,
 * block_tokens, size or size / 2] and their scales float16 [F, kv_heads, block_tokens] (NULL where they are copied) are contiguous. */
struct demoted {
    const void *near;
    int64_t strides[3];
    void *far;
    uint16_t *scales;
    int64_t size;
};

/* One call: near blocks near_ids [n] become the far blocks far_ids [n]. `far_type` is STORED_INT8, STORED_INT4 or that of the near blocks, which
 * then are not STORED_INT8. The count of parts of `bounds` divides block_tokens. */
struct demoting {
    enum element near_type, far_type;
    struct demoted keys, values;
    struct far_bounds bounds;
    const int64_t *near_ids, *far_ids;
    int64_t kv_heads, block_tokens;
};

/* Floats that a thread needs: a scale for each token, the extremes of each part of the keys in whole vectors, and `widened` floats of rows. */
INLINE int64_t demoting_floats(int64_t block_tokens, int64_t parts, int64_t key_size, int64_t widened) {
    return (block_tokens + 15) / 16 * 16 + (1 + parts) * 2 * ((key_size + 15) / 16 * 16) + widened;
}

#endif
