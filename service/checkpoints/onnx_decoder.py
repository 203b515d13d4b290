"""The decoder as a graph: tokens and image tokens in, keys and values into their blocks, logits out; with the fusion where there is one.

It does not know files or how it is run. Invariant: the residual stream after each part has a name, so that a second graph can show it; the
fusion is a branch that is not taken where nothing sees an image, and rows that see none pass it unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from service.checkpoints.onnx_nodes import CONTRIB, Nodes, Weights
from service.types.kv_layout import KvLayout
from service.types.vision import FusionSpec

_info = helper.make_tensor_value_info


class _Heads(NamedTuple):
    """What attention is computed with: heads, those of keys and values, their size, the scale of scores and their cap."""

    heads: int
    kv_heads: int
    size: int
    scale: float
    softcap: float | None = None


class DecoderGraph:
    """The graph of a decoder, made at once."""

    def __init__(self, weights: Weights) -> None:
        self._spec = weights.spec
        self._nodes = Nodes(weights)
        self._streams: list[str] = []
        self._layout: KvLayout = weights.spec.kv_layout()
        self._group_of = {layer: index for index, group in enumerate(self._layout.groups) for layer in group.layers}
        self._compute()
        self.model = self._nodes.serialised("decoder", self._inputs(), self._outputs())

    def watched(self) -> bytes:
        """The same with the residual stream after the embedding, each layer and the fusion as further outputs, in order."""
        model = ModelProto.FromString(self.model)
        for name in self._streams:
            model.graph.output.append(_info(name, TensorProto.FLOAT, ["S", "L", self._spec.dim]))
        return bytes(model.SerializeToString())

    def _compute(self) -> None:
        nodes, spec = self._nodes, self._spec
        x = nodes.rows("embed", "tokens")
        if spec.fusion is not None:
            x = nodes.op("ScatterND", x, "shown_at", "shown")
        self._streams.append(x)
        for layer in range(len(spec.layers)):
            if spec.fusion is not None and layer == spec.fusion.after_layers:
                x = self._fused(x, spec.fusion)
                self._streams.append(x)
            x = self._layer(layer, x)
            self._streams.append(x)
        normed = nodes.norm(x, "norm")
        rows = nodes.op("Gather", nodes.op("Reshape", normed, nodes.shape(-1, spec.dim)), "rows", axis=0)
        nodes.give(nodes.linear(rows, "embed" if spec.tied_embeddings else "head"), "logits")

    def _inputs(self) -> list[ValueInfoProto]:
        half = self._spec.rope.rotary_dim // 2
        inputs = [_info("tokens", TensorProto.INT64, ["S", "L"]), _info("rows", TensorProto.INT64, ["R"])]
        inputs += [_info(name, TensorProto.FLOAT, ["S", "L", 1, half]) for name in ("cos", "sin")]
        for index, group in enumerate(self._layout.groups):
            inputs.append(_info(f"places.{index}", TensorProto.INT64, [group.kv_heads, None, 2]))
            inputs.append(_info(f"tables.{index}", TensorProto.INT64, ["S", None]))
            inputs.append(_info(f"mask.{index}", TensorProto.FLOAT, ["S", None, None]))
            for layer in group.layers:
                inputs.append(_info(f"keys.{layer}", TensorProto.FLOAT, [group.kv_heads, None, group.key_dim]))
                inputs.append(_info(f"values.{layer}", TensorProto.FLOAT, [group.kv_heads, None, group.value_dim]))
        return inputs if self._spec.fusion is None else inputs + self._image_inputs(self._spec.fusion)

    def _image_inputs(self, fusion: FusionSpec) -> list[ValueInfoProto]:
        """As `onnx_graph.Seen` names them."""
        inputs = [_info("shown_at", TensorProto.INT64, ["M", 2]), _info("shown", TensorProto.FLOAT, ["M", self._spec.dim])]
        inputs += [_info("seers", TensorProto.INT64, ["V"]), _info("sees", TensorProto.BOOL, ["V", None, 1])]
        shape: list[str | int | None] = [fusion.kv_heads, "V", None, fusion.head_dim]
        inputs += [_info(name, TensorProto.FLOAT, shape) for name in ("image_keys", "image_values")]
        return [*inputs, _info("image_mask", TensorProto.FLOAT, ["V", None, None])]

    def _outputs(self) -> list[ValueInfoProto]:
        outputs = [_info("logits", TensorProto.FLOAT, ["R", self._spec.vocab_size])]
        for group in self._layout.groups:
            for layer in group.layers:
                outputs.append(_info(f"keys.{layer}.written", TensorProto.FLOAT, [group.kv_heads, None, group.key_dim]))
                outputs.append(_info(f"values.{layer}.written", TensorProto.FLOAT, [group.kv_heads, None, group.value_dim]))
        if self._spec.fusion is not None:
            outputs.append(_info("gates", TensorProto.FLOAT, [2 * self._spec.fusion.heads]))
        return outputs

    def _layer(self, layer: int, x: str) -> str:
        """The residual stream [S, L, dim] after one layer."""
        nodes = self._nodes
        own, lent = f"layers.{layer}", f"layers.{self._spec.owner(layer)}"
        x = nodes.op("Add", x, self._attention(layer, nodes.norm(x, f"{own}.attention_norm"), f"{lent}.attention"))
        gate_up = nodes.linear(nodes.norm(x, f"{own}.mlp_norm"), f"{lent}.mlp.gate_up")
        active = nodes.swiglu(gate_up, self._spec.layers[layer].mlp.hidden)
        return nodes.op("Add", x, nodes.linear(active, f"{lent}.mlp.down"))

    def _attention(self, layer: int, x: str, module: str) -> str:
        spec, nodes = self._spec.layers[layer].attention, self._nodes
        every = nodes.op("Reshape", nodes.linear(x, f"{module}.qkv"), nodes.shape(0, 0, spec.heads + 2 * spec.kv_heads, spec.head_dim))
        query, key, value = nodes.split(every, 2, spec.heads, spec.kv_heads, spec.kv_heads)
        if spec.qk_norm:
            query, key = nodes.norm(query, f"{module}.query_norm"), nodes.norm(key, f"{module}.key_norm")
        query, key = self._rotate(query, spec.head_dim), self._rotate(key, spec.head_dim)
        index = self._group_of[layer]
        keys = self._cached(f"keys.{layer}", key, index, spec.kv_heads, spec.head_dim)
        values = self._cached(f"values.{layer}", value, index, spec.kv_heads, spec.head_dim)
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        heads = _Heads(spec.heads, spec.kv_heads, spec.head_dim, scale, spec.softcap)
        seen = self._attend(query, (keys, values, f"mask.{index}"), heads)
        if spec.gate:
            seen = self._gated(seen, nodes.op("Sigmoid", nodes.linear(x, f"{module}.gate")))
        return nodes.linear(nodes.op("Reshape", seen, nodes.shape(0, 0, spec.heads * spec.head_dim)), f"{module}.out")

    def _attend(self, query: str, seen: tuple[str, str, str], spec: _Heads) -> str:
        """query [S, L, H, D] over keys and values [Hkv, S, N, D] and a mask [S, H / Hkv · L or 1, N], what is `seen` -> [S, L, H, D]."""
        nodes, queries = self._nodes, spec.heads // spec.kv_heads
        keys, values, mask = seen
        grouped = nodes.op("Reshape", query, nodes.shape(0, 0, spec.kv_heads, queries, spec.size))
        grouped = nodes.op("Transpose", grouped, perm=[2, 0, 3, 1, 4])
        grouped = nodes.op("Reshape", grouped, nodes.shape(0, 0, -1, spec.size))
        scores = nodes.op("FusedMatMul", grouped, keys, domain=CONTRIB, transB=1, alpha=spec.scale)
        if spec.softcap is not None:
            cap = nodes.constant(np.array(spec.softcap, np.float32))
            scores = nodes.op("Mul", nodes.op("Tanh", nodes.op("Div", scores, cap)), cap)
        shares = nodes.op("Softmax", nodes.op("Add", scores, mask), axis=-1)
        found = nodes.op("Reshape", nodes.op("MatMul", shares, values), nodes.shape(0, 0, queries, -1, spec.size))
        return nodes.op("Reshape", nodes.op("Transpose", found, perm=[1, 3, 0, 2, 4]), nodes.shape(0, 0, spec.heads, spec.size))

    def _gated(self, x: str, gate: str) -> str:
        """x [S, L, H, D] with each head multiplied by its gate [S, L, H]."""
        return self._nodes.op("Mul", x, self._nodes.op("Unsqueeze", gate, self._nodes.shape(-1)))

    def _fused(self, x: str, fusion: FusionSpec) -> str:
        """The residual stream [S, L, dim] after the fusion; the gates of what sees images are summed by head on the way."""
        nodes = self._nodes
        infos = [_info("fused", TensorProto.FLOAT, ["S", "L", self._spec.dim]), _info("gate_sums", TensorProto.FLOAT, [2 * fusion.heads])]

        def passed() -> Sequence[str]:
            return x, nodes.constant(np.zeros(2 * fusion.heads, np.float32))

        some = nodes.op("Greater", nodes.op("Size", "seers"), nodes.constant(np.array(0, np.int64)))
        seeing = nodes.branch("seeing", lambda: self._seeing(x, fusion), infos)
        blind = nodes.branch("blind", passed, [_info(f"{info.name}.none", TensorProto.FLOAT, None) for info in infos])
        nodes.node("If", [some], ["fused.stream", "fused.gates"], then_branch=seeing, else_branch=blind)
        nodes.give("fused.gates", "gates")
        return "fused.stream"

    def _seeing(self, x: str, fusion: FusionSpec) -> Sequence[str]:
        """(residual stream, sums of gates) with the images that the sequences `seers` see, in the positions that `sees` names."""
        nodes = self._nodes
        own = nodes.op("Gather", x, "seers", axis=0)
        normed = nodes.norm(own, "fusion.norm")
        by_head = nodes.shape(0, 0, fusion.heads, fusion.head_dim)
        heads = _Heads(fusion.heads, fusion.kv_heads, fusion.head_dim, fusion.head_dim**-0.5)
        query = nodes.op("Reshape", nodes.linear(normed, "fusion.query"), by_head)
        shown = self._attend(query, ("image_keys", "image_values", "image_mask"), heads)
        gates = nodes.op("Sigmoid", nodes.linear(normed, "fusion.gates"))
        text_gate, image_gate = nodes.split(gates, 2, fusion.heads, fusion.heads)
        text = nodes.op("Reshape", nodes.linear(normed, "fusion.text"), by_head)
        mixed = nodes.op("Add", self._gated(text, text_gate), self._gated(shown, image_gate))
        added = nodes.linear(nodes.op("Reshape", mixed, nodes.shape(0, 0, fusion.width)), "fusion.out")
        changed = nodes.op("Where", "sees", nodes.op("Add", own, added), own)
        counted = nodes.op("Mul", gates, nodes.op("Cast", "sees", to=TensorProto.FLOAT))
        sums = nodes.op("ReduceSum", counted, nodes.shape(0, 1), keepdims=0)
        return nodes.op("ScatterND", x, nodes.op("Unsqueeze", "seers", nodes.shape(-1)), changed), sums

    def _cached(self, name: str, new: str, group: int, heads: int, size: int) -> str:
        """Write `new` [S, L, Hkv, D] into its cache and read the tables' blocks: [Hkv, S, tokens, D]."""
        nodes = self._nodes
        rows = nodes.op("Reshape", nodes.op("Transpose", new, perm=[2, 0, 1, 3]), nodes.shape(heads, -1, size))
        nodes.node("ScatterND", [name, f"places.{group}", rows], [f"{name}.written"])
        blocks = nodes.op("Reshape", f"{name}.written", nodes.shape(heads, -1, self._layout.block_tokens * size))
        read = nodes.op("Gather", blocks, f"tables.{group}", axis=1)
        return nodes.op("Reshape", read, nodes.shape(0, 0, -1, size))

    def _rotate(self, x: str, size: int) -> str:
        nodes, half = self._nodes, self._spec.rope.rotary_dim // 2
        parts = nodes.split(x, 3, half, half, *([size - 2 * half] if size > 2 * half else []))
        first, second = parts[:2]
        turned = (
            nodes.op("Sub", nodes.op("Mul", first, "cos"), nodes.op("Mul", second, "sin")),
            nodes.op("Add", nodes.op("Mul", second, "cos"), nodes.op("Mul", first, "sin")),
        )
        return nodes.op("Concat", *turned, *parts[2:], axis=-1)
