"""What `deepseek-serve` tells its user while it starts: phases with times, loading progress, the memory budget, a request to paste.

It does not know how any of it comes about. Invariant: it writes to stdout only; the log goes to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.types.plan import BackendInfo
    from service.types.settings import HttpSettings, TierChoice

_QUIET_S = 5.0
_MIB = 1 << 20


class StartTimes:
    """Seconds of each phase of starting, in order; `total_s` counts from the beginning of the command."""

    def __init__(self, began_s: float) -> None:
        self._began_s = self._last_s = began_s
        self.phases_s: list[tuple[str, float]] = []

    def mark(self, phase: str) -> None:
        """The phase that ran until now."""
        now_s = time.perf_counter()
        self.phases_s.append((phase, now_s - self._last_s))
        self._last_s = now_s

    @property
    def total_s(self) -> float:
        """Seconds since the command began."""
        return time.perf_counter() - self._began_s

    def line(self, worker_phases: Sequence[tuple[str, float]]) -> str:
        """`spawn 0.11 s · parse 0.21 s · … · ready 2.60 s`; the worker's phases run beside the parent's."""
        own = [f"{name} {seconds:.2f} s" for name, seconds in self.phases_s]
        worker = [f"{name} {seconds:.2f} s" for name, seconds in worker_phases]
        return " · ".join([*own, f"worker ({', '.join(worker)})", f"ready {self.total_s:.2f} s"])


class LoadProgress:
    """Progress of loading: a bar for each version on a terminal, else a plain line every few seconds."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._said_s = time.monotonic()
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, transient=True)
            self._bar.start()

    def update(self, name: str, phase: str, fraction: float) -> None:
        """`fraction` 0 to 1 of `phase` of version `name` is done."""
        if self._bar is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task(name, total=1.0)
            self._bar.update(self._tasks[name], description=f"{name} {phase}", completed=fraction)
            return
        now_s = time.monotonic()
        if now_s - self._said_s >= _QUIET_S:
            self._said_s = now_s
            print(f"loading {name}: {phase} {fraction:.0%}", flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


def memory_table(artifact: str, info: BackendInfo, full_context_tokens: int) -> str:
    """The exact budget of one version's worker, each use, whether the checkpoint's whole context fits, and the kernels in use."""
    context = f"context {info.context_tokens} tokens"
    if info.context_tokens < full_context_tokens:
        context += f" of the checkpoint's {full_context_tokens}: --kv_bytes and --context_tokens set it"
    head = f"memory of {artifact} ({info.dtype} through {info.backend} on {info.device}, {context}, {info.max_rows} sequences)"
    blocks = dict(zip((f"kv:{group.name}" for group in info.kv_layout.groups), info.group_blocks, strict=True))
    lines = [head]
    for name, size in info.memory_bytes:
        note = f"   {blocks[name]} blocks of {info.kv_layout.block_tokens} tokens" if name in blocks else ""
        lines.append(f"  {name:<24}{size / _MIB:>10.1f} MiB{note}")
    total = sum(size for _, size in info.memory_bytes)
    lines.append(f"  {'total':<24}{total / _MIB:>10.1f} MiB")
    if info.kernels:
        lines.append(f"  {'kernels':<24}{info.kernels}")
    return "\n".join(lines)


def tier_line(tier: TierChoice) -> str:
    """The tier, why it is that one, what it set, what of it gave way, and what naming it would set."""
    why = f" ({tier.reason})" if tier.reason else ""
    more = f"; --tier {tier.name} would set {tier.more}" if tier.more else ""
    held_back = f"its {tier.held_back} gives way to other settings or the device" if tier.held_back else ""
    said = "; ".join(filter(None, (tier.flags, held_back))) or "no defaults of its own"
    return f"tier {tier.name}, {tier.how}{why}: {said}{more}"


def parent_memory_line() -> str:
    """What this process itself uses now."""
    from service.engine.memory import resident_bytes

    return f"{'memory of the front end':<26}{resident_bytes() / _MIB:>10.1f} MiB"


def client_url(settings: HttpSettings, port: int) -> str:
    """Where a client on this machine reaches the service."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - shown, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def example_request(url: str, model: str, keyed: bool) -> str:
    """A curl command to paste into a shell."""
    body = json.dumps({"model": model, "prompt": "def fibonacci(n):", "max_tokens": 64})
    key = ' -H "authorization: Bearer $DEEPSEEK_API_KEY"' if keyed else ""
    return f"curl {url}/v1/completions -H 'content-type: application/json'{key} -d '{body}'"
