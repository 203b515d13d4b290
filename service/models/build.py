"""From a spec to a module, and from a seed to its first weights.

It does not know files. Invariant: the same spec and seed give the same weights on every device and dtype (drawn in float32 on the CPU).
"""

from __future__ import annotations

import torch
from torch import Tensor

from service.models.decoder import Decoder
from service.types.model_spec import ModelSpec

EMBEDDING_STD = 0.02


def build(spec: ModelSpec, device: torch.device | str, dtype: torch.dtype) -> Decoder:
    """The decoder of `spec` with uninitialised weights; on device "meta" it takes no memory, so that loading can stream into it."""
    return Decoder(spec, device, dtype)


def init_weights(decoder: Decoder, seed: int) -> None:
    """Fill in weights to train from.

    Matrices are normal with variance 1 / inputs, those that write to the residual stream with that over 2 · layers (Radford et al.
    2019); norms are 1, biases 0, gates start at sigmoid(0) = one half. Image tokens start about as large as those of text.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_scale = (2 * len(decoder.spec.layers)) ** -0.5
    for name, parameter in decoder.named_parameters():
        with torch.no_grad():
            parameter.copy_(_first_value(name, parameter, residual_scale, generator))


def _first_value(name: str, parameter: Tensor, residual_scale: float, generator: torch.Generator) -> Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(parameter.shape)
    if name.endswith(".bias"):
        return torch.zeros(parameter.shape)
    drawn = torch.randn(parameter.shape, generator=generator)
    if name == "head.weight" or name.endswith("embed.weight"):
        return drawn * EMBEDDING_STD
    std: float = parameter.shape[1] ** -0.5
    if name == "vision.projector.out.weight":
        return drawn * (std * EMBEDDING_STD)
    return drawn * (std * residual_scale if name.endswith((".out.weight", ".down.weight")) else std)
