"""Which engine serves a model: explicit choices obeyed or refused in a sentence, and what `auto` takes from the table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from service.engine import backend_choice
from service.engine.backend_choice import Measured, choose_backend, read_table
from service.types.catalog import V2_3, V3_5, V4_8
from service.types.errors import CheckpointError, SettingsError
from service.types.kv_layout import FarSpec
from service.types.settings import EngineSettings

PLAIN = V2_3.spec(V2_3.shapes[0][1])
SEEING = V3_5.spec(V3_5.shapes[0][1])


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path) -> None:
    """No GPU, whatever this machine has."""
    monkeypatch.setattr(backend_choice, "_NVIDIA", tmp_path / "none")


@pytest.fixture
def table(tmp_path):
    """A function that writes a table and gives settings that name it."""

    def write(*entries: tuple[object, ...], **settings) -> EngineSettings:
        names = ("parameters", "quantize", "batch", "torch", "onnx", "images")
        path = tmp_path / "table.json"
        path.write_text(json.dumps({"measured": [dict(zip(names, entry, strict=False)) for entry in entries]}))
        return EngineSettings(backend_table=str(path), **settings)

    return write


def test_an_explicit_choice_is_obeyed(table) -> None:
    slow = table((PLAIN.parameters, "none", 1, 100.0, 1.0))
    assert choose_backend(PLAIN, replace(slow, backend="onnx"), 1).backend == "onnx"
    fast = table((PLAIN.parameters, "none", 1, 1.0, 100.0))
    assert choose_backend(PLAIN, replace(fast, backend="torch"), 1).backend == "torch"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda:0"}, "--device cuda:0"),
        ({"dtype": "bfloat16"}, "--dtype bfloat16"),
        ({"deterministic": True}, "--deterministic"),
        ({"kv_cache_dtype": "bfloat16"}, "--kv_cache_dtype bfloat16"),
    ],
)
def test_an_explicit_choice_that_cannot_work_is_refused(changes, words) -> None:
    with pytest.raises((SettingsError, CheckpointError), match=words) as caught:
        choose_backend(PLAIN, EngineSettings(backend="onnx", **changes), 1)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_models_that_cannot_go_that_way_are_refused_by_what_they_have() -> None:
    assert choose_backend(SEEING, EngineSettings(backend="onnx"), 1).backend == "onnx"
    with pytest.raises(CheckpointError, match="images without a fusion"):
        choose_backend(replace(SEEING, fusion=None), EngineSettings(backend="onnx"), 1)
    attention = replace(PLAIN.layers[0].attention, window=64, far=FarSpec())
    far = replace(PLAIN, layers=(replace(PLAIN.layers[0], attention=attention), *PLAIN.layers[1:]))
    with pytest.raises(CheckpointError, match="far blocks"):
        choose_backend(far, EngineSettings(backend="onnx"), 1)


def test_without_the_runtime_an_explicit_choice_says_what_to_install_and_auto_takes_torch(monkeypatch, table) -> None:
    monkeypatch.setattr(backend_choice, "_missing", lambda *names: names[0])
    with pytest.raises(SettingsError, match="pip install"):
        choose_backend(PLAIN, EngineSettings(backend="onnx"), 1)
    assert choose_backend(PLAIN, table((PLAIN.parameters, "none", 1, 1.0, 100.0)), 1).backend == "torch"


def test_auto_takes_what_was_faster_by_the_margin(table) -> None:
    for onnx, expected in ((1.0, "torch"), (1.09, "torch"), (1.11, "onnx")):
        choice = choose_backend(PLAIN, table((PLAIN.parameters, "none", 8, 1.0, onnx)), 8)
        assert choice.backend == expected and f"{onnx:.2f}" in choice.reason


def test_auto_asks_the_nearest_size_then_the_nearest_batch_of_the_same_weights(table) -> None:
    size = PLAIN.parameters
    rows = [
        (size * 2, "none", 1, 1.0, 9.0),
        (size * 2, "none", 32, 1.0, 0.1),
        (size * 50, "none", 4, 1.0, 0.1),
        (size, "int8", 1, 1.0, 0.1),
    ]
    assert [choose_backend(PLAIN, table(*rows), batch).backend for batch in (1, 2, 16, 64)] == ["onnx", "onnx", "torch", "torch"]
    assert choose_backend(PLAIN, table(*rows, quantize="int8"), 1).backend == "torch"


@pytest.mark.parametrize("changes", [{"device": "cuda"}, {"dtype": "float16"}])
def test_auto_takes_torch_where_the_graph_cannot(table, changes) -> None:
    fast = [(PLAIN.parameters, kind, 1, 1.0, 9.0) for kind in ("none", "int8", "int4")]
    assert choose_backend(PLAIN, table(*fast), 1).backend == "onnx"
    assert choose_backend(PLAIN, table(*fast, **changes), 1).backend == "torch"


def test_auto_leaves_a_machine_with_a_gpu_to_torch(table, monkeypatch, tmp_path) -> None:
    fast = table((PLAIN.parameters, "none", 1, 1.0, 9.0))
    (tmp_path / "gpu").write_text("")
    monkeypatch.setattr(backend_choice, "_NVIDIA", tmp_path / "gpu")
    assert choose_backend(PLAIN, fast, 1).reason == "there is a GPU"
    assert choose_backend(PLAIN, replace(fast, device="cpu"), 1).backend == "onnx"


def test_a_line_s_own_weights_are_looked_up(table) -> None:
    light = V4_8.spec(V4_8.shapes[0][1])
    assert light.precision.quantize == "int8"
    rows = table((light.parameters, "int8", 1, 1.0, 9.0), (light.parameters, "none", 1, 9.0, 1.0))
    assert choose_backend(light, rows, 1).backend == "onnx"


def test_what_was_never_measured_is_served_by_torch(table) -> None:
    assert "measured" in choose_backend(PLAIN, table(), 1).reason


def test_what_was_measured_without_images_says_nothing_of_a_model_that_reads_them(table) -> None:
    size = SEEING.parameters
    assert choose_backend(SEEING, table((size, "none", 1, 1.0, 9.0)), 1) == ("torch", "nothing was measured with none weights and images")
    assert choose_backend(SEEING, table((size, "none", 1, 1.0, 9.0, True)), 1).backend == "onnx"
    assert choose_backend(PLAIN, table((size, "none", 1, 1.0, 9.0, True)), 1).backend == "torch"


def test_the_table_that_comes_with_the_package_reads() -> None:
    assert all(isinstance(entry, Measured) for entry in read_table(""))


@pytest.mark.parametrize("text", ["", "{}", '{"measured": [{}]}', '{"measured": [1]}', "[]"])
def test_another_file_is_refused_by_name(tmp_path, text) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"other\.json"):
        read_table(str(path))


def test_a_missing_file_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(SettingsError, match="nowhere"):
        read_table(str(tmp_path / "nowhere"))
