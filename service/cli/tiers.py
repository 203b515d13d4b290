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

from service.cli.local_engine import LocalEngine, Round, random_prompts, spread
from service.config.tiers import PROFILES, flags_of
from service.types.settings import EngineSettings, SchedulerSettings


@dataclass(frozen=True, slots=True)
class Measurement:
    """How a tier's profile is measured: how many clients ask at once, how many sequences run at once without it, and the gain claimed.

    The baseline is float32 without quantisation.
    """

    clients: int
    baseline_batch: int
    claim: float


MEASUREMENTS = {"cpu": Measurement(8, 32, 1.5), "edge": Measurement(4, 1, 1.8)}


class Tuned(NamedTuple):
    """What a profile comes to: flags as one types them, and the settings they stand for."""

    flags: str
    quantize: str
    batch_size: int


def tuned(tier: str) -> Tuned:
    """The profile of a tier, as `deepseek-serve --tier` sets it."""
    profile = PROFILES[tier]
    settings = {**profile.named, **profile.always}
    engine, scheduler = EngineSettings(), SchedulerSettings()
    quantize, batch_size = settings.get("quantize", engine.quantize), settings.get("batch_size", scheduler.batch_size)
    return Tuned(flags_of(settings), str(quantize), int(str(batch_size)))


async def measure_tier(tier: str, directory: Path, threads: int, rounds: int, asked: tuple[int, int]) -> dict[str, Any]:
    """The row of a tier: output tokens a second of both sides, their ratio with its spread, and the share of the machine's limit.

    `asked` are the tokens of each prompt and of each answer.
    """
    measured, profile = MEASUREMENTS[tier], tuned(tier)
    prompt_tokens, output_tokens = asked
    context = prompt_tokens + output_tokens + 1
    plain = EngineSettings(backend="torch", dtype="float32", device="cpu", quantize="none", threads=threads, context_tokens=context)
    async with AsyncExitStack() as stack:
        baseline = await stack.enter_async_context(LocalEngine(directory, plain, SchedulerSettings(batch_size=measured.baseline_batch)))
        quantised = replace(plain, backend="auto", quantize=profile.quantize)
        recommended = await stack.enter_async_context(LocalEngine(directory, quantised, SchedulerSettings(batch_size=profile.batch_size)))
        pairs: list[tuple[Round, Round]] = []
        for number in range(rounds + 1):
            prompts = random_prompts(measured.clients, prompt_tokens, recommended.info.vocab_size, number)
            pairs.append((await baseline.generate(prompts, output_tokens), await recommended.generate(prompts, output_tokens)))
        limits = {"float32": dict(baseline.info.limits), profile.quantize: dict(recommended.info.limits)}
        shares = _shares(recommended, min(measured.clients, profile.batch_size), [pair[1] for pair in pairs[1:]], asked)
    ratios = [mine.output / base.output for base, mine in pairs[1:]]
    return {
        "kind": "tier",
        "tier": tier,
        "flags": profile.flags,
        "backend": recommended.info.backend,
        "clients": measured.clients,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "baseline_tokens_per_s": spread([base.output for base, _ in pairs[1:]]),
        "tokens_per_s": spread([mine.output for _, mine in pairs[1:]]),
        "ratio": spread(ratios),
        "claim": measured.claim,
        "machine": limits,
        "share_of_limit": shares,
    }


def _shares(engine: LocalEngine, rows: int, rounds: list[Round], asked: tuple[int, int]) -> dict[str, float]:
    """Prefill against the product rate, decode of `rows` sequences against the slower of that and the memory, by the model's formulas."""
    limits, spec = dict(engine.info.limits), engine.manifest.spec
    prompt_tokens, output_tokens = asked
    context = prompt_tokens + output_tokens / 2
    prefill_s = spec.flops(prompt_tokens, prompt_tokens / 2, 1) / limits["flops"]
    weights = dict(engine.info.memory_bytes)["weights"]
    kept = spec.bytes_read(rows, context, 0, 4) + weights * spec.matmul_parameters_read / spec.parameters
    decode_s = max(kept / limits["bytes"], rows * spec.flops(1, context) / limits["flops"])
    return {
        "prefill": round(median(entry.prefill for entry in rounds) * prefill_s / prompt_tokens, 3),
        "decode": round(median(entry.decode for entry in rounds) * decode_s / rows, 3),
    }
