"""What an exported graph can compute, and where exported graphs lie on disk. No torch, no ONNX: the front end asks here first.

It does not know how a graph is written or run. Invariants: what is refused is refused by name in one sentence; a graph's name follows from
the checkpoint, its weight files, the spec served, the format and the kind of weights, so a graph that is found is the one that was
meant: where exact products need another form of weights, that is part of the kind.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from service.checkpoints.manifest import Manifest
from service.checkpoints.stored_tensors import find_weight_files
from service.processor import saturates_bytes
from service.types.errors import CheckpointError
from service.types.model_spec import ModelSpec, RopeScaling

FORMAT = "deepseek-onnx-5"
# The files of an exported graph: the decoder, the encoder of one that reads images, one square product in its kind of weights, all weights,
# and what else a reader must know.
GRAPH, ENCODER, PRODUCT, WEIGHTS, ABOUT = "model.onnx", "encoder.onnx", "product.onnx", "weights.bin", "export.json"
SUFFIX = ".onnx"
KINDS = ("none", "int8", "int4")
FAR, DYNAMIC = "far blocks", "dynamic rope scaling"
# What else than torch serves a model, where flags may be the reason.
_INSTEAD = {
    FAR: "give them up (--kv_far evict), or serve a version without them (--version v3.5, and no --attention_window)",
    DYNAMIC: "or serve a version without it (--version v3.5, and no --rope_scaling dynamic)",
}


def unsupported(spec: ModelSpec, quantize: str) -> str:
    """The first thing of this model that the graph does not compute, or nothing."""
    reasons = {
        f"{quantize} weights": quantize not in KINDS,
        "images without a fusion": (spec.vision is None) != (spec.fusion is None),
        FAR: any(group.source is not None for group in spec.kv_layout().groups),
        DYNAMIC: spec.rope.scaling is RopeScaling.DYNAMIC,
        "layers of one cache group with different numbers of heads": any(
            len({queries_per_kv_head(spec, layer) for layer in group.layers}) > 1 for group in spec.kv_layout().groups
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def refuse(spec: ModelSpec, quantize: str) -> None:
    """Raise CheckpointError for what the graph does not compute; its words are for who serves the model."""
    if reason := unsupported(spec, quantize):
        instead = _INSTEAD.get(reason, "or serve another version (--version v3.5)")
        raise CheckpointError(
            f"The ONNX graph does not support {reason}: serve this model through torch (--backend torch in place of --onnx_runtime), "
            f"{instead}."
        )


def queries_per_kv_head(spec: ModelSpec, layer: int) -> int:
    """Query heads that share one K/V head in a layer."""
    attention = spec.layers[layer].attention
    return attention.heads // attention.kv_heads


def graph_directory(manifest: Manifest, cache: Path, quantize: str) -> Path:
    """Where the graph of a checkpoint lies in `cache`, whether it is there or not."""
    identity = hashlib.sha256(f"{manifest.digest} {FORMAT} {manifest.spec}".encode())
    for file in find_weight_files(manifest.directory).files:
        status = file.stat()
        identity.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    form = "-unsigned" if quantize != "none" and saturates_bytes() else ""
    return cache / f"{manifest.digest[:12]}-{identity.hexdigest()[:12]}-{quantize}{form}{SUFFIX}"
