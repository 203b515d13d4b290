"""The scheduler's loop over the torch engine in one process: no HTTP, no worker, no checkpoint; for measurements that want both alone.

The loop with its planner and admission, the memory plan, blocks, tables, sampler and recorded decode steps are the service's own. The
engine runs in a thread, so that streams are read while a device computes, as in the service; text is not decoded. Invariant: a run in
which a sequence did not get all tokens that were asked for is an error.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from loadtests.peers import Run
from service.engine.batch import Tables
from service.engine.cuda_graph import CudaRecorder
from service.engine.kv_pool import KvPool
from service.engine.memory import MemoryPlan, Usage, available_bytes, plan_memory, resident_bytes
from service.engine.sampler import Sampler
from service.engine.torch_backend import TorchBackend
from service.kernels.dispatch import chosen
from service.models.build import EMBEDDING_STD, build
from service.models.decoder import Decoder
from service.models.layers import Kernels, Linear
from service.schedulers.loop import Identity, Loop
from service.schedulers.streams import Stream
from service.telemetry import Telemetry
from service.types.errors import CapacityError
from service.types.model_spec import ModelSpec
from service.types.plan import BackendHealth, BackendInfo, BatchPlan, LoadRequest, StepResult
from service.types.request import FinishEvent, GenerationRequest, Sampling, Stop, TokenEvent
from service.types.settings import SchedulerSettings

WARM_UP_TOKENS = 16
# Of the free memory; the rest is for what allocators and libraries take and no plan knows.
USED_SHARE = 0.9


class Served(NamedTuple):
    """Some rounds: what streams gave, and seconds in the engine of each step in which all sequences, and nothing else, had one token.

    `forwards` counts the decoder's passes as `StepResult.forwards` does; `dispatch` names the kernels.
    """

    runs: list[Run]
    steps_s: list[float]
    forwards: dict[str, int]
    dispatch: dict[str, str]


class Letters:
    """A codec to which every token is a letter."""

    def decoder(self, skip_special: bool = True) -> Letters:
        """Itself: it keeps nothing back."""
        del skip_special
        return self

    def push(self, token: int) -> str:
        """A letter."""
        del token
        return "x"

    def flush(self) -> str:
        """Nothing."""
        return ""


def random_decoder(spec: ModelSpec, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Decoder, dict[str, Tensor]]:
    """A decoder as loading makes one to serve, of random weights drawn on the device; and its weights by name."""
    decoder = build(spec, device, dtype).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in decoder.named_parameters():
        if name.endswith("norm.weight"):
            weight.fill_(1.0)
        elif name.endswith(".bias"):
            weight.zero_()
        else:
            wide = name == "head.weight" or name.endswith("embed.weight")
            weight.normal_(std=EMBEDDING_STD if wide else weight.shape[1] ** -0.5, generator=generator)
    weights = {name: weight.detach() for name, weight in decoder.named_parameters()}
    for module in decoder.modules():
        if isinstance(module, Linear):
            module.pack()
    decoder.use(Kernels.resolve(device, dtype))
    return decoder.eval(), weights


def fitting(decoder: Decoder, request: LoadRequest) -> tuple[LoadRequest, MemoryPlan]:
    """The request with as many rows, up to its own, as the memory holds whole contexts of. Raises CapacityError where it holds none."""
    layout, size, on_gpu = decoder.spec.kv_layout(), decoder.dtype.itemsize, decoder.device.type == "cuda"
    free = torch.cuda.mem_get_info(decoder.device)[0] if on_gpu else available_bytes()
    usage = Usage(decoder.weight_bytes, resident_bytes(), int(free * USED_SHARE) + decoder.weight_bytes, on_gpu)
    # Beside whole contexts: the null block, and what a window's sequence holds more while a slice is computed.
    spare = (2 + -(-request.max_step_tokens // layout.block_tokens)) * sum(layout.block_bytes(group, size) for group in layout.groups)
    # A sequence enters only where each running one could grow by a block, and groups are divided in proportion.
    fewest = min(filter(None, (layout.blocks_for(group, request.context_tokens) for group in layout.groups)))
    sequence = layout.sequence_bytes(request.context_tokens, size) * (fewest + 1) // fewest
    while True:
        request = replace(request, kv_bytes=request.max_rows * sequence + spare)
        try:
            return request, plan_memory(decoder.spec, layout, size, request, usage)
        except CapacityError:
            if request.max_rows == 1:
                raise
            request = replace(request, max_rows=request.max_rows * 7 // 8)


class InProcess:
    """Implements types.plan.Backend over one decoder. `fault` is what ended a step, if one failed."""

    def __init__(self, decoder: Decoder, request: LoadRequest, memory: MemoryPlan) -> None:
        self._decoder, self._request, self._memory = decoder, request, memory
        self._thread = ThreadPoolExecutor(1, "engine")
        self._engine: TorchBackend | None = None
        self.fault = ""
        self.steps_s: list[float] = []
        self.forwards: Counter[str] = Counter()

    async def start(self) -> BackendInfo:
        """Take the memory and compute a few tokens."""
        decoder, request, memory = self._decoder, self._request, self._memory
        spec, layout = decoder.spec, decoder.spec.kv_layout()
        pool = KvPool(layout, memory.group_blocks, decoder.dtype, decoder.device)
        tables = Tables(layout, memory.group_blocks, request.max_rows, memory.context_tokens, spec.vocab_size)
        recorder = CudaRecorder() if decoder.device.type == "cuda" and request.cuda_graphs == "auto" else None
        self._engine = TorchBackend(decoder, pool, tables, Sampler(request.max_rows, spec.vocab_size), 0, recorder)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.warm_up, min(WARM_UP_TOKENS, memory.context_tokens))
        self._engine.rest()
        return BackendInfo(
            kv_layout=layout,
            group_blocks=memory.group_blocks,
            max_rows=request.max_rows,
            max_step_tokens=request.max_step_tokens,
            context_tokens=memory.context_tokens,
            vocab_size=spec.vocab_size,
            dtype=str(decoder.dtype).removeprefix("torch."),
            tier="gpu" if decoder.device.type == "cuda" else "cpu",
            device=str(decoder.device),
        )

    def execute(self, plan: BatchPlan) -> asyncio.Future[StepResult]:
        """Compute the plan behind those sent before."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, self._compute, plan)
        future.add_done_callback(self._note)
        return future

    def health(self) -> BackendHealth:
        """Ready as long as the process lives."""
        return BackendHealth("ready", 0.0, 0)

    async def close(self) -> None:
        """Let blocks, tables and graphs go; the decoder stays."""
        self._thread.shutdown()
        self._engine = None

    def _compute(self, plan: BatchPlan) -> StepResult:
        if self._engine is None:
            raise RuntimeError("the engine was not started")
        result = self._engine.execute(plan)
        self.forwards.update(dict(result.forwards))
        if len(plan.slices) == self._request.max_rows and all(part.length == 1 for part in plan.slices):
            self.steps_s.append(result.execute_s)
        return result

    def _note(self, future: asyncio.Future[StepResult]) -> None:
        failure = None if future.cancelled() else future.exception()
        self.fault = self.fault or (f"{type(failure).__name__}: {failure}" if failure is not None else "")


async def serve_rounds(
    decoder: Decoder, plan: tuple[LoadRequest, MemoryPlan], rounds: Sequence[list[tuple[int, ...]]], generate: int, run_ahead: str = "auto"
) -> Served:
    """Each round's prompts at once, `generate` greedy tokens each, through one loop; the first round warms up and is left out."""
    request, memory = plan
    rows, tokens = request.max_rows, request.max_rows * memory.context_tokens
    settings = SchedulerSettings(
        batch_size=rows,
        step_tokens=request.max_step_tokens,
        queue_requests=rows,
        queue_tokens=tokens,
        request_deadline_s=86_400.0,
        run_ahead=run_ahead,
        prefix_cache=False,
    )
    backend = InProcess(decoder, request, memory)
    loop = Loop(Identity("bench", "0" * 64, decoder.spec, Letters()), backend, settings, Telemetry())
    await loop.start()
    runs: list[Run] = []
    try:
        for number, prompts in enumerate(rounds):
            if number == 1:
                backend.steps_s.clear()
            runs.append(await _round(loop, backend, prompts, generate))
    finally:
        await loop.close()
    return Served(runs[1:], backend.steps_s, dict(backend.forwards), dict(chosen()))


async def _round(loop: Loop, backend: InProcess, prompts: list[tuple[int, ...]], generate: int) -> Run:
    stop, greedy = Stop(generate, ignore_eos=True), Sampling(temperature=0.0)
    began_s = time.perf_counter()
    streams = loop.submit([GenerationRequest("bench", "bench", prompt, stop, greedy) for prompt in prompts])
    found = await asyncio.gather(*(_read(stream) for stream in streams))
    if any(len(tokens) != generate for _, tokens in found):
        raise RuntimeError(backend.fault or "a sequence ended before it had all its tokens")
    return Run(began_s, [times for times, _ in found], [tokens for _, tokens in found])


async def _read(stream: Stream) -> tuple[list[float], list[int]]:
    """When each token was read, and the tokens."""
    times: list[float] = []
    tokens: list[int] = []
    async for event in stream:
        if isinstance(event, TokenEvent):
            times += [time.perf_counter()] * len(event.tokens)
            tokens += event.tokens
        elif isinstance(event, FinishEvent):
            break
    return times, tokens
