"""`deepseek-serve --device cuda` as a process, on a device that is not there: start-up, requests over HTTP, metrics and refusals."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import openai
import pytest
import torch

from tests.cli.conftest import Command, Start
from tests.tiny_models import build_tiny

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a device is there"),
]
ROOT = Path(__file__).parent.parent.parent
PROMPT = "A prompt that is so long that the window of 64 tokens is left behind by many, and that there are blocks to choose from. " * 2
FLAGS = ("--device", "cuda", "--fp16", "--attention_window", "64", "--far_blocks", "1", "--context_tokens", "512", "--port", "0")


def serve(start: Start, place: Path, *flags: str) -> Command:
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text("import tests.fake_cuda.worker\n")
    model = build_tiny(place / "tiny", "llama", max_position_embeddings=512)
    return start("service.cli.serve", "--model", str(model), *FLAGS, *flags, PYTHONPATH=f"{place / 'site'}:{ROOT}")


def test_requests_are_answered_and_counted(start: Start, tmp_path: Path) -> None:
    command = serve(start, tmp_path)
    url = command.read_until("serving tiny on ")
    table = "\n".join(command.lines)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
    whole, again = (client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0) for _ in range(2))
    assert whole.choices[0].text == again.choices[0].text and whole.usage is not None and whole.usage.completion_tokens == 12
    metrics = httpx.get(f"{url}/metrics", timeout=30).text
    found = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if not line.startswith("#")}

    def total(name: str, *labels: str) -> float:
        return sum(value for key, value in found.items() if key.startswith(f"deepseek_{name}{{") and all(label in key for label in labels))

    assert total("decode_graph_steps_total", 'how="replayed"', 'tier="gpu"') > 10
    assert total("far_blocks_read_total", 'device="a device that is not there"') > 0
    assert total("kernel_dispatch_total", 'op="window_sparse_attention"', 'implementation="triton"') > 0
    command.signal(signal.SIGTERM)
    code, _, error = command.end()
    assert code == 0, (table, error)


def test_what_a_gpu_cannot_keep_is_refused(start: Start, tmp_path: Path) -> None:
    code, _, error = serve(start, tmp_path, "--kv_cache_dtype", "int8").end()
    assert code == 2 and "--kv_cache_dtype int8 is for a CPU: set fp8" in error and "Traceback" not in error
