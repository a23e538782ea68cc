"""`StreamCursor`: a named cursor, which goes to the server for every batch of rows, made to ask first
whether this is still the process that opened it.

A child forked in C can go on with an inherited streamed result without passing any door of the pool:
its fetch would be the first thing it does, on its parent's socket
(tests/forks/test_inherited.py::test_a_streamed_result_stays_the_parents). A cursor without a name has its
rows already, and SQLAlchemy makes a new one for each statement.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pidpool.forks import detection as fork
from pidpool.forks.detection import WIPED, flag


class StreamCursor:
    """Passes everything on to the driver's cursor. In a child that finds a dead socket."""

    __slots__ = ("_cursor",)
    _cursor: Any

    def __init__(self, cursor: Any) -> None:
        object.__setattr__(self, "_cursor", cursor)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # psycopg2.sql asks isinstance()
        return type(self._cursor)

    def __getattr__(self, name: str) -> Any:
        if flag[0] == WIPED:
            fork.notice()
        return getattr(self._cursor, name)

    def __setattr__(self, name: str, value: object) -> None:
        if flag[0] == WIPED:
            fork.notice()
        setattr(self._cursor, name, value)

    def __iter__(self) -> Iterator[Any]:
        if flag[0] == WIPED:
            fork.notice()
        return iter(self._cursor)

    def __enter__(self) -> StreamCursor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
