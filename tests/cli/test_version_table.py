"""The table of a comparison: every measure of every version, with its unit."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from service.cli.version_table import version_table


def entry(scale: float, quantize: str = "none") -> dict[str, Any]:
    def spread(value: float) -> dict[str, float]:
        return {"median": value * scale, "min": value * scale - 0.5, "max": value * scale + 0.5, "rounds": 3}

    return {
        "parameters": 4_000_000 * scale,
        "context_tokens": 2048,
        "modalities": ["text", "image"],
        "dtype": "float32",
        "quantize": quantize,
        "quality": {"nats_per_token": 2.5 * scale, "bits_per_byte": 1.25 * scale, "tokens": 9},
        "speed": {
            batch: {"prefill_tokens_per_s": spread(100.0 * int(batch)), "decode_tokens_per_s": spread(10.0 * int(batch))} for batch in "18"
        },
        "memory": {"weights_bytes": 3 << 20, "kv_bytes_per_1k_tokens": 64 << 10, "resident_bytes": 200 << 20},
        "cost": {"seconds_per_million_tokens": spread(1234.0), "relative": spread(1.0)},
    }


def test_every_measure_of_every_version_is_on_it() -> None:
    row = {
        "prompt_tokens": 128,
        "output_tokens": 64,
        "cores": 2,
        "text": {"bytes": 4096, "stretches": 2},
        "baseline": "v2.3",
        "versions": {"v2.3": entry(1), "v4.8": entry(2, "int8")},
    }
    out = io.StringIO()
    Console(file=out, width=120).print(version_table(row))
    lines = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:4]] for line in out.getvalue().splitlines() if "│" in line
    }
    assert "128 + 64 tokens · 4096 bytes of text · 2 cores" in out.getvalue() and "v4.8" in out.getvalue()
    assert lines["quality: bits/byte"] == ["1.2500", "2.5000"]
    assert lines["quality: nats/token"] == ["2.5000", "5.0000"]
    assert lines["1 at once: decode, tokens/s"] == ["10.0", "20.0"]
    assert lines["8 at once: prefill, tokens/s"] == ["800.0", "1600.0"]
    assert lines["served as"] == ["float32", "float32, int8 weights"]
    assert lines["memory: weights, MiB"] == ["3.0", "3.0"] and lines["memory: KV of 1K tokens, KiB"] == ["64", "64"]
    assert lines["memory: worker resident, MiB"] == ["200", "200"]
    assert lines["cost: s per million tokens"] == ["1234", "2468"]
    assert lines["cost: relative (of v2.3)"] == ["1.00 (0.50 to 1.50)", "2.00 (1.50 to 2.50)"]
