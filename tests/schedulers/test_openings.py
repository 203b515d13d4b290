"""What the worker is told of sequences that enter a row."""

from __future__ import annotations

from service.schedulers.openings import has_image_room, openings
from service.schedulers.sequence import Sequence, Share
from service.schedulers.streams import Stream
from service.telemetry import Telemetry
from service.types.request import GenerationRequest, ImageInput, Stop
from tests.fakes import ByteDecoder


def sequence_with(*images: ImageInput) -> Sequence:
    request = GenerationRequest("r", "v", tuple(range(20)), Stop(5), images=images, prompt_logprobs=2)
    latencies = Telemetry().version("v", "cpu", "cpu").latencies("")
    return Sequence(request, 0, Share("", 0), Stream("r", ByteDecoder(), (), 8), latencies)


def test_pixels_travel_once_in_a_plan() -> None:
    one, two = ImageInput(0, 1, 2, "one", b"pixels"), ImageInput(3, 1, 1, "two", b"others")
    first, second = openings([sequence_with(one, two), sequence_with(two, ImageInput(9, 1, 2, "one", b"pixels"))])
    assert [image.pixels for image in first.images] == [b"pixels", b"others"]
    assert [(image.start, image.digest, image.pixels) for image in second.images] == [(3, "two", b""), (9, "one", b"")]
    assert openings([sequence_with(one)])[0].images == (one,)


def test_everything_known_is_told() -> None:
    sequence = sequence_with()
    sequence.tokens += [7, 8]
    sequence.row = 3
    (opening,) = openings([sequence])
    assert (opening.row, opening.tokens, opening.prompt_tokens) == (3, (*range(20), 7, 8), 20)
    assert (opening.stop, opening.sampling, opening.prompt_logprobs) == (sequence.request.stop, sequence.request.sampling, 2)


def test_images_wait_for_room_unless_nothing_runs() -> None:
    two, three = sequence_with(ImageInput(0, 1, 2, "a", b"")), sequence_with(ImageInput(0, 1, 3, "b", b""))
    assert has_image_room(three, [two], 5) and not has_image_room(three, [two], 4)
    assert has_image_room(three, [], 1) and has_image_room(three, [sequence_with()], 3)
