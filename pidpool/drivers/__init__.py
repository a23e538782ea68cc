"""What each driver's connection says of itself without I/O: its descriptor, its server process, whether a
transaction is open, and the settings that it holds locally. One file for each driver; `driver_of` finds it.
"""

from __future__ import annotations

from sqlalchemy.engine import AdaptedConnection

from pidpool.drivers.asyncpg import AsyncPG
from pidpool.drivers.base import Driver, Settings
from pidpool.drivers.mysql import MySQL, PyMySQL
from pidpool.drivers.psycopg import AsyncPsycopg, Psycopg
from pidpool.drivers.psycopg2 import Psycopg2
from pidpool.drivers.sqlite import SQLite

__all__ = ["Driver", "Settings", "driver_of", "under_adapter"]

_KNOWN: dict[str, Driver] = {
    "psycopg2": Psycopg2(),
    "psycopg": Psycopg(),
    "pymysql": PyMySQL(),
    "MySQLdb": MySQL(),
    "sqlite3": SQLite(),
}
_UNDER_ADAPTER: dict[str, Driver] = {
    "psycopg": AsyncPsycopg(),
    "asyncpg": AsyncPG(),
}
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
