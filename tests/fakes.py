"""Fakes that behave: a worker that checks every plan it gets and whose tokens depend on everything it was told, a byte tokenizer, a
virtual clock, and a router made of them. No torch.

FakeBackend keeps rows, tables and block memory as a real worker does. A computed position writes an entry into the block that the table
names; a sampled token is a hash of all visible entries as read back through the tables. So any mix-up of rows, tables, blocks, releases
or re-prefills changes the output, and a plan that breaks the contract raises PlanViolation.
"""

from __future__ import annotations

import asyncio
import codecs
import selectors
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from service.schedulers.router import Model, Router
from service.telemetry import Telemetry
from service.types.catalog import V2_3, Shape
from service.types.errors import StartupError
from service.types.kv_layout import FarSpec, FarStore, KvGroup, KvLayout
from service.types.model_spec import ModelSpec
from service.types.plan import (
    BackendHealth,
    BackendInfo,
    BatchPlan,
    ImageWork,
    OpenSequence,
    PromptLogprobs,
    SampledToken,
    Slice,
    StepResult,
    Want,
    WorkerLost,
)
from service.types.request import TokenLogprob
from service.types.settings import SchedulerSettings

END_ID = 256
VOCABULARY = 257
T = TypeVar("T")


class PlanViolation(Exception):
    """A plan broke the contract of types/plan.py."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise PlanViolation(what)


# A tokenizer of bytes.


class ByteDecoder:
    def __init__(self, skip_special: bool = True) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace")
        self._skip_special = skip_special

    def push(self, token: int) -> str:
        if token == END_ID:
            return "" if self._skip_special else "<end>"
        return self._decode.decode(bytes((token,)))

    def flush(self) -> str:
        return self._decode.decode(b"", final=True)


class ByteCodec:
    """The interface of inputs/tokens.TokenCodec over UTF-8 bytes: token ids 0 … 255 are bytes, 256 is the end."""

    vocab_size = VOCABULARY
    special_ids = frozenset({END_ID})

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        if not parse_special:
            return list(text.encode())
        head, *rest = text.split("<end>")
        ids = list(head.encode())
        for part in rest:
            ids += [END_ID, *part.encode()]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        decoder = ByteDecoder(skip_special)
        return "".join(decoder.push(token) for token in ids) + decoder.flush()

    def decoder(self, skip_special: bool = True) -> ByteDecoder:
        return ByteDecoder(skip_special)

    def token_bytes(self, token: int) -> bytes:
        return b"<end>" if token == END_ID else bytes((token,))

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", "replace")


# A clock that jumps.


class _JumpingSelector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Instead of sleeping until the next timer, moves the clock there."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("every task waits and no timer is set: a deadlock")
        if not ready and timeout:
            self.loop.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which time passes only when everybody waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end on a VirtualLoop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def loop_clock() -> float:
    """The clock of the running event loop: real in real loops, virtual in VirtualLoop."""
    return asyncio.get_running_loop().time()


# The worker.


@dataclass(slots=True)
class FakeRow:
    """One row of the worker's tables. `written` positions have their KV."""

    opening: OpenSequence
    tokens: list[int]
    tables: list[list[int]]
    released: list[int]
    written: int = -1


@dataclass
class FakeBehaviour:
    """What the fake worker does. Everything may be changed between steps.

    `script(opening)` gives the tokens to generate (by index from the prompt's end; hashes after its end); `end_every` n: about one token
    in n is the end; `kills(opening)` True: executing that sequence kills the worker; `nan(opening, position)` True: no finite logits there.
    """

    step_s: float = 0.01
    token_s: float = 0.0
    start_s: float = 1.0
    end_every: int = 0
    script: Callable[[OpenSequence], Sequence[int]] | None = None
    kills: Callable[[OpenSequence], bool] | None = None
    nan: Callable[[OpenSequence, int], bool] | None = None
    die_at_steps: frozenset[int] = frozenset()
    failing_starts: int = 0
    refuses_to_start: bool = False
    stalled: bool = False


@dataclass(frozen=True)
class Far:
    """A window whose layers keep what lies behind it: a near and a far group."""

    window: int
    refresh: int = 1
    store: FarStore = FarStore.INT8

    @property
    def spec(self) -> FarSpec:
        return FarSpec(store=self.store, refresh=self.refresh, sub_block_tokens=2)


def layout(block_tokens: int = 4, windows: Sequence[int | Far | None] = (None,)) -> KvLayout:
    """A cache layout with one group a window, and one more for each `Far` that keeps anything."""
    groups: list[KvGroup] = []
    for layer, window in enumerate(windows):
        if not isinstance(window, Far):
            groups.append(KvGroup(f"group{layer}", (layer,), 1, 8, 8, window))
            continue
        groups.append(KvGroup(f"near{layer}", (layer,), 1, 8, 8, window.window, window.spec))
        if window.spec.store is not FarStore.EVICT:
            groups.append(KvGroup(f"far{layer}", (layer,), 1, 8, 8, window.window, window.spec, len(groups) - 1))
    return KvLayout(tuple(groups), block_tokens)


class FakeBackend:
    """Implements types.plan.Backend in process. `plans` are those that it got; `violation` the first broken promise, if any."""

    def __init__(
        self,
        kv_layout: KvLayout | None = None,
        group_blocks: Sequence[int] | None = None,
        max_rows: int = 64,
        max_step_tokens: int = 512,
        context_tokens: int = 2048,
        behaviour: FakeBehaviour | None = None,
    ) -> None:
        self.behaviour = behaviour or FakeBehaviour()
        self.layout = kv_layout or layout(64)
        self._written = [index for index, group in enumerate(self.layout.groups) if group.source is None]
        blocks = tuple(group_blocks) if group_blocks is not None else (4096,) * len(self.layout.groups)
        self.info = BackendInfo(
            kv_layout=self.layout,
            group_blocks=blocks,
            max_rows=max_rows,
            max_step_tokens=max_step_tokens,
            context_tokens=context_tokens,
            vocab_size=VOCABULARY,
            dtype="float32",
            tier="cpu",
            device="fake",
            memory_bytes=(("weights", 1000),),
            phases_s=(("load", self.behaviour.start_s),),
            limits=(("bytes", 2e9), ("flops", 5e10)),
            image_tokens=4096,
        )
        self.plans: list[BatchPlan] = []
        self.starts = 0
        self.steps_executed = 0
        self.violation: PlanViolation | None = None
        self.closed = False
        self.up = False
        self._outstanding: list[tuple[asyncio.Future[StepResult], asyncio.TimerHandle | None]] = []
        self._busy_until = 0.0
        self._clear()

    def _clear(self) -> None:
        self.rows: dict[int, FakeRow] = {}
        sizes = [blocks + 1 for blocks in self.info.group_blocks]
        self._fill = [[0] * size for size in sizes]
        self._digest = [[0] * size for size in sizes]
        self._last = [[0] * size for size in sizes]

    # Backend.

    async def start(self) -> BackendInfo:
        await asyncio.sleep(self.behaviour.start_s)
        if self.behaviour.refuses_to_start:
            raise StartupError("The fake worker was told not to start.")
        if self.behaviour.failing_starts > 0:
            self.behaviour.failing_starts -= 1
            raise WorkerLost("start")
        self._clear()
        self._busy_until = 0.0
        self.starts += 1
        self.up = True
        return self.info

    def execute(self, plan: BatchPlan) -> asyncio.Future[StepResult]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StepResult] = loop.create_future()
        if not self.up:
            future.set_exception(WorkerLost("down"))
            return future
        self.plans.append(plan)
        self._outstanding = [entry for entry in self._outstanding if not entry[0].done()]
        try:
            require(len(self._outstanding) < 2, "more than two steps outstanding")
            result = self._step(plan)
        except PlanViolation as violation:
            self.violation = self.violation or violation
            future.set_exception(violation)
            return future
        self.steps_executed += 1
        seconds = self.behaviour.step_s + self.behaviour.token_s * sum(piece.length for piece in plan.slices)
        self._busy_until = max(self._busy_until, loop.time()) + seconds
        if self._dies(plan):
            self._outstanding.append((future, loop.call_at(self._busy_until, self.kill, "died")))
        elif self.behaviour.stalled:
            self._outstanding.append((future, None))
        else:
            self._outstanding.append((future, loop.call_at(self._busy_until, _deliver, future, result)))
        return future

    def health(self) -> BackendHealth:
        state = "ready" if self.up else "down" if self.starts else "loading"
        return BackendHealth("stalled" if self.up and self.behaviour.stalled else state, 0.0, max(self.starts - 1, 0))

    async def close(self) -> None:
        self.closed = True
        self.kill("closed")

    def kill(self, reason: str = "killed") -> None:
        """The worker dies now: every outstanding step is lost."""
        self.up = False
        outstanding, self._outstanding = self._outstanding, []
        for future, timer in outstanding:
            if timer is not None:
                timer.cancel()
            if not future.done():
                future.set_exception(WorkerLost(reason))

    def _dies(self, plan: BatchPlan) -> bool:
        kills = self.behaviour.kills
        if self.steps_executed in self.behaviour.die_at_steps:
            return True
        return kills is not None and any(kills(self.rows[piece.row].opening) for piece in plan.slices)

    # One step.

    def _step(self, plan: BatchPlan) -> StepResult:
        for row in plan.close:
            require(row in self.rows, f"row {row} is closed but not open")
            del self.rows[row]
        for opening in plan.open:
            self._open(opening)
        self._change_tables(plan)
        self._check_sharing(plan)
        require(len({piece.row for piece in plan.slices}) == len(plan.slices), "a row has two slices")
        require(sum(piece.length for piece in plan.slices) <= self.info.max_step_tokens, "more tokens than a step may have")
        tokens: list[SampledToken] = []
        scores: list[PromptLogprobs] = []
        for piece in plan.slices:
            self._compute(piece, tokens, scores)
        images = [image for opening in plan.open for image in opening.images]
        brought = [image for image in images if image.pixels]
        tokens_shown = sum(image.tokens for image in brought)
        work = ImageWork(len(brought), tokens_shown, len(images) - len(brought), 100.0, 4, (3.0,), (1.0,)) if images else None
        counts = (("attention", "fake", 1),), 0, work, (("replayed", 1),)
        return StepResult(plan.step, tuple(tokens), tuple(scores), self.behaviour.step_s, *counts)

    def _open(self, opening: OpenSequence) -> None:
        require(opening.row not in self.rows, f"row {opening.row} is open already")
        require(0 <= opening.row < self.info.max_rows, f"row {opening.row} does not exist")
        require(0 < opening.prompt_tokens <= len(opening.tokens) <= self.info.context_tokens, "lengths of an opened sequence")
        starts = [0 if group.far is None or group.source is None else group.far.sink_blocks for group in self.layout.groups]
        self.rows[opening.row] = FakeRow(opening, list(opening.tokens), [[0] * start for start in starts], starts)

    def _change_tables(self, plan: BatchPlan) -> None:
        opened = {opening.row for opening in plan.open}
        for row, group, first, blocks in plan.append:
            table = self.rows[row].tables[group]
            require(first == len(table) or row in opened, f"row {row} group {group}: append at {first}, table has {len(table)}")
            require(all(1 <= block <= self.info.group_blocks[group] for block in blocks), "a block id out of range")
            if first > len(table):
                self.rows[row].released[group] = first
            table += [0] * (first - len(table)) + list(blocks)
        for row, group, before in plan.release:
            kind = self.layout.groups[group]
            entry = self.rows[row]
            require(kind.window is not None and kind.source is None, "a release in a group without a window")
            require(entry.released[group] < before <= len(entry.tables[group]), "a release that goes back or beyond the table")
            entry.tables[group][kind.sink_blocks : before] = [0] * (before - kind.sink_blocks)
            entry.released[group] = before
        for row, group, sources, targets in plan.demote:
            source = self.layout.groups[group].source
            require(source is not None and len(sources) == len(targets), "a demotion into a group that is not far")
            held = [block for entry in self.rows.values() for block in entry.tables[group]]
            for near, far in zip(sources, targets, strict=True):
                require(self._fill[source][near] == self.layout.block_tokens, "a block becomes far before it is full")
                require(far in self.rows[row].tables[group] and held.count(far) == 1, "a shared far block is written")
                self._fill[group][far] = self.layout.block_tokens
                self._digest[group][far] = hash(("far", self._digest[source][near]))

    def _check_sharing(self, plan: BatchPlan) -> None:
        """A block that is about to be written is in one table only, once."""
        size = self.layout.block_tokens
        for group in self._written:
            holders: dict[int, int] = {}
            for row in self.rows.values():
                for block in row.tables[group]:
                    holders[block] = holders.get(block, 0) + 1
            for piece in plan.slices:
                require(piece.row in self.rows, f"row {piece.row} is not open")
                table = self.rows[piece.row].tables[group]
                require(len(table) * size >= piece.start + piece.length, f"row {piece.row}: no blocks up to {piece.start + piece.length}")
                for block in table[piece.start // size : -(-(piece.start + piece.length) // size)]:
                    require(block != 0, "a released entry is written")
                    require(holders[block] == 1, f"group {group} block {block} is written and shared")

    def _compute(self, piece: Slice, tokens: list[SampledToken], scores: list[PromptLogprobs]) -> None:
        row = self.rows[piece.row]
        end = piece.start + piece.length
        require(piece.length > 0, "an empty slice")
        if row.written < 0:
            require(piece.start % self.layout.block_tokens == 0, "a prefix hit that is no full block")
            row.written = piece.start
        require(piece.start == row.written, f"row {piece.row}: positions {piece.start} after {row.written}")
        require(piece.length <= (self.layout.slice_tokens or piece.length), "a slice longer than a window whose blocks become far")
        require(end <= len(row.tokens), f"row {piece.row}: position {end - 1} has no token yet")
        for position in range(piece.start, end):
            self._write(row, position)
        row.written = end
        if piece.want & Want.PROMPT_LOGPROBS:
            last = min(end, row.opening.prompt_tokens - 1)
            rows = tuple(self._score(row.tokens[at], row.opening.prompt_logprobs or 0) for at in range(piece.start + 1, last + 1))
            scores.append(PromptLogprobs(piece.row, piece.start + 1, rows))
        if piece.want & Want.TOKEN:
            require(end == len(row.tokens), "a token is wanted in the middle of the known ones")
            tokens.append(self._sample(piece.row, row))

    def _write(self, row: FakeRow, position: int) -> None:
        size = self.layout.block_tokens
        for group in self._written:
            table, fill = row.tables[group], self._fill[group]
            block, offset = table[position // size], position % size
            before = 0
            if position and self._first_visible(group, position) < position:
                previous = table[(position - 1) // size]
                require(previous != 0, "a released entry is read")
                require(fill[previous] == (position - 1) % size + 1, "a block is read that was not written")
                before = self._last[group][previous]
            require(offset == 0 or fill[block] == offset, f"block {block} has {fill[block]} entries, {offset} is written")
            entry = hash((before, row.tokens[position], position, group))
            self._digest[group][block] = entry if offset == 0 else hash((self._digest[group][block], entry))
            self._last[group][block] = entry
            fill[block] = offset + 1

    def _first_visible(self, group: int, position: int) -> int:
        window = self.layout.groups[group].window
        return 0 if window is None else max(position - window + 1, 0)

    def _sample(self, index: int, row: FakeRow) -> SampledToken:
        opening, length, size = row.opening, len(row.tokens), self.layout.block_tokens
        seen = [opening.sampling.seed, opening.sampling.choice, length]
        for group in range(len(self.layout.groups)):
            table, fill, digest = row.tables[group], self._fill[group], self._digest[group]
            kind = self.layout.groups[group]
            first, end = self.layout.first_read(kind, length - 1), self.layout.entries(kind, length - 1)
            require(kind.source is None or len(table) == end, f"a far table of {len(table)} entries instead of {end}")
            for at in (*range(min(kind.sink_blocks, first)), *range(first, end)):
                block = table[at]
                require(block != 0, "a released entry is read")
                require(fill[block] == min(size, length - at * size), "a visible block is not written or holds too much")
                seen.append(digest[block])
        if self.behaviour.nan is not None and self.behaviour.nan(opening, length):
            row.tokens.append(0)  # a step that was sent ahead may compute one position more
            return SampledToken(index, -1, None, "numerical_failure")
        token = self._choose(hash(tuple(seen)), row)
        row.tokens.append(token)
        wanted = opening.sampling.logprobs
        return SampledToken(index, token, None if wanted is None else self._score(token, wanted))

    def _choose(self, value: int, row: FakeRow) -> int:
        opening = row.opening
        generated = len(row.tokens) - opening.prompt_tokens
        if self.behaviour.script is not None:
            script = self.behaviour.script(opening)
            if generated < len(script):
                return script[generated]
        ends = opening.stop.effective_ids
        if self.behaviour.end_every and value % self.behaviour.end_every == 0 and generated >= opening.stop.min_tokens and ends:
            return min(ends)
        token = 97 + (value >> 7) % 26
        while token in ends and generated < opening.stop.min_tokens:
            token = 97 + (token - 96) % 26
        return token

    @staticmethod
    def _score(token: int, alternatives: int) -> TokenLogprob:
        top = tuple(((token + step) % VOCABULARY, -0.5 - step) for step in range(alternatives))
        return TokenLogprob(token, -0.5, top)


def _deliver(future: asyncio.Future[StepResult], result: StepResult) -> None:
    if not future.done():
        future.set_result(result)


# A router of fakes.


@dataclass(frozen=True)
class FakeGeneration:
    """The fields of checkpoints/manifest.GenerationDefaults."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class FakeManifest:
    """The fields of checkpoints/manifest.Manifest."""

    spec: ModelSpec
    directory: Path = Path("fake")
    digest: str = "ab" * 32
    family: str = "deepseek-line"
    line: str | None = "2.3"
    weight_files: tuple[str, ...] = ("model.safetensors",)
    weight_bytes: int = 1000
    stored_dtype: str = "float32"
    generation: FakeGeneration = field(default_factory=FakeGeneration)
    chat_template: str | None = None
    version: str | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.spec.modalities


def fake_spec(context_tokens: int = 2048) -> ModelSpec:
    """A small v2.3 network over bytes; its end token is END_ID."""
    shape = Shape(vocab_size=VOCABULARY, dim=16, layers=2, heads=2, kv_heads=1, mlp_hidden=32, context_tokens=context_tokens)
    return V2_3.spec(shape, end_ids=(END_ID,))


def fake_model(backend: FakeBackend | None = None, name: str = "fake", codec: Any = None, manifest: Any = None) -> Model:
    """One model to serve, made of fakes."""
    backend = backend or FakeBackend()
    manifest = manifest or FakeManifest(fake_spec(backend.info.context_tokens))
    return Model(name, manifest, codec or ByteCodec(), backend)


def fake_router(
    backend: FakeBackend | None = None,
    settings: SchedulerSettings | None = None,
    telemetry: Telemetry | None = None,
    **model: Any,
) -> Router:
    """A router with one fake version; it still has to be started. Its clock is the running event loop's."""
    return Router([fake_model(backend, **model)], settings or SchedulerSettings(), telemetry or Telemetry(), clock=loop_clock)
