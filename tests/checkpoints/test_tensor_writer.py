"""Files written chunk by chunk are what the reader reads, and hold finite values only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from service.checkpoints.stored_tensors import read_header
from service.checkpoints.tensor_writer import Entry, write_safetensors
from service.types.errors import CheckpointError


def test_chunks_become_tensors(tmp_path: Path) -> None:
    values = {"a": torch.randn(7, 5), "b": torch.randn(3), "empty": torch.empty(0, 4)}
    entries = [Entry("a", "float32", (7, 5)), Entry("b", "bfloat16", (3,)), Entry("empty", "float16", (0, 4))]
    write_safetensors(tmp_path / "x.safetensors", entries, lambda entry: values[entry.name].split(2))
    read = load_file(tmp_path / "x.safetensors")
    assert torch.equal(read["a"], values["a"]) and torch.equal(read["b"], values["b"].bfloat16()) and read["empty"].shape == (0, 4)
    assert [tensor.name for tensor in read_header(tmp_path / "x.safetensors")] == ["a", "b", "empty"]


@pytest.mark.parametrize(
    ("value", "dtype", "words"), [(float("nan"), "float32", "no.?t finite numbers"), (1e6, "float16", "store it as bfloat16")]
)
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^w .*{words}"):
        write_safetensors(tmp_path / "x.safetensors", [Entry("w", dtype, (2,))], lambda entry: [torch.tensor([1.0, value])])
