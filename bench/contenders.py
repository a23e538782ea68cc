"""The pools that are compared: SQLAlchemy's own, bare and with the guards against forks that people put
on them, two drivers' pools, the least a pool can cost in SQLAlchemy, and PidPool.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import Any

import psycopg2.pool
import psycopg_pool
from oslo_db.sqlalchemy.engines import _add_process_guards
from sqlalchemy import Engine, event, exc
from sqlalchemy.dialects.postgresql import psycopg2 as psycopg2_dialect
from sqlalchemy.pool import NullPool, Pool, QueuePool
from sqlalchemy.util import queue

from bench import fake_driver
from pidpool import PidPool

QUEUE = "QueuePool"
QUEUE_AGAIN = "QueuePool again"
RECIPE = "QueuePool, documented recipe"
OSLO = "QueuePool, oslo.db's guard"
FLOOR = "the floor"
NULL = "NullPool"
PSYCOPG = "psycopg_pool, raw"
PSYCOPG2 = "psycopg2.pool, raw"
PID = "PidPool"


class ListQueue:
    """A queue that is a list: no lock, no bound, no waiting."""

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        self.maxsize = maxsize
        self.use_lifo = use_lifo
        self._items: list[Any] = []

    def qsize(self) -> int:
        return len(self._items)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if not self._items:
            raise queue.Empty
        return self._items.pop()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self._items.append(item)


class FloorPool(QueuePool):
    """SQLAlchemy's own checkout and checkin round a bare list: less than that no pool of its can do."""

    _queue_class: Any = ListQueue


_CLASSES: dict[str, Any] = {NULL: NullPool, FLOOR: FloorPool, PID: PidPool}


def _add_recipe(target: Engine | Pool) -> None:
    """SQLAlchemy's documented guard: note the pid at connect, compare it at every checkout."""

    @event.listens_for(target, "connect")
    def connected(dbapi_connection: Any, record: Any) -> None:
        record.info["pid"] = os.getpid()

    @event.listens_for(target, "checkout")
    def checked_out(dbapi_connection: Any, record: Any, proxy: Any) -> None:
        pid = os.getpid()
        if record.info["pid"] != pid:
            record.dbapi_connection = proxy.dbapi_connection = None
            raise exc.DisconnectionError(f"the connection is of pid {record.info['pid']}, this is pid {pid}")


def pool(name: str, creator: Callable[[], Any] = fake_driver.Connection, **options: Any) -> Pool:
    """Return the named pool, on the fake driver by default."""
    dialect = psycopg2_dialect.dialect(dbapi=fake_driver)
    made: Pool = _CLASSES.get(name, QueuePool)(creator, dialect=dialect, **options)
    add_guard(name, made)
    return made


def add_guard(name: str, target: Engine | Pool) -> None:
    """Put the guard on it that the contender's name promises, if any."""
    if name == RECIPE:
        _add_recipe(target)
    if name == OSLO:
        _add_process_guards(target)


def cycle(of: Pool) -> Callable[[], None]:
    """Return one checkout and checkin, as an operation."""
    connect = of.connect

    def operation() -> None:
        connect().close()

    return operation


class _FakedThreadedPool(psycopg2.pool.ThreadedConnectionPool):
    def _connect(self, key: Any = None) -> Any:
        connection: Any = fake_driver.Connection()
        if key is None:
            self._pool.append(connection)
        else:
            self._used[key] = connection
            self._rused[id(connection)] = key
        return connection


def psycopg2_pool(size: int) -> psycopg2.pool.ThreadedConnectionPool:
    """The pool that psycopg2 brings, on the fake driver."""
    return _FakedThreadedPool(size, size)


def psycopg3_pool(size: int) -> psycopg_pool.ConnectionPool[Any]:
    """psycopg 3's pool, on the fake driver."""
    connection_class: Any = fake_driver.Connection
    pool: psycopg_pool.ConnectionPool[Any] = psycopg_pool.ConnectionPool(
        connection_class=connection_class, min_size=size, max_size=size, open=True, timeout=60.0
    )
    atexit.register(pool.close)
    pool.wait()
    return pool
