"""The same sender over httpx: slower, but the client that most programs use; chosen with `--client httpx`.

It does not know loads or rows. Invariant: it reports to a watch exactly what the raw sender reports.
"""

from __future__ import annotations

import time

import httpx

from service.loadgen.senders import DETAIL_BYTES
from service.loadgen.watch import SendFailure, Watch


class HttpxSender:
    """A sender on httpx.AsyncClient. `url` is the server's, with or without `/v1`."""

    def __init__(self, url: str, api_key: str = "") -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, limits=limits, timeout=httpx.Timeout(None), trust_env=False
        )

    async def stream(self, path: str, body: bytes, watch: Watch) -> None:
        """POST `body`; see Sender."""
        headers = {"content-type": "application/json"}
        watch.sent_s = time.perf_counter()
        try:
            async with self._client.stream("POST", path, content=body, headers=headers) as response:
                if response.status_code != 200:
                    answer = (await response.aread())[:DETAIL_BYTES]
                    raise SendFailure(f"status_{response.status_code}", answer.decode("utf-8", "replace"))
                async for line in response.aiter_lines():
                    if line.startswith("data:") and not watch.event(line[5:].strip().encode(), time.perf_counter()):
                        return
        except httpx.ConnectError as error:
            raise SendFailure("connect", str(error)) from None
        except httpx.HTTPError as error:
            raise SendFailure("disconnected", str(error) or type(error).__name__) from None

    async def fetch(self, path: str) -> tuple[int, bytes]:
        """GET a document; see Sender."""
        try:
            response = await self._client.get(path)
        except httpx.HTTPError as error:
            raise SendFailure("connect", str(error)) from None
        return response.status_code, response.content

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()
