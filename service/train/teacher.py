"""The teacher of a distillation: a checkpoint that reads the same tokens as its student.

It does not know losses. Invariant: the student gets the teacher's tokenizer and vocabulary, so that logits can be compared row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from service.checkpoints.load import load
from service.checkpoints.manifest import Manifest, read_manifest
from service.inputs.bpe import BpeTokenizer
from service.models.decoder import Decoder
from service.types.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Teacher:
    """A checkpoint to learn from, not loaded yet."""

    manifest: Manifest
    tokenizer: BpeTokenizer

    @property
    def artifact(self) -> str:
        """What it is called in rows and cards."""
        name = self.manifest.family if self.manifest.line is None else f"v{self.manifest.line}"
        return f"{name}@{self.manifest.digest[:12]}"

    def load(self, device: torch.device) -> Decoder:
        """Its decoder in float32, without gradients."""
        return load(self.manifest, device, torch.float32, serving=False)


def read_teacher(directory: Path) -> Teacher:
    """The checkpoint in `directory`. Raises CheckpointError, and SettingsError for a tokenizer that is not one of ours."""
    manifest = read_manifest(directory)
    tokenizer = BpeTokenizer.load(directory)
    try:
        ends = tokenizer.end_id in manifest.spec.end_ids
    except KeyError:
        ends = False
    if not ends or tokenizer.vocab_size != manifest.spec.vocab_size:
        raise SettingsError(f"The teacher in {directory} has another kind of tokenizer: a student is taught by a model of a version line.")
    return Teacher(manifest, tokenizer)
