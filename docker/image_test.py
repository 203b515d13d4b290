"""Runs a cpu image for real and tries what its users rely on: IMAGE=NAME python3 docker/image_test.py (make image-test).

It needs root, buildah and the standard library, so it runs where nothing but Debian's packages is. docker/run.py runs the container: root
read-only, user 10001, no capabilities. Invariant: nothing is assumed from the Dockerfile; all is asked of the image or of its processes.
"""

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import run

IMAGE = os.environ.get("IMAGE", "localhost/deepseek-service:cpu")
MOST_BYTES = 1_200_000_000
KEY = "a-key-of-the-test"
START_S = 60
# Flags of `docker run` that docker/run.py always obeys or that act outside the container, with their number of values.
IMPLIED = {"--detach": 0, "--name": 1, "--read-only": 0, "--tmpfs": 1, "--cap-drop": 1, "--security-opt": 1, "--stop-timeout": 1}
IMPLIED |= {"--publish": 1, "--cpus": 1, "--memory": 1}


def free_port():
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Container:
    """A running container of the image on a free port."""

    def __init__(self, *arguments, env=(), volume=()):
        self.port = free_port()
        given = [f"--env={pair}" for pair in (f"DEEPSEEK_PORT={self.port}", *env)] + [f"--volume={pair}" for pair in volume]
        command = [sys.executable, str(Path(run.__file__)), *given, IMAGE, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def ask(self, method, path, body=None, key=KEY):
        """Status and parsed answer of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            return answer.status, json.loads(text) if text.startswith("{") else text

    def wait_for(self, path, status):
        """Wait until `path` answers `status`; fails when the container ends before."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if self.ask("GET", path)[0] == status:
                    return
            time.sleep(0.02)
        raise AssertionError(f"{path} never answered {status}: {self.end()}")

    def first_process(self):
        """Process id, outside, of the container's first process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(inner for outer in children if (inner := run.first_process(int(outer))))

    def processes(self):
        """Process ids, outside, of all processes of the container."""
        namespace = os.readlink(f"/proc/{self.first_process()}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns/pid") == namespace:
                    found.append(int(entry.name))
        return found

    def execute(self, *command):
        """Run a command inside, as the container's user."""
        into = ["nsenter", "--target", str(self.first_process()), "--mount", "--pid", "--root", "--wd"]
        environment = [*run.image_config(IMAGE)["Env"], f"DEEPSEEK_PORT={self.port}"]
        drop = ["/usr/bin/setpriv", "--reuid", "10001", "--regid", "10001", "--clear-groups", "--no-new-privs"]
        return subprocess.run(
            [*into, *drop, "/usr/bin/env", "-i", *environment, *command], capture_output=True, text=True, check=False, timeout=30
        )

    def end(self, number=signal.SIGTERM):
        """Send a signal and wait; the exit code and all output."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        with self.process:
            try:
                output, _ = self.process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.kill(self.first_process(), signal.SIGKILL)
                raise
        return self.process.returncode, output


class TheImage(unittest.TestCase):
    """What the image is, before anything runs."""

    @classmethod
    def setUpClass(cls):
        cls.config = run.image_config(IMAGE)

    def test_it_has_a_user_a_health_check_and_a_port(self):
        self.assertEqual(self.config["User"], "10001:10001")
        self.assertEqual(self.config["Healthcheck"]["Test"][0], "CMD")
        self.assertEqual(list(self.config["ExposedPorts"]), ["8000/tcp"])
        self.assertNotIn("DEEPSEEK_API_KEY", "".join(self.config["Env"]))

    def test_it_is_small_and_holds_no_tools_of_its_building(self):
        size = run.unpacked_bytes(IMAGE)
        print(f"image: {size / 1e6:.0f} MB unpacked", file=sys.stderr)
        self.assertLess(size, MOST_BYTES)
        with run.mounted(IMAGE) as (_, root):
            for tool in ("usr/bin/gcc", "usr/bin/pip", "opt/deepseek/bin/pip", "usr/bin/curl", "etc/pip.conf", "etc/pip-ca.pem", "wheels"):
                self.assertFalse((root / tool).exists(), tool)
            self.assertEqual(len(list(root.glob("opt/deepseek/lib/python3*/site-packages/service/kernels/native/*.so"))), 1)
            files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
            self.assertEqual([path for path in files if path.stat().st_mode & 0o6000], [])


class TheService(unittest.TestCase):
    """One container of the bundled model, asked as clients and operators ask."""

    @classmethod
    def setUpClass(cls):
        began = time.monotonic()
        cls.container = Container(env=[f"DEEPSEEK_API_KEY={KEY}"])
        cls.container.wait_for("/ready", 200)
        print(f"image: ready after {time.monotonic() - began:.2f} s", file=sys.stderr)

    @classmethod
    def tearDownClass(cls):
        cls.container.end()

    def test_a_request_is_answered_by_the_bundled_model(self):
        body = {"prompt": "def read(path):\n", "max_tokens": 8, "temperature": 0}
        status, answer = self.container.ask("POST", "/v1/completions", body)
        self.assertEqual(status, 200, answer)
        self.assertTrue(answer["choices"][0]["text"])
        self.assertEqual(answer["usage"]["completion_tokens"], 8)

    def test_no_key_no_answer(self):
        self.assertEqual(self.container.ask("POST", "/v1/completions", {"prompt": "x"}, key=None)[0], 401)
        self.assertEqual(self.container.ask("GET", "/live", key=None)[0], 200)
        self.assertIn("deepseek_model_loaded", self.container.ask("GET", "/metrics", key=None)[1])

    def test_every_process_is_without_privileges(self):
        found = self.container.processes()
        self.assertGreaterEqual(len(found), 3)
        for process in found:
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":\t" in line)
            self.assertEqual(set(status["Uid"].split()), {"10001"}, status["Name"])
            self.assertEqual((int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]), (0, 0, "1"), status["Name"])

    def test_only_tmp_can_be_written(self):
        for place in ("/opt/deepseek/x", "/x", "/var/x"):
            done = self.container.execute("python", "-c", f"open({place!r}, 'w')")
            self.assertIn("Read-only file system", done.stderr, place)
        self.assertEqual(self.container.execute("python", "-c", "open('/tmp/x', 'w')").returncode, 0)

    def test_the_health_check_of_the_image(self):
        command = run.image_config(IMAGE)["Healthcheck"]["Test"][1:]
        done = self.container.execute(*command)
        self.assertEqual(done.returncode, 0, done)
        self.assertIn('"ready"', done.stdout)
        silent = self.container.execute("env", f"DEEPSEEK_PORT={free_port()}", *command)
        self.assertEqual(silent.returncode, 1, silent)


class ItsEnd(unittest.TestCase):
    """Signals and refusals."""

    def test_sigterm_drains(self):
        container = Container(env=[f"DEEPSEEK_API_KEY={KEY}"])
        container.wait_for("/ready", 200)
        connection = http.client.HTTPConnection("127.0.0.1", container.port, timeout=60)
        body = {"prompt": "def f():\n", "max_tokens": 1000, "stream": True, "ignore_eos": True}
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        )
        self.addCleanup(connection.close)
        answer = connection.getresponse()
        self.assertTrue(answer.readline().startswith(b"data: {"))
        container.process.send_signal(signal.SIGTERM)
        container.wait_for("/ready", 503)
        self.assertEqual(container.ask("POST", "/v1/completions", {"prompt": "x"})[0], 503)
        lines = [line for line in answer.read().decode().splitlines() if line]
        self.assertEqual(lines[-1], "data: [DONE]")
        self.assertIn('"finish_reason":"length"', "".join(lines[-3:]))
        code, output = container.end()
        self.assertEqual(code, 0, output)
        self.assertIn('"draining"', output)

    def test_sigterm_before_it_is_up_ends_it(self):
        container = Container(env=[f"DEEPSEEK_API_KEY={KEY}"])
        self.assertIn("run: container", container.process.stdout.readline())
        while not run_first(container):
            time.sleep(0.01)
        code, output = container.end()
        self.assertIn(code, (130, 143), output)

    def test_without_a_key_it_does_not_listen_to_the_world(self):
        container = Container()
        output, _ = container.process.communicate(timeout=START_S)
        self.assertEqual(container.process.returncode, 2, output)
        self.assertIn("set --api_key", output)

    def test_another_model_is_mounted(self):
        with tempfile.TemporaryDirectory() as directory:
            copy_bundled(Path(directory) / "mine")
            arguments = ["--model", "mine=/models/mine", "--context_tokens", "256"]
            container = Container(*arguments, env=[f"DEEPSEEK_API_KEY={KEY}"], volume=[f"{directory}:/models"])
            container.wait_for("/ready", 200)
            names = [entry["id"] for entry in container.ask("GET", "/v1/models")[1]["data"]]
            self.assertIn("mine", names)
            self.assertEqual(container.end()[0], 0)


class ItsCache(unittest.TestCase):
    """What is mounted on /var/cache/deepseek."""

    def test_quantised_weights_and_the_registry_are_kept_there(self):
        with tempfile.TemporaryDirectory() as directory:
            os.chown(directory, 10001, 10001)
            for again in ((), ("--restore",)):
                container = Container(
                    "--quantize=int8", *again, env=[f"DEEPSEEK_API_KEY={KEY}"], volume=[f"{directory}:/var/cache/deepseek:rw"]
                )
                container.wait_for("/ready", 200)
                self.assertEqual(container.ask("POST", "/v1/completions", {"prompt": "def f", "max_tokens": 2})[0], 200)
                self.assertEqual(container.end()[0], 0)
                self.assertEqual(len([path for path in (Path(directory) / "weights").rglob("*") if path.is_file()]), 1)
                self.assertTrue((Path(directory) / "registry.sqlite").is_file())


class TheDocs(unittest.TestCase):
    """`docker run` as docs/deployment.md has it: its settings, mounts and arguments, on another port and with our own model directory."""

    def test_every_docker_run(self):
        page = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text("utf-8")
        commands = re.findall(r"^docker run (.*)$", page, re.MULTILINE)
        self.assertGreaterEqual(len(commands), 2)
        for command in commands:
            with self.subTest(command), tempfile.TemporaryDirectory() as models:
                self.try_command(shlex.split(command), Path(models))

    def try_command(self, words, models):
        env, volume = [], []
        while words[0].startswith("--"):
            flag = words.pop(0)
            if flag == "--env":
                pair = words.pop(0)
                env.append(pair if "=" in pair else f"{pair}={KEY}")
            elif flag == "--volume":
                _, target, mode = words.pop(0).split(":")
                self.assertEqual(mode, "ro")
                volume.append(f"{models}:{target}")
            else:
                for _ in range(IMPLIED[flag]):
                    words.pop(0)
        self.assertEqual(words.pop(0), "deepseek-service:cpu")
        for word in words:
            if "=/models/" in word:
                copy_bundled(models / Path(word.partition("=")[2]).name)
        container = Container(*words, env=env, volume=volume)
        container.wait_for("/ready", 200)
        self.assertEqual(container.ask("POST", "/v1/completions", {"prompt": "def f", "max_tokens": 2})[0], 200)
        self.assertEqual(container.end()[0], 0)


def copy_bundled(directory):
    """The image's bundled model as a checkpoint of one's own, readable by everyone."""
    with run.mounted(IMAGE) as (_, root):
        shutil.copytree(next(root.glob("opt/deepseek/lib/python3*/site-packages/service/bundled/nano-*")), directory)
    directory.parent.chmod(0o755)


def run_first(container):
    """Whether the container's own command runs already."""
    with contextlib.suppress(OSError, StopIteration):
        return Path(f"/proc/{container.first_process()}/comm").read_text().strip() == "tini"
    return False


if __name__ == "__main__":
    unittest.main()
