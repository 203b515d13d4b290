"""From a Manifest to a Decoder with its weights, streamed chunk by chunk, fused and quantised on the way.

It does not know plans or caches. Invariant: never more than the model, one fused matrix and one chunk is held (for int4 one layer, and what
8,192 tokens are before it), and every parameter is filled by finite values or the load fails with the tensor's name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from service.checkpoints.calibration import Calibrated, Nearest, calibration_tokens
from service.checkpoints.manifest import Manifest
from service.checkpoints.pieces import Match, Piece, match_hugging_face, match_own
from service.checkpoints.quantised_cache import CacheWriter, Damaged, QuantisedCache, Stored, layout_of, read_parameters, say_not_kept
from service.checkpoints.stored_tensors import find_weight_files
from service.checkpoints.weight_readers import BinReader, SafetensorsReader, WeightReader
from service.kernels.quantised import QuantisedWeight
from service.models.build import build
from service.models.decoder import Decoder
from service.models.layers import Embedding, Kernels, Linear
from service.types.errors import CheckpointError

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What becomes of the weights: `kind` none, int8 or int4, and where the quantised ones are kept for the next start, if anywhere.

    `seen(name, parameter)` is called with every parameter that is read from the checkpoint and not from the cache.
    """

    kind: str = "none"
    cache: QuantisedCache | None = None
    seen: Callable[[str, Stored], None] = lambda name, parameter: None


def load(
    manifest: Manifest,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Progress | None = None,
    *,
    serving: bool = True,
    quantisation: Quantisation = Quantisation(),
) -> Decoder:
    """The decoder of a manifest in evaluation mode on `device`, weights in `dtype` and not requiring gradients.

    For `serving` every linear is packed as soon as it is filled, quantised before where `quantisation` says so, and the device's kernels
    are chosen; otherwise the weights stay plain, under their names and differentiable. `progress(done, total)` is called with bytes of the
    finished model. Raises CheckpointError.
    """
    place = torch.device(device)
    decoder = None
    if serving and quantisation.kind != "none" and quantisation.cache is not None:
        decoder = _load_cached(manifest, place, dtype, quantisation)
    if decoder is None:
        decoder = _load_checkpoint(manifest, place, dtype, progress, quantisation if serving else None)
    if serving:
        decoder.use(Kernels.resolve(device, dtype))
    return decoder.eval().requires_grad_(False)


def _load_checkpoint(
    manifest: Manifest, device: torch.device, dtype: torch.dtype, progress: Progress | None, quantisation: Quantisation | None
) -> Decoder:
    """Weights from the checkpoint's own files; `quantisation` None leaves them plain. Fills the cache on the way."""
    decoder = build(manifest.spec, "meta", dtype)
    weights = find_weight_files(manifest.directory)
    writing = _cache_writer(manifest, dtype, quantisation) if quantisation is not None else None
    with SafetensorsReader(weights) if weights.safetensors else BinReader(weights) as reader, writing or nullcontext() as writer:
        match: Match = (match_own if manifest.is_own_format else match_hugging_face)(manifest.spec, reader.shapes)
        filling = _Filling(decoder, reader, device, dtype, progress)
        kind = "none" if quantisation is None else quantisation.kind
        rounding = Calibrated(decoder, calibration_tokens(manifest).to(device)) if kind == "int4" else Nearest(kind, manifest.spec)
        for target, pieces in groupby(match.pieces, key=lambda piece: piece.target):
            value = filling.read(target, pieces)
            for copy, original in match.duplicates if target == "embed.weight" else ():
                filling.compare(copy, original, value)
            for name, stored in rounding.offer(target, value):
                if writer is not None:
                    writer.add(stored)
                if quantisation is not None:
                    quantisation.seen(name, stored)
                _settle(decoder, name, stored, device, dtype, pack=quantisation is not None)
        if writer is not None:
            writer.publish()
            if writer.failure is not None:
                say_not_kept(str(writer.failure.strerror))
    return decoder


def _cache_writer(manifest: Manifest, dtype: torch.dtype, quantisation: Quantisation) -> CacheWriter | None:
    if quantisation.kind == "none" or quantisation.cache is None:
        return None
    layout = layout_of(manifest, quantisation.kind, dtype)
    return quantisation.cache.write(quantisation.cache.path(manifest, quantisation.kind, dtype), layout)


def _load_cached(manifest: Manifest, device: torch.device, dtype: torch.dtype, quantisation: Quantisation) -> Decoder | None:
    """The decoder with quantised weights of an earlier start, or None where there are none; damaged ones are removed and said."""
    if quantisation.cache is None:
        return None
    path = quantisation.cache.path(manifest, quantisation.kind, dtype)
    layout = layout_of(manifest, quantisation.kind, dtype)
    decoder = build(manifest.spec, "meta", dtype)
    try:
        for target, stored in read_parameters(path, manifest.spec, layout, quantisation.kind):
            _settle(decoder, target, stored, device, dtype, pack=True)
    except Damaged as damage:
        print(f"quantised weights are made again: {damage}", file=sys.stderr, flush=True)
        path.unlink(missing_ok=True)
        return None
    except OSError:
        return None
    return decoder


def _settle(decoder: Decoder, target: str, stored: Stored, device: torch.device, dtype: torch.dtype, *, pack: bool) -> None:
    """Put a parameter into its module and, to serve, into the form in which it serves."""
    name, _, leaf = target.rpartition(".")
    module = decoder.get_submodule(name)
    if isinstance(stored, QuantisedWeight):
        if not isinstance(module, Linear | Embedding):
            raise TypeError(f"{target} cannot be quantised")
        module.take(stored, device, dtype)
        return
    setattr(module, leaf, nn.Parameter(stored.to(device), requires_grad=False))
    if pack and isinstance(module, Linear) and leaf == "weight":
        module.pack()


class _Filling:
    """One load under way: counts the bytes done, and reads each parameter whole."""

    def __init__(self, decoder: Decoder, reader: WeightReader, device: torch.device, dtype: torch.dtype, progress: Progress | None) -> None:
        self._decoder = decoder
        self._reader = reader
        self._device = device
        self._dtype = dtype
        self._progress = progress
        self._done = 0
        self._total = decoder.spec.parameters * dtype.itemsize

    def read(self, target: str, pieces: Iterable[Piece]) -> Tensor:
        """Read all pieces of one parameter."""
        module_name, _, leaf = target.rpartition(".")
        module = self._decoder.get_submodule(module_name)
        value = torch.empty(getattr(module, leaf).shape, device=self._device, dtype=self._dtype)
        for piece in pieces:
            self._copy(piece.source, value[piece.first_row : piece.first_row + piece.shape[0]].view(-1))
        return value

    def compare(self, copy: str, original: str, value: Tensor) -> None:
        """Check that a stored copy of the embedding equals the embedding read."""
        flat = value.view(-1)
        for start, chunk in self._reader.chunks(copy):
            if not torch.equal(flat[start : start + chunk.numel()], chunk.to(flat)):
                raise CheckpointError(f"{copy} differs from {original}, and the configuration ties them: one of the two is wrong.")

    def _copy(self, source: str, flat: Tensor) -> None:
        for start, chunk in self._reader.chunks(source):
            part = flat[start : start + chunk.numel()]
            part.copy_(chunk)
            self._require_finite(source, chunk, part)
            self._done += part.numel() * self._dtype.itemsize
            if self._progress is not None:
                self._progress(self._done, self._total)

    def _require_finite(self, source: str, chunk: Tensor, part: Tensor) -> None:
        """One pass for the smallest and largest value; NaN and infinities show in them."""
        if part.numel() and not torch.stack(torch.aminmax(part)).isfinite().all():
            if torch.stack(torch.aminmax(chunk)).isfinite().all():
                raise CheckpointError(f"{source} has values too large for {str(self._dtype).removeprefix('torch.')}: use --dtype bfloat16.")
            raise CheckpointError(f"{source} holds values that are not finite numbers: the weights are damaged.")
