"""As much of HTTP/1 as the endpoint needs: the head of a request in bytes, and an answer in bytes."""

from __future__ import annotations

import re
from http import HTTPStatus
from urllib.parse import unquote, urlsplit

from pidpool.export.endpoint.answers import Answer, Request

HEAD_LIMIT = 16 * 1024
"""Bytes that a request line and its headers may take together."""

_REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.[0-9]")
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_ONCE = ("host", "authorization")


class BadRequest(Exception):
    """The received bytes are not the head of an HTTP/1 request; the message names the fault."""


def is_whole(received: bytes) -> bool:
    """Return whether a request's head has arrived completely."""
    return b"\r\n\r\n" in received


def read_head(received: bytes) -> Request:
    """Return the request whose head was received.

    :raises BadRequest: if the bytes are not such a head.
    """
    head = received[: received.index(b"\r\n\r\n")].decode("latin-1")
    line, *fields = head.split("\r\n")
    matched = _REQUEST_LINE.fullmatch(line)
    if matched is None:
        raise BadRequest("the first line is not 'METHOD /path HTTP/1.1'")
    method, target = matched.groups()
    headers: dict[str, str] = {}
    for each in fields:
        name, colon, value = each.partition(":")
        if not colon or not _FIELD_NAME.fullmatch(name) or _CONTROL.search(value):
            raise BadRequest("a header line is not 'Name: value'")
        name = name.lower()
        if name in headers and name in _ONCE:
            raise BadRequest(f"the header {name} appears twice")
        headers[name] = f"{headers[name]}, {value.strip()}" if name in headers else value.strip()
    path, host = target.partition("?")[0].partition("#")[0], headers.get("host")
    if not target.startswith("/"):
        # A target as for a proxy, ``http://host/path``: its host counts, not the Host header's
        # (RFC 9112, 3.2.2).
        try:
            parts = urlsplit(target)
        except ValueError:
            raise BadRequest("the target is not a URL") from None
        if parts.scheme:
            path, host = parts.path or "/", parts.netloc
    return Request(
        method=method,
        path=unquote(path),
        host=host,
        authorization=headers.get("authorization", ""),
        accept=headers.get("accept", ""),
    )


def bad_request(error: BadRequest) -> Answer:
    """Return the answer to a head that could not be read."""
    return Answer.text(HTTPStatus.BAD_REQUEST, f"This is not an HTTP/1 request: {error}.")


def head_too_large() -> Answer:
    """Return the answer to a head that is longer than `HEAD_LIMIT`."""
    return Answer.text(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        f"The request's headers take more than {HEAD_LIMIT} bytes; send fewer.",
    )


def in_bytes(answer: Answer, *, body: bool) -> bytes:
    """Return an answer as the bytes to send; the connection ends after them."""
    lines = [f"HTTP/1.1 {answer.status.value} {answer.status.phrase}"]
    lines += [f"{name}: {value}" for name, value in [*answer.headers, ("Connection", "close")]]
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    return head + answer.body if body else head
