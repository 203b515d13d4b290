"""A byte-level vocabulary, a running server on a loopback socket over the fake worker, and a raw client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from service.api.app import Application, build_app
from service.api.server import HttpServer, bind, build_server
from service.inputs.tokens import TokenCodec
from service.schedulers.router import Router
from service.telemetry import Telemetry
from service.types.model_spec import ModelSpec
from service.types.settings import HttpLimits, HttpSettings, SchedulerSettings
from service.types.vision import VisionSpec
from tests.fakes import FakeBackend, FakeBehaviour, FakeManifest, fake_router, fake_spec

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>\n{% endfor %}assistant:"


IMAGE_ID = 257
EYES = VisionSpec(patch=2, merge=2, dim=8, layers=1, heads=2, mlp_hidden=12, least_tokens=2, most_tokens=9, side_tokens=6)


def byte_tokenizer() -> Tokenizer:
    """Token ids 0 … 255 are the bytes, 256 is the special token <end>."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(hidden)}
    assert set(names.values()) == set(alphabet)
    tokenizer = Tokenizer(models.BPE(vocab={name: byte for byte, name in names.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return tokenizer


def seeing_codec() -> TokenCodec:
    """The byte vocabulary and <image>."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    return TokenCodec(tokenizer.to_str().encode(), {"eos_token": "<end>"})


BYTE_CODEC = TokenCodec(byte_tokenizer().to_str().encode(), {"eos_token": "<end>"})
SEEING_CODEC = seeing_codec()


@dataclass
class Service:
    """A running server and what is behind it."""

    app: Application
    router: Router
    backend: FakeBackend
    telemetry: Telemetry
    server: HttpServer
    port: int
    client: httpx.AsyncClient

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def complete(self, **body: Any) -> dict[str, Any]:
        response = await self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def raw(self, data: bytes, *, read: bool = True) -> bytes:
        """Send bytes on a new connection and read until the server closes it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
        answer = await reader.read() if read else b""
        writer.close()
        return answer

    def rows(self) -> int:
        return len(self.backend.rows)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self.telemetry.snapshot().render()[0].decode().splitlines():
            if match := re.fullmatch(rf"deepseek_{name}\{{(.*)\}} (\S+)", line):
                total += float(match[2]) if all(f'{key}="{value}"' in match[1] for key, value in labels.items()) else 0.0
        return total

    async def quiet(self) -> None:
        """Wait until no connection and no request of the server is left and every block is free."""
        state = self.server.server_state
        await until(lambda: not state.connections and not state.tasks)
        await until(lambda: self.metric("requests_running") + self.metric("requests_waiting") == 0)
        assert self.metric("kv_cache_usage_ratio") == 0


@dataclass
class Options:
    limits: HttpLimits = field(default_factory=HttpLimits)
    http: dict[str, Any] = field(default_factory=dict)
    # Tests count events: with a step sent ahead two tokens may be ready at once, which then are one.
    scheduler: SchedulerSettings = field(default_factory=lambda: SchedulerSettings(run_ahead="never"))
    behaviour: FakeBehaviour = field(default_factory=lambda: FakeBehaviour(step_s=0.001, start_s=0.0))
    template: str | None = TEMPLATE
    context_tokens: int = 2048
    start: bool = True
    send_bytes: int = 0
    codec: TokenCodec = BYTE_CODEC
    sees: bool = False

    def spec(self) -> ModelSpec:
        plain = fake_spec(self.context_tokens)
        return replace(plain, vocab_size=IMAGE_ID + 1, vision=EYES, image_id=IMAGE_ID) if self.sees else plain


async def stop_now(server: HttpServer, serving: asyncio.Future[None]) -> None:
    """What the server's own end does, without its pauses (test_server.py is about that)."""
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    for listening in server.servers:
        listening.close()
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    await asyncio.gather(*server.server_state.tasks, return_exceptions=True)
    await server.lifespan.shutdown()


@contextlib.asynccontextmanager
async def running(options: Options | None = None) -> AsyncIterator[Service]:
    options = options or Options()
    telemetry = Telemetry()
    backend = FakeBackend(behaviour=options.behaviour, context_tokens=options.context_tokens)
    manifest = FakeManifest(options.spec(), chat_template=options.template)
    backend.info = replace(backend.info, vocab_size=manifest.spec.vocab_size)
    router = fake_router(backend, options.scheduler, telemetry, codec=SEEING_CODEC if options.sees else options.codec, manifest=manifest)
    settings = replace(HttpSettings(port=0, limits=options.limits), **options.http)
    app = build_app(router, telemetry, settings)
    if options.start:
        await router.start()
    listener = bind(settings)
    if options.send_bytes:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options.send_bytes)
    port = listener.getsockname()[1]
    server = build_server(app)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    await server.accepting.wait()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, verify=False) as client:
        try:
            yield Service(app, router, backend, telemetry, server, port, client)
        finally:
            await client.aclose()
            await stop_now(server, serving)
            await router.close()
    assert backend.violation is None


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with running() as one:
        yield one


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it did not happen")


def head(method: str, path: str, *fields: tuple[str, str], close: bool = True) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: test", *(f"{name}: {value}" for name, value in fields)]
    if close:
        lines.append("connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def post(path: str, body: bytes, *fields: tuple[str, str], close: bool = True) -> bytes:
    typed = (("content-type", "application/json"), ("content-length", str(len(body))), *fields)
    return head("POST", path, *typed, close=close) + body


def parse(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one raw response."""
    start, _, body = answer.partition(b"\r\n\r\n")
    first, *rest = start.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    return int(first.split()[1]), headers, body


def failure(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error object of a raw response, checking its shape."""
    status, headers, body = parse(answer)
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"].startswith("req-")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, error
