"""Training batches in which some sequences are questions about pictures, and the loss that shows the pictures to the model.

A picture's tokens travel as negative ids: −1 − index, once for each image token. It does not know where pictures come from. Invariants:
a batch depends on its position alone, as a text stream's does; only answers and text are learned, questions and padding are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from service.inputs.bpe import BpeTokenizer
from service.models.attention import DenseAttend
from service.models.decoder import Decoder
from service.models.fusion import ImageContext, SeenImages
from service.train.objective import Batch, NextToken, Objective
from service.train.pictures import PictureSet, Pixels, Question
from service.train.stream import Tokens, TokenStream
from service.types.vision import Grid

IGNORED = -100
ANSWER_LENGTH = 64  # tokens of a question with its pictures and answer, at most


@dataclass(frozen=True, slots=True)
class Pictures:
    """A picture set as a model is shown it: prepared `pixels` of one `grid`, and the weight of the answers.

    They are asked about in that share of the sequences (by their length), or with `tokens` in that share of the passes, whose sequences
    then have `tokens` each.
    """

    found: PictureSet
    pixels: Pixels
    grid: Grid
    shares: dict[int, float]
    weight: float
    tokens: int = 0


class PictureStream(TokenStream):
    """A text stream some of whose sequences are questions, drawn by (seed, length, index)."""

    def __init__(
        self, documents: list[list[int]], tokenizer: BpeTokenizer, seed: int, pictures: Pictures, *, aligned: bool = False
    ) -> None:
        super().__init__(documents, tokenizer.end_id, seed, aligned=aligned)
        self._tokenizer = tokenizer
        self._pictures = pictures
        self._salt = seed

    def batch(self, position: int, sequences: int, length: int) -> tuple[Tokens, Tokens]:
        """As a text stream's; pictures' tokens are negative in the inputs, and targets that are not learned are IGNORED."""
        inputs, targets = (flat.reshape(sequences, length).copy() for flat in super().batch(position, sequences, length))
        for row in range(0 if self._pictures.tokens else sequences):
            draw = Random(f"pictures:{self._salt}:{length}:{position // length + row}")
            if draw.random() < self._pictures.shares[length]:
                inputs[row], targets[row] = self.example(self._pictures.found.ask(draw, self._pictures.found.train), length)
        return inputs.reshape(-1), targets.reshape(-1)

    def one_pass(self, position: int, tokens: int, length: int) -> tuple[Tokens, Tokens, int]:
        """As a text stream's; where a pass asks, all of its sequences do."""
        part = self._pictures
        draw = Random(f"passes:{self._salt}:{length}:{position}")
        if not part.tokens or draw.random() >= part.shares[length]:
            return super().one_pass(position, tokens, length)
        asked = [self.example(part.found.ask(draw, part.found.train), part.tokens) for _ in range(tokens // part.tokens)]
        inputs, targets = (np.concatenate(arrays) for arrays in zip(*asked, strict=True))
        return inputs, targets, part.tokens

    def example(self, question: Question, length: int) -> tuple[Tokens, Tokens]:
        """One question with its answer, each [length]: what the chat template writes with the pictures before the question."""
        ids, answer = self._ids(question)
        row = np.full(length + 1, self._tokenizer.end_id, np.int64)
        row[: len(ids)] = ids
        targets = np.full(length, IGNORED, np.int64)
        targets[len(ids) - len(answer) - 1 : len(ids) - 1] = answer
        return row[:-1], targets

    def tokens_of(self, question: Question) -> int:
        """Tokens of a question with its pictures and answer."""
        return len(self._ids(question)[0])

    def _ids(self, question: Question) -> tuple[list[int], list[int]]:
        """All ids, and those of the answer that they end with."""
        shown = [-1 - index for index in question.pictures for _ in range(self._pictures.grid.tokens)]
        user, *asked = self._tokenizer.encode_chat(question.text)
        answer = [*self._tokenizer.encode([question.answer])[0], self._tokenizer.end_id]
        return [user, *shown, *asked, *answer], answer


class Pictured:
    """Cross entropy of text and, with the weight of `pictures`, of answers. `text` is the loss of a pass that shows no picture."""

    def __init__(self, pictures: Pictures, device: torch.device, text: Objective) -> None:
        self._text = text
        self._pixels = torch.from_numpy(pictures.pixels).to(device)
        self._grid = pictures.grid
        self._weight = pictures.weight

    def parts(self, model: Decoder, batch: Batch) -> Iterator[Tensor]:
        """One part."""
        if not (batch.inputs < 0).any():
            yield from self._text.parts(model, batch)
            return
        losses = F.cross_entropy(self.logits(model, batch).float(), batch.targets, reduction="none", ignore_index=IGNORED)
        asked = (batch.inputs.view(-1, batch.length) < 0).any(1).repeat_interleave(batch.length)
        yield (losses * torch.where(asked, self._weight, 1.0)).sum()

    def logits(self, model: Decoder, batch: Batch) -> Tensor:
        """What the model says after each token of sequences that show pictures, [tokens, vocab]."""
        sequences = len(batch.inputs) // batch.length
        positions = torch.arange(batch.length, device=batch.inputs.device).repeat(sequences)
        tokens = batch.inputs.where(batch.inputs >= 0, model.spec.image_id or 0)
        attend = DenseAttend(sequences, batch.length, model.spec.layers)
        logits: Tensor = model(tokens, positions, attend, images=self.context(model, batch))
        return logits

    def context(self, model: Decoder, batch: Batch) -> ImageContext | None:
        """The pictures that negative ids of the inputs name, encoded once each."""
        shown = batch.inputs < 0
        at = shown.nonzero()[:, 0]
        if model.vision is None or model.fusion is None or not len(at):
            return None
        wanted = -1 - batch.inputs[at].view(-1, self._grid.tokens)[:, 0]
        unique, inverse = torch.unique(wanted, return_inverse=True)
        encoded = model.vision(self._pixels[unique], self._grid)[inverse].flatten(0, 1)
        keys, values = model.fusion.keys_values(encoded)
        rows, seen, done = [], [], 0
        for sequence, mask in enumerate(shown.view(-1, batch.length)):
            count = int(mask.sum())
            if not count:
                continue
            first = int(mask.nonzero()[0, 0])
            rows.append(torch.arange(first, batch.length, device=at.device) + sequence * batch.length)
            part = slice(done, done + count)
            seen.append(SeenImages(batch.length - first, keys[part], values[part], mask[first:].cumsum(0)))
            done += count
        return ImageContext(at, encoded, torch.cat(rows), seen)


@torch.no_grad()
def right_answers(model: Decoder, stream: PictureStream, pictures: Pictures, number: int) -> dict[str, float]:
    """The share of `number` questions of each kind about pictures held out whose whole answer is the likeliest, token by token."""
    device = next(model.parameters()).device
    objective, found = Pictured(pictures, device, NextToken()), pictures.found
    shares: dict[str, float] = {}
    for kind in found.kinds:
        draw = Random(f"held out {kind}")
        examples = [stream.example(found.ask(draw, found.held_out, kind), ANSWER_LENGTH) for _ in range(number)]
        inputs, targets = (torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*examples, strict=True))
        right = (objective.logits(model, Batch(inputs, targets, ANSWER_LENGTH)).argmax(-1) == targets) | (targets == IGNORED)
        shares[kind] = float(right.view(number, -1).all(1).float().mean())
    return shares
