"""What a process does with the connections it inherited: it disowns them. Their sockets are severed,
the driver's objects are pinned, and a `DisownedConnection` stands where each of them stood.

Everything here may run inside an at-fork hook: no lock is taken, nothing is logged, nothing is sent.
"""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from pidpool.drivers import Settings, driver_of
from pidpool.errors import ForeignConnectionError, foreign_error_for
from pidpool.forks import detection as fork

if TYPE_CHECKING:
    from pidpool._sqlalchemy.checkout import PidFairy
    from pidpool.forks.ownership import ConnectionTag, Holding
    from pidpool.pool import PidPool

IDLE = "idle"
NO_TRANSACTION = "no transaction"
IN_TRANSACTION = "in transaction"
UNKNOWN = "unknown"

SEVERED = "severed"
KEPT = "kept"

_disowned: set[int] = set()


def is_disowned(connection: Any) -> bool:
    """Return whether this driver connection was inherited and disowned in this process."""
    return id(connection) in _disowned


def disown(holding: Holding, connection: Any) -> str:
    """Let go of an inherited connection without a byte to the server; return what became of its socket.

    Idempotent. The driver's object is kept alive for ever, so that no destructor of it ever runs
    here: some would say goodbye to the server, and psycopg2's would take a mutex that another
    thread may have held at the fork.
    """
    # Pinned before anything else: from here on its id stays its own.
    if id(connection) not in _disowned:
        _pin(connection)
        _disowned.add(id(connection))
    if holding.sever and holding.is_still_that_socket():
        assert holding.tag.fd is not None
        sever(holding.tag.fd)
        return SEVERED
    return KEPT


# Looked up ahead: it costs a child a third of the adoption of a pool.
_Py_IncRef = ctypes.pythonapi.Py_IncRef
_Py_IncRef.argtypes = (ctypes.py_object,)
_Py_IncRef.restype = None


def _pin(connection: Any) -> None:
    # A reference that nobody will give back; a module's global would be cleared at interpreter exit.
    _Py_IncRef(connection)


def sever(fd: int) -> None:
    """Put a dead socket in the place of this process's descriptor of a shared one.

    Drops this process's reference and no more: nothing is sent, nothing is shut down, O_NONBLOCK
    and epoll registrations of the shared socket stay as they are. Whoever writes to the descriptor
    afterwards gets EPIPE, whoever reads it the end of the stream.
    """
    os.dup2(_dead_socket.fileno(), fd, inheritable=False)


class _DeadSocket:
    """One end of a socketpair whose other end is closed."""

    def __init__(self) -> None:
        self._fd = -1
        self._identity: tuple[int, int] | None = None

    def fileno(self) -> int:
        """Return its descriptor, making the socket if it isn't there (any more).

        Made ahead, when a connection is tagged, so that a child at its limit of open files can
        sever all the same. Looked at each time: a daemon may have closed all its descriptors, and
        the number may be something else by now.
        """
        if self._identity is None or self._identity != _socket_identity(self._fd):
            ours, other_end = socket.socketpair()
            other_end.close()
            self._fd = ours.detach()
            self._identity = _socket_identity(self._fd)
        return self._fd


def _socket_identity(fd: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


_dead_socket = _DeadSocket()


def prepare_to_sever() -> None:
    """Open the one descriptor that severing needs, in the process that opens connections."""
    _dead_socket.fileno()


def transaction_state(connection: Any) -> str:
    """Tell, without I/O, what a checked-out connection is doing on the server."""
    try:
        in_transaction = driver_of(connection).in_transaction(connection)
    except Exception:
        return UNKNOWN
    if in_transaction is None:
        return UNKNOWN
    return IN_TRANSACTION if in_transaction else NO_TRANSACTION


def local_settings(connection: Any) -> Settings | None:
    """Read, without I/O, the settings a replacement has to take over; None if that can't be done."""
    try:
        return driver_of(connection).settings(connection)
    except Exception:
        return None


class Inheritance:
    """One inherited connection that was checked out at the fork, and what may become of its checkout."""

    __slots__ = ("pool", "tag", "state", "_settings", "_driver", "_fairy", "_refused")

    def __init__(
        self, pool: PidPool, tag: ConnectionTag, connection: Any, state: str, fairy: PidFairy | None
    ) -> None:
        self.pool = pool
        self.tag = tag
        self.state = state
        self._driver = driver_of(connection)
        self._settings = local_settings(connection)
        self._fairy = None if fairy is None else weakref.ref(fairy)
        self._refused = False

    def forget_transaction(self) -> None:
        """Note that this process gave the owner's transaction up; what comes next may be replaced."""
        if self.state in (IN_TRANSACTION, UNKNOWN):
            self.state = NO_TRANSACTION
            # Where the driver can't tell, the pool's defaults: what SQLAlchemy itself goes on with
            # after a disconnect.
            self._settings = self._settings or {}

    def may_be_replaced(self) -> bool:
        """Return whether the next use opens a connection of this process's own."""
        return (
            self.state == NO_TRANSACTION and self._settings is not None and self.pool.on_foreign == "replace"
        )

    def replaced_by(self) -> Any:
        """Return the connection that stands in this one's place by now, or None."""
        fairy = None if self._fairy is None else self._fairy()
        if fairy is None:
            return None
        now = fairy.dbapi_connection
        return None if isinstance(now, DisownedConnection) else now

    def replacement(self) -> Any:
        """Return a connection of this process's own for the checkout, opening it on first use.

        :raises ForeignConnectionError: where the rules say so, as the driver's OperationalError too.
        """
        now = self.replaced_by()
        if now is not None:
            return now
        fairy = None if self._fairy is None else self._fairy()
        # A fairy without a connection has been closed: whoever still holds the stand-in gets the error.
        if fairy is None or fairy.dbapi_connection is None or not self.may_be_replaced():
            self.refuse()
        assert self._settings is not None
        return self.pool._replace_inherited(fairy, self.tag, self._driver, self._settings)

    def refuse(self) -> NoReturn:
        """Raise the error, and report it once for each connection."""
        pid = os.getpid()
        if not self._refused:
            self._refused = True
            if fork.flag[0] != fork.SETTLED:
                fork.settle()  # what was inherited is told first
            self.pool._telemetry.connection_refused(self.tag, self.state)
        raise self.error(pid)

    def error(self, pid: int) -> ForeignConnectionError:
        """Return the error for a use of the connection by process `pid`."""
        here = f"connection {self.tag.connection_id} belongs to pid {self.tag.owner_pid}"
        if self.state == IN_TRANSACTION:
            fact = f"{here} and is in a transaction there"
        elif self.state == UNKNOWN:
            fact = f"{here} and its driver can't tell whether it is in a transaction there"
        elif self.pool.on_foreign == "refuse":
            fact = f"{here} and on_foreign='refuse' allows no replacement"
        else:
            fact = f"{here} and its settings can't be carried over to another connection"
        message = f"{fact}; roll back or close in pid {pid} and check out again"
        operational_error = getattr(
            getattr(self.pool._dialect, "loaded_dbapi", None), "OperationalError", None
        )
        error_class: type[ForeignConnectionError] = ForeignConnectionError
        if isinstance(operational_error, type):
            error_class = foreign_error_for(operational_error)
        _make_known_as_disconnect(self.pool._dialect)
        return error_class(
            message,
            connection_id=self.tag.connection_id,
            owner_pid=self.tag.owner_pid,
            pid=pid,
            state=self.state,
        )


def _make_known_as_disconnect(dialect: Any) -> None:
    """Have a dialect take a `ForeignConnectionError` for a disconnect.

    Each has ways of its own to know one: numbers, texts, a question to the connection. This process's
    dialect gets one more, once there is such an error; an event would cost every statement.
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

    ``rollback()`` and ``close()`` do nothing; ``commit()`` where no transaction is open does
    nothing; any other use gets the process a connection of its own or raises, as the pool's
    ``on_foreign`` and the state at the fork have it. Who holds on to this object after the
    replacement is passed on to the new connection.
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
        """True, which is how psycopg2's and psycopg's dialects know a disconnect."""
        now = self.pidpool_inheritance.replaced_by()
        return 1 if now is None else now.closed

    @property
    def broken(self) -> Any:
        """True, as `closed`; psycopg 3 has this one too."""
        now = self.pidpool_inheritance.replaced_by()
        return True if now is None else now.broken

    @property
    def _connection(self) -> Any:
        """asyncpg's own connection: its dialect asks that whether it is closed, after every error."""
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
        if inheritance.replaced_by() is None and inheritance.state == IN_TRANSACTION:
            return _DisownedCursor(self)
        return inheritance.replacement().cursor(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.pidpool_inheritance.replacement(), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.pidpool_inheritance.replacement(), name, value)


class _DisownedCursor:
    """A cursor on a connection whose transaction is the owner's: lets a rollback to a savepoint of
    that transaction pass for done, so that leaving ``begin_nested()`` raises nothing, and no more."""

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
