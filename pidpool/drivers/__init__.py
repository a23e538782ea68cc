"""What each driver's connection says of itself without I/O and without taking a lock of the driver's:
its descriptor, its server process, whether a transaction is open, and the settings it holds locally.

Read in psycopg2 2.9 (connection_type.c), psycopg 3.3 (_connection_base.py), asyncpg 0.32, PyMySQL 1.1,
mysqlclient 2.2 and CPython's sqlite3. In a child these are the only calls that may be made on an
inherited connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.engine import AdaptedConnection

Settings = Mapping[str, object]


class Driver:
    """A driver that is not known: it may have a descriptor, and can't tell anything else."""

    def fileno(self, connection: Any) -> int | None:
        # By the type, since asking a stand-in or a mock for an attribute may be a use of it.
        if callable(getattr(type(connection), "fileno", None)):
            number = connection.fileno()
            if isinstance(number, int) and number >= 0:
                return number
        return None

    def server_pid(self, connection: Any) -> int | None:
        return None

    def in_transaction(self, connection: Any) -> bool | None:
        """Return whether a transaction is open on the server; None if the driver can't tell."""
        return None

    def settings(self, connection: Any) -> Settings | None:
        """Return what the driver would send with its next transaction; None if it can't tell."""
        return None

    def apply(self, connection: Any, settings: Settings) -> None:
        """Give a fresh connection these settings, where it has not got them already."""
        for name, value in settings.items():
            if getattr(connection, name) != value:
                setattr(connection, name, value)

    def max_connections(self, connection: Any) -> int | None:
        """Ask the server how many connections it takes; None where that is not known how.

        The one method here that sends something: for a new connection of this process's own.
        """
        return None


class _PostgreSQL(Driver):
    def max_connections(self, connection: Any) -> int | None:
        if self.in_transaction(connection) is not False:
            return None
        cursor = connection.cursor()
        try:
            cursor.execute("show max_connections")
            return int(cursor.fetchone()[0])
        finally:
            cursor.close()
            connection.rollback()


class _Psycopg2(_PostgreSQL):
    # All are plain reads of the connection's struct or of libpq's PGconn. The setters of the
    # settings are local too, and refused while a transaction is open.
    def server_pid(self, connection: Any) -> int | None:
        return int(connection.get_backend_pid())

    def in_transaction(self, connection: Any) -> bool | None:
        if connection.closed:
            return None
        return bool(connection.get_transaction_status() != 0)  # PQTRANS_IDLE

    def settings(self, connection: Any) -> Settings | None:
        return {
            # isolation_level, readonly and deferrable first: psycopg2 sends them at once, by SQL,
            # when they are set in autocommit mode.
            "isolation_level": connection.isolation_level,
            "readonly": connection.readonly,
            "deferrable": connection.deferrable,
            "autocommit": connection.autocommit,
        }


class _Psycopg(_PostgreSQL):
    def server_pid(self, connection: Any) -> int | None:
        return int(connection.pgconn.backend_pid)

    def in_transaction(self, connection: Any) -> bool | None:
        if connection.closed:
            return None
        return bool(connection.pgconn.transaction_status != 0)  # PQTRANS_IDLE

    def settings(self, connection: Any) -> Settings | None:
        return {
            "isolation_level": connection.isolation_level,
            "read_only": connection.read_only,
            "deferrable": connection.deferrable,
            "autocommit": connection.autocommit,
        }


class _AsyncPsycopg(_Psycopg):
    # Under SQLAlchemy's adapter. Setting is a coroutine there, also where it is local.
    def fileno(self, connection: Any) -> int | None:
        return super().fileno(connection._connection)

    def server_pid(self, connection: Any) -> int | None:
        return super().server_pid(connection._connection)

    def in_transaction(self, connection: Any) -> bool | None:
        return super().in_transaction(connection._connection)

    def settings(self, connection: Any) -> Settings | None:
        return super().settings(connection._connection)

    def apply(self, connection: Any, settings: Settings) -> None:
        for name, value in settings.items():
            if getattr(connection._connection, name) != value:
                getattr(connection, f"set_{name}")(value)


class _AsyncPG(Driver):
    # Under SQLAlchemy's adapter, which keeps the settings itself and begins transactions with them.
    def fileno(self, connection: Any) -> int | None:
        return int(connection._connection._transport.get_extra_info("socket").fileno())

    def server_pid(self, connection: Any) -> int | None:
        return int(connection._connection.get_server_pid())

    def in_transaction(self, connection: Any) -> bool | None:
        return bool(connection._connection.is_in_transaction())

    def settings(self, connection: Any) -> Settings | None:
        names = ("isolation_level", "_isolation_setting", "readonly", "deferrable")
        return {name: getattr(connection, name) for name in names}


class _MySQL(Driver):
    def server_pid(self, connection: Any) -> int | None:
        return int(connection.thread_id())


class _PyMySQL(_MySQL):
    def fileno(self, connection: Any) -> int | None:
        socket = connection._sock
        return None if socket is None else int(socket.fileno())

    def in_transaction(self, connection: Any) -> bool | None:
        return bool(connection.server_status & 1)  # SERVER_STATUS_IN_TRANS of the last packet


class _SQLite(Driver):
    # Has no descriptor to sever: its inherited handles are pinned and never closed, since closing one
    # drops the owner's locks on the file (https://sqlite.org/howtocorrupt.html, section 2.6).
    def in_transaction(self, connection: Any) -> bool | None:
        return bool(connection.in_transaction)

    def settings(self, connection: Any) -> Settings | None:
        return {"isolation_level": connection.isolation_level}


_KNOWN: dict[str, Driver] = {
    "psycopg2": _Psycopg2(),
    "psycopg": _Psycopg(),
    "pymysql": _PyMySQL(),
    "MySQLdb": _MySQL(),
    "sqlite3": _SQLite(),
}
_UNDER_ADAPTER: dict[str, Driver] = {
    "psycopg": _AsyncPsycopg(),
    "asyncpg": _AsyncPG(),
}
_UNKNOWN = Driver()


def driver_of(connection: object) -> Driver:
    """Return the driver of a connection, told by the package its class or a base of it is from."""
    known = _KNOWN
    if isinstance(connection, AdaptedConnection):  # of SQLAlchemy's asyncio
        known, connection = _UNDER_ADAPTER, connection.driver_connection
    for base in type(connection).__mro__:
        driver = known.get(base.__module__.partition(".")[0])
        if driver is not None:
            return driver
    return _UNKNOWN
