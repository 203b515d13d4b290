from __future__ import annotations

from pathlib import Path

import pytest

from service.checkpoints.fields import Fields, read_object, read_text
from service.types.errors import CheckpointError


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"nul", b'"x"', b"\xff\xfe{}", b"[" * 100_000], ids=range(7))
def test_files_that_hold_no_object(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_object(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_text(tmp_path / "absent")
    (tmp_path / "long").write_text("x" * 11)
    with pytest.raises(CheckpointError, match="larger than 10 bytes"):
        read_text(tmp_path / "long", 10)


def test_values_have_types_and_ranges() -> None:
    fields = Fields({"n": 3, "x": 0.5, "t": True, "s": "a", "null": None, "big": 10**30}, "file")
    assert (fields.integer("n"), fields.number("n"), fields.number("x")) == (3, 3.0, 0.5)
    assert (fields.flag("t", False), fields.text("s")) == (True, "a")
    assert (fields.integer("null", 7), fields.number("absent", 2.0), fields.optional_number("null")) == (7, 2.0, None)
    for read in (
        lambda: fields.integer("x"),
        lambda: fields.integer("t"),
        lambda: fields.integer("n", high=2),
        lambda: fields.integer("null"),
        lambda: fields.number("big"),
        lambda: fields.number("t"),
        lambda: fields.flag("n", True),
        lambda: fields.text("n"),
        lambda: fields.nested("n"),
        lambda: fields.ids("n", 3),
    ):
        with pytest.raises(CheckpointError, match=r"^file: "):
            read()


def test_a_long_value_is_shortened() -> None:
    assert len(str(Fields({"a": "x" * 10_000}, "file").refusal("a", "wrong"))) < 120
