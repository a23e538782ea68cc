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
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import structlog

from pidpool import fork

if TYPE_CHECKING:
    from pidpool.ownership import ConnectionTag

ClosedReason = Literal["recycled", "invalidated", "overflow", "disposed", "detached", "failed"]
Trigger = Literal["hook", "lazy"]

_numbers = itertools.count(1)
_finalizing = threading.local()


class Telemetry:
    """The events of one pool.

    Never called inside an at-fork hook or a finalizer: a log writer's lock may be held there.
    Fields are scalars; none holds a password, a DSN or query parameters.

    :param pool: the pool's name in every event; None for ``pool-<number>``.
    :param logger: a structlog logger (or one with its methods) to use instead of structlog's own.
    """

    def __init__(self, pool: str | None = None, logger: Any = None) -> None:
        self.pool = pool or f"pool-{next(_numbers)}"
        self.logger = logger
        self._deferred: deque[tuple[str, str, dict[str, object]]] = deque()

    def connection_opened(self, tag: ConnectionTag, create_time: float) -> None:
        """A connection was opened; `create_time` in seconds, connect events included."""
        self._emit("info", "connection.opened", tag, create_time=round(create_time, 6))

    def connection_closed(self, tag: ConnectionTag, reason: ClosedReason) -> None:
        self._emit("info", "connection.closed", tag, reason=reason)

    def connection_invalidated(self, tag: ConnectionTag, soft: bool, error: BaseException | None) -> None:
        # The class alone: a driver's message may quote a statement with its parameters.
        name = None if error is None else type(error).__name__
        self._emit("info", "connection.invalidated", tag, soft=soft, error=name)

    def connection_inherited(self, tag: ConnectionTag, state: str, action: str) -> None:
        """The cross-process leak, told by the inheritor: one for each inherited connection."""
        level = "warning" if state in ("in transaction", "unknown") else "info"
        self._emit(level, "connection.inherited", tag, state=state, action=action)

    def connection_replaced(self, inherited: ConnectionTag, tag: ConnectionTag | None) -> None:
        """A checkout goes on with a connection of this process's own."""
        by = None if tag is None else tag.connection_id
        by_server_pid = None if tag is None else tag.server_pid
        self._emit("info", "connection.replaced", inherited, by=by, by_server_pid=by_server_pid)

    def connection_refused(self, tag: ConnectionTag | None, state: str) -> None:
        """A use of an inherited connection, or (without a tag) a checkout, was refused."""
        self._emit("warning", "connection.refused", tag, state=state)

    def pool_adopted(
        self,
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
            parent_pid=parent_pid,
            trigger=trigger,
            idle=idle,
            checked_out=checked_out,
            in_transaction=in_transaction,
            connects_in_flight=connects_in_flight,
        )

    def _emit(self, level: str, event: str, tag: ConnectionTag | None = None, **fields: object) -> None:
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
        fields = {"pool": self.pool, "pid": os.getpid(), **fields}
        if getattr(_finalizing, "depth", 0):
            self._deferred.append((level, event, fields))
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
                level, event, fields = self._deferred.popleft()
            except IndexError:
                return
            self._write(level, event, fields)

    def forget_deferred(self) -> None:
        """Drop what a child inherited: the parent tells it."""
        self._deferred = deque()

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


_stdlib_logger: Any = structlog.wrap_logger(
    logging.getLogger("pidpool"),
    wrapper_class=structlog.stdlib.BoundLogger,
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.contextvars.merge_contextvars,
        structlog.processors.KeyValueRenderer(key_order=["event", "pool", "pid"]),
    ],
)
