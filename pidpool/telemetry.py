"""What happened, told once: every event of a pool goes through the methods of `Telemetry`, and each of
them is one structlog event. A misspelt or missing field fails the type check.

Takes the user's structlog configuration as it is. Without one, events go to the stdlib logger
``pidpool``, whose warnings reach stderr unless logging says otherwise; never to stdout.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, Literal

import structlog

from pidpool import fork, rows

if TYPE_CHECKING:
    from pidpool.family import Family
    from pidpool.fork import Trigger
    from pidpool.ownership import ConnectionTag

ClosedReason = Literal["recycled", "invalidated", "overflow", "disposed", "detached", "failed"]

_numbers = itertools.count(1)
_finalizing = threading.local()


class Telemetry:
    """The events of one pool.

    Never called inside an at-fork hook: a log writer's lock may be held there; what is told inside a
    finalizer is kept for the next use of a pool. Every event has ``pool``, ``pid``, ``at`` (seconds
    since the epoch, when it happened) and, where there is a connection, its whole tag. Fields are
    scalars; none holds a password, a DSN or query parameters.

    :param pool: the pool's name in every event; None for ``pool-<number>``.
    :param logger: a structlog logger (or one with its methods) to use instead of structlog's own.
    :param family: where the process's counts are kept.
    """

    def __init__(self, pool: str | None, logger: Any, family: Family) -> None:
        self.family = family
        self.row = family.join()
        self._pid = os.getpid()
        self.pool = pool or f"pool-{next(_numbers)}"
        self.logger = logger
        self._wrapper: object = None
        self._probe: Callable[[int], object] | None = None
        self._deferred: deque[tuple[Context, str, str, dict[str, object]]] = deque()

    # -- a connection's life

    def connection_opened(self, tag: ConnectionTag, create_time: float) -> None:
        """A connection was opened; `create_time` in seconds, connect events included."""
        self.row.add_opened(int(create_time * 1e9))
        self._emit("info", "connection.opened", tag, create_time=round(create_time, 6))
        over = self.family.exceeds_server(self.pool)
        if over is not None:
            self._emit(
                "warning",
                "family.over_maximum",
                processes=over.alive,
                maximum=over.maximum,
                server_max_connections=over.server_max_connections,
            )

    def connection_checked_out(self, tag: ConnectionTag, wait_time: float) -> None:
        """A checkout succeeded; `wait_time` in seconds, with pre-ping and connecting where needed.

        Only called where `is_debugging` said so.
        """
        self._emit("debug", "connection.checked_out", tag, wait_time=round(wait_time, 6))

    def connection_checked_in(self, tag: ConnectionTag, use_time: float) -> None:
        """A connection came back after `use_time` seconds; told where its checkout was told."""
        self._emit("debug", "connection.checked_in", tag, use_time=round(use_time, 6))

    def connection_closed(self, tag: ConnectionTag, reason: ClosedReason) -> None:
        """This process closed a connection that it owns."""
        self.row.add_closed(reason)
        self._emit("info", "connection.closed", tag, reason=reason)

    def connection_invalidated(self, tag: ConnectionTag, soft: bool, error: BaseException | None) -> None:
        """A connection was invalidated, hard or soft."""
        self.row.add(rows.INVALIDATIONS)
        # The class alone: a driver's message may quote a statement with its parameters.
        name = None if error is None else type(error).__name__
        self._emit("info", "connection.invalidated", tag, soft=soft, error=name)

    # -- checkouts that took or lasted too long

    def checkout_timed_out(self, wait_time: float, size: int, overflow: int, checked_out: int) -> None:
        """No connection was free for `wait_time` seconds."""
        self.row.add(rows.TIMEOUTS)
        self._emit(
            "warning",
            "checkout.timed_out",
            wait_time=round(wait_time, 6),
            size=size,
            overflow=overflow,
            checked_out=checked_out,
        )

    def checkout_overdue(
        self, tag: ConnectionTag | None, held: float, hold_warning: float, where: str | None
    ) -> None:
        """A checkout has lasted longer than the pool's `hold_warning` seconds; told once, while it lasts."""
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

    def pool_forked(self, at: float, idle: int, checked_out: int, in_transaction: int) -> None:
        """Told by the parent: a child was forked, with so many connections open."""
        self._emit(
            "info",
            "pool.forked",
            at=at,
            idle=idle,
            checked_out=checked_out,
            in_transaction=in_transaction,
        )

    def connection_inherited(
        self, at: float, tag: ConnectionTag, state: str, action: str, where: str | None
    ) -> None:
        """The cross-process leak, told by the inheritor: one for each inherited connection.

        `where` is the line that had checked it out, known with `hold_warning` only.
        """
        level = "warning" if state in ("in transaction", "unknown") else "info"
        self._emit(level, "connection.inherited", tag, at=at, state=state, action=action, where=where)

    def connection_replaced(self, inherited: ConnectionTag, tag: ConnectionTag | None) -> None:
        """A checkout goes on with a connection of this process's own."""
        self.row.add(rows.REPLACED)
        by = None if tag is None else tag.connection_id
        by_server_pid = None if tag is None else tag.server_pid
        self._emit("info", "connection.replaced", inherited, by=by, by_server_pid=by_server_pid)

    def connection_refused(self, tag: ConnectionTag | None, state: str) -> None:
        """A use of an inherited connection, or (without a tag) a checkout, was refused."""
        self.row.add(rows.REFUSED)
        self._emit("warning", "connection.refused", tag, state=state)

    def pool_adopted(
        self,
        at: float,
        parent_pid: int,
        trigger: str,
        idle: int,
        checked_out: int,
        in_transaction: int,
        connects_in_flight: int,
    ) -> None:
        """A forked child took the pool over; `trigger` tells what noticed the fork.

        `connects_in_flight`: how many connects of the parent's other threads the fork did not wait
        for; the driver's locks may be held in this process then.
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
        )

    def pool_disposed(self, closed: int, checked_out: int) -> None:
        """The pool was disposed of: so many idle connections closed, so many still checked out."""
        self._emit("info", "pool.disposed", closed=closed, checked_out=checked_out)

    # -- how it is told

    def is_debugging(self) -> bool:
        """Return whether a DEBUG event would be heard at present: a checkout asks before it tells."""
        logger = self.logger
        if logger is None:
            if not structlog.is_configured():
                return _stdlib.isEnabledFor(logging.DEBUG)
            # Asked again only when structlog was configured anew: binding a logger costs 3 µs.
            wrapper = structlog.get_config()["wrapper_class"]
            if wrapper is not self._wrapper:
                self._wrapper = wrapper
                self._probe = _level_check(structlog.get_logger("pidpool"))
        elif self._probe is None:
            self._probe = _level_check(logger)
        return self._probe is None or bool(self._probe(logging.DEBUG))

    def _emit(
        self,
        level: str,
        event: str,
        tag: ConnectionTag | None = None,
        *,
        at: float | None = None,
        **fields: object,
    ) -> None:
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
        at = time.time() if at is None else at
        fields = {"pool": self.pool, "pid": os.getpid(), "at": round(at, 6), **fields}
        if getattr(_finalizing, "depth", 0):
            self._deferred.append((copy_context(), level, event, fields))
            if fork.flag[0] == fork.SETTLED:
                fork.flag[0] = fork.UNREPORTED  # the next door of a pool will tell it
        else:
            self._write(level, event, fields)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold the events of this thread back: it runs a finalizer, which may have interrupted it
        while it held a log writer's lock."""
        _finalizing.depth = getattr(_finalizing, "depth", 0) + 1
        try:
            yield
        finally:
            _finalizing.depth -= 1

    def emit_deferred(self) -> None:
        """Write the events that finalizers held back."""
        while self._deferred:
            try:
                context, level, event, fields = self._deferred.popleft()
            except IndexError:
                return
            context.run(self._write, level, event, fields)

    def begin_anew(self, parent_pid: int, trigger: Trigger) -> None:
        """Start counting from zero, in a child's at-fork hook; what was held back is the parent's to tell.

        A pool and the successors that `recreate()` made of it share this object: it begins anew once.
        """
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._deferred = deque()
            self.row = self.family.join(parent_pid)
        self.row.add_adoption(trigger)

    def _write(self, level: str, event: str, fields: dict[str, object]) -> None:
        try:
            logger = self.logger
            if logger is None:
                configured = structlog.is_configured()
                logger = structlog.get_logger("pidpool") if configured else _stdlib_logger
            getattr(logger, level)(event, **fields)
        except Exception:
            # A full disk under a log must not cost anybody a connection; logging's own rule.
            if logging.raiseExceptions and sys.stderr is not None:
                sys.stderr.write(f"pidpool: the event {event} could not be logged:\n")
                traceback.print_exc(file=sys.stderr)


_stdlib = logging.getLogger("pidpool")
_stdlib_logger: Any = structlog.wrap_logger(
    _stdlib,
    wrapper_class=structlog.stdlib.BoundLogger,
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.contextvars.merge_contextvars,
        structlog.processors.KeyValueRenderer(key_order=["event", "pool", "pid"]),
    ],
)


def _level_check(logger: Any) -> Callable[[int], object] | None:
    """Return the function by which a logger says that it hears a level; None if it has none."""
    bound = logger.bind() if hasattr(logger, "bind") else logger
    for name in ("is_enabled_for", "isEnabledFor"):  # structlog's own; the stdlib's and its wrapper's
        check: Callable[[int], object] | None = getattr(bound, name, None)
        if callable(check):
            return check
    if hasattr(bound, "get_effective_level"):  # structlog before 25.1
        return lambda level: level >= bound.get_effective_level()
    return None
