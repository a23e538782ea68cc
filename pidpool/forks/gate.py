"""`ConnectGate`: keeps a fork and a connect from happening at the same time, for a bounded while.

If another thread is connecting at a fork, the child has OpenSSL's global locks held for ever: its own first
TLS connect would hang, and no lock of pidpool's could be replaced to cure that.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

CONNECT_WAIT = 5.0
"""Seconds that a fork waits at most for the connects in flight in other threads. A new connect waits at most
twice as long for a fork to be over."""

_POLL = 0.001

Fork = tuple[int, int]
"""A fork that is under way, by its thread and by the `id` of the frame that forks: two threads may fork at a
time, and a signal handler may fork in the middle of another fork's hooks."""


class Passage:
    """One connect on its way through the gate. It is over at the latest when this object goes, so that no
    interrupt can leave it there."""

    __slots__ = ("thread", "__weakref__")

    def __init__(self) -> None:
        self.thread: int | None = threading.get_ident()
        """None once the connect is over."""


class ConnectGate:
    """The gate of one process. A forked child makes a new one.

    It has no lock, which an exception from a signal handler, or a fork, could leave locked. A connect and a
    fork that begin at the same time each say so before they look for the other, and the connect gives way.
    """

    def __init__(self) -> None:
        self.connecting: dict[int, weakref.ref[Passage]] = {}
        """The connects in flight, by `id()`; perhaps with some that were interrupted."""
        self.forking: set[Fork] = set()
        """The forks that are under way."""

    def enter_connect(self, passage: Passage) -> None:
        """Wait until no other thread is forking; called before a connection is opened."""
        thread = threading.get_ident()
        self.connecting[id(passage)] = weakref.ref(passage)
        # A thread that connects or forks already must not wait: the fork may be waiting for it.
        if self.forking and thread not in self._forking_threads() and self._threads().count(thread) == 1:
            passage.thread = None
            _wait_until(lambda: not self.forking, 2 * CONNECT_WAIT)
            passage.thread = thread

    def leave_connect(self, passage: Passage) -> None:
        """Note that the connection is open and its connect events have run, or that it failed."""
        passage.thread = None
        self.connecting.pop(id(passage), None)

    def before_fork(self, fork: Fork) -> None:
        """Wait until no other thread is connecting; a thread that forks itself does not count."""
        self.forking.add(fork)
        # Two threads that fork while connecting don't wait for each other.
        _wait_until(lambda: not self.in_flight(fork[0]), CONNECT_WAIT)

    def after_fork_in_parent(self, fork: Fork) -> None:
        """Let new connects in. A second call does nothing."""
        self.forking.discard(fork)

    def in_flight(self, thread: int) -> int:
        """Return how many connects other threads have in flight."""
        forking = self._forking_threads()
        return sum(other != thread and other not in forking for other in self._threads())

    def _forking_threads(self) -> set[int]:
        return {thread for thread, _ in list(self.forking)}

    def _threads(self) -> list[int]:
        found = []
        for key, reference in list(self.connecting.items()):
            passage = reference()
            if passage is None:
                if self.connecting.get(key) is reference:
                    self.connecting.pop(key, None)
            elif passage.thread is not None:
                found.append(passage.thread)
        return found


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL)
