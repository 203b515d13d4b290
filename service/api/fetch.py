"""Fetch a file from a host that the operator listed: the one place that makes requests for a client.

It does not know what the bytes are. Invariants: only listed hosts; the address that is connected to was checked (public, unless the
operator listed that very address); no redirects, no credentials, bounded in size and in time as a whole.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import h11

from service.types.errors import InvalidRequest

_PORTS = {"http": 80, "https": 443}
_READ_BYTES = 1 << 16
# Addresses that embed another one, which may be private.
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")


class _Refused(Exception):
    """Why there are no bytes, as the end of a sentence about the URL."""


@dataclass(frozen=True, slots=True)
class _Target:
    """Where to connect, checked, and what to ask there."""

    address: str
    port: int
    host: str
    secure: bool
    path: str

    @property
    def host_header(self) -> str:
        """The host as the request names it."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == _PORTS["https" if self.secure else "http"] else f"{name}:{self.port}"


class Fetcher:
    """Fetches from `hosts` only, each `host` (its scheme's port) or `host:port`. Without hosts, nothing is fetched."""

    def __init__(self, hosts: Sequence[str], seconds: float, most_bytes: int) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._seconds = seconds
        self._most_bytes = most_bytes

    async def fetch(self, url: str, param: str) -> bytes:
        """The body of one GET. Raises InvalidRequest naming `param`."""
        try:
            async with asyncio.timeout(self._seconds):
                return await self._get(await self._resolve(url))
        except TimeoutError:
            why = f"did not answer within {self._seconds:g} seconds"
        except _Refused as refusal:
            why = str(refusal)
        except (OSError, ssl.SSLError, h11.RemoteProtocolError, asyncio.IncompleteReadError):
            why = "could not be read"
        raise InvalidRequest(f"`{param}`: the address {why}.", param=param)

    async def _resolve(self, url: str) -> _Target:
        parts, host, port = _split(url)
        allowed = {f"{host}:{port}"} | ({host} if port == _PORTS[parts.scheme] else set())
        if not allowed & self._hosts:
            raise _Refused("is not on a host that this server may fetch from; send the image as a data URL")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        for *_, place in await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM):
            address = str(place[0])
            if address == host or _is_public(address):
                return _Target(address, port, host, parts.scheme == "https", path)
        raise _Refused("leads into a private network")

    async def _get(self, target: _Target) -> bytes:
        context = ssl.create_default_context() if target.secure else None
        name = target.host if target.secure else None
        reader, writer = await asyncio.open_connection(target.address, target.port, ssl=context, server_hostname=name)
        try:
            connection = h11.Connection(h11.CLIENT)
            headers = [("host", target.host_header), ("user-agent", "deepseek-service"), ("accept", "image/*"), ("connection", "close")]
            for event in (h11.Request(method="GET", target=target.path, headers=headers), h11.EndOfMessage()):
                writer.write(connection.send(event) or b"")
            return await self._body(connection, reader)
        finally:
            writer.close()

    async def _body(self, connection: h11.Connection, reader: asyncio.StreamReader) -> bytes:
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_READ_BYTES))
            elif isinstance(event, h11.Response):
                if event.status_code != 200:
                    raise _Refused(f"answered with status {event.status_code}")
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self._most_bytes:
                    raise _Refused(f"has more than {self._most_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body)


def _split(url: str) -> tuple[SplitResult, str, int]:
    """The parts of an http(s) URL, its host and its port. Raises _Refused."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _Refused("is not a URL") from None
    host = (parts.hostname or "").lower()
    if parts.scheme not in _PORTS or not host or parts.username is not None or parts.password is not None:
        raise _Refused("is not an http(s) URL without credentials")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise _Refused("is not a URL in printable ASCII")
    return parts, host, _PORTS[parts.scheme] if port is None else port


def _is_public(address: str) -> bool:
    """Whether the address belongs to the open internet, an IPv4 address in IPv6 clothes judged by itself."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _TRANSLATED or ip.sixtofour is not None or ip.teredo is not None:
            return False
        ip = ip.ipv4_mapped or ip
    return ip.is_global and not ip.is_multicast
