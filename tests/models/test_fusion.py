"""Image tokens in place and the gated fusion, through the whole decoder."""

from __future__ import annotations

import pytest
import torch

from service.models.attention import DenseAttend
from service.models.build import build, init_weights
from service.models.decoder import Decoder
from service.models.fusion import ImageContext, SeenImages
from service.types.catalog import V3_5, Shape
from service.types.vision import VisionSpec

EYES = VisionSpec(patch=2, merge=2, dim=8, layers=1, heads=2, mlp_hidden=12, least_tokens=1, most_tokens=16, side_tokens=4)
SHAPE = Shape(vocab_size=61, dim=24, layers=4, heads=6, kv_heads=2, mlp_hidden=40, context_tokens=64, head_dim=8, vision=EYES)
LENGTH, FIRST, IMAGES = 12, 3, 4


@pytest.fixture
def decoder() -> Decoder:
    made = build(V3_5.spec(SHAPE, image_id=7), "cpu", torch.float32)
    init_weights(made, 1)
    return made


def tokens_of(seed: int, count: int = IMAGES) -> torch.Tensor:
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(seed))


def context_of(decoder: Decoder, images: torch.Tensor, first: int = FIRST, begin: int = 0, *, watch: bool = False) -> ImageContext:
    """One sequence in the rows from `begin` on whose images stand from position `first` on."""
    seen = torch.arange(first, LENGTH)
    counts = (seen - first + 1).clamp(max=len(images))
    keys, values = decoder.fusion.keys_values(images)
    at = begin + first + torch.arange(len(images))
    return ImageContext(at, images, begin + seen, (SeenImages(len(seen), keys, values, counts),), [] if watch else None)


def logits_of(decoder: Decoder, context: ImageContext | None, batch: int = 1) -> torch.Tensor:
    tokens, positions = torch.arange(LENGTH).repeat(batch), torch.arange(LENGTH).repeat(batch)
    return decoder(tokens, positions, DenseAttend(batch, LENGTH, decoder.spec.layers), images=context)


@torch.no_grad()
def test_an_image_changes_what_follows_and_nothing_before(decoder: Decoder) -> None:
    plain, first = logits_of(decoder, None), logits_of(decoder, context_of(decoder, tokens_of(1)))
    second = logits_of(decoder, context_of(decoder, tokens_of(2)))
    assert torch.equal(plain[:FIRST], first[:FIRST])
    assert (first[FIRST:] - second[FIRST:]).abs().amin() > 0
    late = tokens_of(1)
    late[2] += 1
    assert torch.equal(logits_of(decoder, context_of(decoder, late))[: FIRST + 2], first[: FIRST + 2])


@torch.no_grad()
def test_sequences_without_images_pass_bit_for_bit(decoder: Decoder) -> None:
    both = logits_of(decoder, context_of(decoder, tokens_of(1), begin=LENGTH), 2)
    assert torch.equal(both[:LENGTH], logits_of(decoder, None, 2)[:LENGTH])
    torch.testing.assert_close(both[LENGTH:], logits_of(decoder, context_of(decoder, tokens_of(1))))


@torch.no_grad()
def test_two_sequences_with_images_do_not_see_each_other(decoder: Decoder) -> None:
    one, two = context_of(decoder, tokens_of(1)), context_of(decoder, tokens_of(2, 2), first=5, begin=LENGTH)
    joined = ImageContext(*(torch.cat(pair) for pair in zip(one[:3], two[:3], strict=True)), (*one.seen, *two.seen))
    both = logits_of(decoder, joined, 2)
    torch.testing.assert_close(both[:LENGTH], logits_of(decoder, one))
    torch.testing.assert_close(both[LENGTH:], logits_of(decoder, context_of(decoder, tokens_of(2, 2), first=5)))


@torch.no_grad()
def test_the_gates_weigh_the_modalities_and_can_be_watched(decoder: Decoder) -> None:
    context = context_of(decoder, tokens_of(1), watch=True)
    open_both = logits_of(decoder, context)
    ((text, image),) = context.gates
    assert text.shape == image.shape == (LENGTH - FIRST, 6)
    assert 0 < text.min() < text.max() < 1 and not torch.equal(text, image)
    results = {"both": open_both}
    for name, shut in (("text shut", slice(0, 6)), ("images shut", slice(6, 12))):
        with torch.no_grad():
            before = decoder.fusion.gates.bias.clone()
            decoder.fusion.gates.bias[shut] = -40.0
            results[name] = logits_of(decoder, context_of(decoder, tokens_of(1)))
            decoder.fusion.gates.bias.copy_(before)
    differences = [(results[a] - results[b])[FIRST:].abs().max() for a, b in (("both", "text shut"), ("both", "images shut"))]
    assert min(differences) > 1e-4


@torch.no_grad()
def test_with_the_image_gate_shut_only_the_places_of_the_image_tell_it(decoder: Decoder) -> None:
    """The cross-modal path alone: the same embeddings in place, other keys and values."""
    one, other = context_of(decoder, tokens_of(1)), context_of(decoder, tokens_of(2))
    swapped = ImageContext(one.at, one.embeddings, one.rows, other.seen)
    assert (logits_of(decoder, one) - logits_of(decoder, swapped))[FIRST:].abs().max() > 1e-5
    decoder.fusion.gates.bias[6:] = -200.0
    assert torch.equal(logits_of(decoder, one), logits_of(decoder, swapped))


def test_training_under_autocast_is_near_float32(decoder: Decoder) -> None:
    pixels = torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def loss() -> torch.Tensor:
        images = decoder.vision(pixels, EYES.grid(8, 8))[0]
        logits = logits_of(decoder, context_of(decoder, images))
        return torch.nn.functional.cross_entropy(logits[:-1].float(), torch.arange(1, LENGTH))

    exact = loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loss()
    rounded.backward()
    assert 0 < abs(rounded.item() - exact.item()) < 0.05
    assert all(value.grad is not None and value.grad.isfinite().all() for value in decoder.parameters())


def test_a_training_step_moves_every_parameter(decoder: Decoder) -> None:
    pixels = torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8)
    images = decoder.vision(pixels, EYES.grid(8, 8))[0]
    loss = torch.nn.functional.cross_entropy(logits_of(decoder, context_of(decoder, images))[:-1], torch.arange(1, LENGTH))
    loss.backward()
    still = [name for name, value in decoder.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    assert still == []
