"""Sampling on a GPU without a sort: temperature, top-k, top-p, min-p and the draw of one token a row, in a few passes over its logits.

The semantics are those of `reference_sampling`: candidates in order of score, ties by the smaller id; a token is the first id in vocabulary
order whose cumulative weight exceeds number · total. It does not know seeds or requests: the numbers arrive. Invariant: a row's
token does not depend on the rows beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.gpu.compiling import kernel

# Logits that one pass holds at a time.
PIECE = 1024


@triton.jit
def load_scores(p_row, i_from, vocabulary, peak, temperature, BLOCK: tl.constexpr):
    """(distances below the peak as ordered integers [BLOCK], weights exp(score) [BLOCK]) of logits i_from …; none beyond the vocabulary.

    Scores are (logit − peak) / temperature, never above 0, so the bits of their negatives are ordered like numbers.
    """
    o_at = i_from + tl.arange(0, BLOCK)
    b_logits = tl.load(p_row + o_at, mask=o_at < vocabulary, other=float("-inf")).to(tl.float32)
    b_below = tl.math.div_rn(peak - b_logits, tl.zeros([BLOCK], tl.float32) + temperature)
    return tl.where(o_at < vocabulary, b_below.to(tl.int32, bitcast=True), 2147483647), tl.exp(-b_below)


@triton.jit
def find_border(p_row, vocabulary, peak, temperature, goal, floor, whole, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):
    """The smallest distance t such that the candidates up to t number at least `goal`, or WEIGHTED weigh at least `goal`.

    Candidates at `floor` and beyond count as `whole` with all before. Three bits a pass: the sums at seven trials are taken at once.
    """
    border = tl.zeros([1], tl.int64)
    for i_pass in range(11):
        b_trials = border + (tl.arange(0, 8).to(tl.int64) << (30 - 3 * i_pass))  # [8]
        b_sums = tl.zeros([8], tl.float64)
        for i_from in range(0, vocabulary, BLOCK):
            b_distance, b_weights = load_scores(p_row, i_from, vocabulary, peak, temperature, BLOCK)
            b_share = b_weights if WEIGHTED else tl.full([BLOCK], 1.0, tl.float32)
            m_within = b_distance.to(tl.int64)[None, :] < b_trials[:, None]  # [8, BLOCK]
            b_sums += tl.sum(tl.where(m_within, b_share[None, :], 0.0), 1).to(tl.float64)
        b_sums = tl.where(b_trials > floor, whole, b_sums)
        passed = tl.sum((b_sums < goal).to(tl.int64), 0) - 1
        border = border + (tl.maximum(passed, 0) << (30 - 3 * i_pass))
    return tl.max(border, 0)


@triton.jit
def sums_within(p_row, vocabulary, peak, temperature, border, BLOCK: tl.constexpr):
    """(number before the border, weight before it, number at it, weight of one at it) of a row's candidates."""
    count, weight, ties, tie_weight = (
        tl.zeros([1], tl.float64),
        tl.zeros([1], tl.float64),
        tl.zeros([1], tl.float64),
        tl.zeros([1], tl.float64),
    )
    for i_from in range(0, vocabulary, BLOCK):
        b_distance, b_weights = load_scores(p_row, i_from, vocabulary, peak, temperature, BLOCK)
        m_before, m_at = b_distance < border, b_distance == border
        count += tl.sum(m_before.to(tl.int32), 0).to(tl.float64)
        weight += tl.sum(tl.where(m_before, b_weights, 0.0), 0).to(tl.float64)
        ties += tl.sum(m_at.to(tl.int32), 0).to(tl.float64)
        tie_weight = tl.maximum(tie_weight, tl.max(tl.where(m_at, b_weights, 0.0), 0).to(tl.float64))
    return tl.max(count, 0), tl.max(weight, 0), tl.max(ties, 0), tl.max(tie_weight, 0)


@triton.jit
def kept_weights(p_row, i_from, vocabulary, peak, temperature, border, ties, ties_before, min_p, BLOCK: tl.constexpr):
    """(weights of what is kept, 0 elsewhere [BLOCK]; ties seen so far) of one piece: up to the border, of its ties the first `ties` ids."""
    b_distance, b_weights = load_scores(p_row, i_from, vocabulary, peak, temperature, BLOCK)
    m_at = b_distance == border
    b_rank = ties_before + tl.cumsum(m_at.to(tl.int32), 0)
    m_kept = ((b_distance < border) | (m_at & (b_rank <= ties))) & (b_weights >= min_p)
    return tl.where(m_kept, b_weights, 0.0), ties_before + tl.sum(m_at.to(tl.int32), 0)


@triton.jit
def draw(p_row, vocabulary, peak, temperature, border, ties, min_p, number, BLOCK: tl.constexpr):
    """The first id whose cumulative kept weight exceeds number · total."""
    total, seen = tl.zeros([1], tl.float64), 0
    for i_from in range(0, vocabulary, BLOCK):
        b_kept, seen = kept_weights(p_row, i_from, vocabulary, peak, temperature, border, ties, seen, min_p, BLOCK)
        total += tl.sum(b_kept.to(tl.float64), 0)
    target, before, token, seen = total * number, tl.zeros([1], tl.float64), tl.full([1], -1, tl.int32), 0
    for i_from in range(0, vocabulary, BLOCK):
        b_kept, seen = kept_weights(p_row, i_from, vocabulary, peak, temperature, border, ties, seen, min_p, BLOCK)
        b_ends = before + tl.cumsum(b_kept.to(tl.float64), 0)
        m_past = (b_ends > target) & (b_kept > 0)
        first = tl.min(tl.where(m_past, i_from + tl.arange(0, BLOCK), 2147483647), 0)
        token = tl.where((token < 0) & (first < 2147483647), first, token)
        before += tl.sum(b_kept.to(tl.float64), 0)
    return token


@kernel
def sample_kernel(
    p_logits, p_temperature, p_top_k, p_top_p, p_min_p, p_numbers, p_tokens, vocabulary, stride_row,
    GREEDY_BELOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns one row: its peak, the borders of top-k and top-p, then the draw; only scalars stay between passes."""
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * stride_row
    peak, best, odd = float("-inf"), 0, 0
    for i_from in range(0, vocabulary, BLOCK):
        o_at = i_from + tl.arange(0, BLOCK)
        b_logits = tl.load(p_row + o_at, mask=o_at < vocabulary, other=float("-inf")).to(tl.float32)
        odd += tl.sum((b_logits != b_logits).to(tl.int32), 0)  # noqa: PLR0124
        here = tl.max(b_logits, 0)
        first = tl.min(tl.where(b_logits == here, o_at, 2147483647), 0)
        best = tl.where(here > peak, first, best)
        peak = tl.maximum(peak, here)
    sound = (odd == 0) & (peak > float("-inf")) & (peak < float("inf"))
    token = tl.full([1], 0, tl.int32) + tl.where(sound, best, -1)
    temperature = tl.load(p_temperature + i_row)
    if sound & (temperature >= GREEDY_BELOW):
        top_k, top_p, min_p = tl.load(p_top_k + i_row), tl.load(p_top_p + i_row), tl.load(p_min_p + i_row)
        border, ties, floor = tl.cast(2147483646, tl.int64), tl.cast(2147483647, tl.int64), tl.cast(4611686018427387904, tl.int64)
        whole = tl.cast(0.0, tl.float64)
        if (top_k > 0) & (top_k < vocabulary):
            border = find_border(p_row, vocabulary, peak, temperature, top_k.to(tl.float64), floor, whole, BLOCK, False)
            count, _, _, _ = sums_within(p_row, vocabulary, peak, temperature, border, BLOCK)
            ties = top_k - count.to(tl.int64)
            floor = border
        if top_p < 1.0:
            _, weight, at, one = sums_within(p_row, vocabulary, peak, temperature, border, BLOCK)
            whole = weight + tl.minimum(at, ties.to(tl.float64)) * one
            border, ties = nucleus_of(p_row, vocabulary, peak, temperature, top_p * whole, floor, whole, ties, BLOCK)
        token = draw(p_row, vocabulary, peak, temperature, border, ties, min_p, tl.load(p_numbers + i_row), BLOCK)
    tl.store(p_tokens + i_row + tl.arange(0, 1), token.to(tl.int64))


@triton.jit
def nucleus_of(p_row, vocabulary, peak, temperature, nucleus, floor, whole, ties, BLOCK: tl.constexpr):
    """(border, ties kept there) of the fewest candidates that weigh `nucleus`, at least one; `ties` bounds those at the floor."""
    border = find_border(p_row, vocabulary, peak, temperature, nucleus, floor, whole, BLOCK, True)
    _, weight, _, one = sums_within(p_row, vocabulary, peak, temperature, border, BLOCK)
    wanted = tl.maximum(tl.ceil((nucleus - weight) / tl.where(one > 0, one, 1.0)), 1.0).to(tl.int64)
    return border, tl.minimum(wanted, tl.where(border >= floor, ties, wanted))


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, numbers: Tensor, greedy_below: float
) -> Tensor:
    """Tokens int64 [R], −1 where a row has NaN or no finite peak.

    logits [R, V] of any floating type, rows contiguous; temperature, min_p float32, top_k int64 (0: all), top_p, numbers float64, all [R].
    Below `greedy_below` the best id is taken. Reads a row 2 times, 14 times more for each of top-k and top-p that is set.
    """
    rows, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        sample_kernel[(rows,)](
            logits, temperature, top_k, top_p, min_p, numbers, tokens, vocabulary, logits.stride(0),
            GREEDY_BELOW=greedy_below, BLOCK=min(PIECE, triton.next_power_of_2(vocabulary)), num_warps=8,
        )  # fmt: skip
    return tokens
