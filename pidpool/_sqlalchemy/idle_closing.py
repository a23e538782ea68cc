"""`ClosingQueuePool`: closes idle connections that another process of the family wants, or that have been
idle for too long.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

from sqlalchemy.util import queue as sqlalchemy_queue

from pidpool._sqlalchemy import idle_thread
from pidpool._sqlalchemy.entry import PidPoolEntry
from pidpool._sqlalchemy.queue_pool import HookedQueuePool
from pidpool.stats.budget import POLL
from pidpool.stats.process_counters import IN_STATE_SINCE

GIVEN_BACK_AFTER = 0.02
"""Seconds that a connection must have been idle to be closed because another process wants one. So an idle
process closes its connections, and a busy one keeps those that it is just about to use."""


class ClosingQueuePool(HookedQueuePool):
    """A `HookedQueuePool` whose idle connections a thread looks after, if there is a limit or a bound."""

    max_idle: float | None = None
    """Seconds after which an idle connection is closed."""

    _idle_thread_pid = 0
    """The process in which the thread for idle connections was started."""

    def start_idle_thread(self) -> None:
        """Start the thread for idle connections, if the pool takes one and this process has none yet."""
        if self.waits_in_turns and self._idle_thread_pid != os.getpid():
            self._idle_thread_pid = os.getpid()
            budget = self.pool_events.budget
            idle_thread.start(self, None if budget is None else budget.bell)

    def look_after_idle(self) -> float:
        """Close the idle connections that are due; return the seconds until the next look."""
        budget, now = self.pool_events.budget, time.perf_counter_ns()
        is_wanted = budget is not None and budget.is_wanted()
        if budget is not None and is_wanted:
            budget.settle()
        bound = math.inf if self.max_idle is None else self.max_idle
        longest = max((now - since for since in self._idle_since()), default=0) / 1e9
        if longest >= (min(bound, GIVEN_BACK_AFTER) if is_wanted else bound):
            self.where_connections_may_be_closed(self._close_due)
            longest = 0.0
        return POLL if is_wanted else max(bound - longest, POLL)

    def where_connections_may_be_closed(self, close: Callable[[], None]) -> None:
        """Call `close` in a thread that may close connections."""
        close()

    def _idle_since(self) -> list[int]:
        """Return when each idle connection became idle; any thread may ask."""
        entries = cast("list[PidPoolEntry]", self.pool_events.counters.entries())
        idle = [each.slot for each in entries if not each.out_since and each.dbapi_connection is not None]
        return [slot[IN_STATE_SINCE] for slot in idle]

    def _close_due(self) -> None:
        budget = self.pool_events.budget
        if budget is not None and budget.is_wanted():
            for entry in self._get_idle_for(GIVEN_BACK_AFTER, budget.wanting()):
                self.close_entry(entry, "given back")
        if self.max_idle is not None:
            for entry in self._get_idle_for(self.max_idle, None):
                self.close_entry(entry, "idle")

    def _get_idle_for(self, seconds: float, most: int | None) -> Iterator[PidPoolEntry]:
        """Take those out of the pool that have been idle for so long, the oldest first."""
        before = time.perf_counter_ns() - int(seconds * 1e9)

        def is_due(entry: Any) -> bool:
            return bool(entry.slot[IN_STATE_SINCE] <= before)

        idle: Any = self._pool
        for _ in itertools.count() if most is None else range(most):
            try:
                yield idle.get_oldest(is_due)
            except sqlalchemy_queue.Empty:
                return

    def is_to_be_given_back(self) -> bool:
        """Return whether a connection that comes back is to be closed, since another process wants one."""
        budget = self.pool_events.budget
        return budget is not None and budget.is_wanted() and budget.is_over_share()
