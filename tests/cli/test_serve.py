"""`deepseek-serve` as a process: what it prints, what it answers, how it fails in one sentence and how it ends."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import service
from service.cli.report import LoadProgress
from service.cli.wiring import build_models
from service.config.load import ServeSettings
from service.types.errors import CheckpointError
from service.types.settings import AttentionSettings, EngineSettings, HttpSettings, ModelSource, SchedulerSettings
from tests.cli.conftest import Command, Start
from tests.tiny_models import build_tiny

SERVE = "service.cli.serve"


@pytest.mark.parametrize("flag", ["--help", "-h", "--about"])
def test_text_flags_start_nothing(flag: str) -> None:
    code = (
        f"import sys; sys.argv = ['deepseek-serve', '{flag}']\n"
        "from service.cli import serve\n"
        "try:\n    serve.main()\nexcept SystemExit as end:\n    print('code', end.code, 'service.engine.supervisor' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "code 0 False"
    assert "deepseek-serve" in done.stdout and done.stderr == ""
    assert flag != "--about" or service.__version__ in done.stdout
    assert flag == "--about" or "--kv_bytes" in done.stdout


def failure(command: Command) -> str:
    """The one sentence of a command that failed as it should; every child is gone when the pipes end."""
    code, out, error = command.end()
    said = [line for line in error.splitlines() if not line.startswith("{")]
    assert code == 2, (code, out, error)
    assert "Traceback" not in error
    assert len(said) == 1 and said[0].startswith("deepseek-serve: ") and said[0].endswith((".", "?")), error
    return said[0]


def test_wrong_flag(start: Start) -> None:
    assert "did you mean --port?" in failure(start(SERVE, "--prot", "1"))


def test_wrong_environment(start: Start) -> None:
    assert "DEEPSEEK_BATCH_SIZE must be a whole number" in failure(start(SERVE, DEEPSEEK_BATCH_SIZE="many"))


def test_public_address_without_a_key(start: Start, tiny: Path) -> None:
    assert "--api_key" in failure(start(SERVE, "--model", str(tiny), "--host", "0.0.0.0"))


def test_port_in_use(start: Start, tiny: Path, taken_port: int) -> None:
    command = start(SERVE, "--model", str(tiny), "--port", str(taken_port))
    sentence = failure(command)
    assert str(taken_port) in sentence and "--port" in sentence


def test_missing_directory(start: Start, tmp_path: Path) -> None:
    assert "nowhere" in failure(start(SERVE, "--model", str(tmp_path / "nowhere"), "--port", "0"))


def refusal(directory: Path) -> str:
    """The sentence with which a model directory is refused, before any worker hears of it."""
    settings = ServeSettings(
        (ModelSource("m", str(directory)),), HttpSettings(), SchedulerSettings(), EngineSettings(), AttentionSettings()
    )
    with pytest.raises(CheckpointError) as caught:
        build_models(settings, None, LoadProgress())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_directory_without_a_model(tmp_path: Path) -> None:
    assert "no model" in refusal(tmp_path)


def test_unknown_family_lists_what_is_served(tiny: Path, tmp_path: Path) -> None:
    strange = shutil.copytree(tiny, tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    config.update(model_type="mamba", architectures=["MambaForCausalLM"])
    (strange / "config.json").write_text(json.dumps(config))
    sentence = refusal(strange)
    assert all(family in sentence for family in ("llama", "mistral", "qwen2", "qwen3"))


def test_cut_off_weights(tiny: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refusal(broken)


def test_broken_tokenizer(tiny: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in refusal(broken)


def test_more_threads_than_cores_are_served_with_a_word(start: Start, tmp_path: Path) -> None:
    """Here there is nothing to serve: what comes after the word is another matter."""
    code, _, error = start(SERVE, "--model", str(tmp_path / "nowhere"), "--port", "0", "--threads", "4096").end()
    said = [line for line in error.splitlines() if not line.startswith("{")]
    assert code == 2 and len(said) == 2 and "nowhere" in said[1]
    assert said[0].startswith("deepseek-serve: --threads 4096 is more than the ") and said[0].endswith("0 takes what there is")


def test_too_little_memory(start: Start, tiny: Path) -> None:
    assert "MiB" in failure(start(SERVE, "--model", str(tiny), "--port", "0", "--kv_bytes", "900TiB"))


def test_nothing_there_to_serve_on_that_device(start: Start, tiny: Path) -> None:
    assert "cuda" in failure(start(SERVE, "--model", str(tiny), "--port", "0", "--device", "cuda:99")).lower()


def test_it_says_how_it_started(served: tuple[str, Command]) -> None:
    _, command = served
    text = "\n".join(command.lines)
    for phase in ("spawn", "parse", "import", "models", "load", "worker (", "ready"):
        assert f"{phase}" in text
    for line in ("weights", "kv:full", "workspace", "runtime", "total", "memory of the front end"):
        assert line in text


def test_the_pasted_request_works(served: tuple[str, Command]) -> None:
    _, command = served
    words = shlex.split(command.lines[-1].removeprefix("try: "))
    assert words[0] == "curl" and words[2] == "-H" and words[4] == "-d"
    name, _, value = words[3].partition(": ")
    answer = httpx.post(words[1], headers={name: value}, content=words[5], timeout=60)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1
    assert answer.headers["x-model-version"].startswith("tiny@")


def test_real_answers_are_repeatable(served: tuple[str, Command]) -> None:
    client = openai.OpenAI(base_url=served[0] + "/v1", api_key="none", max_retries=0)
    asked = {"model": "tiny", "prompt": "the cat", "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**asked)
    streamed = "".join(event.choices[0].text for event in client.completions.create(**asked, stream=True) if event.choices)
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    assert whole.choices[0].text == streamed != ""


def test_chat(served: tuple[str, Command]) -> None:
    client = openai.OpenAI(base_url=served[0] + "/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_probes_and_start_up_metrics(served: tuple[str, Command]) -> None:
    url, _ = served
    assert [httpx.get(url + path).status_code for path in ("/live", "/ready", "/health")] == [200, 200, 200]
    text = httpx.get(url + "/metrics").text
    for phase in ("command_spawn", "command_parse", "command_import", "command_models", "command_load", "command_ready"):
        assert f'phase="{phase}"' in text
    tier = httpx.get(url + "/health").json()["tier"]
    assert tier["how"] == "detected" and f'tier_info{{device="cpu",flags="{tier["flags"]}",how="detected",tier="cpu",' in text


def test_a_named_tier_is_served_with_its_profile(tiny: Path, start: Start) -> None:
    command = start("service.cli.serve", "--model", str(tiny), "--port", "0", "--tier", "edge", "--quantize_cache", "none")
    assert command.read_until("tier ") == "edge, given: --quantize int8 --batch_size 4"
    url = command.read_until("serving tiny on ")
    assert any("(float32 " in line and ", 4 sequences)" in line for line in command.lines)
    assert httpx.get(url + "/v1/models").json()["data"][0]["tier"] == "edge"
    command.signal(signal.SIGTERM)
    assert command.end()[0] == 0


def test_the_benchmark_against_the_real_server(served: tuple[str, Command], start: Start, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = start(
        "service.cli.benchmark", "--url", served[0], "--requests", "6", "--concurrency", "3", "--warmup", "1", "--prompt_tokens", "12",
        "--output_tokens", "5", "--ignore_eos", "--endpoint", "chat", "--out", str(out),
    )  # fmt: skip
    code, text, error = command.end()
    row = json.loads(text.splitlines()[-1])
    assert code == 0, error
    assert (row["completed"], row["output_tokens"], row["token_counts"], row["model"]) == (6, 30, "usage", "tiny")
    assert json.loads(out.read_text()) == row


def test_two_versions_side_by_side_and_a_drain(start: Start, tiny: Path, tmp_path: Path) -> None:
    other = build_tiny(tmp_path / "other", "llama", seed=1)
    command = start(SERVE, "--model", f"first={tiny}", "--model", str(other), "--port", "0", "--api_key", "k")
    url = command.read_until("serving first, other on ")
    key = {"authorization": "Bearer k"}
    names = [entry["id"] for entry in httpx.get(url + "/v1/models", headers=key).json()["data"]]
    assert names[0] == "first" and "other" in names
    assert httpx.get(url + "/v1/models").status_code == 401
    versions = []
    for model in ("first", "other"):
        answer = httpx.post(url + "/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 2}, headers=key, timeout=60)
        versions.append(answer.headers["x-model-version"].partition("@")[0])
    assert versions == ["first", "other"]
    assert "$DEEPSEEK_API_KEY" in command.read_until("try: ")
    lets_streams_end(command, url, key)


def test_a_version_is_loaded_when_it_is_asked_for(start: Start, tiny: Path, tmp_path: Path) -> None:
    other = build_tiny(tmp_path / "other", "llama", seed=1)
    flags = ("--load", "demand", "--batch_size", "2", "--port", "0")
    command = start(SERVE, "--model", f"first={tiny}", "--model", str(other), *flags)
    assert command.read_until("loaded when asked for: ") == "other"
    url = command.read_until("serving first, other on ")
    ready = {entry["id"]: entry["ready"] for entry in httpx.get(url + "/v1/models").json()["data"]}
    assert ready["first"] and ready["auto"] and not ready["other"]
    assert httpx.get(url + "/health").status_code == 200
    for model in ("other", "first"):
        answer = httpx.post(url + "/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 2}, timeout=60)
        assert answer.status_code == 200 and answer.headers["x-model-version"].startswith(model + "@")
    answer = httpx.post(url + "/v1/completions", json={"model": "auto", "prompt": "a", "max_tokens": 2}, timeout=60)
    assert answer.headers["x-model-choice"] == "default"
    command.signal(signal.SIGTERM)
    assert command.end()[0] == 0


@pytest.mark.parametrize(
    ("number", "inherited"),
    [(signal.SIGINT, signal.default_int_handler), (signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.default_int_handler)],
    ids=["ctrl_c", "ctrl_c_ignored_by_the_parent", "sigterm"],
)
def test_a_signal_while_loading(start: Start, tiny: Path, number: signal.Signals, inherited: Any) -> None:
    ours = signal.signal(signal.SIGINT, inherited)
    try:
        command = start(SERVE, "--model", str(tiny), "--port", "0")
    finally:
        signal.signal(signal.SIGINT, ours)
    url = command.read_until("loading tiny for ")
    command.signal(number)
    code, out, error = command.end()
    assert code == 130 and "Traceback" not in error and "serving" not in out, (code, out, error)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/live")


def lets_streams_end(command: Command, url: str, key: dict[str, str]) -> None:
    """SIGTERM in the middle of a stream: it goes on to its end, then the command ends cleanly."""
    body = {"prompt": "the", "max_tokens": 200, "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", url + "/v1/completions", json=body, headers=key, timeout=60) as stream:
        lines = stream.iter_lines()
        assert next(line for line in lines if line).startswith("data: ")
        command.signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 200
    code, _, error = command.end()
    assert code == 0 and "Traceback" not in error, error
