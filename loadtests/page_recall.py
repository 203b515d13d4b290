"""How much of full attention's mass lies in the blocks that are read, for several numbers of positions that share a choice.

`python -m loadtests.page_recall DIR [--tokens 2048] [--window 256] [--far_blocks 4] [--refresh 1 16 64] [--keep]` measures as
`deepseek-benchmark --quality far` does (`service/engine/attention_mass.py`), once for each refresh. It does not serve.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from loadtests.rows import keep, surroundings
from service.checkpoints.manifest import read_manifest
from service.cli.far_quality import library_lines, scored_text
from service.engine.attention_mass import measure_mass
from service.inputs.tokens import TokenCodec
from service.types.settings import AttentionSettings


def main() -> None:
    """Measure and print; with --keep also keep the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--far_blocks", type=int, default=4)
    parser.add_argument("--refresh", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--keep", action="store_true")
    asked = parser.parse_args()
    text = scored_text(TokenCodec.load(asked.directory), library_lines(), asked.tokens)
    settings = {refresh: AttentionSettings(asked.window, asked.far_blocks, refresh) for refresh in asked.refresh}
    found = {refresh: measure_mass(asked.directory, attention, text) for refresh, attention in settings.items()}
    shares = {
        str(refresh): {name: mass[name] for name in ("read", "best_possible", "without_far", "read_by_layer")}
        for refresh, mass in found.items()
    }
    first = next(iter(found.values()))
    sizes = {"tokens": first["tokens"], "window": asked.window, "far_blocks": asked.far_blocks, "rows": first["rows"]}
    row = {"what": "page_recall", "model": read_manifest(asked.directory).digest[:12], **sizes, "mass_by_refresh": shares, **surroundings()}
    print(row)
    if asked.keep:
        keep("page_recall", row)


if __name__ == "__main__":
    main()
