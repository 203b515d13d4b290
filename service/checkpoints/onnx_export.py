"""From a Manifest to an ONNX graph over paged keys and values, in float32 or with int8 products, checked against the torch decoder.

Weights lie beside the graph in one file that the runtime maps into memory. It does not know plans or sequences; `onnx_graph` runs what is
written here. Invariant: a directory appears under its name only whole and after its logits agreed with the decoder's; what the graph cannot
compute is refused by name before anything is written.
"""

from __future__ import annotations

import json
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from service.checkpoints.digests import file_digest
from service.checkpoints.load import Quantisation, load
from service.checkpoints.manifest import Manifest
from service.checkpoints.onnx_check import TOLERANCES, Probe, check_layers, check_logits, check_quantised
from service.checkpoints.onnx_support import ABOUT, FORMAT, GRAPH, PRODUCT, WEIGHTS, graph_directory, queries_per_kv_head, refuse
from service.checkpoints.quantisation import kind_of
from service.checkpoints.stage import staged_directory, sync, write_synced
from service.kernels.quantised import quantise_weight
from service.models.decoder import Decoder
from service.models.rope import attention_factor, inverse_frequencies
from service.types.kv_layout import KvLayout

_WATCHED = "watched.onnx"
_ALIGNMENT = 4096
_PRODUCT_WIDTH = 768
_TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int8): TensorProto.INT8, np.dtype(np.uint8): TensorProto.UINT8}
_CONTRIB = "com.microsoft"


def find_or_export(manifest: Manifest, cache: Path, quantize: str) -> Path:
    """The exported directory of a checkpoint in `cache`, written now if it is not there. Raises CheckpointError for what cannot be."""
    directory = graph_directory(manifest, cache, quantize)
    if not directory.is_dir():
        export(manifest, directory, quantize)
    return directory


def export(manifest: Manifest, directory: Path, quantize: str) -> None:
    """Write graph and weights with `quantize` none or int8 and check them. Raises CheckpointError."""
    refuse(manifest.spec, quantize)
    decoder = load(manifest, "cpu", torch.float32, serving=False)
    with staged_directory(directory) as partial:
        with (partial / WEIGHTS).open("wb") as stream:
            writer = _Writer(decoder, quantize, stream)
            write_synced(partial / GRAPH, writer.model())
            write_synced(partial / PRODUCT, writer.product())
            sync(stream)
        about = {
            "format": FORMAT,
            "digest": manifest.digest,
            "sha256": {name: file_digest(partial / name) for name in (GRAPH, PRODUCT, WEIGHTS)},
            "inverse_frequencies": inverse_frequencies(manifest.spec.rope).tolist(),
            "rope_factor": attention_factor(manifest.spec.rope),
            "queries_per_kv_head": [queries_per_kv_head(manifest.spec, group.layers[0]) for group in manifest.spec.kv_layout().groups],
        }
        write_synced(partial / ABOUT, json.dumps(about).encode())
        _check(manifest, decoder, partial, quantize, writer.watched())


def _check(manifest: Manifest, decoder: Decoder, directory: Path, quantize: str, watched: bytes) -> None:
    """Raise CheckpointError unless the graph computes what the decoder does; `watched` is it with its residual streams as outputs."""
    probe = Probe(manifest.spec)
    plain = probe.decoded(decoder)
    logits, _ = probe.graphed(directory, GRAPH)
    if quantize == "none":
        check_logits(plain, logits)
        return
    decoder = load(manifest, "cpu", torch.float32, quantisation=Quantisation(quantize))
    (directory / _WATCHED).write_bytes(watched)
    check_layers(decoder, probe, *probe.graphed(directory, _WATCHED), TOLERANCES[quantize])
    (directory / _WATCHED).unlink()
    check_quantised(plain, probe.decoded(decoder), logits)


def _serialised(graph: GraphProto) -> bytes:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_CONTRIB, 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


class _Writer:
    """One graph under way: nodes and initialisers by name, weights streamed to their file."""

    def __init__(self, decoder: Decoder, quantize: str, stream: BufferedWriter) -> None:
        self._spec = decoder.spec
        self._quantize = quantize
        self._stream = stream
        self._parameters = dict(decoder.named_parameters())
        self._nodes: list[NodeProto] = []
        self._streams: list[str] = []
        self._model = b""
        self._initializers: dict[str, TensorProto] = {}
        self._layout: KvLayout = decoder.spec.kv_layout()
        self._group_of = {layer: index for index, group in enumerate(self._layout.groups) for layer in group.layers}

    def model(self) -> bytes:
        """The whole graph, serialised."""
        x = self._embedding()
        self._streams.append(x)
        for layer in range(len(self._spec.layers)):
            x = self._layer(layer, x)
            self._streams.append(x)
        normed = self._norm(x, "norm")
        rows = self._op("Gather", self._op("Reshape", normed, self._shape(-1, self._spec.dim)), "rows", axis=0)
        self._nodes.append(
            helper.make_node("Identity", [self._linear(rows, "embed" if self._spec.tied_embeddings else "head")], ["logits"])
        )
        self._model = _serialised(
            helper.make_graph(self._nodes, "decoder", self._inputs(), self._outputs(), list(self._initializers.values()))
        )
        return self._model

    def watched(self) -> bytes:
        """The same with the residual stream after the embedding and after each layer as further outputs."""
        model = ModelProto.FromString(self._model)
        for name in self._streams:
            model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["S", "L", self._spec.dim]))
        return bytes(model.SerializeToString())

    def product(self) -> bytes:
        """A graph of one square product in the kind of most weights, which is what the machine's rate is measured with."""
        self._nodes, self._initializers = [], {}
        weight = np.full((_PRODUCT_WIDTH, _PRODUCT_WIDTH), 0.25, np.float32)
        self._parameters["layers.product.weight"] = torch.nn.Parameter(torch.from_numpy(weight), requires_grad=False)
        self._nodes.append(helper.make_node("Identity", [self._linear("x", "layers.product")], ["y"]))
        info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, _PRODUCT_WIDTH]) for name in ("x", "y")]
        return _serialised(helper.make_graph(self._nodes, "product", info[:1], info[1:], list(self._initializers.values())))

    def _inputs(self) -> list[ValueInfoProto]:
        half = self._spec.rope.rotary_dim // 2
        info = helper.make_tensor_value_info
        inputs = [info("tokens", TensorProto.INT64, ["S", "L"]), info("rows", TensorProto.INT64, ["R"])]
        inputs += [info(name, TensorProto.FLOAT, ["S", "L", 1, half]) for name in ("cos", "sin")]
        for index, group in enumerate(self._layout.groups):
            inputs.append(info(f"places.{index}", TensorProto.INT64, [group.kv_heads, None, 2]))
            inputs.append(info(f"tables.{index}", TensorProto.INT64, ["S", None]))
            inputs.append(info(f"mask.{index}", TensorProto.FLOAT, ["S", None, None]))
            for layer in group.layers:
                inputs.append(info(f"keys.{layer}", TensorProto.FLOAT, [group.kv_heads, None, group.key_dim]))
                inputs.append(info(f"values.{layer}", TensorProto.FLOAT, [group.kv_heads, None, group.value_dim]))
        return inputs

    def _outputs(self) -> list[ValueInfoProto]:
        info = helper.make_tensor_value_info
        outputs = [info("logits", TensorProto.FLOAT, ["R", self._spec.vocab_size])]
        for group in self._layout.groups:
            for layer in group.layers:
                outputs.append(info(f"keys.{layer}.written", TensorProto.FLOAT, [group.kv_heads, None, group.key_dim]))
                outputs.append(info(f"values.{layer}.written", TensorProto.FLOAT, [group.kv_heads, None, group.value_dim]))
        return outputs

    def _embedding(self) -> str:
        weight = self._parameters["embed.weight"]
        if kind_of("embed.weight", tuple(weight.shape), self._quantize) is None:
            return self._op("Gather", self._weight("embed.weight", weight.numpy()), "tokens", axis=0)
        stored = quantise_weight(weight, "int8")
        values = self._op("Gather", self._weight("embed.rows", stored.values.numpy()), "tokens", axis=0)
        scales = self._op("Gather", self._weight("embed.row_scales", stored.scales.numpy()[:, None]), "tokens", axis=0)
        return self._op("Mul", self._op("Cast", values, to=TensorProto.FLOAT), scales)

    def _layer(self, layer: int, x: str) -> str:
        """The residual stream [S, L, dim] after one layer."""
        own, lent = f"layers.{layer}", f"layers.{self._spec.owner(layer)}"
        x = self._op("Add", x, self._attention(layer, self._norm(x, f"{own}.attention_norm"), f"{lent}.attention"))
        gate_up = self._linear(self._norm(x, f"{own}.mlp_norm"), f"{lent}.mlp.gate_up")
        hidden = self._spec.layers[layer].mlp.hidden
        gate, up = self._split(gate_up, -1, hidden, hidden)
        active = self._op("Mul", self._op("Mul", gate, self._op("Sigmoid", gate)), up)
        return self._op("Add", x, self._linear(active, f"{lent}.mlp.down"))

    def _attention(self, layer: int, x: str, module: str) -> str:
        spec = self._spec.layers[layer].attention
        every = self._op("Reshape", self._linear(x, f"{module}.qkv"), self._shape(0, 0, spec.heads + 2 * spec.kv_heads, spec.head_dim))
        query, key, value = self._split(every, 2, spec.heads, spec.kv_heads, spec.kv_heads)
        if spec.qk_norm:
            query, key = self._norm(query, f"{module}.query_norm"), self._norm(key, f"{module}.key_norm")
        query, key = self._rotate(query, spec.head_dim), self._rotate(key, spec.head_dim)
        index, queries = self._group_of[layer], spec.heads // spec.kv_heads
        keys = self._cached(f"keys.{layer}", key, index, spec.kv_heads, spec.head_dim)
        values = self._cached(f"values.{layer}", value, index, spec.kv_heads, spec.head_dim)
        grouped = self._op("Reshape", query, self._shape(0, 0, spec.kv_heads, queries, spec.head_dim))
        grouped = self._op("Transpose", grouped, perm=[2, 0, 3, 1, 4])
        grouped = self._op("Reshape", grouped, self._shape(0, 0, -1, spec.head_dim))
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        scores = self._op("FusedMatMul", grouped, keys, domain=_CONTRIB, transB=1, alpha=scale)
        if spec.softcap is not None:
            cap = self._constant(np.array(spec.softcap, np.float32))
            scores = self._op("Mul", self._op("Tanh", self._op("Div", scores, cap)), cap)
        shares = self._op("Softmax", self._op("Add", scores, f"mask.{index}"), axis=-1)
        seen = self._op("Reshape", self._op("MatMul", shares, values), self._shape(0, 0, queries, -1, spec.head_dim))
        seen = self._op("Reshape", self._op("Transpose", seen, perm=[1, 3, 0, 2, 4]), self._shape(0, 0, spec.heads, spec.head_dim))
        if spec.gate:
            gate = self._op("Sigmoid", self._linear(x, f"{module}.gate"))
            seen = self._op("Mul", seen, self._op("Unsqueeze", gate, self._shape(-1)))
        return self._linear(self._op("Reshape", seen, self._shape(0, 0, spec.heads * spec.head_dim)), f"{module}.out")

    def _cached(self, name: str, new: str, group: int, heads: int, size: int) -> str:
        """Write `new` [S, L, Hkv, D] into its cache and read the tables' blocks: [Hkv, S, tokens, D]."""
        rows = self._op("Reshape", self._op("Transpose", new, perm=[2, 0, 1, 3]), self._shape(heads, -1, size))
        self._nodes.append(helper.make_node("ScatterND", [name, f"places.{group}", rows], [f"{name}.written"]))
        blocks = self._op("Reshape", f"{name}.written", self._shape(heads, -1, self._layout.block_tokens * size))
        read = self._op("Gather", blocks, f"tables.{group}", axis=1)
        return self._op("Reshape", read, self._shape(0, 0, -1, size))

    def _rotate(self, x: str, size: int) -> str:
        half = self._spec.rope.rotary_dim // 2
        parts = self._split(x, 3, half, half, *([size - 2 * half] if size > 2 * half else []))
        first, second = parts[:2]
        turned = (
            self._op("Sub", self._op("Mul", first, "cos"), self._op("Mul", second, "sin")),
            self._op("Add", self._op("Mul", second, "cos"), self._op("Mul", first, "sin")),
        )
        return self._op("Concat", *turned, *parts[2:], axis=-1)

    def _norm(self, x: str, module: str) -> str:
        weight = self._weight(f"{module}.weight", self._parameters[f"{module}.weight"].numpy())
        return self._op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=self._spec.norm_eps, stash_type=1)

    def _linear(self, x: str, module: str) -> str:
        """x [..., in] -> [..., out]; int8 as `kernels.quantised` defines it: a scale for each output and one for each row of x."""
        name, bias = f"{module}.weight", self._parameters.get(f"{module}.bias")
        weight = self._parameters[name]
        if kind_of(name, tuple(weight.shape), self._quantize) is None:
            y = self._op("FusedMatMul", x, self._weight(name, weight.numpy()), domain=_CONTRIB, transB=1)
        else:
            y = self._int8_product(x, module)
        return y if bias is None else self._op("Add", y, self._weight(f"{module}.bias", bias.numpy()))

    def _int8_product(self, x: str, module: str) -> str:
        stored = quantise_weight(self._parameters[f"{module}.weight"], "int8")
        values = self._weight(f"{module}.values", np.ascontiguousarray(stored.values.numpy().T))
        scales = self._weight(f"{module}.scales", stored.scales.numpy())
        one, middle = self._constant(np.array(1, np.float32)), self._constant(np.array(128, np.uint8))
        most = self._constant(np.array(127, np.float32))
        peak = self._op("ReduceMax", self._op("Abs", x), self._shape(-1), keepdims=1)
        step = self._op("Div", peak, most)
        # The same products, in the same order, as the decoder's, so that the same steps come out; a row of zeros stays one.
        inverse = self._op("Div", most, self._op("Max", peak, self._constant(np.array(1e-30, np.float32))))
        shifted = self._op("Add", self._op("Round", self._op("Mul", x, inverse)), self._constant(np.array(128, np.float32)))
        codes = self._op("Cast", shifted, to=TensorProto.UINT8)
        return self._op("Mul", self._op("MatMulIntegerToFloat", codes, values, one, scales, middle, domain=_CONTRIB), step)

    def _split(self, x: str, axis: int, *sizes: int) -> list[str]:
        names = [f"{x}.{part}" for part in range(len(sizes))]
        self._nodes.append(helper.make_node("Split", [x, self._shape(*sizes)], names, axis=axis))
        return names

    def _op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        name = f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], domain=domain, **attributes))
        return name

    def _shape(self, *sizes: int) -> str:
        return self._constant(np.array(sizes, np.int64))

    def _constant(self, value: NDArray[np.generic]) -> str:
        name = f"c.{value.dtype}.{'_'.join(str(entry) for entry in value.reshape(-1).tolist())}.{value.ndim}"
        if name not in self._initializers:
            kind = TensorProto.INT64 if value.dtype == np.int64 else _TYPES[value.dtype]
            self._initializers[name] = helper.make_tensor(name, kind, value.shape, value.tobytes(), raw=True)
        return name

    def _weight(self, name: str, value: NDArray[np.generic]) -> str:
        """Write a weight to its file once; the graph says where it lies."""
        if name not in self._initializers:
            self._stream.write(bytes(-self._stream.tell() % _ALIGNMENT))
            tensor = TensorProto(name=name, data_type=_TYPES[value.dtype], dims=value.shape, data_location=TensorProto.EXTERNAL)
            for key, entry in (("location", WEIGHTS), ("offset", str(self._stream.tell())), ("length", str(value.nbytes))):
                tensor.external_data.add(key=key, value=entry)
            self._stream.write(np.ascontiguousarray(value).data)
            self._initializers[name] = tensor
        return name
