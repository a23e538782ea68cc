"""The endpoint as an ASGI 3 application: for FastAPI, Starlette, and servers such as uvicorn."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeAlias

from pidpool.export.endpoint.answers import Answer, Request

Scope: TypeAlias = "MutableMapping[str, Any]"
Receive: TypeAlias = "Callable[[], Awaitable[MutableMapping[str, Any]]]"
Send: TypeAlias = "Callable[[MutableMapping[str, Any]], Awaitable[None]]"


class AsgiApp:
    """An ASGI application: an object with a ``__call__``, since servers take a bound method for ASGI 2."""

    def __init__(self, answer: Callable[[Request], Answer]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _complete_lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        else:
            answer = self._answer(_request(scope))
            headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in answer.headers]
            await send({"type": "http.response.start", "status": answer.status.value, "headers": headers})
            body = b"" if scope["method"] == "HEAD" else answer.body
            await send({"type": "http.response.body", "body": body})


def _request(scope: Mapping[str, Any]) -> Request:
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    path, prefix = scope["path"], scope.get("root_path", "").rstrip("/")
    # The path includes the prefix, unless the server or the framework is an old one.
    if prefix and (path == prefix or path.startswith(f"{prefix}/")):
        path = path[len(prefix) :]
    return Request(
        method=scope["method"],
        path=path,
        prefix=prefix,
        host=headers.get("host"),
        authorization=headers.get("authorization", ""),
        accept=headers.get("accept", ""),
    )


async def _complete_lifespan(receive: Receive, send: Send) -> None:
    """Confirm a server's start and stop; the endpoint needs neither."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
