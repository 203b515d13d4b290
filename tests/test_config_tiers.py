"""Tiers: what a machine is taken for, which defaults follow, and that whatever the user says goes before them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.config import machine as machine_module
from service.config import tiers
from service.config.definition import Definition
from service.config.load import ServeSettings, load_settings
from service.config.machine import Machine, this_machine, threads_note, usable_cores
from service.config.tiers import PROFILES, choose, detect, flags_of
from service.engine.backend_choice import choose_backend
from service.types.catalog import V2_3
from service.types.errors import SettingsError
from tests.pages import ROOT

PLAIN = Machine(gpu=False, board="", cores=8, quota=0)
CARD = PLAIN._replace(gpu=True)
BOARD = PLAIN._replace(board="NVIDIA Jetson AGX Orin", gpu=True)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("DEEPSEEK_")]:
        monkeypatch.delenv(name)


def load(monkeypatch: pytest.MonkeyPatch, machine: Machine, *arguments: str) -> ServeSettings:
    monkeypatch.setattr("service.config.load.this_machine", lambda: machine)
    return load_settings(["--model", "m=/models/m", *arguments])


@pytest.mark.parametrize(
    ("machine", "device", "tier", "words"),
    [
        (PLAIN, "auto", "cpu", "no GPU"),
        (CARD, "auto", "gpu", "there is a GPU"),
        (CARD, "cpu", "cpu", "--device is cpu"),
        (PLAIN, "cuda:1", "gpu", "--device is cuda:1"),
        (BOARD, "auto", "edge", "Jetson"),
        (BOARD, "cuda", "edge", "Jetson"),
    ],
)
def test_a_machine_is_taken_for(machine: Machine, device: str, tier: str, words: str) -> None:
    found, reason = detect(machine, device)
    assert found == tier and words in reason


def test_a_detected_tier_quantises_nothing_and_names_no_type(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in (PLAIN, CARD, BOARD):
        settings = load(monkeypatch, machine)
        assert settings.engine.quantize == "auto" and settings.engine.dtype == "auto"
        assert settings.tier is not None and settings.tier.how == "detected" and settings.tier.reason
    choice, _ = choose({}, PLAIN)
    assert (choice.flags, choice.more) == ("", "--quantize int8")


def test_a_named_tier_sets_its_whole_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    edge = load(monkeypatch, PLAIN, "--tier", "edge")
    assert (edge.engine.quantize, edge.scheduler.batch_size, edge.engine.tier) == ("int8", 4, "edge")
    assert edge.tier is not None and (edge.tier.how, edge.tier.flags, edge.tier.more) == ("given", "--quantize int8 --batch_size 4", "")
    cpu = load(monkeypatch, PLAIN, "--tier", "cpu")
    assert (cpu.engine.quantize, cpu.scheduler.batch_size) == ("int8", 32)
    gpu = load(monkeypatch, CARD, "--tier", "gpu")
    assert (gpu.scheduler.batch_size, gpu.scheduler.step_tokens, gpu.engine.quantize, gpu.engine.device) == (256, 2048, "auto", "cuda")
    assert load(monkeypatch, CARD).engine.device == "auto"


def test_a_board_is_an_edge_device_without_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, BOARD)
    assert (settings.engine.tier, settings.scheduler.batch_size) == ("edge", 4)
    # Whether there is a GPU the worker knows better than files do.
    assert load(monkeypatch, CARD).engine.tier == "auto"


def test_what_gives_way_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, held_back in (
        (("--tier", "cpu", "--quantize", "none"), "--quantize int8"),
        (("--tier", "edge", "--quantize", "none"), "--quantize int8"),
        (("--tier", "cpu", "--device", "cuda"), "--quantize int8"),
        (("--tier", "edge", "--batch_size", "7"), "--batch_size 4"),
        (("--tier", "edge"), ""),
        (("--quantize", "none"), ""),
    ):
        tier = load(monkeypatch, PLAIN, *flags).tier
        assert tier is not None and tier.held_back == held_back, flags


def test_the_batch_size_of_a_tier_may_take_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the help and the page promise no equal answers."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    spec = V2_3.spec(dict(V2_3.shapes)["nano"])
    taken = []
    for machine in (PLAIN, BOARD):
        settings = load(monkeypatch, machine, "--device", "cpu")
        taken.append(choose_backend(spec, settings.engine, settings.scheduler.batch_size).backend)
    assert taken == ["torch", "onnx"]
    said = [Definition.model_fields["tier"].description or "", tiers.__doc__ or "", (ROOT / "docs/tuning.md").read_text("utf-8")]
    assert all("--backend auto" in text and "no answer" not in text for text in said)


def test_flags_variables_and_the_file_go_before_the_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load(monkeypatch, PLAIN, "--tier", "edge", "--quantize", "none", "--batch_size", "7").scheduler.batch_size == 7
    monkeypatch.setenv("DEEPSEEK_QUANTIZE", "int4")
    settings = load(monkeypatch, PLAIN, "--tier", "edge")
    assert settings.engine.quantize == "int4" and settings.tier is not None and settings.tier.flags == "--batch_size 4"
    file = tmp_path / "service.yaml"
    file.write_text("tier: edge\nbatch_size: 3\n")
    settings = load(monkeypatch, PLAIN, "--config", str(file))
    assert (settings.scheduler.batch_size, settings.engine.tier) == (3, "edge")


def test_a_profile_gives_way_to_what_it_would_contradict(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, CARD, "--step_tokens", "64").scheduler.batch_size == 64
    large = load(monkeypatch, CARD, "--batch_size", "4096").scheduler
    assert (large.batch_size, large.step_tokens) == (4096, 4096)
    # Quantised products are compiled for CPUs: a GPU, asked for or taken by itself, gets none by a profile.
    for machine, flags in ((PLAIN, ("--device", "cuda")), (BOARD, ())):
        assert load(monkeypatch, machine, "--tier", "edge", *flags).engine.quantize == "auto"
    assert load(monkeypatch, BOARD, "--tier", "edge", "--device", "cpu").engine.quantize == "int8"


def test_a_quota_of_processor_time_bounds_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, PLAIN._replace(quota=3)).engine.threads == 3
    assert load(monkeypatch, PLAIN._replace(quota=3), "--threads", "5").engine.threads == 5
    assert load(monkeypatch, PLAIN._replace(quota=9)).engine.threads == 0


def test_a_mistake_is_still_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="--tier must be one of auto, gpu, edge, cpu"):
        load(monkeypatch, PLAIN, "--tier", "tpu")
    with pytest.raises(SettingsError, match=r"--step_tokens \(2\) must be at least --batch_size \(32\)"):
        load(monkeypatch, PLAIN, "--step_tokens", "2")


@pytest.mark.parametrize("tier", PROFILES)
def test_profiles_name_settings_and_stand_in_the_docs(tier: str) -> None:
    profile = PROFILES[tier]
    Definition(**profile.always, **profile.named)
    assert not set(profile.always) & set(profile.named)
    shown = [f"`{flags_of(part)}`" if part else "" for part in (profile.always, profile.named)]
    assert f"| `{tier}` | {shown[0]} | {shown[1]} |" in (ROOT / "docs/tuning.md").read_text("utf-8")


def test_more_threads_than_cores_are_worth_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, words in (({0, 3}, "the 2 cores that"), ({1}, "the one core that")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        assert words in threads_note(16) and "--threads 16" in threads_note(16)
        assert [threads_note(count) for count in (0, len(cores))] == ["", ""]
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert usable_cores() == 4 and threads_note(4) == "" != threads_note(5)


def files(root: Path, contents: dict[str, str]) -> Path:
    for path, text in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_nothing_to_read_is_a_plain_machine(tmp_path: Path) -> None:
    assert this_machine(tmp_path) == Machine(gpu=False, board="", cores=len(os.sched_getaffinity(0)), quota=0)


def test_a_card_counts_where_torch_can_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = files(tmp_path, {"dev/nvidia0": ""})
    for version, found in (("2.13.0+cpu", False), ("2.13.0", True), ("2.13.0+cu130", True)):
        monkeypatch.setattr(machine_module.importlib.metadata, "version", lambda name, version=version: version)
        assert this_machine(root).gpu is found

    def missing(name: str) -> str:
        raise machine_module.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine_module.importlib.metadata, "version", missing)
    assert not this_machine(root).gpu


@pytest.mark.parametrize(
    ("model", "board"),
    [("NVIDIA Jetson AGX Orin Developer Kit\0", "NVIDIA Jetson AGX Orin Developer Kit"), ("linux,dummy-virt\0", ""), ("", "")],
)
def test_a_board_is_known_by_its_device_tree(tmp_path: Path, model: str, board: str) -> None:
    assert this_machine(files(tmp_path, {"proc/device-tree/model": model})).board == board


@pytest.mark.parametrize(
    ("contents", "quota"),
    [
        ({"proc/self/cgroup": "0::/pod/box\n", "sys/fs/cgroup/pod/box/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/pod/box\n", "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n"}, 0),
        ({"proc/self/cgroup": "0::/pod/box\n", "sys/fs/cgroup/pod/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        (
            {
                "proc/self/cgroup": "3:memory:/x\n2:cpu,cpuacct:/box\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/box\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            },
            0,
        ),
    ],
)
def test_a_quota_is_read_from_the_control_groups(tmp_path: Path, contents: dict[str, str], quota: int) -> None:
    assert this_machine(files(tmp_path, contents)).quota == quota
