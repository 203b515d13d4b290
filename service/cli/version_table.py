"""The table of a comparison of versions: a column for each version, a line for each measure.

It does not know how the row came about. Invariant: every number that differs between versions is on it with its unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_MIB, _KIB = 1 << 20, 1 << 10
_Cell = Callable[[dict[str, Any]], str]


def _rate(batch: str, phase: str) -> _Cell:
    return lambda entry: f"{entry['speed'][batch][f'{phase}_tokens_per_s']['median']:.1f}"


_LINES: tuple[tuple[str, _Cell], ...] = (
    ("parameters, millions", lambda entry: f"{entry['parameters'] / 1e6:.2f}"),
    ("context, tokens", lambda entry: str(entry["context_tokens"])),
    ("reads", lambda entry: " ".join(entry["modalities"])),
    ("served as", lambda entry: entry["dtype"] + ("" if entry["quantize"] == "none" else f", {entry['quantize']} weights")),
    ("quality: bits/byte", lambda entry: f"{entry['quality']['bits_per_byte']:.4f}"),
    ("quality: nats/token", lambda entry: f"{entry['quality']['nats_per_token']:.4f}"),
    ("1 at once: prefill, tokens/s", _rate("1", "prefill")),
    ("1 at once: decode, tokens/s", _rate("1", "decode")),
    ("8 at once: prefill, tokens/s", _rate("8", "prefill")),
    ("8 at once: decode, tokens/s", _rate("8", "decode")),
    ("memory: weights, MiB", lambda entry: f"{entry['memory']['weights_bytes'] / _MIB:.1f}"),
    ("memory: KV of 1K tokens, KiB", lambda entry: f"{entry['memory']['kv_bytes_per_1k_tokens'] / _KIB:.0f}"),
    ("memory: worker resident, MiB", lambda entry: f"{entry['memory']['resident_bytes'] / _MIB:.0f}"),
    ("cost: s per million tokens", lambda entry: f"{entry['cost']['seconds_per_million_tokens']['median']:.0f}"),
    ("cost: relative", lambda entry: _between(entry["cost"]["relative"])),
)


def version_table(row: dict[str, Any]) -> Table:
    """The table of the row that `compare_versions` gives."""
    from rich.table import Table

    shape = f"{row['prompt_tokens']} + {row['output_tokens']} tokens"
    table = Table(title=f"versions · {shape} · {row['text']['bytes']} bytes of text · {row['cores']} cores", title_justify="left")
    table.add_column("")
    for name in row["versions"]:
        table.add_column(name, justify="right")
    for title, cell in _LINES:
        name = f"{title} (of {row['baseline']})" if title == "cost: relative" else title
        table.add_row(name, *(cell(entry) for entry in row["versions"].values()))
    return table


def _between(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"
