"""What each driver's connection says of itself without I/O: its descriptor, its server process, whether a
transaction is open, and the settings that it holds locally. One file for each driver; `driver_of` finds it.
"""

from __future__ import annotations

from sqlalchemy.engine import AdaptedConnection

from pidpool.drivers.adapted import Adapted
from pidpool.drivers.asyncpg import AsyncPG
from pidpool.drivers.base import Driver, Settings
from pidpool.drivers.mysql import AioMySQL, AsyncMy, MySQLClient, MySQLConnector, PyMySQL
from pidpool.drivers.pg8000 import Pg8000
from pidpool.drivers.psycopg import AsyncPsycopg, Psycopg
from pidpool.drivers.psycopg2 import Psycopg2
from pidpool.drivers.sockets import Sockets
from pidpool.drivers.sqlite import AioSQLite, SQLite

__all__ = [
    "Adapted",
    "Driver",
    "Settings",
    "Sockets",
    "driver_of",
    "sockets_before",
    "under_adapter",
    "unknown_driver",
]

_KNOWN: dict[str, Driver] = {
    "psycopg2": Psycopg2(),
    "psycopg": Psycopg(),
    "pg8000": Pg8000(),
    "MySQLdb": MySQLClient(),
    "pymysql": PyMySQL(),
    "mysql": MySQLConnector(),
    "sqlite3": SQLite(),
}
_UNDER_ADAPTER: dict[str, Driver] = {
    "psycopg": AsyncPsycopg(),
    "asyncpg": AsyncPG(),
    "aiomysql": AioMySQL(),
    "asyncmy": AsyncMy(),
    "aiosqlite": AioSQLite(),
}
_WITHOUT_DESCRIPTOR = ("mysqlconnector",)
"""SQLAlchemy's names of the drivers whose socket may have to be found."""
_UNKNOWN = Driver()


def under_adapter(connection: object) -> object:
    """Return the driver's connection under SQLAlchemy's adapter for asyncio; None without an adapter."""
    return connection.driver_connection if isinstance(connection, AdaptedConnection) else None


def driver_of(connection: object) -> Driver:
    """Return the driver of a connection, recognised by the package that its class or a base of it is from."""
    known = _KNOWN
    if isinstance(connection, AdaptedConnection):  # of SQLAlchemy's asyncio
        known, connection = _UNDER_ADAPTER, connection.driver_connection
    for base in type(connection).__mro__:
        driver = known.get(base.__module__.partition(".")[0])
        if driver is not None:
            return driver
    return _UNKNOWN


def unknown_driver(connection: object) -> str | None:
    """Return the package of a connection's driver if pidpool does not know it, otherwise None."""
    if driver_of(connection) is not _UNKNOWN:
        return None
    return type(under_adapter(connection) or connection).__module__.partition(".")[0]


def sockets_before(name: str | None) -> Sockets | None:
    """Look, before a connect, at the sockets that there are, if the driver may give no descriptor.

    :param name: the driver's name in SQLAlchemy's dialect.
    """
    return Sockets() if name in _WITHOUT_DESCRIPTOR else None
