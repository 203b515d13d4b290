"""How parameters are rounded while a checkpoint is read: each by itself, or int4 by what the model's own inputs to it are.

Those inputs are what a text becomes in the layers before, through which it goes as they are read. It does not know weight files or caches.
Invariant: parameters come back in the order in which they were offered, layer by layer, and one layer in plain weights is all that is held;
where layers share weights, all layers.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from service.checkpoints.manifest import Manifest
from service.checkpoints.quantisation import kind_of
from service.checkpoints.quantised_cache import Stored
from service.inputs.tokens import TokenCodec
from service.kernels.calibrated import InputMoments, calibrated_int4
from service.kernels.quantised import quantise_weight
from service.models.attention import DenseAttend
from service.models.decoder import Decoder
from service.types.errors import CheckpointError
from service.types.model_spec import ModelSpec

# Files of the standard library of which the beginnings are the text, the tokens of each, and how many are computed at once.
MODULES = (
    *(
        "argparse.py",
        "calendar.py",
        "collections/__init__.py",
        "configparser.py",
        "csv.py",
        "datetime.py",
        "difflib.py",
        "email/message.py",
    ),
    *(
        "functools.py",
        "http/client.py",
        "logging/__init__.py",
        "random.py",
        "subprocess.py",
        "threading.py",
        "typing.py",
        "urllib/parse.py",
    ),
)
TOKENS, AT_ONCE = 512, 2
# Of which each file's tokens are taken: 16 for a token are more than any vocabulary makes of prose and code.
_CHARACTERS = 16 * TOKENS


class Rounding(Protocol):
    """What becomes of parameters, one after the other."""

    def offer(self, name: str, value: Tensor) -> Iterator[tuple[str, Stored]]:
        """The next parameter as it was read; those that are settled by it come back."""


class Nearest:
    """Every weight is rounded by itself."""

    def __init__(self, quantize: str, spec: ModelSpec) -> None:
        self._quantize = quantize
        self._spec = spec

    def offer(self, name: str, value: Tensor) -> Iterator[tuple[str, Stored]]:
        """This parameter, quantised if it is one that is."""
        kind = kind_of(name, tuple(value.shape), self._quantize, self._spec)
        yield name, value if kind is None else quantise_weight(value.cpu(), kind)


class Calibrated:
    """Layers in int4, calibrated with `tokens` [sequences, length] int64 on its device; all else rounded by itself, or left."""

    def __init__(self, decoder: Decoder, tokens: Tensor) -> None:
        self._decoder = decoder
        self._tokens = tokens
        self._nearest = Nearest("int4", decoder.spec)
        self._held: dict[str, Tensor] = {}
        self._streams: list[tuple[Tensor, Tensor]] = []

    def offer(self, name: str, value: Tensor) -> Iterator[tuple[str, Stored]]:
        """A layer's parameters come back with the first that is none of its own; the final norm follows the last layer."""
        layer = _layer(name)
        shared = layer is not None and self._decoder.spec.sharing is not None
        if self._held and layer != _layer(next(reversed(self._held))) and not shared:
            yield from self._settled()
        if layer is None:
            yield from self._nearest.offer(name, value)
            return
        module, _, leaf = name.rpartition(".")
        setattr(self._decoder.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
        self._held[name] = value

    def _settled(self) -> Iterator[tuple[str, Stored]]:
        """What is held, rounded for the inputs that its layers see."""
        moments = self._moments()
        for name in list(self._held):
            value = self._held.pop(name)
            if name in moments:
                yield name, calibrated_int4(value.cpu(), moments.pop(name))
            else:
                yield from self._nearest.offer(name, value)

    @torch.inference_mode()
    def _moments(self) -> dict[str, InputMoments]:
        """Those of the inputs to each weight that becomes int4; the layers that are held are passed once."""
        moments, hooks = {}, []
        for name, value in self._held.items():
            if kind_of(name, tuple(value.shape), "int4", self._decoder.spec) == "int4":
                moments[name] = InputMoments(value.shape[1])
                module = self._decoder.get_submodule(name.removesuffix(".weight"))
                hooks.append(module.register_forward_pre_hook(partial(_count, moments[name])))
        for index in dict.fromkeys(map(_layer, self._held)):
            self._pass(self._decoder.layers[index or 0])
        for hook in hooks:
            hook.remove()
        return moments

    def _pass(self, layer: nn.Module) -> None:
        """All sequences through one layer, whose results are the next one's inputs."""
        decoder, length = self._decoder, self._tokens.shape[1]
        if not self._streams:
            updates = (decoder.embed(tokens.reshape(-1)) for tokens in torch.split(self._tokens, AT_ONCE))
            self._streams = [(update, torch.zeros_like(update)) for update in updates]
        for number, (update, residual) in enumerate(self._streams):
            count = len(update) // length
            rotation = decoder.rope.rows(torch.arange(length, device=update.device).repeat(count))
            self._streams[number] = layer(update, residual, rotation, DenseAttend(count, length, decoder.spec.layers))


def calibration_tokens(manifest: Manifest) -> Tensor:
    """[sequences, length] int64: the beginnings of MODULES, prose and code, in the checkpoint's own tokens. Raises CheckpointError."""
    codec, spec, library = TokenCodec.load(manifest.directory), manifest.spec, Path(sysconfig.get_path("stdlib"))
    length, rows = min(TOKENS, spec.context_tokens), []
    for name in MODULES:
        try:
            text = (library / name).read_text(encoding="utf-8")[:_CHARACTERS]
        except OSError:
            raise CheckpointError(
                f"int4 weights are calibrated with {name}, which this Python lacks: install its library's sources."
            ) from None
        row = codec.encode(text)[:length]
        if len(row) < length or max(row) >= spec.vocab_size:
            raise CheckpointError(
                f"{manifest.directory}: the tokenizer makes ids beyond {spec.vocab_size - 1}, the model's last, so int4 weights cannot be "
                "calibrated: mend the tokenizer, or set --quantize int8."
            )
        rows.append(row)
    return torch.tensor(rows)


def _count(moments: InputMoments, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    moments.add(inputs[0].cpu())


def _layer(name: str) -> int | None:
    """The number of the layer that a parameter belongs to, if any."""
    first, number, *_ = (*name.split("."), "")
    return int(number) if first == "layers" else None
