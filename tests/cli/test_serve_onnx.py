"""`deepseek-serve --onnx_runtime` as a process: the bundled model's greedy text equals torch's, and the worker has no torch."""

from __future__ import annotations

import base64
import io
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from service.cli.report import LoadProgress
from service.cli.wiring import _fitting, build_models
from service.config.load import load_settings
from service.engine.supervisor import Blank
from service.types.catalog import V5_2
from service.types.errors import CheckpointError
from tests.cli.conftest import Command, Start
from tests.cli.test_serve import SERVE, failure
from tests.tiny_models import build_tiny_line

PROMPTS = ["def fibonacci(n):", "import os\n\n", 'class Reader:\n    """', "for line in", "    return self."]


def start_bundled(cache: Path, *flags: str) -> tuple[str, Command]:
    command = Command(SERVE, ["--version", "v2.3", "--port", "0", "--quantize_cache", str(cache), *flags], {})
    url = command.read_until("serving v2.3 on ")
    command.read_until("try: ")
    return url, command


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[tuple[str, Command], tuple[str, Command]]]:
    """The bundled model through ONNX Runtime and through torch, both in float32."""
    cache = tmp_path_factory.mktemp("cache")
    started = [start_bundled(cache, "--onnx_runtime", "--threads", "1")]
    try:
        started.append(start_bundled(cache, "--backend", "torch", "--dtype", "float32", "--threads", "1"))
        yield started[0], started[1]
        for _, command in started:
            command.signal(signal.SIGINT)
            code, _, error = command.end()
            assert code == 0 and "Traceback" not in error, error
    finally:
        for _, command in started:
            if command.process.poll() is None:
                command.process.kill()
                command.process.communicate()


def complete(url: str, **body: object) -> list[dict]:
    answer = httpx.post(url + "/v1/completions", json={"max_tokens": 24, "temperature": 0, "logprobs": 2, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def test_greedy_texts_equal_torchs_where_the_margin_allows(pair) -> None:
    """All prompts at once, then each alone. Tokens may differ only from one on whose two best are nearer than rounding."""
    (graph, _), (torch, _) = pair
    batch, expected = complete(graph, prompt=PROMPTS), complete(torch, prompt=PROMPTS)
    compared = 0
    for index, prompt in enumerate(PROMPTS):
        (alone,) = complete(graph, prompt=prompt)
        assert alone["text"] == batch[index]["text"]
        mine, theirs = (choice["logprobs"] for choice in (batch[index], expected[index]))
        for token, value, wanted, reference, best in zip(
            mine["tokens"], mine["token_logprobs"], theirs["tokens"], theirs["token_logprobs"], theirs["top_logprobs"], strict=False
        ):
            ranked = sorted(best.values(), reverse=True)
            if token != wanted:
                assert ranked[0] - ranked[1] < 1e-3
                break
            assert abs(value - reference) < 1e-3
            compared += 1
    assert compared > 60


def test_sampled_texts_are_repeatable_and_equal_torchs(pair) -> None:
    (graph, _), (torch, _) = pair
    asked = {"prompt": "def ", "temperature": 0.8, "seed": 7, "max_tokens": 12}
    texts = {complete(url, **asked)[0]["text"] for url in (graph, graph, torch)}
    assert len(texts) == 1


def test_the_choice_is_shown_and_the_worker_has_no_torch(pair) -> None:
    for (url, command), backend in zip(pair, ("onnx", "torch"), strict=True):
        entry = httpx.get(url + "/v1/models/v2.3").json()
        metrics = httpx.get(url + "/metrics").text
        assert entry["backend"] == backend and f'backend="{backend}"' in metrics
        assert (entry["quantize"], entry["kv_cache_dtype"]) == ("none", "float32")
        assert 'kv_cache_dtype="float32"' in metrics and 'quantize="none"' in metrics
        assert ('op="decoder"' in metrics) == (backend == "onnx")
        assert any(f"through {backend} on cpu" in line for line in command.lines)
        children = subprocess.run(["pgrep", "-P", str(command.process.pid)], capture_output=True, text=True, check=True).stdout.split()
        loaded = [Path(f"/proc/{child}/maps").read_text() for child in children]
        assert any("/torch/lib/" in text for text in loaded) == (backend == "torch")
        assert any("onnxruntime" in text for text in loaded) == (backend == "onnx")


def test_what_cannot_go_that_way_is_refused_before_a_worker_loads(start: Start, tmp_path: Path) -> None:
    far = build_tiny_line(tmp_path / "far", V5_2)
    sentence = failure(start(SERVE, "--model", str(far), "--port", "0", "--onnx_runtime"))
    assert "far blocks" in sentence and "--backend torch" in sentence


def built(*flags: str) -> list[str]:
    """The models that these flags serve, the default first."""
    return [model.name for model in build_models(load_settings(["--registry", "none", *flags]), None, LoadProgress())]


def test_where_nothing_is_named_the_lines_that_the_graph_computes_are_served(capsys: pytest.CaptureFixture[str]) -> None:
    assert built("--onnx_runtime", "--threads", "2") == ["v4.8", "v3.5", "v2.3", "v1.0"]
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("{")]
    assert len(said) == 1 and "left out: v5.2 (far blocks)" in said[0] and "--backend torch" in said[0]
    for flags in (("--backend", "torch"), ("--onnx_runtime", "--version", "v2.3")):
        assert built(*flags)[0] == ("v5.2" if len(flags) == 2 else "v2.3")
        assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [("--version", "v5.2"), ("--attention_window", "256"), ("--version", "v2.3", "--attention_window", "256")]
)
def test_a_refusal_names_flags_that_help(flags: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError, match="far blocks") as caught:
        built("--onnx_runtime", *flags)
    sentence = str(caught.value)
    for words in ("--backend torch in place of --onnx_runtime", "--kv_far evict", "--version v3.5, and no --attention_window"):
        assert words in sentence
    assert built("--backend", "torch", *flags) and built("--onnx_runtime", "--version", "v3.5") == ["v3.5"]
    assert built("--onnx_runtime", "--kv_far", "evict", *flags)


def picture(seed: int, width: int, height: int) -> dict[str, object]:
    """A part of a message: blots on white, as PNG."""
    draw = np.random.default_rng(seed)
    values = np.kron(draw.integers(0, 2, (height // 4, width // 4, 1), np.uint8) * 255, np.ones((4, 4, 3), np.uint8))
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()}}


def test_the_bundled_v3_5_answers_about_images_as_through_torch(tmp_path: Path) -> None:
    """One image, two in one message, the first again, and text alone; the worker has no torch."""
    one, two = picture(1, 28, 28), picture(2, 56, 40)
    questions = [[one], [one, two], [two], [one], []]
    answers: list[list[dict]] = []
    for flags in (("--onnx_runtime",), ("--backend", "torch", "--dtype", "float32")):
        command = Command(SERVE, ["--version", "v3.5", "--port", "0", "--threads", "1", "--quantize_cache", str(tmp_path), *flags], {})
        try:
            url = command.read_until("serving v3.5 on ")
            command.read_until("try: ")
            found = []
            for parts in questions:
                message = {"role": "user", "content": [*parts, {"type": "text", "text": "Which digit is this?"}]}
                body = {"messages": [message], "max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 2}
                answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=60)
                assert answer.status_code == 200, answer.text
                found.append(answer.json())
            answers.append(found)
            if "--onnx_runtime" in flags:
                metrics = httpx.get(url + "/metrics").text
                children = subprocess.run(["pgrep", "-P", str(command.process.pid)], capture_output=True, text=True, check=True).stdout
                assert not any("/torch/lib/" in Path(f"/proc/{child}/maps").read_text() for child in children.split())
            command.signal(signal.SIGINT)
            assert command.end()[0] == 0
        finally:
            if command.process.poll() is None:
                command.process.kill()
                command.process.communicate()
    assert re.search(r'deepseek_images_total{[^}]*result="encoded"[^}]*} 2', metrics)
    compared = 0
    for mine, theirs in zip(*answers, strict=True):
        assert mine["usage"]["prompt_tokens"] == theirs["usage"]["prompt_tokens"]
        for found, wanted in zip(mine["choices"][0]["logprobs"]["content"], theirs["choices"][0]["logprobs"]["content"], strict=False):
            ranked = sorted((entry["logprob"] for entry in wanted["top_logprobs"]), reverse=True)
            if found["token"] != wanted["token"]:
                assert ranked[0] - ranked[1] < 1e-3
                break
            assert abs(found["logprob"] - wanted["logprob"]) < 1e-3
            compared += 1
    assert compared >= 2 * len(questions)


def test_a_contradiction_is_refused(start: Start) -> None:
    assert "--onnx_runtime contradicts" in failure(start(SERVE, "--onnx_runtime", "--backend", "torch"))


def test_a_worker_that_was_started_ahead_serves_only_its_own_backend() -> None:
    class Child:
        killed = ""

        def kill(self, reason: str) -> None:
            self.killed = reason

    child = Child()
    assert _fitting(Blank("onnx", child), "onnx") is child and child.killed == ""
    assert _fitting(Blank("torch", child), "onnx") is None and child.killed == "other_backend"
    assert _fitting(None, "onnx") is None


def test_the_default_takes_the_graph_and_an_unfit_worker_ahead_is_no_harm(start: Start, tmp_path: Path) -> None:
    """Nothing names a backend, so torch is loaded ahead; with few sequences the table gives the bundled model to the graph."""
    flags = ("--version", "v2.3", "--device", "cpu", "--port", "0", "--batch_size", "2", "--quantize_cache", str(tmp_path))
    command = start(SERVE, *flags, DEEPSEEK_BACKEND="auto")
    url = command.read_until("serving v2.3 on ")
    assert httpx.get(url + "/v1/models/v2.3").json()["backend"] == "onnx"
    answer = httpx.post(url + "/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=60)
    assert answer.status_code == 200
    command.signal(signal.SIGINT)
    assert command.end()[0] == 0
