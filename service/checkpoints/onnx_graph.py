"""An exported graph with its blocks, run by ONNX Runtime: numpy in, logits out; no torch.

Keys and values are written in place: each cache is bound as an input and as the output that replaces it, in one buffer. It does not know
plans, sequences or weights. Invariant: a block is zeroed when its first token is written, so whatever a table names is finite unless its
own sequence made it otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.checkpoints.digests import file_digest
from service.checkpoints.onnx_support import ABOUT, FORMAT, GRAPH, PRODUCT
from service.types.kv_layout import KvGroup, KvLayout

# Official builds from 1.29 on send usage data to their maker unless this is said before the library is loaded. Nothing here may phone home.
os.putenv("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
_state = onnxruntime.capi.onnxruntime_pybind11_state
_FAILURES = (_state.RuntimeException, _state.Fail)
_REFUSALS = (*_FAILURES, _state.InvalidProtobuf, _state.InvalidGraph, _state.InvalidArgument, _state.NoSuchFile, _state.NotImplemented)

SPIN_US = "20"


class DamagedGraph(Exception):
    """What lies in an exported directory is not what was written there; it is to be exported again."""


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
    """The graph in `directory`, computing with `threads` (0: all cores) over `group_blocks` usable blocks of each group.

    `name` is its file; outputs beyond logits and caches are `watched`, in their order. Raises DamagedGraph where it is not one that this
    code wrote.
    """

    def __init__(self, directory: Path, layout: KvLayout, group_blocks: Sequence[int], threads: int = 0, name: str = GRAPH) -> None:
        about = read_about(directory)
        self._layout = layout
        self._frequencies = np.array(about["inverse_frequencies"], np.float32)
        self._factor: float = about["rope_factor"]
        self._queries: list[int] = about["queries_per_kv_head"]
        self._session = _open(directory / name, threads)
        self.vocab_size = int(self._session.get_outputs()[0].shape[1])
        self.caches: dict[str, Floats] = {}
        for group, count in zip(layout.groups, group_blocks, strict=True):
            tokens = (count + 1) * layout.block_tokens
            for layer in group.layers:
                self.caches[f"keys.{layer}"] = np.zeros((group.kv_heads, tokens, group.key_dim), np.float32)
                self.caches[f"values.{layer}"] = np.zeros((group.kv_heads, tokens, group.value_dim), np.float32)
        self._binding = self._session.io_binding()
        for cache, array in self.caches.items():
            # The value refers to the array's own memory, and the binding keeps it.
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_input(cache, value)
            self._binding.bind_ortvalue_output(f"{cache}.written", value)
        self._watching = [output.name for output in self._session.get_outputs()[1 + len(self.caches) :]]
        self.watched: list[Floats] = []

    def logits(self, batch: Rectangle) -> Floats:
        """Write the keys and values of all positions and give the logits [R, vocab] of `rows`. Raises MemoryError."""
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
        for name, array in inputs.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
        logits = np.empty((len(batch.rows), self.vocab_size), np.float32)
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        for name in self._watching:
            self._binding.bind_output(name)
        try:
            self._session.run_with_iobinding(self._binding)
        except _FAILURES as error:
            if "allocat" in str(error).lower():
                raise MemoryError(str(error)) from None
            raise
        self.watched = [value.numpy() for value in self._binding.get_outputs()[-len(self._watching) :]] if self._watching else []
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
            # With one query a sequence the mask is the same for all heads, and the graph repeats it.
            f"mask.{index}": mask if mask.shape[1] == 1 else np.tile(mask, (1, self._queries[index], 1)),
        }

    def _clear(self, group: KvGroup, blocks: Ints) -> None:
        """What an earlier owner left behind the last token would be multiplied by 0, and not a number times 0 is not a number."""
        for block in blocks.tolist():
            here = slice(block * self._layout.block_tokens, (block + 1) * self._layout.block_tokens)
            for layer in group.layers:
                self.caches[f"keys.{layer}"][:, here] = 0
                self.caches[f"values.{layer}"][:, here] = 0


def read_about(directory: Path) -> dict[str, Any]:
    """What an export says of itself. Raises DamagedGraph."""
    try:
        about: dict[str, Any] = json.loads((directory / ABOUT).read_text(encoding="utf-8"))
        found = about["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedGraph(f"{directory.name}/{ABOUT} cannot be read: {error}") from None
    if found != FORMAT:
        raise DamagedGraph(f"{directory.name} is written as {found} and {FORMAT} is read")
    return about


def verify(directory: Path) -> None:
    """Compare every file with the digest written at export; some 2 GB a second. Raises DamagedGraph."""
    about = read_about(directory)
    for name, digest in about["sha256"].items():
        try:
            found = file_digest(directory / name)
        except OSError as error:
            raise DamagedGraph(f"{directory.name}/{name} cannot be read: {error.strerror}") from None
        if found != digest:
            raise DamagedGraph(f"{directory.name}/{name} has other contents than were written")


def product(directory: Path, threads: int) -> tuple[Callable[[], object], float]:
    """A square product as the graph computes them, to be timed, and its operations."""
    session = _open(directory / PRODUCT, threads)
    width = int(session.get_inputs()[0].shape[1])
    rows = np.full((width, width), 0.5, np.float32)
    return lambda: session.run(None, {"x": rows}), 2.0 * width**3


def _open(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads wait busily for each other no longer than a small operation takes, and sleep between steps: the front end shares the cores,
    # and where others do too, longer waiting halves the speed (docs/log.md).
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _REFUSALS as error:
        raise DamagedGraph(f"{path.parent.name}/{path.name} cannot be opened: {str(error).splitlines()[0]}") from None
