"""`Budget`: at most so many connections open, or being opened, in all processes of a family together.

Each process has a permit for each of its connections. Their number is a cell of its block, written under the
family's lock alone; a cell in the family's head has the sum. When no permit seems to be left, the sum is
reckoned anew, over the processes that run. So no permit is lost with a process that is killed at any
instruction.

A thread that finds no permit says so in two cells of the head. They are times until which that holds, renewed
while it waits: a thread that is killed wants nothing any more.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Callable
from typing import Protocol

from pidpool.stats.bell import Bell
from pidpool.stats.process_counters import ENDED, PERMITS, WANTING, ProcessCounters
from pidpool.stats.robust_lock import RobustLock

# -- the budget's cells in the head of a family's memory

PERMITS_USED = 0
"""The sum of all permits; too high while a process that has ended is in it."""
RECKONED_AT = 1
WANTED_UNTIL = 2
"""`time.perf_counter_ns()` until which a thread wants a permit; 0 if none does."""
NEEDED_UNTIL = 3
"""The same for a thread whose process has less than its share."""
BELL = 4
"""Rung when a thread wants a permit."""
CELLS = 5

POLL = 0.01
"""Seconds after which a thread that wants a permit looks again."""

_HOLDS = 60_000_000
"""Nanoseconds for which a wish holds: some times `POLL`."""

_RECKON_EVERY = 20_000_000
"""Nanoseconds between two looks for processes that have ended: a read of /proc for each."""

_LOCK_WAIT = 1.0


class Blocks(Protocol):
    """The family, as far as its budget needs it."""

    def blocks(self) -> list[memoryview]:
        """Return the blocks that have been used."""

    def is_alive(self, block: memoryview) -> bool:
        """Return whether the process of a block still runs, and still has the pool."""


class Permit:
    """The right to have one connection open. It is given back at the latest when this object goes."""

    __slots__ = ("_budget", "__weakref__")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        budget.held[id(self)] = weakref.ref(self)

    def is_of(self, budget: Budget) -> bool:
        """Return whether it is one of this budget's: in a forked child its parent's permits are not."""
        return self._budget is budget

    def give_back(self) -> None:
        """Give it back; does nothing the second time, and in a forked child."""
        self._budget.take_back(self)

    def __del__(self, is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the interpreter's exit modules have lost their names already. The permits end with the process.
        if not is_ending():
            self._budget.take_back(self)


class Budget:
    """The budget of a family as one process has it.

    Threads: any number may use it. Forks: a child makes one of its own, with no permits.

    :param head: the budget's cells in the head of the family's memory.
    :param lock: the family's lock.
    :param family: its blocks.
    :param counters: this process's own block.
    :param limit: how many permits there are.
    """

    def __init__(
        self, head: memoryview, lock: RobustLock, family: Blocks, counters: ProcessCounters, limit: int
    ) -> None:
        self.limit = limit
        self.wanted = head[WANTED_UNTIL : WANTED_UNTIL + 1]
        """One cell: `WANTED_UNTIL`. Not 0 if a thread of the family may want a permit."""
        self.bell = Bell(head[BELL : BELL + 1])
        self.held: dict[int, weakref.ref[Permit]] = {}
        """The permits of this process, by `id()`. The cell of the block follows under the lock."""
        self._head = head
        self._lock = lock
        self._family = family
        self._counters = counters
        self._cells = counters.cells
        self._pid = os.getpid()

    # -- permits

    def take(self) -> Permit | None:
        """Take a permit, or return None if there is none; does not wait for one."""
        head, now = self._head, time.perf_counter_ns()
        if head[PERMITS_USED] >= self.limit and 0 <= now - head[RECKONED_AT] < _RECKON_EVERY:
            return None
        if head[NEEDED_UNTIL] > now and not self._has_less():
            return None  # it is for the process that has less
        taken: list[Permit] = []

        def take() -> None:
            self._settle()
            if head[PERMITS_USED] >= self.limit:
                self._reckon()
            if head[PERMITS_USED] < self.limit:
                taken.append(Permit(self))
                self._settle()

        try:
            self._lock.run(_LOCK_WAIT, take)
            self.settle()
            return taken.pop() if taken else None
        except BaseException:
            taken.clear()  # the traceback of an interrupt may be kept, and this with it
            raise

    def take_back(self, permit: Permit) -> None:
        """Take a permit back. If the lock can't be had, the next use of the budget settles it."""
        if self._pid == os.getpid() and self.held.pop(id(permit), None) is not None:
            self.settle()

    def settle(self) -> None:
        """Have the cells say how many permits this process has, as far as they do not.

        A finalizer that gives a permit back in the middle of another use of the lock can't have the lock.
        Nor can a thread if the process that has it is stopped.
        """
        for _ in range(3):
            if self._count() == self._cells[PERMITS] or not self._lock.run(_LOCK_WAIT, self._settle):
                return

    def _count(self) -> int:
        """Return how many permits this process has. One whose end was interrupted is forgotten."""
        for key, reference in list(self.held.items()):
            if reference() is None and self.held.get(key) is reference:
                self.held.pop(key, None)
        return len(self.held)

    def _settle(self) -> None:
        """Have the cells say how many permits this process has; under the lock.

        A process that is killed in the middle leaves a sum that is right or too high, since its own permits
        count no more.
        """
        held, cells, head = self._count(), self._cells, self._head
        change = held - cells[PERMITS]
        if change:
            cells[PERMITS] = held
            head[PERMITS_USED] = max(0, head[PERMITS_USED] + change)

    def _reckon(self) -> None:
        """Add up the permits of the processes that run; under the lock."""
        used = 0
        for block in self._family.blocks():
            if block[ENDED] or not (block[PERMITS] or block[WANTING]):
                continue
            if self._family.is_alive(block):
                used += block[PERMITS]
            else:
                block[ENDED] = 1
        self._head[PERMITS_USED] = used
        self._head[RECKONED_AT] = time.perf_counter_ns()

    # -- wishes

    def share(self) -> int:
        """Return how many permits each process has if all that have or want some have as many.

        0 if there are fewer permits than such processes: then each gives its permit back after each use.
        """
        claiming = sum(
            not block[ENDED] and (block[PERMITS] or block[WANTING]) != 0 for block in self._family.blocks()
        )
        return self.limit // max(1, claiming)

    def _has_less(self) -> bool:
        """Return whether this process has less than its share, which is one permit at least."""
        return len(self.held) < max(1, self.share())

    def begin_wish(self, wait: object) -> None:
        """Count a thread of this process among those that want a permit, as long as its wait lives."""
        self._counters.wanting.add(wait)
        weakref.finalize(wait, self.end_wish).atexit = False

    def wish(self) -> None:
        """Say that a thread of this process wants a permit; to be repeated each `POLL` seconds."""
        head, now = self._head, time.perf_counter_ns()
        if self._has_less():
            head[NEEDED_UNTIL] = now + _HOLDS
        is_known = head[WANTED_UNTIL] > now + _HOLDS // 3
        if not is_known:
            head[WANTED_UNTIL] = now + _HOLDS
            self.bell.ring()

    def end_wish(self) -> None:
        """Say that this thread wants none any more; others repeat their wishes."""
        self._head[NEEDED_UNTIL] = self._head[WANTED_UNTIL] = 0

    def is_wanted(self) -> bool:
        """Return whether a thread of the family wants a permit."""
        until = self._head[WANTED_UNTIL]
        if until and until <= time.perf_counter_ns():
            self._head[WANTED_UNTIL] = 0  # the thread was killed
            return False
        return until != 0

    def is_over_share(self) -> bool:
        """Return whether this process has more than its share while another one has less and wants one."""
        return self._head[NEEDED_UNTIL] > time.perf_counter_ns() and len(self.held) > self.share()

    def wanting(self) -> int:
        """Return how many threads of the family want a permit, as far as their processes run.

        Those of this process too: they may wait in another pool of the family, such as the successor of one
        that was disposed of (tests/pool/test_family_limit.py::test_pools_of_one_process_give_back_too). A
        thread that waits in the pool that asks takes what is idle there itself.
        """
        return sum(block[WANTING] for block in self._family.blocks() if not block[ENDED])
