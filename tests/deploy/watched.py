"""What a test asks of the service that Prometheus watches: load, and answers to queries."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from typing import Any

import httpx

PATIENCE_S = 60.0


class Watched:
    """A service and the Prometheus that scrapes it, by address."""

    def __init__(self, service: str, prometheus: str) -> None:
        self.service, self.prometheus = service, prometheus

    async def load(self, client: httpx.AsyncClient) -> None:
        """A handful of requests of every kind: streams, prompts that were seen before, one that is refused."""
        text = {
            "model": "tiny",
            "prompt": "the same words at the beginning of it all, again and again " * 2,
            "max_tokens": 12,
            "ignore_eos": True,
        }
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
        posts = [("completions", text), ("completions", {**text, "stream": True}), ("chat/completions", chat)]
        answers = await asyncio.gather(*(client.post(f"{self.service}/v1/{path}", json=body) for path, body in posts))
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        refused = await client.post(f"{self.service}/v1/completions", json={**text, "max_tokens": 10**6})
        assert refused.status_code == 400

    async def query(self, client: httpx.AsyncClient, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query that are numbers. A query that Prometheus refuses is a failure."""
        answer = (await client.get(f"{self.prometheus}/api/v1/query", params={"query": expression})).json()
        assert answer["status"] == "success", (expression, answer)
        return [row for row in answer["data"]["result"] if not math.isnan(float(row["value"][1]))]

    async def until_answered(self, expressions: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """Put load on the service until each query has returned data; what is still empty when patience ends is a failure."""
        waiting, found = set(expressions), dict[str, list[dict[str, Any]]]()
        ends_s = time.monotonic() + PATIENCE_S
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            await self._ready(client, ends_s)
            while waiting:
                assert time.monotonic() < ends_s, sorted(waiting)
                await self.load(client)
                for expression in sorted(waiting):
                    if rows := await self.query(client, expression):
                        found[expression] = rows
                        waiting.discard(expression)
                await asyncio.sleep(0.7)
        return found

    async def _ready(self, client: httpx.AsyncClient, ends_s: float) -> None:
        while time.monotonic() < ends_s:
            try:
                if (await client.get(f"{self.prometheus}/-/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)
        raise AssertionError("Prometheus does not become ready")
