"""`HookedQueuePool`: the hooks that SQLAlchemy's QueuePool has for its own subclasses, under names that they
keep. `PidPool` builds on it and names nothing that is private to SQLAlchemy.
"""

from __future__ import annotations

import threading
import time
from typing import Any, cast

from sqlalchemy import exc
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool
from sqlalchemy.util import queue as sqlalchemy_queue

from pidpool._sqlalchemy.checked_out import CheckedOutConnection
from pidpool._sqlalchemy.entry import PidPoolEntry
from pidpool._sqlalchemy.first_connect import renew_first_connect
from pidpool._sqlalchemy.idle_queue import IdleQueue
from pidpool.events.pool_events import PoolEvents
from pidpool.forks import detection, severing
from pidpool.forks.detection import FORKED, fork_state
from pidpool.forks.ownership import owned_connections
from pidpool.forks.stand_in import DisownedConnection
from pidpool.stats.process_counters import (
    IN_STATE_SINCE,
    LAST_BUCKET,
    THREAD,
    USE,
    USE_SUM,
)
from pidpool.terms import CloseReason, InheritedSockets


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
        # Made by the first who asks for it: not there if nothing has connected or listened yet.
        if not was_alone and "dispatch" in self.__dict__:
            renew_first_connect(self.dispatch)

    # -- opening and closing

    def _should_wrap_creator(self, creator: Any) -> Any:
        create = super()._should_wrap_creator(creator)
        return lambda entry: entry.open(create)

    def _create_connection(self) -> ConnectionPoolEntry:
        return PidPoolEntry(self)

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
        super()._close_connection(connection, terminate=terminate)
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
            idle = self._pool  # another one if this is a child now, forked in the lines below
            try:
                return idle.get(False)
            except sqlalchemy_queue.Empty:
                pass
            if self._inc_overflow():
                try:
                    return self._create_connection()
                except BaseException:
                    if idle is self._pool:  # otherwise it was counted in the parent
                        self._dec_overflow()
                    raise
            with self.pool_events.counters.waiting():
                try:
                    return idle.get(True, self._timeout)
                except sqlalchemy_queue.Empty:
                    pass
            if self._overflow >= self._max_overflow:
                raise exc.TimeoutError(
                    f"QueuePool limit of size {self.size()} overflow {self.overflow()} reached, "
                    f"connection timed out, timeout {self._timeout:0.2f}",
                    code="3o7r",
                )

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
