"""Plans in, results out, with ONNX Runtime: tables, an exported graph over its own blocks, images, and the sampler. No torch.

Slices become rectangles (`rectangles.py`), each one call of the graph. It does not know processes, messages or how a graph is made.
Invariant: a rectangle that runs out of memory is computed in halves, and nothing that is not finite becomes a token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from service.checkpoints.onnx_graph import Floats, OnnxGraph, Rectangle
from service.engine.batch import Batch, PlanError, Tables
from service.engine.distribution import log_probs
from service.engine.graph_images import GraphImages
from service.engine.rectangles import Costs, Part, rectangles
from service.engine.sampler import Sampler
from service.engine.scores import joined, prompt_scores, sampled_tokens
from service.types.plan import BatchPlan, PromptLogprobs, SampledToken, StepResult


class OnnxBackend:
    """An opened graph with its tables and the images of its sequences."""

    def __init__(self, graph: OnnxGraph, tables: Tables, sampler: Sampler, costs: Costs, images: GraphImages) -> None:
        self._graph = graph
        self._layout = graph.layout
        self._images = images
        self._tables = tables
        self._sampler = sampler
        self._costs = costs
        self._layers = sum(len(group.layers) for group in graph.layout.groups)
        self._done = 0

    @property
    def layers_done(self) -> int:
        """Layers computed and images encoded since the start: it grows while a step gets on."""
        return self._done + self._images.encodings

    def execute(self, plan: BatchPlan) -> StepResult:
        """Run one step. Raises PlanError for a contradictory plan, MemoryError when not even one token fits."""
        began_s = time.perf_counter()
        if plan.demote:
            raise PlanError("a graph has no far blocks")
        self._tables.apply(plan)
        self._images.apply(plan)
        for sequence in plan.open:
            self._sampler.open(sequence.row, sequence.sampling, sequence.stop, sequence.prompt_tokens)
        tokens: list[SampledToken] = []
        scores: list[PromptLogprobs] = []
        calls = 0
        if plan.slices:
            tokens, scores, calls = self._compute(self._tables.batch(plan.slices))
        counts, work = (("decoder", "onnx", calls),), self._images.take_work()
        return StepResult(plan.step, tuple(tokens), joined(scores), time.perf_counter() - began_s, counts, images=work)

    def rest(self) -> None:
        """No step is at hand; nothing waits for that here."""

    def warm_up(self, tokens: int) -> None:
        """Compute a few tokens through block 1, which nobody owns yet, so that no request pays for the runtime's first allocations."""
        table = np.ones((1, -(-tokens // self._layout.block_tokens)), np.int32)
        tables = (table,) * len(self._layout.groups)
        for length in (tokens, 1):
            self._graph.logits(Rectangle(np.zeros((1, length), np.int64), np.zeros(1, np.int64), tables, np.zeros(1, np.int64)))
        self._images.warm_up()

    def _compute(self, batch: Batch) -> tuple[list[SampledToken], list[PromptLogprobs], int]:
        """Sampled tokens in the order of their slices, log-probs of prompts in parts, and the calls of the graph."""
        sampled = {int(index): at for at, index in enumerate(batch.sampled.tolist())}
        drawn = np.empty((len(sampled), self._graph.vocab_size), np.float32)
        scores: list[PromptLogprobs] = []
        scored, calls = set(batch.scored.tolist()), 0
        waiting = list(reversed(list(rectangles(batch, self._layout, self._costs))))
        while waiting:
            parts = waiting.pop()
            wanted = _wanted(parts, sampled, scored)
            try:
                logits = self._call(batch, parts, wanted)
            except MemoryError:
                # Computing a part twice is harmless: it writes the same keys and values again.
                waiting += reversed(_halves(parts))
                continue
            calls += 1
            self._done += self._layers
            at = 0
            for part, count in zip(parts, wanted, strict=True):
                mine = logits[at : at + count]
                at += count
                if part.last and part.number in sampled:
                    drawn[sampled[part.number]] = mine[-1]
                if part.number in scored:
                    scores.append(self._score(batch, part, mine))
        return self._draw(batch, drawn), scores, calls

    def _call(self, batch: Batch, parts: Sequence[Part], wanted: Sequence[int]) -> Floats:
        """Logits of the last `wanted` positions of each part, part after part."""
        length = parts[0].length
        indices = np.array([part.number for part in parts])
        starts = np.array([part.start for part in parts], np.int64)
        positions = starts[:, None] + np.arange(length)
        tokens = self._tables.tokens[batch.rows[indices][:, None], positions].astype(np.int64)
        entries = -(-int(positions[:, -1].max() + 1) // self._layout.block_tokens)
        tables = tuple(table[indices, :entries] for table in batch.block_tables)
        ends = (np.arange(len(parts)) + 1) * length
        rows = [np.arange(end - count, end) for end, count in zip(ends.tolist(), wanted, strict=True)]
        seen = self._images.seen(batch.rows[indices].tolist(), parts)
        logits = self._graph.logits(Rectangle(tokens, starts, tables, np.concatenate(rows).astype(np.int64), seen))
        if seen is not None:
            self._images.count_gates(seen, self._graph.gates)
        return logits

    def _draw(self, batch: Batch, logits: Floats) -> list[SampledToken]:
        if not len(logits):
            return []
        rows = batch.rows[batch.sampled]
        positions = batch.starts[batch.sampled] + batch.lengths[batch.sampled]
        samples = self._sampler.sample(logits, rows, positions, self._tables.tokens)
        self._tables.record(rows, positions, samples.tokens)
        return sampled_tokens(rows, samples)

    def _score(self, batch: Batch, part: Part, logits: Floats) -> PromptLogprobs:
        """Log-probs of the prompt tokens that follow the positions of one part."""
        row = int(batch.rows[part.number])
        sequence = self._tables.opened[row]
        if sequence is None or sequence.prompt_logprobs is None:
            return PromptLogprobs(row, part.start + 1, ())
        count = max(min(part.length, sequence.prompt_tokens - 1 - part.start), 0)
        targets = self._tables.tokens[row, part.start + 1 : part.start + 1 + count].astype(np.int64)
        found = log_probs(logits[:count], targets, np.full(count, sequence.prompt_logprobs)) if count else []
        return prompt_scores(row, part.start + 1, found)


def _wanted(parts: Sequence[Part], sampled: dict[int, int], scored: set[int]) -> list[int]:
    """Of how many positions of each part the logits are wanted: all, the last one, or none."""
    return [part.length if part.number in scored else int(part.last and part.number in sampled) for part in parts]


def _halves(parts: Sequence[Part]) -> list[list[Part]]:
    """Half the parts each; of a single part half its tokens each."""
    if len(parts) > 1:
        middle = len(parts) // 2
        return [list(parts[:middle]), list(parts[middle:])]
    only = parts[0]
    if only.length == 1:
        raise MemoryError("one token does not fit into memory")
    half = only.length // 2
    return [
        [only._replace(length=half, last=False)],
        [only._replace(start=only.start + half, length=only.length - half)],
    ]
