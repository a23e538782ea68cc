"""What a pool counts and measures, as frozen snapshots: of one process, and of all the processes of a
family. Only the shapes are here; the numbers are kept in family.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pidpool.tag import ConnectionTag

BOUNDS: tuple[float, ...] = tuple((1024 << power) / 1e9 for power in range(26))
"""The upper bounds of the histograms' buckets in seconds: 1.024 µs, doubled each time, up to 34.4 s."""


def quantile(counts: Sequence[int], bounds: Sequence[float], q: float) -> float | None:
    """Return the upper bound of the bucket in which the quantile lies; None if nothing was counted.

    :param bounds: the upper bounds of the buckets; the last bucket has none, and stands for infinity.
    """
    rank, seen = q * sum(counts), 0
    for bound, count in zip((*bounds, float("inf")), counts, strict=False):
        seen += count
        if seen and seen >= rank:
            return bound
    return None


@dataclass(frozen=True)
class Histogram:
    """How long something took: a count for each bucket, and the sum.

    :param counts: one number for each of `BOUNDS` (how many took at most so long, and longer than the
        bound before), and a last one for all that took longer.
    :param sum: seconds, of all together.
    """

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    sum: float = 0.0

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)

    def quantile(self, q: float) -> float | None:
        """Return the upper bound, in seconds, of the bucket in which the quantile lies; None if empty.

        Infinite if it took longer than the last bound.
        """
        return quantile(self.counts, BOUNDS, q)

    def __add__(self, other: Histogram) -> Histogram:
        counts = tuple(map(int.__add__, self.counts, other.counts))
        return Histogram(counts, self.sum + other.sum)


@dataclass(frozen=True)
class Counters:
    """All that only ever grows, of one process or of several together."""

    opened: int = 0
    failed: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Connects that failed, by the class of the error: the first eight classes of a family, ``_OTHER`` for
    all further ones."""
    closed: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """By reason: recycled, invalidated, overflow, disposed, detached, failed, given back, idle, collected."""
    checkouts: int = 0
    checkins: int = 0
    timeouts: int = 0
    """Checkouts that found no connection free for `pool_timeout` seconds."""
    invalidations: int = 0
    inherited: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """By state at the fork: idle, no transaction, in transaction, unknown."""
    severed: int = 0
    kept: int = 0
    replaced: int = 0
    refused: int = 0
    adoptions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Pools taken over by a forked child, by what noticed the fork: hook, lazy."""
    forks: int = 0
    """Children forked, as far as Python's at-fork hooks ran."""
    overdue: int = 0
    """Checkouts that lasted longer than `hold_warning`, those that still last included."""
    create_time: Histogram = Histogram()
    """Seconds that opening a connection took, connect events included."""
    wait_time: Histogram = Histogram()
    """Seconds from asking for a connection to having it, one entry for each checkout."""
    use_time: Histogram = Histogram()
    """Seconds from checkout to checkin, one entry for each checkin."""

    def __add__(self, other: Counters) -> Counters:
        return Counters(
            **{
                field.name: _sum(getattr(self, field.name), getattr(other, field.name))
                for field in dataclasses.fields(self)
            }
        )


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, Mapping):
        return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
    return one + other


@dataclass(frozen=True)
class ConnectionStats:
    """One connection of a pool, in whichever process."""

    tag: ConnectionTag
    state: str
    """``"idle"`` or ``"used"``."""
    age: float
    """Seconds since it was opened."""
    in_state: float
    """Seconds since it came into this state."""
    checkouts: int
    """How often it was checked out."""
    thread_id: int | None
    """`threading.get_ident()` of the thread that checked it out, while it is used."""
    thread_name: str | None
    """The name of that thread, where it is known: in its own process."""


@dataclass(frozen=True)
class PoolStats:
    """A pool as one process has it."""

    pool: str
    pid: int
    parent_pid: int | None
    """The process that forked it; None for the process that made the pool."""
    alive: bool
    """Whether the process still runs."""
    since: float
    """Seconds since the epoch: when the pool was made here, or the process was forked."""
    size: int
    """`pool_size`."""
    max_overflow: int
    """-1 for no limit."""
    overflow: int
    """As ``pool.overflow()``."""
    idle: int
    """Connections in the pool; ``pool.checkedin()`` also counts entries whose connection was invalidated."""
    used: int
    """As ``pool.checkedout()``."""
    waiting: int
    """Threads that wait for a connection."""
    overdue: int | None
    """Checkouts that last longer than `hold_warning` at present; None without a `hold_warning`."""
    counters: Counters
    connections: tuple[ConnectionStats, ...]
    permits: int = 0
    """Connections that are open or being opened, if the family has a limit."""
    wanting: int = 0
    """Threads that wait until the family has fewer connections than its limit."""

    @property
    def maximum(self) -> int | None:
        """How many connections this process may have at a time; None for no limit."""
        unlimited = self.size == 0 or self.max_overflow < 0
        return None if unlimited else self.size + self.max_overflow

    def to_dict(self) -> dict[str, Any]:
        """Return the snapshot as dicts, lists, strings and numbers, ready for JSON."""
        return {**_plain(self), "maximum": self.maximum}


@dataclass(frozen=True)
class FamilyStats:
    """A pool as all the processes have it that were forked, directly or not, from the one that made it."""

    pool: str
    taken_at: float
    """Seconds since the epoch."""
    processes: tuple[PoolStats, ...]
    """Those that run and those that have ended, parents before their children, oldest first. A process is
    listed from its first use of the pool on."""
    departed: int
    """Ended processes whose entry was needed for another one; their counts are in `counters`."""
    unlisted: int
    """Processes that found no room in the family's memory; nothing is known of them."""
    server_max_connections: int | None
    """The server's ``max_connections``, where that is known."""
    counters: Counters
    """The sums over all processes, the departed ones included."""
    limit: int | None = None
    """`family_limit` in the process that took the snapshot; None for no limit."""

    @property
    def alive(self) -> int:
        """How many processes run, as far as they are listed."""
        return sum(process.alive for process in self.processes)

    @property
    def maximum(self) -> int | None:
        """How many connections all running processes may have together; None for no limit."""
        maxima = [process.maximum for process in self.processes if process.alive]
        if None in maxima:
            return self.limit
        total = sum(filter(None, maxima))
        return total if self.limit is None else min(total, self.limit)

    @property
    def idle(self) -> int:
        """Idle connections of the running processes."""
        return sum(process.idle for process in self.processes if process.alive)

    @property
    def used(self) -> int:
        """Connections checked out in the running processes."""
        return sum(process.used for process in self.processes if process.alive)

    @property
    def waiting(self) -> int:
        """Threads of the running processes that wait for a connection."""
        return sum(process.waiting for process in self.processes if process.alive)

    @property
    def permits(self) -> int:
        """Connections that running processes have open or are opening, if the family has a limit."""
        return sum(process.permits for process in self.processes if process.alive)

    @property
    def wanting(self) -> int:
        """Threads that wait until the family has fewer connections than its limit."""
        return sum(process.wanting for process in self.processes if process.alive)

    @property
    def overdue(self) -> int | None:
        """Checkouts of the running processes that last longer than `hold_warning`; None without one."""
        known = [process.overdue for process in self.processes if process.overdue is not None]
        return sum(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Return the snapshot as dicts, lists, strings and numbers, ready for JSON."""
        derived = {name: getattr(self, name) for name in _DERIVED}
        own = {name: _plain(each) for name, each in vars(self).items() if name != "processes"}
        return {**own, **derived, "processes": [process.to_dict() for process in self.processes]}


_DERIVED = ("alive", "maximum", "idle", "used", "waiting", "overdue", "permits", "wanting")


def _plain(value: Any) -> Any:
    # A family has tens of thousands of values; most of them are these.
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, tuple):
        return [*value] if value and isinstance(value[0], int) else [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return dict(value)
    return {name: _plain(each) for name, each in vars(value).items()}
