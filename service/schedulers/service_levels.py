"""Which sequences met the service levels that the settings ask for: the numbers behind goodput and the burn-rate alerts.

It does not know how latencies are kept. Invariants: a sequence is judged once, when it ends; one that failed never counts as good; one that
its client left before the target of the first token had passed is not judged, because nobody knows what it would have become.
"""

from __future__ import annotations

from service.schedulers.sequence import Sequence
from service.telemetry import VersionMetrics
from service.types.request import FinishReason
from service.types.settings import SchedulerSettings

FIRST, EACH, ALL = "ttft", "tpot", "all"


class ServiceLevels:
    """Counts met and missed sequences of one version for each level that has a target, and for all of them together."""

    def __init__(self, metrics: VersionMetrics, settings: SchedulerSettings) -> None:
        targets = {FIRST: settings.slo_ttft_ms / 1000, EACH: settings.slo_tpot_ms / 1000}
        self._targets_s = {level: seconds for level, seconds in targets.items() if seconds}
        self._counts = {
            (level, met): metrics.value("slo_requests_total", level, "met" if met else "missed")
            for level in (*self._targets_s, ALL)
            for met in (True, False)
        }

    def ended(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        """Judge a sequence that ended at `now`."""
        waited_s = (sequence.first_token_s or now) - sequence.arrived_s
        took_s = {FIRST: waited_s}
        if sequence.generated > 1:
            took_s[EACH] = (sequence.last_token_s - sequence.first_token_s) / (sequence.generated - 1)
        good = {level: took_s.get(level, 0.0) <= target_s for level, target_s in self._targets_s.items()}
        if not sequence.first_token_s:
            if reason is FinishReason.CANCELLED and good.get(FIRST, True):
                return
            good = dict.fromkeys(good, False)
        for level, met in good.items():
            self._counts[level, met].value += 1
        self._counts[ALL, reason is not FinishReason.ERROR and all(good.values())].value += 1
