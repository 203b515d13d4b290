"""Plans in, results out, with torch: tables, blocks, the decoder and the sampler of one checkpoint.

It does not know processes or messages. CPU and CUDA share this path.
Invariant: a step that runs out of memory is computed in halves, and nothing that is not finite becomes a token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from service.engine.batch import Batch, Tables
from service.engine.decode_graphs import DecodeGraphs, Recorder
from service.engine.distribution import log_probs
from service.engine.drawing import Drawing
from service.engine.far_choices import FarChoices
from service.engine.idle_batches import idle_batch, idle_batches
from service.engine.images import ImageStore
from service.engine.kv_pool import KvPool
from service.engine.memory import SCORED_ROWS
from service.engine.paged_attend import HostPlans, PagedAttend, StepTensors, choose
from service.engine.sampler import Sampler
from service.engine.scores import joined, prompt_scores, sampled_tokens
from service.engine.upload import upload
from service.kernels.dispatch import take_counts
from service.models.decoder import Decoder
from service.processor import worthwhile_threads
from service.types.plan import BatchPlan, BlockDemote, PromptLogprobs, SampledToken, Slice, StepResult, Want
from service.types.request import Sampling, Stop, TokenLogprob


class TorchBackend:
    """A loaded checkpoint with its blocks and tables. `layers_done` counts layers since the start: it grows while a step gets on."""

    def __init__(
        self, decoder: Decoder, pool: KvPool, tables: Tables, sampler: Sampler, image_tokens: int = 0, recorder: Recorder | None = None
    ) -> None:
        """`image_tokens` encoded image tokens are kept. With a `recorder` decode steps are recorded and replayed."""
        self._decoder = decoder
        self._pool = pool
        self._tables = tables
        self._sampler = sampler
        self._device = decoder.device
        self._choices = FarChoices(pool.layout, len(tables.known), self._device)
        self._far_blocks_read = 0
        # Counted from compiled code too, while a call that computes all layers runs.
        self._done = np.zeros(1, np.int64)
        self._images = ImageStore(decoder, image_tokens, self._count_layer)
        most = tables.tokens.shape[0], tables.tokens.shape[1] - 1
        self._graphs = None if recorder is None else DecodeGraphs(decoder, pool, recorder, *most, self._count_layer)
        self._idle = threading.Event()
        pool.populate(self._idle)
        self._products = 0.0

    def share_steps(self, products: float) -> None:
        """From now on a step takes as many threads as rows of so many multiplications are worth."""
        self._products = products

    @torch.inference_mode()
    def execute(self, plan: BatchPlan) -> StepResult:
        """Run one step. Raises PlanError for a contradictory plan, MemoryError when not even one token fits."""
        began_s = time.perf_counter()
        self._idle.clear()
        self._tables.apply(plan)
        self._images.apply(plan)
        for sequence in plan.open:
            self._sampler.open(sequence.row, sequence.sampling, sequence.stop, sequence.prompt_tokens)
        self._demote(plan.demote)
        tokens: list[SampledToken] = []
        scores: list[PromptLogprobs] = []
        self._far_blocks_read = 0
        if plan.slices:
            self._take_threads(sum(part.length for part in plan.slices))
            self._compute(plan.slices, tokens, scores)
        counts = tuple((op, name, count) for (op, name), count in take_counts().items())
        self._idle.set()
        work, far_blocks_read = self._images.take_work(), self._far_blocks_read
        forwards = () if self._graphs is None else self._graphs.take_counts()
        return StepResult(plan.step, tuple(tokens), joined(scores), time.perf_counter() - began_s, counts, far_blocks_read, work, forwards)

    def _demote(self, demotes: Sequence[BlockDemote]) -> None:
        """The blocks of all rows at once, layer by layer."""
        for group in dict.fromkeys(demote.group for demote in demotes):
            those = [demote for demote in demotes if demote.group == group]
            sources = np.array([block for demote in those for block in demote.sources], np.int64)
            targets = np.array([block for demote in those for block in demote.targets], np.int64)
            self._pool.demote(group, *upload((sources, targets), self._device))

    def rest(self) -> None:
        """No step is at hand: what can wait may be done in the background until the next one."""
        self._idle.set()

    @torch.inference_mode()
    def warm_up(self, tokens: int) -> None:
        """Compute a few tokens through block 1, which nobody owns yet, so that no request pays for the first use of the libraries."""
        self._decoder.logits(self._hidden(idle_batch(self._pool.layout, 0, tokens))[-1:])
        self._images.warm_up()
        if self._device.type == "cuda":
            self.compile_kernels()
        self._forget_counts()

    @torch.inference_mode()
    def compile_kernels(self) -> None:
        """Use every kernel once that is compiled when it is first met: a step that met them all would take as long as a deadline."""
        layout, ones = self._pool.layout, torch.ones(1, dtype=torch.int64, device=self._device)
        for index, group in enumerate(layout.groups):
            if group.source is not None and self._tables.group_blocks[index]:  # none where the context ends within the window
                self._pool.demote(index, ones, ones)
        hidden = [self._hidden(batch)[-1:] for batch in idle_batches(layout, self._tables.tokens.shape[1] - 1)]
        logits = torch.zeros_like(self._decoder.logits(hidden[-1]))
        self._sampler.open(0, Sampling(), Stop(max_tokens=1), 0)
        zero = np.zeros(1, np.int64)
        Drawing(self._sampler, zero, zero + 1, zero, self._device).tokens(logits, self._tables.tokens)
        self._forget_counts()

    def _forget_counts(self) -> None:
        take_counts()
        if self._graphs is not None:
            self._graphs.take_counts()

    def _take_threads(self, rows: int) -> None:
        threads = worthwhile_threads(self._products, rows) if self._products else torch.get_num_threads()
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _compute(self, slices: Sequence[Slice], tokens: list[SampledToken], scores: list[PromptLogprobs]) -> None:
        try:
            found = self._forward(self._tables.batch(slices))
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            found = None
        if found is not None:
            tokens += found[0]
            scores += found[1]
            return
        # Computing a slice twice is harmless: it writes the same keys and values again, and samples only at its end.
        for half in _halves(slices):
            self._compute(half, tokens, scores)

    def _forward(self, batch: Batch) -> tuple[list[SampledToken], list[PromptLogprobs]]:
        rows = batch.rows[batch.sampled]
        positions = batch.starts[batch.sampled] + batch.lengths[batch.sampled]
        last = batch.query_starts[1:][batch.sampled].astype(np.int64) - 1
        drawing = Drawing(self._sampler, rows, positions, last, self._device) if len(rows) else None
        hidden = self._hidden(batch)
        scores = [self._score(batch, index, hidden) for index in batch.scored.tolist()]
        if drawing is None:
            if self._device.type == "cuda":  # Else a later step would be charged with its time, and with its errors.
                torch.cuda.synchronize(self._device)
            return [], scores
        samples = drawing.tokens(self._decoder.logits(drawing.states(hidden)), self._tables.tokens)
        self._tables.record(rows, positions, samples.tokens)
        return sampled_tokens(rows, samples), scores

    def _hidden(self, batch: Batch) -> Tensor:
        images, device, pool = self._images.context(batch), self._device, self._pool
        replayed = None if self._graphs is None else self._graphs.hidden(batch, images is not None)
        if replayed is not None:
            self._far_blocks_read += replayed[1]
            return replayed[0]
        where = StepTensors.of(batch, device)
        chosen, read = choose(pool, batch, where.tables, self._choices)
        plans = HostPlans(batch, pool.place)
        attend = PagedAttend(self._decoder.spec, pool, where, plans, chosen, self._count_layer)
        tokens, positions = upload((batch.tokens, batch.positions), device)
        hidden = self._decoder.hidden(tokens, positions, attend, images, attend.step(self._done))
        attend.keep_choices()
        self._far_blocks_read += read
        return hidden

    @property
    def layers_done(self) -> int:
        """Layers computed since the start."""
        return int(self._done[0])

    def _count_layer(self) -> None:
        self._done[0] += 1

    def _score(self, batch: Batch, index: int, hidden: Tensor) -> PromptLogprobs:
        """Log-probs of the prompt tokens that follow the positions of one slice, a bounded number of logits rows at a time."""
        row, start = int(batch.rows[index]), int(batch.starts[index])
        sequence = self._tables.opened[row]
        if sequence is None or sequence.prompt_logprobs is None:
            return PromptLogprobs(row, start + 1, ())
        first = int(batch.query_starts[index])
        count = min(int(batch.lengths[index]), sequence.prompt_tokens - 1 - start)
        found: list[TokenLogprob] = []
        for at in range(0, count, SCORED_ROWS):
            end = min(at + SCORED_ROWS, count)
            logits = self._decoder.logits(hidden[first + at : first + end]).float().cpu().numpy()
            targets = self._tables.tokens[row, start + at + 1 : start + end + 1].astype(np.int64)
            found += log_probs(logits, targets, np.full(end - at, sequence.prompt_logprobs))
        return prompt_scores(row, start + 1, found)


def _halves(slices: Sequence[Slice]) -> tuple[Sequence[Slice], Sequence[Slice]]:
    """Half the slices each; of a single slice half its tokens each, the second half carrying what is sampled."""
    if len(slices) > 1:
        middle = len(slices) // 2
        return slices[:middle], slices[middle:]
    only = slices[0]
    if only.length == 1:
        raise MemoryError("one token does not fit into memory")
    half = only.length // 2
    return [only._replace(length=half, want=only.want & ~Want.TOKEN)], [only._replace(start=only.start + half, length=only.length - half)]


def _is_out_of_memory(error: Exception) -> bool:
    """torch reports a failed CPU allocation as a plain RuntimeError."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in str(error)
        or "not enough memory" in str(error)
    )
