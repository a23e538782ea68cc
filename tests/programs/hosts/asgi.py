"""The shop as an ASGI application: `/work/7` does piece of work 7, in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import shop


async def application(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        shop.end()
        await send({"type": "lifespan.shutdown.complete"})
        return
    _, page, *number = scope["path"].split("/")
    status = 200
    if page == "work":
        try:
            await asyncio.to_thread(shop.work, int(number[0]))
        except Exception:
            status = 500
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"2")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})
