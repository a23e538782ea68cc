"""`ConnectGate`: keeps a fork and a connect from happening at the same time, for a bounded while.

If another thread is connecting at a fork, the child has OpenSSL's global locks held for ever: its own first
TLS connect would hang, and no lock of pidpool's could be replaced to cure that.
"""

from __future__ import annotations

import threading

CONNECT_WAIT = 5.0
"""Seconds that a fork waits at most for the connects in flight in other threads. A new connect waits at most
twice as long for a fork to be over."""


class ConnectGate:
    """The gate of one process. A forked child makes a new one."""

    def __init__(self) -> None:
        # Conditions over a reentrant lock: a finalizer may run, and connect, inside any line here.
        self._changed = threading.Condition(threading.RLock())
        self._connecting: dict[int, int] = {}
        self._forking: dict[int, int] = {}

    def enter_connect(self) -> None:
        """Wait until no other thread is forking; called before a connection is opened."""
        thread = threading.get_ident()
        with self._changed:
            # A thread that connects or forks already must not wait: the fork may be waiting for it.
            if self._forking and thread not in self._connecting and thread not in self._forking:
                self._changed.wait_for(lambda: not self._forking, 2 * CONNECT_WAIT)
            self._connecting[thread] = self._connecting.get(thread, 0) + 1

    def leave_connect(self) -> None:
        """Note that the connection is open and its connect events have run, or that it failed."""
        self._leave(self._connecting)

    def before_fork(self) -> None:
        """Wait until no other thread is connecting; a thread that forks itself does not count."""
        thread = threading.get_ident()
        with self._changed:
            self._forking[thread] = self._forking.get(thread, 0) + 1
            # Otherwise two threads that fork while connecting would wait for each other.
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self.in_flight(thread), CONNECT_WAIT)

    def after_fork_in_parent(self) -> None:
        """Let new connects in."""
        self._leave(self._forking)

    def in_flight(self, thread: int) -> int:
        """Return how many connects other threads have in flight; takes no lock, so a child may ask."""
        return sum(other != thread and other not in self._forking for other in self._connecting)

    def _leave(self, threads: dict[int, int]) -> None:
        thread = threading.get_ident()
        with self._changed:
            left = threads.get(thread, 0) - 1
            if left > 0:
                threads[thread] = left
            else:
                threads.pop(thread, None)
            if self._forking or threads is self._forking:  # otherwise no thread waits
                self._changed.notify_all()
