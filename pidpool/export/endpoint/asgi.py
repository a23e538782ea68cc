"""The endpoint as an ASGI 3 application: for FastAPI, Starlette, and servers such as uvicorn."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeAlias

from pidpool.export.endpoint.answers import Answer, Request

Scope: TypeAlias = "MutableMapping[str, Any]"
Receive: TypeAlias = "Callable[[], Awaitable[MutableMapping[str, Any]]]"
Send: TypeAlias = "Callable[[MutableMapping[str, Any]], Awaitable[None]]"


class AsgiApp:
    """An ASGI application. An object with a ``__call__``, by which servers know ASGI 3; a bound method
    they take for the ASGI of old."""

    def __init__(self, answer: Callable[[Request], Answer]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
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
    # The path has the prefix in it, if the server and the framework are not too old.
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


async def _live(receive: Receive, send: Send) -> None:
    """Take part in a server's starting and stopping: there is nothing to do."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
