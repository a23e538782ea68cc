"""The shop as a WSGI application: `/work/7` does piece of work 7."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import shop


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    _, page, *number = environ["PATH_INFO"].split("/")
    if page == "work":
        shop.work(int(number[0]))
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]
