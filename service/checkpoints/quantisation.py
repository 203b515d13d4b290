"""Which parameters of a model are quantised when it is served quantised, and what its weights then take. No tensors.

Matrices of the layers take the kind asked for; embedding and head int8 always, since an error there reaches every logit. Where
layers share weights each of them makes the same error again: there attention is int8 too, and int4 what is most of the weights, the
feed-forward. Head gates, norms, biases, vision and fusion stay as they are. Invariant: `weight_bytes` is what the compiled kernels
hold, and never less than any form.
"""

from __future__ import annotations

from service.checkpoints.pieces import parameter_shapes
from service.types.model_spec import ModelSpec

# Outputs of a strip, inputs that are stored together, and those of a group with its float16 scale, as service.kernels lays them out.
_STRIP, _FOUR, _GROUP = 16, 4, 32


def kind_of(parameter: str, shape: tuple[int, ...], quantize: str, spec: ModelSpec) -> str | None:
    """`int8`, `int4` or None (not quantised) for a parameter of a model served with `quantize` none, int8 or int4."""
    if quantize == "none" or len(shape) != 2 or not parameter.endswith(".weight"):
        return None
    if parameter in ("embed.weight", "head.weight"):
        return "int8"
    if not parameter.startswith("layers.") or parameter.endswith(".gate.weight"):
        return None
    return "int8" if spec.sharing is not None and ".attention." in parameter else quantize


def packed_bytes(kind: str, outputs: int, inputs: int) -> int:
    """Bytes of a quantised weight in strips: values and scales."""
    rows = -(-outputs // _STRIP) * _STRIP
    if kind == "int8":
        return rows * (-(-inputs // _FOUR) * _FOUR + 4)
    return rows * -(-inputs // _GROUP) * (_GROUP // 2 + 2)


def weight_bytes(spec: ModelSpec, element_bytes: int, quantize: str) -> int:
    """Bytes of all weights of the model, what is not quantised in elements of `element_bytes`."""
    if quantize == "none":
        return spec.parameters * element_bytes
    total = 0
    for name, shape in parameter_shapes(spec).items():
        kind = kind_of(name, shape, quantize, spec)
        count = 1
        for size in shape:
            count *= size
        total += count * element_bytes if kind is None else packed_bytes(kind, shape[0], shape[1])
    return total
