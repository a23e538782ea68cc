"""A request and its answer, the same for WSGI, for ASGI and for the server of `serve_stats`."""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus

PLAIN = "text/plain; charset=utf-8"

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class Request:
    """The parts of a request that the endpoint reads."""

    method: str
    path: str
    """Below the prefix under which the endpoint is mounted."""
    prefix: str = ""
    """The path under which the endpoint is mounted, as ``/stats``; empty at the root."""
    host: str | None = None
    """The Host header."""
    authorization: str = ""
    accept: str = ""


@dataclass(frozen=True)
class Answer:
    """A whole answer; nothing is streamed."""

    status: HTTPStatus
    body: bytes
    content_type: str = PLAIN
    more_headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def text(cls, status: HTTPStatus, message: str, **headers: str) -> Answer:
        """Return a message for people; `headers` with ``_`` for ``-``."""
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, f"{message}\n".encode(), PLAIN, more)

    @property
    def headers(self) -> list[tuple[str, str]]:
        """All headers, including those that restrict what a browser does with the answer."""
        own = {"Content-Type": self.content_type, "Content-Length": str(len(self.body))}
        return list({**own, **_HEADERS, **self.more_headers}.items())
