"""An exported graph as a Backend without a process, where `inline_backend` has the torch engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from service.checkpoints.long_context import adapt
from service.checkpoints.manifest import read_manifest
from service.checkpoints.onnx_graph import OnnxEncoder, OnnxGraph
from service.engine.batch import Tables
from service.engine.graph_images import GraphImages
from service.engine.onnx_backend import OnnxBackend
from service.engine.rectangles import Costs
from service.engine.sampler import Sampler
from service.types.plan import BackendInfo
from service.types.settings import AttentionSettings
from tests.inline_backend import Inline


class InlineGraph(Inline):
    """Implements types.plan.Backend over an exported graph in this process; every start begins with empty tables and poisoned blocks."""

    def __init__(
        self,
        directory: Path,
        graph: Path,
        blocks: int = 64,
        lose_at: frozenset[int] = frozenset(),
        image_tokens: int = 512,
        attention: AttentionSettings | None = None,
    ) -> None:
        super().__init__(lose_at)
        self.spec = adapt(read_manifest(directory).spec, attention or AttentionSettings())
        self.graph, self.blocks = graph, blocks
        self.image_tokens = image_tokens if self.spec.vision is not None else 0

    async def start(self) -> BackendInfo:
        spec = self.spec
        layout = spec.kv_layout()
        counts = (self.blocks,) * len(layout.groups)
        graph = OnnxGraph(self.graph, layout, counts, 1)
        for cache in graph.caches.values():
            cache[:, 64:] = np.nan
        tables = Tables(layout, counts, 32, spec.context_tokens, spec.vocab_size)
        encoder = None if spec.vision is None else OnnxEncoder(self.graph, spec.vision, 1)
        images = GraphImages(spec, encoder, self.image_tokens)
        self.engine = OnnxBackend(graph, tables, Sampler(32, spec.vocab_size), Costs.of(spec, 1 << 16), images)
        self.starts += 1
        sizes = (32, 4096, spec.context_tokens, spec.vocab_size)
        return BackendInfo(layout, counts, *sizes, "float32", "cpu", "inline", image_tokens=self.image_tokens)
