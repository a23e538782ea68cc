"""`PidPool`: SQLAlchemy's QueuePool, for processes that fork.

The pool itself, its options, and what becomes of it in a forked child. Who owns a connection is
told in ownership.py, how a fork is noticed in fork.py, what is done with an inherited connection in
inherited.py, and the entry and the checkout that users hold are in proxied.py.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from contextvars import copy_context
from typing import Any, Literal, cast

from sqlalchemy import exc
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool
from sqlalchemy.pool.base import _ConnectionFairy
from sqlalchemy.util import queue as sqlalchemy_queue

from pidpool._sqlalchemy.checkout import PidFairy, PidRecord, check_out
from pidpool._sqlalchemy.idle_queue import IdleQueue
from pidpool.drivers import Driver, Settings, driver_of
from pidpool.errors import ForeignCheckoutError
from pidpool.events import overdue
from pidpool.events import user_code as places
from pidpool.events.emitter import ClosedReason, Telemetry
from pidpool.events.watched_checkout import Checkout
from pidpool.forks import detection as fork
from pidpool.forks import ownership
from pidpool.forks import stand_in as inherited
from pidpool.forks.detection import SETTLED, WIPED, flag
from pidpool.forks.stand_in import DisownedConnection
from pidpool.forks.takeover import Adoption, Fork, forkable, renew_first_connect
from pidpool.stats import process_counters as cells
from pidpool.stats.family import Family
from pidpool.stats.snapshots import FamilyStats, PoolStats

_ON_FOREIGN = ("replace", "refuse")
_INHERITED_SOCKETS = ("sever", "keep")


class PidPool(QueuePool):
    """A `sqlalchemy.pool.QueuePool` whose connections survive a fork of the process.

    Use it as ``create_engine(url, poolclass=PidPool)``; every option is a plain keyword of
    `create_engine`. In the process that opened them connections behave as a QueuePool's. A forked
    child disowns all connections it inherits: nothing it does with them reaches the server, and the
    parent can't tell that the child existed. The child's pool starts from zero, with locks of its
    own, and opens connections of its own.

    Threads: as QueuePool, any number may use the pool at once. A fork waits for connections being
    opened in other threads, `pidpool.forks.detection.CONNECT_WAIT` seconds at most.

    :param creator: as QueuePool's; so are ``pool_size``, ``max_overflow``, ``timeout`` (seconds),
        ``use_lifo``, ``recycle`` (seconds) and all further options.
    :param on_foreign: what a child does that uses an inherited connection. ``"replace"``: it gets
        one of its own, except where a transaction was open at the fork: that raises
        `ForeignConnectionError` through SQLAlchemy's own disconnect path. ``"refuse"``: every use
        raises, and so does a checkout if the pool had idle connections, until ``engine.dispose()``.
    :param inherited_sockets: ``"sever"`` replaces the child's descriptor of each inherited socket by
        a dead one, so that the server's session ends with its owner. ``"keep"`` leaves descriptors
        alone.
    :param hold_warning: seconds; a checkout that lasts longer logs ``checkout.overdue`` once, with the
        line of code that made it, and ``checkout.returned_late`` when it ends. None: no such watch,
        and nothing is paid for it. Else a daemon thread watches, started with the first checkout.
    :param logger: a structlog or stdlib logger for the pool's events instead of structlog's own, or, where
        that is not configured, of ``logging.getLogger("pidpool")``.
    :raises ValueError: if an option has a value that it does not take.
    :raises TypeError: if an option has a value of the wrong type.
    """

    # SQLAlchemy's own lines stay below its own loggers: `pidpool` is for events alone, and SQLAlchemy's
    # DEBUG lines show the driver's repr of a connection, DSN included.
    _sqla_logger_namespace = "sqlalchemy.pool.impl.PidPool"

    on_foreign: Literal["replace", "refuse"]
    inherited_sockets: Literal["sever", "keep"]
    hold_warning: float | None

    _queue_class: Any = IdleQueue

    def __init__(
        self,
        creator: Any,
        pool_size: int = 5,
        max_overflow: int = 10,
        timeout: float | None = 30.0,
        use_lifo: bool = False,
        on_foreign: Literal["replace", "refuse"] = "replace",
        inherited_sockets: Literal["sever", "keep"] = "sever",
        hold_warning: float | None = None,
        logger: Any = None,
        **kw: Any,
    ) -> None:
        _check_choice("on_foreign", on_foreign, _ON_FOREIGN)
        _check_choice("inherited_sockets", inherited_sockets, _INHERITED_SOCKETS)
        _check_number("pool_size", pool_size, 0, whole=True, remedy="0 for no limit")
        _check_number("max_overflow", max_overflow, whole=True, remedy="a negative one for no limit")
        if timeout is not None:
            _check_number(
                "timeout",
                timeout,
                0,
                remedy="in seconds (create_engine calls it pool_timeout), or None to wait without bound",
            )
        _check_number(
            "recycle",
            kw.get("recycle", -1),
            -1,
            remedy="in seconds, -1 for never (create_engine calls it pool_recycle)",
        )
        if hold_warning is not None:
            _check_number("hold_warning", hold_warning, 0, remedy="in seconds, or None for no warnings")
        if logger is not None and not callable(getattr(logger, "warning", None)):
            raise TypeError(f"logger={logger!r}: takes a structlog logger, or None for structlog's own")
        self.on_foreign = on_foreign
        self.inherited_sockets = inherited_sockets
        self.hold_warning = hold_warning
        unlimited = pool_size == 0 or max_overflow < 0
        family = Family(pool_size, -1 if unlimited else max_overflow)
        self._telemetry = Telemetry(kw.get("logging_name"), logger, family)
        self._refusal: _Refusal | None = None
        # What happened at forks, until it may be logged; the newest, if nobody uses the pool for long.
        self._unreported: deque[Adoption | Fork] = deque(maxlen=100)
        if flag[0] != SETTLED:
            fork.settle()
        # SQLAlchemy's annotation leaves None out, its tests do not.
        super().__init__(creator, pool_size, max_overflow, cast(float, timeout), use_lifo, **kw)
        # Reentrant, since a finalizer may return an overflowing connection inside any line.
        self._overflow_lock = threading.RLock()  # type: ignore[assignment]
        forkable.add(self)

    # -- opening and closing

    def _should_wrap_creator(self, creator: Any) -> Any:
        invoke = super()._should_wrap_creator(creator)

        def open_and_tag(record: PidRecord) -> Any:
            connection = invoke(record)
            record.hold(ownership.take(connection, record, sever=self.inherited_sockets == "sever"))
            inherited.prepare_to_sever()
            self._learn_max_connections(connection)
            return connection

        return open_and_tag

    def _learn_max_connections(self, connection: Any) -> None:
        """Ask the server how many connections it takes: once in a family, before anybody else has the
        connection."""
        try:
            self._telemetry.family.learn_server_max_connections(
                lambda: driver_of(connection).max_connections(connection)
            )
        except Exception:
            self.logger.debug("The server's max_connections could not be read", exc_info=True)

    def _create_connection(self) -> ConnectionPoolEntry:
        return PidRecord(self)

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        if flag[0] == WIPED:
            fork.notice()
        if isinstance(connection, DisownedConnection) or inherited.is_disowned(connection):
            return
        holding = ownership.register.get(id(connection))
        if holding is None:
            super()._close_connection(connection, terminate=terminate)
            return
        # Off the register first: once closed, the descriptor's number may be somebody else's.
        holding.let_go()
        super()._close_connection(connection, terminate=terminate)
        record = holding.record()
        reason: ClosedReason = "detached"
        if holding.detached is None:
            reason = "failed" if record is None else record.closed_reason
            if record is not None:
                record.hold_none()
        self._telemetry.connection_closed(holding.tag, reason)

    # -- the doors

    def connect(self) -> PoolProxiedConnection:
        """Check a connection out, as `Pool.connect`; in a child always one of the child's own.

        :raises ForeignConnectionError: in a child under ``on_foreign="refuse"``.
        :raises sqlalchemy.exc.TimeoutError: when none was free for `timeout` seconds.
        """
        if flag[0] != SETTLED:
            fork.settle()
        if self._refusal is not None:
            self._refuse_checkout(self._refusal)
        started = time.perf_counter_ns()
        try:
            fairy = check_out(self)
            if self.dispatch.checkout or self._pre_ping:
                fairy = cast(PidFairy, _ConnectionFairy._checkout(self, None, fairy))
            else:
                fairy._counter = 1
        except exc.TimeoutError:
            waited = (time.perf_counter_ns() - started) / 1e9
            self._telemetry.checkout_timed_out(waited, self.size(), self.overflow(), self.checkedout())
            raise
        now = time.perf_counter_ns()
        waited_ns = now - started
        bucket = (waited_ns >> 10).bit_length()  # cells.bucket(), without the call
        record: Any = fairy._connection_record
        if record is None:
            return fairy  # a checkout listener has detached or invalidated it
        record.holding.checked_out = record
        record.out_since = now
        slot = record.slot
        slot[cells.WAIT + (bucket if bucket < cells.LAST_BUCKET else cells.LAST_BUCKET)] += 1
        slot[cells.WAIT_SUM] += waited_ns
        slot[cells.IN_STATE_SINCE] = now
        slot[cells.THREAD] = threading.get_ident()
        told = self._telemetry.hears()
        if told or self.hold_warning is not None:
            self._watch(record, waited_ns / 1e9, now / 1e9, told)
        return fairy

    def _watch(self, record: PidRecord, waited: float, now: float, told: bool) -> None:
        """Tell of a checkout, and note what is to be told of its end."""
        holding = record.pidpool_holding
        told = told and holding is not None
        checkout = record.checkout_told = Checkout(record, now, told=told)
        if told and holding is not None:
            self._telemetry.connection_checked_out(holding.tag, waited)
        if self.hold_warning is not None:
            checkout.place = places.caller()
            checkout.to_tell = [copy_context()]
            checkout.due_at = now + self.hold_warning
            overdue.watch(checkout.due_at)

    def _do_get(self) -> ConnectionPoolEntry:
        while True:
            idle = self._pool  # another one where this is a child by now, forked in the lines below
            try:
                return idle.get(False)
            except sqlalchemy_queue.Empty:
                pass
            if self._inc_overflow():
                try:
                    return self._create_connection()
                except BaseException:
                    if idle is self._pool:  # else it was counted in the parent
                        self._dec_overflow()
                    raise
            with self._telemetry.row.waiting():
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
        if flag[0] == WIPED:
            fork.notice()
        entry: Any = record
        if entry.inherited:
            return  # it was never counted here
        if entry.checkout_told is not None:
            entry.checkout_told.tell_return()
            entry.checkout_told = None
        if entry.out_since:
            now = time.perf_counter_ns()
            used = now - entry.out_since
            entry.out_since = 0
            slot = entry.slot
            bucket = (used >> 10).bit_length()
            slot[cells.USE + (bucket if bucket < cells.LAST_BUCKET else cells.LAST_BUCKET)] += 1
            slot[cells.USE_SUM] += used
            slot[cells.IN_STATE_SINCE] = now
            slot[cells.THREAD] = 0
        if entry.holding is not None:
            entry.holding.checked_out = None
        try:
            self._pool.put(record, False)
        except sqlalchemy_queue.Full:
            entry.closed_reason = "overflow"
            try:
                entry.close()
            finally:
                self._dec_overflow()

    def _invalidate(
        self, connection: Any, exception: BaseException | None = None, _checkin: bool = True
    ) -> None:
        if isinstance(connection, PidFairy) and connection._is_disowned():
            # One inherited connection says nothing of the child's own: they stay.
            if _checkin:
                connection.invalidate(exception)
            return
        super()._invalidate(connection, exception, _checkin)

    def dispose(self) -> None:
        """Close the idle connections that this process owns, as `QueuePool.dispose`."""
        if flag[0] != SETTLED:
            fork.settle()
        checked_out, closed = max(0, self.checkedout()), 0
        # Told at the end: a log handler that uses this pool would open what is to be closed.
        with self._telemetry.deferred():
            while True:
                try:
                    record = cast(PidRecord, self._pool.get(False))
                except sqlalchemy_queue.Empty:
                    break
                closed += record.dbapi_connection is not None
                record.closed_reason = "disposed"
                record.close()
        self._overflow = 0 - self.size()
        # A child that disposes starts afresh, also if it keeps this pool instead of the new one.
        self._refusal = None
        self.logger.info("Pool disposed. %s", self.status())
        self._telemetry.emit_deferred()
        self._telemetry.pool_disposed(closed, checked_out)

    def recreate(self) -> PidPool:
        """Return a new pool with the same options and the same name in events."""
        if flag[0] != SETTLED:
            fork.settle()
        self.logger.info("Pool recreating")
        pool = self.__class__(
            self._creator,
            pool_size=self._pool.maxsize,
            max_overflow=self._max_overflow,
            timeout=self._timeout,
            use_lifo=self._pool.use_lifo,
            on_foreign=self.on_foreign,
            inherited_sockets=self.inherited_sockets,
            hold_warning=self.hold_warning,
            pre_ping=self._pre_ping,
            recycle=self._recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )
        pool._telemetry = self._telemetry
        return pool

    def status(self) -> str:
        """Describe the pool's state in this process, as `QueuePool.status`."""
        if flag[0] != SETTLED:
            fork.settle()
        return super().status()

    def checkedin(self) -> int:
        """Return how many connections of this process are idle."""
        if flag[0] != SETTLED:
            fork.settle()
        return super().checkedin()

    def checkedout(self) -> int:
        """Return how many connections of this process are checked out."""
        if flag[0] != SETTLED:
            fork.settle()
        return super().checkedout()

    def overflow(self) -> int:
        """Return the current overflow in this process, as `QueuePool.overflow`."""
        if flag[0] != SETTLED:
            fork.settle()
        return super().overflow()

    # -- what it counts

    def stats(self) -> PoolStats:
        """Return a snapshot of what this process's pool counts and measures.

        Takes no lock and sends nothing; any thread may call it. Counts are exact. After a fork they
        start from zero, as the pool does; ``engine.dispose()`` goes on with them.
        """
        if flag[0] != SETTLED:
            fork.settle()
        return self._telemetry.family.read_own(self._telemetry.row, self._telemetry.pool)

    def family_stats(self) -> FamilyStats:
        """Return a snapshot of this pool in all processes: the one that made it and all forked from it.

        Read from memory that they share: nobody is asked, nobody waits, and those that have ended or
        were killed are in it with what they had counted.
        """
        if flag[0] != SETTLED:
            fork.settle()
        return self._telemetry.family.read(self._telemetry.pool)

    def records(self) -> list[PidRecord]:
        """Return this process's pool entries, idle or checked out, without their order."""
        return cast("list[PidRecord]", self._telemetry.row.entries())

    # -- in a child

    def _start_from_zero(self, adoption: Adoption) -> None:
        """Replace everything that another thread may have held at the fork; runs in the at-fork hook."""
        for record in self.records():
            record.disinherit()
        inherited_queue = self._pool
        self._pool = self._queue_class(inherited_queue.maxsize, use_lifo=inherited_queue.use_lifo)
        if isinstance(inherited_queue, IdleQueue):
            inherited_queue.abandon()
        self._overflow = 0 - self._pool.maxsize
        self._overflow_lock = threading.RLock()  # type: ignore[assignment]
        if "dispatch" in self.__dict__:  # else nobody has connected or listened yet, and it is made by asking
            renew_first_connect(self.dispatch)
        self._telemetry.begin_anew(adoption.parent_pid, adoption.trigger)
        for _, state, action, _ in adoption.connections:
            self._telemetry.row.add_inherited(state, severed=action == inherited.SEVERED)
        idle = adoption.count(inherited.IDLE)
        if self.on_foreign == "refuse" and idle:
            self._refusal = _Refusal(adoption.parent_pid, idle)
        self._unreported.clear()  # the parent's to tell
        self._unreported.append(adoption)

    def _report(self) -> None:
        self._telemetry.emit_deferred()
        while self._unreported:
            try:
                noted = self._unreported.popleft()
            except IndexError:
                return  # another thread was first
            if isinstance(noted, Fork):
                self._telemetry.pool_forked(noted.at, noted.idle, noted.checked_out, noted.in_transaction)
            else:
                self._report_adoption(noted)

    def _report_adoption(self, adoption: Adoption) -> None:
        idle = adoption.count(inherited.IDLE)
        self._telemetry.pool_adopted(
            adoption.at,
            adoption.parent_pid,
            adoption.trigger,
            idle,
            len(adoption.connections) - idle,
            adoption.count(inherited.IN_TRANSACTION),
            adoption.connects_in_flight,
        )
        for tag, state, action, place in adoption.connections:
            where = None if place is None else str(place)
            self._telemetry.connection_inherited(adoption.at, tag, state, action, where)

    def _refuse_checkout(self, refusal: _Refusal) -> None:
        pid = os.getpid()
        if not refusal.reported:
            refusal.reported = True
            self._telemetry.connection_refused(None, inherited.IDLE)
        raise ForeignCheckoutError(
            f"the {refusal.idle} idle connection(s) of this pool belong to pid {refusal.owner_pid} and "
            f"on_foreign='refuse' lets pid {pid} check out none; call engine.dispose() in pid {pid} first",
            owner_pid=refusal.owner_pid,
            pid=pid,
            state=inherited.IDLE,
        )

    def _replace_inherited(
        self, fairy: PidFairy, tag: ownership.ConnectionTag, driver: Driver, settings: Settings
    ) -> Any:
        """Let a checkout of an inherited connection go on with one of this process's own."""
        other = cast(PidFairy, self.connect())
        try:
            if fairy.is_detached:
                other.detach()
            connection = other.dbapi_connection
            driver.apply(connection, settings)
        except BaseException:
            other.close()
            raise
        holding = other.pidpool_holding
        connection = fairy._go_on_with(other)
        self._telemetry.connection_replaced(tag, None if holding is None else holding.tag)
        return connection


class _Refusal:
    """Why a child's checkouts are refused."""

    def __init__(self, owner_pid: int, idle: int) -> None:
        self.owner_pid = owner_pid
        self.idle = idle
        self.reported = False


def _check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{option}={value!r}: takes one of {', '.join(map(repr, choices))}")


def _check_number(
    option: str, value: object, least: int | None = None, *, whole: bool = False, remedy: str
) -> None:
    kind = "a whole number" if whole else "a number"
    bound = "" if least is None else f" of {least} or more"
    takes = f"takes {kind}{bound}, {remedy}"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise TypeError(f"{option}={value!r}: {takes}")
    if not math.isfinite(value) or (least is not None and value < least):
        raise ValueError(f"{option}={value!r}: {takes}")
