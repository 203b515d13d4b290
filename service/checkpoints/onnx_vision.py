"""The patch encoder and the projector as a graph: the patches of one image in, its image tokens out, and what the fusion reads of them.

Patches come in the order in which they are merged, with their places, so the graph moves nothing. It does not know pixels' layout, files or
sequences. Invariant: one image a call, so what it becomes depends on its own pixels alone.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from service.checkpoints.onnx_nodes import CONTRIB, Nodes, Weights
from service.types.vision import FusionSpec, VisionSpec

_info = helper.make_tensor_value_info


def encoder_graph(weights: Weights, vision: VisionSpec, fusion: FusionSpec) -> bytes:
    """patches uint8 [P, values], their places `down` and `along` [P] -> embeddings [N, dim], keys and values [N, Hkv, D]."""
    nodes, dim = Nodes(weights), weights.spec.dim
    scaled = nodes.op("Div", nodes.op("Cast", "patches", to=TensorProto.FLOAT), nodes.constant(np.array(127.5, np.float32)))
    x = nodes.linear(nodes.op("Sub", scaled, nodes.constant(np.array(1, np.float32))), "vision.patch")
    places = nodes.op("Add", nodes.rows("vision.row_embed", "down"), nodes.rows("vision.column_embed", "along"))
    x = nodes.op("Add", x, places)
    for layer in range(vision.layers):
        x = _layer(nodes, vision, f"vision.layers.{layer}", x)
    merged = nodes.op("Reshape", nodes.norm(x, "vision.norm"), nodes.shape(-1, vision.merge**2 * vision.dim))
    inner = nodes.op("Gelu", nodes.linear(merged, "vision.projector.inner"))
    tokens = nodes.linear(inner, "vision.projector.out")
    nodes.give(tokens, "embeddings")
    heads = nodes.linear(nodes.norm(tokens, "fusion.image_norm"), "fusion.key_value")
    for name, part in zip(("keys", "values"), nodes.split(heads, -1, fusion.kv_width, fusion.kv_width), strict=True):
        nodes.give(nodes.op("Reshape", part, nodes.shape(0, fusion.kv_heads, fusion.head_dim)), name)
    inputs = [_info("patches", TensorProto.UINT8, ["P", vision.patch_values])]
    inputs += [_info(name, TensorProto.INT64, ["P"]) for name in ("down", "along")]
    outputs = [_info("embeddings", TensorProto.FLOAT, ["N", dim])]
    outputs += [_info(name, TensorProto.FLOAT, ["N", fusion.kv_heads, fusion.head_dim]) for name in ("keys", "values")]
    return nodes.serialised("encoder", inputs, outputs)


def _layer(nodes: Nodes, vision: VisionSpec, module: str, x: str) -> str:
    """x [P, dim] after one encoder layer. The runtime's own attention never holds all scores of a head at once."""
    heads = nodes.op("Unsqueeze", nodes.linear(nodes.norm(x, f"{module}.attention_norm"), f"{module}.attention.qkv"), nodes.shape(0))
    query, key, value = nodes.split(heads, -1, vision.dim, vision.dim, vision.dim)
    seen = nodes.op("MultiHeadAttention", query, key, value, domain=CONTRIB, num_heads=vision.heads)
    x = nodes.op("Add", x, nodes.linear(nodes.op("Squeeze", seen, nodes.shape(0)), f"{module}.attention.out"))
    gate_up = nodes.linear(nodes.norm(x, f"{module}.mlp_norm"), f"{module}.mlp.gate_up")
    return nodes.op("Add", x, nodes.linear(nodes.swiglu(gate_up, vision.mlp_hidden), f"{module}.mlp.down"))
