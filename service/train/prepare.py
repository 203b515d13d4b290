"""From a recipe to what a run needs: corpus, tokenizer, token streams and the network's spec.

It does not know optimisers, budgets or output directories. Invariant: the same recipe on the same standard library prepares the same
run, told by `identity`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from service.inputs.bpe import IMAGE, BpeTokenizer
from service.train.corpus import Corpus, read_corpus
from service.train.picture_stream import Pictures, PictureStream
from service.train.pictures import load_pictures
from service.train.recall import recall_documents
from service.train.recipe import Recipe
from service.train.recipe_parts import PicturesPart
from service.train.source import Source
from service.train.stream import TokenStream
from service.types.catalog import VersionLine, find_line
from service.types.errors import SettingsError
from service.types.model_spec import ModelSpec
from service.types.vision import VisionSpec


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """Everything fixed before the first step. `identity`, 64 hex digits, names recipe (less its budget), corpus, tokenizer, teacher and
    `init`, the model that is trained on (None: random weights)."""

    recipe: Recipe
    line: VersionLine
    spec: ModelSpec
    corpus: Corpus
    tokenizer: BpeTokenizer
    train: TokenStream
    held_out: TokenStream
    identity: str
    teacher: Source | None = None
    pictures: Pictures | None = None
    init: Source | None = None


def prepare(recipe: Recipe, root: Path | None = None, teacher: Source | None = None, init: Source | None = None) -> PreparedRun:
    """Read the corpus (below `root`, by default the running interpreter's library), learn the tokenizer, encode everything.

    With a `teacher`, or with an `init` to begin with, the tokenizer is theirs. Raises SettingsError when the recipe names an unknown line
    or shape, or does not fit these.
    """
    _check_teacher(recipe, teacher)
    given = teacher or init
    line = find_line(recipe.line)
    shapes = dict(line.shapes) if line else {}
    if line is None or recipe.shape not in shapes:
        raise SettingsError(f"recipe.line {recipe.line!r} with recipe.shape {recipe.shape!r} is not in the catalog.")
    shape = replace(shapes[recipe.shape], vocab_size=recipe.vocab_size)
    corpus = read_corpus(recipe.corpus.held_out_permille, recipe.corpus.chat_share, root)
    texts = [*corpus.train, *(f"{chat.question}\n{chat.answer}" for chat in corpus.chats)]
    tokenizer = BpeTokenizer.train(texts, recipe.vocab_size) if given is None else given.tokenizer
    pictures = None if recipe.pictures is None else _pictures(recipe.pictures, recipe, shape.vision if line.reads_images else None)
    spec = line.spec(shape, end_ids=(tokenizer.end_id,), image_id=tokenizer.special_id(IMAGE) if shape.vision else None)
    _check_init(recipe, spec, tokenizer, init)
    documents = tokenizer.encode(list(corpus.train)) + [tokenizer.encode_chat(chat.question, chat.answer) for chat in corpus.chats]
    part = recipe.corpus
    lines = (part.recall_fewest_lines, part.recall_lines)
    recall = recall_documents(corpus.train, part.recall_documents, lines, recipe.seed, at_end=part.recall_at_end)
    documents += tokenizer.encode(recall)
    return PreparedRun(
        recipe=recipe,
        line=line,
        spec=spec,
        corpus=corpus,
        tokenizer=tokenizer,
        train=_stream(recipe, documents, tokenizer, pictures),
        held_out=TokenStream(tokenizer.encode(list(corpus.held_out)), tokenizer.end_id, recipe.seed),
        identity=_identity(recipe, corpus, tokenizer, (teacher, init), pictures),
        teacher=teacher,
        pictures=pictures,
        init=init,
    )


def _stream(recipe: Recipe, documents: list[list[int]], tokenizer: BpeTokenizer, pictures: Pictures | None) -> TokenStream:
    if pictures is None:
        return TokenStream(documents, tokenizer.end_id, recipe.seed, aligned=recipe.corpus.aligned)
    stream = PictureStream(documents, tokenizer, recipe.seed, pictures, aligned=recipe.corpus.aligned)
    shortest = pictures.tokens or min(phase.tokens for phase in recipe.schedule.lengths)
    needed = max(stream.tokens_of(pictures.found.ask(Random(0), pictures.found.train, kind)) for kind in pictures.found.kinds)
    if needed >= shortest:
        raise SettingsError(f"A question about pictures takes {needed} tokens and recipe.schedule has sequences of {shortest}.")
    return stream


def _pictures(part: PicturesPart, recipe: Recipe, vision: VisionSpec | None) -> Pictures:
    """The pictures as the model will see them. Raises SettingsError."""
    if vision is None:
        raise SettingsError("recipe.pictures needs a line and a shape that read images.")
    found = load_pictures(part.source, part.held_out_permille, part.variants)
    pixels, grid = found.prepared(vision)
    shares = {phase.tokens: part.share if phase.pictures is None else phase.pictures for phase in recipe.schedule.lengths}
    return Pictures(found, pixels, grid, shares, part.weight, part.tokens)


def _check_teacher(recipe: Recipe, teacher: Source | None) -> None:
    if recipe.distil is None and teacher is not None:
        raise SettingsError(f"The recipe {recipe.name} learns from no teacher: leave --teacher out.")
    if recipe.distil is not None and teacher is None:
        raise SettingsError(f"The recipe {recipe.name} learns from a teacher: name its directory or line with --teacher.")
    if recipe.distil is None or teacher is None:
        return
    spec, longest = teacher.manifest.spec, max(phase.tokens for phase in recipe.schedule.lengths)
    if spec.vocab_size != recipe.vocab_size:
        raise SettingsError(f"The teacher has {spec.vocab_size} tokens and recipe.vocab_size is {recipe.vocab_size}: they must be equal.")
    if spec.context_tokens < longest:
        raise SettingsError(f"The teacher reads {spec.context_tokens} tokens and recipe.schedule has sequences of {longest}.")


def _check_init(recipe: Recipe, spec: ModelSpec, tokenizer: BpeTokenizer, init: Source | None) -> None:
    if init is None:
        if recipe.average.init:
            raise SettingsError(f"The recipe {recipe.name} publishes a mean with what it began with: name that with --init.")
        return
    if init.manifest.spec != spec:
        raise SettingsError(
            f"--init names another network ({init.artifact}) than {recipe.shape} of line {recipe.line}, which the recipe trains."
        )
    if init.tokenizer.files(0) != tokenizer.files(0):
        raise SettingsError("--init and --teacher have different tokenizers: a student that goes on must have been taught by that teacher.")


def _identity(
    recipe: Recipe, corpus: Corpus, tokenizer: BpeTokenizer, sources: tuple[Source | None, ...], pictures: Pictures | None
) -> str:
    learned = recipe.content
    for name in ("name", "checkpoint_minutes", "evaluate", "samples", "publish"):
        del learned[name]
    for name in ("steps", "minutes"):
        del learned["schedule"][name]
    files = tokenizer.files(0)["tokenizer.json"]
    parts = [json.dumps(learned, sort_keys=True), corpus.digest, hashlib.sha256(files).hexdigest()]
    parts += [source.manifest.digest for source in sources if source is not None]
    parts += [] if pictures is None else [pictures.found.digest]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
