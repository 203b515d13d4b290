"""Who may call: API keys, and which origins a browser may call from. The one place that checks a key.

It does not know routing beyond the path that routing itself uses. Invariants: keys are compared as digests in constant time and all of them
are compared; an origin is allowed only when it is listed or is this server itself, addressed by number, localhost or its own name.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from service.types.errors import OriginRefused, Unauthorized
from service.types.settings import HttpSettings

OPEN_PATHS = frozenset({"/health", "/live", "/ready"})
METRICS_PATH = "/metrics"
PREFLIGHT_SECONDS = b"600"

Headers = Mapping[bytes, bytes]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class KeyRing:
    """The accepted API keys. Empty: everyone may call."""

    def __init__(self, keys: Sequence[str], metrics_key: bool = False) -> None:
        self._digests = [_digest(key.encode()) for key in keys]
        self._open = OPEN_PATHS if metrics_key else OPEN_PATHS | {METRICS_PATH}

    def check(self, path: str, headers: Headers) -> str:
        """The caller's name for fair shares and logs ("" when the server is open or the path is). Raises Unauthorized."""
        if not self._digests or path in self._open:
            return ""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        digest = _digest(given.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise Unauthorized("The API key is missing or wrong; send it as `Authorization: Bearer KEY`.")
        return f"key-{digest.hex()[:8]}"


class OriginRule:
    """Which `Origin` headers are accepted, and the headers that answer them. Credentials are never allowed across origins."""

    def __init__(self, settings: HttpSettings) -> None:
        self._listed = frozenset(settings.allowed_origins)
        self._own_names = frozenset({"localhost", settings.host})

    def check(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """Headers to add to the response. Raises OriginRefused."""
        given = headers.get(b"origin")
        if given is None:
            return []
        origin = given.decode("latin-1")
        if "*" in self._listed:
            return [(b"access-control-allow-origin", b"*"), *_EXPOSED]
        if origin in self._listed:
            return [(b"access-control-allow-origin", given), (b"vary", b"Origin"), *_EXPOSED]
        if self._is_own(origin, headers.get(b"host", b"").decode("latin-1")):
            return []
        raise OriginRefused("Requests from this web origin are not allowed; list it with --allowed_origins.")

    def _is_own(self, origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
            name = parts.hostname or ""
        except ValueError:
            return False
        return bool(host) and parts.netloc == host and (name in self._own_names or _is_address(name))


_EXPOSED = ((b"access-control-expose-headers", b"x-request-id, x-model-version, retry-after"),)


def preflight_headers(allowed: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The answer to a preflight request from an allowed origin."""
    return [
        *allowed,
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, content-type"),
        (b"access-control-max-age", PREFLIGHT_SECONDS),
    ]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
