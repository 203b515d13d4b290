"""From watches to one result row: percentiles, throughput, goodput, error counts, and how far the sender itself kept up.

It does not know how the load was sent or how the row is printed. Invariants: only successful requests enter latencies and throughput; every
watch is in exactly one of completed, aborted and errors; what the client itself left is judged neither good nor bad.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from service.loadgen.drive import Measured
from service.loadgen.watch import Watch

CURVE_POINTS = (*range(0, 100, 5), 99, 100)


@dataclass(frozen=True, slots=True)
class Targets:
    """Service levels in milliseconds; 0 is no target."""

    ttft_ms: float = 0.0
    tpot_ms: float = 0.0

    def met(self, watch: Watch) -> bool:
        """Whether a successful request met every target."""
        ttft, tpot = watch.ttft_s, watch.tpot_s
        slow_start = self.ttft_ms > 0 and (ttft is None or ttft * 1000 > self.ttft_ms)
        slow_tokens = self.tpot_ms > 0 and tpot is not None and tpot * 1000 > self.tpot_ms
        return not (slow_start or slow_tokens)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of an ascending sequence lies, interpolated linearly between neighbours."""
    position = (len(ordered) - 1) * share
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread_ms(seconds: Iterable[float]) -> dict[str, float] | None:
    """p50, p90, p99, mean and max in milliseconds; None of nothing."""
    ordered = sorted(seconds)
    if not ordered:
        return None
    points = {name: percentile(ordered, share) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    points |= {"mean": sum(ordered) / len(ordered), "max": ordered[-1]}
    return {name: round(value * 1000, 3) for name, value in points.items()}


def summarise(measured: Measured, targets: Targets) -> dict[str, object]:
    """The measured part of a row."""
    good = [watch for watch in measured.watches if watch.outcome == "ok"]
    outcomes = Counter(watch.outcome for watch in measured.watches)
    duration = measured.duration_s or float("inf")
    prompt = sum(watch.prompt_tokens or 0 for watch in good)
    output = sum(watch.tokens for watch in good)
    counted = {watch.output_tokens is not None for watch in good}
    met = sum(targets.met(watch) for watch in good)
    judged = len(measured.watches) - outcomes["aborted"]
    return {
        "requests": len(measured.watches),
        "completed": len(good),
        "aborted": outcomes.pop("aborted", 0),
        "errors": {kind: count for kind, count in sorted(outcomes.items()) if kind != "ok"},
        "duration_s": round(measured.duration_s, 4),
        "requests_per_s": round(len(good) / duration, 3),
        "output_tokens_per_s": round(output / duration, 3),
        "total_tokens_per_s": round((prompt + output) / duration, 3),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "token_counts": "none" if not counted else "mixed" if len(counted) > 1 else "usage" if counted.pop() else "pieces",
        **{name: spread_ms(values) for name, values in _latencies(good).items()},
        "kinds": _kinds(measured, targets),
        "curves": {name: curve_ms(values) for name, values in _latencies(good).items()},
        "timeline": timeline(measured),
        "slo": {"ttft_ms": targets.ttft_ms or None, "tpot_ms": targets.tpot_ms or None},
        "goodput_requests_per_s": round(met / duration, 3),
        "goodput_share": round(met / judged, 4) if judged else 0.0,
        "sender": {
            "lateness_ms": spread_ms(watch.sent_s - watch.due_s for watch in measured.watches if watch.sent_s),
            "cpu_share": round(measured.cpu_s / duration, 4),
        },
    }


def curve_ms(seconds: Iterable[float]) -> list[float]:
    """The 0th, 5th … 95th, 99th and 100th percentile in milliseconds (`CURVE_POINTS`); nothing of nothing."""
    ordered = sorted(seconds)
    return [round(percentile(ordered, point / 100) * 1000, 3) for point in CURVE_POINTS] if ordered else []


def timeline(measured: Measured) -> dict[str, Any]:
    """At most 60 equal stretches of the load: requests due, ended and failed in each, and the median TTFT of those due."""
    watches = [watch for watch in measured.watches if watch.due_s]
    if not watches:
        return {}
    begins_s = min(watch.due_s for watch in watches)
    ends_s = max(watch.end_s for watch in watches)
    width_s = max((ends_s - begins_s) / min(60, max(1, len(watches))), 1e-3)
    count = int((ends_s - begins_s) / width_s) + 1
    due, ended, failed = [0] * count, [0] * count, [0] * count
    waits: list[list[float]] = [[] for _ in range(count)]
    for watch in watches:
        place = int((watch.due_s - begins_s) / width_s)
        due[place] += 1
        (ended if watch.outcome in ("ok", "aborted") else failed)[int((watch.end_s - begins_s) / width_s)] += 1
        if watch.ttft_s is not None:
            waits[place].append(watch.ttft_s)
    medians = [round(percentile(sorted(wait), 0.5) * 1000, 3) if wait else None for wait in waits]
    return {"width_s": round(width_s, 4), "due": due, "ended": ended, "failed": failed, "ttft_p50_ms": medians}


def _latencies(good: Sequence[Watch]) -> dict[str, list[float]]:
    return {
        "ttft_ms": [watch.ttft_s for watch in good if watch.ttft_s is not None],
        "tpot_ms": [watch.tpot_s for watch in good if watch.tpot_s is not None],
        "itl_ms": [gap for watch in good for gap in watch.gaps_s],
        "latency_ms": [watch.end_s - watch.sent_s for watch in good],
    }


def _kinds(measured: Measured, targets: Targets) -> dict[str, dict[str, Any]]:
    """The main numbers of each kind, where there are several."""
    kinds = sorted({watch.kind for watch in measured.watches})
    if len(kinds) < 2:
        return {}
    found = {}
    for kind in kinds:
        mine = [watch for watch in measured.watches if watch.kind == kind]
        good = [watch for watch in mine if watch.outcome == "ok"]
        times = {name: spread_ms(values) for name, values in _latencies(good).items() if name in ("ttft_ms", "tpot_ms")}
        found[kind] = {"requests": len(mine), "completed": len(good), "met": sum(map(targets.met, good)), **times}
    return found
