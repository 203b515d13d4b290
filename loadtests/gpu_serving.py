"""End-to-end serving on a GPU, the scheduler's loop and the engine in one process without HTTP, beside transformers' continuous batching.

    python -m loadtests.gpu_serving [--device auto|cpu|cuda] [--shapes llama-8b v5.2 v5.2-full] [--batches 1 256] [--keep]

Shapes have random weights, which a llama shares with its peer. Decode counts the tokens between the last sequence's first one and the
first sequence's last one, when all are decoding; prefill is a prompt's tokens over the time to the last first token, of runs of one token
each. A decode step's limit is the weights and the visible keys and values, read at the rate of a large copy; that of a prompt is the
rate of a large product. On a CPU tiny shapes prove the path; their speed says nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loadtests import gpu_bench
from loadtests.peers import ContinuousBatchingPeer, Run
from loadtests.rows import keep, spread, surroundings
from service.engine.memory import MemoryPlan
from service.types.catalog import V5_2, Shape
from service.types.errors import ServiceError, StartupError
from service.types.kv_layout import FarSpec
from service.types.model_spec import ELEMENT_BYTES, DenseMlp, GroupedQueryAttention, LayerSpec, ModelSpec, RopeSpec
from service.types.plan import LoadRequest

if TYPE_CHECKING:
    from loadtests.in_process import Served

# What the loop and its metrics import beside torch and numpy.
NEEDED = ("msgspec", "prometheus_client")
# What ends a part, whose row then has the reason.
FAILURES = (RuntimeError, MemoryError, ValueError, TypeError, AttributeError, ImportError, ServiceError, StartupError)
# A prompt's rate is measured over about so many full steps.
PREFILL_STEPS = 8


@dataclass(frozen=True)
class Target:
    """A network, the whole length of each sequence, and whether transformers has a twin of it."""

    spec: ModelSpec
    context: int
    has_twin: bool = False


@dataclass(frozen=True)
class Work:
    """One measurement: so many sequences at once, tokens of each prompt and generated tokens of each."""

    sequences: int
    prompt: int
    generate: int

    @property
    def context(self) -> int:
        """The whole length of a sequence."""
        return self.prompt + self.generate

    @classmethod
    def decoding(cls, sequences: int, context: int, step_tokens: int, steps: int) -> Work:
        """Sequences that all decode together for `steps` steps: the first ones wait, decoding, for the prompts of the last.

        Raises ValueError where the context is too short for that.
        """
        generate = -(-sequences * context // step_tokens) + steps
        if generate >= context:
            raise ValueError(f"{sequences} sequences of {context} tokens do not all decode together: take more --step_tokens")
        return cls(sequences, context - generate, generate)

    def prompts(self, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
        """Different random prompts."""
        drawn = np.random.default_rng(seed).integers(2, vocabulary, (self.sequences, self.prompt))
        return [tuple(row) for row in drawn.tolist()]


def llama(sizes: Shape) -> ModelSpec:
    """A plain llama of these sizes."""
    attention = GroupedQueryAttention(sizes.heads, sizes.kv_heads, sizes.rotary_dim)
    return ModelSpec(
        family="llama",
        vocab_size=sizes.vocab_size,
        dim=sizes.dim,
        layers=(LayerSpec(attention, DenseMlp(sizes.mlp_hidden)),) * sizes.layers,
        rope=RopeSpec(theta=sizes.rope_theta, rotary_dim=sizes.rotary_dim, original_context=sizes.context_tokens),
        context_tokens=sizes.context_tokens,
        norm_eps=1e-5,
    )


def full(spec: ModelSpec) -> ModelSpec:
    """The same network whose layers read everything."""
    return replace(spec, layers=tuple(replace(x, attention=replace(x.attention, window=None, far=None)) for x in spec.layers))


LLAMA_8B = llama(Shape(128_256, 4096, 32, 32, 8, 14_336, 8192, rope_theta=500_000.0))
TINY_LLAMA = llama(Shape(331, 64, 2, 4, 2, 112, 512, rope_theta=500_000.0))
# Text alone: the patch encoder has no part in it.
V5_2_TEXT = V5_2.spec(replace(dict(V5_2.shapes)["reference"], vision=None))
TINY_V5_2 = V5_2.spec(Shape(331, 32, 3, 4, 2, 48, 640, window=70, far=FarSpec(blocks=2), dense_layers=(1,)))
TARGETS = {
    "llama-8b": Target(LLAMA_8B, 1024, has_twin=True),
    "v5.2": Target(V5_2_TEXT, 16_384),
    "v5.2-full": Target(full(V5_2_TEXT), 16_384),
    "tiny-llama": Target(TINY_LLAMA, 96, has_twin=True),
    "tiny-v5.2": Target(TINY_V5_2, 384),
    "tiny-v5.2-full": Target(full(TINY_V5_2), 384),
}


def prefill_rate(run: Run, work: Work) -> float:
    """Prompt tokens a second until every sequence has its first token."""
    return work.sequences * work.prompt / (max(times[0] for times in run.times_s) - run.began_s)


def together(run: Run) -> list[tuple[int, int]]:
    """Of each sequence the first and the last token that came while all were decoding. Raises ValueError where that was too short."""
    begin, end = max(times[0] for times in run.times_s), min(times[-1] for times in run.times_s)
    found = [[index for index, time in enumerate(times) if begin <= time <= end] for times in run.times_s]
    if any(len(inside) < 2 for inside in found):
        raise ValueError("the sequences did not all decode together for two steps: take more --steps")
    return [(inside[0], inside[-1]) for inside in found]


def decode_rate(run: Run) -> float:
    """Tokens a second while all sequences decode: the sum of each one's rate, so that tokens that come in bursts are counted right."""
    inside = zip(run.times_s, together(run), strict=True)
    return sum((last - first) / (times[last] - times[first]) for times, (first, last) in inside)


def context_of(run: Run, work: Work) -> float:
    """Tokens that a decoding row sees on average, while all decode."""
    return work.prompt + sum(first + last for first, last in together(run)) / 2 / len(run.times_s)


def decode_limit(spec: ModelSpec, sequences: int, context: float, element_bytes: int, bytes_us: float) -> float:
    """Tokens a second of steps that only read: weights once, and what each sequence sees of its cache."""
    return sequences / spec.bytes_read(sequences, context, element_bytes, element_bytes) * bytes_us * 1e6


def prefill_limit(spec: ModelSpec, work: Work, flops_us: float) -> float:
    """Prompt tokens a second of the products alone, with logits of each prompt's last token."""
    return work.prompt / spec.flops(work.prompt, work.prompt / 2, 1) * flops_us * 1e6


def limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes and operations a microsecond: on a GPU as `gpu_bench` measures them."""
    if device.type == "cuda":
        return gpu_bench.limits(gpu_bench.Clock(30))
    from service.engine.limits import machine_limits

    return {f"{kind}_us": rate / 1e6 for kind, rate in machine_limits(device, dtype, (0.0, 0.0))}


class Bench:
    """One shape on one device: ours and, where there is one, the peer, each measured alone over the same weights and prompts."""

    def __init__(self, target: Target, options: argparse.Namespace) -> None:
        from loadtests import in_process

        self._served, self._options, self.target = in_process, options, target
        place = torch.device(options.device), getattr(torch, options.dtype)
        self._decoder, self._weights = in_process.random_decoder(target.spec, *place)

    def rounds(self, work: Work) -> list[list[tuple[int, ...]]]:
        """Prompts of a round to warm up and of those that count."""
        return [work.prompts(self.target.spec.vocab_size, seed) for seed in range(self._options.rounds + 1)]

    def plan(self, sequences: int) -> tuple[LoadRequest, MemoryPlan]:
        """The memory plan for as many whole sequences, up to so many, as fit."""
        asked = LoadRequest("", max_rows=sequences, max_step_tokens=self._options.step_tokens, context_tokens=self.target.context)
        return self._served.fitting(self._decoder, replace(asked, cuda_graphs=self._options.cuda_graphs))

    def ours(self, plan: tuple[LoadRequest, MemoryPlan], work: Work) -> Served:
        """The loop over the engine."""
        served = self._served.serve_rounds(self._decoder, plan, self.rounds(work), work.generate, self._options.run_ahead)
        try:
            return asyncio.run(served)
        finally:
            release()

    def peer(self, work: Work) -> list[Run] | str:
        """Rounds of transformers' continuous batching, or why there are none."""
        if not self.target.has_twin or self._options.peer == "none":
            return "not asked for" if self.target.has_twin else "transformers has no twin of this shape"
        try:
            peer = ContinuousBatchingPeer(self.target.spec, self._weights)
            try:
                peer.prepare(work.sequences, work.context, self._options.step_tokens)
                return [peer.run(prompts, work.generate) for prompts in self.rounds(work)][1:]
            finally:
                peer.close()
        except FAILURES as error:
            return reason(error)
        finally:
            release()


def release() -> None:
    """Give back what was let go."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """Why something failed, in a line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def beside(rate: Callable[[Run], float], ours: list[Run], peer: list[Run] | str, limit: float) -> dict[str, Any]:
    """Tokens a second of ours, their share of the limit, and the peer's with the ratio of medians, or why it has none."""
    mine = spread([rate(run) for run in ours])
    row: dict[str, Any] = {
        "tokens_s": mine,
        "limit_tokens_s": round(limit, 1),
        "share_of_limit": round(mine["median"] / limit, 4),
        "transformers": peer,
    }
    if not isinstance(peer, str):
        try:
            row["transformers"] = spread([rate(run) for run in peer])
        except ValueError as error:
            row["transformers"] = reason(error)
            return row
        row["ratio"] = round(mine["median"] / row["transformers"]["median"], 3)
        pairs = [pair for run, other in zip(ours, peer, strict=True) for pair in zip(run.tokens, other.tokens, strict=True)]
        row["same_first_tokens"] = round(sum(a[0] == b[0] for a, b in pairs) / len(pairs), 4)
    return row


def prefill_part(bench: Bench, machine: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """Prompts alone, about PREFILL_STEPS full steps of them."""
    context = bench.target.context
    plan = bench.plan(max(1, min(max(options.batches), PREFILL_STEPS * options.step_tokens // context)))
    work = Work(plan[0].max_rows, context - 1, 1)
    ours, peer = bench.ours(plan, work), bench.peer(work)
    limit = prefill_limit(bench.target.spec, work, machine["flops_us"])
    return {"sequences": work.sequences, "prompt": work.prompt, **beside(lambda run: prefill_rate(run, work), ours.runs, peer, limit)}


def decode_part(bench: Bench, machine: dict[str, float], options: argparse.Namespace, asked: int) -> dict[str, Any]:
    """Up to `asked` sequences decoding together."""
    plan = bench.plan(asked)
    work = Work.decoding(plan[0].max_rows, bench.target.context, options.step_tokens, options.steps)
    ours = bench.ours(plan, work)
    context = context_of(ours.runs[-1], work)
    limit = decode_limit(bench.target.spec, work.sequences, context, ELEMENT_BYTES[options.dtype], machine["bytes_us"])
    engine_ms = spread([seconds * 1e3 for seconds in ours.steps_s])
    return {
        "sequences": work.sequences,
        "prompt": work.prompt,
        "generate": work.generate,
        "context": round(context, 1),
        **beside(decode_rate, ours.runs, bench.peer(work), limit),
        "engine_ms": engine_ms,
        "engine_share_of_limit": round(work.sequences / limit * 1e3 / engine_ms["median"], 4),
        "forwards": ours.forwards,
        "dispatch": ours.dispatch,
    }


def measure(name: str, options: argparse.Namespace, machine: dict[str, float]) -> dict[str, Any]:
    """The row of one shape; a part that fails is its reason."""
    row: dict[str, Any] = {"what": "gpu_serving", "shape": name, "context": TARGETS[name].context}
    try:
        bench = Bench(TARGETS[name], options)
        parts = {"prefill": partial(prefill_part, bench, machine, options)}
        parts |= {f"decode_{count}": partial(decode_part, bench, machine, options, count) for count in options.batches}
        for part, run in parts.items():
            try:
                row[part] = run()
            except FAILURES as error:
                row[part] = reason(error)
            print(f"{name} {part}: {json.dumps(row[part])}", flush=True)
    except FAILURES as error:
        row["failed"] = reason(error)
    return row


def versions() -> dict[str, str]:
    """Versions of what computes on both sides; "" for what is not installed."""
    found = {}
    for name in ("torch", "triton", "transformers", "flash_attn"):
        try:
            found[f"{name}_version"] = version(name)
        except PackageNotFoundError:
            found[f"{name}_version"] = ""
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with what depends on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--shapes", nargs="+", choices=tuple(TARGETS), help="on a GPU the three large ones, on a CPU the tiny ones")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256], help="sequences at once; fewer where memory is short")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64, help="steps in which all sequences decode")
    parser.add_argument("--step_tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--run_ahead", default="auto", choices=("auto", "always", "never"))
    parser.add_argument("--cuda_graphs", default="auto", choices=("auto", "off"))
    parser.add_argument("--peer", default="transformers", choices=("transformers", "none"))
    parser.add_argument("--keep", action="store_true", help="append a row for each shape to results/gpu_serving.jsonl")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = options.device == "cuda"
    options.shapes = options.shapes or [name for name in TARGETS if name.startswith("tiny") != on_gpu]
    if options.dtype == "auto":
        options.dtype = "bfloat16" if on_gpu else "float32"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep where asked; 2 where something that it needs is missing."""
    options = parse(arguments)
    missing = [name for name in (*NEEDED, *(("triton",) if options.device == "cuda" else ())) if find_spec(name) is None]
    if missing:
        print(f"gpu_serving: serving is not measured, because {' and '.join(missing)} cannot be imported here", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_serving: no CUDA device is usable here", file=sys.stderr)
        return 2
    machine = limits(torch.device(options.device), getattr(torch, options.dtype))
    release()
    about = {"gpu": torch.cuda.get_device_name() if options.device == "cuda" else "none", **versions(), **machine}
    settings = {name: getattr(options, name) for name in ("device", "dtype", "rounds", "steps", "step_tokens", "run_ahead", "cuda_graphs")}
    for name in options.shapes:
        row = measure(name, options, machine)
        release()
        if options.keep:
            keep("gpu_serving", {**surroundings(), **about, **settings, **row})
    return 0


if __name__ == "__main__":
    sys.exit(main())
