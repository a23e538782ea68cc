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

from pidpool.forks import detection as fork
from pidpool.stats.process_counters import Count

if TYPE_CHECKING:
    from pidpool.forks.detection import Trigger
    from pidpool.forks.ownership import ConnectionTag
    from pidpool.stats.family import Family

ClosedReason = Literal["recycled", "invalidated", "overflow", "disposed", "detached", "failed"]

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

_numbers = itertools.count(1)


class _Thread(threading.local):
    finalizers = 0  # running, in this thread
    telling = False  # an event is being written in this thread


_thread = _Thread()


class Telemetry:
    """The events of one pool.

    Never called inside an at-fork hook: a log writer's lock may be held there; what is told inside a
    finalizer is kept for the next use of a pool. Every event has ``pool``, ``pid``, ``at`` (seconds
    since the epoch, when it happened) and, where there is a connection, its whole tag. Fields are
    scalars; none holds a password, a DSN or query parameters.

    :param pool: the pool's name in every event; None for ``pool-<number>``.
    :param logger: a structlog logger, one with its methods, or one of the stdlib's, to use instead of
        structlog's own.
    :param family: where the process's counts are kept.
    """

    def __init__(self, pool: str | None, logger: Any, family: Family) -> None:
        self.family = family
        self.row = family.join()
        self._pid = os.getpid()
        self.pool = pool or f"pool-{next(_numbers)}"
        self.logger = _over_stdlib(logger) if isinstance(logger, logging.Logger) else logger
        self._listens: Callable[[int], bool] = _always
        # The configuration of structlog under which that was found.
        self._factory: object = None
        self._wrapper: object = None
        self._configured: object = None
        self._deferred: deque[tuple[Context, str, str, dict[str, object]]] = deque()

    # -- a connection's life

    def connection_opened(self, tag: ConnectionTag, create_time: float) -> None:
        """A connection was opened; `create_time` in seconds, connect events included."""
        self.row.add_opened(int(create_time * 1e9))
        self._emit("info", "connection.opened", tag, create_time=round(create_time, 6))
        over = self.family.exceeds_server(self.pool)
        if over is not None:
            self.pool_over_maximum(over.alive, over.maximum, over.server_max_connections)

    def connection_checked_out(self, tag: ConnectionTag, wait_time: float) -> None:
        """A checkout succeeded; `wait_time` in seconds, with pre-ping and connecting where needed.

        Only called where `hears` said so.
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
        self.row.add(Count.INVALIDATIONS)
        # The class alone: a driver's message may quote a statement with its parameters.
        name = None if error is None else type(error).__name__
        self._emit("info", "connection.invalidated", tag, soft=soft, error=name)

    # -- checkouts that took or lasted too long

    def checkout_timed_out(self, wait_time: float, size: int, overflow: int, checked_out: int) -> None:
        """No connection was free for `wait_time` seconds."""
        self.row.add(Count.TIMEOUTS)
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
        self.row.add(Count.REPLACED)
        by = None if tag is None else tag.connection_id
        by_server_pid = None if tag is None else tag.server_pid
        self._emit("info", "connection.replaced", inherited, by=by, by_server_pid=by_server_pid)

    def connection_refused(self, tag: ConnectionTag | None, state: str) -> None:
        """A use of an inherited connection, or (without a tag) a checkout, was refused."""
        self.row.add(Count.REFUSED)
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

    def pool_over_maximum(
        self, processes: int, maximum: int | None, server_max_connections: int | None
    ) -> None:
        """The family's processes may have more connections than their server takes; told once."""
        self._emit(
            "warning",
            "pool.over_maximum",
            processes=processes,
            maximum=maximum,
            server_max_connections=server_max_connections,
        )

    # -- how it is told

    def hears(self, level: int = logging.DEBUG) -> bool:
        """Return whether an event of this level would be heard at present.

        Notices at once that structlog was configured anew or that a level of the stdlib's changed.
        Takes 0.1 µs; to bind a logger and ask that one takes 3.
        """
        if (
            _configuration.logger_factory is not self._factory
            or _configuration.default_wrapper_class is not self._wrapper
            or _configuration.is_configured is not self._configured
        ):
            self._look_who_listens()
        try:
            return self._listens(level)
        except Exception:
            return True  # its own affair, which `_write` tells of

    def _look_who_listens(self) -> None:
        factory, wrapper = _configuration.logger_factory, _configuration.default_wrapper_class
        configured = _configuration.is_configured
        try:
            self._listens = _level_check(self._bound_logger())
        except Exception:
            self._listens = _always  # `_write` will tell of it
        self._factory, self._wrapper, self._configured = factory, wrapper, configured

    def _bound_logger(self) -> Any:
        logger = self.logger
        if logger is not None:
            bound = logger.bind() if hasattr(logger, "bind") else logger
            return bound.sync_bl if isinstance(bound, structlog.stdlib.AsyncBoundLogger) else bound
        if not _configuration.is_configured:
            return _stdlib_logger.bind()
        wrapper = _configuration.default_wrapper_class
        if wrapper is structlog.stdlib.AsyncBoundLogger:
            # Its methods are coroutines, and there is nobody here to await them.
            wrapper = structlog.stdlib.BoundLogger
        return structlog.wrap_logger(None, wrapper_class=wrapper, logger_factory_args=("pidpool",)).bind()

    def _emit(
        self,
        level: str,
        event: str,
        tag: ConnectionTag | None = None,
        *,
        at: float | None = None,
        **fields: object,
    ) -> None:
        if not self.hears(_LEVELS[level]):
            return
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
        if _thread.finalizers:
            self._deferred.append((copy_context(), level, event, fields))
            if fork.flag[0] == fork.SETTLED:
                fork.flag[0] = fork.UNREPORTED  # the next door of a pool will tell it
        elif not _thread.telling:
            self._write(level, event, fields)
        # Else a log handler uses a pool. To tell of that would make it use the pool, without an end.

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold the events of this thread back: it runs a finalizer, which may have interrupted it
        while it held a log writer's lock."""
        _thread.finalizers += 1
        try:
            yield
        finally:
            _thread.finalizers -= 1

    def emit_deferred(self) -> None:
        """Write the events that finalizers held back, in the context in which they were told."""
        while True:
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
        within, _thread.telling = _thread.telling, True
        try:
            getattr(self._bound_logger(), level)(event, **fields)
        except Exception:
            _complain(event)
        finally:
            _thread.telling = within


def _complain(event: str) -> None:
    # A full disk under a log must not cost anybody a connection; logging's own rule.
    if logging.raiseExceptions and sys.stderr is not None:
        try:
            sys.stderr.write(f"pidpool: the event {event} could not be logged:\n")
            traceback.print_exc(file=sys.stderr)
        except (OSError, ValueError):
            pass  # nor is there anybody to complain to


def _over_stdlib(logger: logging.Logger) -> Any:
    """Return a structlog logger that takes nothing from structlog's configuration."""
    return structlog.wrap_logger(
        logger,
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=False,
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.processors.KeyValueRenderer(key_order=["event", "pool", "pid"]),
        ],
    )


_stdlib_logger = _over_stdlib(logging.getLogger("pidpool"))


def _always(level: int) -> bool:
    return True


def _level_check(bound: Any) -> Callable[[int], bool]:
    """Return the function by which a logger says whether it hears a level."""
    names = ("is_enabled_for", "isEnabledFor")  # structlog's own since 25.1; the stdlib's
    # Looked up in the class: any attribute of a `structlog.BoundLogger` is a method that logs.
    check = next((getattr(bound, name) for name in names if hasattr(type(bound), name)), None)
    inner = getattr(bound, "_logger", None)
    if isinstance(inner, logging.Logger) and (
        # Asked without the detour, and also where structlog's own level would let everything pass.
        check is None or isinstance(bound, structlog.stdlib.BoundLogger) or check(logging.DEBUG)
    ):
        check = inner.isEnabledFor
    return check or _always


class _AskedConfiguration:
    """structlog's configuration by its public functions, which takes twice the time."""

    is_configured = property(lambda self: structlog.is_configured())
    default_wrapper_class = property(lambda self: structlog.get_config()["wrapper_class"])
    logger_factory = property(lambda self: structlog.get_config()["logger_factory"])


_configuration: Any = getattr(structlog._config, "_CONFIG", None) or _AskedConfiguration()
