"""What this machine's pip is told, written where an image's builder can take it: python3 docker/pip_settings.py DIRECTORY.

DIRECTORY gets `pip.conf` (indexes, trusted hosts), `ca.pem` (certificate authorities, empty when pip has none of its own) and
`wheels` (the path of the first local --find-links directory that holds a wheel of torch, or nothing). It does not know what is built.
Invariant: a setting that names a path of this machine is carried over by content or left out, never by path.
"""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

INDEXES = ("index-url", "extra-index-url", "trusted-host")
CA_IN_BUILDER = "/etc/pip-ca.pem"


def read_settings(lines: list[str]) -> dict[str, str]:
    """Name and value of each line of `pip config list`; the environment wins over [install], which wins over [global]."""
    found: dict[str, tuple[int, str]] = {}
    for line in lines:
        place, _, value = line.partition("=")
        section, _, name = place.rpartition(".")
        rank = {":env:": 3, "install": 2, "global": 1}.get(section, 0)
        if rank >= found.get(name, (1, ""))[0]:
            found[name] = (rank, str(ast.literal_eval(value)))
    return {name: value for name, (_, value) in found.items()}


def reachable(value: str) -> str:
    """The entries of a setting that are no path and no file: URL."""
    return "\n".join(entry for entry in value.split() if not entry.startswith(("file:", "/", "~", ".")))


def torch_directory(value: str) -> Path | None:
    """The first local directory among `value` that holds a wheel of torch."""
    places = [Path(entry.removeprefix("file://")).expanduser() for entry in value.split()]
    return next((place for place in places if place.is_dir() and list(place.glob("torch-*.whl"))), None)


def write(settings: dict[str, str], directory: Path) -> None:
    """Write the three files."""
    authorities = Path(settings["cert"]).read_bytes() if settings.get("cert") else b""
    (directory / "ca.pem").write_bytes(authorities)
    carried = {name: reachable(settings[name]) for name in INDEXES if name in settings}
    if authorities:
        carried["cert"] = CA_IN_BUILDER
    config = configparser.ConfigParser(interpolation=None)
    config["global"] = {name: value for name, value in carried.items() if value}
    with (directory / "pip.conf").open("w", encoding="utf-8") as file:
        config.write(file)
    wheels = torch_directory(settings.get("find-links", ""))
    (directory / "wheels").write_text(str(wheels or ""), "utf-8")


def main() -> int:
    """Ask pip; a Python without pip has no settings."""
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    lines = asked.stdout.splitlines() if asked.returncode == 0 else []
    write(read_settings([line for line in lines if "=" in line]), Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
