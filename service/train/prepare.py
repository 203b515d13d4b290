"""From a recipe to what a run needs: corpus, tokenizer, token streams and the network's spec.

It does not know optimisers, budgets or output directories. Invariant: the same recipe on the same standard library prepares the same
run, told by `identity`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from service.inputs.bpe import BpeTokenizer
from service.train.corpus import Corpus, read_corpus
from service.train.recipe import Recipe
from service.train.stream import TokenStream
from service.types.catalog import VersionLine, find_line
from service.types.errors import SettingsError
from service.types.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """Everything fixed before the first step. `identity` names recipe (without its budget), corpus and tokenizer: 64 hex digits."""

    recipe: Recipe
    line: VersionLine
    spec: ModelSpec
    corpus: Corpus
    tokenizer: BpeTokenizer
    train: TokenStream
    held_out: TokenStream
    identity: str


def prepare(recipe: Recipe, root: Path | None = None) -> PreparedRun:
    """Read the corpus (below `root`, by default the running interpreter's library), learn the tokenizer, encode everything.

    Raises SettingsError when the recipe names an unknown line or shape.
    """
    line = find_line(recipe.line)
    shapes = dict(line.shapes) if line else {}
    if line is None or recipe.shape not in shapes:
        raise SettingsError(f"recipe.line {recipe.line!r} with recipe.shape {recipe.shape!r} is not in the catalog.")
    shape = replace(shapes[recipe.shape], vocab_size=recipe.vocab_size)
    corpus = read_corpus(recipe.corpus.held_out_permille, recipe.corpus.chat_share, root)
    tokenizer = BpeTokenizer.train([*corpus.train, *(f"{chat.question}\n{chat.answer}" for chat in corpus.chats)], recipe.vocab_size)
    documents = tokenizer.encode(list(corpus.train)) + [tokenizer.encode_chat(chat.question, chat.answer) for chat in corpus.chats]
    return PreparedRun(
        recipe=recipe,
        line=line,
        spec=line.spec(shape, end_ids=(tokenizer.end_id,)),
        corpus=corpus,
        tokenizer=tokenizer,
        train=TokenStream(documents, tokenizer.end_id, recipe.seed),
        held_out=TokenStream(tokenizer.encode(list(corpus.held_out)), tokenizer.end_id, recipe.seed),
        identity=_identity(recipe, corpus, tokenizer),
    )


def _identity(recipe: Recipe, corpus: Corpus, tokenizer: BpeTokenizer) -> str:
    learned = asdict(recipe)
    for name in ("name", "checkpoint_minutes", "evaluate", "samples", "publish"):
        del learned[name]
    for name in ("steps", "minutes"):
        del learned["schedule"][name]
    files = tokenizer.files(0)["tokenizer.json"]
    parts = (json.dumps(learned, sort_keys=True), corpus.digest, hashlib.sha256(files).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
