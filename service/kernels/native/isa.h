/* Every kernel, compiled for the instruction set that the including file asks for, and the table of them. */
#include "attention.h"
#include "choosing.h"
#include "demoting.h"
#include "elementwise.h"
#include "linear.h"
#include "quantised_amx.h"

const struct kernels KERNELS_TABLE = {
    .name = KERNELS_NAME,
    .add_rms_norm = add_rms_norm,
    .rotate = rotate,
    .swiglu = swiglu,
    .narrow = narrow,
    .head_gate = head_gate,
    .linear_scratch = linear_scratch,
    .has_pairs = HAS_PAIRS,
    .linear_tile = linear_tile,
#if HAS_DOTS
    .shapes = {TILES_8, TILES_4},
    .quantise_row = quantise_row,
    .int8_strips = int8_strips,
    .int4_strips = int4_strips,
#endif
#if defined(ISA_AMX)
    .int8_matrices = matrix_strips,
#endif
    .attention_scratch = attention_scratch,
    .attention_partial = attention_partial,
    .attention_share = attention_share,
    .choose_far = choose_far,
    .demote = demote,
};
