"""The corpus: what is in it, that it is the same every time, and that nothing held out is learned."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from service.train.corpus import is_selected, library_root, read_corpus


def test_same_library_same_corpus(library: Path) -> None:
    first, second = read_corpus(250, 0.5, library), read_corpus(250, 0.5, library)
    assert first == second and first.digest == second.digest
    assert len(first.digest) == 64


def test_another_split_has_another_digest(library: Path) -> None:
    assert read_corpus(250, 0.5, library).digest != read_corpus(100, 0.5, library).digest


def test_splits_share_nothing_and_are_decided_by_the_content(library: Path) -> None:
    corpus = read_corpus(250, 1.0, library)
    train = {file.sha256 for file in corpus.files if not file.held_out}
    held_out = {file.sha256 for file in corpus.files if file.held_out}
    assert train and held_out and not train & held_out
    assert not set(corpus.train) & set(corpus.held_out)
    for file in corpus.files:
        assert file.sha256 == hashlib.sha256((library / file.name).read_bytes()).hexdigest()
        assert file.held_out == (file.name != "pydoc_data/topics.py" and int(file.sha256[:8], 16) % 1000 < 250)


def test_chats_come_from_training_files_only(library: Path) -> None:
    corpus = read_corpus(250, 1.0, library)
    held_out = {file.name.removesuffix(".py") for file in corpus.files if file.held_out}
    modules = {chat.key.split(":")[1].split(".")[0] for chat in corpus.chats}
    assert modules and not modules & held_out


def test_share_of_chats(library: Path) -> None:
    every, half, none = (read_corpus(250, share, library).chats for share in (1.0, 0.5, 0.0))
    assert not none and 0 < len(half) < len(every) and set(half) < set(every)


def test_left_out(library: Path) -> None:
    corpus = read_corpus(250, 1.0, library)
    names = {file.name for file in corpus.files}
    assert names == {f"module_{number}.py" for number in range(2, 25)} | {"copy_of_one.py", "pydoc_data/topics.py"}
    assert not any("FORBIDDEN" in text for text in (*corpus.train, *corpus.held_out))


def test_help_topics_are_texts(library: Path) -> None:
    corpus = read_corpus(250, 1.0, library)
    assert "The with statement\n***\n" in corpus.train and "The if statement\n***\n" in corpus.train


@pytest.mark.parametrize(
    ("name", "selected"),
    [
        ("os.py", True),
        ("json/decoder.py", True),
        ("unittest/case.py", True),
        ("unittest/test/test_case.py", False),
        ("lib2to3/tests/data/crlf.py", False),
        ("idlelib/idle_test/mock_tk.py", False),
        ("encodings/cp437.py", False),
        ("html/entities.py", False),
        ("site-packages/torch/__init__.py", False),
        ("config-3.11-x86_64-linux-gnu/python-config.py", False),
        ("LICENSE.txt", False),
    ],
)
def test_selection(name: str, selected: bool) -> None:
    assert is_selected(name) is selected


def test_the_running_library_is_there() -> None:
    assert (library_root() / "os.py").is_file()
