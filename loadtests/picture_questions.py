"""Ask a server about held-out pictures over HTTP, with and without the picture and the question, and count the right answers.

`python -m loadtests.picture_questions --url http://127.0.0.1:8000 --model v3.5 --keep` keeps a row in results/picture_questions.jsonl.
Pictures travel as PNG data URLs, answers are greedy. It does not know models. Invariant: only pictures that the recipe
holds out are asked about, and every right answer is an exact one.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import httpx
from PIL import Image

from loadtests.rows import keep, surroundings
from service.train.pictures import DIGITS, PictureSet, Question, load_pictures

ABLATIONS = ("both", "no picture", "no question")
TOGETHER = 16


def data_url(pictures: PictureSet, index: int) -> str:
    """One picture as a PNG data URL."""
    stream = io.BytesIO()
    Image.fromarray(pictures.pixels[index]).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def content(pictures: PictureSet, question: Question, ablation: str) -> list[dict[str, Any]]:
    """The parts of the message: pictures, then the question, less what the ablation removes."""
    shown = [{"type": "image_url", "image_url": {"url": data_url(pictures, index)}} for index in question.pictures]
    asked = [{"type": "text", "text": question.text}]
    return {"both": shown + asked, "no picture": asked, "no question": shown}[ablation]


async def ask(client: httpx.AsyncClient, model: str | None, parts: list[dict[str, Any]]) -> str:
    """The greedy answer, stripped."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, "temperature": 0}
    response = await client.post("/v1/chat/completions", json=body | ({"model": model} if model else {}))
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"]).strip()


async def measure(url: str, model: str | None, pictures: PictureSet, number: int) -> dict[str, Any]:
    """Accuracy by ablation and kind, and what the best constant answer to each kind would reach."""
    draw = Random(0)
    questions = [pictures.ask(draw, pictures.held_out, kind) for kind in pictures.kinds for _ in range(number)]
    turns, found = asyncio.Semaphore(TOGETHER), {}
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def right(question: Question, ablation: str) -> bool:
            async with turns:
                return await ask(client, model, content(pictures, question, ablation)) == question.answer

        for ablation in ABLATIONS:
            hits = await asyncio.gather(*(right(question, ablation) for question in questions))
            by_kind = {kind: share([hit for hit, one in zip(hits, questions, strict=True) if one.kind == kind]) for kind in pictures.kinds}
            found[ablation] = {"all": share(hits), **by_kind}
    return {"questions": len(questions), "accuracy": found, "constant": {kind: constant(questions, kind) for kind in pictures.kinds}}


def share(hits: Sequence[bool]) -> float:
    """The part of the answers that is right."""
    return round(sum(hits) / len(hits), 4)


def constant(questions: Sequence[Question], kind: str) -> float:
    """What always giving the most frequent answer reaches."""
    answers = Counter(question.answer for question in questions if question.kind == kind)
    return round(answers.most_common(1)[0][1] / answers.total(), 4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and keep a row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", required=True, help="the server's address")
    parser.add_argument("--model", default=None, help="the served name; the default version when left out")
    parser.add_argument("--source", default=DIGITS, help="digits, or the path of a MedMNIST .npz")
    parser.add_argument("--held_out_permille", type=int, default=200, help="as in the recipe")
    parser.add_argument("--questions", type=int, default=250, help="of each kind")
    parser.add_argument("--keep", action="store_true", help="append the row to the results")
    given = parser.parse_args(arguments)
    pictures = load_pictures(given.source, given.held_out_permille)
    row = {"kind": "picture_questions", **surroundings(), "model": given.model, "source": given.source}
    row |= asyncio.run(measure(given.url, given.model, pictures, given.questions))
    if given.keep:
        keep("picture_questions", row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
