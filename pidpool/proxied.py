"""SQLAlchemy's pool entry and checked-out connection, made to know whose connection they hold.

A `PidRecord` is a pool's slot, a `PidFairy` one checkout of it. Both ask at every door whether this
is still the process that opened the connection; in a child they find a `DisownedConnection` in its
place. Read beside sqlalchemy/pool/base.py, whose two classes these extend.
"""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.pool.base import _ConnectionFairy, _ConnectionRecord

from pidpool import fork
from pidpool.checkouts import Checkout
from pidpool.fork import WIPED, flag
from pidpool.inherited import DisownedConnection
from pidpool.streams import StreamCursor

if TYPE_CHECKING:
    from pidpool.ownership import Holding
    from pidpool.pool import PidPool
    from pidpool.telemetry import ClosedReason

# The attributes behind the properties and past the checks, read and written in a child's adoption.
record_connection: Any = _ConnectionRecord.__dict__["dbapi_connection"]
fairy_connection: Any = _ConnectionFairy.__dict__["dbapi_connection"]


class PidRecord(_ConnectionRecord):
    """One slot of a pool.

    `inherited` is set in a child for every slot that held a connection at the fork: such a slot is
    not counted there and never goes back into the pool.
    """

    __slots__ = ("holding", "inherited", "closed_reason")

    holding: Holding | None
    inherited: bool
    closed_reason: ClosedReason

    def __init__(self, pool: PidPool, connect: bool = True) -> None:
        self.holding = None
        self.inherited = False
        self.closed_reason = "recycled"
        super().__init__(pool, connect)

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


class PidFairy(_ConnectionFairy):
    """One checkout of a connection: what ``engine.raw_connection()`` returns.

    Belongs to one thread at a time, as SQLAlchemy's. In a forked child it holds a
    `DisownedConnection` until the first use opens a connection of the child's own.
    """

    __slots__ = ("_finalizer", "_detached_holding")

    _finalizer: Checkout  # type: ignore[assignment, unused-ignore]  # a weakref.finalize in 2.1
    _detached_holding: Holding | None

    def __init__(self, pool: PidPool, dbapi_connection: Any, record: PidRecord, echo: Any) -> None:
        # Not SQLAlchemy's own: its finalizer would go for the connection without asking whose it is.
        self._pool = pool
        self._counter = 0
        self._echo = echo
        self._detached_holding = None
        self._hold(dbapi_connection, record)

    def _hold(self, dbapi_connection: Any, record: PidRecord) -> None:
        fairy_connection.__set__(self, dbapi_connection)
        self._connection_record = record
        self._finalizer = checkout = Checkout.of(self, record, self.pidpool, self._echo)
        record.fairy_ref = checkout  # type: ignore[assignment]  # to a subclass

    @property
    def dbapi_connection(self) -> Any:
        if flag[0] == WIPED:
            fork.notice()
        return fairy_connection.__get__(self)

    @dbapi_connection.setter
    def dbapi_connection(self, value: Any) -> None:
        fairy_connection.__set__(self, value)

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

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        cursor = self.dbapi_connection.cursor(*args, **kwargs)
        # Named, as psycopg2 and psycopg have it.
        return StreamCursor(cursor) if (args and args[0]) or kwargs.get("name") else cursor

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
        super().detach()
        self._finalizer.detach()

    def _checkin(self, transaction_was_reset: bool = False) -> None:
        if self._is_disowned():
            self._let_go()
            return
        if self._connection_record is not None:
            self._finalizer.tell_return()
        super()._checkin(transaction_was_reset)
        self._finalizer.detach()

    def _is_disowned(self) -> bool:
        return isinstance(self.dbapi_connection, DisownedConnection)

    def _let_go(self) -> None:
        """End the checkout of a connection that is not this process's, without touching it."""
        record = self._connection_record
        if record is not None:
            record.checkin()
        self._finalizer.detach()
        self.dbapi_connection = None
        self._connection_record = None

    def _go_on_with(self, other: PidFairy) -> Any:
        """Take over the connection of a checkout just made, in the place of an inherited one."""
        inherited = cast("PidRecord | None", self._connection_record)
        self._finalizer.detach()
        other._finalizer.detach()
        connection = fairy_connection.__get__(other)
        record = cast("PidRecord | None", other._connection_record)
        self.__dict__.pop("info", None)  # memoized from the inherited record
        if record is None:
            self._detached_holding = other._detached_holding
            if self._detached_holding is not None:
                self._detached_holding.detached = weakref.ref(self)
            self._connection_record = None
            fairy_connection.__set__(self, connection)
        else:
            if inherited is not None:
                # What SQLAlchemy wants undone at checkin, such as an isolation level.
                record.finalize_callback.extend(inherited.finalize_callback)
                inherited.checkin()
            self._hold(connection, record)
        self._finalizer.go_on_as(other._finalizer)
        # Emptied, so that its end does not return the connection.
        other._connection_record = None
        other.dbapi_connection = None
        return connection


_class_of_records = vars(_ConnectionRecord)
_checkout_of_sqlalchemy = _class_of_records["checkout"]


def check_out(pool: PidPool) -> PidFairy:
    """Take an entry from the pool, connected, as a new checkout; may wait for pool_timeout seconds."""
    # SQLAlchemy's own method names its own fairy; but who has wrapped it (a tracer, SQLAlchemy's
    # tests) is not passed over.
    if _class_of_records["checkout"] is not _checkout_of_sqlalchemy:
        return _instead_of(_ConnectionRecord.checkout(pool))
    record = cast(PidRecord, pool._do_get())
    try:
        dbapi_connection = record.get_connection()
    except BaseException as error:
        record._checkin_failed(error, _fairy_was_created=False)
        raise
    echo = pool._should_log_debug()
    if echo:
        pool.logger.debug("Connection %r checked out from pool", dbapi_connection)
    return PidFairy(pool, dbapi_connection, record, echo)


def _instead_of(fairy: _ConnectionFairy) -> PidFairy:
    """Take a checkout of SQLAlchemy's over, which is dropped without an effect afterwards."""
    pool, record = cast("PidPool", fairy._pool), cast(PidRecord, fairy._connection_record)
    if hasattr(fairy, "_finalizer"):  # 2.1; 2.0's finds another reference in its record, and does nothing
        fairy._finalizer.detach()
    return PidFairy(pool, fairy.dbapi_connection, record, fairy._echo)
