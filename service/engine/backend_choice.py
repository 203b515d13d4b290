"""Which engine serves a model: torch, or an exported graph in ONNX Runtime. Asked by the front end before any worker is told to load.

It does not know engines, only what was measured of them. Invariants: an explicit choice that cannot work is refused in one sentence; what
`auto` takes follows from the table, the model, the batch size and what is installed here, and comes with its reason.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from service.checkpoints.onnx_support import refuse, unsupported
from service.types.errors import SettingsError
from service.types.model_spec import ModelSpec
from service.types.settings import EngineSettings

TABLE = Path(__file__).with_name("backends.json")
# So much faster must the graph be: it costs an export at the first start, and keys and values in float32.
MARGIN = 1.1
_NVIDIA = Path("/proc/driver/nvidia/version")


class Choice(NamedTuple):
    """A backend and why, in a few words."""

    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class Measured:
    """Generated tokens a second of both engines with `batch` sequences at once of a model with so many parameters, in its `quantize`.

    `images`: it is a model that reads them, whose graphs are others than those of one that does not.
    """

    parameters: int
    quantize: str
    batch: int
    torch: float
    onnx: float
    images: bool = False


def graph_lacks(spec: ModelSpec, engine: EngineSettings) -> str:
    """What of a model the graph does not compute with its weights as they would be served, or nothing."""
    return unsupported(spec, _weights(spec, engine))


def choose_backend(spec: ModelSpec, engine: EngineSettings, batch_size: int) -> Choice:
    """The backend of a model. Raises SettingsError or CheckpointError for an explicit one that cannot work."""
    if engine.backend == "torch":
        return Choice("torch", "asked for")
    quantize = _weights(spec, engine)
    if engine.backend == "onnx":
        if reason := _hindrance(engine):
            raise SettingsError(f"--backend onnx {reason}.")
        refuse(spec, quantize)
        return Choice("onnx", "asked for")
    gap = unsupported(spec, quantize)
    if reason := _hindrance(engine) or (f"does not support {gap}" if gap else ""):
        return Choice("torch", f"onnx {reason}")
    if engine.device == "auto" and _NVIDIA.exists():
        return Choice("torch", "there is a GPU")
    if missing := _missing("onnx", "torch"):
        return Choice("torch", f"{missing} is not installed, which exporting needs")
    images = spec.vision is not None
    known = [entry for entry in read_table(engine.backend_table) if (entry.quantize, entry.images) == (quantize, images)]
    nearest = _nearest(known, spec.parameters, batch_size)
    if nearest is None:
        return Choice("torch", f"nothing was measured with {quantize} weights{' and images' if images else ''}")
    ratio = nearest.onnx / nearest.torch
    said = f"onnx measured at {ratio:.2f} of torch with {nearest.parameters / 1e6:.0f} M parameters and {nearest.batch} sequences"
    return Choice("onnx" if ratio >= MARGIN else "torch", said)


def read_table(path: str, flag: str = "--backend_table") -> list[Measured]:
    """The measurements in a file, "" for those that come with the package. Raises SettingsError, which calls the file `flag`."""
    names = [field.name for field in fields(Measured)]
    try:
        entries = json.loads((Path(path) if path else TABLE).read_text(encoding="utf-8"))["measured"]
        kept = [entry for entry in entries if entry["torch"] > 0 and entry["onnx"] > 0]
        return [Measured(**{name: entry[name] for name in names if name in entry}) for entry in kept]
    except OSError as error:
        raise SettingsError(f"{flag} {path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise SettingsError(f"{flag} {path} is not a table of measurements.") from None


def _weights(spec: ModelSpec, engine: EngineSettings) -> str:
    return spec.precision.quantize if engine.quantize == "auto" else engine.quantize


def _nearest(table: Sequence[Measured], parameters: int, batch: int) -> Measured | None:
    """The entry nearest in size, then in batch, both by ratio."""
    return min(
        table,
        key=lambda entry: (abs(math.log(entry.parameters / parameters)), abs(math.log(entry.batch / batch)), entry.batch),
        default=None,
    )


def _hindrance(engine: EngineSettings) -> str:
    """What of the settings or of this installation keeps a graph from being served, or nothing."""
    if engine.device.startswith("cuda"):
        return f"computes on the CPU: leave --device {engine.device} out, or choose --backend torch"
    if engine.dtype not in ("auto", "float32"):
        return f"computes in float32: leave --dtype {engine.dtype} out, or choose --backend torch"
    if engine.kv_cache_dtype not in ("auto", "float32"):
        return f"caches in float32: leave --kv_cache_dtype {engine.kv_cache_dtype} out, or choose --backend torch"
    if engine.deterministic:
        return "does not give a row the same bits in every batch: leave --deterministic out, or choose --backend torch"
    if missing := _missing("onnxruntime"):
        return f"needs {missing}: pip install 'deepseek-service[onnx]'"
    return ""


def _missing(*libraries: str) -> str:
    return next((name for name in libraries if importlib.util.find_spec(name) is None), "")
