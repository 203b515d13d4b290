"""A CUDA graph's stand-in without a device: every tensor operation and every launch of an interpreted or emulated kernel, written down and
done again on the same tensors, with the numbers and shapes of the first time.

As a real one it refuses what would wait for the device or bring new values to it. What the caller does in Python is not done again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

if "EMULATE_SM" in os.environ:
    from tests.kernels.gpu.ptx.driver import Launcher as Launching
else:
    from triton.runtime.interpreter import GridExecutor as Launching

# Operations that read a value back, or take one from the host: a graph cannot have them.
REFUSED = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "lift_fresh", "masked_select", "_unique2"}
# Memory without a value: a replay finds in it what the one before left there.
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty"}


class Tape(TorchDispatchMode):
    """Implements engine.decode_graphs.Recorder; `recorded` counts what was recorded, `launches` the launches in all of it."""

    def __init__(self) -> None:
        super().__init__()
        self._entries: list[Callable[[], None]] = []
        self.recorded = self.launches = 0

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._entries = entries = []
        launch = Launching.__call__

        def noted(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.launches += 1
            entries.append(lambda: launch(executor, *args, **kwargs))
            with _disable_current_modes():
                launch(executor, *args, **kwargs)

        Launching.__call__ = noted
        try:
            with self:
                result = work()
        finally:
            Launching.__call__ = launch
        self.recorded += 1

        def replay() -> Tensor:
            for entry in entries:
                entry()
            return result

        return replay

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in REFUSED:
            raise RuntimeError(f"{func} cannot be recorded: it waits for the device or brings values to it")
        outputs = func(*args, **kwargs)
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        fresh = [tensor.untyped_storage().data_ptr() not in given for tensor in tree_leaves(outputs)]
        written = any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments)

        def again() -> None:
            for old, new, own in zip(tree_leaves(outputs), tree_leaves(func(*args, **kwargs)), fresh, strict=True):
                if own:
                    old.copy_(new)

        # Else it is a view, which follows what it looks at.
        if (written or any(fresh)) and func.overloadpacket.__name__ not in EMPTY:
            self._entries.append(again)
        return outputs
