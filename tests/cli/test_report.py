"""What is said while the service starts: phases, progress, memory, address, and a request that a shell can take."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import replace

import pytest

from service.cli import report
from service.cli.report import LoadProgress, StartTimes, client_url, example_request, memory_table, parent_memory_line, tier_line
from service.types.kv_layout import KvGroup, KvLayout
from service.types.plan import BackendInfo
from service.types.settings import HttpSettings, TierChoice


def test_phases_add_up_and_are_said_in_order() -> None:
    times = StartTimes(time.perf_counter() - 2.0)
    times.mark("parse")
    times.mark("import")
    assert [name for name, _ in times.phases_s] == ["parse", "import"]
    assert times.phases_s[0][1] == pytest.approx(2.0, abs=0.5)
    assert times.total_s >= sum(seconds for _, seconds in times.phases_s)
    line = times.line([("weights", 1.25)])
    assert line.startswith("parse 2.0") and " · import 0.0" in line and "worker (weights 1.25 s)" in line and " · ready 2.0" in line


def test_the_tier_says_why_and_what_naming_it_would_set() -> None:
    detected = tier_line(TierChoice("cpu", "detected", "there is no GPU", "", "--quantize int8"))
    assert detected == "tier cpu, detected (there is no GPU): no defaults of its own; --tier cpu would set --quantize int8"
    none = tier_line(TierChoice("cpu", "given", "", "", "", "--quantize int8"))
    assert none == "tier cpu, given: its --quantize int8 gives way to other settings or the device"
    some = tier_line(TierChoice("edge", "given", "", "--batch_size 4", "", "--quantize int8"))
    assert some == "tier edge, given: --batch_size 4; its --quantize int8 gives way to other settings or the device"
    assert tier_line(TierChoice("edge", "given", "", "--batch_size 4", "")) == "tier edge, given: --batch_size 4"


def test_the_budget_has_a_line_for_each_use() -> None:
    layout = KvLayout((KvGroup("full", (0,), 2, 16, 16), KvGroup("window8", (1,), 2, 16, 16, 8)))
    lines = (("weights", 10 << 20), ("kv:full", 4 << 20), ("kv:window8", 1 << 20), ("runtime", 5 << 20))
    info = BackendInfo(layout, (128, 16), 8, 512, 2048, 100, "float32", "cpu", "x86", lines)
    rows = memory_table("v2.3@0123456789ab", info, info.context_tokens).splitlines()
    assert rows[0] == "memory of v2.3@0123456789ab (float32 through torch on x86, context 2048 tokens, 8 sequences)"
    assert [row.split()[:2] for row in rows[1:]] == [
        ["weights", "10.0"],
        ["kv:full", "4.0"],
        ["kv:window8", "1.0"],
        ["runtime", "5.0"],
        ["total", "20.0"],
    ]
    assert rows[2].endswith("128 blocks of 64 tokens") and rows[3].endswith("16 blocks of 64 tokens")
    assert float(parent_memory_line().split()[-2]) > 5
    shrunk = memory_table("v2.3@0123456789ab", info, 4096).splitlines()[0]
    assert "context 2048 tokens of the checkpoint's 4096" in shrunk
    compiled = memory_table("v2.3@0123456789ab", replace(info, kernels="compiled for avx2"), 4096).splitlines()[-1]
    assert compiled.split(maxsplit=1) == ["kernels", "compiled for avx2"]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("localhost", "http://localhost:80"),
    ],
)
def test_addresses_can_be_followed(host: str, expected: str) -> None:
    assert client_url(HttpSettings(host=host), 80) == expected


def test_the_example_is_for_a_shell() -> None:
    words = shlex.split(example_request("http://h:1", "v2.3", keyed=False))
    assert words[:2] == ["curl", "http://h:1/v1/completions"] and json.loads(words[-1])["model"] == "v2.3"
    assert "$DEEPSEEK_API_KEY" in example_request("http://h:1", "v2.3", keyed=True)


def test_plain_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    progress = LoadProgress()
    progress.update("a", "weights", 0.1)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(report, "_QUIET_S", 0.0)
    progress.update("a", "weights", 0.25)
    progress.close()
    assert capsys.readouterr().out == "loading a: weights 25%\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    progress = LoadProgress()
    progress.update("a", "weights", 0.5)
    progress.update("a", "kv", 1.0)
    progress.close()
    progress.close()
    assert "kv" in capsys.readouterr().out
