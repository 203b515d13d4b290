"""Blocks that leave the window: those of all rows go in one call, and a model that keeps none far demotes none while it loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from service.engine.torch_backend import TorchBackend
from service.types.plan import BlockDemote
from service.types.settings import AttentionSettings
from tests.inline_backend import InlineBackend
from tests.tiny_models import build_tiny


class Stopped(Exception):
    """Nothing is computed."""


async def started(place: Path, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> tuple[TorchBackend, list[list[list[int]]]]:
    """An engine over a near and a far group with so many blocks, which writes demotions down and computes nothing."""
    attention = AttentionSettings(attention_window=64, far_blocks=1)
    backend = InlineBackend(build_tiny(place / "model", max_position_embeddings=512), blocks=blocks, attention=attention)
    await backend.start()
    calls: list[list[list[int]]] = []

    def noted(group: int, sources: Tensor, targets: Tensor) -> None:
        calls.append([[group], sources.tolist(), targets.tolist()])

    def stop(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(backend.pool, "demote", noted)
    monkeypatch.setattr(backend.engine, "_hidden", stop)
    return backend.engine, calls


async def test_blocks_of_all_rows_go_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = await started(tmp_path, (8, 8), monkeypatch)
    engine._demote((BlockDemote(0, 1, (2,), (1,)), BlockDemote(3, 1, (), ()), BlockDemote(1, 1, (3, 5), (2, 4))))
    assert calls == [[[1], [2, 3, 5], [1, 2, 4]]]
    engine._demote(())
    assert len(calls) == 1


@pytest.mark.parametrize("far_blocks", [0, 8])
async def test_kernels_are_used_first_on_blocks_that_are_there(far_blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context that ends within the window has none that is far."""
    engine, calls = await started(tmp_path, (8, far_blocks), monkeypatch)
    with pytest.raises(Stopped):
        engine.compile_kernels()
    assert calls == ([[[1], [1], [1]]] if far_blocks else [])
