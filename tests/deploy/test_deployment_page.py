"""Every command of docs/deployment.md: what needs no cluster, engine or root runs here; of the rest each name and flag is looked up.

`docker run` is run by docker/image_test.py. A command that no check knows fails.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from service.cli.train import read_flags
from service.config.load import load_settings
from service.train.recipe import recipe_names
from tests.deploy.kustomize import build
from tests.house.source import ROOT
from tests.pages import PAGES

PAGE = PAGES["docs/deployment.md"]
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
OBJECTS = build(ROOT / "deploy/kubernetes/overlays/cpu")
# Flags of `docker run` and how many values each takes; docker/image_test.py runs these commands.
RUN_FLAGS = {
    "--detach": 0,
    "--name": 1,
    "--read-only": 0,
    "--tmpfs": 1,
    "--cap-drop": 1,
    "--security-opt": 1,
    "--stop-timeout": 1,
    "--publish": 1,
    "--env": 1,
    "--cpus": 1,
    "--memory": 1,
    "--volume": 1,
}


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert words and set(words) <= set(targets)


def options(words: list[str], with_value: dict[str, int]) -> tuple[dict[str, list[str]], list[str]]:
    """The flags and their values, and what follows them; an unknown flag is an error."""
    given: dict[str, list[str]] = {}
    while words and words[0].startswith("-"):
        flag, *words = words
        values = words[: with_value[flag]]
        words = words[with_value[flag] :]
        given.setdefault(flag, []).extend(values)
    return given, words


def check_docker(words: list[str]) -> None:
    CHECKS_OF_DOCKER[words[0]](words[1:])


def check_docker_run(words: list[str]) -> None:
    given, (image, *arguments) = options(words, RUN_FLAGS)
    assert image == "deepseek-service:cpu" and {"--read-only", "--cap-drop", "--tmpfs"} <= set(given)
    assert {"DEEPSEEK_API_KEY"} <= {pair.partition("=")[0] for pair in given["--env"]}
    drain_s = load_settings(arguments).http.drain_s
    assert int(*given["--stop-timeout"]) >= drain_s + 15
    if "--cpus" in given:
        assert f"DEEPSEEK_THREADS={given['--cpus'][0]}" in given["--env"]


def check_docker_build(words: list[str]) -> None:
    given, rest = options(words, {"--file": 1, "--build-arg": 1, "--tag": 1})
    text = (ROOT / given["--file"][0]).read_text("utf-8")
    assert rest == ["."] and given["--file"][0].startswith("docker/" + given["--tag"][0].rpartition(":")[2])
    for argument in given.get("--build-arg", ()):
        assert re.search(rf"^ARG {argument.partition('=')[0]}\b", text, re.MULTILINE)


def check_compose(words: list[str]) -> None:
    given, (action, *rest) = options(words, {"--file": 1})
    files = [yaml.safe_load((ROOT / name).read_text("utf-8")) for name in given["--file"]]
    _, services = options(rest, {"--detach": 0, "--no-deps": 0})
    assert action == "up" and set(services) <= set(files[0]["services"])


def check_named_container(words: list[str]) -> None:
    assert words == ["deepseek"] and "docker run --detach --name deepseek" in PAGE


CHECKS_OF_DOCKER: dict[str, Callable[[list[str]], None]] = {
    "run": check_docker_run,
    "build": check_docker_build,
    "compose": check_compose,
    "stop": check_named_container,
    "rm": check_named_container,
}


def kubectl(*words: str) -> str:
    """What kubectl prints; skipped where it is not installed."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: the names were looked up, nothing was run")
    done = subprocess.run(["kubectl", *words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def check_kubectl(words: list[str]) -> None:
    """Objects are those of the overlay; what needs no cluster is run, and of the rest kubectl is asked whether it has such a command."""
    given, rest = options(words, {"--namespace": 1})
    assert given in ({}, {"--namespace": [OBJECTS[0]["metadata"]["namespace"]]})
    if rest[0] == "apply":
        assert (ROOT / rest[2] / "kustomization.yaml").is_file() and rest[1] == "--kustomize"
        assert kubectl("kustomize", str(ROOT / rest[2]))
    elif rest[0] == "create":
        made = yaml.safe_load(kubectl(*rest, "--dry-run=client", "--output=yaml"))
        check_made(made)
    elif rest[:2] == ["set", "image"]:
        check_image(rest[2:])
    else:
        deployments = {f"deployment/{one['metadata']['name']}" for one in OBJECTS if one["kind"] == "Deployment"}
        assert rest[0] == "rollout" and rest[2] in deployments
        assert f"kubectl rollout {rest[1]}" in kubectl("rollout", rest[1], "--help")


def check_made(made: dict[str, object]) -> None:
    metadata = made["metadata"]
    assert isinstance(metadata, dict)
    if made["kind"] == "Namespace":
        assert metadata["name"] == OBJECTS[0]["metadata"]["namespace"]
        return
    (deployment,) = [one for one in OBJECTS if one["kind"] == "Deployment"]
    (key,) = [one["valueFrom"]["secretKeyRef"] for one in deployment["spec"]["template"]["spec"]["containers"][0]["env"][:1]]
    data = made["data"]
    assert isinstance(data, dict) and (metadata["name"], list(data)) == (key["name"], [key["key"]])


def check_image(words: list[str]) -> None:
    (deployment,) = [one for one in OBJECTS if one["kind"] == "Deployment"]
    name, _, image = words[1].partition("=")
    assert words[0] == f"deployment/{deployment['metadata']['name']}" and image.startswith("deepseek-service:")
    assert name in {one["name"] for one in deployment["spec"]["template"]["spec"]["containers"]}


def check_python(words: list[str]) -> None:
    assert words[:2] == ["-m", "venv"] and re.fullmatch(r"/opt/deepseek-\d", words[2])


def check_pip(words: list[str]) -> None:
    assert words[:3] == ["install", "--constraint", "constraints.txt"] and words[3] == ".[torch]"


def check_systemctl(words: list[str]) -> None:
    assert words in (["daemon-reload"], ["restart", "deepseek-serve"], ["enable", "--now", "deepseek-serve"])


def check_sbatch(words: list[str]) -> None:
    _, (script, recipe, out, *flags) = options(
        [word.partition("=")[0] if word.startswith("--gpus") else word for word in words], {"--gpus-per-task": 0}
    )
    assert (ROOT / script).is_file() and recipe in recipe_names()
    assert read_flags(["--recipe", recipe, "--out", out, *flags])


def check_files(words: list[str]) -> None:
    """Run in a directory by `test_files_are_put_where_the_unit_looks`."""


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "docker": check_docker,
    "kubectl": check_kubectl,
    "python3": check_python,
    "/opt/deepseek-1/bin/pip": check_pip,
    "/opt/deepseek-2/bin/pip": check_pip,
    "install": check_files,
    "ln": check_files,
    "systemctl": check_systemctl,
    "sbatch": check_sbatch,
}


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_command(command: str) -> None:
    words = shlex.split(command)
    CHECKS[words[0]](words[1:])


def test_every_kind_of_command_is_there() -> None:
    assert {command.split()[0] for command in COMMANDS} == set(CHECKS)
    assert {word for command in COMMANDS if command.startswith("docker") for word in command.split()[1:2]} == set(CHECKS_OF_DOCKER)


def test_files_are_put_where_the_unit_looks(tmp_path: Path) -> None:
    """`install` and `ln` as the page has them, below another root; then the upgrade and the way back."""
    program = tmp_path / "opt/deepseek/bin/deepseek-serve"
    for release in ("1", "2"):
        (tmp_path / f"opt/deepseek-{release}/bin").mkdir(parents=True)
        (tmp_path / f"opt/deepseek-{release}/bin/deepseek-serve").write_text(release)
    in_use = []
    for command in COMMANDS:
        if command.startswith(("install ", "ln ")):
            moved = re.sub(r" (/(?:opt|etc)/)", rf" {tmp_path}\1", command)
            subprocess.run(shlex.split(moved), check=True, cwd=ROOT, timeout=30)
            in_use.append(program.read_text())
    assert in_use[0] == "1" and in_use[-2:] == ["2", "1"]
    unit = (tmp_path / "etc/systemd/system/deepseek-serve.service").read_text("utf-8")
    named = re.findall(r"(?<![\w.])(/(?:opt|etc)/deepseek[\w./-]*)", re.sub(r"^#.*$", "", unit, flags=re.MULTILINE))
    assert len(named) == 3 and all((tmp_path / name.lstrip("/")).exists() for name in named)
    assert (tmp_path / "etc/systemd/system/deepseek-serve.service.d/gpu.conf").is_file()
    assert (tmp_path / "etc/deepseek/keys.env").stat().st_mode & 0o777 == 0o600
    settings = load_settings(["--config", str(tmp_path / "etc/deepseek/service.yaml")])
    assert settings.http.port == 8000


def test_an_unknown_flag_is_seen() -> None:
    with pytest.raises(KeyError, match="--read-onyl"):
        options(["--read-onyl", "x"], RUN_FLAGS)


def test_systemd_enables_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemctl") is None:
        pytest.skip("systemctl is not installed")
    place = tmp_path / "etc/systemd/system"
    place.mkdir(parents=True)
    shutil.copy(ROOT / "deploy/systemd/deepseek-serve.service", place)
    command = ["systemctl", f"--root={tmp_path}", "enable", "deepseek-serve"]
    subprocess.run(command, check=True, capture_output=True, timeout=30, env={**os.environ, "SYSTEMD_OFFLINE": "1"})
    assert (place / "multi-user.target.wants/deepseek-serve.service").is_symlink()
