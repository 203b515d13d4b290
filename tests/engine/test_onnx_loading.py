"""The worker of exported graphs: export in a child of its own, the cache, damage, refusals, and no torch in the process that serves."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from service.checkpoints.manifest import read_manifest
from service.checkpoints.onnx_support import graph_directory
from service.engine import export_child, onnx_loading
from service.engine.export_messages import Export, Exported, Refused
from service.engine.onnx_limits import bytes_a_second, machine_limits
from service.engine.onnx_loading import load_graph
from service.engine.supervisor import WorkerBackend
from service.types.catalog import V5_2
from service.types.errors import CapacityError, CheckpointError
from service.types.plan import BatchPlan, BlockAppend, LoadRequest, OpenSequence, Slice
from service.types.request import Sampling, Stop
from service.types.settings import AttentionSettings, EngineSettings
from tests.tiny_models import build_tiny, build_tiny_line

PROMPT = tuple(range(3, 43))


def request_of(directory: Path, cache: Path | str, **changes) -> LoadRequest:
    known = {"kv_bytes": 1 << 20, "context_tokens": 128, "threads": 1, "quantize_cache_bytes": 1 << 30, "machine_limits": (1.0, 1.0)}
    return LoadRequest(str(directory), quantize_cache=str(cache), backend="onnx", **{**known, **changes})


@pytest.fixture
def inline_export(monkeypatch) -> None:
    """Exports in this process instead of a child: torch is loaded here anyway."""

    async def ask(question):
        return export_child.answer(question)

    monkeypatch.setattr(onnx_loading, "_ask", ask)


@pytest.fixture(scope="module")
def cache(full_model, tmp_path_factory) -> Path:
    """A cache with the graph of the full model, as a first start leaves it."""
    directory = tmp_path_factory.mktemp("graphs")
    loaded = load_graph(request_of(full_model, directory), 0.5, lambda *_: None)
    assert [name for name, _ in loaded.info.phases_s] == ["import", "plan", "export", "graph", "warm_up", "limits"]
    return directory


def first_plan() -> BatchPlan:
    opening = OpenSequence(0, PROMPT, len(PROMPT), Sampling(temperature=0), Stop(9))
    return BatchPlan(1, (Slice(0, 0, len(PROMPT), 1),), open=(opening,), append=(BlockAppend(0, 0, 0, (1,)),))


def test_a_second_start_finds_the_graph(full_model, full_dense, cache) -> None:
    heard = []
    loaded = load_graph(request_of(full_model, cache), 0.5, lambda *what: heard.append(what))
    info = loaded.info
    assert heard == [] and [name for name, _ in info.phases_s] == ["import", "plan", "graph", "warm_up", "limits"]
    assert (info.backend, info.dtype, info.quantize, info.device) == ("onnx", "float32", "none", "cpu")
    assert dict(info.memory_bytes)["weights"] == (graph_directory(full_dense.manifest, cache, "none") / "weights.bin").stat().st_size
    assert loaded.backend.execute(first_plan()).tokens[0].token == full_dense.greedy(PROMPT, 1)[0]
    assert [path.name for path in cache.iterdir()] == [graph_directory(full_dense.manifest, cache, "none").name]


@pytest.mark.usefixtures("inline_export")
@pytest.mark.parametrize("name", ["weights.bin", "model.onnx", "product.onnx", "export.json"])
def test_a_damaged_graph_is_exported_again(full_model, full_dense, tmp_path, cache, name, capsys) -> None:
    own = shutil.copytree(cache, tmp_path / "own")
    file = graph_directory(full_dense.manifest, own, "none") / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    if name == "export.json":
        file.write_bytes(whole[:-9])
    loaded = load_graph(request_of(full_model, own), 0.0, lambda *_: None)
    assert "exported again" in capsys.readouterr().err
    assert loaded.backend.execute(first_plan()).tokens[0].token == full_dense.greedy(PROMPT, 1)[0]
    assert name == "export.json" or file.read_bytes() == whole


@pytest.mark.usefixtures("inline_export")
def test_a_model_that_reads_images_has_its_encoder_and_room_for_them(tmp_path) -> None:
    seeing = build_tiny_line(tmp_path / "line")
    request = request_of(seeing, tmp_path / "cache", quantize="none", image_cache_bytes=1 << 20)
    info = load_graph(request, 0.0, lambda *_: None).info
    token_bytes = 4 * read_manifest(seeing).spec.image_token_values()
    assert info.image_tokens == (1 << 20) // token_bytes and dict(info.memory_bytes)["images"] == info.image_tokens * token_bytes
    (graph,) = (tmp_path / "cache").iterdir()
    (graph / "encoder.onnx").write_bytes((graph / "encoder.onnx").read_bytes()[:-9])
    assert load_graph(request, 0.0, lambda *_: None).info.phases_s[2][0] == "graph"
    assert load_graph(request, 0.0, lambda *_: None).info.image_tokens == info.image_tokens


@pytest.mark.usefixtures("inline_export")
def test_without_a_cache_nothing_stays(full_model, full_dense, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    loaded = load_graph(request_of(full_model, "none"), 0.0, lambda *_: None)
    assert list(tmp_path.iterdir()) == []
    assert loaded.backend.execute(first_plan()).tokens[0].token == full_dense.greedy(PROMPT, 1)[0]
    small = load_graph(request_of(full_model, tmp_path / "small", quantize_cache_bytes=1000), 0.0, lambda *_: None)
    assert small.info.backend == "onnx" and list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("inline_export")
def test_an_export_makes_room_in_the_cache(full_model, full_dense, tmp_path) -> None:
    old = tmp_path / "0123-0123-int8-float32.quantised.safetensors"
    old.write_bytes(bytes(600_000))
    os.utime(old, (1, 1))
    load_graph(request_of(full_model, tmp_path, quantize_cache_bytes=900_000), 0.0, lambda *_: None)
    assert [path.name for path in tmp_path.iterdir()] == [graph_directory(full_dense.manifest, tmp_path, "none").name]


def test_what_the_graph_cannot_compute_is_refused_before_anything_is_written(tmp_path) -> None:
    far = build_tiny_line(tmp_path / "line", V5_2)
    with pytest.raises(CheckpointError, match="far blocks"):
        load_graph(request_of(far, tmp_path / "cache", quantize="none"), 0.0, lambda *_: None)
    assert not (tmp_path / "cache").exists()


def test_a_place_that_is_no_directory_is_refused(full_model, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a directory"):
        load_graph(request_of(full_model, tmp_path / "file"), 0.0, lambda *_: None)


def test_too_little_memory_is_refused_with_numbers(full_model, cache) -> None:
    with pytest.raises(CapacityError, match="MiB"):
        load_graph(request_of(full_model, cache, kv_bytes=1 << 50), 0.0, lambda *_: None)


def test_the_child_says_why_it_cannot(full_model, tmp_path) -> None:
    far = build_tiny_line(tmp_path / "line", V5_2)
    refused = export_child.answer(Export(str(far), AttentionSettings(), "none", str(tmp_path / "graph.onnx")))
    assert isinstance(refused, Refused) and "far blocks" in refused.message
    (tmp_path / "file").write_text("")
    unwritable = export_child.answer(Export(str(full_model), AttentionSettings(), "none", str(tmp_path / "file" / "graph.onnx")))
    assert isinstance(unwritable, Refused) and "cannot be written" in unwritable.message


def test_the_child_computes_with_the_threads_that_were_asked_for(full_model, tmp_path, monkeypatch) -> None:
    asked = []

    async def ask(question):
        asked.append(question.threads)
        return Refused("enough")

    monkeypatch.setattr(onnx_loading, "_ask", ask)
    with pytest.raises(CheckpointError, match="enough"):
        load_graph(request_of(full_model, tmp_path, threads=3), 0.0, lambda *_: None)
    assert asked == [3]
    before = torch.get_num_threads()
    try:
        for threads, expected in ((3, 3), (0, len(os.sched_getaffinity(0)))):
            export_child.use_threads(threads)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_the_child_exports_the_attention_that_was_asked_for(full_model, tmp_path) -> None:
    narrow = AttentionSettings(max_position_embeddings=512, rope_scaling="yarn")
    assert isinstance(export_child.answer(Export(str(full_model), narrow, "none", str(tmp_path / "graph.onnx"))), Exported)
    assert (tmp_path / "graph.onnx" / "export.json").is_file()


def test_a_child_without_torch_says_what_to_install(full_model, tmp_path, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "service.checkpoints.onnx_export", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused = export_child.answer(Export(str(full_model), AttentionSettings(), "none", str(tmp_path / "graph.onnx")))
    assert isinstance(refused, Refused) and "pip install" in refused.message


def test_loading_and_a_step_import_no_torch(full_model, cache) -> None:
    code = _STANDALONE.format(model=str(full_model), cache=str(cache))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "heavy []"


_STANDALONE = """
import sys
from service.engine.onnx_loading import load_graph
from service.types.plan import BatchPlan, BlockAppend, LoadRequest, OpenSequence, Slice
from service.types.request import Sampling, Stop
bounds = dict(kv_bytes=1 << 20, context_tokens=128, threads=1, quantize_cache_bytes=1 << 30)
loaded = load_graph(LoadRequest({model!r}, quantize_cache={cache!r}, backend="onnx", **bounds), 0.0, lambda *_: None)
opening = OpenSequence(0, (3, 4, 5), 3, Sampling(logprobs=2), Stop(9), 1)
print(loaded.backend.execute(BatchPlan(1, (Slice(0, 0, 3, 3),), open=(opening,), append=(BlockAppend(0, 0, 0, (1,)),))))
print("heavy", sorted({{"torch", "onnx", "triton", "safetensors"}} & set(sys.modules)))
"""


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


async def test_a_real_worker_has_no_torch_and_is_replaced_when_it_dies(full_model, full_dense, cache) -> None:
    backend = WorkerBackend(request_of(full_model, cache), EngineSettings())
    try:
        expected = full_dense.greedy(PROMPT, 1)
        for _ in range(2):
            info = await backend.start()
            assert info.backend == "onnx"
            assert (await backend.execute(first_plan())).tokens[0].token == expected[0]
            assert "libonnxruntime" in maps(info.pid) or "onnxruntime" in maps(info.pid)
            assert "libtorch" not in maps(info.pid) and "/torch/" not in maps(info.pid)
            os.kill(info.pid, signal.SIGKILL)
        assert backend.health().restarts == 1
    finally:
        await backend.close()


async def test_a_first_start_through_a_real_worker_exports_without_torch(tmp_path) -> None:
    directory = build_tiny(tmp_path / "model", seed=4)
    heard = []
    backend = WorkerBackend(request_of(directory, tmp_path / "cache"), EngineSettings(), on_progress=lambda *what: heard.append(what))
    try:
        info = await backend.start()
        assert heard == [("export", 0.0), ("export", 1.0)]
        assert "/torch/" not in maps(info.pid)
        assert graph_directory(read_manifest(directory), tmp_path / "cache", "none").is_dir()
    finally:
        await backend.close()


async def test_a_worker_that_is_killed_while_it_exports_leaves_nothing(tmp_path) -> None:
    directory, cache = build_tiny(tmp_path / "model", seed=5), tmp_path / "cache"
    exporting = asyncio.Event()
    backend = WorkerBackend(request_of(directory, cache), EngineSettings(), on_progress=lambda *_: exporting.set())
    starting = asyncio.create_task(backend.start())
    await exporting.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await backend.close()
    assert not cache.exists() or not [path for path in cache.iterdir() if not path.name.startswith(".")]
    again = WorkerBackend(request_of(directory, cache), EngineSettings())
    try:
        assert (await again.start()).backend == "onnx"
    finally:
        await again.close()
    assert [path.name.endswith("-none.onnx") for path in cache.iterdir()] == [True]


def test_limits_are_measured_or_taken_as_given(cache, full_dense) -> None:
    directory = graph_directory(full_dense.manifest, cache, "none")
    measured = dict(machine_limits(directory, 1, (0.0, 0.0)))
    assert measured["bytes"] > 1e8 and measured["flops"] > 1e8
    assert dict(machine_limits(directory, 1, (5.0, 7.0))) == {"bytes": 5.0, "flops": 7.0}
    assert bytes_a_second(2) > 1e8
