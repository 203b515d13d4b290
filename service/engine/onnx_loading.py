"""From a LoadRequest to an OnnxBackend: the exported graphs, found or made, the memory plan, blocks, a first step; with times and progress.

Only the worker of exported graphs imports this. Invariants: nothing here imports torch; a graph serves only after its files were
compared with the digests written at export, and one that is damaged is made again, once.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from service.checkpoints.cache_room import entry_bytes, make_room, touch
from service.checkpoints.manifest import Manifest
from service.checkpoints.onnx_graph import DamagedGraph, OnnxEncoder, OnnxGraph, read_about, verify
from service.checkpoints.onnx_support import WEIGHTS, graph_directory, refuse
from service.checkpoints.quantisation import weight_bytes
from service.engine.batch import Tables
from service.engine.export_messages import Answer, Export, Refused
from service.engine.graph_images import GraphImages
from service.engine.loaded import WARM_UP_TOKENS, Loaded, Phases, ProgressCallback, read_as_served
from service.engine.memory import MemoryPlan, Usage, available_bytes, plan_memory, resident_bytes, settled_bytes
from service.engine.onnx_backend import OnnxBackend
from service.engine.onnx_limits import machine_limits
from service.engine.rectangles import Costs
from service.engine.sampler import Sampler
from service.processes import ChildLost, ChildProcess
from service.processor import usable_cores
from service.types.errors import CheckpointError
from service.types.plan import BackendInfo, LoadRequest

EXPORT_CHILD = "service.engine.export_child"
ELEMENT_BYTES = 4


def load_graph(request: LoadRequest, import_s: float, progress: ProgressCallback) -> Loaded:
    """Load it all. Raises CheckpointError or CapacityError."""
    phases = Phases(import_s)
    manifest = read_as_served(request)
    quantize = choose_quantize(request, manifest)
    refuse(manifest.spec, quantize)
    threads = request.threads or usable_cores()
    phases.end("plan")
    with _place(request, manifest, quantize) as place:
        if not place.directory.is_dir():
            _export(request, place, quantize, progress)
            phases.end("export")
        try:
            opened = _open(request, manifest, place.directory, threads)
        except DamagedGraph as damage:
            print(f"the graph is exported again: {damage}", file=sys.stderr, flush=True)
            shutil.rmtree(place.directory, ignore_errors=True)
            _export(request, place, quantize, progress)
            opened = _open(request, manifest, place.directory, threads)
        phases.end("graph")
        backend = _assemble(opened, manifest, request)
        backend.warm_up(min(WARM_UP_TOKENS, opened.memory.context_tokens))
        phases.end("warm_up")
        limits = machine_limits(place.directory, threads, request.machine_limits)
        phases.end("limits")
    spec, memory = manifest.spec, opened.memory
    runtime_bytes = max(settled_bytes() - opened.weight_bytes, dict(memory.lines)["runtime"])
    info = BackendInfo(
        kv_layout=spec.kv_layout(),
        group_blocks=memory.group_blocks,
        max_rows=request.max_rows,
        max_step_tokens=request.max_step_tokens,
        context_tokens=memory.context_tokens,
        vocab_size=spec.vocab_size,
        dtype="float32",
        tier="cpu",
        device="cpu",
        memory_bytes=(*memory.lines[:-1], ("runtime", runtime_bytes)),
        phases_s=tuple(phases.seconds),
        dispatch=(("decoder", "onnx"),),
        pid=os.getpid(),
        image_tokens=memory.image_tokens,
        limits=limits,
        quantize=quantize,
        backend="onnx",
    )
    return Loaded(backend, info, spec.flops(1, 0.0), spec.flops(1, 1.0) - spec.flops(1, 0.0))


def choose_quantize(request: LoadRequest, manifest: Manifest) -> str:
    """An explicit choice, else the line's own."""
    return manifest.spec.precision.quantize if request.quantize == "auto" else request.quantize


class _Place:
    """Where the graph lies: in the cache, or, where none is kept, in a directory that goes when the graph is open. A context manager."""

    def __init__(self, directory: Path, cache: Path | None, most_bytes: int) -> None:
        self.directory = directory
        self.cache = cache
        self.most_bytes = most_bytes

    def __enter__(self) -> _Place:
        return self

    def __exit__(self, *_: object) -> None:
        if self.cache is None:
            shutil.rmtree(self.directory.parent, ignore_errors=True)
        else:
            touch(self.directory)


def _place(request: LoadRequest, manifest: Manifest, quantize: str) -> _Place:
    """In the cache where one is named that the graph fits into. Raises CheckpointError where the directory is none."""
    kept = request.quantize_cache != "none"
    if kept:
        try:
            cache = Path(request.quantize_cache).expanduser()
        except RuntimeError:
            raise CheckpointError(
                f"--quantize_cache {request.quantize_cache}: this user has no home directory; name another, or none."
            ) from None
        if cache.exists() and not cache.is_dir():
            raise CheckpointError(f"--quantize_cache {request.quantize_cache} is not a directory: name one, or none.")
        directory = graph_directory(manifest, cache, quantize)
        if directory.is_dir() or weight_bytes(manifest.spec, ELEMENT_BYTES, quantize) <= request.quantize_cache_bytes:
            return _Place(directory, cache, request.quantize_cache_bytes)
    own = Path(tempfile.mkdtemp(prefix="deepseek-graph-"))
    return _Place(graph_directory(manifest, own, quantize), None, 0)


def _export(request: LoadRequest, place: _Place, quantize: str, progress: ProgressCallback) -> None:
    """Have a child write the graph; this process goes on without torch. Raises CheckpointError."""
    progress("export", 0.0)
    try:
        if place.cache is not None:
            place.cache.mkdir(parents=True, exist_ok=True)
        answer = asyncio.run(_ask(Export(request.directory, request.attention, quantize, str(place.directory), request.threads)))
    except ChildLost as lost:
        raise CheckpointError(f"exporting the model for ONNX Runtime ended ({lost.reason}): serve it through torch.") from None
    except OSError as error:
        raise CheckpointError(f"The exported graph cannot be written to {place.directory.parent}: {error.strerror}.") from None
    if isinstance(answer, Refused):
        raise CheckpointError(answer.message)
    if place.cache is not None:
        make_room(place.cache, 0, max(place.most_bytes, entry_bytes(place.directory)))
    progress("export", 1.0)


async def _ask(question: Export) -> Answer:
    child = await ChildProcess.spawn(EXPORT_CHILD, Answer)
    try:
        # The parent's deadline for loading holds for this too: it ends this process, and with it the child.
        answer: Answer = await child.ask(question, deadline_s=float(1 << 30))
        return answer
    finally:
        await child.stop()


class _Opened(NamedTuple):
    graph: OnnxGraph
    memory: MemoryPlan
    weight_bytes: int
    encoder: OnnxEncoder | None


def _open(request: LoadRequest, manifest: Manifest, directory: Path, threads: int) -> _Opened:
    """Plan the memory and open the graphs while their files are compared with their digests. Raises DamagedGraph or CapacityError."""
    read_about(directory)
    try:
        size = (directory / WEIGHTS).stat().st_size
    except OSError as error:
        raise DamagedGraph(f"{directory.name}/{WEIGHTS} cannot be read: {error.strerror}") from None
    spec, layout = manifest.spec, manifest.spec.kv_layout()
    memory = plan_memory(spec, layout, ELEMENT_BYTES, request, Usage(size, resident_bytes(), available_bytes()))
    with ThreadPoolExecutor(1) as pool:
        comparing = pool.submit(verify, directory)
        graph = OnnxGraph(directory, layout, memory.group_blocks, threads)
        encoder = None if spec.vision is None else OnnxEncoder(directory, spec.vision, threads)
        comparing.result()
    return _Opened(graph, memory, size, encoder)


def _assemble(opened: _Opened, manifest: Manifest, request: LoadRequest) -> OnnxBackend:
    spec, memory = manifest.spec, opened.memory
    tables = Tables(spec.kv_layout(), memory.group_blocks, request.max_rows, memory.context_tokens, spec.vocab_size)
    images = GraphImages(spec, opened.encoder, memory.image_tokens)
    return OnnxBackend(opened.graph, tables, Sampler(request.max_rows, spec.vocab_size), Costs.of(spec, opened.weight_bytes), images)
