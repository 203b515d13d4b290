"""Settings: precedence, spellings, conversion to the rooms' settings, and what every kind of mistake is answered with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.checkpoints.bundled import REQUIRED_FILES, complete_lines
from service.checkpoints.manifest import read_manifest
from service.checkpoints.registry import Registry
from service.config.bundled import bundled_source, choose_sources, listed_sources, named_source, registry_path, restored_sources
from service.config.definition import SECTIONS, Definition
from service.config.describe import settings_tables
from service.config.flags import FlagParser, canonical, likely_backend, parse_bytes, wants_text
from service.config.load import ServeSettings, load_settings
from service.config.machine import Machine
from service.types.errors import SettingsError
from service.types.settings import EngineSettings, HttpLimits, HttpSettings, ModelSource, SchedulerSettings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("DEEPSEEK_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("service.config.load.this_machine", lambda: Machine(gpu=False, board="", cores=2, quota=0))


def load(*arguments: str) -> ServeSettings:
    return load_settings(["--model", "m=/models/m", *arguments])


def refusal(*arguments: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(*arguments)
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?"))
    return message


def test_defaults_are_those_of_the_rooms() -> None:
    settings = load()
    assert settings.http == HttpSettings()
    assert settings.scheduler == SchedulerSettings()
    assert settings.engine == EngineSettings()
    assert settings.models == (ModelSource("m", "/models/m"),)


@pytest.mark.parametrize("room", [HttpLimits, SchedulerSettings, EngineSettings])
def test_every_field_of_a_room_is_a_setting(room: type) -> None:
    assert {field.name for field in fields(room)} <= set(Definition.model_fields)


def test_every_field_of_http_is_a_setting() -> None:
    names = {field.name for field in fields(HttpSettings)} - {"limits", "api_keys"}
    assert names <= set(Definition.model_fields) and "api_key" in Definition.model_fields


OTHER_NAMES = {
    "device": "cpu",
    "dtype": "bfloat16",
    "kv_cache_dtype": "bfloat16",
    "cuda_graphs": "off",
    "tier": "edge",
    "quantize": "int4",
    "quantize_cache": "none",
    "backend_table": "none",
    "run_ahead": "never",
    "backend": "onnx",
}


def _other_value(name: str) -> tuple[str, object]:
    field = Definition.model_fields[name]
    if name in OTHER_NAMES:
        return OTHER_NAMES[name], OTHER_NAMES[name]
    if field.annotation is bool:
        return ("false", False) if field.default else ("true", True)
    if field.annotation is float:
        return "7.5", 7.5
    return str(field.default + 1), field.default + 1


@pytest.mark.parametrize("room", [HttpLimits, SchedulerSettings, EngineSettings])
def test_every_flag_reaches_its_room(room: type) -> None:
    for field in fields(room):
        text, value = _other_value(field.name)
        settings = load(f"--{field.name}", text)
        holder = {HttpLimits: settings.http.limits, SchedulerSettings: settings.scheduler, EngineSettings: settings.engine}[room]
        assert getattr(holder, field.name) == value, field.name


def test_http_flags_reach_http() -> None:
    flags = ["--host", "0.0.0.0", "--port", "0", "--api_key", "one", "--api_key", "two", "--metrics_key", "--drain_s", "0"]
    http = load(*flags, "--allowed_origins", "https://a.example", "--allowed_origins", "https://b.example", "--no-access-log").http
    assert (http.host, http.port, http.api_keys) == ("0.0.0.0", 0, ("one", "two"))
    assert (http.metrics_key, http.drain_s, http.access_log) == (True, 0.0, False)
    assert http.allowed_origins == ("https://a.example", "https://b.example")
    assert load("--host", "0.0.0.0", "--insecure").http.insecure


def test_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("port: 1001\nbatch-size: 3\nthreads: 5\n")
    monkeypatch.setenv("DEEPSEEK_PORT", "1002")
    monkeypatch.setenv("DEEPSEEK_BATCH_SIZE", "4")
    settings = load("--config", str(path), "--port", "1003")
    assert (settings.http.port, settings.scheduler.batch_size, settings.engine.threads) == (1003, 4, 5)


def test_short_dtype_follows_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEEPSEEK_FP16", "true")
    assert load().engine.dtype == "float16"
    assert load("--dtype", "float32").engine.dtype == "float32"
    assert load("--bf16").engine.dtype == "bfloat16"
    path = tmp_path / "service.yaml"
    path.write_text("dtype: float32\n")
    assert load("--config", str(path)).engine.dtype == "float16"
    assert load("--fp16", "--dtype", "float16").engine.dtype == "float16"


def test_environment_lists_and_config_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("model: [a=/x, b=/y]\nkv_bytes: 2GB\nversion:\n")
    monkeypatch.setenv("DEEPSEEK_CONFIG", str(path))
    monkeypatch.setenv("DEEPSEEK_API_KEY", "k1,k2")
    settings = load_settings([])
    assert [source.name for source in settings.models] == ["a", "b"]
    assert settings.http.api_keys == ("k1", "k2")
    assert settings.engine.kv_bytes == 2_000_000_000


@pytest.mark.parametrize("flag", ["--batch_size", "--batch-size"])
def test_dash_and_underscore_are_the_same(flag: str) -> None:
    assert load(flag, "7").scheduler.batch_size == 7
    assert load(f"{flag}=8").scheduler.batch_size == 8


@pytest.mark.parametrize(
    "arguments", [["--dense_layers", "0,3"], ["--dense_layers", "0", "--dense-layers", "3"], ["--dense_layers", "0, 3,"]]
)
def test_layers_are_read_by_comma_and_by_repetition(arguments: list[str]) -> None:
    assert load(*arguments).attention.dense_layers == (0, 3)


@pytest.mark.parametrize(("text", "layers"), [("0,3", (0, 3)), ("[0, 3]", (0, 3)), ("3", (3,))])
def test_layers_of_a_file_and_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, layers: tuple[int, ...]
) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(f"dense_layers: {text}\n")
    assert load("--config", str(path)).attention.dense_layers == layers
    monkeypatch.setenv("DEEPSEEK_DENSE_LAYERS", text.strip("[]"))
    assert load().attention.dense_layers == layers


def test_no_layers_are_not_those_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("dense_layers: none\n")
    assert load("--dense_layers", "none").attention.dense_layers == load("--config", str(path)).attention.dense_layers == ()
    assert load().attention.dense_layers is None


@pytest.mark.parametrize("value", ["0,x", "-1", "1.5", "none,0"])
def test_wrong_layers(value: str) -> None:
    with pytest.raises(SettingsError, match=r"--dense_layers must be whole numbers by comma, such as 0,1, or none, not"):
        load(f"--dense_layers={value}")


def test_values_keep_their_dashes() -> None:
    assert canonical("--api-key=a-b") == "--api_key=a-b"
    assert canonical("a-b") == "a-b"
    assert load("--api-key=a-b").http.api_keys == ("a-b",)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--attention_window", "1000000000"], "--attention_window must be a whole number from 0 up to 16777216, not '1000000000'."),
        (["--drain_s", "1e8"], "--drain_s must be a number of seconds from 0 up to 10000000, not '1e8'."),
        (["--port", "abc"], "--port must be a whole number from 0 up to 65535, not 'abc'."),
        (["--port", "65536"], "not '65536'"),
        (["--prot", "1"], "did you mean --port?"),
        (["--bat", "1"], "--bat is not a flag"),
        (["stray"], "stray does not belong to any flag"),
        (["--port"], "--port: expected one argument"),
        (["--fp16", "--bf16"], "contradicts"),
        (["--fp16", "--dtype", "float32"], "--fp16 contradicts"),
        (["--dtype", "int4"], "one of auto, float32, bfloat16, float16"),
        (["--kv_bytes", "lots"], "512MiB"),
        (["--kv_bytes", "-1"], "--kv_bytes"),
        (["--drain_s", "nan"], "--drain_s must be a number of seconds"),
        (["--drain_s", "inf"], "--drain_s"),
        (["--heartbeat_s", "0"], "above 0"),
        (["--device", "tpu"], "cuda:N"),
        (["--insecure=maybe"], "true or false"),
        (["--run_ahead", "1"], "--run_ahead must be one of auto, always, never, not '1' (1 is now always)."),
        (["--run_ahead", "0"], "not '0' (0 is now never)."),
        (["--run_ahead", "2"], "not '2'."),
        (["--host", "0.0.0.0"], "--api_key"),
        (["--host", "::"], "--insecure"),
        (["--host", "example.org"], "--insecure"),
        (["--step_tokens", "8"], "batch_size (32)"),
        (["--version", "v2.3"], "only one of them"),
        (["--model", "m=/other"], "'m' twice"),
        (["--model", "/"], "NAME=DIR"),
        (["--model", "x="], "no directory"),
        (["--config", "/does/not/exist"], "does not exist"),
    ],
)
def test_mistakes_get_one_sentence(arguments: list[str], expected: str) -> None:
    assert expected in refusal(*arguments)


@pytest.mark.parametrize("key", ["", "with space", "käse", "a\tb"])
def test_bad_keys_are_refused_and_never_shown(key: str) -> None:
    message = refusal("--api_key", key)
    assert "--api_key" in message and (not key or key not in message)


def test_wrong_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_PORT", "tcp://10.0.0.1")
    assert refusal().startswith("DEEPSEEK_PORT must be a whole number")
    monkeypatch.delenv("DEEPSEEK_PORT")
    monkeypatch.setenv("DEEPSEEK_PROT", "1")
    assert "did you mean DEEPSEEK_PORT?" in refusal()


def test_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_PORT", "")
    assert load().http.port == HttpSettings().port


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("portt: 1\n", "'portt', which is not a setting (did you mean port?)"),
        ("port: true\n", "port in "),
        ("port: [1]\n", "port in "),
        ("run_ahead: 1\n", "not 1 (1 is now always)."),
        ("port: 1\nport: 2\n", "twice"),
        ("batch_size: 1\nbatch-size: 2\n", "twice"),
        ("- a\n", "name: value"),
        ("a: [\n", "not valid YAML (line"),
        ("!!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("host: {a: 1}\n", "host in "),
    ],
)
def test_wrong_file_is_named(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(content)
    assert expected in refusal("--config", str(path))


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal("--config", str(tmp_path / "binary.yaml"))
    assert "cannot be read" in refusal("--config", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1k", 1000),
        ("1KiB", 1024),
        ("512MiB", 512 << 20),
        ("2GB", 2 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("1T", 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 i", "1ib", "1XB", "1e9", "1..5M", "nan"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_argument_list_gives_settings_or_one_sentence(arguments: list[str]) -> None:
    if wants_text([canonical(argument) for argument in arguments]):
        return
    try:
        load(*arguments)
    except SettingsError as error:
        assert len(str(error)) < 400


def test_directory_names_and_equal_signs() -> None:
    assert choose_sources(["/models/qwen3"], "") == (ModelSource("qwen3", "/models/qwen3"),)
    assert choose_sources(["/models/a b=c/q"], "") == (ModelSource("q", "/models/a b=c/q"),)
    assert choose_sources(["org:m.1=/d=e"], "") == (ModelSource("org:m.1", "/d=e"),)


def _bundle(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir()
        for file in REQUIRED_FILES:
            (root / name / file).write_text("x")


def test_bundled_line_is_the_newest_complete(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--model DIR"):
        bundled_source("", tmp_path)
    _bundle(tmp_path, "nano-v1.0", "nano-v2.3")
    assert bundled_source("", tmp_path) == ModelSource("v2.3", str(tmp_path / "nano-v2.3"))
    assert bundled_source("1.0", tmp_path).name == "v1.0"
    (tmp_path / "nano-v2.3" / REQUIRED_FILES[0]).unlink()
    assert bundled_source("", tmp_path).name == "v1.0"
    assert [line.label for line in complete_lines(tmp_path)] == ["v1.0"]
    with pytest.raises(SettingsError, match=r"not bundled \(bundled: v1.0\)"):
        bundled_source("v2.3", tmp_path)


def test_only_one_way_to_say_what_is_served(tmp_path: Path) -> None:
    for models, version, restore in ((["/m"], "2.3", False), (["/m"], "", True), ([], "2.3", True)):
        with pytest.raises(SettingsError, match="only one of them"):
            choose_sources(models, version, restore, tmp_path / "registry")


def test_restoring_needs_a_registry_that_knows_something(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--registry"):
        restored_sources(None)
    with pytest.raises(SettingsError, match="finds nothing"):
        choose_sources([], "", True, tmp_path / "registry")


def test_a_patch_and_a_digest_are_found_in_the_registry(tmp_path: Path) -> None:
    bundled = Path(bundled_source("2.3").directory)
    copy = Path(shutil.copytree(bundled, tmp_path / "patched"))
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("version: '2.3'", "version: 2.3.4"))
    listed = json.loads((copy / "manifest.json").read_text())
    size, digest = (copy / "config.yaml").stat().st_size, hashlib.sha256((copy / "config.yaml").read_bytes()).hexdigest()
    listed["files"]["config.yaml"] = {"bytes": size, "sha256": digest}
    (copy / "manifest.json").write_text(json.dumps(listed))
    registry = tmp_path / "registry"
    manifest = read_manifest(copy)
    Registry(registry).register(manifest)
    assert manifest.version == "2.3.4"
    for name in ("v2.3.4", "2.3.4", manifest.digest[:12]):
        assert named_source(name, registry) == ModelSource("v2.3.4", str(copy))
    assert named_source("v2.3", registry) == ModelSource("v2.3", str(bundled))
    with pytest.raises(SettingsError, match="not registered"):
        named_source("v2.3.5x", registry)


def test_where_the_registry_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert registry_path("none") is None and registry_path("/a/b") == Path("/a/b")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert registry_path("") == tmp_path / "deepseek-service" / "registry.sqlite"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert registry_path("") == tmp_path / ".local" / "share" / "deepseek-service" / "registry.sqlite"


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: object = None) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(Path, "expanduser", homeless)
    for text in ("", "~/here.sqlite"):
        with pytest.raises(SettingsError, match="--registry FILE, or none"):
            registry_path(text)
    assert registry_path("none") is None


@pytest.mark.parametrize("flag", ["--help", "-h", "--about"])
def test_text_flags_print_and_exit_cleanly(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert wants_text(["--port", "1", flag])
    with pytest.raises(SystemExit) as caught:
        load_settings([flag])
    assert caught.value.code == 0
    assert "deepseek-serve" in capsys.readouterr().out


def test_tables_name_every_setting() -> None:
    text = settings_tables()
    assert all(f"| `--{name}` |" in text for name in Definition.model_fields)
    assert all(f"### {section.__doc__}" in text for section in SECTIONS)
    assert "| `--template_bytes` | SIZE | 128MiB | `DEEPSEEK_TEMPLATE_BYTES` |" in text


def test_onnx_runtime_is_short_for_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().engine.backend == "auto"
    assert load("--onnx-runtime", "--threads", "16").engine.backend == "onnx"
    monkeypatch.setenv("DEEPSEEK_ONNX_RUNTIME", "true")
    assert load().engine.backend == "onnx"
    assert load("--backend", "torch").engine.backend == "torch"


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], {}, "torch"),
        (["--port", "0"], {}, "torch"),
        (["--backend", "auto"], {}, "torch"),
        ([], {"DEEPSEEK_BACKEND": "auto"}, "torch"),
        (["--onnx_runtime"], {}, "onnx"),
        (["--onnx-runtime=true", "--port", "0"], {}, "onnx"),
        (["--backend", "onnx"], {}, "onnx"),
        (["--backend=onnx"], {}, "onnx"),
        (["--backend=torch"], {"DEEPSEEK_BACKEND": "onnx"}, "torch"),
        ([], {"DEEPSEEK_BACKEND": "onnx"}, "onnx"),
        ([], {"DEEPSEEK_ONNX_RUNTIME": "1"}, "onnx"),
        (["--backend", "torch"], {"DEEPSEEK_ONNX_RUNTIME": "1"}, "torch"),
        (["--onnx_runtime"], {"DEEPSEEK_BACKEND": "torch"}, "onnx"),
    ],
)
def test_the_worker_that_is_started_ahead_is_the_likely_one(arguments: list[str], environment: dict[str, str], expected: str) -> None:
    assert likely_backend(arguments, environment) == expected


def test_a_parser_knows_its_flags() -> None:
    parser = FlagParser("deepseek-x", "x", "1.2.3")
    parser.add_argument("--rate")
    assert {"--rate", "--help", "--about"} <= set(parser.known_flags())
    assert parser.read(["--rate", "3"]) == {"rate": "3"}


def test_a_list_of_versions_names_bundled_lines_registered_patches_and_directories(tmp_path: Path) -> None:
    bundled = bundled_source("2.3")
    (tmp_path / "mine").mkdir()
    found = listed_sources(["v2.3", str(tmp_path / "mine"), f"other={bundled.directory}"], tmp_path / "registry", "--versions")
    assert found == (bundled, ModelSource("mine", str(tmp_path / "mine")), ModelSource("other", bundled.directory))
    for entries, words in (
        (["v2.3", "v2.3"], "--versions names 'v2.3' twice: .* --versions NAME=DIR"),
        (["v2.3", ""], "--versions has no directory"),
        (["v7"], "--versions 'v7' is not bundled .*: choose one of these or give a directory as DIR or NAME=DIR"),
    ):
        with pytest.raises(SettingsError, match=words):
            listed_sources(entries, tmp_path / "registry", "--versions")
