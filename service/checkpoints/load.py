"""From a Manifest to a Decoder with its weights, streamed chunk by chunk and fused on the way.

It does not know plans or caches. Invariant: never more than the model, one fused matrix and one chunk is held, and every parameter is
filled by finite values or the load fails with the tensor's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

import torch
from torch import Tensor, nn

from service.checkpoints.manifest import Manifest
from service.checkpoints.pieces import Piece, match_hugging_face, match_own
from service.checkpoints.stored_tensors import find_weight_files
from service.checkpoints.weight_readers import BinReader, SafetensorsReader, WeightReader
from service.models.build import build
from service.models.decoder import Decoder
from service.models.layers import Kernels, Linear
from service.types.errors import CheckpointError

Progress = Callable[[int, int], None]


def load(
    manifest: Manifest, device: torch.device | str, dtype: torch.dtype, progress: Progress | None = None, *, serving: bool = True
) -> Decoder:
    """The decoder of a manifest in evaluation mode on `device`, weights in `dtype` and not requiring gradients.

    For `serving` every linear is packed as soon as it is filled and the device's kernels are chosen; otherwise the weights stay plain,
    under their names and differentiable. `progress(done, total)` is called with bytes of the finished model. Raises CheckpointError.
    """
    decoder = build(manifest.spec, "meta", dtype)
    weights = find_weight_files(manifest.directory)
    with SafetensorsReader(weights) if weights.safetensors else BinReader(weights) as reader:
        match = (match_own if manifest.is_own_format else match_hugging_face)(manifest.spec, reader.shapes)
        filling = _Filling(decoder, reader, torch.device(device), dtype, progress)
        for target, pieces in groupby(match.pieces, key=lambda piece: piece.target):
            module = filling.fill(target, pieces)
            if serving and isinstance(module, Linear):
                module.pack()
        for copy, original in match.duplicates:
            filling.compare(copy, original)
    if serving:
        decoder.use(Kernels.resolve(device, dtype))
    return decoder.eval().requires_grad_(False)


class _Filling:
    """One load under way: counts the bytes done and puts each parameter into its module when its last row is there."""

    def __init__(self, decoder: Decoder, reader: WeightReader, device: torch.device, dtype: torch.dtype, progress: Progress | None) -> None:
        self._decoder = decoder
        self._reader = reader
        self._device = device
        self._dtype = dtype
        self._progress = progress
        self._done = 0
        self._total = decoder.spec.parameters * dtype.itemsize

    def fill(self, target: str, pieces: Iterable[Piece]) -> nn.Module:
        """Read all pieces of one parameter, put it into its module and return that module."""
        module_name, _, leaf = target.rpartition(".")
        module = self._decoder.get_submodule(module_name)
        value = torch.empty(getattr(module, leaf).shape, device=self._device, dtype=self._dtype)
        for piece in pieces:
            self._copy(piece.source, value[piece.first_row : piece.first_row + piece.shape[0]].view(-1))
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        return module

    def compare(self, copy: str, original: str) -> None:
        """Check that a stored copy of the embedding equals the embedding loaded."""
        flat = self._decoder.embed.weight.view(-1)
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
