"""Checkpoints that a run begins with or learns from: the model that is trained on, the teacher of a distillation.

It does not know losses. Invariant: the run gets the checkpoint's tokenizer, so that weights and logits mean the same tokens.
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
class Source:
    """A checkpoint of ours, not loaded yet."""

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


def read_source(directory: Path) -> Source:
    """The checkpoint in `directory`. Raises CheckpointError, and SettingsError for a tokenizer that is not one of ours."""
    manifest = read_manifest(directory)
    tokenizer = BpeTokenizer.load(directory)
    try:
        ends = tokenizer.end_id in manifest.spec.end_ids
    except KeyError:
        ends = False
    if not ends or tokenizer.vocab_size != manifest.spec.vocab_size:
        raise SettingsError(f"{directory} has another kind of tokenizer: training begins with, and learns from, models of a version line.")
    return Source(manifest, tokenizer)
