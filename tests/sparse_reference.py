"""A whole sequence in one pass by the positional rule alone, from the references of the kernels: no scheduler, no steps, no memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from service.checkpoints.load import load
from service.checkpoints.manifest import Manifest
from service.kernels import reference, reference_sparse
from service.kernels.reference_sparse import ChosenFar
from service.types.kv_layout import BLOCK_TOKENS, FarStore
from service.types.model_spec import GroupedQueryAttention, ModelSpec
from tests.kernels.sparse_batches import make_store


class RuleAttend:
    """Attention over one sequence of `tokens` tokens, of which the first `prompt` are its prompt."""

    def __init__(self, spec: ModelSpec, tokens: int, prompt: int) -> None:
        self._layers = spec.layers
        self._tokens, self._prompt = tokens, prompt
        self.far_blocks_read = 0

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        spec = self._layers[layer].attention
        blocks = -(-self._tokens // BLOCK_TOKENS)
        keys, values = (_in_blocks(x, blocks) for x in (key, value))
        table = torch.arange(1, blocks + 1, dtype=torch.int32)[None]
        where = table, torch.tensor([0, self._tokens]), torch.tensor([self._tokens])
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        if spec.far is None:
            return reference.paged_attention(query, keys, values, *where, scale=scale, window=spec.window)
        far = None if spec.far.store is FarStore.EVICT else self._choose(spec, query, keys, values, table)
        rule = {"window": spec.window, "refresh": spec.far.refresh, "sink_blocks": spec.far.sink_blocks}
        return reference_sparse.window_sparse_attention(query, keys, values, *where, far=far, scale=scale, **rule)

    def _choose(self, spec: GroupedQueryAttention, query: Tensor, keys: Tensor, values: Tensor, table: Tensor) -> ChosenFar:
        far = spec.far
        assert far is not None and spec.window is not None
        parts = BLOCK_TOKENS // far.sub_block_tokens
        store = make_store(len(keys), keys.shape[1], BLOCK_TOKENS, (keys.shape[3],) * 2, far.store.value, parts, keys.dtype)
        full = torch.arange(1, self._tokens // BLOCK_TOKENS + 1)
        reference_sparse.demote(keys, values, store, full, full)
        anchors = range(0, self._tokens, far.refresh)
        ends = [reference_sparse.near_start(anchor, spec.window, far.refresh, BLOCK_TOKENS) for anchor in anchors]
        dense = [far.dense_prompts and anchor < self._prompt for anchor in anchors]
        budgets = [max(end, far.budget(a)) if whole else far.budget(a) for a, end, whole in zip(anchors, ends, dense, strict=True)]
        asked = query[list(anchors)], store, table, torch.zeros(len(ends), dtype=torch.int64), torch.tensor(ends), torch.tensor(budgets)
        choices, counts = reference_sparse.choose_far(*asked, sink_blocks=far.sink_blocks, most=max(budgets))
        of_tokens = torch.arange(self._tokens) // far.refresh
        self.far_blocks_read += int(counts[of_tokens].sum()) * keys.shape[1]
        return ChosenFar(store, table, choices, counts, of_tokens, far.budget(0))


def _in_blocks(x: Tensor, blocks: int) -> Tensor:
    """[T, H, D] as blocks 1 … n [n + 1, H, B, D]; what is past the end is NaN."""
    padded = torch.full((blocks + 1, BLOCK_TOKENS, *x.shape[1:]), torch.nan, dtype=x.dtype)
    padded[1:].view(-1, *x.shape[1:])[: len(x)] = x
    return padded.transpose(1, 2).contiguous()


class RuleModel:
    """A checkpoint computed by the rule."""

    def __init__(self, manifest: Manifest) -> None:
        self.spec = manifest.spec
        self._decoder = load(manifest, torch.device("cpu"), torch.float32)

    @torch.inference_mode()
    def logits(self, tokens: tuple[int, ...], prompt: int) -> tuple[np.ndarray, int]:
        """([T, vocab] logits after every position, far blocks read by all positions together)."""
        attend = RuleAttend(self.spec, len(tokens), prompt)
        logits = self._decoder(torch.tensor(tokens), torch.arange(len(tokens)), attend)
        return logits.numpy(), attend.far_blocks_read


def line_checkpoint(directory: Path, spec: ModelSpec, seed: int = 0) -> Path:
    """Write a random model of a version line with the tests' tokenizer."""
    from service.checkpoints.store import save
    from service.models.build import build, init_weights
    from tests.tiny_models import write_tokenizer

    decoder = build(spec, "cpu", torch.float32)
    init_weights(decoder, seed)
    files = directory.parent / f"{directory.name}-tokenizer"
    files.mkdir(parents=True)
    write_tokenizer(files)
    save(directory, spec, decoder.state_dict(), extras={path.name: path.read_bytes() for path in files.iterdir()})
    return directory
