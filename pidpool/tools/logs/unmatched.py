"""The forks that only the parent logged. A parent's `pool.forked` and a child's `pool.adopted` are of the
same fork if they belong to one parent and one pool and lie close together in time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TypeAlias

from pidpool.terms import StateAtFork
from pidpool.tools.logs.processes import Process

MOST_FORKS = 10_000
"""Unmatched forks that are kept one by one; the connections of older ones are summed."""

_SAME_FORK = 1.0
"""Seconds that the parent's and the child's time of one fork may lie apart."""

_MOST_ADOPTIONS = 100
"""Adoptions of one parent and one pool that wait to be matched."""


class UnmatchedFork:
    """A fork with open connections that only the parent logged: the child never used the pool, or its log
    was not read."""

    def __init__(self, at: float, owner: Process, pool: str | None, fork_line: str | None = None) -> None:
        self.at = at
        self.owner = owner
        self.pool = pool
        self.fork_line = fork_line
        self.idle = 0
        self.checked_out = 0
        self.in_transaction = 0

    @property
    def open(self) -> bool:
        """Whether a transaction was open."""
        return self.in_transaction > 0

    @property
    def connections(self) -> int:
        """How many connections were open."""
        return self.idle + self.checked_out

    @property
    def state(self) -> StateAtFork:
        """The state of the connection that is worst off."""
        return next(iter(self.by_state()), "idle")

    def by_state(self) -> dict[StateAtFork, int]:
        """Return the numbers of connections by their state, the most harmful first, without zeros."""
        numbers: dict[StateAtFork, int] = {
            "in transaction": self.in_transaction,
            "no transaction": self.checked_out - self.in_transaction,
            "idle": self.idle,
        }
        return {state: number for state, number in numbers.items() if number > 0}

    def add(self, idle: int, checked_out: int, in_transaction: int) -> None:
        """Add connections to the fork's."""
        self.idle += idle
        self.checked_out += checked_out
        self.in_transaction += in_transaction


_Key: TypeAlias = "tuple[Process, str | None]"


class UnmatchedForks:
    """Matches the forks that parents logged with the adoptions that children logged, in bounded memory.

    Not matched one by one as they come: a parent may log several forks at a time, and late.

    :param others: the process that stands for those without room.
    """

    def __init__(self, others: Process) -> None:
        self.left_out = UnmatchedFork(0.0, others, None)
        """The sums of those forks for which there was no room."""
        self._forks: dict[_Key, list[UnmatchedFork]] = {}
        self._kept = 0
        self._adoptions: dict[_Key, list[float]] = {}

    def add_fork(self, fork: UnmatchedFork) -> None:
        """Add a fork that a parent logged."""
        key = _key(fork.owner, fork.pool)
        forks = self._forks.setdefault(key, [])
        forks.append(fork)
        self._kept += 1
        if self._kept > MOST_FORKS:
            self._match(key)
            # By halves: to drop one at a time would mean to match all of them at each further fork. Never
            # the newest, whose child may be about to log its adoption.
            half = len(forks) // 2
            for oldest in forks[:half]:
                self.left_out.add(oldest.idle, oldest.checked_out, oldest.in_transaction)
            del forks[:half]
            self._kept = sum(map(len, self._forks.values()))

    def add_adoption(self, parent: Process, pool: str | None, at: float) -> None:
        """Add an adoption that a child logged of a fork that its parent logs as well."""
        key = _key(parent, pool)
        adoptions = self._adoptions.setdefault(key, [])
        adoptions.append(at)
        if len(adoptions) >= _MOST_ADOPTIONS:
            self._match(key)
            del adoptions[: -_MOST_ADOPTIONS // 2]

    def match(self) -> None:
        """Drop the forks that have an adoption."""
        for key in self._forks:
            self._match(key)

    def listed(self) -> list[UnmatchedFork]:
        """Return the forks that are kept, oldest first."""
        return sorted((fork for forks in self._forks.values() for fork in forks), key=lambda fork: fork.at)

    @property
    def connections(self) -> int:
        """How many connections crossed an unmatched fork."""
        return sum(fork.connections for fork in (*self.listed(), self.left_out))

    @property
    def in_transaction(self) -> int:
        """How many of them were in a transaction."""
        return sum(fork.in_transaction for fork in (*self.listed(), self.left_out))

    def _match(self, key: _Key) -> None:
        """Drop the forks of one parent and pool that have an adoption; the nearest in time are a pair."""
        forks, adoptions = self._forks.get(key, []), self._adoptions.get(key, [])
        forks.sort(key=lambda fork: fork.at)
        times = [fork.at for fork in forks]
        pairs = [
            (abs(times[i] - at), i, j)
            for j, at in enumerate(adoptions)
            for i in range(bisect_left(times, at - _SAME_FORK), bisect_right(times, at + _SAME_FORK))
        ]
        matched_forks: set[int] = set()
        matched_adoptions: set[int] = set()
        for _, i, j in sorted(pairs):
            if i not in matched_forks and j not in matched_adoptions:
                matched_forks.add(i)
                matched_adoptions.add(j)
        self._kept -= len(matched_forks)
        forks[:] = [fork for i, fork in enumerate(forks) if i not in matched_forks]
        adoptions[:] = [at for j, at in enumerate(adoptions) if j not in matched_adoptions]


def _key(parent: Process, pool: str | None) -> _Key:
    # Names for which a process had no room are one pool.
    return parent, pool if pool in parent.pools else None
