"""All layers of a decoder in one call of the compiled kernels: quantised products, paged attention and what lies between them.

A step of few rows is bound by the calls and not by their work; here its threads stay in one parallel region from the first layer to the
last. It does not know modules or who owns a block. Invariant: the results have the same bits as the separate compiled kernels give.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from service.kernels.kv_store import row_size
from service.kernels.native.attention import NO_WINDOW
from service.kernels.native.binding import KEPT, STORED, functions
from service.kernels.native.far_store import FarBounds, has_plain_bounds
from service.kernels.native.linear import OrderedLinear
from service.kernels.native.quantised import NativeQuantisedLinear
from service.kernels.reference_sparse import FIRST_STAGE, SECOND_STAGE, FarBlocks
from service.kernels.workspace import Workspace

_WORKSPACE = Workspace()
_size, _pointer, _float = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One layer: its products with their biases in place, norm weights float32, and how it attends.

    `products` are qkv, out, gate and up, down; `norms` those of attention, feed-forward, queries and keys; `gate` the linear layer of the
    heads' gates with its bias, None where they have none. Where it reads far blocks behind its window, `refresh` tokens share a choice (0:
    it reads none) and `sink_blocks` come before.
    """

    products: tuple[NativeQuantisedLinear, NativeQuantisedLinear, NativeQuantisedLinear, NativeQuantisedLinear]
    norms: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    window: int | None
    scale: float
    softcap: float | None
    gate: tuple[OrderedLinear, Tensor | None] | None = None
    refresh: int = 0
    sink_blocks: int = 0


class FarStep(NamedTuple):
    """What the rows of a step read of one far group, whose L layers make choices for A anchors.

    `tables` int32 [S, M]; `choices` int32 [L, A, Hkv, most], of which each layer's are written for the F anchors `places` int64 [F]; the
    others are there. `counts` int32 [A], `anchors` int64 [T]. Fresh anchor f asks by the query of row query_rows[f] of sequence
    sequences[f], int64 [F]; `ends` and `budgets` int32 [F] as in `choose_far`.
    """

    tables: Tensor
    choices: Tensor
    counts: Tensor
    anchors: Tensor
    places: Tensor
    query_rows: Tensor
    sequences: Tensor
    ends: Tensor
    budgets: Tensor


class FarLayer(NamedTuple):
    """A layer's far store, the index of its far group in `PagedStep.far`, and the layer's place in that group."""

    blocks: FarBlocks
    group: int
    place: int


@dataclass(frozen=True, slots=True)
class PagedStep:
    """Where a step's S sequences and T rows stand in the cache.

    `stores` are keys [N, Hkv, B, D] and values of every layer, the same object as long as they are the same; `group_of` is each layer's
    group. For each group a table int32 [S, M] and the block of every row int64 [T]; offsets int64 [T], query_starts int32 [S + 1] and
    context_lengths int32 [S]. `done` int64 [1] is counted up with every layer. `far_layers` are the far stores of every layer, None where
    it has none; `far` is what the step reads of each far group, None where it reads nothing.
    """

    stores: tuple[tuple[Tensor, Tensor], ...]
    group_of: tuple[int, ...]
    tables: Sequence[Tensor]
    block_ids: Sequence[Tensor]
    offsets: Tensor
    query_starts: Tensor
    context_lengths: Tensor
    done: Tensor
    far_layers: tuple[FarLayer | None, ...] = ()
    far: Sequence[FarStep | None] = ()


class _Layer(ctypes.Structure):
    """`struct layer` of decoder.c."""

    _fields_ = (
        *((name, _pointer) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, _pointer) for name in ("gate", "gate_bias", "qkv", "out", "gate_up", "down")),
        *((name, _size) for name in ("heads", "kv_heads", "head_dim", "hidden", "window", "group")),
        *((name, _float) for name in ("scale", "softcap")),
        *((name, _pointer) for name in ("keys", "values")),
        *((name, _size * 3) for name in ("key_strides", "value_strides")),
        *((name, _size) for name in ("refresh", "sink_blocks")),
        ("store", _pointer),
        *((name, _size) for name in ("far_group", "far_place")),
    )


class _FarStore(ctypes.Structure):
    """`struct far_store` of decoder.c."""

    _fields_ = (
        *((name, _size) for name in ("type", "key_size", "value_size")),
        *((name, _pointer) for name in ("keys", "values", "key_scales", "value_scales")),
        ("bounds", FarBounds),
    )

    @classmethod
    def of(cls, blocks: FarBlocks) -> _FarStore:
        """The store of one layer, which must stay where it is. Raises ValueError for one that does not lie as kernels take it."""
        if not has_plain_bounds(blocks) or not all(tensor is None or tensor.is_contiguous() for tensor in blocks[:4]):
            raise ValueError("far blocks of whole layers must be contiguous, and bounds of blocks within a block and head")
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in blocks[:4])
        return cls(STORED[blocks.keys.dtype], blocks.keys.shape[3], blocks.values.shape[3], *pointers, FarBounds.of(blocks))


class _FarGroup(ctypes.Structure):
    """`struct far_group` of decoder.c."""

    _fields_ = (
        ("table", _pointer),
        *((name, _size) for name in ("stride", "most", "layer_choices", "fresh")),
        *((name, _pointer) for name in ("choices", "counts", "anchors", "places", "query_rows", "sequences", "ends", "budgets")),
    )

    @classmethod
    def of(cls, step: FarStep | None) -> _FarGroup:
        """What is read, or that nothing is."""
        if step is None:
            return cls()
        choices = step.choices
        if not step.tables.is_contiguous() or not choices.is_contiguous():
            raise ValueError("far tables and choices of whole layers must be contiguous")
        sizes = step.tables.shape[1], choices.shape[3], choices.stride(0), len(step.places)
        return cls(step.tables.data_ptr(), *sizes, *(t.data_ptr() for t in step[1:]))


class _Group(ctypes.Structure):
    """`struct group` of decoder.c."""

    _fields_ = (("table", _pointer), ("stride", _size), ("block_ids", _pointer))


class _Step(ctypes.Structure):
    """`struct step` of decoder.c."""

    _fields_ = (
        *((name, _pointer) for name in ("layers", "groups", "far_groups")),
        *((name, _size) for name in ("first_stage", "second_stage", "layer_count", "rows", "dim", "half")),
        *((name, _size) for name in ("sequences", "block_tokens", "kv_type")),
        ("eps", _float),
        *((name, _pointer) for name in ("update", "residual", "cos", "sin", "offsets", "starts", "contexts", "done")),
    )


class BoundLayers:
    """The layers of one decoder as the call takes them. `eps` is that of every norm."""

    def __init__(self, parts: Sequence[LayerParts], eps: float) -> None:
        """Raises ValueError for norm weights or gates of another type than float32."""
        self._parts = tuple(parts)
        self.eps = eps
        self.dim = self._parts[0].products[0].inputs
        self._stores: object = None
        self._far_layers: object = None
        self.layers = (_Layer * len(self._parts))()
        for layer, part in zip(self.layers, self._parts, strict=True):
            gate = (None, None) if part.gate is None else (part.gate[0].panels, part.gate[1])
            names = ("attention_norm", "mlp_norm", "query_norm", "key_norm", "gate", "gate_bias")
            for name, tensor in zip(names, (*part.norms, *gate), strict=True):
                if tensor is not None and tensor.dtype != torch.float32:
                    raise ValueError(f"{name} is {tensor.dtype}: norms and gates of whole layers are float32")
                setattr(layer, name, None if tensor is None else tensor.data_ptr())
            for name, product in zip(("qkv", "out", "gate_up", "down"), part.products, strict=True):
                setattr(layer, name, product.address)
            layer.heads, layer.kv_heads, layer.head_dim, layer.hidden = part.heads, part.kv_heads, part.head_dim, part.hidden
            layer.window = NO_WINDOW if part.window is None else part.window
            layer.scale, layer.softcap = part.scale, part.softcap or 0.0
            layer.refresh, layer.sink_blocks = part.refresh, part.sink_blocks

    def use(self, step: PagedStep) -> None:
        """Read and write the stores of this step. Raises ValueError for stores that do not fit the layers."""
        if step.stores is self._stores and step.far_layers is self._far_layers:
            return
        self._stores = None
        for layer, (keys, values), group in zip(self.layers, step.stores, step.group_of, strict=True):
            shape = (layer.kv_heads, step.stores[0][0].shape[2], layer.head_dim)
            found = [(*blocks.shape[1:3], row_size(blocks)) for blocks in (keys, values)]
            if found != [shape, shape] or keys.stride(-1) != 1 or values.stride(-1) != 1:
                raise ValueError(f"blocks {tuple(keys.shape)} and {tuple(values.shape)} do not fit a layer of {shape}")
            layer.keys, layer.values, layer.group = keys.data_ptr(), values.data_ptr(), group
            layer.key_strides, layer.value_strides = (_size * 3)(*keys.stride()[:3]), (_size * 3)(*values.stride()[:3])
        self._use_far(step.far_layers or (None,) * len(self.layers))
        self._stores, self._far_layers = step.stores, step.far_layers

    def _use_far(self, far_layers: Sequence[FarLayer | None]) -> None:
        """Read these far stores; a layer that forgets what leaves its window has none. Raises ValueError."""
        self._far_stores = (_FarStore * len(self.layers))()
        for index, (layer, part, far) in enumerate(zip(self.layers, self._parts, far_layers, strict=True)):
            layer.store = None
            if far is not None:
                if not part.refresh:
                    raise ValueError(f"layer {index} has a far store and no rule to read it by")
                self._far_stores[index] = _FarStore.of(far.blocks)
                layer.store = ctypes.addressof(self._far_stores) + index * ctypes.sizeof(_FarStore)
                layer.far_group, layer.far_place = far.group, far.place


def decoder_layers(bound: BoundLayers, update: Tensor, residual: Tensor, rotation: tuple[Tensor, Tensor], step: PagedStep) -> bool:
    """Add what all layers make of update + residual [T, dim]: update and residual are written, and their sum is the result.

    float32 and contiguous, cos and sin [T, rotary_dim / 2] too. Always True: it was computed. Raises ValueError where arguments do not fit.
    """
    rows, dim = update.shape
    rows_fit = residual.shape == update.shape and len(step.offsets) == rows and all(len(angles) == rows for angles in rotation)
    if dim != bound.dim or not rows_fit or any(t.dtype != torch.float32 or not t.is_contiguous() for t in (update, residual, *rotation)):
        raise ValueError(f"update {tuple(update.shape)} and residual {tuple(residual.shape)} do not fit the step or the layers")
    bound.use(step)
    if any(layer is not None and layer.group >= len(step.far) for layer in step.far_layers):
        raise ValueError(f"the step says of {len(step.far)} groups what is read of them, and a layer has a later one")
    tables = [table.contiguous() for table in step.tables]
    groups = (_Group * len(tables))(
        *(_Group(table.data_ptr(), table.shape[1], ids.data_ptr()) for table, ids in zip(tables, step.block_ids, strict=True))
    )
    far = (_FarGroup * max(len(step.far), 1))(*(_FarGroup.of(group) for group in step.far))
    keys = step.stores[0][0]
    call = _Step(
        *(ctypes.addressof(bound.layers), ctypes.addressof(groups), ctypes.addressof(far)),
        *(FIRST_STAGE, SECOND_STAGE, len(bound.layers), rows, dim, rotation[0].shape[1]),
        *(len(step.context_lengths), keys.shape[2], KEPT[keys.dtype]),
        bound.eps,
        *(t.data_ptr() for t in (update, residual, *rotation, step.offsets, step.query_starts, step.context_lengths, step.done)),
    )
    run, threads, workspace = functions().native_decoder_layers, torch.get_num_threads(), _WORKSPACE.take("layers", _WORKSPACE.bytes // 4)
    needed = run(ctypes.addressof(call), workspace.data_ptr(), workspace.nbytes, threads)
    if needed > workspace.nbytes:
        workspace = _WORKSPACE.take("layers", needed // 4 + 64)
        run(ctypes.addressof(call), workspace.data_ptr(), workspace.nbytes, threads)
    return True


def layer_by_layer(bound: BoundLayers, update: Tensor, residual: Tensor, rotation: tuple[Tensor, Tensor], step: PagedStep) -> bool:
    """The choice to compute each layer by calls of its own: False, nothing was computed."""
    del bound, update, residual, rotation, step
    return False
