"""A TCP proxy before the server: it counts what each client sends, goes deaf, or resets a connection."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")

_RESETS_WHEN_CLOSED = struct.pack("ii", 1, 0)  # SO_LINGER


class Wire:
    """One connection through the proxy."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.client_port: int = client.getpeername()[1]
        self.server_port: int = server.getsockname()[1]
        """The port that the server knows it by."""
        self.sent = 0
        """Bytes that the client's processes have sent."""
        self.is_deaf = False
        self.has_ended = False


class TcpProxy:
    """Passes bytes on in a thread of its own, until `stop`.

    The methods take effect when no byte that was sent before waits to be read: a count taken after a
    process's answer has all that the process sent before it.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.wires: list[Wire] = []
        self._wakes, self._wake = os.pipe()
        self._calls: deque[tuple[Callable[[], Any], threading.Event, list[Any]]] = deque()
        self._is_stopped = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wakes, selectors.EVENT_READ, lambda: os.read(self._wakes, 4096))
        self._thread = threading.Thread(target=self._run, name="tcp proxy", daemon=True)
        self._thread.start()

    def settle(self) -> list[Wire]:
        """Return all wires, once all bytes sent so far have been passed on."""
        return self._call(lambda: list(self.wires))

    def forget(self) -> None:
        """End all wires and forget them."""

        def end_all() -> None:
            for wire in self.wires:
                self._end(wire)
            self.wires.clear()

        self._call(end_all)

    def deafen(self, wire: Wire) -> None:
        """Read nothing more on a wire, until `hear`."""

        def deafen() -> None:
            if not wire.has_ended and not wire.is_deaf:
                wire.is_deaf = True
                self._selector.unregister(wire.client)
                self._selector.unregister(wire.server)

        self._call(deafen)

    def hear(self, wire: Wire) -> None:
        """Pass on what a deaf wire has kept waiting."""

        def hear() -> None:
            if wire.is_deaf and not wire.has_ended:
                wire.is_deaf = False
                self._register(wire)

        self._call(hear)

    def reset(self, wire: Wire) -> None:
        """End a wire with a reset on both sides, as a firewall does."""
        self._call(lambda: self._end(wire, reset=True))

    def stop(self) -> None:
        self.forget()
        self._is_stopped = True
        os.write(self._wake, b"x")
        self._thread.join(10)
        self._selector.close()
        self._listener.close()
        os.close(self._wakes)
        os.close(self._wake)

    def _call(self, function: Callable[[], _T]) -> _T:
        done, answer = threading.Event(), []  # type: ignore[var-annotated]
        self._calls.append((function, done, answer))
        os.write(self._wake, b"x")
        assert done.wait(20), "the TCP proxy does not answer"
        result, error = answer
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    # -- in the thread

    def _run(self) -> None:
        while not self._is_stopped:
            ready = self._selector.select(0 if self._calls else None)
            for key, _ in ready:
                key.data()
            if not ready and self._calls:
                function, done, answer = self._calls.popleft()
                try:
                    answer.extend([function(), None])
                except Exception as error:
                    answer.extend([None, error])
                done.set()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self._server_port), 10)
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                each.settimeout(10)
            wire = Wire(client, server)
        except OSError:
            client.close()
            return
        self.wires.append(wire)
        self._register(wire)

    def _register(self, wire: Wire) -> None:
        self._selector.register(wire.client, selectors.EVENT_READ, lambda: self._from_client(wire))
        self._selector.register(wire.server, selectors.EVENT_READ, lambda: self._from_server(wire))

    def _from_client(self, wire: Wire) -> None:
        if wire.has_ended or wire.is_deaf:
            return  # by another event of the same round
        try:
            data = wire.client.recv(65536)
        except ConnectionResetError:
            self._end(wire, reset=True)
            return
        except OSError:
            data = b""
        wire.sent += len(data)
        self._pass_on(wire, wire.server, data)

    def _from_server(self, wire: Wire) -> None:
        if wire.has_ended or wire.is_deaf:
            return
        try:
            data = wire.server.recv(65536)
        except OSError:
            data = b""
        self._pass_on(wire, wire.client, data)

    def _pass_on(self, wire: Wire, to: socket.socket, data: bytes) -> None:
        if data:
            with contextlib.suppress(OSError):
                to.sendall(data)
                return
        self._end(wire)

    def _end(self, wire: Wire, reset: bool = False) -> None:
        if wire.has_ended:
            return
        wire.has_ended = True
        for each in (wire.client, wire.server):
            if not wire.is_deaf:
                self._selector.unregister(each)
            if reset:
                with contextlib.suppress(OSError):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESETS_WHEN_CLOSED)
            each.close()
