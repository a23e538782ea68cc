"""The memory that a pool's processes share: a row for each of them, and the sums over those whose row
was given to another.

Made with the pool, before any fork, so that every later process has it; who comes by fork joins. Only
joining takes a lock, for a bounded time; nobody waits for a reader.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from pidpool.stats import rows
from pidpool.stats.robust_lock import SIZE as LOCK_SIZE
from pidpool.stats.robust_lock import RobustLock
from pidpool.stats.snapshots import FamilyStats, PoolStats

ROWS = 256
"""Processes that a family's memory has room for at a time."""

ENDED_LISTED = 32
"""Ended processes that a snapshot lists one by one, the newest; the others' counts are in the sums."""

_JOIN_WAIT = 1.0
"""Seconds that a child waits at most for others that join; it counts as unlisted then. Whoever joins takes
a fraction of a millisecond, but may have to wait for its turn on a processor that hundreds want."""

_MOST_SLOTS = 1024

# -- the head of the memory, in words behind the lock

_ROWS_USED, _UNLISTED, _SERVER_MAX, _WARNED, _FLIPS = range(LOCK_SIZE // 8, LOCK_SIZE // 8 + 5)
_DEPARTED = LOCK_SIZE // 8 + 8
"""Two buffers for the sums of the departed, of which the number of flips tells the one that counts. The
next sums are made in the other one: whoever is killed meanwhile has changed nothing."""

_ASKED, _ANSWER = 1, 2  # what stands for the server's limit: 0, then the one, then the other plus the limit

# -- a buffer of the departed: these, then a row

_FOLDED_ROW, _FOLDED_GENERATION, _COUNT = range(3)
_BUFFER = 3 + rows.words_of_a_row(1)
_FIRST_ROW = _DEPARTED + 2 * _BUFFER


class Family:
    """The shared memory of one pool, in all processes that have it.

    Threads: any number may use it. Forks: a child goes on with its parent's object. A process that is
    killed at any instruction leaves nothing locked and nothing half written.

    :param size: the pool's ``pool_size``.
    :param max_overflow: the pool's ``max_overflow``.
    """

    def __init__(self, size: int, max_overflow: int) -> None:
        self._shape = rows.Shape(size, max_overflow)
        limited = size and max_overflow >= 0
        # Twice what the pool may have, since a disposed one may have entries out beside its successor.
        self._slots = min(2 * (size + max_overflow), _MOST_SLOTS) + 1 if limited else _MOST_SLOTS
        self._row_words = rows.words_of_a_row(self._slots)
        self._rows = ROWS
        try:
            # Untouched pages cost nothing.
            memory = mmap.mmap(-1, (_FIRST_ROW + self._rows * self._row_words) * 8)
        except (OSError, ValueError):  # a limit on address space
            self._rows = 1
            memory = mmap.mmap(-1, (_FIRST_ROW + self._row_words) * 8)
        self._words = memoryview(memory).cast("Q")
        self._lock = RobustLock(memory)
        self._looked_at: tuple[int, int] | None = None
        # Where the stack begins: the same in all that were forked and have not executed another program.
        self._stack = _stack()

    # -- joining

    def join(self, parent_pid: int | None = None) -> rows.Row:
        """Give this process a row of its own; one that nobody else sees where there is no room.

        May run inside an at-fork hook.
        """
        if self._words[_ROWS_USED] == 0:
            return self._start(0, parent_pid)  # nobody else has the memory yet
        held = self._lock.acquire(_JOIN_WAIT)
        try:
            number = self._free_row() if held else None
            if number is not None:
                return self._start(number, parent_pid)
            self._words[_UNLISTED] += 1
        finally:
            if held:
                self._lock.release()
        return self._enter(memoryview(bytearray(self._row_words * 8)).cast("Q"), parent_pid)

    def _start(self, number: int, parent_pid: int | None) -> rows.Row:
        row = self._enter(self._row(number), parent_pid)
        self._words[_ROWS_USED] = max(self._words[_ROWS_USED], number + 1)
        return row

    def _enter(self, words: memoryview, parent_pid: int | None) -> rows.Row:
        generation = words[rows.GENERATION] + 1
        words[rows.PID] = 0  # first, and the generation, so that a reader knows that the rest changes
        words[rows.GENERATION] = generation
        if generation > 1:
            # The head last: it says which slots were used, also to whom this one's end leaves the work.
            # What never was used is not touched, and takes no memory.
            _clear(words[rows.HEAD : rows.HEAD + words[rows.SLOTS_USED] * rows.SLOT])
            _clear(words[rows.GENERATION + 1 : rows.HEAD])
        words[rows.PARENT_PID] = parent_pid or 0
        words[rows.JOINED] = _boot_time()
        words[rows.SINCE] = int(time.time() * 1e6)
        words[rows.PID] = os.getpid()
        return rows.Row(words, self._slots)

    def _free_row(self) -> int | None:
        used = self._words[_ROWS_USED]
        if used < self._rows:
            return used
        ended = []
        for number in range(used):
            words = self._row(number)
            if not words[rows.PID]:
                return number  # whoever took it was killed before it had it, and its counts are added already
            if words[rows.ENDED]:
                ended.append(number)
        if not ended:
            # Costs a look into /proc for each; so all that ended are noted at once.
            for number in range(used):
                words = self._row(number)
                if not self._lives(words):
                    words[rows.ENDED] = 1
                    ended.append(number)
        if not ended:
            return None
        number = min(ended, key=lambda each: self._row(each)[rows.JOINED])
        self._fold(number)
        return number

    def _fold(self, number: int) -> None:
        """Add an ended process's counts to those of the departed; under the lock."""
        words = self._row(number)
        flips = self._words[_FLIPS]
        now, then = self._departed(flips), self._departed(flips + 1)
        if (now[_FOLDED_ROW], now[_FOLDED_GENERATION]) == (number + 1, words[rows.GENERATION]):
            return  # by somebody who was killed before going on
        then[:] = now
        rows.fold(then[3:], rows.copy(words))
        then[_FOLDED_ROW], then[_FOLDED_GENERATION] = number + 1, words[rows.GENERATION]
        then[_COUNT] += 1
        self._words[_FLIPS] = flips + 1  # the one word that makes it so

    # -- reading

    def read(self, name: str) -> FamilyStats:
        """Return a snapshot of all processes; waits for nobody.

        :param name: the pool's name.
        """
        for _ in range(100):
            flips = self._words[_FLIPS]
            departed = memoryview(self._departed(flips).tobytes()).cast("Q")
            folded = departed[_FOLDED_ROW] - 1, departed[_FOLDED_GENERATION]
            found = [row for number, row in self._copies() if (number, row[rows.GENERATION]) != folded]
            if self._words[_FLIPS] == flips:
                break
        found.sort(key=lambda row: row[rows.JOINED])
        words = [row.tolist() for row in found]
        summed = [rows.sums(each) for each in words]
        processes = [
            self._read_row(each, its_sums, name, alive=self._lives(row))
            for row, each, its_sums in zip(found, words, summed, strict=True)
        ]
        listed = _listed(processes)
        return FamilyStats(
            pool=name,
            taken_at=time.time(),
            processes=tuple(processes[number] for number in sorted(listed)),
            departed=departed[_COUNT] + len(processes) - len(listed),
            unlisted=self._words[_UNLISTED],
            server_max_connections=self.server_max_connections,
            counters=rows.counters(rows.add_up([departed[3:].tolist(), *summed])),
        )

    def read_own(self, row: rows.Row, name: str) -> PoolStats:
        """Return a snapshot of this process."""
        words = rows.copy(row.words).tolist()
        return self._read_row(words, rows.sums(words), name, alive=True)

    def _read_row(self, words: list[int], summed: list[int], name: str, *, alive: bool) -> PoolStats:
        names = {}
        if alive and words[rows.PID] == os.getpid():
            # Not enumerate(): a fork in C may have left its lock held.
            threads = list(threading._active.values())  # type: ignore[attr-defined]
            names = {thread.ident: thread.name for thread in threads}
        return rows.read(words, summed, name, self._shape, alive=alive, thread_names=names)

    def _lives(self, row: memoryview) -> bool:
        """Return whether the process of a row still runs, and still has the pool."""
        return not row[rows.ENDED] and _lives(row[rows.PID], row[rows.JOINED], self._stack)

    def _copies(self) -> Iterator[tuple[int, memoryview]]:
        for number in range(self._words[_ROWS_USED]):
            words = self._row(number)
            for _ in range(3):
                before = words[rows.PID], words[rows.GENERATION]
                copied = rows.copy(words)
                if before == (words[rows.PID], words[rows.GENERATION]):
                    break
            else:
                continue
            if copied[rows.PID]:
                yield number, copied

    # -- the server's limit

    @property
    def server_max_connections(self) -> int | None:
        """The server's ``max_connections``; None as long as no process knows it."""
        return max(self._words[_SERVER_MAX] - _ANSWER, 0) or None

    def learn_server_max_connections(self, ask: Callable[[], int | None]) -> None:
        """Have the server asked, once in the family's life; an error is `ask`'s, and the answer None."""
        if self._words[_SERVER_MAX] == 0:
            self._words[_SERVER_MAX] = _ASKED
            self._words[_SERVER_MAX] = _ANSWER + (ask() or 0)

    def exceeds_server(self, name: str) -> FamilyStats | None:
        """Return the family's figures if its processes may have more connections than the server takes;
        once in the family's life."""
        limit = self.server_max_connections
        each = self._shape.size + self._shape.max_overflow
        if limit is None or self._words[_WARNED] or self._words[_ROWS_USED] * each <= limit:
            return None
        joined = self._words[_ROWS_USED], self._words[_FLIPS]
        if joined == self._looked_at:
            return None  # nobody has joined since: it can't be more
        self._looked_at = joined
        stats = self.read(name)
        if stats.maximum is None or stats.maximum <= limit:
            return None
        self._words[_WARNED] = 1
        return stats

    # -- where things are

    def _row(self, number: int) -> memoryview:
        first = _FIRST_ROW + number * self._row_words
        return self._words[first : first + self._row_words]

    def _departed(self, flips: int) -> memoryview:
        first = _DEPARTED + flips % 2 * _BUFFER
        return self._words[first : first + _BUFFER]


def _clear(words: memoryview) -> None:
    words[:] = memoryview(bytes(words.nbytes)).cast("Q")


def _listed(processes: list[PoolStats]) -> set[int]:
    """Choose whom to list: the living with their ancestors, and the newest of the ended."""
    ended = [number for number, each in enumerate(processes) if not each.alive]
    listed = set(ended[-ENDED_LISTED:])
    by_pid: dict[int, int] = {}
    parents: dict[int, int | None] = {}
    for number, each in enumerate(processes):  # oldest first: who had the pid when the child was forked
        parents[number] = None if each.parent_pid is None else by_pid.get(each.parent_pid)
        by_pid[each.pid] = number
        listed_now = number if each.alive else None
        while listed_now is not None and listed_now not in listed:
            listed.add(listed_now)
            listed_now = parents[listed_now]
    return listed


# -- which process


def _boot_time() -> int:
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return 0 if clock is None else time.clock_gettime_ns(clock)


_TICK = 10**9 // os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0


_STATE, _STARTED, _STACK = 0, 19, 25
"""Where state, starttime and startstack stand in what `_status` gives (proc_pid_stat(5))."""


def _status(pid: int | str) -> list[bytes]:
    """Return the fields of a process's status behind its name.

    :raises OSError: if there is none such, or it may not be read.
    """
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
        return file.read(4096).rpartition(b")")[2].split()


def _stack() -> int:
    """Return where this process's stack begins; 0 where that is not told."""
    try:
        return int(_status("self")[_STACK])
    except (OSError, IndexError, ValueError):
        return 0


def _lives(pid: int, joined: int, stack: int) -> bool:
    """Return whether the process that had this pid at that time still runs, with that stack.

    Another process that was given the same pid later has started later. A zombie has ended. One that
    executes another program has the pid and the start of what it was, but another stack; and nothing of
    the pool.
    """
    if sys.platform == "linux":
        try:
            fields = _status(pid)
            if fields[_STATE] in (b"Z", b"X") or int(fields[_STARTED]) * _TICK > joined + _TICK:
                return False
            # 0 or 1: of a process whose addresses we may not see.
            return int(fields[_STACK]) in (0, 1, stack) or not stack
        except (OSError, IndexError, ValueError):
            pass  # gone, or another user's where /proc hides those
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
