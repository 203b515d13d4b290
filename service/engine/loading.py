"""From a LoadRequest to a TorchBackend: device and dtype, the memory plan, weights, blocks, a first step; with times and progress.

Only the worker imports this. Invariant: what is reported is what was taken: bytes, phases and the dtype in use.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from service.checkpoints.load import Quantisation, load
from service.checkpoints.manifest import Manifest
from service.checkpoints.quantisation import weight_bytes
from service.checkpoints.quantised_cache import cache_in
from service.engine.batch import Tables
from service.engine.cuda_graph import CudaRecorder
from service.engine.deterministic import require_deterministic
from service.engine.kv_pool import KvPool
from service.engine.limits import machine_limits
from service.engine.loaded import WARM_UP_TOKENS, Loaded, Phases, ProgressCallback, read_as_served
from service.engine.memory import MemoryPlan, Usage, available_bytes, plan_memory, resident_bytes, settled_bytes
from service.engine.sampler import Sampler
from service.engine.torch_backend import TorchBackend
from service.kernels.dispatch import chosen, require_steady
from service.kernels.native.binding import describe
from service.kernels.native.linear import multiplies_bfloat16
from service.models.decoder import Decoder
from service.processor import computes_bfloat16, worthwhile_threads
from service.types.errors import CapacityError
from service.types.kv_layout import KvLayout
from service.types.model_spec import ELEMENT_BYTES, ModelSpec
from service.types.plan import BackendInfo, LoadRequest

KEPT_TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


def load_backend(request: LoadRequest, import_s: float, progress: ProgressCallback) -> Loaded:
    """Load it all. Raises CheckpointError or CapacityError."""
    phases = Phases(import_s)
    manifest = read_as_served(request)
    spec = manifest.spec
    torch.set_num_threads(request.threads or worthwhile_threads(_products(spec)))
    device, quantize, dtype, kept = _choose_place(request, manifest)
    request = replace(request, kv_cache_dtype=kept)
    element_bytes = ELEMENT_BYTES[dtype]
    layout = _kept_layout(spec, kept)
    usage = Usage(weight_bytes(spec, element_bytes, quantize), resident_bytes(), _free_bytes(device), device.type == "cuda")
    memory = plan_memory(spec, layout, element_bytes, request, usage)
    phases.end("plan")
    decoder = load(
        manifest,
        device,
        getattr(torch, dtype),
        lambda done, total: progress("weights", done / max(total, 1)),
        quantisation=Quantisation(quantize, cache_in(request.quantize_cache, request.quantize_cache_bytes)),
    )
    phases.end("weights")
    backend = _assemble(decoder, layout, memory, request, KEPT_TYPES[kept])
    phases.end("kv")
    backend.warm_up(min(WARM_UP_TOKENS, memory.context_tokens))
    phases.end("warm_up")
    limits = machine_limits(device, getattr(torch, dtype), request.machine_limits, quantize)
    phases.end("limits")
    # The first step made the libraries load the rest of themselves, which belongs to the runtime.
    runtime_bytes = max(settled_bytes() - usage.weight_bytes, usage.runtime_bytes) if device.type == "cpu" else settled_bytes()
    info = BackendInfo(
        kv_layout=layout,
        group_blocks=memory.group_blocks,
        max_rows=request.max_rows,
        max_step_tokens=request.max_step_tokens,
        context_tokens=memory.context_tokens,
        vocab_size=spec.vocab_size,
        dtype=dtype,
        tier="gpu" if device.type == "cuda" else "cpu",
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        memory_bytes=(*memory.lines[:-1], ("runtime", runtime_bytes)),
        phases_s=tuple(phases.seconds),
        dispatch=tuple(chosen().items()),
        pid=os.getpid(),
        image_tokens=memory.image_tokens,
        limits=limits,
        quantize=quantize,
        kernels=f"{describe()}; threads: {_threads(request, spec)}" if device.type == "cpu" else "",
        kv_cache_dtype=kept,
    )
    return Loaded(backend, info, spec.flops(1, 0.0), spec.flops(1, 1.0) - spec.flops(1, 0.0))


def _products(spec: ModelSpec) -> float:
    """Multiplications for a row."""
    return spec.flops(1, 1) / 2


def _shares_steps(request: LoadRequest) -> bool:
    """Whether threads follow a step's rows: not where what else a step holds must change no bit, since torch's own sums depend on them."""
    return not request.threads and not request.deterministic


def _threads(request: LoadRequest, spec: ModelSpec) -> str:
    """Threads of a decode step of one sequence, and of the longest step where these differ."""
    few, many = torch.get_num_threads(), worthwhile_threads(_products(spec), request.max_step_tokens)
    return f"{few}, up to {many} in steps of many tokens" if _shares_steps(request) and many > few else str(few)


def _choose_place(request: LoadRequest, manifest: Manifest) -> tuple[torch.device, str, str, str]:
    """Device, quantisation, dtype and that of keys and values; from here on only steady kernels compute, where that is asked."""
    spec, device = manifest.spec, choose_device(request.device)
    _check_kv_cache(request.kv_cache_dtype, device)
    quantize = choose_quantize(request.quantize, spec, device)
    dtype = choose_dtype(request.dtype, spec, device, manifest.stored_dtype, quantize)
    require_steady(False)
    if request.deterministic:
        require_deterministic(device, getattr(torch, dtype), quantize)
    return device, quantize, dtype, choose_kept(request.kv_cache_dtype, dtype, quantize, device)


def choose_kept(asked: str, dtype: str, quantize: str, device: torch.device) -> str:
    """The type of keys and values: the one asked for, else that of the activations.

    Beside quantised weights, whose activations are float32 and rounded anyway, bfloat16 where the compiled kernels multiply it well:
    half of the bytes, and attention in half of the time or less.
    """
    if asked != "auto":
        return asked
    rounded = device.type == "cpu" and quantize != "none" and dtype == "float32"
    return "bfloat16" if rounded and multiplies_bfloat16() else dtype


def _check_kv_cache(name: str, device: torch.device) -> None:
    """Raises CapacityError for a type of keys and values that the device's kernels do not read."""
    if device.type == "cpu" and name == "fp8":
        raise CapacityError("--kv_cache_dtype fp8 is for a GPU: set bfloat16, or leave it out.")
    if device.type == "cuda" and name not in ("auto", "fp8"):
        raise CapacityError(f"--kv_cache_dtype {name} is for a CPU: set fp8, leave it out, or set --dtype.")
    if device.type == "cuda" and name == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        raise CapacityError("--kv_cache_dtype fp8 needs a GPU of compute capability 8.9 or higher: leave it out.")


def _kept_layout(spec: ModelSpec, name: str) -> KvLayout:
    """How the cache is kept in a type. Raises CapacityError where the model's layers cannot keep it so."""
    layout = spec.kv_layout()
    return layout.in_eight_bits() if name == "int8" else layout


def _assemble(decoder: Decoder, layout: KvLayout, memory: MemoryPlan, request: LoadRequest, kept: torch.dtype) -> TorchBackend:
    spec = decoder.spec
    pool = KvPool(layout, memory.group_blocks, kept, decoder.device, decoder.dtype)
    tables = Tables(layout, memory.group_blocks, request.max_rows, memory.context_tokens, spec.vocab_size)
    recorder = CudaRecorder() if decoder.device.type == "cuda" and request.cuda_graphs == "auto" else None
    backend = TorchBackend(decoder, pool, tables, Sampler(request.max_rows, spec.vocab_size), memory.image_tokens, recorder)
    if _shares_steps(request) and decoder.device.type == "cpu":
        backend.share_steps(_products(spec))
    return backend


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises CapacityError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise CapacityError("No CUDA device is usable here: set --device cpu or auto, or another --tier than gpu.")
    return torch.device(name)


def choose_quantize(name: str, spec: ModelSpec, device: torch.device) -> str:
    """An explicit choice, else the line's own where the device has quantised products (a CPU), else none."""
    if name != "auto":
        return name
    return spec.precision.quantize if device.type == "cpu" else "none"


def choose_dtype(name: str, spec: ModelSpec, device: torch.device, stored: str, quantize: str = "none") -> str:
    """An explicit type, else the line's own, else what the device computes fast: on a GPU the 16-bit type of the `stored` weights.

    Quantised products on a CPU take and give float32, which then is the fast one.
    """
    for wanted in (name, spec.precision.compute):
        if wanted != "auto":
            return wanted
    if device.type == "cuda":
        fast = ("bfloat16", "float16") if torch.cuda.is_bf16_supported() else ("float16",)
        return stored if stored in fast else fast[0]
    return "bfloat16" if quantize == "none" and computes_bfloat16() else "float32"


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
