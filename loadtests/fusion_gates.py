"""Look at the gates of a model that reads images: how much each head takes from the text and from the pictures, while it is asked.

`python -m loadtests.fusion_gates --model DIR` prints a table, means over held-out questions. It computes in this process and serves
nothing. Invariant: gates are read from the forward pass that answers, and right answers are counted beside them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch

from service.checkpoints.load import load
from service.checkpoints.manifest import read_manifest
from service.inputs.bpe import BpeTokenizer
from service.models.attention import DenseAttend
from service.models.decoder import Decoder
from service.train.objective import Batch, NextToken
from service.train.picture_stream import IGNORED, Pictured, Pictures, PictureStream
from service.train.pictures import DIGITS, load_pictures
from service.types.errors import StartupError

LENGTH = 64


def read_model(directory: Path) -> tuple[Decoder, BpeTokenizer]:
    """A model and its tokenizer. Raises StartupError unless it reads images."""
    decoder = load(read_manifest(directory), "cpu", torch.float32, serving=False)
    if decoder.fusion is None:
        raise StartupError(f"{directory} does not read images, so it has no such gates.")
    return decoder, BpeTokenizer.load(directory)


@torch.inference_mode()
def look(decoder: Decoder, stream: PictureStream, pictures: Pictures, kind: str, number: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean gates of text and images by head where answers begin, each [heads], and the share of answers whose first token is right."""
    draw, objective = Random(0), Pictured(pictures, torch.device("cpu"), NextToken())
    text, image, right = [], [], 0
    for _ in range(number):
        question = pictures.found.ask(draw, pictures.found.held_out, kind)
        inputs, targets = (torch.from_numpy(array) for array in stream.example(question, LENGTH))
        context = objective.context(decoder, Batch(inputs, targets, LENGTH))
        if context is None:
            continue
        context = context._replace(gates=[])
        at = int((targets != IGNORED).nonzero()[0, 0])
        tokens = inputs.where(inputs >= 0, decoder.spec.image_id or 0)
        logits = decoder(tokens, torch.arange(LENGTH), DenseAttend(1, LENGTH, decoder.spec.layers), torch.tensor([at]), images=context)
        row = int((context.rows == at).nonzero()[0, 0])
        for kept, gates in zip((text, image), (context.gates or [])[0], strict=True):
            kept.append(gates[row])
        right += int(logits[0].argmax()) == int(targets[at])
    return torch.stack(text).mean(0), torch.stack(image).mean(0), right / number


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint directory of a line that reads images")
    parser.add_argument("--source", default=DIGITS, help="digits, or the path of a MedMNIST .npz")
    parser.add_argument("--questions", type=int, default=100, help="of each kind")
    given = parser.parse_args(arguments)
    decoder, tokenizer = read_model(given.model)
    found = load_pictures(given.source, 200)
    pixels, grid = found.prepared(decoder.vision.spec)
    pictures = Pictures(found, pixels, grid, 1.0, 1.0)
    stream = PictureStream([[tokenizer.end_id] * LENGTH], tokenizer, 0, pictures)
    for kind in found.kinds:
        text, image, right = look(decoder, stream, pictures, kind, given.questions)
        shown = ["  ".join(f"{value:.2f}" for value in gates.tolist()) for gates in (text, image)]
        print(f"{kind:8} right {right:.2f}   text {shown[0]}   images {shown[1]}")


if __name__ == "__main__":
    main()
