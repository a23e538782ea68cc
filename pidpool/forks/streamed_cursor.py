"""`StreamedCursor`: a named cursor, or another one that streams. It asks the server for every batch of rows,
and so has to check first whether this is still the process that opened it.

A child forked in C can go on with an inherited streamed result without passing any door of the pool: its
fetch would be the first thing it does, on its parent's socket
(tests/forks/test_cursors.py::test_a_streamed_result_stays_the_parents). A cursor without a name has its
rows already, and SQLAlchemy makes a new one for each statement.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pidpool.forks import detection
from pidpool.forks.detection import FORKED, fork_state


class StreamedCursor:
    """Passes all uses on to the driver's cursor. In a child they find a dead socket."""

    __slots__ = ("_cursor",)
    _cursor: Any

    def __init__(self, cursor: Any) -> None:
        object.__setattr__(self, "_cursor", cursor)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # psycopg2.sql asks isinstance()
        return type(self._cursor)

    def __getattr__(self, name: str) -> Any:
        if fork_state[0] == FORKED:
            detection.notice_fork()
        return getattr(self._cursor, name)

    def __setattr__(self, name: str, value: object) -> None:
        if fork_state[0] == FORKED:
            detection.notice_fork()
        setattr(self._cursor, name, value)

    def __iter__(self) -> Iterator[Any]:
        if fork_state[0] == FORKED:
            detection.notice_fork()
        for row in self._cursor:
            yield row
            if fork_state[0] == FORKED:  # a child may go on in the middle of the loop
                detection.notice_fork()

    def __next__(self) -> Any:
        if fork_state[0] == FORKED:
            detection.notice_fork()
        return next(self._cursor)

    def __enter__(self) -> StreamedCursor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
