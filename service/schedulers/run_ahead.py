"""Whether a plan is sent while another one executes, so that the worker does not wait for the front end between steps.

It knows plans and the times of steps, not sequences. Invariant: at most one plan is sent beside the one that executes.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.schedulers.planner import Step
from service.types.plan import StepResult

# Of a longer step the front end's time between steps (some 0.7 ms) is little, and what arrives would wait for one step more.
SHORT_STEP_S = 0.025


class RunAhead:
    """The rule `policy`: always, never, or auto: beside steps in which every sequence gets one token, while such steps are short and nobody
    waits."""

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._decode_s = 0.0

    def note(self, step: Step, result: StepResult) -> None:
        """A step has ended."""
        if _only_decodes(step):
            self._decode_s = result.execute_s

    def may_send(self, flying: Sequence[Step], anyone_waits: bool) -> bool:
        """Whether a plan is sent while those of `flying` are outstanding."""
        if len(flying) != 1 or self._policy != "auto":
            return not flying or (len(flying) == 1 and self._policy == "always")
        return _only_decodes(flying[0]) and self._decode_s <= SHORT_STEP_S and not anyone_waits


def _only_decodes(step: Step) -> bool:
    return step.decodes == len(step.entries)
