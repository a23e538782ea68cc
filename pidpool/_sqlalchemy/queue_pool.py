"""`HookedQueuePool`: the hooks that SQLAlchemy's QueuePool has for its own subclasses, under names that they
keep. `PidPool` builds on it and names nothing that is private to SQLAlchemy.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from sqlalchemy import exc
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool
from sqlalchemy.util import queue as sqlalchemy_queue

from pidpool._sqlalchemy import idle_thread
from pidpool._sqlalchemy.checked_out import CheckedOutConnection
from pidpool._sqlalchemy.entry import JitteredEntry, PidPoolEntry
from pidpool._sqlalchemy.first_connect import renew_first_connect
from pidpool._sqlalchemy.idle_queue import IdleQueue
from pidpool.events.pool_events import PoolEvents
from pidpool.forks import detection, severing
from pidpool.forks.detection import FORKED, fork_state
from pidpool.forks.ownership import owned_connections
from pidpool.forks.stand_in import DisownedConnection
from pidpool.stats.budget import POLL, Budget, Permit
from pidpool.stats.process_counters import (
    IN_STATE_SINCE,
    LAST_BUCKET,
    THREAD,
    USE,
    USE_SUM,
    ProcessCounters,
)
from pidpool.terms import CloseReason, InheritedSockets

GIVEN_BACK_AFTER = 0.02
"""Seconds that a connection must have been idle to be closed because another process wants one. So an idle
process closes its connections, and a busy one keeps those that it is just about to use."""


class HookedQueuePool(QueuePool):
    """A QueuePool with entries and checkouts of pidpool's.

    A subclass sets `pool_events` and `inherited_sockets` before it calls this ``__init__``.
    """

    # SQLAlchemy's own lines stay below its own loggers: `pidpool` is for events alone, and SQLAlchemy's
    # DEBUG lines show the driver's repr of a connection, DSN included.
    _sqla_logger_namespace = "sqlalchemy.pool.impl.PidPool"

    _queue_class: Any = IdleQueue

    pool_events: PoolEvents
    inherited_sockets: InheritedSockets

    max_idle: float | None = None
    """Seconds after which an idle connection is closed."""
    recycle_jitter: float = 0.0
    """The share of ``recycle`` by which a connection may be recycled earlier."""
    waits_in_turns = False
    """Whether a wait for a connection may end without one coming back."""
    wanted: memoryview | None = None
    """A cell that is not 0 if a thread of the family may want a permit; None without a limit."""

    _idle_thread_pid = 0
    """The process in which the thread for idle connections was started."""

    def __init__(self, creator: Any, **options: Any) -> None:
        super().__init__(creator, **options)
        # Reentrant, since a finalizer may return an overflowing connection inside any line.
        self._overflow_lock = threading.RLock()  # type: ignore[assignment]
        self._inherited_entries: list[ConnectionPoolEntry] = []

    # -- what a subclass has of it

    @property
    def engine_dialect(self) -> Any:
        """The dialect of the engine; one without a driver if the pool has no engine."""
        return self._dialect

    def connections_in_queue(self) -> int | None:
        """Return how many entries are idle; None if some are checked out. Looks at no entry."""
        queued = self._pool.qsize()
        return queued if queued == self._pool.maxsize + self._overflow else None

    def constructor_options(self) -> dict[str, Any]:
        """Return the options of QueuePool with which this pool was made, for `recreate`."""
        return {
            "creator": self._creator,
            "pool_size": self._pool.maxsize,
            "max_overflow": self._max_overflow,
            "timeout": self._timeout,
            "use_lifo": self._pool.use_lifo,
            "pre_ping": self._pre_ping,
            "recycle": self._recycle,
            "echo": self.echo,
            "logging_name": self._orig_logging_name,
            "reset_on_return": self._reset_on_return,
            "_dispatch": self.dispatch,
            "dialect": self._dialect,
        }

    def close_idle(self) -> int:
        """Close the connections in the pool and begin to count anew; return how many were closed."""
        closed = 0
        while True:
            try:
                entry = cast(PidPoolEntry, self._pool.get(False))
            except sqlalchemy_queue.Empty:
                break
            closed += entry.dbapi_connection is not None
            entry.close_reason = "disposed"
            entry.close()
        self._overflow = 0 - self._pool.maxsize
        return closed

    def forget_entries(self, *, was_alone: bool) -> None:
        """Start with an empty queue and locks of this process's own, in a child; takes no lock.

        :param was_alone: whether the parent had no other thread: then queue and locks are as this thread
            left them, and go on.
        """
        inherited: Any = self._pool
        if was_alone and isinstance(inherited, IdleQueue) and not inherited.has_waiters:
            # Kept as long as the pool, since to destroy what the queue held costs more.
            self._inherited_entries = [inherited.get(False) for _ in range(inherited.qsize())]
            self._overflow = 0 - inherited.maxsize
            return
        self._pool = self._queue_class(inherited.maxsize, use_lifo=inherited.use_lifo)
        if isinstance(inherited, IdleQueue):
            inherited.abandon()
        self._overflow = 0 - self._pool.maxsize
        self._overflow_lock = threading.RLock()  # type: ignore[assignment]
        # SQLAlchemy makes it at the first use: it is not there if nothing has connected or listened yet.
        if not was_alone and "dispatch" in self.__dict__:
            renew_first_connect(self.dispatch)

    # -- opening and closing

    def _should_wrap_creator(self, creator: Any) -> Any:
        create = super()._should_wrap_creator(creator)
        return lambda entry: entry.open(create)

    def _create_connection(self, permit: Permit | None = None) -> ConnectionPoolEntry:
        is_jittered = self.recycle_jitter and self._recycle > -1
        return (JitteredEntry if is_jittered else PidPoolEntry)(self, permit=permit)

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        if fork_state[0] == FORKED:
            detection.notice_fork()
        if isinstance(connection, DisownedConnection) or severing.is_disowned(connection):
            return
        owned = owned_connections.get(id(connection))
        if owned is None:
            super()._close_connection(connection, terminate=terminate)
            return
        # First: once closed, the descriptor's number may be another file's.
        owned.let_go()
        try:
            super()._close_connection(connection, terminate=terminate)
        finally:
            owned.give_back_permit()
        entry = cast("PidPoolEntry | None", owned.entry())
        reason: CloseReason = "detached"
        if owned.detached is None:
            reason = "failed" if entry is None else entry.close_reason
            if entry is not None:
                entry.own_none()
        self.pool_events.connection_closed(owned.tag, reason)

    # -- taking and returning an entry

    def _do_get(self) -> ConnectionPoolEntry:
        while True:
            idle = self._pool
            try:
                return idle.get(False)
            except sqlalchemy_queue.Empty:
                pass
            if self.waits_in_turns:
                return self._get_in_turns()
            counters = self.pool_events.counters  # others if this is a child then, forked in the lines below
            if self._inc_overflow():
                try:
                    entry = self._create_connection()
                    if not cast(PidPoolEntry, entry).inherited:
                        return entry
                    continue  # a connect listener has forked: this is the child, and the entry its parent's
                except BaseException:
                    if counters is self.pool_events.counters:  # otherwise it was counted in the parent
                        self._dec_overflow()
                    raise
            with self.pool_events.counters.waiting():
                try:
                    return idle.get(True, self._timeout)
                except sqlalchemy_queue.Empty:
                    pass
            if self._overflow >= self._max_overflow:
                raise self._timed_out()

    def _timed_out(self, reason: str | None = None) -> exc.TimeoutError:
        timeout = "" if self._timeout is None else f", timeout {self._timeout:0.2f}"
        reason = reason or f"QueuePool limit of size {self.size()} overflow {self.overflow()} reached"
        return exc.TimeoutError(f"{reason}, connection timed out{timeout}", code="3o7r")

    # -- with a limit for the family, or a thread that closes idle connections

    def _get_in_turns(self) -> ConnectionPoolEntry:
        """Get an entry as `_do_get`; look in turns for an idle connection and for a permit."""
        wait = _Wait(self._timeout)
        with wait.counted(self.pool_events):
            while True:
                idle, counters = self._pool, self.pool_events.counters
                if self._inc_overflow():
                    try:
                        permit = wait.take_permit(self.pool_events.budget)
                        if permit is not None or self.pool_events.budget is None:
                            entry = self._create_connection(permit)
                            if not cast(PidPoolEntry, entry).inherited:
                                return entry
                            continue  # as in `_do_get`
                    except BaseException:
                        if counters is self.pool_events.counters:
                            self._dec_overflow()
                        raise
                    if counters is self.pool_events.counters:
                        self._dec_overflow()
                left = wait.left()
                if left <= 0:
                    raise self._timed_out(wait.reason)
                try:
                    return self._get_idle(idle, min(left, POLL), wait.since)
                except sqlalchemy_queue.Empty:
                    pass

    def _get_idle(self, idle: Any, seconds: float, since: float) -> ConnectionPoolEntry:
        if isinstance(idle, IdleQueue):
            return cast(ConnectionPoolEntry, idle.get(True, seconds, since))
        return cast(ConnectionPoolEntry, idle.get(True, seconds))

    def wait_for_permit(self) -> Permit | None:
        """Return a permit for a connection that an entry is to open anew; None if the family has no limit.

        :raises sqlalchemy.exc.TimeoutError: if there was none in time.
        """
        if self.pool_events.budget is None:
            return None
        wait = _Wait(self._timeout)
        with wait.counted(self.pool_events):
            while True:
                budget = self.pool_events.budget
                permit = wait.take_permit(budget)
                if permit is not None or budget is None:
                    return permit
                left = wait.left()
                if left <= 0:
                    raise self._timed_out(wait.reason)
                try:
                    self._drop(cast(Any, self._pool.get(False)), "given back")
                except sqlalchemy_queue.Empty:
                    self.pause(min(left, POLL))

    def pause(self, seconds: float) -> None:
        """Let other threads go on."""
        time.sleep(seconds)

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
                self._drop(entry, "given back")
        if self.max_idle is not None:
            for entry in self._get_idle_for(self.max_idle, None):
                self._drop(entry, "idle")

    def _get_idle_for(self, seconds: float, most: int | None) -> Iterator[PidPoolEntry]:
        """Take those out of the pool that have been idle for so long, the oldest first."""
        before = time.perf_counter_ns() - int(seconds * 1e9)

        def is_due(entry: Any) -> bool:
            return bool(entry.slot[IN_STATE_SINCE] <= before)

        if isinstance(self._pool, IdleQueue):
            for _ in itertools.count() if most is None else range(most):
                try:
                    yield self._pool.get_oldest(is_due)
                except sqlalchemy_queue.Empty:
                    return
        else:  # an asyncio queue, in its own loop: no other task runs before it is whole again
            found: list[Any] = []
            while not self._pool.empty():
                found.append(self._pool.get(False))
            if self._pool.use_lifo:
                found.reverse()
            due = [each for each in found if is_due(each)][:most]
            for each in found:
                if each not in due:
                    self._pool.put(each, False)
            yield from due

    def _is_to_be_given_back(self) -> bool:
        budget = self.pool_events.budget
        return budget is not None and budget.is_wanted() and budget.is_over_share()

    def _drop(self, entry: PidPoolEntry, reason: CloseReason) -> None:
        """Close an entry that was taken out of the pool, in the place of returning it."""
        tag = entry.pidpool_tag
        idle = max(0, time.perf_counter_ns() - entry.slot[IN_STATE_SINCE]) / 1e9
        entry.close_reason = reason
        try:
            entry.close()
        finally:
            self._dec_overflow()
        if tag is not None and reason == "given back":
            self.pool_events.connection_given_back(tag, idle)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if fork_state[0] == FORKED:
            detection.notice_fork()
        entry: Any = record  # not cast(): these lines run with every checkin
        if entry.inherited:
            return  # it was never counted here
        if entry.watched is not None:
            entry.watched.log_return()
            entry.watched = None
        if entry.out_since:
            now = time.perf_counter_ns()
            used = now - entry.out_since
            entry.out_since = 0
            slot = entry.slot
            bucket = (used >> 10).bit_length()
            slot[USE + (bucket if bucket < LAST_BUCKET else LAST_BUCKET)] += 1
            slot[USE_SUM] += used
            slot[IN_STATE_SINCE] = now
            slot[THREAD] = 0
        if entry.owned is not None:
            entry.owned.used_by = None
        if self.wanted is not None and self.wanted[0] and self._is_to_be_given_back():
            self._drop(entry, "given back")
            return
        try:
            self._pool.put(record, False)
        except sqlalchemy_queue.Full:
            entry.close_reason = "overflow"
            try:
                entry.close()
            finally:
                self._dec_overflow()

    def _invalidate(
        self, connection: Any, exception: BaseException | None = None, _checkin: bool = True
    ) -> None:
        if isinstance(connection, CheckedOutConnection) and connection.is_disowned():
            # One inherited connection says nothing of the child's own: they stay.
            if _checkin:
                connection.invalidate(exception)
            return
        super()._invalidate(connection, exception, _checkin)


class _Wait:
    """A thread's wait for a connection or a permit.

    :param timeout: the pool's, in seconds; None for no bound.
    """

    def __init__(self, timeout: float | None) -> None:
        self.since = time.monotonic()
        self.reason: str | None = None
        """Why there was no connection, if that was for want of a permit."""
        self._deadline = math.inf if timeout is None else self.since + timeout
        self._counters: ProcessCounters | None = None
        self._wanting: Budget | None = None

    @contextmanager
    def counted(self, events: PoolEvents) -> Iterator[None]:
        """Count this thread among those that wait, from its first look for what is left on."""
        self._events = events
        try:
            yield
        finally:
            if self._counters is not None:
                self._counters.add_waiting(-1)
            if self._wanting is not None:
                self._wanting.end_wish()

    def left(self) -> float:
        """Return the seconds that are left."""
        if self._counters is None:
            counters = self._events.counters
            counters.add_waiting(1)
            self._counters = counters
        return self._deadline - time.monotonic()

    def take_permit(self, budget: Budget | None) -> Permit | None:
        """Take a permit if there is one; otherwise have other processes know that one is wanted."""
        if budget is None:
            return None
        permit = budget.take()
        if permit is None:
            if self._wanting is not budget:  # a child, forked meanwhile, has a budget of its own
                self._wanting = budget
                budget.begin_wish()
            budget.wish()
            self.reason = (
                f"family_limit of {budget.limit} reached"
                if budget.limit
                else "this process found no room in the memory of its family, so it gets no connection"
            )
        return permit
