"""What quantised weights and narrower KV caches cost: perplexity and agreement of the likeliest tokens, through the engine that serves.

It knows no kernels. Invariant: every form scores the same tokens in the same stretches, and is compared with float32 of this run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from service.cli.local_engine import LocalEngine
from service.types.errors import SettingsError
from service.types.request import TokenLogprob
from service.types.settings import EngineSettings, SchedulerSettings

# Tokens of a stretch; each sees only itself.
STRETCH_TOKENS = 512


class Form(NamedTuple):
    """Weights and cache of a form, and by how much its perplexity may grow, of which the row says whether it held."""

    quantize: str
    kv_cache_dtype: str
    bound: float


PLAIN = Form("none", "auto", 0.0)
FORMS = {
    "int8": Form("int8", "auto", 0.01),
    "int4": Form("int4", "auto", 0.03),
    "kv_bfloat16": Form("none", "bfloat16", 0.01),
    "kv_float16": Form("none", "float16", 0.01),
    "kv_int8": Form("none", "int8", 0.01),
}


async def measure_quality(directory: Path, kinds: Sequence[str], text: str, most_tokens: int, threads: int) -> dict[str, Any]:
    """The row: perplexity in float32, and for each kind its ratio and agreement. Raises SettingsError for too short a text."""
    plain, tokens = await _scores(directory, PLAIN, text, most_tokens, threads)
    forms: dict[str, Any] = {}
    for kind in kinds:
        scores, _ = await _scores(directory, FORMS[kind], text, most_tokens, threads)
        ratio = _perplexity(scores) / _perplexity(plain)
        forms[kind] = {
            "perplexity": round(_perplexity(scores), 4),
            "ratio": round(ratio, 5),
            "agreement": round(mean(mine.top[0][0] == other.top[0][0] for mine, other in zip(scores, plain, strict=True)), 4),
            "within_bound": ratio <= 1 + FORMS[kind].bound,
        }
    return {"kind": "quality", "tokens": tokens, "float32_perplexity": round(_perplexity(plain), 4), "forms": forms}


async def _scores(directory: Path, form: Form, text: str, most_tokens: int, threads: int) -> tuple[list[TokenLogprob], int]:
    settings = EngineSettings(
        backend="torch",
        dtype="float32",
        device="cpu",
        quantize=form.quantize,
        quantize_cache="none",
        kv_cache_dtype=form.kv_cache_dtype,
        threads=threads,
    )
    async with LocalEngine(directory, settings, SchedulerSettings(batch_size=1)) as engine:
        ids = tuple(engine.codec.encode(text))[:most_tokens]
        length = min(STRETCH_TOKENS, engine.info.context_tokens - 1)
        if len(ids) < 2 * length:
            raise SettingsError(f"--text gives {len(ids)} tokens, and at least {2 * length} are needed to compare: name a longer file.")
        found: list[TokenLogprob] = []
        for start in range(0, len(ids) - length + 1, length):
            found += await engine.score(ids[start : start + length])
        return found, len(found)


def _perplexity(scores: Sequence[TokenLogprob]) -> float:
    return math.exp(-mean(entry.logprob for entry in scores))
