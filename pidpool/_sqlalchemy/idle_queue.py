"""`IdleQueue`: the queue of a pool's idle connections. To put one and to get one that is there are single
calls of C's own deque. No other thread and no finalizer can come between, so there is no lock to wait for,
or to inherit locked.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from sqlalchemy.util import queue as sqlalchemy_queue

from pidpool._sqlalchemy import contract  # noqa: F401  checks what is relied on here

_T = TypeVar("_T")

PATIENCE = 0.03
"""Seconds after which a waiting thread is handed the next connection that comes back, before all others. It
is about the interval at which CPython takes turns between threads."""

LOOK_AGAIN = 0.2
"""Seconds after which a waiting thread looks again without being woken: the thread that was about to wake it
may have been interrupted by an exception from a signal handler."""


class IdleQueue(sqlalchemy_queue.QueueCommon[_T], Generic[_T]):
    """A queue with the interface of `sqlalchemy.util.queue.Queue`.

    A connection that comes back goes to the first thread that asks, whether that has waited or not: to wake
    a thread first would cost all of them time. But a thread that has waited for `PATIENCE` seconds is
    served next, in order of arrival, so that none starves.

    :param maxsize: how many it takes; 0 for no limit.
    :param use_lifo: whether the item put last is got first.
    """

    patience = PATIENCE
    """Seconds after which what waits is handed the next item that comes back."""

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        self.maxsize = maxsize
        self.use_lifo = use_lifo
        self.queue: deque[_T] = deque()  # the name that it has in SQLAlchemy's
        self._pop = self.queue.pop if use_lifo else self.queue.popleft
        self._waiters: deque[weakref.ref[Waiter]] = deque()
        """In the order in which they are served. Weak: a thread that was interrupted waits no more."""
        self._is_abandoned = False
        self._abandoned: deque[_T] | None = None

    def get(
        self,
        block: bool = True,
        timeout: float | None = None,
        since: float | None = None,
        give_up: Callable[[], bool] | None = None,
    ) -> _T:
        """Get an item, waiting for `timeout` seconds at most.

        :param since: `time.monotonic()` when the thread began to wait, if it does so in several calls.
        :param give_up: asked at times during a wait; if true, the wait ends.
        :raises sqlalchemy.util.queue.Empty: if there is none, or none in time.
        """
        try:
            return self._pop()
        except IndexError:
            if not block:
                raise sqlalchemy_queue.Empty from None
        if timeout is not None and timeout < 0:
            raise ValueError("'timeout' must be a positive number")
        return self._wait(timeout, since, give_up)

    def keep(self, item: _T) -> _T | None:
        """Put an item; never waits. Return one for which there is no room, which as a rule is the same."""
        self.queue.append(item)
        if len(self.queue) > self.maxsize > 0:
            # Put first and then looked, so that two threads can't both find the last place.
            try:
                return self.queue.pop()
            except IndexError:
                return None
        # After the item is there. A thread that begins to wait looks for an item after it is on the list, so
        # that one of the two sees the other.
        if self._waiters:
            self._serve_a_waiter()
        return None

    def put(self, item: _T, block: bool = True, timeout: float | None = None) -> None:
        """Put an item; never waits.

        :raises sqlalchemy.util.queue.Full: if there are `maxsize` already.
        """
        if self.full() or self.keep(item) is not None:
            raise sqlalchemy_queue.Full

    def get_oldest(self, is_due: Callable[[_T], bool]) -> _T:
        """Get the item that has been here for longest, if it is due.

        :raises sqlalchemy.util.queue.Empty: if it is not, or if there is none.
        """
        try:
            if is_due(self.queue[0]):
                return self.queue.popleft()  # a younger one, if another thread was first
        except IndexError:
            pass
        raise sqlalchemy_queue.Empty

    def get_nowait(self) -> _T:
        """Get an item that is there."""
        return self.get(False)

    def put_nowait(self, item: _T) -> None:
        """Put an item."""
        self.put(item)

    def qsize(self) -> int:
        """Return how many items are there."""
        return len(self.queue)

    def empty(self) -> bool:
        """Return whether there is none."""
        return not self.queue

    def full(self) -> bool:
        """Return whether there are `maxsize`."""
        return 0 < self.maxsize <= len(self.queue)

    def abandon(self) -> None:
        """Have every waiting thread find no item: a child's pool has another queue.

        Takes no lock. In a child only a thread that forked in a signal handler waits, or a greenlet. What the
        queue holds lives as long as the queue.
        """
        self._is_abandoned = True
        self._abandoned, self.queue = self.queue, deque()
        self._pop = self.queue.popleft
        for reference in self._waiters:
            waiter = reference()
            if waiter is not None:
                waiter.is_awake = False
                waiter.wake()

    # -- waiting

    def make_waiter(self) -> Waiter:
        """Return what the calling thread waits with."""
        return _WaitingThread()

    def _serve_a_waiter(self) -> None:
        """Have the first waiting thread look again; hand it an item if it has waited for long."""
        waiter = None
        try:
            while waiter is None:
                reference = self._waiters[0]
                waiter = reference()
                if waiter is None:
                    self._forget(reference)  # its thread was interrupted
            if waiter.is_due:
                # In one step, since an interrupt between two would lose the item. It keeps its place.
                waiter.inbox.append(self._pop())
                self._forget(reference)
        except IndexError:
            return  # another thread was first
        if waiter.is_closed:
            self._forget(reference)  # before it does so itself: otherwise it is the next to be served
            self._put_back(waiter)  # it has given up, and may have seen the item or not
        else:
            waiter.wake()

    def _wait(self, timeout: float | None, since: float | None, give_up: Callable[[], bool] | None) -> _T:
        waiter = self.make_waiter()
        deadline = math.inf if timeout is None else waiter.since + timeout
        if since is not None:
            waiter.since = since
        reference = weakref.ref(waiter)
        if waiter.since < time.monotonic() - PATIENCE:
            self._waiters.appendleft(reference)  # it has waited before
        else:
            self._waiters.append(reference)
        try:
            while True:
                waiter.is_awake = False  # before it looks: what comes after that wakes it
                if waiter.inbox:
                    break
                try:
                    waiter.inbox.append(self._pop())
                    break
                except IndexError:
                    pass
                now = time.monotonic()
                if now >= deadline or self._is_abandoned or (give_up is not None and give_up()):
                    break
                waiter.is_due = now >= waiter.since + self.patience
                waiter.sleep(min(deadline - now, LOOK_AGAIN if waiter.is_due else PATIENCE))
            waiter.is_closed = True  # before the last look: a thread that hands an item over looks after that
            self._forget(reference)
            item: _T = waiter.inbox.popleft()
        except IndexError:
            raise sqlalchemy_queue.Empty from None
        finally:
            # An interrupt, or gevent's timeout, or two threads that handed it an item each.
            waiter.is_closed = True
            self._forget(reference)
            self._put_back(waiter)
        return item

    def _put_back(self, waiter: Waiter) -> None:
        """Put what is left in a waiter's inbox back: an item that is there has kept its place."""
        if not self._is_abandoned:
            try:
                while True:
                    self.queue.append(waiter.inbox.popleft())
            except IndexError:
                pass
        # While that thread was awake, others were not woken.
        if self.queue and self._waiters:
            self._serve_a_waiter()

    def _forget(self, reference: weakref.ref[Waiter]) -> None:
        """Take a waiter off the list, unless another thread has."""
        try:
            self._waiters.remove(reference)
        except ValueError:
            pass


class Waiter:
    """What waits for an item: a thread, or a task."""

    __slots__ = ("since", "inbox", "is_closed", "is_awake", "is_due", "__weakref__")

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.inbox: deque[Any] = deque()
        """The item that it has got, or was handed."""
        self.is_closed = False
        """Whether it waits no more: an item that it is handed now goes back."""
        self.is_awake = False
        self.is_due = False

    def sleep(self, seconds: float) -> None:
        """Wait until another one wakes this one."""
        raise NotImplementedError

    def wake(self) -> None:
        """Have it look again; does nothing if it is about to."""
        raise NotImplementedError


class _WaitingThread(Waiter):
    """A thread that waits for an item."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        super().__init__()
        # By its name, which gevent and eventlet give to a lock of their own.
        self._lock = threading.Lock()
        self._lock.acquire()

    def sleep(self, seconds: float) -> None:
        self._lock.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        if not self.is_awake:
            self.is_awake = True
            try:
                self._lock.release()
            except RuntimeError:
                pass  # another thread has woken it at the same time
