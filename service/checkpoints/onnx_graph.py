"""An exported graph with its blocks, run by ONNX Runtime: numpy in, logits out; no torch.

Keys and values are written in place: each cache is bound as an input and as the output that replaces it, in one buffer. It does not know
plans, sequences or weights. Invariant: a block is zeroed when its first token is written, so whatever a table names is finite unless its
own sequence made it otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from service.types.kv_layout import KvGroup, KvLayout

GRAPH, WEIGHTS, ABOUT = "model.onnx", "weights.bin", "export.json"
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Rectangle(NamedTuple):
    """Slices of one length L, computed together: S slices, G groups.

    `tokens` int64 [S, L]; `starts` int64 [S], the position of each first token; `tables` G × integers [S, M], the blocks from position 0
    on; `rows` int64 [R], which of the S · L positions want logits.
    """

    tokens: Ints
    starts: Ints
    tables: tuple[NDArray[np.integer], ...]
    rows: Ints


class OnnxGraph:
    """The graph in `directory`, computing with `threads` (0: all cores) over `group_blocks` usable blocks of each group."""

    def __init__(self, directory: Path, layout: KvLayout, group_blocks: Sequence[int], threads: int = 0) -> None:
        about = json.loads((directory / ABOUT).read_text(encoding="utf-8"))
        self._layout = layout
        self._frequencies = np.array(about["inverse_frequencies"], np.float32)
        self._factor: float = about["rope_factor"]
        self._queries: list[int] = about["queries_per_kv_head"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(directory / GRAPH), options, providers=["CPUExecutionProvider"])
        self.caches: dict[str, Floats] = {}
        for group, count in zip(layout.groups, group_blocks, strict=True):
            tokens = (count + 1) * layout.block_tokens
            for layer in group.layers:
                self.caches[f"keys.{layer}"] = np.zeros((group.kv_heads, tokens, group.key_dim), np.float32)
                self.caches[f"values.{layer}"] = np.zeros((group.kv_heads, tokens, group.value_dim), np.float32)
        # These values refer to the arrays' own memory.
        self._bound = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in self.caches.items()}

    def logits(self, batch: Rectangle) -> Floats:
        """Write the keys and values of all positions and give the logits [R, vocab] of `rows`."""
        positions = batch.starts[:, None] + np.arange(batch.tokens.shape[1])
        angles = (positions[..., None].astype(np.float32) * self._frequencies).astype(np.float64)
        inputs: dict[str, NDArray[np.generic]] = {
            "tokens": batch.tokens,
            "rows": batch.rows,
            "cos": (np.cos(angles) * self._factor).astype(np.float32)[:, :, None],
            "sin": (np.sin(angles) * self._factor).astype(np.float32)[:, :, None],
        }
        for index, (group, table) in enumerate(zip(self._layout.groups, batch.tables, strict=True)):
            inputs |= self._group_inputs(index, group, table, positions)
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in self._bound.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        for name, value in self._bound.items():
            binding.bind_ortvalue_output(f"{name}.written", value)
        self._session.run_with_iobinding(binding)
        logits: Floats = binding.get_outputs()[0].numpy()
        return logits

    def _group_inputs(self, index: int, group: KvGroup, table: NDArray[np.integer], positions: Ints) -> dict[str, NDArray[np.generic]]:
        """Where the tokens go, which blocks are read (of a window only those it reaches) and what each query may not see."""
        width = self._layout.block_tokens
        written = np.take_along_axis(table, positions // width, axis=1).astype(np.int64)
        self._clear(group, written[positions % width == 0])
        first = np.array([self._layout.first_read(group, int(start)) for start in positions[:, 0]])
        reach = int((positions[:, -1] // width - first).max()) + 1
        entries = first[:, None] + np.arange(reach)
        last = positions[:, -1:] // width  # a block behind it may be there already, as its earlier owner left it
        read = np.where(entries <= last, np.take_along_axis(table, np.minimum(entries, last), axis=1), 0)
        keys = first[:, None] * width + np.arange(reach * width)
        behind = positions[:, :, None] - keys[:, None, :]
        hidden = (behind < 0) if group.window is None else (behind < 0) | (behind >= group.window)
        mask = np.where(hidden, np.float32("-inf"), np.float32(0))
        flat = (written * width + positions % width).reshape(1, -1)
        places = np.stack(np.broadcast_arrays(np.arange(group.kv_heads)[:, None], flat), axis=-1)
        return {
            f"places.{index}": places,
            f"tables.{index}": read.astype(np.int64),
            f"mask.{index}": np.tile(mask, (1, self._queries[index], 1)),
        }

    def _clear(self, group: KvGroup, blocks: Ints) -> None:
        """What an earlier owner left behind the last token would be multiplied by 0, and not a number times 0 is not a number."""
        for block in blocks.tolist():
            here = slice(block * self._layout.block_tokens, (block + 1) * self._layout.block_tokens)
            for layer in group.layers:
                self.caches[f"keys.{layer}"][:, here] = 0
                self.caches[f"values.{layer}"][:, here] = 0
