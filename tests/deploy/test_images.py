"""The images' files: what the Dockerfiles name exists, they agree with each other, and the scripts beside them do what they say.

Building and running an image is `make image` and `make image-test`.
"""

from __future__ import annotations

import argparse
import http.server
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from service.config.definition import ENVIRONMENT_PREFIX, Definition
from tests.house.source import ROOT

DOCKER = ROOT / "docker"
KINDS = ("cpu", "gpu", "jetson")
TEXTS = {kind: (DOCKER / f"{kind}.Dockerfile").read_text("utf-8").replace("\\\n", " ") for kind in KINDS}


def script(name: str) -> ModuleType:
    """A script of docker/ as a module."""
    specification = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def stages(text: str) -> list[list[str]]:
    """The instructions of each stage."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    starts = [index for index, line in enumerate(lines) if line.startswith("FROM")] + [len(lines)]
    return [lines[begin:end] for begin, end in itertools.pairwise(starts)]


def instructions(kind: str, word: str, stage: int = -1) -> list[str]:
    return [line.partition(" ")[2] for line in stages(TEXTS[kind])[stage] if line.startswith(f"{word} ")]


# The Dockerfiles.


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_copied_exists(kind: str) -> None:
    copied = [line for stage in stages(TEXTS[kind]) for line in stage if line.startswith("COPY ") and "--from" not in line]
    sources = [source for line in copied for source in line.split()[1:-1]]
    assert {"pyproject.toml", "setup.py", "constraints.txt", "service"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert ignored[0] == "*" and all(f"!{source.split('/')[0]}" in ignored for source in sources)


@pytest.mark.parametrize("kind", KINDS)
def test_the_environment_is_settings(kind: str) -> None:
    (environment,) = instructions(kind, "ENV")
    pairs = dict(pair.split("=", 1) for pair in environment.split())
    own = {name.removeprefix(ENVIRONMENT_PREFIX).lower(): value for name, value in pairs.items() if name.startswith(ENVIRONMENT_PREFIX)}
    assert {"host", "port", "tier"} <= set(own) and set(own) <= set(Definition.model_fields)
    given = Definition(**own)
    assert (given.tier, given.port) == ({"jetson": "edge"}.get(kind, kind), int(*instructions(kind, "EXPOSE")))
    assert not given.api_key and not given.insecure  # the world is refused until a key is given


@pytest.mark.parametrize("kind", KINDS)
def test_the_entrypoint_is_the_command(kind: str) -> None:
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert instructions(kind, "ENTRYPOINT") == ['["tini", "--", "deepseek-serve"]'] and "deepseek-serve" in commands
    assert instructions(kind, "USER") == ["10001:10001"]
    assert len(instructions(kind, "HEALTHCHECK")) == 1


def test_the_builders_differ_in_torch_alone() -> None:
    builders = {"\n".join(stages(TEXTS[kind])[1]).replace("ARG TORCH=cuda", "ARG TORCH=cpu") for kind in KINDS}
    assert len(builders) == 1
    assert [instructions(kind, "ARG", 1)[0] for kind in KINDS] == ["TORCH=cpu", "TORCH=cuda", "TORCH=cuda"]


def test_a_compiler_stays_only_where_triton_needs_it() -> None:
    assert ["gcc" in " ".join(instructions(kind, "RUN")) for kind in KINDS] == [False, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_exist(kind: str) -> None:
    steps = re.findall(r"install\.sh (\w+)", TEXTS[kind])
    defined = re.findall(r"^(\w+)\(\) \{", (DOCKER / "install.sh").read_text("utf-8"), re.MULTILINE)
    assert set(steps) == {"packages", "dependencies", "project", "strip"} <= set(defined)


# The scripts.


@pytest.mark.parametrize("name", ["install.sh", "image.sh"])
def test_shell_scripts_parse(name: str) -> None:
    assert subprocess.run(["sh", "-n", DOCKER / name], check=False).returncode == 0
    assert os.access(DOCKER / name, os.X_OK)


@pytest.mark.parametrize(("kind", "reason"), [("tpu", "there is no image tpu"), ("jetson", "with BASE=")])
def test_image_refuses(kind: str, reason: str) -> None:
    clean = {name: value for name, value in os.environ.items() if name != "BASE"}
    done = subprocess.run([DOCKER / "image.sh", kind], capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 2 and reason in done.stderr


@pytest.mark.parametrize(
    ("needs", "refused"),
    [
        (["filelock", "nvidia-cublas==13; platform_system == 'Linux'"], True),
        (["triton==3.6"], True),
        (["filelock", "sympy"], False),
        ([], False),
    ],
)
def test_a_cuda_build_of_torch_is_refused_with_what_to_do(tmp_path: Path, needs: list[str], refused: bool) -> None:
    """pip is played: it writes the report of the torch that the index of the day has."""
    report = {"install": [{"metadata": {"version": "2.13.0", "requires_dist": needs}}]}
    (tmp_path / "report").write_text(json.dumps(report), "utf-8")
    stub = (
        f'#!/bin/sh\n[ "$1" = - ] && exec {sys.executable} "$@"\necho "$@" >>{tmp_path}/calls\n'
        f'while [ $# -gt 1 ]; do [ "$1" = --report ] && cp {tmp_path}/report "$2"; shift; done\n'
    )
    (tmp_path / "python3").write_text(stub)
    (tmp_path / "python3").chmod(0o755)
    clean = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH_INDEX": "https://torch.test/cpu"}
    done = subprocess.run([DOCKER / "install.sh", "refuse_cuda"], capture_output=True, text=True, check=False, env=clean)
    assert (done.returncode != 0) is refused
    assert ("make image WHEELS=DIRECTORY" in done.stderr and "TORCH_INDEX=URL" in done.stderr) is refused
    assert (
        "--dry-run" in (tmp_path / "calls").read_text() and "--extra-index-url https://torch.test/cpu" in (tmp_path / "calls").read_text()
    )


def image(tmp_path: Path, code: int = 0, **given: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """`docker/image.sh cpu` with a buildah that writes down its arguments and ends with `code`."""
    for name, text in (("buildah", f'echo "$@" >>{tmp_path}/calls; exit {code}'), ("pip", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name not in ("WHEELS", "TORCH_INDEX", "TAG")}
    environment = {**clean, "PATH": f"{tmp_path}:{clean['PATH']}", "BASE": "localhost/base", "PYTHON": sys.executable, **given}
    done = subprocess.run([DOCKER / "image.sh", "cpu"], capture_output=True, text=True, check=False, env=environment)
    return done, (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""


def test_wheels_and_an_index_reach_the_build(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    done, calls = image(tmp_path, WHEELS=str(wheels), TORCH_INDEX="https://torch.test/cpu")
    assert done.returncode == 0 and "built localhost/deepseek-service:cpu" in done.stdout
    assert f"--build-context wheels={wheels}" in calls and "--build-arg TORCH_INDEX=https://torch.test/cpu" in calls


def test_wheels_that_are_not_there_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    done, calls = image(tmp_path, WHEELS=str(tmp_path / "nowhere"))
    assert done.returncode == 2 and "is not a directory" in done.stderr and calls == ""


def test_a_build_that_fails_is_not_called_built(tmp_path: Path) -> None:
    done, calls = image(tmp_path, code=3, WHEELS=str(tmp_path))
    assert done.returncode == 3 and "build " in calls and "built" not in done.stdout


PIP_LINES = [
    ":env:.index-url='https://user:secret@mirror.test/simple'",
    "global.index-url='https://other.test/simple'",
    "global.extra-index-url='file:///wheelhouse/simple https://extra.test/simple'",
    "global.constraint='/etc/constraints.txt'",
]


def test_pip_settings_are_carried_without_paths(tmp_path: Path) -> None:
    settings = script("pip_settings")
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "torch-2.13.0+cpu-cp311.whl").touch()
    (tmp_path / "own.pem").write_text("authority")
    lines = [*PIP_LINES, f"global.find-links='/nowhere {tmp_path}/wheels'", f"global.cert='{tmp_path}/own.pem'"]
    (tmp_path / "out").mkdir()
    settings.write(settings.read_settings(lines), tmp_path / "out")
    written = (tmp_path / "out" / "pip.conf").read_text("utf-8")
    assert "index-url = https://user:secret@mirror.test/simple" in written and "other.test" not in written
    assert "https://extra.test/simple" in written and "wheelhouse" not in written and "constraint" not in written
    assert "cert = /etc/pip-ca.pem" in written and all("target=/etc/pip-ca.pem" in text for text in TEXTS.values())
    assert (tmp_path / "out" / "ca.pem").read_text("utf-8") == "authority"
    assert (tmp_path / "out" / "wheels").read_text("utf-8") == f"{tmp_path}/wheels"


def test_a_machine_without_settings_carries_none(tmp_path: Path) -> None:
    settings = script("pip_settings")
    settings.write(settings.read_settings([]), tmp_path)
    assert [(tmp_path / name).read_text("utf-8").strip() for name in ("pip.conf", "ca.pem", "wheels")] == ["[global]", "", ""]


def test_a_container_runs_as_the_image_says() -> None:
    run = script("run")
    config = {"User": "10001:10001", "Env": ["A=1"], "Entrypoint": ["tini"], "Cmd": ["serve"], "WorkingDir": "/srv"}
    options = argparse.Namespace(tmp="64m", volume=["/host:/models"], env=["B=2"], arguments=[])
    command = run.command_of(config, Path("/root-of-it"), options)
    assert command[command.index("run") + 1 :] == [
        "/root-of-it",
        "64m",
        "10001 10001",
        "/srv",
        "/host:/models",
        "--",
        "A=1",
        "B=2",
        "tini",
        "serve",
    ]
    options.arguments = ["--port", "1"]
    assert run.command_of({**config, "User": "7"}, Path("/r"), options)[-5:] == ["A=1", "B=2", "tini", "--port", "1"]
    assert "7 7" in run.command_of({**config, "User": "7"}, Path("/r"), options)


# The health check.


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers /health with the server's status."""

    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/health" else 404)  # type: ignore[attr-defined]
        self.end_headers()
        self.wfile.write(b"the states")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def check_health(port: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DEEPSEEK_PORT": str(port)}
    command = [sys.executable, "-I", DOCKER / "healthcheck.py"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_follows_health(server: http.server.HTTPServer, status: int, code: int) -> None:
    server.status = status  # type: ignore[attr-defined]
    done = check_health(server.server_port)
    assert (done.returncode, done.stdout) == (code, "the states\n")


def test_no_answer_is_not_health(server: http.server.HTTPServer) -> None:
    server.server_close()
    done = check_health(server.server_port)
    assert done.returncode == 1 and "no answer" in done.stdout
