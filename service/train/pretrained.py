"""Models of the version lines for Python code: load one, call it, train it on, save it.

    from service.train.pretrained import DeepSeekV23

    model = DeepSeekV23.from_pretrained("deepseek/v2.3")  # the bundled one, or a directory
    model.gradient_checkpointing_enable()
    loss = model(tokens, targets).loss

It does not know optimisers or serving. Invariant: a class loads checkpoints of its own line and refuses others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.checkpoints.bundled import bundled_directory
from service.checkpoints.load import load
from service.checkpoints.manifest import Manifest, read_manifest
from service.checkpoints.store import save
from service.models.attention import DenseAttend
from service.models.decoder import Decoder
from service.types.catalog import V1_0, V2_3, V3_5, V4_8, V5_2, VersionLine, find_line
from service.types.errors import CheckpointError
from service.types.model_spec import ModelSpec

PREFIX = "deepseek/"
# Files beside the weights that are kept when a model is saved again.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Output(NamedTuple):
    """Logits [sequences, length, vocab], and the mean loss in nats where targets were given."""

    logits: Tensor
    loss: Tensor | None


class VersionedModel(nn.Module):
    """A decoder of one line with its tokenizer's files. Text only: images go through the service."""

    line: ClassVar[VersionLine]

    def __init__(self, decoder: Decoder, tokenizer: Mapping[str, bytes]) -> None:
        super().__init__()
        self.decoder = decoder
        self._tokenizer = dict(tokenizer)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Self:
        """The model in a directory, or the bundled one of a line named `deepseek/vX.Y`; trainable, in training mode.

        Raises CheckpointError when it is of another line, incomplete or damaged.
        """
        directory = _directory(str(source))
        manifest = read_manifest(directory)
        cls._check(manifest)
        decoder = load(manifest, device, dtype, serving=False).requires_grad_(True).train()
        return cls(decoder, {name: (directory / name).read_bytes() for name in _TOKENIZER_FILES if (directory / name).is_file()})

    @classmethod
    def _check(cls, manifest: Manifest) -> None:
        if manifest.line != cls.line.number:
            found = manifest.family if manifest.line is None else f"line v{manifest.line}"
            raise CheckpointError(f"{manifest.directory} is of {found}, and {cls.__name__} loads line {cls.line.label}.")

    @property
    def spec(self) -> ModelSpec:
        """What the network is."""
        return self.decoder.spec

    def gradient_checkpointing_enable(self) -> None:
        """Compute layers again in the backward pass instead of keeping their activations."""
        self.decoder.gradient_checkpointing_enable()

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Output:
        """tokens and targets [sequences, length] int64; targets are the tokens that follow, −100 where none counts."""
        sequences, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).repeat(sequences)
        logits = self.decoder(tokens.reshape(-1), positions, DenseAttend(sequences, length, self.spec.layers))
        loss = None if targets is None else F.cross_entropy(logits.float(), targets.reshape(-1))
        return Output(logits.view(sequences, length, -1), loss)

    def save_pretrained(self, directory: str | Path, dtype: str = "bfloat16") -> Manifest:
        """Publish the model as a directory that `deepseek-serve --model` takes; weights stored as `dtype`. Raises CheckpointError."""
        return save(Path(directory), self.spec, self.decoder.state_dict(), self._tokenizer, dtype=dtype)


class DeepSeekV10(VersionedModel):
    """A model of line v1.0."""

    line = V1_0


class DeepSeekV23(VersionedModel):
    """A model of line v2.3."""

    line = V2_3


class DeepSeekV35(VersionedModel):
    """A model of line v3.5."""

    line = V3_5


class DeepSeekV48(VersionedModel):
    """A model of line v4.8."""

    line = V4_8


class DeepSeekV52(VersionedModel):
    """A model of line v5.2. It reads all of a sequence, as in training: far blocks are how a server reads it."""

    line = V5_2


def _directory(source: str) -> Path:
    if not source.startswith(PREFIX):
        return Path(source)
    line = find_line(source.removeprefix(PREFIX))
    if line is None or not bundled_directory(line).is_dir():
        raise CheckpointError(f"{source} is not bundled: name a line that is, such as deepseek/v2.3, or a directory.")
    return bundled_directory(line)
