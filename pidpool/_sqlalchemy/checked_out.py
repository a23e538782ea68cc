"""`CheckedOutConnection`: SQLAlchemy's checked-out connection, made to ask at every use whether this is still
the process that opened it. Read beside `_ConnectionFairy` in sqlalchemy/pool/base.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

from sqlalchemy.pool import Pool
from sqlalchemy.pool.base import _ConnectionFairy, _ConnectionRecord, _finalize_fairy

from pidpool._sqlalchemy import contract, copies
from pidpool._sqlalchemy.entry import PidPoolEntry
from pidpool._sqlalchemy.entry_list import GONE
from pidpool._sqlalchemy.interrupted import let_go_of_frames
from pidpool.events.pool_events import held_back
from pidpool.forks import detection
from pidpool.forks.detection import FORKED, fork_state
from pidpool.forks.ownership import OwnedConnection
from pidpool.forks.stand_in import DisownedConnection
from pidpool.forks.streamed_cursor import StreamedCursor
from pidpool.tag import ConnectionTag

_slots: Any = vars(_ConnectionFairy)


class _NoFinalizer:
    """Stands where SQLAlchemy expects a `weakref.finalize`: `CheckedOutConnection.__del__` does its work."""

    def detach(self) -> None: ...


class CheckedOutConnection(_ConnectionFairy):
    """One checkout of a connection: what ``engine.raw_connection()`` returns.

    Belongs to one thread at a time, as SQLAlchemy's. In a forked child it holds a `DisownedConnection`
    until the first use opens a connection of the child's own.
    """

    __slots__ = ()

    _finalizer = _NoFinalizer()  # type: ignore[assignment, unused-ignore]

    # SQLAlchemy's own slots, under names by which they are read without a look at the process.
    held_connection: Any = _slots["dbapi_connection"]
    """The driver's connection, or the stand-in for it."""
    entry: Any = _slots["_connection_record"]
    """The pool's entry; None once it was closed or detached."""

    # Few checkouts have one: in the class, and if there is one in the instance's __dict__.
    _detached_from: OwnedConnection | None = None
    has_streamed: bool = False
    """Whether a cursor of it may still ask the server for rows, past all doors of the pool."""
    reset_error: BaseException | None = None
    """What the rollback at checkin raised, kept for SQLAlchemy's own checkin to deal with."""

    if copies.USED:
        __init__ = copies.init_checkout
    else:

        def __init__(self, pool: Pool, dbapi_connection: Any, record: Any, echo: Any) -> None:
            # SQLAlchemy's finalizer would go for the connection without asking whose it is.
            super().__init__(pool, dbapi_connection, record, echo)
            self._finalizer.detach()
            record.fairy_ref = weakref.ref(self)

    def __del__(self) -> None:
        """Return the connection of a checkout that was dropped; never logs, never raises."""
        entry = None
        try:
            try:
                entry = self.entry
            except AttributeError:
                return  # interrupted before it was made
            if entry is None:
                return  # it was closed or detached
            if fork_state[0] == FORKED:
                detection.notice_fork()  # first: what this process inherited is not its to return
            # A checkout that failed has returned its entry, and lives as long as the traceback: the entry may
            # already be another checkout's.
            reference = entry.fairy_ref
            if reference is None or reference() not in (self, None):
                return
            entry.fairy_ref = GONE  # SQLAlchemy asks whether it is
            self.entry = None
            with held_back():
                if entry.inherited:
                    entry.checkin()
                else:
                    entry.take_part_again()
                    finalize = _finalize_async if self._pool._dialect.is_async else _finalize
                    finalize(entry, self._pool, self._echo)
        except BaseException as error:
            self.held_connection = None
            let_go_of_frames(error)
            if entry is not None and (entry.fairy_ref is GONE or self.entry is entry):
                self.entry = None
                with held_back():
                    entry.end(error)
            entry = None
            raise

    def __getattr__(self, key: str) -> Any:
        if key in ("entry", "held_connection"):
            raise AttributeError(key)  # interrupted before it was made, it has no connection to ask
        return getattr(self.dbapi_connection, key)

    # -- what it holds

    @property
    def dbapi_connection(self) -> Any:
        if fork_state[0] == FORKED:
            detection.notice_fork()
        return self.held_connection

    @dbapi_connection.setter
    def dbapi_connection(self, value: Any) -> None:
        self.held_connection = value

    @property
    def driver_connection(self) -> Any:  # type: ignore[override]  # as SQLAlchemy's own classes
        if fork_state[0] == FORKED:
            detection.notice_fork()
        return super().driver_connection

    @property
    def pidpool(self) -> Any:
        """The pool."""
        return self._pool

    @property
    def pidpool_tag(self) -> ConnectionTag | None:
        if self.dbapi_connection is None:
            return None
        if self.entry is not None:
            return cast("ConnectionTag | None", self.entry.pidpool_tag)
        return None if self._detached_from is None else self._detached_from.tag

    def is_disowned(self) -> bool:
        """Return whether it holds the stand-in for an inherited connection."""
        return isinstance(self.dbapi_connection, DisownedConnection)

    # -- its uses. Not by __getattr__, which costs more.

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        if fork_state[0] == FORKED:  # `dbapi_connection`, without the call: each statement passes here
            detection.notice_fork()
        cursor = self.held_connection.cursor(*args, **kwargs)
        pool: Any = self._pool
        if pool.streams_by_any_cursor or ((args or kwargs) and _asks_for_streaming(*args, **kwargs)):
            self.has_streamed = True
            return StreamedCursor(cursor)
        return cursor

    def commit(self) -> None:
        self.dbapi_connection.commit()

    def rollback(self) -> None:
        if fork_state[0] == FORKED:  # `dbapi_connection`, without the call: each checkin passes here
            detection.notice_fork()
        self.held_connection.rollback()

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:
        try:
            if not self.is_disowned():
                if self.entry is None and self.held_connection is not None and not soft:
                    # Detached. SQLAlchemy leaves it to the collector: a cycle of the error's may keep it for
                    # long, and with it the permit of a family that has a limit.
                    self._pool._close_connection(self.held_connection, terminate=True)
                super().invalidate(e, soft)
            elif not soft:
                self.let_go()
            # A soft one has the next checkout recycle the connection: an inherited one has no next checkout.
        except BaseException as error:
            if not soft:
                self.end(error)
            raise

    def detach(self) -> None:
        if self.is_disowned() and self.held_connection.pidpool_inheritance.may_be_replaced():
            # If that fails, the checkout is as it was, as after any other use, and can be used again.
            self.held_connection.pidpool_inheritance.replacement()
        try:
            self._detach()
        except BaseException as error:
            self.end(error)
            raise

    def _detach(self) -> None:
        if self.is_disowned():
            # It already is outside of this process's pool; its use goes on raising.
            if self.entry is not None:
                self._detached_from = self.entry.owned_now
                self.entry.checkin()
                self.entry = None
            return
        entry, pool = cast("PidPoolEntry | None", self.entry), self._pool
        if entry is None:
            return
        owned = entry.owned_now
        self._detached_from = owned
        if owned is not None:
            owned.used_by = None
            owned.detach(self)
        entry.own_none()
        entry.watched = None  # a detached connection is no longer a checkout of the pool's
        # As SQLAlchemy's own, but that the entry goes back when nothing else has it.
        info: Any = self.info
        self.info = info.copy()  # type: ignore[misc]
        self.entry = entry.fairy_ref = entry.dbapi_connection = None
        pool._do_return_conn(entry)
        if pool.dispatch.detach:
            pool.dispatch.detach(self.dbapi_connection, entry)

    def close(self) -> None:
        try:
            self._counter -= 1
            if self._counter == 0:
                self._checkin()
        except BaseException as error:
            self.end(error)
            raise

    def _close_special(self, transaction_reset: bool = False) -> None:
        try:
            self._counter -= 1
            if self._counter == 0:
                self._checkin(transaction_was_reset=transaction_reset)
        except BaseException as error:
            self.end(error)
            raise

    def end(self, error: BaseException) -> None:
        """End the checkout, since an operation that was to begin or end it was interrupted.

        If it still has its entry, that was not returned yet, and nothing else has it.
        """
        entry, self.entry = self.entry, None
        connection, self.held_connection = self.held_connection, None
        let_go_of_frames(error)
        if entry is not None:
            entry.end(error)
        elif self._detached_from is not None:
            pool: Any = self._pool
            pool.close_if_open(connection)

    def ping_and_call_listeners(self) -> None:
        """Have SQLAlchemy ping the connection and call the listeners, as options and application want it."""
        try:
            _ConnectionFairy._checkout(self._pool, None, self)
        except BaseException as error:
            # Not left to the finalizer: the error's traceback may keep the checkout, in the frame of a
            # listener that said that the connection is dead.
            self.end(error)
            raise

    # -- its end

    if copies.USED:
        _checkin = copies.check_in
    else:

        def _checkin(self, transaction_was_reset: bool = False) -> None:
            if fork_state[0] == FORKED:
                detection.notice_fork()
            if isinstance(self.held_connection, DisownedConnection):
                self.let_go()
            else:
                super()._checkin(transaction_was_reset)

    def _reset(self, *args: Any, **kwargs: Any) -> None:
        error, self.reset_error = self.reset_error, None
        if error is None:
            super()._reset(*args, **kwargs)
            return
        try:
            raise error  # what follows is SQLAlchemy's to do
        finally:
            del error  # a cycle with this frame would keep the checkout's frames, and what they have

    def let_go(self) -> None:
        """End the checkout of a connection that is not this process's, without touching it."""
        if self.entry is not None:
            self.entry.checkin()
        self.held_connection = self.entry = None

    def go_on_with(self, other: CheckedOutConnection) -> None:
        """Take over the connection of a checkout just made, in the place of an inherited one.

        If this is interrupted, both checkouts are as they were.
        """
        inherited, stand_in, detached_from = self.entry, self.held_connection, self._detached_from
        entry, connection = other.entry, other.held_connection
        try:
            self.__dict__.pop("info", None)  # memoized from the inherited entry
            if entry is None:
                self._detached_from = other._detached_from
                if self._detached_from is not None:
                    self._detached_from.detach(self)
            else:
                if inherited is not None:
                    # What SQLAlchemy wants undone at checkin, such as an isolation level.
                    entry.undo_at_checkin_too(inherited)
                entry.mark_checked_out(self)
            self.entry, self.held_connection = entry, connection
            # Emptied, so that its end does not return the connection.
            other.entry = other.held_connection = None
        except BaseException:
            self.entry, self.held_connection, self._detached_from = inherited, stand_in, detached_from
            other.entry, other.held_connection = entry, connection
            if entry is not None:
                entry.mark_checked_out(other)
            elif other._detached_from is not None:
                other._detached_from.detach(other)
            raise
        if entry is not None and inherited is not None:
            inherited.checkin()


def _asks_for_streaming(name: object = None, *_: object, server_side: bool = False, **others: object) -> bool:
    """Return whether a cursor with these arguments may ask the server for rows later.

    A name, as psycopg2 and psycopg have it, or a class of PyMySQL's; `server_side` is of SQLAlchemy's
    adapters for asyncio.
    """
    return bool(name or server_side)


def _finalize(entry: PidPoolEntry, pool: Pool, echo: Any) -> None:
    """Have SQLAlchemy reset and return the connection of a checkout that was dropped."""
    finalize: Any = _finalize_fairy
    if contract.FINALIZER_TAKES_REFERENCE:
        finalize(None, entry, pool, entry.fairy_ref, echo, transaction_was_reset=False)
    else:
        finalize(None, entry, pool, echo, transaction_was_reset=False, is_gc_cleanup=True)


def _finalize_async(entry: PidPoolEntry, pool: Any, echo: Any) -> None:
    """Have SQLAlchemy return the entry of an async checkout that was dropped.

    A finalizer can't wait for a rollback, so the connection is terminated, or dropped if the dialect can't.
    """
    owned = entry.owned_now
    entry.close_reason = "collected"
    try:
        _finalize(entry, pool, echo)
    finally:
        if owned is not None and entry.owned_now is not owned:
            entry.close_reason = "collected"
            pool.note_closed(owned)  # also if it was dropped, or a listener raised before it was terminated
        entry.close_reason = "recycled"


def _check_out_by_sqlalchemy(pool: Any) -> CheckedOutConnection:
    """Check a connection out by SQLAlchemy's own code, and take the checkout over."""
    theirs: Any = _ConnectionRecord.checkout(pool)  # names their own class
    # Theirs is dropped without an effect afterwards. 2.0's finalizer finds another reference in its entry,
    # and does nothing.
    if not contract.FINALIZER_TAKES_REFERENCE:
        theirs._finalizer.detach()
    entry = theirs._connection_record
    if entry.inherited and theirs.dbapi_connection is entry.dbapi_connection:
        return _check_out_by_sqlalchemy(pool)  # a connect listener has forked, and this is the child
    # In a child forked in the lines above, the entry has the stand-in for the connection that theirs has.
    connection = entry.dbapi_connection if entry.inherited else theirs.dbapi_connection
    ours = CheckedOutConnection(pool, connection, entry, theirs._echo)
    ours.ping_and_call_listeners()
    return cast(CheckedOutConnection, ours)


check_out: Callable[[Any, int, int], CheckedOutConnection] = copies.make_check_out(
    CheckedOutConnection, _check_out_by_sqlalchemy
)
"""``check_out(pool, started, thread)`` returns a new `CheckedOutConnection`, after pre-ping and checkout
events, and counts it. It may wait for `pool_timeout` seconds.

``started`` is the `time.perf_counter_ns()` of the call, ``thread`` the calling thread."""
