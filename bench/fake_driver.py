"""A DBAPI module whose connections do nothing, so that what is measured is the pool."""

from __future__ import annotations

import socket
from typing import Any

apilevel = "2.0"
threadsafety = 2
paramstyle = "pyformat"
__version__ = "2.9.99 (fake)"


class Error(Exception):
    pass


class InterfaceError(Error):
    pass


class DatabaseError(Error):
    pass


class OperationalError(DatabaseError):
    pass


class Cursor:
    description = (("?column?", 23, None, None, None, None, None),)
    rowcount = 1

    def execute(self, statement: str, parameters: object = None) -> None:
        pass

    def fetchone(self) -> tuple[int]:
        return (1,)

    def fetchall(self) -> list[tuple[int]]:
        return [(1,)]

    def close(self) -> None:
        pass


class Connection:
    """Also what psycopg_pool and psycopg2.pool ask of a connection: one that is idle and open."""

    closed = False
    broken = False
    autocommit = False
    notices = ()

    def __init__(self) -> None:
        self.pgconn = self.info = _Status()

    @classmethod
    def connect(cls, *arguments: object, **options: object) -> Connection:
        return cls()

    def cursor(self, *arguments: object, **options: object) -> Cursor:
        return Cursor()

    def commit(self) -> None:
        pass

    def rollback(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Status:
    transaction_status = 0  # idle, in both libraries


class SocketConnection(Connection):
    """One that has a socket, which a forked child severs as it does a real one's."""

    def __init__(self) -> None:
        super().__init__()
        # One end suffices: nothing is sent. And 1,000 of them have to fit the limit of open files.
        self._socket, other_end = socket.socketpair()
        other_end.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


def connect(*arguments: Any, **options: Any) -> Connection:
    return Connection()
