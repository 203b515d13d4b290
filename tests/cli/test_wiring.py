"""What a worker is told to load is what the flags say."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from service.checkpoints.manifest import read_manifest
from service.cli.report import LoadProgress
from service.cli.wiring import build_models, load_request
from service.config.load import load_settings
from service.types.errors import SettingsError
from service.types.settings import EngineSettings
from tests.tiny_models import build_tiny

# Settings of the engine that its parent side obeys, or that a request carries under another name.
PARENT = {"tier", "backend", "backend_table", "heartbeat_s", "step_deadline_s", "load_deadline_s", "spare_worker", "kv_bytes"}
PARENT |= {"machine_bytes_per_s", "machine_flops_per_s"}


V5_2_S_OWN = ["--kv_far=int4", "--prefill=dense", "--far_blocks=8", "--dense_layers=0,1", "--max_position_embeddings=16384"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("wiring") / "model", "llama")


@pytest.mark.parametrize("flags", [(), ("--deterministic", "--threads", "3", "--dtype", "bfloat16", "--quantize", "int4")])
def test_the_engine_s_settings_reach_the_worker(directory: Path, flags: tuple[str, ...]) -> None:
    settings = load_settings(["--model", str(directory), *flags])
    request = load_request(settings, read_manifest(directory), 1 << 20)
    for name in {field.name for field in fields(EngineSettings)} - PARENT:
        assert getattr(request, name) == getattr(settings.engine, name), name
    assert request.deterministic == bool(flags) and request.kv_bytes == 1 << 20
    assert request.machine_limits == (settings.engine.machine_bytes_per_s, settings.engine.machine_flops_per_s)


@pytest.mark.parametrize("flag", V5_2_S_OWN)
def test_flags_of_the_default_model_leave_out_lines_that_cannot_hold_them(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    models = build_models(load_settings([flag, "--registry", "none"]), None, LoadProgress())
    assert [model.name for model in models] == ["v5.2"]
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("{")]
    assert len(said) == 1 and said[0].startswith("deepseek-serve: left out: v4.8, v3.5, v2.3, v1.0: --") and said[0].endswith(".")


def test_flags_that_all_lines_hold_leave_out_none(capsys: pytest.CaptureFixture[str]) -> None:
    models = build_models(load_settings(["--attention_window", "512", "--registry", "none"]), None, LoadProgress())
    assert [model.name for model in models] == ["v5.2", "v4.8", "v3.5", "v2.3", "v1.0"]
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--version", "v4.8", "--kv_far", "int4"], "v4.8: --far_blocks, .* need --attention_window for this model"),
        (["--model", "a=DIR", "--far_blocks", "3"], "a: --far_blocks, .* need --attention_window"),
        (["--dense_layers", "9"], "v5.2: --dense_layers names layer 9"),
        (["--max_position_embeddings", "20000"], "v5.2: --max_position_embeddings 20000 is more than the model's 16384"),
    ],
)
def test_a_model_that_is_named_or_the_default_is_refused_by_its_name(directory: Path, arguments: list[str], words: str) -> None:
    settings = load_settings([*(part.replace("DIR", str(directory)) for part in arguments), "--registry", "none"])
    with pytest.raises(SettingsError, match=words):
        build_models(settings, None, LoadProgress())
