"""Boots a Debian whose systemd runs the unit, and asks the service in it: IMAGE=NAME python3 deploy/systemd/boot_test.py (make unit-test).

It needs root, buildah and systemd-nspawn (package systemd-container), and takes the program from a built cpu image. Nothing of the unit
is changed: its user, its sandbox and its signals are those of a machine. It does not know what the unit says. Invariant: the booted system
ends by itself, or is ended, within two minutes.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "docker"))
import run  # noqa: E402

IMAGE = os.environ.get("IMAGE", "localhost/deepseek-service:cpu")
BASE = os.environ.get("BASE", "localhost/deepseek-base:bookworm")
PORT = 8790
PACKAGES = "systemd systemd-sysv dbus python3 curl"
# The stream is asked for, begun, and read to its end while the unit is stopped.
PROBE = f"""#!/bin/sh
ask() {{ curl --silent --no-buffer --header 'authorization: Bearer k' --header 'content-type: application/json' --data "$1" \
    http://127.0.0.1:{PORT}/v1/completions; }}
for _ in $(seq 300); do curl --silent --fail http://127.0.0.1:{PORT}/ready && break; sleep 0.2; done
echo; systemctl show deepseek-serve -p ActiveState,MainPID
ask '{{"prompt": "def f", "max_tokens": 4}}' >/answer
mkfifo /begun
ask '{{"prompt": "def f", "max_tokens": 400, "ignore_eos": true, "stream": true}}' | {{ head -n 1 >/begun; cat; }} >/stream &
read -r first </begun
systemctl stop deepseek-serve
wait
systemctl show deepseek-serve -p Result,ExecMainStatus
journalctl --unit deepseek-serve --no-pager --output cat
"""
PROBE_UNIT = """[Unit]
After=deepseek-serve.service
[Service]
Type=oneshot
StandardOutput=file:/report
StandardError=file:/report
ExecStart=/probe
ExecStartPost=/bin/systemctl poweroff --no-block
TimeoutStartSec=90
[Install]
WantedBy=multi-user.target
"""


def prepare(root):
    """The unit, its settings and the probe where they belong."""
    place = root / "etc/systemd/system"
    settings = root / "etc/deepseek"
    settings.mkdir()
    shutil.copy(HERE / "deepseek-serve.service", place)
    (settings / "service.yaml").write_text((HERE / "service.yaml").read_text().replace("port: 8000", f"port: {PORT}"))
    (settings / "keys.env").write_text("DEEPSEEK_API_KEY=k\n")
    (place / "probe.service").write_text(PROBE_UNIT)
    (root / "probe").write_text(PROBE)
    (root / "probe").chmod(0o755)
    for unit in ("deepseek-serve", "probe"):
        subprocess.run(["systemctl", f"--root={root}", "enable", unit], check=True, capture_output=True)


@contextlib.contextmanager
def debian_with_systemd():
    """The file tree of a Debian that can boot."""
    with run.mounted(BASE) as (container, root):
        install = f"apt-get update --quiet=2 && apt-get install --quiet=2 --yes --no-install-recommends {PACKAGES}"
        run.buildah("run", "--isolation", "chroot", "--env", "DEBIAN_FRONTEND=noninteractive", container, "--", "sh", "-c", install)
        yield root


class TheUnit(unittest.TestCase):
    """One boot, from enabled unit to a stop in the middle of a stream."""

    def test_it_serves_and_drains(self):
        with run.mounted(IMAGE) as (_, image), debian_with_systemd() as root:
            prepare(root)
            (root / "opt/deepseek").mkdir()
            command = ["systemd-nspawn", "--register=no", "--keep-unit", "--quiet", "--boot", f"--directory={root}"]
            bound = f"--bind-ro={image}/opt/deepseek:/opt/deepseek"
            booted = subprocess.run([*command, bound], capture_output=True, text=True, check=False, timeout=120)
            self.assertTrue((root / "report").exists(), booted.stdout[-3000:])
            report = (root / "report").read_text()
            self.assertIn("ActiveState=active", report)
            self.assertIn('"completion_tokens":4', (root / "answer").read_text(), report)
            stream = (root / "stream").read_text()
            self.assertIn('"finish_reason":"length"', stream, report)
            self.assertEqual(stream.split()[-1], "[DONE]", report)
            self.assertIn('"event":"draining"', report)
            self.assertNotIn("worker_lost", report)
            self.assertIn("Result=success", report)
            self.assertIn("ExecMainStatus=0", report)
            self.assertTrue((root / "var/cache/private/deepseek").is_dir())


if __name__ == "__main__":
    unittest.main()
