"""How kernels are compiled: once for what a model and its settings fix, not again for what changes from step to step.

Triton compiles a variant of a kernel where an integer is 1 or divisible by 16, and where a pointer is aligned to 16 bytes; a variant that
is first met while requests wait costs them seconds. Invariant: a kernel's variants follow from its constants and from types, strides and
sizes of layers; lengths, counts and where a step's arrays begin make none. Strides between a block's tokens are constants: what a thread
reads of a block then has one address and offsets that take no register.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

# Lengths, counts and strides of a step's arrays.
VARYING = (
    *("rows", "images", "sequences", "anchors", "width", "most", "most_visits", "compared"),
    *("stride_table", "stride_far_table", "stride_choice_anchor", "stride_choice_head"),
)
# Arrays that lie in others, at any element.
UNALIGNED = (
    *(
        "p_ends",
        "p_tile_ends",
        "p_split_ends",
        "p_query_starts",
        "p_context_lengths",
        "p_tables",
        "p_far_tables",
        "p_block_ids",
        "p_offsets",
    ),
    *("p_sequences", "p_budgets", "p_anchors", "p_counts", "p_choices", "p_indices", "p_readers", "p_sums"),
)


def kernel(function: Callable[..., Any]) -> Any:
    """A function in Triton's language that is launched, as `triton.jit` makes those that are called by others."""
    return triton.jit(function, do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
