"""The Python API: a bundled model is loaded, called, trained on and saved; others are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from service.checkpoints.load import load
from service.checkpoints.manifest import read_manifest
from service.models.attention import DenseAttend
from service.train.pretrained import DeepSeekV10, DeepSeekV23
from service.types.errors import CheckpointError


def test_a_bundled_model_learns_and_is_saved(tmp_path: Path) -> None:
    model = DeepSeekV23.from_pretrained("deepseek/v2.3")
    model.gradient_checkpointing_enable()
    rows = torch.randint(16, 4000, (2, 25), generator=torch.Generator().manual_seed(1))
    tokens, targets = rows[:, :-1], rows[:, 1:]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        output = model(tokens, targets)
        assert output.loss is not None and output.logits.shape == (2, 24, model.spec.vocab_size)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    manifest = model.save_pretrained(tmp_path / "mine", dtype="float32")
    again = DeepSeekV23.from_pretrained(tmp_path / "mine")
    assert torch.equal(again(tokens).logits, model(tokens).logits) and again(tokens).loss is None
    assert manifest.digest == read_manifest(tmp_path / "mine").digest and (tmp_path / "mine" / "tokenizer.json").is_file()


def test_logits_are_those_of_the_checkpoint() -> None:
    model = DeepSeekV23.from_pretrained("deepseek/v2.3")
    tokens = torch.arange(100, 120)
    decoder = load(read_manifest(Path(__file__).parents[2] / "service" / "bundled" / "nano-v2.3"), "cpu", torch.float32, serving=False)
    expected = decoder(tokens, torch.arange(20), DenseAttend(1, 20, decoder.spec.layers))
    assert torch.equal(model(tokens[None]).logits[0], expected)


def test_ignored_targets_do_not_count() -> None:
    model = DeepSeekV23.from_pretrained("deepseek/v2.3")
    tokens = torch.arange(100, 110)[None]
    targets = torch.full((1, 10), -100)
    targets[0, 4] = 7
    output = model(tokens, targets)
    assert output.loss is not None
    torch.testing.assert_close(output.loss, -output.logits[0, 4].log_softmax(-1)[7])


@pytest.mark.parametrize(
    ("source", "message"), [("deepseek/v9.9", "not bundled"), ("deepseek/v2.3", "DeepSeekV10 loads line v1.0"), ("/nowhere", "nowhere")]
)
def test_what_is_not_of_the_line_is_refused(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        DeepSeekV10.from_pretrained(source)
