"""`DisownedConnection`: stands where an inherited connection stood, in its checkout and in its pool entry.
`Inheritance` holds the rules: when a use gets a connection of the child's own, and when it raises.

A stand-in may be made inside an at-fork hook: that takes no lock, logs nothing and sends nothing.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol, TypeVar

from pidpool.drivers import Driver, Settings, driver_of
from pidpool.errors import ForeignConnectionError, foreign_error_for
from pidpool.forks import detection
from pidpool.forks.detection import SETTLED, fork_state
from pidpool.forks.ownership import Checkout
from pidpool.tag import ConnectionTag
from pidpool.terms import OnForeign, StateAtFork


class ReplacingPool(Protocol):
    """The pool of an inherited connection, as far as its stand-in needs it."""

    on_foreign: OnForeign

    @property
    def engine_dialect(self) -> Any: ...

    def replace_inherited(self, checkout: Any, tag: ConnectionTag, driver: Driver, settings: Settings) -> Any:
        """Let a checkout go on with a connection of this process's own, and return that connection."""

    def report_refused(self, tag: ConnectionTag, state: StateAtFork) -> None: ...


_Answer = TypeVar("_Answer")


def _answer(ask: Callable[[Any], _Answer | None], connection: Any) -> _Answer | None:
    """Return what a driver says of a connection; None if it does not say."""
    try:
        return ask(connection)
    except Exception:
        # A driver's error comes again. What does not is an interrupt, a soft time limit for example, and says
        # nothing of the connection: whoever asks begins again.
        try:
            ask(connection)
        except Exception:
            return None
        raise


def transaction_state(connection: Any) -> StateAtFork:
    """Return, without I/O, what a checked-out connection is doing on the server."""
    in_transaction = _answer(driver_of(connection).in_transaction, connection)
    if in_transaction is None:
        return "unknown"
    return "in transaction" if in_transaction else "no transaction"


def is_busy(connection: Any) -> bool | None:
    """Return, without I/O, whether a call of the driver's is in flight on a connection; None if that is not
    known."""
    return _answer(driver_of(connection).is_busy, connection)


class Inheritance:
    """One inherited connection that was checked out at the fork, and what may become of its checkout."""

    __slots__ = ("pool", "tag", "state", "_settings", "_driver", "_checkout", "_refused")

    def __init__(
        self,
        pool: ReplacingPool,
        tag: ConnectionTag,
        connection: Any,
        state: StateAtFork,
        checkout: Checkout | None,
    ) -> None:
        self.pool = pool
        self.tag = tag
        self.state = state
        self._checkout: weakref.ref[Checkout] | None = None
        self._settings: Settings | None = None
        if checkout is not None:  # otherwise nothing will go on with another connection
            self._checkout = weakref.ref(checkout)
            self._driver = driver_of(connection)
            self._settings = _answer(self._driver.settings, connection)  # None if they can't be carried over
        self._refused = False

    def forget_transaction(self) -> None:
        """Note that this process gave the owner's transaction up; what comes next may be replaced."""
        if self.state in ("in transaction", "unknown"):
            self.state = "no transaction"
            # If the driver does not say, the pool's defaults: SQLAlchemy itself goes on with them after a
            # disconnect.
            self._settings = self._settings or {}

    def may_be_replaced(self) -> bool:
        """Return whether the next use opens a connection of this process's own."""
        return (
            self.state == "no transaction"
            and self._settings is not None
            and self.pool.on_foreign == "replace"
        )

    def replaced_by(self) -> Any:
        """Return the connection that already stands in this one's place, or None."""
        checkout = None if self._checkout is None else self._checkout()
        if checkout is None:
            return None
        now = checkout.dbapi_connection
        return None if isinstance(now, DisownedConnection) else now

    def replacement(self) -> Any:
        """Return a connection of this process's own for the checkout, opening it on first use.

        :raises ForeignConnectionError: if the rules say so; it is the driver's OperationalError too.
        """
        now = self.replaced_by()
        if now is not None:
            return now
        checkout = None if self._checkout is None else self._checkout()
        # A checkout without a connection has been closed: a use of the stand-in that is still held raises.
        if checkout is None or checkout.dbapi_connection is None or not self.may_be_replaced():
            self.refuse()
        assert self._settings is not None
        return self.pool.replace_inherited(checkout, self.tag, self._driver, self._settings)

    def refuse(self) -> NoReturn:
        """Raise the error, and report it once for each connection."""
        pid = os.getpid()
        if not self._refused:
            self._refused = True
            if fork_state[0] != SETTLED:
                detection.settle()  # what was inherited is logged first
            self.pool.report_refused(self.tag, self.state)
        raise self.error(pid)

    def error(self, pid: int) -> ForeignConnectionError:
        """Return the error for a use of the connection by process `pid`."""
        here = f"connection {self.tag.connection_id} belongs to pid {self.tag.owner_pid}"
        if self.state == "in transaction":
            fact = f"{here} and is in a transaction there"
        elif self.state == "unknown":
            fact = f"{here} and its driver does not say whether it is in a transaction there"
        elif self.pool.on_foreign == "refuse":
            fact = f"{here} and on_foreign='refuse' allows no replacement"
        else:
            fact = f"{here} and its settings can't be carried over to another connection"
        message = f"{fact}; roll back or close in pid {pid} and check out again"
        dialect = self.pool.engine_dialect
        # A pool without an engine has a dialect without a driver.
        operational_error = getattr(getattr(dialect, "loaded_dbapi", None), "OperationalError", None)
        error_class: type[ForeignConnectionError] = ForeignConnectionError
        if isinstance(operational_error, type):
            error_class = foreign_error_for(operational_error)
        _make_known_as_disconnect(dialect)
        return error_class(
            message,
            connection_id=self.tag.connection_id,
            owner_pid=self.tag.owner_pid,
            pid=pid,
            state=self.state,
        )


def _make_known_as_disconnect(dialect: Any) -> None:
    """Have a dialect take a `ForeignConnectionError` for a disconnect.

    Each dialect has ways of its own to recognise one: numbers, texts, a question to the connection. This
    process's dialect gets one more at the first such error; an event listener would cost every statement.
    """
    is_disconnect = getattr(dialect, "is_disconnect", None)
    if is_disconnect is None or hasattr(is_disconnect, "pidpool_knows"):
        return  # of a pool without an engine, or done

    def knows_foreign_connection(error: Exception, connection: Any, cursor: Any) -> bool:
        return isinstance(error, ForeignConnectionError) or bool(is_disconnect(error, connection, cursor))

    knows_foreign_connection.pidpool_knows = True  # type: ignore[attr-defined]
    dialect.is_disconnect = knows_foreign_connection


class DisownedConnection:
    """Stands where an inherited connection stood, in its checkout and in its pool entry.

    ``rollback()`` and ``close()`` do nothing, and neither does ``commit()`` if no transaction is open. Any
    other use gets the process a connection of its own or raises, depending on the pool's ``on_foreign``
    and the state at the fork. After the replacement this object passes every use on to the new connection.
    """

    __slots__ = ("pidpool_inheritance",)
    pidpool_inheritance: Inheritance

    notices = ()  # psycopg2's dialect looks for them after every statement

    def __init__(self, inheritance: Inheritance) -> None:
        object.__setattr__(self, "pidpool_inheritance", inheritance)

    def __repr__(self) -> str:
        inheritance = self.pidpool_inheritance
        return (
            f"<DisownedConnection {inheritance.tag.connection_id} of pid {inheritance.tag.owner_pid}, "
            f"{inheritance.state}>"
        )

    @property
    def closed(self) -> Any:
        """True: psycopg2's and psycopg's dialects recognise a disconnect by it."""
        now = self.pidpool_inheritance.replaced_by()
        return 1 if now is None else now.closed

    @property
    def broken(self) -> Any:
        """True, as `closed`; psycopg 3 has both."""
        now = self.pidpool_inheritance.replaced_by()
        return True if now is None else now.broken

    @property
    def _connection(self) -> Any:
        """asyncpg's own connection. After every error its dialect asks it whether it is closed."""
        inheritance = self.pidpool_inheritance
        if inheritance.replaced_by() is None and not inheritance.may_be_replaced():
            return self
        return inheritance.replacement()._connection

    def is_closed(self) -> bool:
        return bool(self.closed)

    def rollback(self) -> None:
        now = self.pidpool_inheritance.replaced_by()
        if now is not None:
            now.rollback()
        else:
            self.pidpool_inheritance.forget_transaction()

    def tpc_rollback(self, *xid: object) -> None:
        now = self.pidpool_inheritance.replaced_by()
        if now is not None:
            now.tpc_rollback(*xid)
        else:
            self.pidpool_inheritance.forget_transaction()

    def close(self) -> None:
        pass

    terminate = close

    def commit(self) -> None:
        now = self.pidpool_inheritance.replaced_by()
        if now is not None:
            now.commit()
        elif not self.pidpool_inheritance.may_be_replaced():
            # Returning would be a lie: the owner's transaction is not this process's to commit.
            self.pidpool_inheritance.refuse()

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        inheritance = self.pidpool_inheritance
        if inheritance.replaced_by() is None and inheritance.state == "in transaction":
            return _DisownedCursor(self)
        return inheritance.replacement().cursor(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.pidpool_inheritance.replacement(), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.pidpool_inheritance.replacement(), name, value)


class _DisownedCursor:
    """A cursor on a connection whose transaction is the owner's. It raises at every use but one: a rollback
    to a savepoint does nothing, so that leaving ``begin_nested()`` raises nothing."""

    description = None
    rowcount = -1
    arraysize = 1
    itersize = 1
    lastrowid = None

    def __init__(self, connection: DisownedConnection) -> None:
        self.connection = connection

    def execute(self, statement: Any, *parameters: Any) -> None:
        if not str(statement).lstrip().upper().startswith("ROLLBACK"):
            self.connection.pidpool_inheritance.refuse()

    def close(self) -> None:
        pass

    def __enter__(self) -> _DisownedCursor:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        self.connection.pidpool_inheritance.refuse()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.connection.pidpool_inheritance.refuse()
