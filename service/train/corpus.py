"""The text that the bundled lines learn from: the running interpreter's own standard library, selected and split the same way every time.

What lives here: which files count, how they become documents, which of them are held out. It does not know tokens, tensors or recipes.
The library differs between Python versions, so a corpus is named by the digest of its manifest and a model card records it. Invariant:
no file's content is in both splits (the split is a function of the content's SHA-256), and chats are made from training files only.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from service.train.chats import Chat, chats_of

_SKIPPED_PARTS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "_bundled", "__phello__"}
)
_SKIPPED_PREFIXES = ("config-", "test_", "_sysconfigdata")
_TABLES = frozenset({"html/entities.py", "stringprep.py", "unittest/test", "lib2to3/tests", "pydoc_data/__init__.py", "tkinter/tix.py"})
_TOPICS = "pydoc_data/topics.py"
_LARGEST_BYTES = 400_000


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the library: its path below the library's root, SHA-256 of its bytes, its text and whether it is held out."""

    name: str
    sha256: str
    text: str
    held_out: bool


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training and held-out texts plus chats made from the training files. `digest` names exactly these files in this split."""

    python: str
    files: tuple[SourceFile, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    chats: tuple[Chat, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the sorted lines `sha256  name  split`, 64 hex digits."""
        return hashlib.sha256(self.manifest.encode()).hexdigest()

    @property
    def manifest(self) -> str:
        """One line a file: SHA-256, name, split; sorted by name."""
        return "".join(f"{file.sha256}  {file.name}  {'held-out' if file.held_out else 'train'}\n" for file in self.files)


def library_root() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_corpus(held_out_permille: int = 40, chat_share: float = 1.0, root: Path | None = None) -> Corpus:
    """Read the library below `root` (the running interpreter's by default) and split it.

    A file is held out when the first eight hex digits of its SHA-256, modulo 1000, are below `held_out_permille`. `chat_share` is the
    fraction of the possible chats that is kept. Same library, same arguments: same corpus, in the same order.
    """
    files = tuple(_read_files(root or library_root(), held_out_permille))
    chats = [chat for file in files if not file.held_out for chat in chats_of(_module_name(file.name), file.text)]
    kept = tuple(chat for chat in chats if _fraction(chat.key) < chat_share)
    return Corpus(
        python=".".join(str(part) for part in sys.version_info[:3]),
        files=files,
        train=tuple(text for file in files if not file.held_out for text in _documents(file)),
        held_out=tuple(text for file in files if file.held_out for text in _documents(file)),
        chats=kept,
    )


def is_selected(name: str) -> bool:
    """Whether the file `name` (posix path below the root) belongs to the corpus: no tests, generated tables or installed packages."""
    path = PurePosixPath(name)
    if path.suffix != ".py" or name in _TABLES:
        return False
    return not any(part in _SKIPPED_PARTS or part.startswith(_SKIPPED_PREFIXES) for part in path.parts)


def _read_files(root: Path, held_out_permille: int) -> Iterator[SourceFile]:
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    seen: set[str] = set()
    for name in names:
        if not is_selected(name):
            continue
        raw = (root / name).read_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        if not raw.strip() or digest in seen or (len(raw) > _LARGEST_BYTES and name != _TOPICS):
            continue
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        seen.add(digest)
        yield SourceFile(name, digest, text.replace("\r\n", "\n"), name != _TOPICS and int(digest[:8], 16) % 1000 < held_out_permille)


def _documents(file: SourceFile) -> list[str]:
    """A source file is one document; the help topics are a dictionary of English texts, one document each."""
    if file.name != _TOPICS:
        return [file.text]
    return [text.strip() + "\n" for text in _topic_texts(file.text)]


def _topic_texts(source: str) -> list[str]:
    for node in ast.parse(source).body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Dict):
            topics = ast.literal_eval(value)
            return [str(topics[key]) for key in sorted(topics)]
    return []


def _module_name(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _fraction(key: str) -> float:
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
