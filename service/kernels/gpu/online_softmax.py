"""The arithmetic that all attention kernels share: one tile of keys, the merge of two splits, the end of a row.

It does not know tables, windows or where tiles come from. Invariant: a tile of which a row sees nothing leaves that row's state as it is,
bit for bit, and a row's keys are always summed in the same order: tiles upwards inside a split, then splits upwards. So whether a row is
computed in a prefill tile or as a decode row, alone or in a batch, in one slice or in many, its arithmetic is the same. What is multiplied
and added in one operation is said (`fma`): left to a compiler, that differs between blocks with a mask and without, and between kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def start_rows(ROWS: tl.constexpr, BLOCK_VALUE: tl.constexpr):
    """(maximum [ROWS], sum [ROWS], weighted values [ROWS, BLOCK_VALUE]) of rows that have seen nothing, float32."""
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    return b_max, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK_VALUE], tl.float32)


@triton.jit
def score_tile(b_query, b_keys, b_key_scale, scale, CAPPED: tl.constexpr, QUANTISED: tl.constexpr, PRECISION: tl.constexpr):
    """Scores [M, N] of query [M, D] and keys [N, D] before their last factor, see `add_tile`; quantised keys have one scale a token [N]."""
    b_scores = tl.dot(b_query, tl.trans(b_keys.to(b_query.dtype)), input_precision=PRECISION)
    if QUANTISED:
        b_scores = b_scores * b_key_scale[None, :]
    if CAPPED:
        b_scores = 2.0 * tl.sigmoid(2.0 * (b_scores * scale)) - 1.0
    return b_scores


@triton.jit
def sum_weights(b_weights):
    """Sums [M] of weights [M, N] from 0 to 2, in whole numbers of 2^-22, so in any order: which threads hold a row differs between kernels.

    2 and a weight is a float32 that counts in these; the bits of 2 itself add up to a multiple of 2^32.
    """
    tl.static_assert(b_weights.shape[1] % 4 == 0 and b_weights.shape[1] <= 128)
    return tl.sum((b_weights + 2.0).to(tl.int32, bitcast=True), 1).to(tl.float32) * 2.384185791015625e-07


@triton.jit
def add_tile(
    b_scores, b_values, b_value_scale, b_max, b_sum, b_acc, scale, cap,
    CAPPED: tl.constexpr, QUANTISED: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """The state after one tile: its scores [M, N], −inf where a row does not see, and values [N, Dv], multiplied in TYPE.

    Scores times their last factor, which is positive, are in units of log2. It is `scale`, the softmax scale times log2(e), or with a cap
    `cap`, the cap times log2(e); `scale` then is the softmax scale over the cap. Quantised values have one scale a token, float32 [N].
    """
    factor = cap if CAPPED else scale
    b_new = tl.maximum(b_max, tl.max(b_scores, 1) * factor)
    # Rows that have seen nothing yet: exp2(−inf − 0) is 0, exp2(−inf + inf) would be NaN.
    b_peak = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_weights = tl.exp2(tl.fma(b_scores, factor, -b_peak[:, None]))  # [M, N]
    b_shrink = tl.exp2(b_max - b_peak)
    b_sum = tl.fma(b_sum, b_shrink, sum_weights(b_weights))
    if QUANTISED:
        b_weights = b_weights * b_value_scale[None, :]
    b_acc = tl.dot(b_weights.to(TYPE), b_values.to(TYPE), b_acc * b_shrink[:, None], input_precision=PRECISION)
    return b_new, b_sum, b_acc


@triton.jit
def merge_rows(b_max, b_sum, b_acc, b_split_max, b_split_sum, b_split_acc):
    """The state of rows [M] after one more split."""
    b_new = tl.maximum(b_max, b_split_max)
    b_peak = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_old, b_add = tl.exp2(b_max - b_peak), tl.exp2(b_split_max - b_peak)
    return b_new, tl.fma(b_sum, b_old, b_split_sum * b_add), tl.fma(b_acc, b_old[:, None], b_split_acc * b_add[:, None])


@triton.jit
def finish_rows(b_max, b_sum, b_acc, b_sinks, SINKS: tl.constexpr):
    """Outputs [M, Dv] float32; a learned sink (its logit [M], of any type) takes part in the sum. Rows that saw nothing give 0."""
    if SINKS:
        b_sinks = b_sinks.to(tl.float32)
        b_peak = tl.maximum(b_max, b_sinks * 1.4426950408889634)
        b_shrink = tl.exp2(b_max - b_peak)
        b_sum = tl.fma(b_sum, b_shrink, tl.exp2(tl.fma(b_sinks, 1.4426950408889634, -b_peak)))
        b_acc = b_acc * b_shrink[:, None]
    return b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
