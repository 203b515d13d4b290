"""Tiny models, workers and the dense forward that every paged result is compared with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from service.checkpoints.load import Quantisation, load
from service.checkpoints.manifest import Manifest, read_manifest
from service.engine.batch import Tables
from service.engine.kv_pool import KvPool
from service.engine.rectangles import Costs
from service.engine.sampler import Sampler
from service.engine.torch_backend import TorchBackend
from service.kernels.dispatch import force
from service.kernels.native import quantised as native_quantised
from service.models.attention import DenseAttend
from service.models.decoder import Decoder
from tests.engine.drivers import Driver
from tests.tiny_models import build_tiny

WINDOW = 70
# Threads cost more than they give at these sizes.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def full_model(tmp_path_factory):
    """A directory with a qwen3 of full attention, context 256."""
    return build_tiny(tmp_path_factory.mktemp("full") / "model", "qwen3")


@pytest.fixture(scope="session")
def mixed_model(tmp_path_factory):
    """A directory with a qwen2 whose first layers are full and whose others see a window of 70 tokens: two KV groups."""
    return build_tiny(
        tmp_path_factory.mktemp("mixed") / "model",
        "qwen2",
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=2,
        max_position_embeddings=512,
    )


class Dense:
    """The same model without a cache: one forward over whole sequences."""

    def __init__(self, directory) -> None:
        self.manifest = read_manifest(directory)
        self.decoder = load(self.manifest, "cpu", torch.float32)

    @torch.inference_mode()
    def logits(self, tokens) -> np.ndarray:
        """[T, vocab] logits after every position."""
        attend = DenseAttend(1, len(tokens), self.decoder.spec.layers)
        return self.decoder(torch.tensor(tokens), torch.arange(len(tokens)), attend).numpy()

    def log_probs(self, tokens) -> np.ndarray:
        """[T, vocab] log-probs of the next token after every position."""
        logits = self.logits(tokens).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def greedy(self, prompt, count) -> list[int]:
        """The greedy continuation, each token from a fresh forward."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


@pytest.fixture
def whole_or_separate():
    """make(manifest, name) -> the model in int8 whose layers are computed by `name` of decoder_layers."""
    if native_quantised.unsupported() is not None:
        pytest.skip("no compiled integer products here")

    def make(manifest, name: str) -> Quantised:
        force("decoder_layers", name)
        return Quantised(manifest, load(manifest, "cpu", torch.float32, quantisation=Quantisation("int8")))

    yield make
    force("decoder_layers", None)


class Quantised(NamedTuple):
    """A quantised decoder, where `Dense` has a plain one."""

    manifest: Manifest
    decoder: Decoder


@pytest.fixture(scope="session")
def full_dense(full_model):
    return Dense(full_model)


@pytest.fixture(scope="session")
def mixed_dense(mixed_model):
    return Dense(mixed_model)


@pytest.fixture
def backend_of():
    """A function that makes a backend in this process over a dense model's weights: (backend, pool, tables)."""

    def make(dense: Dense, blocks: int = 40, max_rows: int = 8):
        decoder, spec = dense.decoder, dense.manifest.spec
        layout = spec.kv_layout()
        counts = (blocks,) * len(layout.groups)
        pool = KvPool(layout, counts, torch.float32, torch.device("cpu"))
        for layer in range(len(spec.layers)):
            for tensor in pool.blocks_of(layer):
                tensor.fill_(float("nan"))
        tables = Tables(layout, counts, max_rows, spec.context_tokens, spec.vocab_size)
        return TorchBackend(decoder, pool, tables, Sampler(max_rows, spec.vocab_size)), pool, tables

    return make


@pytest.fixture
def torch_driver(backend_of):
    """A function that makes a driver over a fresh torch backend of a dense model."""

    def make(dense):
        backend, pool, tables = backend_of(dense)

        def spoil(layer, blocks) -> None:
            for tensor in pool.blocks_of(layer):
                tensor[blocks] = float("nan")

        return Driver(backend, pool.layout, tables, spoil)

    return make


@pytest.fixture(scope="session")
def graph_of(tmp_path_factory):
    """A function that gives the exported graph of a dense model."""
    found = {}

    def directory(dense):
        from service.checkpoints.onnx_export import export

        if dense.manifest.digest not in found:
            found[dense.manifest.digest] = tmp_path_factory.mktemp("graphs") / "graph.onnx"
            export(dense.manifest, found[dense.manifest.digest], "none")
        return found[dense.manifest.digest]

    return directory


@pytest.fixture
def onnx_driver(graph_of):
    """A function that makes a driver over a fresh graph backend of a dense model."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from service.checkpoints.onnx_graph import OnnxGraph
    from service.engine.graph_images import GraphImages
    from service.engine.onnx_backend import OnnxBackend

    def make(dense, blocks: int = 40):
        spec = dense.manifest.spec
        layout = spec.kv_layout()
        counts = (blocks,) * len(layout.groups)
        graph = OnnxGraph(graph_of(dense), layout, counts, threads=1)

        def spoil(layer, blocks) -> None:
            for block in blocks:
                for cache in (graph.caches[f"keys.{layer}"], graph.caches[f"values.{layer}"]):
                    cache[:, block * 64 : (block + 1) * 64] = np.nan

        for cache in graph.caches.values():
            cache[:, 64:] = np.nan
        tables = Tables(layout, counts, 8, spec.context_tokens, spec.vocab_size)
        backend = OnnxBackend(graph, tables, Sampler(8, spec.vocab_size), Costs.of(spec, 1 << 20), GraphImages(spec))
        return Driver(backend, layout, tables, spoil, blocks)

    return make


@pytest.fixture(params=["torch", "onnx"])
def driver_of(request):
    """Both of them: what every backend must do."""
    return request.getfixturevalue(f"{request.param}_driver")
