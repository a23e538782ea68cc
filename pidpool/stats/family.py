"""The memory that a family's processes share: a block of counters for each process, and the sums of the
departed, whose blocks were given to others.

A family without a name has memory that is made with the pool, before any fork, so every forked child has it
and joins. A named one is joined by each process that makes a pool of that family. Only joining takes a lock,
for a bounded time. No process waits for a reader.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from pidpool.stats import budget, error_types, family_memory, process, process_counters
from pidpool.stats.budget import Budget
from pidpool.stats.error_types import ErrorTypes
from pidpool.stats.family_memory import NoSharedMemory
from pidpool.stats.process_counters import (
    ENDED,
    GENERATION,
    HEAD_CELLS,
    HOLD_WARNING,
    JOINED,
    LIMIT,
    MAX_OVERFLOW,
    PARENT_PID,
    PID,
    SINCE,
    SIZE,
    SLOT_CELLS,
    SLOTS_USED,
    STACK,
    ProcessCounters,
)
from pidpool.stats.robust_lock import IS_THERE as HAS_LOCKS
from pidpool.stats.robust_lock import SIZE as LOCK_SIZE
from pidpool.stats.robust_lock import RobustLock
from pidpool.stats.snapshots import FamilyStats, PoolStats

BLOCKS = 256
"""How many processes a family's memory has room for at a time."""

ENDED_LISTED = 32
"""How many ended processes a snapshot lists, the newest ones. The counts of all others are in the sums."""

_JOIN_WAIT = 1.0
"""Seconds that a child waits at most while others join; after that it is unlisted. Joining takes a fraction
of a millisecond, but hundreds of processes may want the processor at that moment."""

_MAX_SLOTS = 1024

_NAMED_SLOTS = 129
"""The slots of each block in a named family, whose pools may differ in size."""

# -- the head of the memory, in cells behind the lock

_BLOCKS_USED, _UNLISTED, _SERVER_MAX, _WARNED, _FLIPS, _KEY = range(LOCK_SIZE // 8, LOCK_SIZE // 8 + 6)
_MAXIMA = _KEY + 1
"""How many connections the processes may open together; too high while those that have ended are in it. With
it a child has not to read the blocks of all others, each of which is a page that it has not touched yet."""
_BUDGET = _MAXIMA + 1
_ERROR_TYPES = _BUDGET + budget.CELLS
_DEPARTED = _ERROR_TYPES + error_types.CELLS
"""Two buffers for the sums of the departed. The low bit of the flip count selects the valid buffer. The next
sums are made in the other buffer, so a process that is killed meanwhile has changed nothing."""

_ASKED, _ANSWER = 1, 2
"""The cell of the limit: 0 at first, `_ASKED` while a process asks, then `_ANSWER` plus the limit."""

# -- a buffer of the departed: these cells, then a block with one slot

_FOLDED_BLOCK, _FOLDED_GENERATION, _COUNT = range(3)
_BUFFER_CELLS = 3 + process_counters.cells_of_a_block(1)
_FIRST_BLOCK = _DEPARTED + 2 * _BUFFER_CELLS


class Family:
    """The shared memory of one pool, in all processes that have it.

    Threads: any number may use it. Forks: a child goes on with its parent's object. A process that is
    killed at any instruction leaves nothing locked and nothing half written.

    :param size: the pool's ``pool_size`` in this process.
    :param max_overflow: the pool's ``max_overflow`` in this process; -1 for no limit.
    :param hold_warning: the pool's ``hold_warning`` in this process, in seconds.
    :param name: the family's name, by which any process of the same user joins it. None: the family is this
        process and those that are forked from it.
    :param limit: how many connections the family may have open; None for no limit.
    :raises FamilyRefused: if the family's file is not this user's own.
    :raises OSError: if there is a limit, and no shared memory to keep it in.
    """

    def __init__(
        self,
        size: int,
        max_overflow: int,
        hold_warning: float | None = None,
        name: str | None = None,
        limit: int | None = None,
    ) -> None:
        self.name = name
        self.limit = limit
        self.private: str | None = None
        """Why the family has no other processes than it should, if its memory could not be shared."""
        self._size, self._max_overflow = size, max_overflow
        self._hold_warning = 0 if hold_warning is None else int(hold_warning * 1e6) + 1
        self._blocks = BLOCKS
        memory = None if name is None else self._named_memory(name)
        is_new = memory is None
        self._is_named = not is_new
        if memory is None:
            memory = self._anonymous_memory()
        self._cells = memory.cast("Q")
        self._lock = RobustLock(memory, is_new=is_new)
        self.error_types = ErrorTypes(self._cells[_ERROR_TYPES:_DEPARTED], self._lock)
        """The names of the errors with which connects failed."""
        self._looked_at: tuple[int, int] | None = None
        # The same in every process forked from this one, until one executes another program.
        self._stack = process.own_stack()

    def _named_memory(self, name: str) -> memoryview | None:
        self._set_slots(_NAMED_SLOTS)

        def prepare(memory: memoryview, key: int) -> None:
            RobustLock(memory)
            memory.cast("Q")[_KEY] = key

        try:
            if not HAS_LOCKS:
                raise NoSharedMemory("this system has no robust mutexes")
            shape = f"{self._blocks}x{self._slots}"
            return family_memory.named(
                name, shape, self._bytes(), lambda memory: int(memory.cast("Q")[_KEY]), prepare
            )
        except NoSharedMemory as error:
            self.private = str(error)
            return None

    def _anonymous_memory(self) -> memoryview:
        limited = self._size and self._max_overflow >= 0
        # Twice the pool's maximum: a disposed pool may have checkouts while its successor is full.
        maximum = min(2 * (self._size + self._max_overflow), _MAX_SLOTS) + 1
        self._set_slots(maximum if limited else _MAX_SLOTS)
        try:
            # Pages that are never touched take no memory.
            return family_memory.anonymous(self._bytes())
        except (OSError, ValueError) as error:  # a limit on address space
            wanted = self._bytes()
            self._blocks = 1
            self.private = f"no {wanted} bytes of shared memory for {BLOCKS} processes: {error}"
            if self.limit is not None:
                raise OSError(
                    errno.ENOMEM,
                    f"family_limit={self.limit} needs shared memory, and there is {self.private}; raise the "
                    f"limit on address space (RLIMIT_AS) of pid {os.getpid()}, or take family_limit=None",
                ) from None
            return memoryview(bytearray(self._bytes()))

    def _set_slots(self, slots: int) -> None:
        self._slots = slots
        self.block_cells = process_counters.cells_of_a_block(slots)

    def _bytes(self) -> int:
        return (_FIRST_BLOCK + self._blocks * self.block_cells) * 8

    # -- joining

    def join(
        self, parent_pid: int | None = None, joined: list[ProcessCounters] | None = None
    ) -> ProcessCounters:
        """Give this process a block of counters.

        If the memory has no room, the block is visible to this process only. May run inside an at-fork hook.

        :param joined: an empty list, which is given what is returned: after an interrupt it has it already,
            or this process has not joined.
        """
        if self._cells[_BLOCKS_USED] == 0 and not self._is_named:
            return self._start(0, parent_pid)  # no other process has the memory yet
        taken: list[int] = []
        started: list[ProcessCounters] = [] if joined is None else joined

        def start() -> None:
            number = self._free_block()
            if number is None:
                self._cells[_UNLISTED] += 1
            else:
                taken.append(number)
                started.append(self._start(number, parent_pid))

        try:
            has_joined = self._lock.run(_JOIN_WAIT, start)
        except BaseException:
            for block in map(self._block, taken):
                # Without a pid it is free in any case.
                if not started and block[PID] == os.getpid():
                    block[ENDED] = 1
            raise
        if not has_joined:
            self._cells[_UNLISTED] += 1
        if not started:
            unlisted = self._enter(memoryview(bytearray(self.block_cells * 8)).cast("Q"), parent_pid)
            unlisted.is_listed = False
            started.append(unlisted)
        return started[0]

    def _start(self, number: int, parent_pid: int | None) -> ProcessCounters:
        own = self._enter(self._block(number), parent_pid)
        self._cells[_MAXIMA] += _maximum(own.cells)
        self._cells[_BLOCKS_USED] = max(self._cells[_BLOCKS_USED], number + 1)
        return own

    def _enter(self, block: memoryview, parent_pid: int | None) -> ProcessCounters:
        generation = block[GENERATION] + 1
        block[PID] = 0  # first, with the generation, so that a reader sees that the rest changes
        block[GENERATION] = generation
        if generation > 1:
            # The head last: if this process is killed, the next one still sees which slots were used.
            # Slots that were never used are not touched, so they take no memory.
            _clear(block[HEAD_CELLS : HEAD_CELLS + block[SLOTS_USED] * SLOT_CELLS])
            _clear(block[GENERATION + 1 : HEAD_CELLS])
        block[PARENT_PID] = parent_pid or 0
        block[JOINED] = process.boot_time()
        block[STACK] = self._stack
        block[SIZE] = self._size
        block[MAX_OVERFLOW] = self._max_overflow + 1
        block[HOLD_WARNING] = self._hold_warning
        block[LIMIT] = self.limit or 0
        block[SINCE] = int(time.time() * 1e6)
        block[PID] = os.getpid()
        return ProcessCounters(block, self._slots)

    def _free_block(self) -> int | None:
        used = self._cells[_BLOCKS_USED]
        if used < self._blocks:
            return used
        ended = []
        for number in range(used):
            block = self._block(number)
            if not block[PID]:
                return number  # a process was killed while it took this block, whose counts are added already
            if block[ENDED]:
                ended.append(number)
        if not ended:
            # One read of /proc for each process, so all that have ended are marked at once.
            for number in range(used):
                block = self._block(number)
                if not self.is_alive(block):
                    block[ENDED] = 1
                    ended.append(number)
        if not ended:
            return None
        number = min(ended, key=lambda each: self._block(each)[JOINED])
        self._fold(number)
        return number

    def _fold(self, number: int) -> None:
        """Add an ended process's counts to those of the departed; under the lock."""
        block = self._block(number)
        flips = self._cells[_FLIPS]
        now, then = self._departed(flips), self._departed(flips + 1)
        if (now[_FOLDED_BLOCK], now[_FOLDED_GENERATION]) == (number + 1, block[GENERATION]):
            return  # a process did this and was killed before it could go on
        then[:] = now
        process_counters.fold(then[3:], process_counters.copy_block(block))
        then[_FOLDED_BLOCK], then[_FOLDED_GENERATION] = number + 1, block[GENERATION]
        then[_COUNT] += 1
        self._cells[_FLIPS] = flips + 1  # this single write makes the new sums valid

    # -- the budget

    def budget_for(self, own: ProcessCounters) -> Budget | None:
        """Return the budget as this process has it; None if the family has no limit."""
        if self.limit is None:
            return None
        head = self._cells[_BUDGET : _BUDGET + budget.CELLS]
        # The permits of an unlisted process could not be counted, so it gets none.
        return Budget(head, self._lock, self, own, self.limit if own.is_listed else 0)

    def other_limit(self) -> tuple[int | None, int] | None:
        """Return the limit and the pid of a process that runs with another limit; None if there is none."""
        for block in self.blocks():
            if block[LIMIT] != (self.limit or 0) and block[PID] and self.is_alive(block):
                return block[LIMIT] or None, block[PID]
        return None

    def blocks(self) -> list[memoryview]:
        """Return the blocks that have been used."""
        return [self._block(number) for number in range(self._cells[_BLOCKS_USED])]

    # -- reading

    def read(self, name: str) -> FamilyStats:
        """Return a snapshot of all processes; never waits.

        :param name: the pool's name.
        """
        for _ in range(100):
            flips = self._cells[_FLIPS]
            departed = memoryview(self._departed(flips).tobytes()).cast("Q")
            folded = departed[_FOLDED_BLOCK] - 1, departed[_FOLDED_GENERATION]
            found = [block for number, block in self._copies() if (number, block[GENERATION]) != folded]
            if self._cells[_FLIPS] == flips:
                break
        found.sort(key=lambda block: block[JOINED])
        cells = [block.tolist() for block in found]
        sums = [process_counters.sum_slots(each) for each in cells]
        errors = self.error_types.names()
        processes = [
            self._process_stats(each, its_sums, name, errors, alive=self.is_alive(block))
            for block, each, its_sums in zip(found, cells, sums, strict=True)
        ]
        listed = _listed(processes)
        return FamilyStats(
            pool=name,
            taken_at=time.time(),
            processes=tuple(processes[number] for number in sorted(listed)),
            departed=departed[_COUNT] + len(processes) - len(listed),
            unlisted=self._cells[_UNLISTED],
            server_max_connections=self.server_max_connections,
            limit=self.limit,
            permits=self._permits(processes),
            counters=process_counters.counters(
                process_counters.add_blocks([departed[3:].tolist(), *sums]), errors
            ),
        )

    def _permits(self, processes: list[PoolStats]) -> int:
        if self.limit is None:
            return 0
        # The processes were read one after the other, so one permit may be in it twice: given back by a
        # process after it was read, and taken by the next. The other sum has those of the killed for a while.
        return min(sum(each.permits for each in processes), self._cells[_BUDGET + budget.PERMITS_USED])

    def read_own(self, own: ProcessCounters, name: str) -> PoolStats:
        """Return a snapshot of this process."""
        own.make_good()
        cells = process_counters.copy_block(own.cells).tolist()
        sums = process_counters.sum_slots(cells)
        return self._process_stats(cells, sums, name, self.error_types.names(), alive=True)

    def _process_stats(
        self, cells: list[int], sums: list[int], name: str, errors: Sequence[str], *, alive: bool
    ) -> PoolStats:
        names = {}
        if alive and cells[PID] == os.getpid():
            # Not enumerate(): a fork in C may have left its lock held.
            threads = list(threading._active.values())  # type: ignore[attr-defined]
            names = {thread.ident: thread.name for thread in threads}
        return process_counters.pool_stats(cells, sums, name, alive=alive, thread_names=names, errors=errors)

    def is_alive(self, block: memoryview) -> bool:
        """Return whether the process of a block still runs, and still has the pool."""
        return not block[ENDED] and process.is_alive(block[PID], block[JOINED], block[STACK])

    def _copies(self) -> Iterator[tuple[int, memoryview]]:
        for number in range(self._cells[_BLOCKS_USED]):
            block = self._block(number)
            for _ in range(3):
                before = block[PID], block[GENERATION]
                copied = process_counters.copy_block(block)
                if before == (block[PID], block[GENERATION]):
                    break
            else:
                continue
            if copied[PID]:
                yield number, copied

    # -- the server's limit

    @property
    def server_max_connections(self) -> int | None:
        """The server's ``max_connections``; None as long as no process knows it."""
        return max(self._cells[_SERVER_MAX] - _ANSWER, 0) or None

    def learn_server_max_connections(self, ask: Callable[[], int | None]) -> None:
        """Call `ask` once in the family's life and keep its answer; if it raises, the limit stays unknown."""
        if self._cells[_SERVER_MAX] == 0:
            self._cells[_SERVER_MAX] = _ASKED
            self._cells[_SERVER_MAX] = _ANSWER + (ask() or 0)

    def exceeds_server(self, name: str) -> FamilyStats | None:
        """Return a snapshot if the family's processes may have more connections than the server allows.

        Otherwise, and after the first time in the family's life, return None.
        """
        limit = self.server_max_connections
        if limit is None or self._cells[_WARNED]:
            return None
        joined = self._cells[_BLOCKS_USED], self._cells[_FLIPS]
        if joined == self._looked_at:
            return None  # no process has joined since then, so the maximum is no higher
        self._looked_at = joined
        if self._cells[_MAXIMA] > limit:
            self._lock.run(_JOIN_WAIT, self._reckon_maxima)
        if self._cells[_MAXIMA] <= limit:
            return None
        stats = self.read(name)
        if stats.maximum is None or stats.maximum <= limit:
            return None
        self._cells[_WARNED] = 1
        return stats

    def _reckon_maxima(self) -> None:
        """Add up the maxima of the processes that run; under the lock."""
        maxima = 0
        for block in self.blocks():
            if block[PID] and not block[ENDED]:
                if self.is_alive(block):
                    maxima += _maximum(block)
                else:
                    block[ENDED] = 1
        self._cells[_MAXIMA] = maxima

    # -- addresses

    def _block(self, number: int) -> memoryview:
        first = _FIRST_BLOCK + number * self.block_cells
        return self._cells[first : first + self.block_cells]

    def _departed(self, flips: int) -> memoryview:
        first = _DEPARTED + flips % 2 * _BUFFER_CELLS
        return self._cells[first : first + _BUFFER_CELLS]


def _maximum(block: memoryview) -> int:
    """Return how many connections a process may open; 0 for no limit."""
    size, overflow = block[SIZE], block[MAX_OVERFLOW]
    return size + overflow - 1 if size and overflow else 0


def _clear(cells: memoryview) -> None:
    cells[:] = memoryview(bytes(cells.nbytes)).cast("Q")


def _listed(processes: list[PoolStats]) -> set[int]:
    """Choose the processes to list: those alive with their ancestors, and the newest of the ended."""
    ended = [number for number, each in enumerate(processes) if not each.alive]
    listed = set(ended[-ENDED_LISTED:])
    by_pid: dict[int, int] = {}
    parents: dict[int, int | None] = {}
    for number, each in enumerate(processes):  # oldest first, so a parent's pid is that of its time
        parents[number] = None if each.parent_pid is None else by_pid.get(each.parent_pid)
        by_pid[each.pid] = number
        listed_now = number if each.alive else None
        while listed_now is not None and listed_now not in listed:
            listed.add(listed_now)
            listed_now = parents[listed_now]
    return listed
