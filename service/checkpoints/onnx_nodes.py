"""The parts of exported graphs: nodes, constants, weights streamed to one file, norms, products in the kind of weights asked for.

It does not know decoders, caches or images. Invariant: a weight is written once, however many graphs read it, and a quantised product is
the project's own (`kernels.quantised`): the same integers, the same scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BufferedWriter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from service.checkpoints.onnx_support import WEIGHTS
from service.checkpoints.quantisation import kind_of
from service.checkpoints.quantised_cache import Stored
from service.kernels.quantised import GROUP, QuantisedWeight, quantise_weight
from service.models.decoder import Decoder
from service.processor import saturates_bytes
from service.types.model_spec import ModelSpec

CONTRIB = "com.microsoft"
_ALIGNMENT = 4096
_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int64): TensorProto.INT64,
}


class Weights:
    """The parameters of a decoder, what they are as quantised ones (`stored`), and the file that they are written to."""

    def __init__(self, decoder: Decoder, quantize: str, stored: Mapping[str, Stored], stream: BufferedWriter) -> None:
        self.spec: ModelSpec = decoder.spec
        self.quantize = quantize
        self.parameters = dict(decoder.named_parameters())
        self._stored = stored
        self._stream = stream
        self._written: dict[str, TensorProto] = {}

    def kind(self, name: str) -> str | None:
        """What a parameter is quantised to, or None."""
        return kind_of(name, tuple(self.parameters[name].shape), self.quantize, self.spec)

    def quantised(self, name: str) -> QuantisedWeight:
        """A parameter as the torch decoder has it; one that no model has is rounded to the nearest."""
        found = self._stored.get(name)
        if isinstance(found, QuantisedWeight):
            return found
        return quantise_weight(self.parameters[name], self.kind(name) or "int8")

    def tensor(self, name: str, value: NDArray[np.generic]) -> TensorProto:
        """Write a value to the file unless it is there; what a graph says of where it lies."""
        if name not in self._written:
            self._stream.write(bytes(-self._stream.tell() % _ALIGNMENT))
            tensor = TensorProto(name=name, data_type=_TYPES[value.dtype], dims=value.shape, data_location=TensorProto.EXTERNAL)
            for key, entry in (("location", WEIGHTS), ("offset", str(self._stream.tell())), ("length", str(value.nbytes))):
                tensor.external_data.add(key=key, value=entry)
            self._stream.write(np.ascontiguousarray(value).data)
            self._written[name] = tensor
        return self._written[name]


class Nodes:
    """One graph under way."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._nodes: list[NodeProto] = []
        self._count = 0
        self._initializers: dict[str, TensorProto] = {}

    def serialised(self, name: str, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]) -> bytes:
        """The whole graph."""
        graph = helper.make_graph(self._nodes, name, list(inputs), list(outputs), list(self._initializers.values()))
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())

    def branch(self, name: str, build: Callable[[], Sequence[str]], outputs: Sequence[ValueInfoProto]) -> GraphProto:
        """A graph within this one whose results `build` names and `outputs` describes; its constants and weights are this one's."""
        outer, self._nodes = self._nodes, []
        for result, info in zip(build(), outputs, strict=True):
            self.give(result, info.name)
        inner, self._nodes = self._nodes, outer
        return helper.make_graph(inner, name, [], list(outputs))

    def node(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any) -> None:
        """Add a node whose results have names of their own."""
        self._nodes.append(helper.make_node(kind, list(inputs), list(outputs), domain=domain, **attributes))

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one result, which it names."""
        self._count += 1
        name = f"v{self._count}"
        self.node(kind, inputs, [name], domain, **attributes)
        return name

    def give(self, value: str, name: str) -> None:
        """Make a value known under another name."""
        self.node("Identity", [value], [name])

    def split(self, x: str, axis: int, *sizes: int) -> list[str]:
        """Parts of x of these sizes."""
        names = [f"{x}.{part}" for part in range(len(sizes))]
        self.node("Split", [x, self.shape(*sizes)], names, axis=axis)
        return names

    def shape(self, *sizes: int) -> str:
        """A constant [sizes] int64."""
        return self.constant(np.array(sizes, np.int64))

    def constant(self, value: NDArray[np.generic]) -> str:
        """A small constant, kept in the graph itself."""
        name = f"c.{value.dtype}.{'_'.join(str(entry) for entry in value.reshape(-1).tolist())}.{value.ndim}"
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(name, _TYPES[value.dtype], value.shape, value.tobytes(), raw=True)
        return name

    def weight(self, name: str, value: NDArray[np.generic]) -> str:
        """A value of the file of weights."""
        self._initializers[name] = self.weights.tensor(name, value)
        return name

    def parameter(self, name: str) -> str:
        """A parameter as it is, in float32."""
        return self.weight(name, self.weights.parameters[name].numpy())

    def norm(self, x: str, module: str) -> str:
        """Root mean square norm over the last dimension."""
        weight = self.parameter(f"{module}.weight")
        return self.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=self.weights.spec.norm_eps, stash_type=1)

    def rows(self, module: str, ids: str) -> str:
        """Rows of an embedding by id: ids [...] -> [..., dim]."""
        name = f"{module}.weight"
        if self.weights.kind(name) is None:
            return self.op("Gather", self.parameter(name), ids, axis=0)
        stored = self.weights.quantised(name)
        values = self.op("Gather", self.weight(f"{module}.rows", stored.values.numpy()), ids, axis=0)
        scales = self.op("Gather", self.weight(f"{module}.row_scales", stored.scales.numpy()[:, None]), ids, axis=0)
        return self.op("Mul", self.op("Cast", values, to=TensorProto.FLOAT), scales)

    def swiglu(self, x: str, hidden: int) -> str:
        """silu(gate) · up of x [..., 2 · hidden], gate first."""
        gate, up = self.split(x, -1, hidden, hidden)
        return self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)

    def linear(self, x: str, module: str) -> str:
        """x [..., in] -> [..., out] in the kind of weights that the module has."""
        name = f"{module}.weight"
        kind = self.weights.kind(name)
        if kind is None:
            y = self.op("FusedMatMul", x, self.parameter(name), domain=CONTRIB, transB=1)
        else:
            y = self._int8_product(x, module) if kind == "int8" else self._int4_product(x, module)
        return self.op("Add", y, self.parameter(f"{module}.bias")) if f"{module}.bias" in self.weights.parameters else y

    def _int8_product(self, x: str, module: str) -> str:
        """A scale for each output and one for each row of x.

        The runtime adds pairs of products in 16 bits where the processor has nothing better and one side is signed; two unsigned sides are
        widened, which is exact.
        """
        stored = self.weights.quantised(f"{module}.weight")
        codes_of_weight = np.ascontiguousarray(stored.values.numpy().T)
        if unsigned := saturates_bytes():
            codes_of_weight = codes_of_weight.view(np.uint8) ^ np.uint8(128)
        values = self.weight(f"{module}.values", codes_of_weight)
        scales = self.weight(f"{module}.scales", stored.scales.numpy())
        one, middle = self.constant(np.array(1, np.float32)), self.constant(np.array(128, np.uint8))
        most = self.constant(np.array(127, np.float32))
        peak = self.op("ReduceMax", self.op("Abs", x), self.shape(-1), keepdims=1)
        step = self.op("Div", peak, most)
        # The same products, in the same order, as the decoder's, so that the same steps come out; a row of zeros stays one.
        inverse = self.op("Div", most, self.op("Max", peak, self.constant(np.array(1e-30, np.float32))))
        shifted = self.op("Add", self.op("Round", self.op("Mul", x, inverse)), self.constant(np.array(128, np.float32)))
        codes = self.op("Cast", shifted, to=TensorProto.UINT8)
        zero_points = (middle, middle) if unsigned else (middle,)
        return self.op("Mul", self.op("MatMulIntegerToFloat", codes, values, one, scales, *zero_points, domain=CONTRIB), step)

    def _int4_product(self, x: str, module: str) -> str:
        """A scale for each output and GROUP inputs, as the decoder's own; x is rounded to 8 bits by the same groups."""
        stored = self.weights.quantised(f"{module}.weight")
        outputs, inputs = stored.outputs, stored.inputs
        values = self.weight(f"{module}.values", stored.values.numpy().reshape(outputs, -1, GROUP // 2))
        scales = self.weight(f"{module}.scales", stored.scales.float().numpy().reshape(-1))
        sizes = {"K": inputs, "N": outputs, "bits": 4, "block_size": GROUP}
        return self.op("MatMulNBits", x, values, scales, domain=CONTRIB, accuracy_level=4, **sizes)
