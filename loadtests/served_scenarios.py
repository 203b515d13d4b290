"""Every scenario against our own server: tiny random models where one of its line is not bundled, shortened, one row each.

    python -m loadtests.served_scenarios [--only NAME ...] [--keep]

One server holds the bundled v2.3 (by its name and as `stable`), a random v2.3 (`candidate`), a random v3.5 with images (`pictures`) and a
random v5.2 with its context of 16K (`document`). What is measured is the whole path with next to no model behind it: not a model's speed.
Invariant: a scenario is shortened by its own fields only, and the row says which.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from loadtests import rows
from service.checkpoints.bundled import bundled_directory
from service.checkpoints.store import save
from service.models.build import build, init_weights
from service.types.catalog import V2_3, V3_5, V5_2, Shape
from tests.tiny_models import build_tiny_line

SCENARIOS = Path(__file__).parent / "scenarios"
# Model to ask for (none where the scenario names its own), and the fields that shorten it.
RUNS: dict[str, tuple[str, dict[str, float]]] = {
    "chat": ("v2.3", {"requests": 40, "rate": 4.0}),
    "burst": ("v2.3", {"requests": 120}),
    "rag": ("v2.3", {"requests": 24, "rate": 2.0}),
    "replay": ("v2.3", {"requests": 24}),
    "soak": ("v2.3", {"requests": 60, "rate": 4.0}),
    "long_document": ("document", {"requests": 4}),
    "multimodal": ("pictures", {"requests": 40, "rate": 4.0}),
    "mixed_versions": ("", {"requests": 60, "rate": 4.0}),
}
TINY: dict[str, Any] = {"dim": 32, "layers": 4, "heads": 4, "kv_heads": 2, "mlp_hidden": 48}


def long_model(directory: Path) -> Path:
    """A random v5.2 of the line's whole context, with the bundled model's tokenizer, so that a word is a token."""
    bundled = bundled_directory(V2_3)
    spec = V5_2.spec(Shape(vocab_size=4096, context_tokens=16_384, dense_layers=(0,), rope_theta=500_000.0, **TINY), end_ids=(0,))
    decoder = build(spec, "cpu", torch.float32)
    init_weights(decoder, 0)
    extras = {name: (bundled / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    save(directory, spec, decoder.state_dict(), extras)
    return directory


def models(directory: Path) -> dict[str, Path]:
    """The directory of each model that the scenarios ask for, by name."""
    bundled = bundled_directory(V2_3)
    return {
        "v2.3": bundled,
        "stable": bundled,
        "candidate": build_tiny_line(directory / "candidate", V2_3, context_tokens=1024),
        "pictures": build_tiny_line(directory / "pictures", V3_5, context_tokens=1024),
        "document": long_model(directory / "document"),
    }


@contextlib.contextmanager
def served(named: dict[str, Path]) -> Iterator[str]:
    """A server of those models in a process of its own, on a free port; gives its address and ends it with a drain."""
    flags = [word for name, directory in named.items() for word in ("--model", f"{name}={directory}")]
    command = [
        sys.executable,
        "-m",
        "service.cli.serve",
        "--port",
        "0",
        "--threads",
        "1",
        "--kv_bytes",
        "256MiB",
        "--registry",
        "none",
        *flags,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            printed = []
            for line in process.stdout or ():
                printed.append(line)
                if match := re.match(r"serving .* on (http://\S+)", line):
                    yield match[1]
                    break
            else:
                raise RuntimeError("the server did not start:\n" + "".join(printed))
        finally:
            process.terminate()
            process.communicate(timeout=60)


def run_scenario(url: str, name: str, changed: dict[str, float] | None = None) -> dict[str, Any]:
    """The row of `deepseek-benchmark` for a scenario, shortened as in RUNS or by `changed`. Raises CalledProcessError where it fails."""
    model, fields = RUNS[name]
    flags = [word for field, value in (changed or fields).items() for word in (f"--{field}", f"{value:g}")]
    asked = ["--model", model] if model else []
    label = "bundled v2.3" if model == "v2.3" else "tiny random models" if not model else f"tiny random model: {model}"
    command = [sys.executable, "-m", "service.cli.benchmark", "--url", url, "--scenario", str(SCENARIOS / f"{name}.toml")]
    done = subprocess.run([*command, *flags, *asked, "--label", label], capture_output=True, text=True, check=True, timeout=300)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Run each scenario once and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="append the rows to results/served_scenarios.jsonl")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="these scenarios (default all)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, served(models(Path(directory))) as url:
        for name in given.only:
            row = run_scenario(url, name)
            print(name, {key: row[key] for key in ("completed", "aborted", "errors", "prompt_tokens", "duration_s", "ttft_ms", "tpot_ms")})
            if given.keep:
                rows.keep("served_scenarios", {**rows.surroundings(), **row})


if __name__ == "__main__":
    main()
