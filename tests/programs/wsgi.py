"""A WSGI application that holds a transaction open in the process that imports it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from held import use_the_pool, use_what_is_held


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    work = {"/pool": use_the_pool, "/held": use_what_is_held}[environ["PATH_INFO"]]
    body = json.dumps(work()).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
