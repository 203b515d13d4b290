"""From a Manifest to ONNX graphs over paged keys and values, in float32 or with int8 or int4 products, checked against the torch decoder.

A decoder, for a model that reads images an encoder, and one square product by which the machine's rate is measured; all weights lie beside
them in one file that the runtime maps into memory. It does not know plans or sequences; `onnx_graph` runs what is written here.
Invariant: a directory appears under its name only whole and after its results agreed with the decoder's; what the graphs cannot compute is
refused by name before anything is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from onnx import TensorProto, helper

from service.checkpoints.digests import file_digest
from service.checkpoints.load import Quantisation, load
from service.checkpoints.manifest import Manifest
from service.checkpoints.onnx_check import TOLERANCES, Probe, check_images, check_layers, check_logits, check_quantised
from service.checkpoints.onnx_decoder import DecoderGraph
from service.checkpoints.onnx_nodes import Nodes, Weights
from service.checkpoints.onnx_support import ABOUT, ENCODER, FORMAT, GRAPH, PRODUCT, WEIGHTS, graph_directory, queries_per_kv_head, refuse
from service.checkpoints.onnx_vision import encoder_graph
from service.checkpoints.quantised_cache import Stored
from service.checkpoints.stage import staged_directory, sync, write_synced
from service.kernels.quantised import QuantisedWeight, dequantise
from service.models.decoder import Decoder
from service.models.rope import attention_factor, inverse_frequencies

_WATCHED = "watched.onnx"
_PRODUCT_WIDTH = 768


class _Models(NamedTuple):
    """The torch decoders of a checkpoint, plain and as it is served quantised, and the parameters of the latter by name."""

    plain: Decoder
    quantised: Decoder | None
    stored: dict[str, Stored]


def find_or_export(manifest: Manifest, cache: Path, quantize: str) -> Path:
    """The exported directory of a checkpoint in `cache`, written now if it is not there. Raises CheckpointError for what cannot be."""
    directory = graph_directory(manifest, cache, quantize)
    if not directory.is_dir():
        export(manifest, directory, quantize)
    return directory


def export(manifest: Manifest, directory: Path, quantize: str) -> None:
    """Write graph and weights with `quantize` none, int8 or int4 and check them. Raises CheckpointError."""
    refuse(manifest.spec, quantize)
    models = _load(manifest, quantize)
    with staged_directory(directory) as partial:
        with (partial / WEIGHTS).open("wb") as stream:
            weights = Weights(models.plain, quantize, models.stored, stream)
            graph = DecoderGraph(weights)
            files = {GRAPH: graph.model, PRODUCT: _product(weights)}
            if manifest.spec.vision is not None and manifest.spec.fusion is not None:
                files[ENCODER] = encoder_graph(weights, manifest.spec.vision, manifest.spec.fusion)
            for name, content in files.items():
                write_synced(partial / name, content)
            sync(stream)
        about = {
            "format": FORMAT,
            "digest": manifest.digest,
            "sha256": {name: file_digest(partial / name) for name in (*files, WEIGHTS)},
            "inverse_frequencies": inverse_frequencies(manifest.spec.rope).tolist(),
            "rope_factor": attention_factor(manifest.spec.rope),
            "queries_per_kv_head": [queries_per_kv_head(manifest.spec, group.layers[0]) for group in manifest.spec.kv_layout().groups],
        }
        write_synced(partial / ABOUT, json.dumps(about).encode())
        _check(models, partial, quantize, graph.watched())


def _load(manifest: Manifest, quantize: str) -> _Models:
    stored: dict[str, Stored] = {}
    quantised = None
    if quantize != "none":
        quantised = load(manifest, "cpu", torch.float32, quantisation=Quantisation(quantize, seen=stored.__setitem__))
    return _Models(load(manifest, "cpu", torch.float32, serving=False), quantised, stored)


def _check(models: _Models, directory: Path, quantize: str, watched: bytes) -> None:
    """Raise CheckpointError unless the graph computes what the decoder does; `watched` is it with its residual streams as outputs."""
    probe, quantised = Probe(models.plain.spec), models.quantised
    check_images(models.plain, probe, directory)
    plain = probe.decoded(models.plain)
    logits, _ = probe.graphed(directory, GRAPH)
    if quantised is None:
        check_logits(plain, logits)
        return
    (directory / _WATCHED).write_bytes(watched)
    # With 4-bit weights the graph rounds activations by other groups than the decoder: its layers are compared with some that round none.
    beside = quantised if quantize == "int8" else _with_exact_layers(models.plain, quantised, models.stored)
    check_layers(beside, probe, *probe.graphed(directory, _WATCHED), TOLERANCES[quantize])
    (directory / _WATCHED).unlink()
    check_quantised(plain, probe.decoded(quantised), logits)


@torch.inference_mode()
def _with_exact_layers(plain: Decoder, quantised: Decoder, stored: dict[str, Stored]) -> Decoder:
    """The quantised decoder with the layers of the plain one, whose weights become the values that the quantised ones stand for."""
    for name, parameter in plain.layers.named_parameters(prefix="layers"):
        weight = stored[name]
        if isinstance(weight, QuantisedWeight):
            parameter.copy_(dequantise(weight, slice(None)))
    plain.embed, plain.head = quantised.embed, quantised.head
    return plain


def _product(weights: Weights) -> bytes:
    """A graph of one square product in the kind of most weights, which is what the machine's rate is measured with."""
    name = "layers.product"
    weight = torch.full((_PRODUCT_WIDTH, _PRODUCT_WIDTH), 0.25)
    weights.parameters[f"{name}.weight"] = torch.nn.Parameter(weight, requires_grad=False)
    nodes = Nodes(weights)
    nodes.give(nodes.linear("x", name), "y")
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, _PRODUCT_WIDTH]) for name in ("x", "y")]
    return nodes.serialised("product", info[:1], info[1:])
