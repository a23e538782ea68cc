"""`PoolEvents`: every event of a pool has one method here, which counts it and logs it. Fields are keyword
arguments, so a misspelt or missing one fails the type check.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context, copy_context
from typing import Any

from pidpool.events.logger import EventLogger
from pidpool.events.pool_names import name_for
from pidpool.events.user_code import ForkingLines, forking_lines, text_of
from pidpool.stats.family import Family
from pidpool.stats.process_counters import Count, ProcessCounters
from pidpool.stats.snapshots import FamilyStats
from pidpool.tag import ConnectionTag
from pidpool.terms import CloseReason, SocketAction, StateAtFork, Trigger

MOST_WAITING = 10_000
"""Events that wait at most for the next use of the pool; the newest are kept."""

_HOOKS = 3
"""The functions of the at-fork hooks through which the line that forks is looked up."""

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}


class _Thread(threading.local):
    held_back = 0
    """How many blocks of `held_back` this thread is in."""


_thread = _Thread()


@contextmanager
def held_back() -> Iterator[None]:
    """Have the events of this thread wait for the next use of their pools.

    For a finalizer, which may have interrupted its thread while that held a log writer's lock; and for an
    at-fork hook, where nothing may be logged.
    """
    _thread.held_back += 1
    try:
        yield
    finally:
        _thread.held_back -= 1


class _WaitingEvent:
    """An event that waits.

    A finalizer's is logged in the context in which it happened. An event of a fork has none: it is logged in
    the context of the pool's next use, which is that of the child's own request or task.
    """

    __slots__ = ("context", "at", "level", "event", "tag", "fields")

    def __init__(
        self, at: float | None, level: str, event: str, tag: ConnectionTag | None, fields: dict[str, object]
    ) -> None:
        self.context: Context | None = copy_context() if at is None else None
        self.at = time.time() if at is None else at
        self.level = level
        self.event = event
        self.tag = tag
        self.fields = fields


class PoolEvents:
    """The events of one pool, and of the successors that ``recreate()`` makes of it.

    Every event has ``pool``, ``pid``, ``at`` (seconds since the epoch, when it happened) and, if there is a
    connection, its whole tag. Fields are scalars; none holds a password, a DSN or query parameters.

    Any thread may call the methods. In a block of `held_back` they log nothing: the event waits for
    `log_waiting`.

    :param pool: the pool's name in every event; None for the family's, or one that is made of `address`.
    :param logger: see `EventLogger`.
    :param family: the shared memory in which the process's counters are.
    :param note_waiting: called when an event begins to wait.
    :param address: ``host:port/database``; None if it is not known.
    """

    def __init__(
        self,
        pool: str | None,
        logger: Any,
        family: Family,
        note_waiting: Callable[[], object] = object,
        address: str | None = None,
    ) -> None:
        self.family = family
        self.counters = family.join()
        self._joined: list[ProcessCounters] = []
        """The counters of the child that this process is, as soon as there are any."""
        self.budget = family.budget_for(self.counters)
        self.pool = pool or family.name or name_for(self, address)
        self._pid = os.getpid()
        self._logger = EventLogger(logger)
        self.is_enabled = self._logger.is_enabled
        """``is_enabled(level)`` says whether an event of this level would be logged at present."""
        self.forked_at: ForkingLines | None = None
        """The line of the last fork, with its callers; in a child that of the fork which made it."""
        self._is_driver_known = True
        self._note_waiting = note_waiting
        self._waiting: deque[_WaitingEvent | tuple[Callable[..., None], Any]] = deque(maxlen=MOST_WAITING)
        self._waiting_in_parent: object = None

    def __del__(self) -> None:
        # The pool has gone, and all its entries with it. A named family's memory stays.
        counters = self.__dict__.get("counters")
        if counters is not None:
            counters.end()

    # -- a connection's life

    def connection_opened(self, tag: ConnectionTag, create_time: float) -> None:
        """A connection was opened; `create_time` in seconds, connect events included."""
        counters = self.counters
        if not counters.are_of(tag.owner_pid):
            return  # a signal handler has forked meanwhile, and this is the child
        counters.add_opened(int(create_time * 1e9))
        self._emit("info", "connection.opened", tag, create_time=round(create_time, 6))
        over = self.family.exceeds_server(self.pool)
        if over is not None:
            self.pool_over_maximum(over.alive, over.maximum, over.server_max_connections)

    def connection_failed(self, error: BaseException, create_time: float) -> None:
        """A connect failed after `create_time` seconds."""
        self.counters.add_failed(self.family.error_types.number_of(error))
        # The class alone: a driver's message may quote the DSN.
        self._emit(
            "warning",
            "connection.failed",
            error=type(error).__name__,
            create_time=round(create_time, 6),
        )

    def connection_checked_out(self, tag: ConnectionTag, wait_time: float) -> None:
        """A checkout succeeded; `wait_time` in seconds, with pre-ping and connecting if needed.

        Only called if `is_enabled` says that it would be logged; the checkout itself is counted by the pool.
        """
        self._emit("debug", "connection.checked_out", tag, wait_time=round(wait_time, 6))

    def connection_checked_in(self, tag: ConnectionTag, use_time: float) -> None:
        """A connection came back after `use_time` seconds; logged if its checkout was logged."""
        self._emit("debug", "connection.checked_in", tag, use_time=round(use_time, 6))

    def connection_closed(self, tag: ConnectionTag, reason: CloseReason) -> None:
        """This process closed a connection that it owns."""
        counters = self.counters
        if not counters.are_of(tag.owner_pid):
            return  # a signal handler has forked meanwhile, and this is the child
        counters.add_closed(reason)
        self._emit("info", "connection.closed", tag, reason=reason)

    def connection_given_back(self, tag: ConnectionTag, idle: float) -> None:
        """A connection, idle for so many seconds, was closed since another process wanted a permit."""
        self._emit("info", "connection.given_back", tag, idle=round(idle, 6))

    def connection_invalidated(self, tag: ConnectionTag, soft: bool, error: BaseException | None) -> None:
        """A connection was invalidated, hard or soft."""
        self.counters.add(Count.INVALIDATIONS)
        # The class alone: a driver's message may quote a statement with its parameters.
        name = None if error is None else type(error).__name__
        self._emit("info", "connection.invalidated", tag, soft=soft, error=name)

    # -- checkouts that took or lasted too long

    def checkout_timed_out(
        self, wait_time: float, size: int, overflow: int, checked_out: int, family: FamilyStats, holders: str
    ) -> None:
        """No connection was free for `wait_time` seconds.

        `family`: all processes at that moment. `holders`: the checkouts that had lasted longest.
        """
        self.counters.add(Count.TIMEOUTS)
        self._emit(
            "warning",
            "checkout.timed_out",
            wait_time=round(wait_time, 6),
            size=size,
            overflow=overflow,
            checked_out=checked_out,
            family_limit=family.limit,
            family_used=family.used,
            family_idle=family.idle,
            family_wanting=family.wanting,
            holders=holders,
        )

    def checkout_overdue(
        self, tag: ConnectionTag | None, held: float, hold_warning: float, where: str | None
    ) -> None:
        """A checkout has lasted longer than the pool's `hold_warning` seconds; logged once."""
        self.counters.add(Count.OVERDUE)
        self._emit(
            "warning", "checkout.overdue", tag, held=round(held, 6), hold_warning=hold_warning, where=where
        )

    def checkout_returned_late(
        self, tag: ConnectionTag | None, use_time: float, hold_warning: float, where: str | None
    ) -> None:
        """A checkout that had lasted longer than `hold_warning` seconds came back."""
        self._emit(
            "warning",
            "checkout.returned_late",
            tag,
            use_time=round(use_time, 6),
            hold_warning=hold_warning,
            where=where,
        )

    # -- forks

    def look_up_fork(self) -> None:
        """Look up the line that forks, in an at-fork hook."""
        self.forked_at = forking_lines(_HOOKS)

    def log_fork_later(self, at: float, idle: int, checked_out: int, in_transaction: int) -> None:
        """Have a fork with open connections logged later; called in the parent's at-fork hook."""
        self.forked_at = forked_at = forking_lines(_HOOKS)
        # As `log_later`, without the call: every function that is called here costs pages.
        self._waiting.append((self.pool_forked, (at, idle, checked_out, in_transaction, forked_at)))
        self._note_waiting()

    def pool_forked(
        self, at: float, idle: int, checked_out: int, in_transaction: int, forked_at: ForkingLines | None
    ) -> None:
        """The parent forked a child, with so many connections open.

        `forked_at` is the line that forked with its callers (see `ForkingLines`), here and below.
        """
        self._emit(
            "info",
            "pool.forked",
            at=at,
            idle=idle,
            checked_out=checked_out,
            in_transaction=in_transaction,
            forked_at=forked_at,
        )

    def pool_adopted(
        self,
        at: float,
        parent_pid: int,
        trigger: Trigger,
        idle: int,
        checked_out: int,
        in_transaction: int,
        connects_in_flight: int,
        forked_at: ForkingLines | None,
    ) -> None:
        """A forked child took the pool over; `trigger` names what noticed the fork.

        `connects_in_flight`: how many connects of the parent's other threads the fork did not wait for. If
        there was one, the driver's locks may be held in this process for ever.
        """
        self._emit(
            "warning" if connects_in_flight else "info",
            "pool.adopted",
            at=at,
            parent_pid=parent_pid,
            trigger=trigger,
            idle=idle,
            checked_out=checked_out,
            in_transaction=in_transaction,
            connects_in_flight=connects_in_flight,
            forked_at=forked_at,
        )

    def connection_inherited(
        self,
        at: float,
        tag: ConnectionTag,
        state: StateAtFork,
        action: SocketAction,
        where: str | None,
        forked_at: ForkingLines | None,
    ) -> None:
        """The cross-process leak: the child logs one for each inherited connection.

        `where` is the line that had checked it out, known with `hold_warning` only. The pool counts them.
        """
        level = "warning" if state in ("in transaction", "unknown") else "info"
        self._emit(
            level,
            "connection.inherited",
            tag,
            at=at,
            state=state,
            action=action,
            where=where,
            forked_at=forked_at,
        )

    def connection_replaced(self, inherited: ConnectionTag, tag: ConnectionTag | None) -> None:
        """A checkout goes on with a connection of this process's own."""
        self.counters.add(Count.REPLACED)
        by = None if tag is None else tag.connection_id
        by_server_pid = None if tag is None else tag.server_pid
        self._emit("info", "connection.replaced", inherited, by=by, by_server_pid=by_server_pid)

    def connection_refused(self, tag: ConnectionTag | None, state: StateAtFork) -> None:
        """A use of an inherited connection, or (without a tag) a checkout, was refused."""
        self.counters.add(Count.REFUSED)
        self._emit("warning", "connection.refused", tag, state=state)

    # -- the whole pool

    def pool_disposed(self, closed: int, checked_out: int) -> None:
        """The pool was disposed of: so many idle connections closed, so many still checked out."""
        self._emit("info", "pool.disposed", closed=closed, checked_out=checked_out)

    def pool_over_maximum(
        self, processes: int, maximum: int | None, server_max_connections: int | None
    ) -> None:
        """The family's processes may open more connections than their server allows; logged once."""
        self._emit(
            "warning",
            "pool.over_maximum",
            processes=processes,
            maximum=maximum,
            server_max_connections=server_max_connections,
        )

    def report_family(self) -> None:
        """Log what a process should know that has joined a named family."""
        if self.family.private is not None:
            self.family_private(self.family.private)
        other = self.family.other_limit()
        if other is not None:
            self.family_limits_differ(*other)

    def family_private(self, reason: str) -> None:
        """A family can't be shared: a named one is this process and those forked from it.

        Without memory for those, each process is listed alone.
        """
        self._emit("warning", "family.private", family=self.family.name, reason=reason)

    def family_limits_differ(self, other_limit: int | None, other_pid: int) -> None:
        """Another process of a named family has another `family_limit`, or none: each keeps to its own."""
        self._emit(
            "warning",
            "family.limits_differ",
            family=self.family.name,
            family_limit=self.family.limit,
            other_limit=other_limit,
            other_pid=other_pid,
        )

    def driver_unknown(self, driver: str, tag: ConnectionTag) -> None:
        """pidpool does not know the driver, so it can't read the state of a transaction; logged once."""
        if self._is_driver_known:
            self._is_driver_known = False
            self._emit("warning", "driver.unknown", driver=driver, has_descriptor=tag.fd is not None)

    # -- how an event is logged

    def begin_anew(self, parent_pid: int, trigger: Trigger) -> None:
        """Start counting from zero, in a child's at-fork hook; what waited is the parent's to log.

        A pool and its successors share this object: it begins anew once.
        """
        pid = os.getpid()
        if self._pid != pid:
            if not self.counters.are_of(pid):
                # Kept, since to destroy what was waiting costs more.
                self._waiting_in_parent, self._waiting = self._waiting, deque(maxlen=MOST_WAITING)
                if self._joined and self._joined[0].are_of(pid):
                    self.counters = self._joined[0]  # this was interrupted, and begins again
                else:
                    self._joined = []
                    self.counters = self.family.join(parent_pid, self._joined)
            self.budget = self.family.budget_for(self.counters)
            self._pid = pid  # last: if this is interrupted, it begins again
            self.counters.add_adoption(trigger)

    def log_later(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have a function that emits events called by `log_waiting`, in the context of that.

        For an at-fork hook, where nothing may be logged, and where to make an event costs more than it seems:
        each page that is written to is copied.
        """
        self._waiting.append((function, arguments))
        self._note_waiting()

    def log_waiting(self, until: float = math.inf) -> None:
        """Log the events that wait.

        :param until: `time.monotonic` after which no further event is logged.
        """
        while self._waiting and time.monotonic() < until:
            if self._logger.is_writing or _thread.held_back:
                self._note_waiting()  # a log handler or a finalizer uses the pool: after it
                return
            try:
                waiting = self._waiting.popleft()
            except IndexError:
                return  # another thread was first
            if isinstance(waiting, tuple):
                function, arguments = waiting
                function(*arguments)
                continue
            context = copy_context() if waiting.context is None else waiting.context
            if context.run(self.is_enabled, _LEVELS[waiting.level]):
                context.run(self._log, waiting.at, waiting.level, waiting.event, waiting.tag, waiting.fields)

    def _emit(
        self,
        level: str,
        event: str,
        tag: ConnectionTag | None = None,
        *,
        at: float | None = None,
        **fields: object,
    ) -> None:
        if _thread.held_back:
            self._waiting.append(_WaitingEvent(at, level, event, tag, fields))
            self._note_waiting()
        elif self.is_enabled(_LEVELS[level]):
            self._log(time.time() if at is None else at, level, event, tag, fields)

    def _log(
        self, at: float, level: str, event: str, tag: ConnectionTag | None, fields: dict[str, object]
    ) -> None:
        lines = fields.get("forked_at")
        if isinstance(lines, list):
            fields = {**fields, "forked_at": text_of(lines)}
        if tag is not None:
            fields = {
                "connection_id": tag.connection_id,
                "owner_pid": tag.owner_pid,
                "fd": tag.fd,
                "socket_inode": tag.socket_inode,
                "server_pid": tag.server_pid,
                "opened_at": tag.opened_at,
                **fields,
            }
        fields = {"pool": self.pool, "pid": os.getpid(), "at": round(at, 6), **fields}
        self._logger.write(level, event, fields)
