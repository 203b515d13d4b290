"""What a training pass minimises: the loss of the next token, whole or segment by segment, alone or beside a teacher's.

It does not know optimisers, schedules or devices. Invariant: the parts of a pass add up to its loss summed over tokens, in nats; the caller
takes the gradient of each part before it asks for the next, so that no more than one part's activations live at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from service.models.attention import DenseAttend, SegmentAttend
from service.models.decoder import Decoder


class Batch(NamedTuple):
    """Flat sequences of equal `length`: inputs and targets [sequences · length] int64."""

    inputs: Tensor
    targets: Tensor
    length: int


class Objective(Protocol):
    """A loss in parts."""

    def parts(self, model: Decoder, batch: Batch) -> Iterator[Tensor]:
        """Losses summed over tokens, in nats, float32, differentiable; to be used up one by one."""


def sequence_loss(model: Decoder, inputs: Tensor, targets: Tensor, length: int) -> Tensor:
    """Summed cross entropy in nats, float32, of flat sequences [sequences * length] of equal length; differentiable."""
    sequences = len(inputs) // length
    positions = torch.arange(length, device=inputs.device).repeat(sequences)
    logits = model(inputs, positions, DenseAttend(sequences, length, model.spec.layers))
    return F.cross_entropy(logits.float(), targets, reduction="sum")


@dataclass(frozen=True, slots=True)
class NextToken:
    """Cross entropy of whole sequences. `loss` is `sequence_loss` or a compiled form of it."""

    loss: Callable[[Decoder, Tensor, Tensor, int], Tensor] = sequence_loss

    def parts(self, model: Decoder, batch: Batch) -> Iterator[Tensor]:
        """One part."""
        yield self.loss(model, batch.inputs, batch.targets, batch.length)


@dataclass(frozen=True, slots=True)
class Segmented:
    """Cross entropy segment by segment, each of `segment_tokens`, over the keys and values that earlier segments left.

    `memory_tokens` 0 keeps all of the sequence. The loss is that of the whole sequence, the gradient stays within a segment, and memory is
    a segment's: long contexts become affordable.
    """

    segment_tokens: int
    memory_tokens: int = 0

    def parts(self, model: Decoder, batch: Batch) -> Iterator[Tensor]:
        """One part a segment."""
        sequences = len(batch.inputs) // batch.length
        size = min(self.segment_tokens, batch.length)
        attend = SegmentAttend(sequences, size, model.spec.layers, self.memory_tokens or None)
        inputs, targets = (flat.view(sequences, batch.length) for flat in (batch.inputs, batch.targets))
        for start in range(0, batch.length, size):
            positions = torch.arange(start, start + size, device=inputs.device).repeat(sequences)
            logits = model(inputs[:, start : start + size].reshape(-1), positions, attend)
            yield F.cross_entropy(logits.float(), targets[:, start : start + size].reshape(-1), reduction="sum")
            attend.advance()


@dataclass(frozen=True, slots=True)
class Distilled:
    """The student's cross entropy, and its distance from a teacher that reads the same tokens (Hinton et al. 2015).

    Loss = (1 − kl − mse) · cross entropy + kl · T² · KL(teacher ‖ student at temperature T) + mse · mean squared difference of the two
    rows of logits, each less its mean (a constant added to a row changes no probability).
    """

    teacher: Decoder
    kl: float
    mse: float
    temperature: float

    def parts(self, model: Decoder, batch: Batch) -> Iterator[Tensor]:
        """One part."""
        sequences = len(batch.inputs) // batch.length
        positions = torch.arange(batch.length, device=batch.inputs.device).repeat(sequences)
        with torch.no_grad():
            attend = DenseAttend(sequences, batch.length, self.teacher.spec.layers)
            wanted = self.teacher(batch.inputs, positions, attend).float()
        given = model(batch.inputs, positions, DenseAttend(sequences, batch.length, model.spec.layers)).float()
        yield self.loss(given, wanted, batch.targets)

    def loss(self, given: Tensor, wanted: Tensor, targets: Tensor) -> Tensor:
        """Summed loss of student logits against teacher logits [tokens, vocab] and the true next tokens [tokens]."""
        heat = self.temperature
        hard = F.cross_entropy(given, targets, reduction="sum")
        soft = F.kl_div((given / heat).log_softmax(-1), (wanted / heat).log_softmax(-1), reduction="sum", log_target=True) * heat**2
        rows = (given - given.mean(-1, keepdim=True)) - (wanted - wanted.mean(-1, keepdim=True))
        return (1 - self.kl - self.mse) * hard + self.kl * soft + self.mse * rows.square().mean(-1).sum()
