from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from service.checkpoints.own_format import own_config, read_own
from service.types.catalog import LINES, Shape, VersionLine
from service.types.errors import CheckpointError

SHAPE = Shape(vocab_size=61, dim=24, layers=3, heads=6, kv_heads=2, mlp_hidden=40, context_tokens=64, rope_theta=500.0, head_dim=8)
GOOD = 'version: "2.3"\nvocab_size: 61\ndim: 24\nlayers: 3\nheads: 6\nkv_heads: 2\nmlp_hidden: 40\ncontext_tokens: 64\n'


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path / "config.yaml"


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.label)
def test_round_trip(tmp_path: Path, line: VersionLine) -> None:
    spec = line.spec(SHAPE, (1, 5), 0)
    read, generation = read_own(written(tmp_path, own_config(spec, {"temperature": 0.7})))
    assert read == spec
    assert generation.number("temperature") == 0.7


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.label)
def test_the_version_decides_the_line(tmp_path: Path, line: VersionLine) -> None:
    spec, _ = read_own(written(tmp_path, GOOD.replace("2.3", line.number + ".4")))
    assert (spec.line, spec.precision) == (line.number, line.precision)


def test_a_spec_that_no_line_gives_is_not_written() -> None:
    spec = LINES[0].spec(SHAPE)
    for other in (replace(spec, tied_embeddings=False), replace(spec, norm_eps=1e-5), replace(spec, line=None)):
        with pytest.raises(CheckpointError, match="version line"):
            own_config(other)


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ('version: "2.3"', "version: 2.3", "version"),
        ("2.3", "9.9", "version"),
        ("dim: 24", "dim: -1", "dim"),
        ("dim: 24", "dims: 24", "dims"),
        ("heads: 6\nkv", "heads: 5\nkv", "kv_heads"),
        ("dim: 24", "dim: 18", "head_dim"),
        ("layers: 3", "layers: 1000000", "layers"),
        ("context_tokens: 64\n", "", "context_tokens"),
        ("dim: 24", "dim: !!python/object/apply:os.getcwd []", "YAML"),
        ("dim: 24", "dim: [", "YAML"),
    ],
)
def test_refused_by_name(tmp_path: Path, old: str, new: str, name: str) -> None:
    assert old in GOOD
    with pytest.raises(CheckpointError, match=rf"config\.yaml.*\b{name}\b"):
        read_own(written(tmp_path, GOOD.replace(old, new, 1)))


@pytest.mark.parametrize("text", ["", "- a", "3"])
def test_not_a_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match="mapping"):
        read_own(written(tmp_path, text))
