"""`StatsApp`: the routes and answers of the endpoint, as a WSGI application; for ASGI see asgi.py."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from http import HTTPStatus
from importlib import resources
from typing import TYPE_CHECKING
from urllib.parse import quote

from pidpool.export.endpoint.answers import Answer, Request
from pidpool.export.endpoint.asgi import AsgiApp
from pidpool.export.endpoint.guards import HostGuard, TokenGuard
from pidpool.export.families import Families
from pidpool.stats.snapshots import BOUNDS
from pidpool.terms import OPEN_STATES

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from pidpool.export.pools import Source

_PAGE = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_METHODS = ("GET", "HEAD")

_log = logging.getLogger("pidpool")


class StatsApp:
    """A small web application that shows the stats of pools; mount it in another one.

    It is a WSGI application itself, and its `asgi` is one for ASGI 3; `mount` puts it beside a WSGI
    application of any framework. All links on its page are relative, so any prefix will do.

    ================ =========================================================================
    ``/``            a page for people: the family as a tree, live
    ``/stats.json``  the same in numbers: ``{"answered_by": pid, "bounds": [...],
                     "open_states": [...], "pools": [...]}``: each pool as
                     `FamilyStats.to_dict`, the bounds of its histograms, the states at the
                     fork that count as leaks
    ``/metrics``     for Prometheus, in its own format or OpenMetrics, as the scraper asks
    ``/healthz``     ``ok``, for every client: neither host nor token is checked
    ================ =========================================================================

    Every process of a family answers for the whole family. A family is the process that made the
    engine and all its forks after that: workers that each make an engine of their own (gunicorn without
    ``--preload``) are as many families, and each answers for itself alone. An answer is read from memory:
    it opens no connection, waits for none, and never raises. Only GET and HEAD are answered; nothing can
    be changed. May be called in any thread, and in forked children.

    :param sources: one or more engines, async engines or pools.
    :param token: the bearer token without which ``/stats.json`` and ``/metrics`` are refused. The
        page, which holds no figures itself, asks for it, or takes it from a URL that ends in
        ``#token=...``, a part that browsers send to no server.
    :param allowed_hosts: host names, without ports, for which requests are answered besides
        localhost, 127.0.0.1 and [::1]: a guard against DNS rebinding. An application known by a
        name of its own has to give that name here. ``["*"]`` for all, if a proxy or the
        application itself checks the Host header.
    :raises TypeError: if a source is neither a `PidPool` nor an engine with one.
    :raises ValueError: if the token has characters that a bearer token may not have.
    """

    def __init__(self, *sources: Source, token: str | None = None, allowed_hosts: Iterable[str] = ()) -> None:
        self._families = Families(sources)
        self._hosts = HostGuard(allowed_hosts)
        self._tokens = TokenGuard(token)
        # Everything is imported and read now: a fork while another thread imports would leave the
        # child with half a module.
        files = resources.files(__package__)
        self._page = {path: files.joinpath(name).read_bytes() for path, (name, _) in _PAGE.items()}
        self._expose: Callable[..., tuple[bytes, str]] | None
        try:
            from pidpool.export.prometheus import expose
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "prometheus_client":
                raise
            self._expose = None
        else:
            self._expose = expose
        self.asgi = AsgiApp(self.answer)

    # -- routes

    def answer(self, request: Request) -> Answer:
        """Return the answer to a request; never raises."""
        try:
            return self._answer(request)
        except Exception as error:
            _log.exception("the stats endpoint could not answer %r", request.path)
            return Answer.text(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                f"The stats could not be read ({type(error).__name__}); the log of pid {os.getpid()} has "
                "the traceback.",
            )

    def _answer(self, request: Request) -> Answer:
        if request.method not in _METHODS:
            return Answer.text(
                HTTPStatus.METHOD_NOT_ALLOWED,
                "This endpoint is read-only; use GET or HEAD.",
                Allow=", ".join(_METHODS),
            )
        if request.path == "/healthz":
            return Answer.text(HTTPStatus.OK, "ok")
        refusal = self._hosts.refusal(request)
        if refusal is not None:
            return refusal
        if request.path == "" and request.prefix:
            # Relative links need the slash. A relative redirect also holds behind a proxy that has
            # taken part of the prefix off.
            there = quote(request.prefix.rsplit("/", 1)[-1])
            return Answer.text(
                HTTPStatus.PERMANENT_REDIRECT, "The page's address ends in a slash.", Location=f"./{there}/"
            )
        path = request.path or "/"
        if path in _PAGE:
            return Answer(HTTPStatus.OK, self._page[path], _PAGE[path][1])
        if path == "/stats.json":
            return self._tokens.refusal(request) or self._stats()
        if path == "/metrics":
            return self._tokens.refusal(request) or self._metrics(request)
        return Answer.text(
            HTTPStatus.NOT_FOUND,
            "There is nothing at this path; the endpoint has /, /stats.json, /metrics and /healthz.",
        )

    def _stats(self) -> Answer:
        stats = {
            "answered_by": os.getpid(),
            "bounds": BOUNDS,
            "open_states": OPEN_STATES,
            "pools": [family.to_dict() for family in self._families.snapshots()],
        }
        body = json.dumps(stats, separators=(",", ":")).encode()
        return Answer(HTTPStatus.OK, body, "application/json")

    def _metrics(self, request: Request) -> Answer:
        if self._expose is None:
            return Answer.text(
                HTTPStatus.NOT_IMPLEMENTED,
                "The package prometheus-client is not installed in the application's environment: "
                "pip install 'pidpool[endpoint]'",
            )
        body, content_type = self._expose(self._families.snapshots(), request.accept)
        return Answer(HTTPStatus.OK, body, content_type)

    # -- WSGI

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Answer a request, as a WSGI application does."""
        answer = self.answer(
            Request(
                method=environ["REQUEST_METHOD"],
                path=environ.get("PATH_INFO", ""),
                prefix=environ.get("SCRIPT_NAME", "").rstrip("/").encode("latin-1").decode(errors="replace"),
                host=environ.get("HTTP_HOST"),
                authorization=environ.get("HTTP_AUTHORIZATION", ""),
                accept=environ.get("HTTP_ACCEPT", ""),
            )
        )
        start_response(f"{answer.status.value} {answer.status.phrase}", answer.headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [answer.body]

    def mount(self, application: WSGIApplication, prefix: str) -> WSGIApplication:
        """Return a WSGI application: this one under `prefix`, `application` for all other paths.

        :param prefix: as ``/pidpool``.
        :raises ValueError: if the prefix does not begin with a slash, or is only a slash.
        """
        prefix = prefix.rstrip("/")
        if not prefix.startswith("/"):
            raise ValueError(f"prefix={prefix!r}: takes a path below the root, as '/pidpool'")
        prefix = prefix.encode().decode("latin-1")  # as WSGI passes paths

        def mounted(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            if path != prefix and not path.startswith(f"{prefix}/"):
                return application(environ, start_response)
            script_name = environ.get("SCRIPT_NAME", "") + prefix
            below = {**environ, "SCRIPT_NAME": script_name, "PATH_INFO": path[len(prefix) :]}
            return self(below, start_response)

        return mounted
