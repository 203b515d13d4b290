"""Exported graphs run by ONNX Runtime: a decoder with its blocks, numpy in, logits out; and its encoder of images. No torch.

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
from service.checkpoints.onnx_support import ABOUT, ENCODER, FORMAT, GRAPH, PRODUCT
from service.types.kv_layout import KvGroup, KvLayout
from service.types.vision import CHANNELS, Grid, VisionSpec

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


class Sight(NamedTuple):
    """What L positions of one sequence show and see of images.

    `shown` [m, dim] stand for the tokens of the positions `at` int64 [m]. `counts` int64 [L] of the image tokens, whose `keys` and `values`
    [N, Hkv, D] come in order of position, are seen by each position.
    """

    at: Ints
    shown: Floats
    counts: Ints
    keys: Floats
    values: Floats


class Seen(NamedTuple):
    """The same of all slices of a rectangle, as the graph takes it: M image tokens shown, V slices that see some, N of them at most.

    `shown_at` int64 [M, 2] (slice, place in it), `shown` [M, dim]; `seers` int64 [V], and which of their positions see anything: `sees`
    bool [V, L, 1]; `image_keys`, `image_values` [Hkv, V, N, D]; `image_mask` [V, H / Hkv · L, N].
    """

    shown_at: Ints
    shown: Floats
    seers: Ints
    sees: NDArray[np.bool_]
    image_keys: Floats
    image_values: Floats
    image_mask: Floats


def seen_by(sights: Sequence[Sight | None], queries: int) -> Seen | None:
    """Join what each slice of a rectangle shows and sees, `queries` heads to one of the keys; None where none of them sees any image."""
    found = [(index, sight) for index, sight in enumerate(sights) if sight is not None]
    if not found:
        return None
    at = [np.stack((np.full(len(sight.at), index), sight.at), axis=1) for index, sight in found]
    counts = np.stack([sight.counts for _, sight in found])
    most, heads, size = max(len(sight.keys) for _, sight in found), *found[0][1].keys.shape[1:]
    keys, values = (np.zeros((heads, len(found), most, size), np.float32) for _ in range(2))
    for place, (_, sight) in enumerate(found):
        keys[:, place, : len(sight.keys)] = sight.keys.transpose(1, 0, 2)
        values[:, place, : len(sight.keys)] = sight.values.transpose(1, 0, 2)
    # A position that sees none is computed with one and left as it was: a softmax over nothing is not a number.
    hidden = np.arange(most) >= np.maximum(counts, 1)[..., None]
    mask = np.where(hidden, np.float32("-inf"), np.float32(0))
    return Seen(
        shown_at=np.concatenate(at).astype(np.int64),
        shown=np.concatenate([sight.shown for _, sight in found]),
        seers=np.array([index for index, _ in found], np.int64),
        sees=(counts > 0)[..., None],
        image_keys=keys,
        image_values=values,
        image_mask=np.tile(mask, (1, queries, 1)),
    )


class Rectangle(NamedTuple):
    """Slices of one length L, computed together: S slices, G groups.

    `tokens` int64 [S, L]; `starts` int64 [S], the position of each first token; `tables` G × integers [S, M], the blocks from position 0
    on; `rows` int64 [R], which of the S · L positions want logits; `seen` what they show and see of images.
    """

    tokens: Ints
    starts: Ints
    tables: tuple[NDArray[np.integer], ...]
    rows: Ints
    seen: Seen | None = None


class OnnxGraph:
    """The graph in `directory`, computing with `threads` (0: all cores) over `group_blocks` usable blocks of each group.

    `name` is its file. After a call `gates` are the sums, head by head, of the gates of the positions that saw images: those of the text,
    then those of the images. Further outputs are `watched`, in their order. Raises DamagedGraph where it is not one that this code wrote.
    """

    def __init__(self, directory: Path, layout: KvLayout, group_blocks: Sequence[int], threads: int = 0, name: str = GRAPH) -> None:
        about = read_about(directory)
        self.layout = layout
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
        further = {output.name: output.shape for output in self._session.get_outputs()[1 + len(self.caches) :]}
        self.gates = np.zeros(further.pop("gates", [0])[0], np.float32)
        if len(self.gates):
            self._binding.bind_output("gates", "cpu", 0, np.float32, self.gates.shape, self.gates.ctypes.data)
        self._unseen = {entry.name: _empty(entry) for entry in self._session.get_inputs() if entry.name in Seen._fields}
        self._watching = list(further)
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
        for index, (group, table) in enumerate(zip(self.layout.groups, batch.tables, strict=True)):
            inputs |= self._group_inputs(index, group, table, positions)
        inputs |= self._unseen if batch.seen is None else batch.seen._asdict()
        for name, array in inputs.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
        logits = np.empty((len(batch.rows), self.vocab_size), np.float32)
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        for name in self._watching:
            self._binding.bind_output(name)
        try:
            self._session.run_with_iobinding(self._binding)
        except _FAILURES as error:
            raise _failure(error) from None
        self.watched = [value.numpy() for value in self._binding.get_outputs()[-len(self._watching) :]] if self._watching else []
        return logits

    def _group_inputs(self, index: int, group: KvGroup, table: NDArray[np.integer], positions: Ints) -> dict[str, NDArray[np.generic]]:
        """Where the tokens go, which blocks are read (of a window only those it reaches) and what each query may not see."""
        width = self.layout.block_tokens
        written = np.take_along_axis(table, positions // width, axis=1).astype(np.int64)
        self._clear(group, written[positions % width == 0])
        entries = self._entries(group, positions)
        last = positions[:, -1:] // width  # a block behind it may be there already, as its earlier owner left it
        read = np.where(entries <= last, np.take_along_axis(table, np.minimum(entries, last), axis=1), 0)
        mask = np.where(self._hidden(group, positions, entries), np.float32("-inf"), np.float32(0))
        flat = (written * width + positions % width).reshape(1, -1)
        places = np.stack(np.broadcast_arrays(np.arange(group.kv_heads)[:, None], flat), axis=-1)
        return {
            f"places.{index}": places,
            f"tables.{index}": read.astype(np.int64),
            # With one query a sequence the mask is the same for all heads, and the graph repeats it.
            f"mask.{index}": mask if mask.shape[1] == 1 else np.tile(mask, (1, self._queries[index], 1)),
        }

    def _entries(self, group: KvGroup, positions: Ints) -> Ints:
        """Which entries of its table each slice may read [S, B]: sinks first, then from the first that its window reaches on."""
        sinks = group.sink_blocks
        first = np.array([max(self.layout.first_read(group, int(start)), sinks) for start in positions[:, 0]])
        reach = int((positions[:, -1] // self.layout.block_tokens - first).max()) + 1
        return np.concatenate([np.tile(np.arange(sinks), (len(first), 1)), first[:, None] + np.arange(max(reach, 0))], axis=1)

    def _hidden(self, group: KvGroup, positions: Ints, entries: Ints) -> NDArray[np.bool_]:
        """What each query [S, L] does not see of the tokens of the entries [S, B]: bool [S, L, 64 · B]."""
        width = self.layout.block_tokens
        keys = (entries[..., None] * width + np.arange(width)).reshape(len(entries), -1)
        behind = positions[:, :, None] - keys[:, None, :]
        if group.window is None:
            return np.asarray(behind < 0)
        if group.far is None:
            return np.asarray((behind < 0) | (behind >= group.window))
        # Such a window begins with a whole block, and the sinks before it are always seen.
        starts = np.array([self.layout.first_read(group, position) for position in positions.reshape(-1).tolist()])
        blocks = (keys // width)[:, None, :]
        return np.asarray((behind < 0) | ((blocks < starts.reshape(*positions.shape, 1)) & (blocks >= group.sink_blocks)))

    def _clear(self, group: KvGroup, blocks: Ints) -> None:
        """What an earlier owner left behind the last token would be multiplied by 0, and not a number times 0 is not a number."""
        for block in blocks.tolist():
            here = slice(block * self.layout.block_tokens, (block + 1) * self.layout.block_tokens)
            for layer in group.layers:
                self.caches[f"keys.{layer}"][:, here] = 0
                self.caches[f"values.{layer}"][:, here] = 0


class OnnxEncoder:
    """The encoder of images in `directory`, computing with `threads` (0: all cores). Raises DamagedGraph where it is not one of ours."""

    def __init__(self, directory: Path, spec: VisionSpec, threads: int = 0) -> None:
        self.spec = spec
        self._session = _open(directory / ENCODER, threads)

    def encode(self, pixels: bytes, grid: Grid) -> tuple[Floats, Floats, Floats]:
        """RGB bytes of an image of that grid, row by row -> image tokens [N, dim], their keys and values [N, Hkv, D]."""
        patch, merge = self.spec.patch, self.spec.merge
        cut = np.frombuffer(pixels, np.uint8).reshape(grid.rows, merge, patch, grid.columns, merge, patch, CHANNELS)
        # Token by token, and within one patch by patch: those that are merged lie beside each other.
        patches = cut.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, self.spec.patch_values)
        places = np.indices((grid.rows * merge, grid.columns * merge)).reshape(2, grid.rows, merge, grid.columns, merge)
        down, along = np.ascontiguousarray(places.transpose(0, 1, 3, 2, 4)).reshape(2, -1)
        try:
            embeddings, keys, values = self._session.run(None, {"patches": patches, "down": down, "along": along})
        except _FAILURES as error:
            raise _failure(error) from None
        return embeddings, keys, values


def _empty(entry: Any) -> NDArray[np.generic]:
    """An input with nothing in it."""
    kind = {"tensor(int64)": np.int64, "tensor(bool)": np.bool_}.get(entry.type, np.float32)
    return np.zeros([size if isinstance(size, int) else 0 for size in entry.shape], kind)


def _failure(error: Exception) -> Exception:
    """A MemoryError where the runtime reports a failed allocation as one of its own errors."""
    return MemoryError(str(error)) if "allocat" in str(error).lower() else error


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
