"""`serve_stats`: an HTTP server for the endpoint, in one daemon thread, beside an application that has none.

This server is the project's own, for a process that forks. waitress 3.0 was tried in its place. With it
these tests of hostile clients fail (tests/export/test_serve_stats.py): a client that sends a byte now and
then is never dropped, since each byte renews its time; when clients take all connections, a new one waits,
and does not push the oldest out; without a free descriptor it spins on accept, with a whole processor and
100,000 log lines a second; a URL for another host in the request line passes the guard against DNS
rebinding. And a child would have to close its sockets past its own `close()`, which takes locks that the
fork may have copied locked.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pidpool.export.endpoint import http1
from pidpool.export.endpoint.app import StatsApp
from pidpool.forks import detection
from pidpool.terms import Trigger

if TYPE_CHECKING:
    from pidpool.export.pools import Source

PORT = 9432
"""The port of `serve_stats` if none is named."""

CLIENTS = 32
"""Connections served at a time; the oldest is dropped for one more."""

CLIENT_SECONDS = 5.0
"""Seconds that a client has for its whole request and for taking the answer."""

SHARE = 0.1
"""The part of one processor's time that the thread takes at most, however many requests there are."""


def serve_stats(
    *sources: Source,
    host: str = "127.0.0.1",
    port: int = PORT,
    token: str | None = None,
    allowed_hosts: Iterable[str] = (),
) -> StatsServer:
    """Serve a `StatsApp` from a daemon thread of this process, and return at once.

    For an application without a web server of its own, such as a Celery worker; its parent process
    serves for all its children. A forked child does not serve: it closes its copy of the listener, and may
    call this again for a port of its own. Slow, broken and too many clients are dropped, and the
    thread takes at most a tenth of one processor's time. There is no TLS: a proxy can add it.

    :param sources: as for `StatsApp`; so are ``token`` and ``allowed_hosts``.
    :param host: the address to listen on. If other machines can reach it, give a token too.
    :param port: the port to listen on; 0 for any free one, which ``.port`` then names.
    :raises OSError: if listening on the address fails, for example because it is taken.
    :raises ValueError: if the port is out of range, or the token has characters that can't be sent.
    """
    if not isinstance(allowed_hosts, str):
        allowed_hosts = [*allowed_hosts, _in_url(host)]
    app = StatsApp(*sources, token=token, allowed_hosts=allowed_hosts)
    return StatsServer(app, _listen(host, port), host)


class StatsServer:
    """A running server, returned by `serve_stats`; can be used in a ``with`` statement."""

    def __init__(self, app: StatsApp, listener: socket.socket, host: str) -> None:
        self.host = host
        self.port: int = listener.getsockname()[1]
        self._app = app
        self._pid = os.getpid()
        self._listener = listener
        self._wake, self._waker = socket.socketpair()
        self._clients: dict[socket.socket, _Client] = {}  # oldest first
        # poll() and not epoll: the kernel would share its registrations with forked children.
        self._selector = selectors.PollSelector()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="pidpool-stats", daemon=True)
        _servers.append(self)
        try:
            self._thread.start()
        except BaseException:
            self._close_sockets()
            raise

    def __repr__(self) -> str:
        state = "closed" if self not in _servers else f"serving {self.url}"
        return f"<StatsServer {state}>"

    @property
    def url(self) -> str:
        """The address of the page."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{_in_url(host)}:{self.port}/"

    def close(self) -> None:
        """Stop serving; waits a few seconds at most. Does nothing the second time, or in a child."""
        if os.getpid() != self._pid or self not in _servers:
            return
        self._closing.set()
        try:
            self._waker.send(b"\0")
        except OSError:
            pass
        if threading.current_thread() is not self._thread:
            self._thread.join(CLIENT_SECONDS)
        self._close_sockets()

    def __enter__(self) -> StatsServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _close_sockets(self) -> None:
        """Close all sockets; a child closes only its own copies."""
        if self in _servers:
            _servers.remove(self)
        for each in [self._listener, self._wake, self._waker, *self._clients]:
            try:
                each.close()
            except OSError:
                pass

    # -- in the thread

    def _serve(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        while not self._closing.is_set():
            began = time.thread_time()
            wait = self._seconds_until_the_next_deadline()
            for key, _ in self._selector.select(wait):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.data is not None:
                    self._advance(key.data)
            now = time.monotonic()
            for client in [client for client in self._clients.values() if client.deadline <= now]:
                self._drop(client)
            # Rest in proportion to the work: a flood of requests must not cost the application more.
            self._closing.wait(min(1.0, (time.thread_time() - began) * (1 / SHARE - 1)))

    def _seconds_until_the_next_deadline(self) -> float | None:
        if not self._clients:
            return None
        return max(0.0, min(client.deadline for client in self._clients.values()) - time.monotonic())

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._closing.wait(0.2)  # otherwise the listener would be ready again at once
            return
        accepted.setblocking(False)
        if len(self._clients) >= CLIENTS:
            self._drop(next(iter(self._clients.values())))
        client = self._clients[accepted] = _Client(accepted)
        self._selector.register(accepted, selectors.EVENT_READ, client)

    def _advance(self, client: _Client) -> None:
        try:
            events = client.advance(self._app)
        except (BlockingIOError, InterruptedError):
            return
        except Exception:  # the client failed, or no memory for the answer; other clients go on
            events = 0
        if events:
            self._selector.modify(client.socket, events, client)
        else:
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.socket, None) is not None:
            self._selector.unregister(client.socket)
            try:
                client.socket.shutdown(socket.SHUT_RDWR)  # a child forked a moment ago may have it too
            except OSError:
                pass
            client.socket.close()


class _Client:
    """One connection: a request is read, answered, and the connection ended."""

    def __init__(self, accepted: socket.socket) -> None:
        self.socket = accepted
        self.deadline = time.monotonic() + CLIENT_SECONDS
        self._received = b""
        self._to_send: bytes | None = None
        self._ended = False

    def advance(self, app: StatsApp) -> int:
        """Read or send as much as is possible without waiting; return the next events, 0 for the end."""
        if self._ended:
            return selectors.EVENT_READ if self.socket.recv(65536) else 0
        if self._to_send is None:
            chunk = self.socket.recv(http1.HEAD_LIMIT)
            if not chunk:
                return 0
            self._received += chunk
            self._to_send = self._answer(app)
            if self._to_send is None:
                return selectors.EVENT_READ
        self._to_send = self._to_send[self.socket.send(self._to_send) :]
        if self._to_send:
            return selectors.EVENT_WRITE
        # Then read on until the client ends its side: a close with unread bytes resets the
        # connection, and the client could lose the answer.
        self.socket.shutdown(socket.SHUT_WR)
        self._ended = True
        return selectors.EVENT_READ

    def _answer(self, app: StatsApp) -> bytes | None:
        head = self._received[: http1.HEAD_LIMIT]
        if not http1.is_whole(head):
            too_large = len(self._received) >= http1.HEAD_LIMIT
            return http1.in_bytes(http1.head_too_large(), body=True) if too_large else None
        try:
            request = http1.read_head(head)
        except http1.BadRequest as error:
            return http1.in_bytes(http1.bad_request(error), body=True)
        return http1.in_bytes(app.answer(request), body=request.method != "HEAD")


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:  # getaddrinfo() takes it modulo 65536
        raise ValueError(f"port={port!r}: takes 1 to 65535, or 0 for any free one")
    shown = f"{_in_url(host)}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(error.errno, f"can't serve stats on {shown}: {error}") from error
    try:
        # For a quick restart: old connections may still be in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(CLIENTS)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        message = f"can't serve stats on {shown}: {error}"
        if error.errno == errno.EADDRINUSE:
            message = (
                f"can't serve stats on {shown}: port {port} is taken by another process, or by an earlier "
                "serve_stats() of this one; name another with port=, or port=0 for any free one"
            )
        raise OSError(error.errno, message) from error
    return listener


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


_servers: list[StatsServer] = []


def _close_in_child(trigger: Trigger, connects_in_flight: int) -> None:
    while _servers:
        _servers.pop()._close_sockets()


detection.register_child_callback(_close_in_child)
detection.register_urgency_check(lambda: bool(_servers))
