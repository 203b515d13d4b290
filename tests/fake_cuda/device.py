"""A CUDA device that is not there: tensors that say `cuda:0`, hold their values on the CPU, and are refused what a device refuses.

An operation whose tensors lie on both sides, a launch over a tensor of the host, a value read while a graph is recorded: each raises here
as it would there, and whoever waits for the device is counted. Memory without a value is poisoned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
# Operations that give a value to the host, or whose result has as many elements as the values say.
READS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "allclose",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
}
# Operations with indices, which are copied to the device first; of a mask the rows must be counted.
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Operations that take tensors of both sides.
CROSSING = {"copy_", "_to_copy", *INDEXED}
# Memory without a value: a replay finds in it what the one before left there.
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class DeviceError(RuntimeError):
    """What a device, or torch for it, would refuse."""


class OnDevice(Tensor):
    """A tensor on the device; `held` has its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        size, strides, offset = held.size(), held.stride(), held.storage_offset()
        made = Tensor._make_wrapper_subclass(cls, size, strides=strides, storage_offset=offset, dtype=held.dtype, device=CUDA)
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor of the device to numpy: copy it to the host first, with Tensor.cpu()")

    def tolist(self) -> Any:
        DEVICE.wait("tolist")
        return self.held.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            parts = func.decompose(*args, **(kwargs or {}))
            return DEVICE.compute(func, args, kwargs or {}) if parts is NotImplemented else parts


class Graph:
    """torch.cuda.CUDAGraph: what was done while it was recorded, done again with the numbers and shapes of then.

    All graphs have one memory pool: what one has made is lost when another runs, and there is nothing before the first replay.
    """

    def __init__(self) -> None:
        self.entries: list[Callable[[], None]] = []
        self.made: list[Tensor] = []

    def replay(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for graph in DEVICE.graphs:
                if graph is not self:
                    graph.forget()
            for entry in self.entries:
                entry()

    def forget(self) -> None:
        for tensor in self.made:
            poison(tensor)


class Device:
    """`waits` counts how often the host waited, by operation; `graphs` are those recorded."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nothing has happened."""
        self.waits: Counter[str] = Counter()
        self.graphs: list[Graph] = []
        # Where the host's memory is pinned, and what is being copied from there, as it was when that began.
        self.pinned: set[int] = set()
        self._flying: list[tuple[Tensor, Tensor]] = []
        self._recording: Graph | None = None

    def begin(self, graph: Graph) -> None:
        """Write down what is done from now on."""
        self._recording = graph

    def end(self) -> None:
        """Nothing more is written down."""
        if self._recording is not None:
            self._recording.forget()
            self.graphs.append(self._recording)
        self._recording = None

    def wait(self, what: str) -> None:
        """The host waits for the device. Raises DeviceError in a recording."""
        if self._recording is not None:
            raise DeviceError(f"operation not permitted when stream is capturing: {what} waits for the device")
        self.waits[what] += 1
        self.land()

    def land(self) -> None:
        """What was sent has arrived. Raises DeviceError where the host has written there meanwhile."""
        flying, self._flying = self._flying, []
        if not all(torch.equal(host, before) for host, before in flying):
            raise DeviceError("memory of the host was written while it was copied to the device")

    def launch(self, work: Callable[[], None]) -> None:
        """Run a kernel."""
        work()
        if self._recording is not None:
            self._recording.entries.append(work)

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation of torch, on the values."""
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        to_host = _leaves(name, args, kwargs)
        for tensor in _of_host(func, tensors) if not to_host else ():
            self._send(name, tensor, name == "copy_" and (args[2:] == (True,) or kwargs.get("non_blocking", False)))
        if name == "_fused_sdp_choice":
            return 0  # by plain operations
        if name in READS or to_host or (name in INDEXED and any(_is_mask(index) for index in args[1])):
            self.wait(name)
        held = tree_map(held_by, args), _on_cpu(tree_map(held_by, kwargs))
        known = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnDevice)}
        found = func(*held[0], **held[1])
        if to_host:
            return args[0] if name == "copy_" else found.clone()
        outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        if name in EMPTY:
            poison(found)
        self.note(func, held, outputs, tensors)
        return tree_map(lambda value: _again_or_new(value, known) if isinstance(value, Tensor) else value, found)

    def _send(self, name: str, host: Tensor, waits_not: bool) -> None:
        """Only from pinned memory is a copy not waited for, where that is asked."""
        if waits_not and host.untyped_storage().data_ptr() in self.pinned:
            self._flying.append((host, host.clone()))
        else:
            self.wait(name)

    def note(self, func: Any, held: tuple[Any, Any], outputs: Sequence[Tensor], tensors: Iterable[Tensor]) -> None:
        """Write down, where a graph is recorded, how to do it again into the same memory. Views follow what they look at."""
        if self._recording is None:
            return
        given = {held_by(tensor).untyped_storage().data_ptr() for tensor in tensors}
        fresh = [output.untyped_storage().data_ptr() not in given for output in outputs]
        written = any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments)
        self._recording.made += [output for output, own in zip(outputs, fresh, strict=True) if own]
        if not (written or any(fresh)) or func.overloadpacket.__name__ in EMPTY:
            return

        def again() -> None:
            found = [leaf for leaf in tree_leaves(func(*held[0], **held[1])) if isinstance(leaf, Tensor)]
            for old, new, own in zip(outputs, found, fresh, strict=True):
                if own:
                    old.copy_(new)

        self._recording.entries.append(again)


DEVICE = Device()


def held_by(value: Any) -> Any:
    """The values of a tensor of the device; all else as it is."""
    return value.held if isinstance(value, OnDevice) else value


def poison(tensor: Tensor) -> None:
    """Fill what nobody has written yet."""
    tensor.fill_(float("nan") if tensor.is_floating_point() else 119)


def _of_host(func: Any, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors of the host that are copied to the device; a single value may be used as it is. Raises DeviceError for others."""
    found = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim()]
    if found and func.overloadpacket.__name__ not in CROSSING:
        raise DeviceError(f"{func}: expected all tensors on the same device, but one of shape {tuple(found[0].shape)} is on the host")
    return found


def _leaves(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the result is one of the host."""
    if name == "copy_":
        return not isinstance(args[0], OnDevice)
    wanted = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)]
    return any(device.type == "cpu" for device in wanted)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    return {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs


def _again_or_new(value: Tensor, known: dict[int, OnDevice]) -> OnDevice:
    """The tensor of the device that holds a result: the same one where an operation gives back what it was given."""
    return known[id(value)] if id(value) in known else OnDevice(value)
