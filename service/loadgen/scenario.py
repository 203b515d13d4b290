"""Scenarios: a load, the shapes of its requests and its service levels in one TOML file; and traces of recorded arrivals.

It does not know servers or flags. Invariants: what a file says is obeyed or refused with the name of the field; a trace ascends and
begins at 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from service.loadgen.arrivals import Load, NotNegative
from service.loadgen.prompts import Mix, PromptPlan


class ScenarioError(Exception):
    """The file is no scenario; the message names what is wrong in it."""


class Levels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Service levels in milliseconds; 0 is no target."""

    ttft_ms: NotNegative = 0.0
    tpot_ms: NotNegative = 0.0


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One scenario. `trace` names a file beside it whose arrivals and sizes replace those of `load` and `requests`."""

    name: str
    about: str
    load: Load
    requests: Annotated[list[PromptPlan], Meta(min_length=1)]
    slo: Levels = Levels()
    trace: str = ""


class Arrival(
    msgspec.Struct, frozen=True, rename={"timestamp_ms": "timestamp", "prompt_tokens": "input_length", "output_tokens": "output_length"}
):
    """One line of a trace: when it came, in milliseconds, and its lengths in tokens. Other fields of the line are not read."""

    timestamp_ms: NotNegative
    prompt_tokens: Annotated[int, Meta(ge=1)]
    output_tokens: Annotated[int, Meta(ge=1)]


class Ready(msgspec.Struct, frozen=True):
    """A scenario with its trace read: what `Drive` takes. `changes` are the fields of its load that somebody replaced."""

    scenario: Scenario
    load: Load
    sizes: list[tuple[int, int]]
    changes: dict[str, Any] = {}

    def changed(self, load: dict[str, Any], levels: dict[str, float]) -> Ready:
        """The same with some fields of its load and levels replaced; another rate or concurrency takes the place of phases and trace."""
        replaced = {"rate": 0.0, "phases": (), "trace_s": (), **load} if {"rate", "concurrency"} & set(load) else load
        slo = msgspec.structs.replace(self.scenario.slo, **levels)
        scenario = msgspec.structs.replace(self.scenario, slo=slo)
        return Ready(scenario, msgspec.structs.replace(self.load, **replaced), self.sizes, load)

    def of_round(self, number: int) -> Ready:
        """The same load with other arrivals and prompts: those of round `number`, from 0."""
        return msgspec.structs.replace(self, load=msgspec.structs.replace(self.load, seed=self.load.seed + number))

    def mix(self, model: str) -> Mix:
        """Its requests; `model` where a shape names none."""
        plans = [msgspec.structs.replace(plan, model=plan.model or model, seed=self.load.seed) for plan in self.scenario.requests]
        return Mix(plans, self.load.seed, self.sizes)


def read_scenario(path: Path) -> Ready:
    """The scenario in a file. Raises ScenarioError."""
    scenario = _decode(path)
    if not scenario.trace:
        return Ready(scenario, scenario.load, [])
    arrivals = read_trace(path.parent / scenario.trace)[: scenario.load.requests]
    try:
        load = msgspec.structs.replace(scenario.load, trace_s=tuple(one.timestamp_ms / 1000 for one in arrivals))
    except ValueError as error:
        raise ScenarioError(f"{path} is no scenario: {error}.") from None
    return Ready(scenario, load, [(one.prompt_tokens, one.output_tokens) for one in arrivals])


def read_trace(path: Path) -> list[Arrival]:
    """The lines of a trace, an object each (`timestamp` in ms, `input_length`, `output_length`), from time 0 on. Raises ScenarioError."""
    decoder = msgspec.json.Decoder(Arrival)
    arrivals: list[Arrival] = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            try:
                arrivals.append(decoder.decode(line))
            except msgspec.DecodeError as error:
                raise ScenarioError(f"{path} is no trace: line {number}: {error}.") from None
    if not arrivals:
        raise ScenarioError(f"{path} is no trace: it is empty.")
    arrivals.sort(key=lambda one: one.timestamp_ms)
    begins_ms = arrivals[0].timestamp_ms
    return [msgspec.structs.replace(one, timestamp_ms=one.timestamp_ms - begins_ms) for one in arrivals]


def _decode(path: Path) -> Scenario:
    text = _read(path)
    try:
        return msgspec.toml.decode(text, type=Scenario)
    except (msgspec.DecodeError, ValueError) as error:
        raise ScenarioError(f"{path} is no scenario: {str(error).rstrip('.')}.") from None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}.") from None
