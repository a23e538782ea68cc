"""The metrics of a pool: one table for all exporters, with the names, units and meanings of
OpenTelemetry's semantic conventions for connection pools, and ``pidpool.*`` for what those don't have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pidpool.stats.snapshots import Counters, FamilyStats, Histogram, PoolStats
from pidpool.terms import CLOSE_REASONS, STATES_AT_FORK, TRIGGERS

POOL_NAME = "db.client.connection.pool.name"

Stats: TypeAlias = PoolStats | FamilyStats


@dataclass(frozen=True)
class Number:
    """A metric with one value; None if no number would be true."""

    name: str
    kind: Literal["counter", "updowncounter", "gauge"]
    unit: str
    description: str
    read: Callable[[Stats], int | None]


@dataclass(frozen=True)
class FamilyNumber:
    """A gauge that only a family has."""

    name: str
    unit: str
    description: str
    read: Callable[[FamilyStats], int | None]


@dataclass(frozen=True)
class Numbers:
    """A metric with a value for each value of one attribute."""

    name: str
    kind: Literal["counter", "updowncounter"]
    unit: str
    description: str
    attribute: str
    known: tuple[str, ...]
    """Exported as zero from the start: the first increase of a series that was not there is lost."""
    read: Callable[[Stats], Mapping[str, int]]

    def all(self, stats: Stats) -> dict[str, int]:
        """Return all values, those that are zero included; without blanks, as attributes are written."""
        counts = {**dict.fromkeys(self.known, 0), **self.read(stats)}
        return {value.replace(" ", "_"): count for value, count in counts.items()}


@dataclass(frozen=True)
class Durations:
    """A histogram, in seconds."""

    name: str
    description: str
    of: Callable[[Counters], Histogram]

    def read(self, stats: Stats) -> Histogram:
        """Return the histogram of a snapshot."""
        return self.of(stats.counters)


def _idle_maximum(stats: Stats) -> int | None:
    processes = stats.processes if isinstance(stats, FamilyStats) else [stats]
    sizes = [process.size for process in processes if process.alive]
    return None if 0 in sizes else sum(sizes)


NUMBERS = (
    Number(
        "db.client.connection.max",
        "updowncounter",
        "{connection}",
        "Connections that may be open at a time; absent if there is no limit.",
        lambda stats: stats.maximum,
    ),
    Number(
        "db.client.connection.idle.max",
        "updowncounter",
        "{connection}",
        "Idle connections that may be kept open; absent if there is no limit.",
        _idle_maximum,
    ),
    Number(
        "db.client.connection.pending_requests",
        "updowncounter",
        "{request}",
        "Threads that currently wait for a connection.",
        lambda stats: stats.waiting,
    ),
    Number(
        "db.client.connection.timeouts",
        "counter",
        "{timeout}",
        "Checkouts that found no connection free within the pool's timeout.",
        lambda stats: stats.counters.timeouts,
    ),
    Number(
        "pidpool.checkouts.overdue",
        "counter",
        "{checkout}",
        "Checkouts that lasted longer than hold_warning, those that still last included.",
        lambda stats: stats.counters.overdue,
    ),
    Number(
        "pidpool.overdue_checkouts",
        "updowncounter",
        "{checkout}",
        "Checkouts that last longer than hold_warning at present; absent without a hold_warning.",
        lambda stats: stats.overdue,
    ),
    Number(
        "pidpool.connections.opened",
        "counter",
        "{connection}",
        "Connections opened.",
        lambda stats: stats.counters.opened,
    ),
    Number(
        "pidpool.checkouts",
        "counter",
        "{checkout}",
        "Connections checked out.",
        lambda stats: stats.counters.checkouts,
    ),
    Number(
        "pidpool.checkins",
        "counter",
        "{checkin}",
        "Connections checked in.",
        lambda stats: stats.counters.checkins,
    ),
    Number(
        "pidpool.invalidations",
        "counter",
        "{invalidation}",
        "Connections invalidated.",
        lambda stats: stats.counters.invalidations,
    ),
    Number(
        "pidpool.severed",
        "counter",
        "{connection}",
        "Inherited sockets that a child replaced by dead ones.",
        lambda stats: stats.counters.severed,
    ),
    Number(
        "pidpool.kept",
        "counter",
        "{connection}",
        "Inherited connections whose descriptors a child left alone.",
        lambda stats: stats.counters.kept,
    ),
    Number(
        "pidpool.replaced",
        "counter",
        "{use}",
        "Uses of an inherited connection that went on with one of the child's own.",
        lambda stats: stats.counters.replaced,
    ),
    Number(
        "pidpool.refused",
        "counter",
        "{use}",
        "Uses of an inherited connection that were refused.",
        lambda stats: stats.counters.refused,
    ),
    Number(
        "pidpool.forks",
        "counter",
        "{fork}",
        "Children forked.",
        lambda stats: stats.counters.forks,
    ),
)

FAMILY_NUMBERS = (
    FamilyNumber(
        "pidpool.processes", "{process}", "Processes of the family that run.", lambda family: family.alive
    ),
    FamilyNumber(
        "pidpool.unlisted_processes",
        "{process}",
        "Processes that found no room in the family's memory: their connections are not counted.",
        lambda family: family.unlisted,
    ),
    FamilyNumber(
        "pidpool.possible_maximum",
        "{connection}",
        "What running processes may open: each pool_size + max_overflow, and family_limit at most together.",
        lambda family: family.maximum,
    ),
    FamilyNumber(
        "pidpool.family_limit",
        "{connection}",
        "Connections that all processes may have open together (family_limit); absent if there is no limit.",
        lambda family: family.limit,
    ),
    FamilyNumber(
        "pidpool.permits",
        "{connection}",
        "Connections open or being opened, as the family's limit counts them; absent if there is no limit.",
        lambda family: None if family.limit is None else family.permits,
    ),
    FamilyNumber(
        "pidpool.wanting",
        "{thread}",
        "Threads that wait until the family has fewer connections than its limit; absent if there is none.",
        lambda family: None if family.limit is None else family.wanting,
    ),
    FamilyNumber(
        "pidpool.server_max_connections",
        "{connection}",
        "The server's max_connections; absent if not known.",
        lambda family: family.server_max_connections,
    ),
)

NUMBERS_BY = (
    Numbers(
        "db.client.connection.count",
        "updowncounter",
        "{connection}",
        "Connections that are currently in the state described by the state attribute.",
        "db.client.connection.state",
        (),
        lambda stats: {"idle": stats.idle, "used": stats.used},
    ),
    Numbers(
        "pidpool.connections.failed",
        "counter",
        "{connection}",
        "Connects that failed, by the class of the error.",
        "error.type",
        ("OperationalError",),
        lambda stats: stats.counters.failed,
    ),
    Numbers(
        "pidpool.connections.closed",
        "counter",
        "{connection}",
        "Connections closed, by reason.",
        "pidpool.reason",
        CLOSE_REASONS,
        lambda stats: stats.counters.closed,
    ),
    Numbers(
        "pidpool.inherited",
        "counter",
        "{connection}",
        "Connections that children inherited, by what they were doing at the fork.",
        "pidpool.state",
        STATES_AT_FORK,
        lambda stats: stats.counters.inherited,
    ),
    Numbers(
        "pidpool.adoptions",
        "counter",
        "{adoption}",
        "Pools that forked children took over, by what noticed the fork.",
        "pidpool.trigger",
        TRIGGERS,
        lambda stats: stats.counters.adoptions,
    ),
)

DURATIONS = (
    Durations(
        "db.client.connection.create_time",
        "The time it took to create a new connection.",
        lambda counters: counters.create_time,
    ),
    Durations(
        "db.client.connection.wait_time",
        "The time it took to obtain an open connection from the pool.",
        lambda counters: counters.wait_time,
    ),
    Durations(
        "db.client.connection.use_time",
        "The time between borrowing a connection and returning it to the pool.",
        lambda counters: counters.use_time,
    ),
)
