"""A small standard library, a small recipe and what is prepared from them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from service.train.prepare import PreparedRun, prepare
from service.train.recipe import Recipe, load_recipe, parse_recipe
from service.types.catalog import V2_3, Shape

TINY = Shape(vocab_size=420, dim=32, layers=2, heads=2, kv_heads=1, mlp_hidden=48, context_tokens=64)

MODULE = '''"""Module number {n}: counts things.

More about it.
"""


class Counter{n}:
    """Counts up from {n}."""

    def count(self, step=1):
        """Return the next number. It grows."""
        self.value += step
        return self.value


def double_{n}(number):
    """Return twice the number."""
    return number * 2


def _hidden(number):
    """Not told."""
    return [index for index in range(number) if index % {n} == 0]
'''


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four modules and everything that must not be read."""
    root = tmp_path_factory.mktemp("library")
    for number in range(1, 25):
        (root / f"module_{number}.py").write_text(MODULE.format(n=number))
    for name in ("test/big.py", "package/tests/case.py", "encodings/table.py", "site-packages/other.py", "test_alone.py", "data.txt"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("FORBIDDEN = 1\n")
    (root / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1"))
    (root / "copy_of_one.py").write_text(MODULE.format(n=1))
    (root / "pydoc_data").mkdir()
    (root / "pydoc_data" / "topics.py").write_text("topics = {'with': 'The with statement\\n***\\n', 'if': 'The if statement\\n***\\n'}\n")
    return root


@pytest.fixture(scope="session")
def content() -> dict[str, Any]:
    """The committed recipe made small, as the mapping that its file holds."""
    text = (Path(load_recipe.__code__.co_filename).parent / "recipes" / "nano-v2.3.yaml").read_text()
    small: dict[str, Any] = yaml.safe_load(text)
    small |= {"name": "tiny", "vocab_size": TINY.vocab_size, "compile": False, "dtype": "float32"}
    small["corpus"] = {"held_out_permille": 250, "chat_share": 0.5}
    small["schedule"] |= {
        "steps": 20,
        "minutes": 0,
        "batch_tokens": 256,
        "micro_tokens": 128,
        "warmup_steps": 3,
        "lengths": [{"until": 0.7, "tokens": 32}, {"until": 1.0, "tokens": 64}],
    }
    small["average"] = {"start": 0.5, "decay": 0.8}
    small["evaluate"] = {"times": 2, "tokens": 256, "final_tokens": 0}
    small["samples"] |= {"tokens": 8}
    return small


@pytest.fixture(scope="session")
def recipe_with(content: dict[str, Any]) -> Callable[..., Recipe]:
    """A small recipe with some values replaced: `recipe_with(seed=1, schedule={"steps": 5})`."""

    def make(**changes: Any) -> Recipe:
        changed = deepcopy(content)
        for name, value in changes.items():
            changed[name] = changed.get(name, {}) | value if isinstance(value, dict) else value
        return parse_recipe(yaml.safe_dump(changed))

    return make


@pytest.fixture(scope="session")
def prepared(library: Path, recipe_with: Callable[..., Recipe]) -> PreparedRun:
    """The small recipe's run on the small library, with a network of a few thousand parameters."""
    run = prepare(recipe_with(), library)
    shape = replace(TINY, vocab_size=run.tokenizer.vocab_size)
    return replace(run, spec=V2_3.spec(shape, (run.tokenizer.end_id,)))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors: threads only cost."""
    torch.set_num_threads(1)
