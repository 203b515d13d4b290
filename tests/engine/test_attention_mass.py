"""The mass that is read, against weights and choices computed head by head and row by row with the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from service.checkpoints.load import load
from service.checkpoints.long_context import adapt
from service.checkpoints.manifest import read_manifest
from service.engine import attention_mass
from service.engine.attention_mass import MeasuringAttend, measure_mass
from service.kernels import reference_sparse
from service.kernels.reference_sparse import FarBlocks
from service.models.attention import DenseAttend
from service.types.model_spec import ModelSpec
from service.types.settings import AttentionSettings
from tests.tiny_models import build_tiny

TOKENS, BLOCK = 448, 64
TEXT = tuple(int(token) for token in np.random.default_rng(3).integers(0, 256, TOKENS + 20))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("mass") / "model", "llama", max_position_embeddings=1024)


class Keeping(DenseAttend):
    """Full attention that keeps queries, keys and values of each layer."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(1, TOKENS, spec.layers)
        self.heads: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.heads[layer] = query.clone(), key.clone(), value.clone()
        return super().__call__(layer, query, key, value)


@torch.inference_mode()
def expected(directory: Path, asked: AttentionSettings, positions: range) -> dict[int, list[float]]:
    """(read, best, without far) of each layer, means over K/V heads and those of the positions that choose."""
    manifest = read_manifest(directory)
    spec = adapt(manifest.spec, asked)
    keeping = Keeping(spec)
    load(manifest, "cpu", torch.float32, serving=False).hidden(torch.tensor(TEXT[:TOKENS]), torch.arange(TOKENS), keeping)
    found: dict[int, list[float]] = {}
    for layer, (query, key, value) in keeping.heads.items():
        attention = spec.layers[layer].attention
        if attention.far is None:
            continue
        far, blocks = stored(key, value), TOKENS // BLOCK
        table, group, sums = torch.arange(blocks, dtype=torch.int32)[None], attention.heads // attention.kv_heads, []
        for position in positions:
            anchor = position // attention.far.refresh * attention.far.refresh
            end, budget = max(anchor - asked.attention_window + 1, 0) // BLOCK, attention.far.budget(anchor)
            if end - 1 <= budget:
                continue
            numbers = (torch.tensor([number]) for number in (0, end, budget))
            choices, _ = reference_sparse.choose_far(query[anchor : anchor + 1], far, table, *numbers, sink_blocks=1, most=budget)
            for head in range(attention.kv_heads):
                mass = torch.zeros(blocks)
                for member in range(head * group, (head + 1) * group):
                    weights = (key[: position + 1, head] @ query[position, member] * attention.head_dim**-0.5).softmax(0)
                    mass += torch.nn.functional.pad(weights, (0, TOKENS - position - 1)).view(blocks, BLOCK).sum(1) / group
                near = float(mass[0] + mass[end:].sum())
                read = near + float(mass[choices[0, head].long()].sum())
                sums.append((read, near + float(mass[1:end].sort().values[-budget:].sum()) if budget else near, near))
        found[layer] = np.mean(sums, axis=0).tolist()
    return found


def stored(key: Tensor, value: Tensor) -> FarBlocks:
    keys, values = (x.view(-1, BLOCK, *x.shape[1:]).transpose(1, 2).contiguous() for x in (key, value))
    count, heads, _, size = keys.shape
    integers = [torch.empty(x.shape, dtype=torch.int8) for x in (keys, values)]
    scales = [torch.empty(count, heads, BLOCK, dtype=torch.float16) for _ in range(2)]
    bounds = [torch.empty(count, heads, *parts, 2, size, dtype=torch.int8) for parts in ((), (4,))]
    far = FarBlocks(*integers, *scales, *bounds, torch.empty(count, heads, dtype=torch.float16))
    reference_sparse.demote(keys, values, far, torch.arange(count), torch.arange(count))
    return far


@pytest.mark.parametrize("refresh", [1, 16])
def test_shares_are_those_of_a_recount(tiny: Path, refresh: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = AttentionSettings(attention_window=100, far_blocks=2, far_refresh=refresh, dense_layers=(0,))
    monkeypatch.setattr(attention_mass, "TILE_ROWS", 50)
    row = measure_mass(tiny, asked, TEXT)
    found = expected(tiny, asked, range(TOKENS))
    assert list(found) == [1] and list(row["read_by_layer"]) == ["0", "1"]
    # The dense layer is measured as it would read with far blocks, and is no part of the means.
    sparse = expected(tiny, replace(asked, dense_layers=()), range(TOKENS))
    assert [row["read_by_layer"][str(layer)] for layer in (0, 1)] == pytest.approx([sparse[layer][0] for layer in (0, 1)], abs=2e-4)
    assert [row[name] for name in ("read", "best_possible", "without_far")] == pytest.approx(found[1], abs=2e-4)
    assert row["without_far"] < row["read"] < row["best_possible"] < 1
    assert row["tokens"] == TOKENS and 0 < row["rows"] < TOKENS


def test_eviction_reads_what_is_near_and_a_budget_for_all_leaves_no_choice(tiny: Path) -> None:
    evicted = measure_mass(tiny, AttentionSettings(attention_window=64, kv_far="evict"), TEXT)
    assert evicted["read"] == evicted["best_possible"] == evicted["without_far"] < 1
    everything = measure_mass(tiny, AttentionSettings(attention_window=64, far_blocks=8), TEXT)
    assert everything["rows"] == 0 and everything["read"] is None and everything["read_by_layer"] == {}


def test_every_store_reads_nearly_the_same(tiny: Path) -> None:
    rows = [
        measure_mass(tiny, AttentionSettings(attention_window=64, far_blocks=2, kv_far=kind), TEXT) for kind in ("int8", "int4", "bf16")
    ]
    assert max(row["read"] for row in rows) - min(row["read"] for row in rows) < 0.02
    assert len({row["without_far"] for row in rows}) == 1


def test_a_worse_choice_reads_less(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest blocks instead of the best ones."""
    asked = AttentionSettings(attention_window=64, far_blocks=2)
    sound = measure_mass(tiny, asked, TEXT)
    choose = MeasuringAttend._choose

    def oldest(self: MeasuringAttend, *arguments: object) -> attention_mass.Choice:
        choice = choose(self, *arguments)  # type: ignore[arg-type]
        return choice._replace(indices=torch.tensor([1, 2]).expand(choice.indices.shape))

    monkeypatch.setattr(MeasuringAttend, "_choose", oldest)
    assert measure_mass(tiny, asked, TEXT)["read"] < sound["read"]
