"""What the profiles of the hardware tiers gain on this machine over the same model without them.

It does not know how the flags work. Invariants: both sides run the same prompts in alternating rounds of one run, and the limits that the
result is compared with were measured by the workers themselves.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from service.checkpoints.manifest import read_manifest
from service.cli.local_engine import LocalEngine, Round, random_prompts, spread
from service.config.tiers import PROFILES, flags_of
from service.types.model_spec import ELEMENT_BYTES, ModelSpec
from service.types.settings import AttentionSettings, EngineSettings, SchedulerSettings


@dataclass(frozen=True, slots=True)
class Measurement:
    """How a tier is measured: how many clients ask at once, how many sequences run at once without its flags, the gain claimed, where.

    The baseline is float32 without quantisation over full attention. Where `dtype` or `window` is set they are recommended besides the
    profile; with a window the same `dtype` over full attention runs as well, so that the window's own gain shows.
    """

    clients: int
    baseline_batch: int
    claim: float
    device: str = "cpu"
    dtype: str = "auto"
    window: int = 0


MEASUREMENTS = {
    "gpu": Measurement(8, 8, 2.3, "cuda", "float16", 2048),
    "edge": Measurement(4, 1, 1.8),
    "cpu": Measurement(8, 32, 1.5),
}


class Side(NamedTuple):
    """One way to serve the checkpoint: flags as one types them, and the settings they stand for."""

    flags: str
    engine: EngineSettings
    scheduler: SchedulerSettings
    attention: AttentionSettings = AttentionSettings()


def sides(tier: str, spec: ModelSpec, threads: int, context: int) -> list[Side]:
    """The baseline, what lies between where that is measured, and last what the tier recommends for sequences of `context` tokens."""
    measured, profile = MEASUREMENTS[tier], PROFILES[tier]
    plain = EngineSettings(
        dtype="float32", device=measured.device, quantize="none", threads=threads, context_tokens=context, backend="torch"
    )
    far = any(layer.attention.far for layer in spec.layers)
    full = AttentionSettings(attention_window=max(context, 64) if far else 0)
    found = [Side("float32", plain, SchedulerSettings(batch_size=measured.baseline_batch), full)]
    settings = {**profile.named, **profile.always}
    settings.pop("device", None)  # said by the measurement, for all sides
    dtype = "float32" if measured.dtype == "auto" else measured.dtype
    tuned = replace(plain, dtype=dtype, quantize=str(settings.get("quantize", "none")))
    scheduler = SchedulerSettings()
    batch_size, step_tokens = (int(str(settings.get(name, getattr(scheduler, name)))) for name in ("batch_size", "step_tokens"))
    scheduler = replace(scheduler, batch_size=batch_size, step_tokens=step_tokens)
    if measured.window:
        found.append(Side(f"--dtype {dtype}", tuned, scheduler, full))
        settings = {"dtype": dtype, "attention_window": measured.window, **settings}
    return [
        *found,
        Side(flags_of(settings), replace(tuned, backend="auto"), scheduler, AttentionSettings(attention_window=measured.window)),
    ]


async def measure_tier(tier: str, directory: Path, threads: int, rounds: int, asked: tuple[int, int]) -> dict[str, Any]:
    """The row of a tier: output tokens a second of every side, what the recommended one gains with its spread, its share of the limit.

    `asked` are the tokens of each prompt and of each answer.
    """
    measured, (prompt_tokens, output_tokens) = MEASUREMENTS[tier], asked
    spec = read_manifest(directory).spec
    compared = sides(tier, spec, threads, prompt_tokens + output_tokens + 1)
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(LocalEngine(directory, *side[1:])) for side in compared]
        taken: list[list[Round]] = []
        for number in range(rounds + 1):
            prompts = random_prompts(measured.clients, prompt_tokens, spec.vocab_size, number)
            taken.append([await engine.generate(prompts, output_tokens) for engine in engines])
        columns = [list(column) for column in zip(*taken[1:], strict=True)]
        names = ["float32", *(side.flags for side in compared[1:-1]), "recommended"]
        limits = {name: dict(engine.info.limits) for name, engine in zip(names, engines, strict=True)}
        shares = _shares(engines[-1], min(measured.clients, compared[-1].scheduler.batch_size), columns[-1], asked)
        backend = engines[-1].info.backend
    return {
        "kind": "tier",
        "tier": tier,
        "flags": compared[-1].flags,
        "backend": backend,
        "clients": measured.clients,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "baseline_tokens_per_s": spread([one.output for one in columns[0]]),
        "tokens_per_s": spread([one.output for one in columns[-1]]),
        "ratio": _ratio(columns[-1], columns[0]),
        "between": {name: _ratio(columns[-1], column) for name, column in zip(names[1:-1], columns[1:-1], strict=True)},
        "claim": measured.claim,
        "machine": limits,
        "share_of_limit": shares,
    }


def _ratio(mine: list[Round], others: list[Round]) -> dict[str, float]:
    return spread([one.output / other.output for one, other in zip(mine, others, strict=True)])


def _shares(engine: LocalEngine, rows: int, rounds: list[Round], asked: tuple[int, int]) -> dict[str, float]:
    """Prefill against the product rate, decode of `rows` sequences against the slower of that and the memory, by the model's formulas."""
    limits, spec = dict(engine.info.limits), engine.manifest.spec
    prompt_tokens, output_tokens = asked
    context = prompt_tokens + output_tokens / 2
    prefill_s = spec.flops(prompt_tokens, prompt_tokens / 2, 1) / limits["flops"]
    weights = dict(engine.info.memory_bytes)["weights"]
    kept = (
        spec.bytes_read(rows, context, 0, ELEMENT_BYTES[engine.info.kv_cache_dtype or engine.info.dtype])
        + weights * spec.matmul_parameters_read / spec.parameters
    )
    decode_s = max(kept / limits["bytes"], rows * spec.flops(1, context) / limits["flops"])
    return {
        "prefill": round(median(entry.prefill for entry in rounds) * prefill_s / prompt_tokens, 3),
        "decode": round(median(entry.decode for entry in rounds) * decode_s / rows, 3),
    }
