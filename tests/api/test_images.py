"""Images over HTTP: what reaches the worker, the limits at their edges, data URLs, fetching, and versions that do not read images."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from PIL import Image

from service.api import fetch
from service.types.request import ImageInput
from service.types.settings import HttpLimits
from tests.api.conftest import IMAGE_ID, Options, Service, running

CHAT = "/v1/chat/completions"


def png(width: int = 8, height: int = 8, colour: tuple[int, int, int] = (10, 20, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, "PNG")
    return stream.getvalue()


def data_url(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def part(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def body(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 2, "seed": 1, **fields}


@pytest.fixture
async def seeing() -> AsyncIterator[Service]:
    async with running(Options(sees=True)) as service:
        yield service


async def ask(service: Service, *parts: dict[str, Any], **fields: Any) -> tuple[tuple[int, ...], tuple[ImageInput, ...]]:
    """The prompt and the images that the worker got."""
    service.backend.plans.clear()
    response = await service.client.post(CHAT, json=body(*parts, **fields))
    assert response.status_code == 200, response.text
    opening = next(opening for plan in service.backend.plans for opening in plan.open)
    assert response.json()["usage"]["prompt_tokens"] == opening.prompt_tokens
    return opening.tokens[: opening.prompt_tokens], opening.images


async def refused(service: Service, *parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    response = await service.client.post(CHAT, json=body(*parts, **fields))
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


async def test_images_stand_where_they_were_put(seeing: Service) -> None:
    tokens, images = await ask(seeing, text("a"), part(data_url(png(8, 4))), text("b"), text("c"), part(data_url(png(4, 8))))
    assert tokens == (*b"user: a", *[IMAGE_ID] * 2, *b"b\nc", *[IMAGE_ID] * 2, 256, *b"\nassistant:")
    assert [(image.start, image.rows, image.columns, image.pixels) for image in images] == [
        (7, 1, 2, bytes((10, 20, 30)) * 32),
        (12, 2, 1, bytes((10, 20, 30)) * 32),
    ]
    assert images[0].digest != images[1].digest


async def test_spelling_the_image_token_brings_no_image(seeing: Service) -> None:
    tokens, images = await ask(seeing, text("<image>"), part(data_url(png())))
    assert tokens == (*b"user: <image>", *[IMAGE_ID] * 4, 256, *b"\nassistant:") and len(images) == 1
    response = await seeing.client.post("/v1/completions", json={"prompt": [97, IMAGE_ID], "max_tokens": 1})
    assert response.json()["error"]["param"] == "prompt" and "stands for an image" in response.text


async def test_the_same_image_is_prepared_once(seeing: Service) -> None:
    _, first = await ask(seeing, part(data_url(png())))
    _, second = await ask(seeing, part(data_url(png())), text("other"), cache_salt="x")
    assert first[0].pixels is second[0].pixels and first[0].digest == second[0].digest


async def test_low_detail_takes_a_quarter_of_the_tokens(seeing: Service) -> None:
    counts = {}
    for detail in ("low", "high", "auto", None):
        _, images = await ask(seeing, part(data_url(png(64, 64)), detail=detail))
        counts[detail] = images[0].tokens
    assert counts == {"low": 1, "high": 9, "auto": 9, None: 9}
    assert (await refused(seeing, part(data_url(png()), detail="best")))["param"] == "messages.0.content.0.image_url.detail"


async def test_choices_share_the_pixels(seeing: Service) -> None:
    seeing.backend.plans.clear()
    response = await seeing.client.post(CHAT, json=body(part(data_url(png())), n=3))
    openings = [opening for plan in seeing.backend.plans for opening in plan.open]
    assert response.status_code == 200 and len(openings) == 3
    assert {opening.images[0].digest for opening in openings} == {openings[0].images[0].digest}


async def test_tokenize_shows_the_image_tokens(seeing: Service) -> None:
    messages = body(text("a"), part(data_url(png())))["messages"]
    tokens, _ = await ask(seeing, text("a"), part(data_url(png())))
    answer = (await seeing.client.post("/tokenize", json={"messages": messages})).json()
    assert answer["tokens"] == list(tokens)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        (data_url(b"no image"), "not a PNG, JPEG, WEBP or GIF"),
        (data_url(png(40, 40)[:-30]), "damaged or cut off"),
        ("data:image/png,abc", "must hold base64"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,YQ", "not valid base64"),
        ("data:image/png;base64", "must hold base64"),
        ("data:", "must hold base64"),
        ("https://example.com/a.png", "not on a host"),
        ("file:///etc/passwd", "not an http(s) URL"),
        ("nonsense", "not an http(s) URL"),
        ("http://[::1", "not a URL"),
    ],
)
async def test_what_is_no_image_is_refused_by_its_place(seeing: Service, url: str, sentence: str) -> None:
    error = await refused(seeing, text("a"), part(url))
    assert error["param"] == "messages.0.content.1.image_url" and sentence in error["message"]
    assert len(error["message"]) < 200


@pytest.mark.parametrize(
    ("broken", "param"),
    [
        ({"type": "image_url"}, "messages.0.content.0.image_url"),
        ({"type": "image_url", "image_url": {}}, "messages.0.content.0.image_url.url"),
        ({"type": "image_url", "image_url": "data:"}, "messages.0.content.0.image_url"),
        ({"type": "image_url", "image_url": {"url": 3}}, "messages.0.content.0.image_url.url"),
        ({"type": "image_url", "image_url": {"url": ""}}, "messages.0.content.0.image_url.url"),
        ({"type": "image_url", "image_url": {"url": "data:", "size": 3}}, "messages.0.content.0.image_url.size"),
        ({"type": "text"}, "messages.0.content.0.text"),
        ({"type": "picture"}, "messages.0.content.0"),
    ],
)
async def test_broken_parts_are_named(seeing: Service, broken: dict[str, Any], param: str) -> None:
    assert (await refused(seeing, broken))["param"] == param


async def test_images_of_others_than_the_user_are_refused(seeing: Service) -> None:
    for role in ("system", "assistant"):
        messages = [{"role": role, "content": [part(data_url(png()))]}]
        response = await seeing.client.post(CHAT, json={"messages": messages})
        assert response.json()["error"]["param"] == "messages.0.content.0.image_url"


async def test_a_template_that_drops_images_is_refused() -> None:
    async with running(Options(sees=True, template="{% for m in messages %}{{ m.role }}{% endfor %}")) as service:
        error = await refused(service, part(data_url(png())))
    assert "does not place the images" in error["message"]


async def test_a_version_that_reads_text_only_says_which_can(service: Service) -> None:
    error = await refused(service, part(data_url(png())))
    assert error["message"] == "The model fake does not read images; no version served here can."
    sighted = replace(service.router.versions()[0], name="eyes", manifest=seeing_manifest(service))
    service.router._versions = (*service.router.versions(), sighted)
    assert (await refused(service, part(data_url(png()))))["message"] == "The model fake does not read images; eyes can."


def seeing_manifest(service: Service) -> Any:
    manifest = service.router.versions()[0].manifest
    return replace(manifest, spec=Options(sees=True).spec())


async def test_the_model_list_tells_modalities(seeing: Service, service: Service) -> None:
    answers = [(await one.client.get("/v1/models")).json()["data"][0]["modalities"] for one in (seeing, service)]
    assert answers == [["text", "image"], ["text"]]


async def test_the_official_client_sends_images(seeing: Service) -> None:
    async with openai.AsyncOpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True) as api:
        messages: Any = body(text("what?"), part(data_url(png()), detail="high"))["messages"]
        answer = await api.chat.completions.create(model="fake", messages=messages, max_tokens=3)
        assert answer.usage is not None and answer.usage.completion_tokens == 3
        with pytest.raises(openai.BadRequestError):
            await api.chat.completions.create(model="fake", messages=body(part("data:image/png;base64,xx"))["messages"])


# Limits.


def limited(**limits: Any) -> Options:
    return Options(sees=True, limits=replace(HttpLimits(), **limits))


async def test_the_number_of_images_is_bounded() -> None:
    async with running(limited(images=3)) as service:
        for count in (2, 3):
            assert len((await ask(service, *[part(data_url(png()))] * count))[1]) == count
        assert (await refused(service, *[part(data_url(png()))] * 4))["param"] == "messages.0.content.3.image_url"


async def test_the_bytes_of_an_image_are_bounded() -> None:
    size = len(png())
    for most, fits in ((size + 1, True), (size, True), (size - 1, False)):
        async with running(limited(image_bytes=most)) as service:
            if fits:
                await ask(service, part(data_url(png())))
            else:
                assert "at most" in (await refused(service, part(data_url(png()))))["message"]


async def test_the_pixels_of_all_images_are_bounded_together() -> None:
    pictures = [part(data_url(png(10, 10))), part(data_url(png(10, 10, (1, 1, 1))))]
    for most, fits in ((201, True), (200, True), (199, False)):
        async with running(limited(image_pixels=most)) as service:
            if fits:
                await ask(service, *pictures)
            else:
                error = await refused(service, *pictures)
                assert error["param"] == "messages.0.content.1.image_url" and "100 pixels and 99 are left" in error["message"]


async def test_decoding_has_its_time_memory_and_processes() -> None:
    large = part(data_url(png(5000, 4000)))
    async with running(limited(image_s=0.0005)) as service:
        assert "longer than" in (await refused(service, large))["message"]
    async with running(limited(image_memory_bytes=8 << 20)) as service:
        assert (await refused(service, large))["param"] == "messages.0.content.0.image_url"
    async with running(limited(image_processes=1)) as service:
        urls = [data_url(png(300, 300, (at, 0, 0))) for at in range(5)]
        await asyncio.gather(*(service.client.post(CHAT, json=body(part(url))) for url in urls))
        assert len(service.app.services.images._preparer._idle) == 1


async def test_prepared_images_are_kept_within_their_bound() -> None:
    async with running(limited(prepared_bytes=500)) as service:
        for shade in range(4):
            await ask(service, part(data_url(png(8, 8, (shade, 0, 0)))))
        assert service.app.services.images._preparer.kept_bytes == 2 * 192


# Fetching.


@contextlib.asynccontextmanager
async def file_server(answer: bytes, hang: bool = False) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that answers every request with these bytes; its port and the heads that it got."""
    heads: list[bytes] = []
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        if hang:
            await ended.wait()
        writer.write(answer)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], heads
    finally:
        ended.set()
        server.close()


def ok(data: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: " + str(len(data)).encode() + b"\r\n\r\n" + data


async def test_an_image_is_fetched_from_a_listed_address() -> None:
    async with file_server(ok(png())) as (port, heads):
        async with running(Options(sees=True, http={"image_hosts": (f"127.0.0.1:{port}",)})) as service:
            _, images = await ask(service, part(f"http://127.0.0.1:{port}/a/b.png?c=d"))
            assert images[0].tokens == 4
            assert "not on a host" in (await refused(service, part(f"http://localhost:{port}/a.png")))["message"]
            assert "not on a host" in (await refused(service, part("http://127.0.0.1/a.png")))["message"]
            assert "without credentials" in (await refused(service, part(f"http://a:b@127.0.0.1:{port}/a.png")))["message"]
    assert len(heads) == 1
    lines = heads[0].decode().split("\r\n")
    assert lines[0] == "GET /a/b.png?c=d HTTP/1.1" and f"host: 127.0.0.1:{port}" in [line.lower() for line in lines]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"HTTP/1.1 302 Found\r\nlocation: http://10.0.0.1/\r\ncontent-length: 0\r\n\r\n", "status 302"),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "status 404"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort", "could not be read"),
        (b"nonsense\r\n\r\n", "could not be read"),
        (b"", "could not be read"),
        (ok(bytes(2001)), "more than 2000 bytes"),
        (ok(b"no image"), "not a PNG"),
    ],
)
async def test_answers_that_are_no_image_are_refused(answer: bytes, sentence: str) -> None:
    async with file_server(answer) as (port, _):
        options = limited(image_bytes=2000)
        options.http["image_hosts"] = (f"127.0.0.1:{port}",)
        async with running(options) as service:
            error = await refused(service, part(f"http://127.0.0.1:{port}/"))
    assert sentence in error["message"] and error["param"] == "messages.0.content.0.image_url"


async def test_fetching_has_its_time() -> None:
    async with file_server(ok(png()), hang=True) as (port, _):
        options = limited(fetch_s=0.05)
        options.http["image_hosts"] = (f"127.0.0.1:{port}",)
        async with running(options) as service:
            assert "within 0.05 seconds" in (await refused(service, part(f"http://127.0.0.1:{port}/")))["message"]


async def test_a_listed_name_that_leads_inside_is_refused() -> None:
    """The name is listed; the address behind it is checked when connecting."""
    async with file_server(ok(png())) as (port, heads):
        async with running(Options(sees=True, http={"image_hosts": (f"localhost:{port}",)})) as service:
            assert "private network" in (await refused(service, part(f"http://localhost:{port}/a.png")))["message"]
    assert heads == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("ff02::1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert fetch._is_public(address) is public
