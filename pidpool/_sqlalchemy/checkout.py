"""SQLAlchemy's pool entry and checked-out connection, made to know whose connection they hold.

A `PidRecord` is a pool's slot, a `PidFairy` one checkout of it. Both ask at every door whether this
is still the process that opened the connection; in a child they find a `DisownedConnection` in its
place. Read beside sqlalchemy/pool/base.py, whose two classes these extend.
"""

from __future__ import annotations

import logging
import time
import weakref
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import __version__ as sqlalchemy_version
from sqlalchemy.pool.base import _ConnectionFairy, _ConnectionRecord, _finalize_fairy, reset_rollback

from pidpool.forks import detection as fork
from pidpool.forks.detection import WIPED, flag
from pidpool.forks.named_cursor import StreamCursor
from pidpool.forks.stand_in import DisownedConnection
from pidpool.stats import process_counters

if TYPE_CHECKING:
    from pidpool.events.emitter import ClosedReason
    from pidpool.events.watched_checkout import Checkout
    from pidpool.forks.ownership import Holding
    from pidpool.pool import PidPool


class PidRecord(_ConnectionRecord):
    """One slot of a pool.

    `inherited` is set in a child for every slot of the parent's: such a slot is not counted there and
    never goes back into the pool.
    """

    __slots__ = (
        "holding",
        "inherited",
        "closed_reason",
        "checkout_told",
        "out_since",
        "row",
        "slot_number",
        "slot",
    )

    holding: Holding | None
    inherited: bool
    closed_reason: ClosedReason
    checkout_told: Checkout | None
    out_since: int
    """`time.perf_counter_ns()` of the checkout; 0 while it is idle."""
    row: process_counters.ProcessCounters
    slot_number: int
    slot: memoryview
    """Where its checkouts are counted, in the process's row of the family's memory."""

    def __init__(self, pool: PidPool, connect: bool = True) -> None:
        self.holding = None
        self.inherited = False
        self.closed_reason = "recycled"
        self.checkout_told = None
        self.out_since = 0
        self.row = row = pool._telemetry.row
        self.slot_number, self.slot = row.assign_slot(self)
        super().__init__(pool, connect)

    def __del__(self) -> None:
        self.row.release_slot(self)

    def disinherit(self) -> None:
        """Note, in a child, that this entry is the parent's, and so are the words where it counts."""
        self.inherited = True
        self.slot = process_counters.SCRATCH
        self.slot_number = self.out_since = 0
        self.checkout_told = None

    def hold(self, holding: Holding) -> None:
        """Note which connection the slot holds from now on."""
        self.holding = holding
        process_counters.write_connection(self.slot, holding.tag)

    def hold_none(self) -> None:
        """Note that the slot holds no connection any more."""
        process_counters.write_connection(self.slot, None)

    @property
    def pidpool(self) -> PidPool:
        return cast("PidPool", self._ConnectionRecord__pool)  # type: ignore[attr-defined]

    @property
    def pidpool_holding(self) -> Holding | None:
        """What is known of the connection in the slot; None while it holds none."""
        return None if self.dbapi_connection is None else self.holding

    @property
    def driver_connection(self) -> Any:  # type: ignore[override]  # as SQLAlchemy's own classes
        if flag[0] == WIPED:
            fork.notice()
        return super().driver_connection

    def _ConnectionRecord__connect(self) -> None:
        # SQLAlchemy's own private method, the one place through which every connect and reconnect
        # of a record passes, its first-connect events included. A fork has to wait for all of it:
        # a dialect half initialised in another thread would stay so in the child.
        gate = fork.gate
        self.closed_reason = "failed"
        try:
            gate.enter_connect()
            started = time.perf_counter()
            super()._ConnectionRecord__connect()  # type: ignore[misc]
        finally:
            gate.leave_connect()
            self.closed_reason = "recycled"
        if self.holding is not None:
            self.pidpool._telemetry.connection_opened(self.holding.tag, time.perf_counter() - started)

    def close(self) -> None:
        if self._let_go_if_inherited():
            return
        super().close()

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:
        if self._let_go_if_inherited():
            return
        holding = self.pidpool_holding
        if holding is not None:
            self.pidpool._telemetry.connection_invalidated(holding.tag, soft, e)
        if not soft:
            self.closed_reason = "invalidated"
        try:
            super().invalidate(e, soft)
        finally:
            self.closed_reason = "recycled"

    def checkin(self, _fairy_was_created: bool = True) -> None:
        if self._let_go_if_inherited():
            self.fairy_ref = None
            return
        super().checkin(_fairy_was_created)

    def _let_go_if_inherited(self) -> bool:
        if flag[0] == WIPED:
            fork.notice()
        if not self.inherited:
            return False
        self.finalize_callback.clear()
        self.dbapi_connection = None
        return True


class _NoFinalizer:
    """What SQLAlchemy finds where it puts a `weakref.finalize`, and tells that it is not needed."""

    def detach(self) -> None: ...


class PidFairy(_ConnectionFairy):
    """One checkout of a connection: what ``engine.raw_connection()`` returns.

    Belongs to one thread at a time, as SQLAlchemy's. In a forked child it holds a
    `DisownedConnection` until the first use opens a connection of the child's own.
    """

    __slots__ = ("_held",)

    _finalizer = _NoFinalizer()  # type: ignore[assignment, unused-ignore]
    _held: Any
    """The driver's connection: what `dbapi_connection` is, without asking whose process this is."""
    # Few have one, so they are in the class, and in an instance's __dict__ where there is one.
    _detached_holding: Holding | None = None
    _reset_failed: BaseException | None = None

    def __init__(self, pool: PidPool, dbapi_connection: Any, record: PidRecord, echo: Any) -> None:
        # Not SQLAlchemy's own: its finalizer would go for the connection without asking whose it is,
        # and costs a third of a checkout.
        self._pool = pool
        self._counter = 0
        self._echo = echo
        self._held = dbapi_connection
        self._connection_record = record
        record.fairy_ref = weakref.ref(self)

    def __del__(self) -> None:
        """Return the connection of a checkout that was dropped; never logs, never raises."""
        record: Any = self._connection_record  # not cast(): these lines run with every checkout
        if record is None:
            return  # it was closed or detached
        if flag[0] == WIPED:
            fork.notice()  # first: what this process inherited is not its to return
        # A checkout that failed has returned its entry, and lives as long as the traceback: by now the
        # entry may be another one's.
        reference = record.fairy_ref
        if reference is None or reference() not in (self, None):
            return
        record.fairy_ref = _GONE  # SQLAlchemy asks whether it is
        pool = self.pidpool
        with pool._telemetry.deferred():
            if record.inherited:
                record.checkin()
            else:
                _give_back(record, pool, self._echo)

    @property
    def dbapi_connection(self) -> Any:
        if flag[0] == WIPED:
            fork.notice()
        return self._held

    @dbapi_connection.setter
    def dbapi_connection(self, value: Any) -> None:
        self._held = value

    @property
    def pidpool(self) -> PidPool:
        return cast("PidPool", self._pool)

    @property
    def pidpool_holding(self) -> Holding | None:
        if self.dbapi_connection is None:
            return None
        record = self._connection_record
        return self._detached_holding if record is None else cast(PidRecord, record).pidpool_holding

    @property
    def driver_connection(self) -> Any:  # type: ignore[override]  # as SQLAlchemy's own classes
        if flag[0] == WIPED:
            fork.notice()
        return super().driver_connection

    # Not by __getattr__, which costs more.

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        cursor = self.dbapi_connection.cursor(*args, **kwargs)
        # Named, as psycopg2 and psycopg have it.
        return StreamCursor(cursor) if (args and args[0]) or kwargs.get("name") else cursor

    def commit(self) -> None:
        self.dbapi_connection.commit()

    def rollback(self) -> None:
        self.dbapi_connection.rollback()

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:
        if self._is_disowned():
            self._let_go()
        else:
            super().invalidate(e, soft)

    def detach(self) -> None:
        connection = self.dbapi_connection
        if isinstance(connection, DisownedConnection):
            if not connection.pidpool_inheritance.may_be_replaced():
                # It already is outside of this process's pool; its use goes on raising.
                if self._connection_record is not None:
                    self._detached_holding = cast(PidRecord, self._connection_record).pidpool_holding
                    self._connection_record.checkin()
                    self._connection_record = None
                return
            connection.pidpool_inheritance.replacement()
        record = cast("PidRecord | None", self._connection_record)
        if record is not None:
            holding = record.pidpool_holding
            self._detached_holding = holding
            if holding is not None:
                holding.detached = weakref.ref(self)
            record.hold_none()
            record.checkout_told = None  # a detached connection is no longer a checkout of the pool's
        super().detach()

    def _checkin(self, transaction_was_reset: bool = False) -> None:
        if flag[0] == WIPED:
            fork.notice()
        connection, pool = self._held, self._pool
        record: Any = self._connection_record
        if isinstance(connection, DisownedConnection):
            self._let_go()
            return
        dispatch, dialect = pool.dispatch, pool._dialect
        if (
            connection is None
            or record is None
            or self._echo
            or record.finalize_callback
            or dispatch.reset
            or dispatch.checkin
            or dialect.is_async
            or pool._reset_on_return is not reset_rollback
        ):
            super()._checkin(transaction_was_reset)
            return
        # The same without what there is none of: half the time.
        if not transaction_was_reset:
            try:
                dialect.do_rollback(self)
            except BaseException as error:
                self._reset_failed = error
                super()._checkin()
                return
        record.fairy_ref = None
        self._held = self._connection_record = None
        pool._do_return_conn(record)

    def _reset(self, *args: Any, **kwargs: Any) -> None:
        # With an error that there was already: what follows is SQLAlchemy's to do.
        error, self._reset_failed = self._reset_failed, None
        if error is not None:
            raise error
        super()._reset(*args, **kwargs)

    def _is_disowned(self) -> bool:
        return isinstance(self.dbapi_connection, DisownedConnection)

    def _let_go(self) -> None:
        """End the checkout of a connection that is not this process's, without touching it."""
        record = self._connection_record
        if record is not None:
            record.checkin()
        self.dbapi_connection = None
        self._connection_record = None

    def _go_on_with(self, other: PidFairy) -> Any:
        """Take over the connection of a checkout just made, in the place of an inherited one."""
        inherited = cast("PidRecord | None", self._connection_record)
        connection, record = other._held, cast("PidRecord | None", other._connection_record)
        self.__dict__.pop("info", None)  # memoized from the inherited record
        if record is None:
            self._detached_holding = other._detached_holding
            if self._detached_holding is not None:
                self._detached_holding.detached = weakref.ref(self)
        else:
            if inherited is not None:
                # What SQLAlchemy wants undone at checkin, such as an isolation level.
                record.finalize_callback.extend(inherited.finalize_callback)
                inherited.checkin()
            record.fairy_ref = weakref.ref(self)
        self._connection_record = record
        self._held = connection
        # Emptied, so that its end does not return the connection.
        other._connection_record = None
        other.dbapi_connection = None
        return connection


def _ended() -> weakref.ref[Any]:
    class Something: ...

    something = Something()
    reference = weakref.ref(something)
    hash(reference)  # while it can be; SQLAlchemy 2.0 looks it up in a dict
    return reference


_GONE = _ended()
"""A weak reference to what is no more."""


if sqlalchemy_version.startswith("2.0."):

    def _give_back(record: PidRecord, pool: PidPool, echo: Any) -> None:
        # mypy sees SQLAlchemy 2.1's signature; 2.0's takes the reference that the record must have.
        finalize: Any = _finalize_fairy
        finalize(None, record, pool, record.fairy_ref, echo, transaction_was_reset=False)

else:

    def _give_back(record: PidRecord, pool: PidPool, echo: Any) -> None:
        _finalize_fairy(None, record, pool, echo, transaction_was_reset=False, is_gc_cleanup=True)


_class_of_records = vars(_ConnectionRecord)
_checkout_of_sqlalchemy = _class_of_records["checkout"]


def check_out(pool: PidPool) -> PidFairy:
    """Take an entry from the pool, connected, as a new checkout; may wait for pool_timeout seconds."""
    # SQLAlchemy's own method names its own fairy; but who has wrapped it (a tracer, SQLAlchemy's
    # tests) is not passed over.
    if _class_of_records["checkout"] is not _checkout_of_sqlalchemy:
        return _instead_of(_ConnectionRecord.checkout(pool))
    record: Any = pool._do_get()
    dbapi_connection = record.dbapi_connection
    # What get_connection() would find out, without the call.
    if (
        dbapi_connection is None
        or pool._recycle > -1
        or pool._invalidate_time > record.starttime
        or record._soft_invalidate_time > record.starttime
    ):
        try:
            dbapi_connection = record.get_connection()
        except BaseException as error:
            record._checkin_failed(error, _fairy_was_created=False)
            raise
    echo = pool.logger.isEnabledFor(logging.DEBUG)
    if echo:
        pool.logger.debug("Connection %r checked out from pool", dbapi_connection)
    return PidFairy(pool, dbapi_connection, record, echo)


def _instead_of(fairy: _ConnectionFairy) -> PidFairy:
    """Take a checkout of SQLAlchemy's over, which is dropped without an effect afterwards."""
    pool, record = cast("PidPool", fairy._pool), cast(PidRecord, fairy._connection_record)
    if hasattr(fairy, "_finalizer"):  # 2.1; 2.0's finds another reference in its record, and does nothing
        fairy._finalizer.detach()
    return PidFairy(pool, fairy.dbapi_connection, record, fairy._echo)
