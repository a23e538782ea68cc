"""The classes of errors with which the connects of a family failed: a small table of names in the family's
memory. Each process counts under a name's number, so the counts of processes add up cell by cell.
"""

from __future__ import annotations

from pidpool.stats.robust_lock import RobustLock

MOST = 8
"""How many names the table has room for; errors of further classes are counted together as `OTHER`."""

OTHER = "_OTHER"
"""The value that OpenTelemetry's attribute ``error.type`` has if the class is not named."""

_NAME_BYTES = 32
CELLS = 1 + MOST * _NAME_BYTES // 8

_WAIT = 1.0
"""Seconds to wait at most while other processes join the family."""


class ErrorTypes:
    """The table, in every process that has the family's memory.

    :param cells: `CELLS` cells, zero at first.
    :param lock: the family's.
    """

    def __init__(self, cells: memoryview, lock: RobustLock) -> None:
        self._cells = cells
        self._bytes = cells.cast("B")
        self._lock = lock

    def names(self) -> list[str]:
        """Return the names so far; their places are their numbers."""
        starts = range(8, 8 + self._cells[0] * _NAME_BYTES, _NAME_BYTES)
        raw = (self._bytes[start : start + _NAME_BYTES].tobytes() for start in starts)
        return [name.rstrip(b"\0").decode(errors="replace") for name in raw]

    def number_of(self, error: BaseException) -> int:
        """Return the number of an error's class, which gets one if there is room; otherwise `MOST`.

        Takes the lock for each class once. A process that is killed meanwhile leaves the table as it was.
        """
        name = type(error).__name__.encode()[:_NAME_BYTES].decode(errors="ignore")
        names = self.names()
        if name not in names and len(names) < MOST:
            self._lock.run(_WAIT, lambda: self._add(name))
            names = self.names()
        return names.index(name) if name in names else MOST

    def _add(self, name: str) -> None:
        names = self.names()  # another process may have been first
        if name not in names and len(names) < MOST:
            start = 8 + len(names) * _NAME_BYTES
            self._bytes[start : start + _NAME_BYTES] = name.encode().ljust(_NAME_BYTES, b"\0")
            self._cells[0] += 1  # last: this single write makes the name valid
