"""The hardware tiers: what each recommends, which one this machine is, and the defaults that follow.

It does not know how settings are obeyed or what they gain (`deepseek-benchmark --tier` measures that). Invariants: what the user says goes
before a profile; a tier that was only detected quantises nothing and names no type. Its batch size may have `--backend auto` take another
engine, which rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from service.config.machine import Machine
from service.types.settings import TierChoice


class Profile(NamedTuple):
    """Defaults of a tier by setting: `always` ones ask for speed and memory and no rounding; `named` ones count where it is named."""

    always: Mapping[str, object]
    named: Mapping[str, object]


PROFILES = {
    "gpu": Profile({"batch_size": 256, "step_tokens": 2048}, {"device": "cuda"}),
    "edge": Profile({"batch_size": 4}, {"quantize": "int8"}),
    "cpu": Profile({}, {"quantize": "int8"}),
}


def detect(machine: Machine, device: str) -> tuple[str, str]:
    """The tier and what says so; `device` is what the user asks for."""
    if machine.board:
        return "edge", f"the board is a {machine.board}"
    if device.startswith("cuda"):
        return "gpu", f"--device is {device}"
    if device != "cpu" and machine.gpu:
        return "gpu", "there is a GPU"
    return "cpu", "--device is cpu" if device == "cpu" else "there is no GPU"


def choose(given: Mapping[str, object], machine: Machine) -> tuple[TierChoice, dict[str, object]]:
    """The tier and the defaults that it sets, where `given` holds what the user set by name (`tier` and `device` among it)."""
    device, asked = str(given.get("device", "auto")), str(given.get("tier", "auto"))
    detected, reason = detect(machine, device)
    tier, how = (asked, "given") if asked in PROFILES else (detected, "detected")
    always, named = (_free(values, given, device, machine) for values in PROFILES[tier])
    if 0 < machine.quota < machine.cores and "threads" not in given:
        always["threads"] = machine.quota
    defaults = {**named, **always} if how == "given" else always
    more = "" if how == "given" else flags_of(named)
    meant = {**PROFILES[tier].named, **PROFILES[tier].always} if how == "given" else PROFILES[tier].always
    held_back = flags_of({name: value for name, value in meant.items() if name not in defaults})
    return TierChoice(tier, how, "" if how == "given" else reason, flags_of(defaults), more, held_back), defaults


def flags_of(settings: Mapping[str, object]) -> str:
    """Settings as one would type them."""
    return " ".join(f"--{name} {value}" for name, value in settings.items())


def _free(values: Mapping[str, object], given: Mapping[str, object], device: str, machine: Machine) -> dict[str, object]:
    """The defaults that the user leaves open and the rest of what he gave can hold."""
    free = {name: value for name, value in values.items() if name not in given}
    if device.startswith("cuda") or (device != "cpu" and machine.gpu):
        free.pop("quantize", None)  # quantised products are compiled for CPUs
    limit = str(given.get("step_tokens", ""))
    if limit.isdigit() and "batch_size" in free:
        free["batch_size"] = max(1, min(int(str(free["batch_size"])), int(limit)))
    if str(given.get("batch_size", "")).isdigit() and "step_tokens" in free:
        free["step_tokens"] = max(int(str(free["step_tokens"])), int(str(given["batch_size"])))
    return free
