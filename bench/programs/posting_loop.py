"""A bare loop that posts: aiohttp or httpx, as many workers as connections, no ledger and no order.

One argument, JSON: ``library``, ``requests`` (file, one request a line), ``connections``, ``deadline`` (seconds),
``rate`` (a second; 0: as fast as it goes). What fails goes to the end of the line. Waits for a line on standard input
after ``ready``, prints when it began (steady seconds) and, at the end, ``done``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import httpx
import uvloop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Post = Callable[[str, dict[str, str], bytes], Awaitable[int]]


async def run(given: dict[str, Any], texts: list[str]) -> None:
    """Post everything."""
    line: deque[tuple[float, str, dict[str, str], bytes]] = deque()
    rate = given["rate"]
    for number, text in enumerate(texts):
        request = json.loads(text)
        line.append((number / rate if rate else 0.0, request["url"], request["headers"], request["body"].encode()))
    left = len(line)
    began = 0.0

    async def work(post: Post) -> None:
        nonlocal left
        while left:
            if not line:
                await asyncio.sleep(0.005)
                continue
            due, url, headers, body = line.popleft()
            wait = began + due - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            if await post(url, headers, body) == 201:
                left -= 1
            else:
                line.append((0.0, url, headers, body))

    async def all_work(post: Post) -> None:
        nonlocal began
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.monotonic()
        print(began, flush=True)
        await asyncio.gather(*(work(post) for _ in range(given["connections"])))
        print("done", flush=True)

    await {"aiohttp": with_aiohttp, "httpx": with_httpx}[given["library"]](given, all_work)


async def with_aiohttp(given: dict[str, Any], all_work: Callable[[Post], Awaitable[None]]) -> None:
    """One session."""
    connector = aiohttp.TCPConnector(limit=given["connections"])
    timeout = aiohttp.ClientTimeout(total=given["deadline"])
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def post(url: str, headers: dict[str, str], body: bytes) -> int:
            try:
                async with session.post(url, data=body, headers=headers) as response:
                    await response.read()
                    return response.status
            except (TimeoutError, aiohttp.ClientError):
                return 0

        await all_work(post)


async def with_httpx(given: dict[str, Any], all_work: Callable[[Post], Awaitable[None]]) -> None:
    """One client with its own transport."""
    limits = httpx.Limits(max_connections=given["connections"], max_keepalive_connections=given["connections"])
    async with httpx.AsyncClient(limits=limits, timeout=given["deadline"], trust_env=False) as client:

        async def post(url: str, headers: dict[str, str], body: bytes) -> int:
            try:
                return (await client.post(url, content=body, headers=headers)).status_code
            except httpx.HTTPError:
                return 0

        await all_work(post)


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    uvloop.run(run(chosen, Path(chosen["requests"]).read_text("utf-8").splitlines()))
