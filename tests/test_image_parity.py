"""Images through router, loop and engine against one dense forward of the same checkpoint over whole sequences.

The same prompt log-probs and greedy tokens alone, among others, for every chunk size, with prefix hits, after preemption, after the worker
was lost, and when the worker can keep few encoded images at once.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from service.api.app import build_app
from service.api.server import bind, build_server
from service.checkpoints.convert import Wanted, convert
from service.checkpoints.load import load
from service.checkpoints.manifest import read_manifest
from service.engine.supervisor import WorkerBackend
from service.inputs.tokens import TokenCodec
from service.models.attention import DenseAttend
from service.models.decoder import Decoder
from service.models.fusion import ImageContext, SeenImages
from service.schedulers.router import Model, Router
from service.telemetry import Telemetry
from service.types.catalog import V5_2
from service.types.errors import InvalidRequest, QueueFull
from service.types.plan import Backend, LoadRequest
from service.types.request import FinishEvent, FinishReason, GenerationRequest, ImageInput, PromptEvent, Sampling, Stop, TokenEvent
from service.types.settings import EngineSettings, HttpSettings, SchedulerSettings
from service.types.vision import Grid
from tests.api.conftest import stop_now
from tests.inline_backend import InlineBackend
from tests.tiny_models import IMAGE_ID, build_tiny_line

TOLERANCE = 1e-4
GENERATED = 12
Make = Callable[..., Any]


def image_at(start: int, rows: int, columns: int, seed: int) -> ImageInput:
    pixels = np.random.default_rng(seed).integers(0, 256, rows * columns * 16 * 3, np.uint8).tobytes()
    return ImageInput(start, rows, columns, f"{seed}:{rows}x{columns}", pixels)


def prompt_of(*parts: int | ImageInput) -> tuple[tuple[int, ...], tuple[ImageInput, ...]]:
    """Texts of that many tokens and images, one after the other."""
    ids: list[int] = []
    images: list[ImageInput] = []
    for part in parts:
        if isinstance(part, ImageInput):
            images.append(replace(part, start=len(ids)))
            ids += [IMAGE_ID] * part.tokens
        else:
            ids += np.random.default_rng(len(ids)).integers(0, 256, part).tolist()
    return tuple(ids), tuple(images)


def request_for(
    prompt: tuple[int, ...], images: tuple[ImageInput, ...] = (), *, tokens: int = GENERATED, **changes: Any
) -> GenerationRequest:
    return GenerationRequest("r", "tiny", prompt, Stop(tokens, ignore_eos=True), Sampling(temperature=0), images=images, **changes)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return build_tiny_line(tmp_path_factory.mktemp("line") / "tiny")


@pytest.fixture(scope="module", params=["torch", "onnx"])
def inline(request: pytest.FixtureRequest, directory: Path) -> Make:
    """A function that makes a backend of the tiny model: the torch engine, or the graphs exported from it."""
    if request.param == "torch":
        return lambda **changes: InlineBackend(directory, **changes)
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from service.checkpoints.onnx_export import export
    from tests.inline_graph import InlineGraph

    graph = directory.parent / "graph.onnx"
    export(read_manifest(directory), graph, "none")
    return lambda **changes: InlineGraph(directory, graph, **changes)


@pytest.fixture(scope="module")
def decoder(directory: Path) -> Decoder:
    return load(read_manifest(directory), "cpu", torch.float32, serving=False)


@torch.inference_mode()
def dense_logits(decoder: Decoder, ids: Sequence[int], images: Sequence[ImageInput]) -> np.ndarray:
    """[T, vocab] by the definition: every image token in place, each position seeing the image tokens up to itself."""
    context = None
    if images:
        unit = decoder.spec.vision.unit
        found = [
            decoder.vision(
                torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8).view(1, image.rows * unit, image.columns * unit, 3),
                Grid(image.rows, image.columns),
            )[0]
            for image in images
        ]
        at = torch.cat([torch.arange(image.start, image.end) for image in images])
        rows = torch.arange(images[0].start, len(ids))
        counts = (at[None, :] <= rows[:, None]).sum(1)
        context = ImageContext(at, torch.cat(found), rows, [SeenImages(len(rows), *decoder.fusion.keys_values(torch.cat(found)), counts)])
    attend = DenseAttend(1, len(ids), decoder.spec.layers)
    return decoder(torch.tensor(ids), torch.arange(len(ids)), attend, images=context).numpy()


def expected(decoder: Decoder, prompt: tuple[int, ...], images: tuple[ImageInput, ...], tokens: int = GENERATED) -> tuple[int, ...]:
    """The greedy continuation as far as it is decided by more than twice the tolerance."""
    ids = list(prompt)
    for _ in range(tokens):
        last = np.sort(dense_logits(decoder, ids, images)[-1])
        if last[-1] - last[-2] <= 2 * TOLERANCE:
            break
        ids.append(int(dense_logits(decoder, ids, images)[-1].argmax()))
    assert len(ids) - len(prompt) >= 6, "the reference must decide some tokens clearly"
    return tuple(ids[len(prompt) :])


async def start(backend: Backend, directory: Path, telemetry: Telemetry | None = None, **settings: Any) -> Router:
    model = Model("tiny", read_manifest(directory), TokenCodec.load(directory), backend)
    router = Router([model], SchedulerSettings(**{"batch_size": 16, **settings}), telemetry or Telemetry())
    await router.start()
    return router


async def collect(stream: Any) -> tuple[tuple[int, ...], list[float], FinishEvent]:
    tokens: list[int] = []
    logprobs: list[float] = []
    async for event in stream:
        match event:
            case PromptEvent():
                logprobs += [entry.logprob for entry in event.logprobs]
            case TokenEvent():
                tokens += event.tokens
            case FinishEvent():
                return tuple(tokens), logprobs, event
    raise AssertionError("a stream ended without its terminal event")


async def answer(router: Router, *requests: GenerationRequest) -> list[tuple[int, ...]]:
    streams = [router.submit([request])[0] for request in requests]
    found = [await collect(stream) for stream in streams]
    assert all(finish.reason is FinishReason.LENGTH for _, _, finish in found), found
    return [tokens for tokens, _, _ in found]


CASES = {
    "one": prompt_of(5, image_at(0, 2, 3, 1), 7),
    "first": prompt_of(image_at(0, 3, 3, 2), 4),
    "two sizes": prompt_of(3, image_at(0, 1, 2, 3), 6, image_at(0, 3, 2, 4), 9),
    "beside each other, over a block": prompt_of(58, image_at(0, 3, 3, 5), image_at(0, 2, 2, 6), 70),
    "the same twice": prompt_of(2, image_at(0, 2, 2, 7), 3, image_at(0, 2, 2, 7), 3),
    "none": prompt_of(20),
}


@pytest.mark.parametrize("name", CASES)
async def test_alone_and_in_chunks_of_every_size(inline: Make, directory: Path, decoder: Decoder, name: str) -> None:
    prompt, images = CASES[name]
    logits = dense_logits(decoder, prompt, images).astype(np.float64)
    scores = (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(len(prompt) - 1), prompt[1:]]
    wanted = expected(decoder, prompt, images)
    backend = inline()
    for step_tokens in [1, 2, 3, 5, 8, 13, 64, 512]:
        router = await start(backend, directory, step_tokens=step_tokens, prefix_cache=False)
        [stream] = router.submit([request_for(prompt, images, prompt_logprobs=0)])
        tokens, logprobs, _ = await collect(stream)
        assert tokens[: len(wanted)] == wanted
        assert np.abs(np.array(logprobs) - scores).max() <= TOLERANCE
        await router.close()


async def test_among_others_with_and_without_images(inline: Make, directory: Path, decoder: Decoder) -> None:
    router = await start(inline(), directory, step_tokens=40)
    found = await answer(router, *(request_for(*case) for case in CASES.values()))
    for case, tokens in zip(CASES.values(), found, strict=True):
        wanted = expected(decoder, *case)
        assert tokens[: len(wanted)] == wanted
    await router.close()


async def test_the_picture_matters(inline: Make, directory: Path) -> None:
    prompt, _ = CASES["one"]
    router = await start(inline(), directory)
    found = await answer(router, *(request_for(prompt, (replace(image_at(0, 2, 3, seed), start=5),)) for seed in range(40, 48)))
    assert len(set(found)) > 1
    await router.close()


@pytest.mark.parametrize("run_ahead", ["never", "always"])
async def test_prefixes_are_shared_with_equal_images_only(inline: Make, directory: Path, decoder: Decoder, run_ahead: str) -> None:
    prompt, images = CASES["beside each other, over a block"]
    other = (replace(image_at(0, 3, 3, 50), start=images[0].start), images[1])
    later = (images[0], replace(image_at(0, 2, 2, 51), start=images[1].start))
    router = await start(inline(), directory, run_ahead=run_ahead)
    hits = []
    for pictures in (images, images, other, later, images):
        [stream] = router.submit([request_for(prompt, pictures)])
        tokens, _, finish = await collect(stream)
        wanted = expected(decoder, prompt, pictures)
        assert tokens[: len(wanted)] == wanted
        hits.append(finish.usage.cached_tokens)
    # Tokens 58 … 66 are the first image, 67 … 70 the second: block 0 is told apart by the first alone.
    assert hits == [0, 128, 0, 64, 128]
    await router.close()


async def test_after_a_forced_preemption(inline: Make, directory: Path, decoder: Decoder) -> None:
    telemetry = Telemetry()
    backend = inline(blocks=5)
    router = await start(backend, directory, telemetry, prefix_cache=False, step_tokens=64)
    prompt, images = prompt_of(58, image_at(0, 3, 3, 5), image_at(0, 2, 2, 6), 49)  # two blocks, and a third while it generates
    [older] = router.submit([request_for(prompt[:58], tokens=100)])
    async for event in older:
        if isinstance(event, TokenEvent) and backend.steps > 50:
            break
    [mine] = router.submit([request_for(prompt, images, tokens=30)])
    tokens, _, _ = await collect(mine)
    wanted = expected(decoder, prompt, images, 30)
    assert tokens[: len(wanted)] == wanted
    assert (await collect(older))[2].reason is FinishReason.LENGTH
    assert metric(telemetry, "preemptions_total") > 0
    await router.close()


async def test_after_a_lost_worker(inline: Make, directory: Path, decoder: Decoder) -> None:
    backend = inline(lose_at=frozenset({2, 9}))
    prompt, images = CASES["two sizes"]
    router = await start(backend, directory, step_tokens=12)
    [tokens] = await answer(router, request_for(prompt, images))
    wanted = expected(decoder, prompt, images)
    assert tokens[: len(wanted)] == wanted and backend.starts == 3
    await router.close()


async def test_a_real_worker_takes_pixels_through_its_channel(directory: Path, decoder: Decoder) -> None:
    load_request = LoadRequest(str(directory), dtype="float32", threads=1, max_rows=8, max_step_tokens=128)
    telemetry = Telemetry()
    router = await start(WorkerBackend(load_request, EngineSettings(threads=1)), directory, telemetry)
    info = router.versions()[0].info
    assert info is not None and info.image_tokens >= 512 and dict(info.memory_bytes)["images"] > 0
    prompt, images = CASES["two sizes"]
    found = await answer(router, *(request_for(prompt, images, cache_salt=str(at)) for at in range(3)))
    wanted = expected(decoder, prompt, images)
    assert all(tokens[: len(wanted)] == wanted for tokens in found)
    assert metric(telemetry, 'images_total{.*result="encoded"') == 2
    assert metric(telemetry, "image_tokens_total") == 8
    rows = metric(telemetry, "fusion_rows_total")
    for modality in ("text", "image"):
        assert 0 < metric(telemetry, f'fusion_gate_total{{.*head="0".*modality="{modality}"') < rows
    await router.close()


async def test_running_sequences_hold_no_more_images_than_the_worker_keeps(inline: Make, directory: Path, decoder: Decoder) -> None:
    backend = inline(image_tokens=10)
    router = await start(backend, directory, prefix_cache=False)
    kept: list[int] = []
    execute = backend.execute

    def watched(plan: Any) -> Any:
        future = execute(plan)
        future.add_done_callback(lambda _: kept.append(backend.engine._images.kept_tokens))
        return future

    backend.execute = watched  # type: ignore[method-assign]
    cases = [prompt_of(3, image_at(0, 2, 3, seed), 5) for seed in range(60, 66)]
    found = await answer(router, *(request_for(*case) for case in cases))
    for case, tokens in zip(cases, found, strict=True):
        wanted = expected(decoder, *case)
        assert tokens[: len(wanted)] == wanted
    assert max(kept) == 6
    with pytest.raises(InvalidRequest, match="images take 12 tokens and this server can hold 10"):
        router.submit([request_for(*prompt_of(image_at(0, 2, 3, 1), image_at(0, 2, 3, 2), 3))])
    await router.close()


async def test_the_pixels_that_wait_are_bounded(directory: Path) -> None:
    router = await start(InlineBackend(directory), directory, queue_pixel_bytes=600)
    case = prompt_of(3, image_at(0, 2, 3, 1), 5)  # 288 bytes
    streams = router.submit([request_for(*case), request_for(*case)])
    with pytest.raises(QueueFull, match="images"):
        router.submit([request_for(*case)])
    router.submit([request_for(case[0])])
    for stream in streams:
        await collect(stream)
    await answer(router, request_for(*case))
    await router.close()


def metric(telemetry: Telemetry, pattern: str) -> float:
    rows = telemetry.snapshot().render(False)[0].decode().splitlines()
    return sum(float(row.split()[-1]) for row in rows if re.match(f"deepseek_{pattern}", row))


async def test_v5_2_with_the_same_weights_answers_as_v3_5_within_its_window(decoder: Decoder, tmp_path: Path) -> None:
    """Two KV groups, near and far; images in place and fused as before."""
    directory = build_tiny_line(tmp_path / "long", V5_2)
    assert read_manifest(directory).modalities == ("text", "image")
    backend = InlineBackend(directory)
    for step_tokens in (512, 7):
        router = await start(backend, directory, step_tokens=step_tokens, prefix_cache=step_tokens > 7)
        found = await answer(router, *(request_for(*case) for case in CASES.values()))
        for case, tokens in zip(CASES.values(), found, strict=True):
            wanted = expected(decoder, *case)
            assert tokens[: len(wanted)] == wanted
        await router.close()


async def test_v3_5_converted_to_v5_2_gives_the_same_logits_on_images(directory: Path, decoder: Decoder, tmp_path: Path) -> None:
    output = tmp_path / "converted"
    convert(directory, output, Wanted("5.2"))
    manifest = read_manifest(output)
    assert (manifest.line, manifest.modalities, manifest.spec.vision) == ("5.2", ("text", "image"), decoder.spec.vision)
    after = load(manifest, "cpu", torch.float32, serving=False)
    for prompt, images in CASES.values():
        before = dense_logits(decoder, prompt, images)
        np.testing.assert_allclose(dense_logits(after, prompt, images), before, rtol=0, atol=1e-5)
        if images:
            others = [replace(image, pixels=bytes(255 - value for value in image.pixels)) for image in images]
            assert np.abs(dense_logits(after, prompt, others) - before).max() > 1e-2
    router = await start(InlineBackend(output), output)
    found = await answer(router, *(request_for(*case) for case in CASES.values()))
    for case, tokens in zip(CASES.values(), found, strict=True):
        wanted = expected(decoder, *case)
        assert tokens[: len(wanted)] == wanted
    await router.close()


@contextlib.asynccontextmanager
async def served(router: Router, telemetry: Telemetry) -> AsyncIterator[str]:
    """The HTTP application over a router on a loopback socket; its address."""
    settings = HttpSettings(port=0)
    listener = bind(settings)
    server = build_server(build_app(router, telemetry, settings))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    await server.accepting.wait()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        await stop_now(server, serving)


async def test_the_official_client_asks_about_pictures_of_several_sizes(directory: Path, decoder: Decoder) -> None:
    """From PNG and JPEG in data URLs to the tokens that the dense forward gives for the same pixels."""
    telemetry = Telemetry()
    router = await start(InlineBackend(directory), directory, telemetry)
    pictures = [
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8) for seed, height, width in ((1, 8, 12), (2, 4, 8))
    ]
    content: list[dict[str, Any]] = [{"type": "text", "text": "which?"}]
    for picture in pictures:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    messages: Any = [{"role": "user", "content": content}]
    async with served(router, telemetry) as url, openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as api:
        answer = await api.chat.completions.create(
            model="v3.5", messages=messages, max_tokens=GENERATED, temperature=0, logprobs=True, extra_body={"ignore_eos": True}
        )
        models = {model.id for model in (await api.models.list()).data}
    assert "v3.5" in models
    ids, images = [256, 259, *TokenCodec.load(directory).encode("which?", add_special=False)], []
    for picture in pictures:
        grid = decoder.spec.vision.grid(picture.shape[1], picture.shape[0])
        images.append(ImageInput(len(ids), grid.rows, grid.columns, "", picture.tobytes()))
        ids += [IMAGE_ID] * grid.tokens
    ids += [257, 260]
    wanted = expected(decoder, tuple(ids), tuple(images))
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    codec = TokenCodec.load(directory)
    assert [entry.token for entry in logprobs.content[: len(wanted)]] == [codec.token_text(token) for token in wanted]
    await router.close()
