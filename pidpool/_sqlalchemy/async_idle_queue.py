"""`AsyncIdleQueue`: the queue of idle connections under asyncio. An item that is there is got, and one for
which no task waits is put, without asyncio's queue; that one has only what tasks wait for.
"""

from __future__ import annotations

from collections import deque
from typing import Any, TypeVar

from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.util import queue as sqlalchemy_queue

from pidpool._sqlalchemy import contract  # noqa: F401  checks what is relied on here

_T = TypeVar("_T")


class AsyncIdleQueue(sqlalchemy_queue.AsyncAdaptedQueue[_T]):
    """A queue with the interface of `sqlalchemy.util.queue.AsyncAdaptedQueue`.

    For the tasks of one event loop. An item that was put for a waiting task is that task's: a task that asks
    meanwhile does not get it.

    :param maxsize: how many it takes; 0 for no limit.
    :param use_lifo: whether the item put last is got first.
    """

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        super().__init__(maxsize, use_lifo)
        self._items: deque[_T] = deque()
        self._pop = self._items.pop if use_lifo else self._items.popleft
        self._waiting = 0

    def get(self, block: bool = True, timeout: float | None = None) -> _T:
        """Get an item, waiting for `timeout` seconds at most.

        :raises sqlalchemy.util.queue.Empty: if there is none, or none in time.
        """
        try:
            return self._pop()
        except IndexError:
            if not block:
                raise sqlalchemy_queue.Empty from None
        self._waiting += 1
        try:
            return super().get(True, timeout)
        finally:
            self._waiting -= 1
            if not self._waiting:  # what came too late for a task that has given up
                while not super().empty():
                    self._items.append(super().get_nowait())

    def put(self, item: _T, block: bool = True, timeout: float | None = None) -> None:
        """Put an item; never waits.

        :raises sqlalchemy.util.queue.Full: if there are `maxsize` already.
        """
        if self._waiting:
            if self.full():
                raise sqlalchemy_queue.Full
            super().put_nowait(item)
        elif 0 < self.maxsize <= len(self._items):
            raise sqlalchemy_queue.Full
        else:
            self._items.append(item)

    def keep(self, item: _T) -> _T | None:
        """Put an item; never waits. Return it if there is no room."""
        try:
            self.put(item)
        except sqlalchemy_queue.Full:
            return item
        return None

    def get_nowait(self) -> _T:
        """Get an item that is there."""
        return self.get(False)

    def put_nowait(self, item: _T) -> None:
        """Put an item."""
        self.put(item)

    def qsize(self) -> int:
        """Return how many items are there."""
        return len(self._items) + int(super().qsize())  # type: ignore[no-untyped-call]

    def empty(self) -> bool:
        """Return whether there is none."""
        return not self.qsize()

    def full(self) -> bool:
        """Return whether there are `maxsize`."""
        return 0 < self.maxsize <= self.qsize()


class AsyncIdleQueuePool(AsyncAdaptedQueuePool):
    """SQLAlchemy's AsyncAdaptedQueuePool with this queue."""

    _queue_class: Any = AsyncIdleQueue
