"""Torch beside an exported graph: the row that is measured and the table that it is kept in."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from service.checkpoints.manifest import read_manifest
from service.cli import backends
from service.cli.backends import keep_table, measure_backends
from service.cli.machine_benchmark import finish
from service.engine.backend_choice import Measured, choose_backend, read_table
from service.types.errors import SettingsError
from service.types.settings import EngineSettings
from tests.cli.test_machine_benchmark import flags
from tests.tiny_models import build_tiny

ROW = {
    "kind": "backends",
    "date": "2026-01-01",
    "cores": 2,
    "directory": "tiny",
    "measured": [{"parameters": 10, "quantize": "none", "batch": 1, "torch": 2.0, "onnx": 3.0}],
}


def test_both_sides_are_measured_and_the_table_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(backends, "BATCHES", (1, 3))
    monkeypatch.setattr(
        backends, "EngineSettings", lambda **given: EngineSettings(quantize_cache=str(tmp_path / "cache"), spare_worker=False, **given)
    )
    directory = build_tiny(tmp_path / "tiny")
    row = asyncio.run(measure_backends(directory, ("none",), 1, 2, (6, 4)))
    form = row["forms"]["none"]
    assert set(form["batches"]) == {"1", "3"} and form["dtypes"]["onnx"] == "float32"
    for found in form["batches"].values():
        assert found["torch"]["rounds"] == found["onnx"]["rounds"] == found["ratio"]["rounds"] == 2
        assert found["ratio"]["min"] <= found["onnx"]["max"] / found["torch"]["min"] * 1.001
    assert [(entry["batch"], entry["onnx"]) for entry in row["measured"]] == [
        (int(batch), found["onnx"]["median"]) for batch, found in form["batches"].items()
    ]
    assert finish(flags("--backends", "none"), {"cores": 2, "directory": "tiny", **row}) == 0
    shown = capsys.readouterr().out
    assert "onnx, tokens/s" in shown and json.loads(shown.splitlines()[-1])["kind"] == "backends"


def test_a_table_keeps_the_newest_of_each(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    keep_table(path, ROW)
    newer = {"parameters": 10, "quantize": "none", "batch": 1, "torch": 2.0, "onnx": 9.0}
    other = {"parameters": 5, "quantize": "int8", "batch": 8, "torch": 1.0, "onnx": 1.0}
    keep_table(path, {**ROW, "measured": [newer, other]})
    assert read_table(str(path)) == [Measured(**other), Measured(**newer)]
    assert json.loads(path.read_text())["newest"]["directory"] == "tiny"


def test_what_is_no_table_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text("notes")
    with pytest.raises(SettingsError, match=r"notes\.json"):
        keep_table(path, ROW)
    assert path.read_text() == "notes"
    with pytest.raises(SettingsError, match="cannot be written"):
        keep_table(tmp_path / "notes.json" / "table.json", ROW)


def test_auto_asks_a_table_that_was_kept(tmp_path: Path) -> None:
    spec = read_manifest(build_tiny(tmp_path / "tiny")).spec
    keep_table(tmp_path / "table.json", ROW)
    settings = EngineSettings(device="cpu", backend_table=str(tmp_path / "table.json"))
    assert choose_backend(spec, settings, 4).backend == "onnx"
