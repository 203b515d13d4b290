"""What a long sequence of the v5.2 reference shape takes: blocks of the scheduler's allocator, in the bytes of the worker's pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from service.checkpoints.long_context import adapt
from service.checkpoints.quantisation import weight_bytes
from service.engine.kv_pool import KvPool
from service.engine.memory import Usage, plan_memory
from service.schedulers.blocks import BlockSpace, TableChanges
from service.types.catalog import V5_2
from service.types.model_spec import ModelSpec
from service.types.plan import LoadRequest
from service.types.settings import AttentionSettings
from tests.schedulers.test_blocks import make_sequence

CONTEXT, SLICE_TOKENS, GB = 16_384, 512, 10**9
REFERENCE = V5_2.spec(dict(V5_2.shapes)["reference"], image_id=4)
FULL = replace(REFERENCE, layers=tuple(replace(one, attention=replace(one.attention, window=None, far=None)) for one in REFERENCE.layers))
# On the page about long contexts: shares of a full cache while tokens are generated, and while the prompt is read in slices of 512.
SHARES = {("int8", 16_384): (0.62, 0.64), ("int4", 16_384): (0.40, 0.43), ("int8", 131_072): (0.56, 0.57), ("int4", 131_072): (0.32, 0.32)}


def most_blocks(spec: ModelSpec, context: int, prompt: int) -> list[int]:
    """The most blocks of each group that one sequence holds whose `prompt` tokens are read in slices, and which grows to `context` tokens.

    While it generates, or where it is all prompt, on its whole way.
    """
    layout = spec.kv_layout()
    space = BlockSpace(layout, (context // layout.block_tokens,) * len(layout.groups))
    sequence, most = make_sequence(max_tokens=1), [0] * len(layout.groups)
    space.open(sequence)
    ends = [*range(SLICE_TOKENS, prompt + 1, SLICE_TOKENS), *range(prompt + 1, context + 1)]
    for start, end in zip([0, *ends], ends, strict=False):
        space.release_behind(sequence, start, TableChanges())
        assert space.extend(sequence, end, TableChanges())
        if end > prompt or prompt == context:
            most = [max(count, pool.size - len(pool.free)) for count, pool in zip(most, space.pools, strict=True)]
    space.check([sequence])
    return most


def pool_bytes(spec: ModelSpec, blocks: Sequence[int]) -> int:
    """Bytes of a 16-bit pool with so many blocks, without its null blocks. Nothing is written, so they take no memory."""
    layout, cpu = spec.kv_layout(), torch.device("cpu")
    null = KvPool(layout, (0,) * len(blocks), torch.bfloat16, cpu).reserved_bytes
    return KvPool(layout, tuple(blocks), torch.bfloat16, cpu).reserved_bytes - null


@pytest.mark.parametrize(("store", "context"), SHARES)
def test_bytes_of_a_sequence_against_a_full_16_bit_cache(store: str, context: int) -> None:
    spec = adapt(REFERENCE, AttentionSettings(kv_far=store))
    full = pool_bytes(FULL, most_blocks(FULL, context, context))
    assert full == context * FULL.kv_layout().groups[0].token_bytes(2)
    generating, reading = (pool_bytes(spec, most_blocks(spec, context, prompt)) / full for prompt in (context - SLICE_TOKENS, context))
    assert (round(generating, 2), round(reading, 2)) == SHARES[store, context]
    assert generating <= {"int8": 0.63, "int4": 0.42}[store]


def test_a_context_of_16384_tokens_of_the_reference_shape_is_far_inside_12_gigabytes() -> None:
    layout, weights = REFERENCE.kv_layout(), weight_bytes(REFERENCE, 2, "none")
    request = LoadRequest("", max_rows=1, context_tokens=CONTEXT)
    plan = plan_memory(REFERENCE, layout, 2, request, Usage(weights, 0, 12 * GB))
    sizes = dict(plan.lines)
    assert plan.context_tokens == CONTEXT
    assert (round(weights / GB, 2), round((sizes["kv:near2048"] + sizes["kv:far_int8"]) / GB, 2)) == (1.25, 0.53)
    assert round(plan.total_bytes / GB, 1) == 2.0
