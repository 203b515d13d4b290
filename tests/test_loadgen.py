"""The load generator: schedules, parsing however bytes are cut, timing, accounting, and real loads over loopback."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loadtests.null_server import NullProtocol
from service.loadgen.arrivals import Load, Phase, abort_choices, due_times, poisson_times
from service.loadgen.drive import Drive, Measured
from service.loadgen.httpx_sender import HttpxSender
from service.loadgen.prompts import Mix, PromptPlan
from service.loadgen.senders import RawSender
from service.loadgen.summary import CURVE_POINTS, Targets, percentile, spread_ms, summarise
from service.loadgen.watch import SendFailure, Watch
from service.loadgen.wire import EVENT_BYTES, EventParser, ResponseParser

TEXT = b'{"choices":[{"index":0,"text":" a"}]}'
CHAT = b'{"choices":[{"index":0,"delta":{"content":"a"}}]}'
ROLE = b'{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}'
USAGE = b'{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5,"total_tokens":12}}'


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[first:last] for first, last in itertools.pairwise(places)]


def test_poisson_is_seeded_and_has_its_rate() -> None:
    times = poisson_times(50.0, 4000, seed=3)
    assert times == poisson_times(50.0, 4000, seed=3) != poisson_times(50.0, 4000, seed=4)
    assert times == sorted(times)
    assert 4000 / times[-1] == pytest.approx(50.0, rel=0.08)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.1)


def test_abort_choices() -> None:
    assert abort_choices(0.0, 50, 1) == [False] * 50
    assert abort_choices(1.0, 50, 1) == [True] * 50
    assert 300 < sum(abort_choices(0.4, 1000, 1)) < 500
    assert Load(1, rate=2.0).mode == "open" and Load(1).mode == "closed"


def test_prompts_are_functions_of_seed_and_index() -> None:
    plan = PromptPlan(prompt_tokens=20, shared_prefix_tokens=12, seed=5)
    words = [plan.text(index).split() for index in range(4)]
    assert all(len(entry) == 20 for entry in words)
    assert len({tuple(entry[:12]) for entry in words}) == 1
    assert len({tuple(entry[12:]) for entry in words}) == 4
    assert plan.text(2) == PromptPlan(prompt_tokens=20, shared_prefix_tokens=12, seed=5).text(2)
    assert plan.text(2) != PromptPlan(prompt_tokens=20, shared_prefix_tokens=12, seed=6).text(2)


@pytest.mark.parametrize(("endpoint", "key"), [("completions", "prompt"), ("chat", "messages")])
def test_bodies(endpoint: str, key: str) -> None:
    plan = PromptPlan(endpoint=endpoint, model="m", output_tokens=3, temperature=0.5, ignore_eos=True)
    body = json.loads(plan.body(0))
    assert {key, "model", "max_tokens", "temperature", "stream", "stream_options", "ignore_eos"} == set(body)
    assert body["stream_options"] == {"include_usage": True}
    assert "ignore_eos" not in json.loads(PromptPlan(endpoint=endpoint).body(0))


BODY = b"data: " + TEXT + b"\n\n"
RESPONSES = [
    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\n"
    + BODY[:5]
    + b"\r\n%x\r\n" % len(BODY[5:])
    + BODY[5:]
    + b"\r\n0\r\nt: v\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY),
]


@pytest.mark.parametrize("response", RESPONSES)
@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_responses_survive_any_cut(response: bytes, cuts: list[int]) -> None:
    body = bytearray()
    parser = ResponseParser(body.extend)
    for piece in pieces_of(response, cuts):
        parser.feed(piece)
    assert (parser.status, bytes(body), parser.complete, parser.keep_alive) == (200, BODY, True, True)


def test_body_until_close() -> None:
    body = bytearray()
    parser = ResponseParser(body.extend)
    parser.feed(b"HTTP/1.0 200 OK\r\n\r\nab")
    assert not parser.complete
    parser.feed(b"c")
    parser.close()
    assert (bytes(body), parser.complete, parser.keep_alive) == (b"abc", True, False)


@pytest.mark.parametrize("head", [b"HTTP/1.1 204 No\r\n\r\n", b"HTTP/1.1 429 No\r\ncontent-length: 0\r\n\r\n"])
def test_empty_bodies_are_complete(head: bytes) -> None:
    parser = ResponseParser(lambda piece: None)
    parser.feed(head)
    assert parser.complete and parser.keep_alive


def test_bytes_after_the_end_forbid_reuse() -> None:
    parser = ResponseParser(lambda piece: None)
    parser.feed(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nab")
    assert parser.complete and not parser.keep_alive


@pytest.mark.parametrize(
    "data", [b"SSH-2.0\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", b"x" * 70_000]
)
def test_what_is_not_http_is_refused(data: bytes) -> None:
    with pytest.raises(SendFailure, match="protocol"):
        ResponseParser(lambda piece: None).feed(data)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@given(cuts=st.lists(st.integers(0, 300), max_size=12))
def test_events_survive_any_cut(end: bytes, cuts: list[int]) -> None:
    lines = [b": hello", b"", b"data: one", b"", b"event: x", b"data:two", b"data: three", b"", b"data: [DONE]", b"", b""]
    parser, events = EventParser(), []
    for piece in pieces_of(end.join(lines), cuts):
        events += parser.feed(piece)
    assert events == [b"one", b"two\nthree", b"[DONE]"]


def test_an_endless_event_is_refused() -> None:
    with pytest.raises(SendFailure, match="does not end"):
        EventParser().feed(b"x" * (EVENT_BYTES + 1))


def watched(*events: tuple[bytes, float], sent_s: float = 10.0, abort: bool = False, end_s: float = 20.0) -> Watch:
    watch = Watch(due_s=sent_s, abort=abort)
    watch.sent_s = sent_s
    for data, now_s in events:
        watch.event(data, now_s)
    watch.finish(end_s)
    return watch


def test_timing_of_a_stream() -> None:
    watch = watched((ROLE, 10.1), (CHAT, 10.5), (CHAT, 10.75), (CHAT, 11.5), (USAGE, 11.6), (b"[DONE]", 11.7))
    assert (watch.outcome, watch.pieces, watch.tokens, watch.prompt_tokens) == ("ok", 3, 5, 7)
    assert watch.ttft_s == pytest.approx(0.5)
    assert watch.tpot_s == pytest.approx(1.0 / 4)
    assert list(watch.gaps_s) == pytest.approx([0.25, 0.75])


def test_tokens_fall_back_to_pieces() -> None:
    watch = watched((TEXT, 11.0), (TEXT, 12.0), (b"[DONE]", 12.0))
    assert (watch.output_tokens, watch.tokens, watch.tpot_s) == (None, 2, 1.0)


def test_outcomes() -> None:
    assert watched((TEXT, 11.0)).outcome == "truncated"
    assert watched((TEXT, 11.0), abort=True).outcome == "aborted"
    assert watched(abort=True).outcome == "truncated"
    assert Watch(abort=True).event(TEXT, 1.0) is False
    assert Watch().event(TEXT, 1.0) is True
    failed = Watch()
    failed.finish(1.0, SendFailure("timeout"))
    assert failed.outcome == "timeout" and failed.ttft_s is None and failed.tpot_s is None


@pytest.mark.parametrize(
    ("data", "kind"), [(b"{", "bad_event"), (b'{"error":{"message":"no"}}', "stream_error"), (b'{"choices":5}', "bad_event")]
)
def test_bad_events_are_failures(data: bytes, kind: str) -> None:
    with pytest.raises(SendFailure) as caught:
        Watch().event(data, 0.0)
    assert caught.value.kind == kind


def test_percentiles() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([1.0], 0.99) == 1.0
    assert spread_ms([]) is None
    spread = spread_ms(index / 1000 for index in range(101))
    assert spread == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "mean": 50.0, "max": 100.0}


def test_a_row_counts_every_watch_once() -> None:
    good = watched((TEXT, 10.1), (TEXT, 10.3), (b"[DONE]", 10.3), end_s=11.0)
    slow = watched((TEXT, 12.0), (TEXT, 12.1), (USAGE, 12.1), (b"[DONE]", 12.1), end_s=13.0)
    left = watched((TEXT, 10.1), abort=True)
    lost = Watch()
    lost.finish(12.0, SendFailure("status_429"))
    row = summarise(Measured([good, slow, left, lost], 4.0, 1.0, {}), Targets(ttft_ms=500, tpot_ms=300))
    assert (row["requests"], row["completed"], row["aborted"], row["errors"]) == (4, 2, 1, {"status_429": 1})
    assert (row["output_tokens"], row["prompt_tokens"], row["token_counts"]) == (7, 7, "mixed")
    assert (row["requests_per_s"], row["output_tokens_per_s"], row["total_tokens_per_s"]) == (0.5, 1.75, 3.5)
    assert (row["goodput_requests_per_s"], row["goodput_share"]) == (0.25, 0.3333)
    assert row["sender"]["cpu_share"] == 0.25  # type: ignore[index]


def test_targets() -> None:
    watch = watched((TEXT, 10.1), (TEXT, 10.3), (b"[DONE]", 10.3))
    assert Targets().met(watch) and Targets(ttft_ms=101, tpot_ms=201).met(watch)
    assert not Targets(ttft_ms=99).met(watch) and not Targets(tpot_ms=199).met(watch)


@contextlib.asynccontextmanager
async def listening(factory: Callable[[], asyncio.Protocol]) -> AsyncIterator[str]:
    server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize("client", [RawSender, HttpxSender])
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("rate", [0.0, 500.0])
async def test_real_loads(client: type[RawSender] | type[HttpxSender], endpoint: str, rate: float) -> None:
    seen: list[Watch] = []
    async with listening(lambda: NullProtocol(4)) as url:
        sender = client(url + "/v1")
        load = Load(20, concurrency=3, rate=rate, warmup=2)
        measured = await Drive(sender, PromptPlan(endpoint=endpoint, prompt_tokens=4), load, seen.append).run()
        await sender.close()
    assert [watch.outcome for watch in measured.watches] == ["ok"] * 20
    assert all((watch.tokens, watch.prompt_tokens, watch.pieces) == (4, 8, 4) for watch in measured.watches)
    assert all(watch.due_s <= watch.sent_s <= watch.first_s <= watch.last_s <= watch.end_s for watch in measured.watches)
    assert len(seen) == 22 and measured.duration_s > 0 and measured.cpu_s > 0


@pytest.mark.parametrize("client", [RawSender, HttpxSender])
async def test_a_client_that_leaves(client: type[RawSender] | type[HttpxSender]) -> None:
    async with listening(lambda: NullProtocol(4, gap_s=0.005)) as url:
        sender = client(url)
        measured = await Drive(sender, PromptPlan(prompt_tokens=2), Load(6, concurrency=2, abort_share=1.0)).run()
        await sender.close()
    assert [(watch.outcome, watch.pieces) for watch in measured.watches] == [("aborted", 1)] * 6


async def test_times_are_those_of_a_server_that_answers_by_the_clock() -> None:
    """Late by what the machine needs, never early."""
    async with listening(lambda: NullProtocol(5, gap_s=0.01, first_s=0.05)) as url:
        sender = RawSender(url)
        measured = await Drive(sender, PromptPlan(), Load(3, concurrency=3)).run()
        await sender.close()
    for watch in measured.watches:
        assert watch.ttft_s is not None and watch.tpot_s is not None
        # A first token that came late shortens the mean of the gaps, never the whole.
        assert watch.ttft_s >= 0.049 and watch.last_s - watch.sent_s >= 0.089
        assert watch.tpot_s == pytest.approx((watch.last_s - watch.sent_s - watch.ttft_s) / 4, abs=1e-6)


class Scripted(asyncio.Protocol):
    """Answers each request with fixed bytes and, when asked, closes."""

    def __init__(self, answer: bytes, close: bool = False) -> None:
        self.answer, self.close = answer, close

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.transport.write(self.answer)
        if self.close:
            self.transport.close()


def _plain(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


@pytest.mark.parametrize("client", [RawSender, HttpxSender])
@pytest.mark.parametrize(
    ("answer", "close", "kind"),
    [
        (_plain(429, b"full"), False, "status_429"),
        (_plain(200, b'data: {"error":{"message":"no"}}\n\n'), False, "stream_error"),
        (_plain(200, b"data: " + TEXT + b"\n\n"), False, "truncated"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\ndata", True, "disconnected"),
        (b"", True, "disconnected"),
        (b"", False, "timeout"),
    ],
)
async def test_failures_are_counted_by_kind(client: type[RawSender] | type[HttpxSender], answer: bytes, close: bool, kind: str) -> None:
    async with listening(lambda: Scripted(answer, close)) as url:
        sender = client(url)
        measured = await Drive(sender, PromptPlan(prompt_tokens=2), Load(2, concurrency=1, timeout_s=0.2)).run()
        await sender.close()
    assert [watch.outcome for watch in measured.watches] == [kind] * 2
    assert kind == "truncated" or kind in measured.failures


async def test_nobody_listens() -> None:
    async with listening(lambda: NullProtocol(1)) as url:
        pass
    measured = await Drive(RawSender(url), PromptPlan(), Load(2)).run()
    assert [watch.outcome for watch in measured.watches] == ["connect"] * 2


@pytest.mark.parametrize("client", [RawSender, HttpxSender])
async def test_fetch(client: type[RawSender] | type[HttpxSender]) -> None:
    async with listening(lambda: NullProtocol(1)) as url:
        sender = client(url)
        status, body = await sender.fetch("/v1/models")
        await sender.close()
    assert status == 200 and json.loads(body)["data"][0]["id"] == "null"


async def test_the_key_is_sent() -> None:
    heard = asyncio.get_running_loop().create_future()

    class Listener(Scripted):
        def data_received(self, data: bytes) -> None:
            heard.set_result(data)
            super().data_received(data)

    async with listening(lambda: Listener(_plain(200, b"{}"))) as url:
        sender = RawSender(url, "secret")
        await sender.fetch("/v1/models")
        await sender.close()
    assert b"\r\nauthorization: Bearer secret\r\n" in await heard


async def test_connections_are_reused() -> None:
    made = []

    class Counted(NullProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.append(transport)
            super().connection_made(transport)

    async with listening(lambda: Counted(2)) as url:
        sender = RawSender(url)
        await Drive(sender, PromptPlan(), Load(30, concurrency=3)).run()
        await sender.close()
    assert len(made) == 3


def test_phases_repeat_and_keep_their_rates() -> None:
    load = Load(3000, phases=(Phase(2.0, 10.0), Phase(0.0, 5.0), Phase(40.0, 5.0)), seed=1)
    times = due_times(load)
    assert load.mode == "open" and len(times) == 3000 and times == sorted(times) == due_times(load)
    cycles = times[-1] / 20
    within = [time % 20 for time in times]
    assert sum(place < 10 for place in within) / cycles == pytest.approx(20, rel=0.2)
    assert sum(place >= 15 for place in within) / cycles == pytest.approx(200, rel=0.1)
    assert not any(10 <= place < 15 for place in within)


def test_a_load_is_bounded_in_time() -> None:
    assert due_times(Load(100, rate=10.0, max_seconds=2.0)) == [due for due in poisson_times(10.0, 100, 0) if due <= 2.0]
    assert due_times(Load(2, trace_s=(0.0, 1.0, 4.0), speed=2.0)) == [0.0, 0.5]


@pytest.mark.parametrize(
    "fields", [{"rate": 1.0, "trace_s": (0.0,)}, {"rate": 1.0, "phases": (Phase(1.0, 1.0),)}, {"phases": (Phase(0.0, 1.0),)}]
)
def test_a_load_that_contradicts_itself_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="rate"):
        Load(1, **fields)  # type: ignore[arg-type]


async def test_a_closed_loop_ends_at_its_time() -> None:
    async with listening(lambda: NullProtocol(2, gap_s=0.02)) as url:
        sender = RawSender(url)
        measured = await Drive(sender, PromptPlan(), Load(10_000, concurrency=2, max_seconds=0.2)).run()
        await sender.close()
    assert 1 <= len(measured.watches) < 100 and {watch.outcome for watch in measured.watches} == {"ok"}


def test_lengths_vary_within_their_spread_and_prefixes_are_shared_by_some() -> None:
    plan = PromptPlan(prompt_tokens=100, shared_prefix_tokens=20, prefixes=3, output_tokens=50, length_spread=0.5, seed=2)
    texts = [plan.text(index).split() for index in range(200)]
    lengths = [len(words) for words in texts]
    assert min(lengths) >= 50 and max(lengths) <= 150 and len(set(lengths)) > 40
    assert len({tuple(words[:20]) for words in texts}) == 3
    outputs = [json.loads(plan.body(index))["max_tokens"] for index in range(200)]
    assert min(outputs) >= 25 and max(outputs) <= 75 and len(set(outputs)) > 20
    assert plan.body(7) == plan.body(7)


def test_pictures_are_pictures() -> None:
    plan = PromptPlan(endpoint="chat", images=2, image_pixels=50, prompt_tokens=3)
    content = json.loads(plan.body(0))["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    data = [base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,")) for part in content[:2]]
    assert data[0] != data[1]
    for one in data:
        picture = Image.open(io.BytesIO(one))
        picture.load()
        assert (picture.size, picture.mode) == ((50, 50), "RGB") and len(set(picture.get_flattened_data())) > 20
    with pytest.raises(ValueError, match="images need the endpoint chat"):
        PromptPlan(images=1)


def test_a_mix_keeps_its_weights_and_a_trace_its_sizes() -> None:
    plans = [PromptPlan(name="a", weight=3.0, shared_prefix_tokens=6), PromptPlan(name="b", endpoint="chat", model="m")]
    mix = Mix(plans, seed=1, sizes=[(4, 9)])
    kinds = [mix.kind(index) for index in range(400)]
    assert 0.65 < kinds.count("a") / 400 < 0.85
    assert {mix.path(index) for index in range(400) if kinds[index] == "b"} == {"/v1/chat/completions"}
    first = json.loads(mix.body(0))
    text = first["prompt"] if "prompt" in first else first["messages"][0]["content"]
    assert (first["max_tokens"], len(text.split())) == (9, 4)
    assert json.loads(mix.body(1))["max_tokens"] == 64


async def test_kinds_and_the_course_of_a_load_are_in_the_row() -> None:
    plans = [PromptPlan(name="a", prompt_tokens=2), PromptPlan(name="b", endpoint="chat", prompt_tokens=2)]
    async with listening(lambda: NullProtocol(3)) as url:
        sender = RawSender(url)
        measured = await Drive(sender, Mix(plans, 0), Load(40, rate=400.0, warmup=2)).run()
        await sender.close()
    row = summarise(measured, Targets())
    kinds, line, curves = row["kinds"], row["timeline"], row["curves"]
    assert {kind: entry["requests"] for kind, entry in kinds.items()} == Counter(watch.kind for watch in measured.watches)  # type: ignore[attr-defined]
    assert sum(entry["completed"] for entry in kinds.values()) == 40  # type: ignore[attr-defined]
    assert sum(line["due"]) == sum(line["ended"]) == 40 and sum(line["failed"]) == 0 and len(line["due"]) <= 61  # type: ignore[index]
    assert len(curves["itl_ms"]) == len(CURVE_POINTS) and curves["ttft_ms"] == sorted(curves["ttft_ms"])  # type: ignore[index]


def test_it_stands_alone() -> None:
    code = (
        "import sys, service.loadgen.drive, service.loadgen.summary, service.loadgen.senders\n"
        "ours = {name.split('.')[1] for name in sys.modules if name.startswith('service.')}\n"
        "print(ours, sorted({'torch', 'httpx', 'pydantic', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'loadgen'} []"
