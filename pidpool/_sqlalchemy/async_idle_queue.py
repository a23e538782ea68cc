"""`AsyncIdleQueue`: the queue of idle connections under asyncio. It keeps the list of waiting tasks itself,
so that a cancelled task ends on every version of Python.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Generic, TypeVar

from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.util import queue as sqlalchemy_queue

from pidpool._sqlalchemy.asyncio_adapter import await_only

_T = TypeVar("_T")


class AsyncIdleQueue(sqlalchemy_queue.QueueCommon[_T], Generic[_T]):
    """A queue with the interface of `sqlalchemy.util.queue.AsyncAdaptedQueue`.

    For the tasks of one event loop. An item that was put for a waiting task is that task's: a task that asks
    meanwhile does not get it.

    :param maxsize: how many it takes; 0 for no limit.
    :param use_lifo: whether the item put last is got first.
    """

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        self.maxsize = maxsize
        self.use_lifo = use_lifo
        self.queue: deque[_T] = deque()
        self._pop = self.queue.pop if use_lifo else self.queue.popleft
        # One for each task that waits, the longest first.
        self._waiters: deque[asyncio.Future[_T]] = deque()
        # Items put for a task that has not run since.
        self._under_way = 0

    def get(self, block: bool = True, timeout: float | None = None) -> _T:
        """Get an item, waiting for `timeout` seconds at most.

        :raises sqlalchemy.util.queue.Empty: if there is none, or none in time.
        """
        try:
            return self._pop()
        except IndexError:
            if not block:
                raise sqlalchemy_queue.Empty from None
        item: _T = await_only(self._wait(timeout))
        return item

    async def _wait(self, timeout: float | None) -> _T:
        waiter: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._hand_out()  # what a finalizer has put since the queue was found empty
        try:
            # Not asyncio.wait_for: before Python 3.12 it loses a cancellation that comes just after the item.
            await asyncio.wait([waiter], timeout=timeout)
        except BaseException:
            if self._is_served(waiter):
                self.put(waiter.result())
            raise
        if not self._is_served(waiter):
            raise sqlalchemy_queue.Empty
        return waiter.result()

    def _is_served(self, waiter: asyncio.Future[_T]) -> bool:
        """Return whether an item was put for this task, which waits no longer."""
        if waiter.done():
            self._under_way -= 1
            return True
        if waiter in self._waiters:  # unless a signal handler has raised while an item was handed out
            self._waiters.remove(waiter)
        return False

    def put(self, item: _T, block: bool = True, timeout: float | None = None) -> None:
        """Put an item; never waits.

        :raises sqlalchemy.util.queue.Full: if there are `maxsize` already.
        """
        if self.keep(item) is not None:
            raise sqlalchemy_queue.Full

    def _hand_out(self) -> None:
        while self._waiters and self.queue:
            self._waiters.popleft().set_result(self._pop())
            self._under_way += 1

    def keep(self, item: _T) -> _T | None:
        """Put an item; never waits. Return it if there is no room."""
        if 0 < self.maxsize <= len(self.queue) + self._under_way:
            return item
        self.queue.append(item)
        if self._waiters:
            self._hand_out()
        return None

    def get_nowait(self) -> _T:
        """Get an item that is there."""
        return self.get(False)

    def put_nowait(self, item: _T) -> None:
        """Put an item."""
        self.put(item)

    def qsize(self) -> int:
        """Return how many items are there."""
        return len(self.queue) + self._under_way

    def empty(self) -> bool:
        """Return whether there is none."""
        return not self.qsize()

    def full(self) -> bool:
        """Return whether there are `maxsize`."""
        return 0 < self.maxsize <= self.qsize()


class AsyncIdleQueuePool(AsyncAdaptedQueuePool):
    """SQLAlchemy's AsyncAdaptedQueuePool with this queue."""

    _queue_class: Any = AsyncIdleQueue
