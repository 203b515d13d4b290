"""How one of an operation's implementations is chosen: the first whose condition holds, recorded, counted, forceable.

It does not know operations or tensors' contents; `dispatch.py` has the table. Invariant: an automatic choice falls back to the next one
whose condition holds; a forced choice that cannot hold raises, and so does one that must be steady where nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch

Kernel = Callable[..., Any]
Condition = Callable[["Place"], str | None]
Result = TypeVar("Result")


class Place(NamedTuple):
    """Where an operation runs: device type (`cpu`, `cuda`) and the type of its activations."""

    device: str
    dtype: torch.dtype


class DispatchError(ValueError):
    """A forced implementation is unknown or its condition does not hold here."""


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute an operation; `refuses` says why it cannot be used in a place, or None.

    `steady`: what it gives for a row has the same bits whatever other rows the call has, and however many.
    """

    name: str
    kernel: Kernel
    refuses: Condition
    steady: bool = False


class Counted:
    """A chosen kernel and how often it was called since the counts were last taken."""

    def __init__(self, operation: str, implementation: Implementation) -> None:
        self.operation = operation
        self.name = implementation.name
        self.calls = 0
        kernel = implementation.kernel

        @wraps(kernel)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return kernel(*args, **kwargs)

        self.call: Kernel = call


class Dispatch:
    """The choices of one process. The functions `resolve`, `force`, `chosen`, `take_counts` and so on are those of its one instance."""

    def __init__(self, table: Mapping[str, tuple[Implementation, ...]]) -> None:
        self._table = table
        self._forced: dict[str, str] = {}
        self._steady_only = False
        self._choices: dict[tuple[str, Place], Counted] = {}
        self._again: dict[tuple[str, str], int] = {}

    def resolve(self, operation: str, device: str | torch.device, dtype: torch.dtype) -> Kernel:
        """The function that computes `operation` in that place; the same one each time until another is forced."""
        place = Place(torch.device(device).type, dtype)
        key = (operation, place)
        if key not in self._choices:
            self._choices[key] = Counted(operation, self._choose(operation, place))
        return self._choices[key].call

    def chosen_name(self, operation: str, device: str | torch.device, dtype: torch.dtype) -> str:
        """The name of the implementation that `resolve` gives in that place."""
        self.resolve(operation, device, dtype)
        return self._choices[operation, Place(torch.device(device).type, dtype)].name

    def force(self, operation: str, name: str | None) -> None:
        """Use implementation `name` of `operation` from the next `resolve` on, or choose freely again (None)."""
        names = [implementation.name for implementation in self._implementations(operation)]
        if name is None:
            self._forced.pop(operation, None)
        elif name in names:
            self._forced[operation] = name
        else:
            raise DispatchError(f"{operation} has no implementation {name!r}; there are: {', '.join(names)}")
        for key in [key for key in self._choices if key[0] == operation]:
            del self._choices[key]

    def require_steady(self, required: bool) -> None:
        """From the next `resolve` on choose only implementations that give a row the same bits in every batch, or freely again."""
        self._steady_only = required
        self._choices.clear()

    def unsteady(self, device: str | torch.device, dtype: torch.dtype, operations: Iterable[str]) -> dict[str, str]:
        """Which of these operations have no steady implementation in that place, and why: operation -> sentence."""
        place = Place(torch.device(device).type, dtype)
        found = {}
        for operation in operations:
            steady = [implementation for implementation in self._implementations(operation) if implementation.steady]
            reasons = [implementation.refuses(place) for implementation in steady]
            if None not in reasons:
                found[operation] = "; ".join(dict.fromkeys(map(str, reasons))) or "nothing that computes it is steady"
        return found

    def forced(self, operation: str) -> str | None:
        """The implementation that `force` named, or None."""
        return self._forced.get(operation)

    def chosen(self) -> dict[str, str]:
        """What was resolved so far, for logs and metrics: `operation[device,dtype]` -> implementation."""
        return {
            f"{operation}[{place.device},{str(place.dtype).removeprefix('torch.')}]": choice.name
            for (operation, place), choice in sorted(self._choices.items(), key=str)
        }

    def passed_over(self) -> dict[str, str]:
        """Better implementations that could not be used, and why: `operation[device,dtype] name` -> sentence; none where forced."""
        found = {}
        for operation, place in sorted(self._choices, key=str):
            chosen_name = self._choices[operation, place].name
            for implementation in () if operation in self._forced else self._implementations(operation):
                if implementation.name == chosen_name:
                    break
                key = f"{operation}[{place.device},{str(place.dtype).removeprefix('torch.')}] {implementation.name}"
                found[key] = implementation.refuses(place) or "a row's bits depend on its batch there"
        return found

    def take_counts(self) -> dict[tuple[str, str], int]:
        """Calls per (operation, implementation) since the last take; only those that were called."""
        counts, self._again = self._again, {}
        for choice in self._choices.values():
            if choice.calls:
                key = (choice.operation, choice.name)
                counts[key] = counts.get(key, 0) + choice.calls
                choice.calls = 0
        return counts

    def apart(self, work: Callable[[], Result]) -> tuple[Result, dict[tuple[str, str], int]]:
        """What `work` gives, and the calls that it made, which are not counted: they are recorded, to be made later."""
        before = {key: choice.calls for key, choice in self._choices.items()}
        result = work()
        made: dict[tuple[str, str], int] = {}
        for key, choice in self._choices.items():
            calls = choice.calls - before.get(key, 0)
            choice.calls -= calls
            if calls:
                made[choice.operation, choice.name] = made.get((choice.operation, choice.name), 0) + calls
        return result, made

    def again(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Count recorded calls, which were made once more."""
        for key, calls in counts.items():
            self._again[key] = self._again.get(key, 0) + calls

    def _implementations(self, operation: str) -> tuple[Implementation, ...]:
        if operation not in self._table:
            raise DispatchError(f"no operation {operation!r}; there are: {', '.join(self._table)}")
        return self._table[operation]

    def _choose(self, operation: str, place: Place) -> Implementation:
        forced = self._forced.get(operation)
        refusal: str | None = "not with the same bits in every batch"
        for implementation in self._implementations(operation):
            if (forced is not None and implementation.name != forced) or (self._steady_only and not implementation.steady):
                continue
            refusal = implementation.refuses(place)
            if refusal is None:
                return implementation
        if forced is not None:
            raise DispatchError(f"{operation}: {forced} was asked for, but {refusal}")
        raise DispatchError(f"{operation}: nothing computes it on {place.device} in {place.dtype}")
