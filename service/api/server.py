"""The server around the app: its address, uvicorn with the bounded connection and uvloop, signals, drain.

It does not know what is served. Invariants: a public address without a key is refused; on the first SIGTERM or Ctrl-C readiness turns
off and running answers get `drain_s` to end while probes are still answered; the second signal ends everything at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import ipaddress
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import uvicorn
import uvloop

from service.api.app import Application
from service.api.protocol import BoundedProtocol
from service.telemetry import log_event
from service.types.errors import StartupError
from service.types.settings import HttpSettings

KEEP_ALIVE_S = 75
CLOSE_S = 5
BACKLOG = 2048
SIGNALS = (signal.SIGTERM, signal.SIGINT)

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a program's main coroutine on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def check_exposure(settings: HttpSettings) -> None:
    """Raises StartupError when the address is public and nobody needs a key."""
    if not settings.api_keys and not settings.insecure and not _is_loopback(settings.host):
        raise StartupError(
            f"Listening on {settings.host} would let anyone call without a key; set --api_key (or DEEPSEEK_API_KEY), or --insecure."
        )


def bind(settings: HttpSettings) -> socket.socket:
    """A listening socket on the address of the settings; port 0 takes a free one. Raises StartupError."""
    check_exposure(settings)
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError:
        raise StartupError(f"{settings.host} is not an address of this machine; set --host.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as failure:
        listener.close()
        reason = "is in use by another program" if failure.errno == errno.EADDRINUSE else "cannot be listened on"
        raise StartupError(f"Port {settings.port} on {settings.host} {reason}; choose another with --port.") from None
    return listener


class HttpServer(uvicorn.Server):
    """uvicorn without its own signals: `serve` below handles them. `accepting` is set once connections are accepted."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self.accepting.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def build_server(app: Application) -> HttpServer:
    """uvicorn around the app, silent: this program writes its own log."""
    protocol: Any = functools.partial(BoundedProtocol, limits=app.services.settings.limits)
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_S,
    )
    return HttpServer(config)


async def serve(app: Application, listener: socket.socket, started: Callable[[], None] | None = None) -> None:
    """Serve until a signal, then drain and return. `started` is called when connections are accepted."""
    server = build_server(app)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stopping.is_set():
            log_event("stop_now")
            server.should_exit = server.force_exit = True
        stopping.set()

    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        await _first(serving, server.accepting)
        if started is not None and server.started:
            started()
        await _first(serving, stopping)
        if not serving.done():
            await _drain(app, server)
        await serving
    finally:
        stopping.set()
        for number in SIGNALS:
            loop.remove_signal_handler(number)


async def _first(serving: asyncio.Future[None], event: asyncio.Event) -> None:
    """Wait until the event is set or the server has ended."""
    waiting: asyncio.Future[Any] = asyncio.ensure_future(event.wait())
    either: set[asyncio.Future[Any]] = {serving, waiting}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


async def _drain(app: Application, server: HttpServer) -> None:
    """Readiness off, running answers to their end or to the deadline, probes answered meanwhile; a second signal cuts it short."""
    services = app.services
    services.draining = True
    log_event("draining", seconds=services.settings.drain_s)
    draining = asyncio.ensure_future(services.router.drain(services.settings.drain_s))
    while not draining.done() and not server.force_exit:
        await asyncio.wait({draining}, timeout=0.05)
    draining.cancel()
    await asyncio.gather(draining, return_exceptions=True)
    server.should_exit = True


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
