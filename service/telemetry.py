"""Every metric, its labels and help in one table, the values behind them, and the one function that writes a log line.

It does not know sequences, workers or HTTP: rooms get bound children from `Telemetry.version` once and add numbers to them, which costs
well under a microsecond. A scrape takes a `Snapshot` on the event loop, a copy of the numbers, and formats it in any thread. Invariants:
every metric is in `METRICS`; every series carries `version`, `tier` and `device`; a metric that nothing fills is not declared.
"""

from __future__ import annotations

import functools
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS_CONTENT_TYPE
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

NAMESPACE = "deepseek_"
VLLM_NAMESPACE = "vllm:"
# As they are: the library's default escaping writes the colon of vLLM's names as an underscore.
_openmetrics_text: Callable[[CollectorRegistry], bytes] = functools.partial(generate_openmetrics, escaping=ALLOWUTF8)
VERSION_LABELS = ("version", "tier", "device")

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_SHORT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_TOKENS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 65536.0, 131072.0)


class Metric(NamedTuple):
    """One row of the table. `labels` come after version, tier and device; `buckets` are the upper bounds of a histogram."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: tuple[Metric, ...] = (
    Metric("requests_running", "gauge", "Sequences that hold a row of the worker."),
    Metric("requests_waiting", "gauge", "Sequences accepted and waiting for a row, preempted ones included."),
    Metric("kv_cache_usage_ratio", "gauge", "Share of a KV group's blocks that live sequences hold, 0 to 1.", ("group",)),
    Metric("kv_cache_bytes", "gauge", "Bytes of a KV group's blocks, held or free.", ("group",)),
    Metric("prefix_cache_tokens", "gauge", "Tokens whose blocks can be found by a later prompt."),
    Metric("model_loaded", "gauge", "1 while the version's worker is ready, else 0."),
    Metric("worker_silent_seconds", "gauge", "Seconds since the worker last made progress or answered."),
    Metric(
        "machine_limit", "gauge", "What the machine can do a second, measured at start-up or given, by kind: bytes or flops.", ("kind",)
    ),
    Metric(
        "build_info",
        "gauge",
        "1; the labels name the program's version, the model's compute type and engine, its weights and its keys and values.",
        ("program", "dtype", "backend", "quantize", "kv_cache_dtype"),
    ),
    Metric("tier_info", "gauge", "1; how the tier was chosen (given, detected) and the defaults that its profile set.", ("how", "flags")),
    Metric("startup_seconds", "gauge", "Seconds of each phase of the worker's last start, and of the command's (`command_…`).", ("phase",)),
    Metric("prompt_tokens_total", "counter", "Prompt tokens of requests whose prompt was read."),
    Metric("prompt_tokens_cached_total", "counter", "Of those, tokens found in the prefix cache."),
    Metric("generation_tokens_total", "counter", "Tokens generated and billed."),
    Metric("images_total", "counter", "Images that sequences needed in the worker: encoded, or found encoded.", ("result",)),
    Metric("image_tokens_total", "counter", "Image tokens of the images that were encoded."),
    Metric("fusion_rows_total", "counter", "Tokens computed that had seen an image: their heads' gates weighed text against images."),
    Metric(
        "fusion_gate_total",
        "counter",
        "Sum of those gates (0 to 1 each); over fusion_rows_total it is a head's mean weight of a modality.",
        ("modality", "head"),
    ),
    Metric("requests_total", "counter", "Accepted sequences that ended, by outcome; the sum is what was accepted.", ("outcome",)),
    Metric("slo_requests_total", "counter", "Sequences that met or missed a service level: ttft, tpot, or all of them.", ("slo", "result")),
    Metric("preemptions_total", "counter", "Times a running sequence lost its blocks and was put back to be recomputed."),
    Metric("admission_rejections_total", "counter", "Sequences refused before they were queued, by reason.", ("reason",)),
    Metric("version_choices_total", "counter", "Requests for `auto`, by why this version was the one: the 3C rule.", ("reason",)),
    Metric("worker_restarts_total", "counter", "Times a lost worker was started again, by the reason of the loss.", ("reason",)),
    Metric("kernel_dispatch_total", "counter", "Calls of each implementation of an operation in the worker.", ("op", "implementation")),
    Metric("model_flops_total", "counter", "Floating-point operations of the steps, from the model's own cost."),
    Metric("model_bytes_read_total", "counter", "Bytes that the steps had to read at least, from the model's own cost."),
    Metric("far_blocks_read_total", "counter", "Far blocks that queries read, counted once for each layer and K/V head."),
    Metric(
        "decode_graph_steps_total",
        "counter",
        "Steps on a GPU by how they were computed: replayed from a graph, recorded in one, or why outside of graphs.",
        ("how",),
    ),
    Metric("time_to_first_token_seconds", "histogram", "From acceptance to the first token.", ("route",), _SECONDS),
    Metric("inter_token_latency_seconds", "histogram", "Between two tokens of a sequence.", ("route",), _SHORT_SECONDS),
    Metric("time_per_output_token_seconds", "histogram", "Mean of a finished sequence after its first token.", ("route",), _SHORT_SECONDS),
    Metric("request_duration_seconds", "histogram", "From acceptance to the end.", ("route",), _SECONDS),
    Metric("queue_seconds", "histogram", "From acceptance to the first row.", ("route",), _SECONDS),
    Metric("prefill_seconds", "histogram", "From the first row to the first token.", ("route",), _SECONDS),
    Metric("decode_seconds", "histogram", "From the first token to the end.", ("route",), _SECONDS),
    Metric("step_seconds", "histogram", "A step in the worker, by kind: decode, prefill or mixed.", ("kind",), _SHORT_SECONDS),
    Metric("step_tokens", "histogram", "Positions computed in a step.", (), _TOKENS),
    Metric("request_prompt_tokens", "histogram", "Prompt length of a finished sequence.", (), _TOKENS),
    Metric("request_generation_tokens", "histogram", "Tokens generated by a finished sequence.", (), _TOKENS),
)

# The names by which vLLM's dashboards and autoscalers know the same numbers; shown beside ours with `--metrics_compat vllm`.
VLLM_NAMES: dict[str, str] = {
    "requests_running": "num_requests_running",
    "requests_waiting": "num_requests_waiting",
    "kv_cache_usage_ratio": "kv_cache_usage_perc",
    "prompt_tokens_total": "prompt_tokens_total",
    "prompt_tokens_cached_total": "prefix_cache_hits_total",
    "generation_tokens_total": "generation_tokens_total",
    "requests_total": "request_success_total",
    "preemptions_total": "num_preemptions_total",
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "time_per_output_token_seconds": "request_time_per_output_token_seconds",
    "request_duration_seconds": "e2e_request_latency_seconds",
    "queue_seconds": "request_queue_time_seconds",
    "prefill_seconds": "request_prefill_time_seconds",
    "decode_seconds": "request_decode_time_seconds",
    "step_tokens": "iteration_tokens_total",
    "request_prompt_tokens": "request_prompt_tokens",
    "request_generation_tokens": "request_generation_tokens",
}
VLLM_LABELS = {"version": "model_name", "outcome": "finished_reason"}
VLLM_VALUES = {"cancelled": "abort"}


class Value:
    """One series of a counter or gauge; with `read` it is asked when the metrics are rendered."""

    __slots__ = ("read", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.read: Callable[[], float] | None = None

    def add(self, amount: float = 1.0) -> None:
        """Count."""
        self.value += amount

    def set(self, value: float) -> None:
        """Set a gauge."""
        self.value = value


class Distribution:
    """One series of a histogram."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Record `value`, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def copy(self) -> Distribution:
        """The same observations, standing still."""
        still = Distribution(())
        still.bounds, still.counts, still.total = self.bounds, self.counts.copy(), self.total
        return still

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations at or below it) as the exposition format wants them."""
        rows, running = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            rows.append(("+Inf" if bound == float("inf") else repr(bound), float(running)))
        return rows


_Labels = tuple[str, ...]
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class _Series:
    """All series of one metric, by label values."""

    __slots__ = ("distributions", "metric", "values")

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.values: dict[_Labels, Value] = {}
        self.distributions: dict[_Labels, Distribution] = {}


class Latencies:
    """The latency histograms of one route. `lockstep` counts tokens of this step whose sequence had one in the step before as well."""

    __slots__ = ("decode", "duration", "first", "gap", "lockstep", "per_token", "prefill", "queue")

    def __init__(self, metrics: VersionMetrics, route: str) -> None:
        self.lockstep = 0
        self.first = metrics.distribution("time_to_first_token_seconds", route)
        self.gap = metrics.distribution("inter_token_latency_seconds", route)
        self.per_token = metrics.distribution("time_per_output_token_seconds", route)
        self.duration = metrics.distribution("request_duration_seconds", route)
        self.queue = metrics.distribution("queue_seconds", route)
        self.prefill = metrics.distribution("prefill_seconds", route)
        self.decode = metrics.distribution("decode_seconds", route)


class VersionMetrics:
    """The metrics of one version on one device: look a child up once, then add to it. `routes` are those that had a sequence.

    `tier` are the labels of tier_info, which are the whole process's.
    """

    def __init__(self, series: dict[str, _Series], labels: _Labels, tier: tuple[str, str]) -> None:
        self.tier = tier
        self.routes: dict[str, Latencies] = {}
        self._series = series
        self._labels = labels

    def latencies(self, route: str) -> Latencies:
        """The latency histograms of a route."""
        bound = self.routes.get(route)
        if bound is None:
            bound = self.routes[route] = Latencies(self, route)
        return bound

    def value(self, name: str, *labels: str) -> Value:
        """The series of counter or gauge `name` with these values of its own labels."""
        return self._series[name].values.setdefault(self._key(name, labels), Value())

    def watch(self, name: str, read: Callable[[], float], *labels: str) -> None:
        """Let gauge `name` be read from `read` whenever the metrics are rendered."""
        self.value(name, *labels).read = read

    def distribution(self, name: str, *labels: str) -> Distribution:
        """The series of histogram `name` with these values of its own labels."""
        series = self._series[name]
        return series.distributions.setdefault(self._key(name, labels), Distribution(series.metric.buckets))

    def drop(self) -> None:
        """Forget the series of this version, tier and device that hold no observation (gauges, and counters at 0)."""
        for series in self._series.values():
            mine = [key for key in series.values if key[: len(self._labels)] == self._labels]
            for key in mine:
                if series.metric.kind == "gauge" or not series.values[key].value:
                    del series.values[key]
            for key in [key for key in series.distributions if key[: len(self._labels)] == self._labels]:
                if not any(series.distributions[key].counts):
                    del series.distributions[key]

    def _key(self, name: str, labels: tuple[str, ...]) -> _Labels:
        wanted = self._series[name].metric.labels
        if len(labels) != len(wanted):
            raise ValueError(f"metric {name} has the labels {wanted}")
        return (*self._labels, *labels)


class Snapshot(Collector):
    """All series at one moment; formatting it touches nothing that changes, so any thread may. `aliases` are second names to show."""

    def __init__(self, series: Iterable[_Series], aliases: dict[str, str]) -> None:
        self._aliases = aliases
        self._families: list[tuple[Metric, list[tuple[_Labels, float | Distribution]]]] = []
        for one in series:
            numbers: list[tuple[_Labels, float | Distribution]] = [
                *((labels, value.value if value.read is None else value.read()) for labels, value in one.values.items()),
                *((labels, distribution.copy()) for labels, distribution in one.distributions.items()),
            ]
            if numbers:
                self._families.append((one.metric, numbers))

    def collect(self) -> Iterator[Family]:
        """The families that have a series, in the order of the table; each that has one is followed by its alias."""
        for metric, numbers in self._families:
            names = (*VERSION_LABELS, *metric.labels)
            yield _family(NAMESPACE + metric.name, metric, names, numbers)
            if metric.name in self._aliases:
                renamed = tuple(VLLM_LABELS.get(name, name) for name in names)
                reworded = [(tuple(VLLM_VALUES.get(value, value) for value in labels), number) for labels, number in numbers]
                yield _family(VLLM_NAMESPACE + self._aliases[metric.name], metric, renamed, reworded)

    def render(self, openmetrics: bool = False) -> tuple[bytes, str]:
        """The exposition text and its content type."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        if openmetrics:
            return _openmetrics_text(registry), OPENMETRICS_CONTENT_TYPE
        return generate_latest(registry), CONTENT_TYPE_LATEST


def _family(name: str, metric: Metric, labels: _Labels, numbers: Sequence[tuple[_Labels, float | Distribution]]) -> Family:
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(name, metric.help, labels=labels)
        for key, number in numbers:
            if isinstance(number, Distribution):
                histogram.add_metric(key, number.cumulative(), number.total)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(name, metric.help, labels=labels)
    for key, number in numbers:
        if not isinstance(number, Distribution):
            family.add_metric(key, number)
    return family


class Telemetry:
    """Every metric of the process. `compat` "vllm" shows vLLM's numbers under its names too; `tier` are the labels of tier_info."""

    def __init__(self, compat: str = "none", tier: tuple[str, str] = ("detected", "")) -> None:
        self._tier = tier
        self._series = {metric.name: _Series(metric) for metric in METRICS}
        self._versions: dict[_Labels, VersionMetrics] = {}
        self._aliases = VLLM_NAMES if compat == "vllm" else {}

    def version(self, version: str, tier: str, device: str) -> VersionMetrics:
        """The children bound to one version (`v2.3@<12 hex>`, or `none` before a choice is made), tier and device."""
        labels = (version, tier, device)
        return self._versions.setdefault(labels, VersionMetrics(self._series, labels, self._tier))

    def snapshot(self) -> Snapshot:
        """Every number as it is now. Call it where the numbers change: on the event loop's thread."""
        return Snapshot(self._series.values(), self._aliases)


def log_event(event: str, **fields: object) -> None:
    """One JSON line on stderr: the time (UTC, ISO 8601), the event's name and its fields; `request_id` where there is a request."""
    seconds, fraction = divmod(time.time(), 1.0)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(fraction * 1000):03d}Z"
    line = msgspec.json.encode({"time": stamp, "event": event, **fields}, enc_hook=str)
    sys.stderr.write(line.decode() + "\n")
