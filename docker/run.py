"""Runs an image as a container engine would with --read-only --cap-drop ALL --network host:

    python3 docker/run.py [options] IMAGE [arguments]

For machines that have buildah and no engine. The image's own entrypoint, user, environment and working directory count. Its root is
read-only, with a tmpfs on /tmp; its processes have a mount and a PID namespace of their own, no capability and no way to new ones. It does
not know what the image holds. Invariant: SIGTERM and Ctrl-C reach the container's first process, and nothing is left when it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

# $1 is the root, $2 the size of /tmp, $3 "uid gid", $4 the directory; then SOURCE:TARGET[:rw] for each volume, "--" and the command.
PREPARE = """
set -eu
root=$1 tmp_bytes=$2 user=$3 directory=$4
shift 4
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -o remount,ro,bind "$root/sys"
mount -t tmpfs -o "mode=755,size=64k" dev "$root/dev"
for device in null zero full random urandom tty; do : >"$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
mkdir "$root/dev/shm"
mount -t tmpfs -o "mode=1777,size=64m,nosuid,nodev,noexec" shm "$root/dev/shm"
mount -t tmpfs -o "mode=1777,size=$tmp_bytes,nosuid,nodev" tmp "$root/tmp"
while [ "$1" != -- ]; do
    volume=${1%:rw}
    mkdir -p "$root${volume##*:}"
    mount --bind "${volume%:*}" "$root${volume##*:}"
    [ "$volume" != "$1" ] || mount -o remount,ro,bind "$root${volume##*:}"
    shift
done
shift
mount -o remount,ro,bind "$root"
exec chroot "$root" /usr/bin/setpriv --reuid "${user% *}" --regid "${user#* }" --clear-groups --no-new-privs \
    --bounding-set=-all --inh-caps=-all /usr/bin/env --ignore-environment --chdir="$directory" "$@"
"""


def buildah(*arguments: str) -> str:
    """What buildah prints; its own error ends the program."""
    done = subprocess.run(["buildah", *arguments], stdout=subprocess.PIPE, text=True, check=False)  # noqa: S607
    if done.returncode != 0:
        raise SystemExit(f"run: buildah {arguments[0]} failed")
    return done.stdout.strip()


def image_config(image: str) -> dict[str, Any]:
    """The image's configuration: User, Env, Entrypoint, Cmd, WorkingDir, Healthcheck …"""
    return dict(json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"])


@contextlib.contextmanager
def mounted(image: str) -> Iterator[tuple[str, Path]]:
    """A new container of the image: its name, and its file tree on this machine."""
    container = buildah("from", "--pull-never", image)
    try:
        yield container, Path(buildah("mount", container))
    finally:
        buildah("umount", container)
        buildah("rm", container)


def unpacked_bytes(image: str) -> int:
    """Bytes of the image's files, each file once."""
    with mounted(image) as (_, root):
        inodes = {(status.st_dev, status.st_ino): status.st_size for path in root.rglob("*") if (status := path.lstat())}
    return sum(inodes.values())


def command_of(config: dict[str, Any], root: Path, options: argparse.Namespace) -> list[str]:
    """The whole command line, from the namespaces down to the image's entrypoint."""
    user = (config.get("User") or "0").replace(":", " ")
    uid_gid = user if " " in user else f"{user} {user}"
    environment = [*config.get("Env", ()), *options.env]
    inner = [*(config.get("Entrypoint") or ()), *(options.arguments or config.get("Cmd") or ())]
    namespaces = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh", "-c", PREPARE, "run"]
    where = [str(root), options.tmp, uid_gid, config.get("WorkingDir") or "/"]
    return [*namespaces, *where, *options.volume, "--", *environment, *inner]


def first_process(unshare: int) -> int:
    """The process id, outside, of the container's first process; 0 when there is none any more."""
    children = Path(f"/proc/{unshare}/task/{unshare}/children")
    found = children.read_text("ascii").split() if children.exists() else []
    return int(found[0]) if found else 0


def run(image: str, options: argparse.Namespace) -> int:
    """Run to the end; returns the exit code of the container's first process."""
    config = image_config(image)
    with (
        mounted(image) as (container, root),
        subprocess.Popen(command_of(config, root, options), start_new_session=True) as process,
    ):

        def pass_on(number: int, _frame: FrameType | None) -> None:
            if inner := first_process(process.pid):
                os.kill(inner, number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, pass_on)
        print(f"run: container {container} of {image}, process {process.pid}", file=sys.stderr, flush=True)
        return process.wait()


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="set in the container; repeatable")
    parser.add_argument(
        "--volume", action="append", default=[], metavar="SOURCE:TARGET[:rw]", help="directory to mount, read-only unless :rw"
    )
    parser.add_argument("--tmp", default="64m", metavar="SIZE", help="size of the tmpfs on /tmp (64m)")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the entrypoint")
    options = parser.parse_args()
    return run(options.image, options)


if __name__ == "__main__":
    sys.exit(main())
