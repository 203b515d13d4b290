"""Writes base/rules.yaml: the rules and alerts of deploy/prometheus as the object that the Prometheus operator reads.

Run `python deploy/kubernetes/generate_rules.py` after a change there; with `--check` it only says whether the file is current. It does not
know what the rules say. Invariant: the groups are carried over line by line, comments included.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
RULES = HERE / "base" / "rules.yaml"
SOURCES = ("recording.rules.yml", "alerts.rules.yml")
HEAD = """# Written by generate_rules.py from deploy/prometheus: change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: deepseek
  labels: {app.kubernetes.io/name: deepseek}
spec:
  groups:
"""


def rules(directory: Path) -> str:
    """The text of rules.yaml from the rule files of `directory`."""
    lines = []
    for name in SOURCES:
        _, _, groups = (directory / name).read_text("utf-8").partition("\ngroups:\n")
        lines += [f"  {line}".rstrip() for line in groups.rstrip("\n").splitlines()]
        lines.append("")
    return HEAD + "\n".join(lines[:-1]) + "\n"


def main() -> int:
    """Write the file, or compare it."""
    text = rules(HERE.parent / "prometheus")
    if "--check" in sys.argv[1:]:
        current = RULES.exists() and RULES.read_text("utf-8") == text
        print("base/rules.yaml is current" if current else "base/rules.yaml is not what generate_rules.py writes: run it")
        return 0 if current else 1
    RULES.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
