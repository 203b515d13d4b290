"""The model card: what the model is, what it learned from and under which licence, how well it does, and what it writes.

It does not know how anything was measured. Invariant: every number in it comes from the run's row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.train.pictures import DIGITS
from service.train.prepare import PreparedRun

ATTRIBUTION = (
    "The text is the standard library of CPython {python}, Copyright © 2001 Python Software Foundation; All Rights Reserved, used under "
    "the [PSF License Agreement](https://docs.python.org/3/license.html); some files carry further notices listed there. No installed "
    "package, no test suite and no generated table is in it."
)

DIGITS_SOURCE = (
    "The pictures are the handwritten digits that scikit-learn brings, from Optical Recognition of Handwritten Digits (Alpaydin and Kaynak "
    "1998, UCI Machine Learning Repository, CC BY 4.0)."
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation shown in the card: what was asked (`chat` or plain text) and what came."""

    prompt: str
    text: str
    temperature: float
    chat: bool


def write_card(run: PreparedRun, row: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    """The card as Markdown. `row` is the run's result row."""
    held_out = sum(file.held_out for file in run.corpus.files)
    lines = [
        f"# {run.recipe.name}",
        "",
        f"A small language model of line {run.line.label} ({run.line.name}: {run.line.essence}). It continues Python. It is this project's "
        "own model, not a release of any company, and far too small to be relied on: it writes text that looks like Python and is usually "
        "wrong.",
        "",
        "## What it is",
        "",
        *_shape_rows(run, row),
        "",
        "## What it learned from",
        "",
        ATTRIBUTION.format(python=run.corpus.python),
        f"{len(run.corpus.files)} files, listed with their SHA-256 and split in `corpus.txt` (digest `{run.corpus.digest}`); {held_out} of "
        f"them are held out, chosen by their digest. {len(run.train):,} tokens to learn from, {len(run.corpus.chats):,} short chats made "
        f"from docstrings among them, and {len(run.held_out):,} held out. Another Python version has another library and gives another "
        "corpus.",
        *_besides(run, row),
        "",
        "## How it was made",
        "",
        f"    deepseek-train --recipe {run.recipe.name}"
        + (" --teacher DIR" if run.teacher is not None else "")
        + (" --init DIR" if run.init is not None else ""),
        "",
        *_training_rows(row),
        "",
        "## What it writes",
        "",
        f"The first {run.recipe.samples.tokens} tokens, not selected.",
        "",
        *[line for sample in samples for line in _sample_lines(sample)],
    ]
    return "\n".join(lines).rstrip() + "\n"


def _besides(run: PreparedRun, row: Mapping[str, Any]) -> list[str]:
    """Sentences about what some models learned besides text, each its own paragraph."""
    said, part, pictures = [], run.recipe.corpus, row.get("pictures")
    if part.recall_documents:
        said.append(
            f"Besides, {part.recall_documents:,} texts that state facts between lines of the text to learn from and ask for them further "
            f"on; they are in the number of tokens above."
        )
    if pictures is not None:
        source = DIGITS_SOURCE if pictures["source"] == DIGITS else f"The pictures of the MedMNIST file `{Path(pictures['source']).name}`."
        said.append(
            f"{source} {pictures['held_out']:,} are held out; with variants (turned, scaled, moved) there are {pictures['learned']:,} "
            "to learn from."
        )
    return [line for sentence in said for line in ("", sentence)]


def _shape_rows(run: PreparedRun, row: Mapping[str, Any]) -> list[str]:
    layer = run.spec.layers[0]
    return [
        "| | |",
        "|---|---|",
        f"| parameters | {row['parameters']:,}, stored as {run.recipe.publish.dtype} |",
        f"| layers, width | {len(run.spec.layers)}, {run.spec.dim} |",
        f"| attention | {layer.attention.heads} heads, {layer.attention.kv_heads} for keys and values, gated, q/k norm |",
        f"| feed-forward | SwiGLU, {layer.mlp.hidden} |",
        f"| vocabulary | {run.spec.vocab_size} byte-level BPE tokens, embeddings tied |",
        f"| context | {run.spec.context_tokens} tokens |",
        "| licence | Apache-2.0 for the weights as for the project; the text's licence is below |",
    ]


def _training_rows(row: Mapping[str, Any]) -> list[str]:
    full = row["full_context"]
    return [
        "| | |",
        "|---|---|",
        f"| budget | {row['steps']:,} steps, {row['tokens']:,} tokens ({row['epochs']:.2f} times the text), {row['minutes']:.1f} minutes |",
        f"| machine | {row['cpu']}, {row['threads']} threads, {row['device']}, {row['dtype']}, {row['tokens_per_s']:,.0f} tokens/s |",
        f"| sequences | up to {row['longest']:,} tokens |",
        f"| recipe, corpus | `{row['recipe_digest'][:12]}`, `{row['corpus_digest'][:12]}` |",
        f"| software | Python {row['python']}, torch {row['torch']} |",
        f"| held out, {row['length']} tokens at a time | {row['nats_per_token']:.4f} nats/token, {row['bits_per_byte']:.4f} bits/byte |",
        f"| measured on | the first {row['held_out_tokens']:,} held-out tokens, weights as stored |",
        f"| held out, {full['length']} tokens at a time | {full['nats_per_token']:.4f} nats/token, {full['bits_per_byte']:.4f} bits/byte |",
        f"| weights | {row['weights']}: {row['choice']} |",
        *_extra_rows(row),
    ]


def _extra_rows(row: Mapping[str, Any]) -> list[str]:
    """Rows of what only some runs have."""
    lines = []
    if "pictures" in row:
        shares = ", ".join(f"{kind} {share:.3f}" for kind, share in row["pictures"]["right"].items())
        lines.append(f"| questions about held-out pictures | share answered right, {row['pictures']['questions']} of each kind: {shares} |")
    if "init" in row:
        lines.append(f"| began with | {row['init']}: the budget above is what came after |")
    if "init_share" in row:
        lines.append(f"| mean with that | the weights above, and the share {row['init_share']:g} of what the run began with |")
    if "teacher" in row:
        lines.append(f"| learned from | {row['teacher']['artifact']}, {row['teacher']['parameters']:,} parameters |")
    if "int8" in row:
        part = row["int8"]
        lines.append(
            f"| int8 | the losses here are with int8 weights and activations; the same weights without: "
            f"{part['unquantised_nats_per_token']:.4f} nats/token ({part['loss_ratio']:.4f} times that) |"
        )
    return lines


def _sample_lines(sample: Sample) -> list[str]:
    fence = "````"
    what = "Chat" if sample.chat else "Text"
    text = f"user: {sample.prompt}\nassistant: {sample.text}" if sample.chat else sample.prompt + "⏵" + sample.text
    mark = "" if sample.chat else " (⏵ marks where the model takes over)"
    return [f"{what}, temperature {sample.temperature:g}{mark}:", "", fence + "text", text.rstrip(), fence, ""]
