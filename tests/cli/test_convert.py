"""`deepseek-convert` as a command: its report, its refusals in one sentence with exit code 2, and what a kill leaves."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from service.checkpoints.long_context import adapt, dense_by_choice
from service.checkpoints.manifest import read_manifest, verify
from service.cli import convert
from service.types.settings import AttentionSettings
from tests.cli.conftest import Start
from tests.tiny_models import build_tiny

CONVERT = "service.cli.convert"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: exit code, stdout, stderr."""
    pytest.importorskip("torch")

    def begin(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deepseek-convert", *map(str, arguments)])
        code = convert.main()
        return (code, *capsys.readouterr())

    return begin


def test_from_hugging_face_to_a_line_and_to_one_file(start: Start, tmp_path: Path) -> None:
    source = build_tiny(tmp_path / "theirs", "qwen3")
    code, out, error = start(
        CONVERT, "--input_model", str(source), "--output-model", str(tmp_path / "ours"), "--target_version", "v2.3"
    ).end()
    assert code == 0 and error == ""
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0] == f"theirs (qwen3) -> {tmp_path / 'ours'} (v2.3)"
    assert "added        head gates, open (4 tensors)" in lines
    assert any(line.startswith("lost         nothing: every weight is kept exactly") for line in lines)
    manifest = read_manifest(tmp_path / "ours")
    verify(manifest)
    assert f"digest       {manifest.digest[:12]} (the input was not covered by digests)" in lines


def test_the_longer_context(run: Run, tmp_path: Path) -> None:
    source = build_tiny(tmp_path / "theirs")
    wishes = ("--input_model", source, "--output_model", tmp_path / "out.pt", "--target_version", "1.0", "--max_position_embeddings", 512)
    code, out, _ = run(*wishes, "--rope_scaling", "yarn", "--dtype", "float32")
    assert code == 0 and "context      512 tokens" in out and "by yarn scaling" in out and "digest" not in out
    code, _, error = run(*wishes)
    assert code == 2 and "exists" in error and "--overwrite" in error
    assert run(*wishes, "--overwrite")[0] == 0


def test_dense_layers_are_written_and_served(run: Run, tmp_path: Path) -> None:
    source = build_tiny(tmp_path / "theirs", max_position_embeddings=4096, num_hidden_layers=4)
    wishes = ("--input_model", source, "--output_model", tmp_path / "ours", "--target_version", "5.2")
    code, out, _ = run(*wishes, "--dense_layers", "3,0")
    assert code == 0 and "read through a window of 2048" in out
    spec = read_manifest(tmp_path / "ours").spec
    assert [layer.attention.window for layer in spec.layers] == [None, 2048, 2048, None]
    assert dense_by_choice(spec) == (0, 3) and adapt(spec, AttentionSettings(attention_window=1024)).layers[3] == spec.layers[3]


def refusal(done: tuple[int, str, str]) -> str:
    code, out, error = done
    assert code == 2 and out == "" and error.startswith("deepseek-convert: ") and error.count("\n") == 1 and "Traceback" not in error, done
    return error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_model": ""}, "--input_model is missing"),
        ({"target_version": ""}, "--target_version is missing"),
        ({"target_version": "7.7"}, "choose one of 1.0, 2.3"),
        ({"input_model": "nowhere"}, "nowhere does not exist"),
        ({"output_model": "theirs"}, "exists"),
        ({"config": "nothing.yaml"}, "--config nothing.yaml is not a file"),
        ({"config": "theirs/tokenizer.model"}, "must be a .yaml"),
        ({"rope_scaling": "yarn"}, "--max_position_embeddings"),
        ({"max_position_embeddings": "-1"}, "--max_position_embeddings must be"),
        ({"max_position_embeddings": "100"}, "more than 100 tokens are refused; the context was 256. Give --lossy"),
        ({"dense_layers": "0"}, "--dense_layers is for a line whose layers have a window, and every layer of v2.3 reads everything"),
        ({"dense_layers": "a", "target_version": "5.2"}, "--dense_layers must be whole numbers by comma, such as 0,1, or none, not 'a'"),
        ({"dense_layers": "7", "target_version": "5.2"}, "--dense_layers names layer 7"),
        ({"target_version": "2.3", "output_model": "file/out"}, "cannot be read or written"),
    ],
    ids=str,
)
def test_wrong_use(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    build_tiny(Path("theirs"))
    Path("theirs/tokenizer.model").touch()
    Path("file").touch()
    flags = {"input_model": "theirs", "output_model": "out", "target_version": "2.3", **change}
    assert words in refusal(run(*(word for name, value in flags.items() if value for word in (f"--{name}", value))))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "theirs"]


class Exploit:
    """Makes a directory when it is unpickled by a loader that runs code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


def truncated(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def duplicated(directory: Path) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes().replace(b'"model.norm.weight"', b'"model.norm.weightX"').replace(b"model.norm.weightX", b"lm_head.weight   X")
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b"lm_head.weight   X", b"lm_head.weight").ljust(length + 1)
    file.write_bytes((len(header)).to_bytes(8, "little") + header + data[8 + length + 1 :])


def mis_shaped(directory: Path) -> None:
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace('"intermediate_size": 112', '"intermediate_size": 113'))


def filled_with_nan(directory: Path) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-4000] + b"\xff" * 4000)


def pickled_code(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Exploit()}, protocol=2))


def path_traversing(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory.parent / "model.safetensors")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../model.safetensors"}}')


def zip_bomb(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with zipfile.ZipFile(directory / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}." + b" " * (1 << 22))
        archive.writestr("x/version", "3")


BAD = {
    truncated: "its header tells of",
    duplicated: "header is not valid",
    mis_shaped: "and should have [113, 64]",
    filled_with_nan: "not finite",
    pickled_code: "holds more than tensors",
    path_traversing: "not the name of a file beside it",
    zip_bomb: "is compressed",
}


@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_bad_checkpoints(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    monkeypatch.chdir(tmp_path)
    source = build_tiny(tmp_path / "in" / "theirs")
    damage(source)
    assert BAD[damage] in refusal(run("--input_model", source, "--output_model", "out/model", "--target_version", "2.3"))
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


KILLED = """
import os, signal, sys
from service.checkpoints import convert_source
from service.checkpoints.weight_readers import SafetensorsReader
from service.cli import convert
left = int(sys.argv.pop(1))
real_sync, real_chunks = os.fsync, SafetensorsReader.chunks
def count():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def fsync(handle):
    count()
    real_sync(handle)
def chunks(self, name):
    for chunk in real_chunks(self, name):
        count()
        yield chunk
os.fsync, SafetensorsReader.chunks = fsync, chunks
sys.exit(convert.main())
"""


@pytest.mark.parametrize(("moment", "output"), [(1, "out"), (9, "out"), (27, "out"), (20, "out.pt"), (30, "out.pt")])
def test_a_kill_leaves_nothing_half_written(run: Run, tmp_path: Path, moment: int, output: str) -> None:
    """Killed while it writes, at different moments: the name does not exist; the same command afterwards leaves no rest."""
    source = build_tiny(tmp_path / "theirs")
    flags = ["--input_model", str(source), "--output_model", str(tmp_path / output), "--target_version", "2.3"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", KILLED, str(moment), *flags], env=environment, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == [source]
    assert run(*flags)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [output, "theirs"]
