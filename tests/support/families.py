"""Families made by hand, and a pool that reports such a one: for tests of what is shown."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Engine, create_engine

from pidpool import ConnectionTag, PidPool
from pidpool.stats.snapshots import BOUNDS, ConnectionStats, Counters, FamilyStats, Histogram, PoolStats

_NOTHING = Counters()


class ReportingPool(PidPool):
    """Reports the family that it was given."""

    reported: Any = None

    def family_stats(self) -> FamilyStats:
        reported: FamilyStats = self.reported() if callable(self.reported) else self.reported
        return reported

    def stats(self) -> PoolStats:
        return self.family_stats().processes[0]


def pool_reporting(family: Any) -> Engine:
    """Return an engine whose pool reports `family`, or what `family()` returns."""
    engine = create_engine("sqlite://", poolclass=ReportingPool)
    assert isinstance(engine.pool, ReportingPool)
    engine.pool.reported = family
    return engine


def histogram(*seconds: float) -> Histogram:
    """Return the histogram of some durations."""
    counts = [0] * (len(BOUNDS) + 1)
    for each in seconds:
        counts[sum(bound < each for bound in BOUNDS)] += 1
    return Histogram(tuple(counts), sum(seconds))


def connection(
    owner: int, number: int, state: str = "idle", in_state: float = 1.5, thread: str | None = None
) -> ConnectionStats:
    """Return a connection of process `owner`."""
    tag = ConnectionTag(f"{owner}-{number}", owner, 10 + number, 9000 + number, owner * 10 + number, 1e9)
    return ConnectionStats(
        tag, state, 75.0, in_state, 17, None if thread is None else 140_000_000_000_000 + number, thread
    )


def process(pid: int, parent: int | None, counters: Counters = _NOTHING, **fields: Any) -> PoolStats:
    """Return a process of a family; `connections` decide how many are idle and used."""
    connections = fields.pop("connections", ())
    alive = fields.get("alive", True)
    values: dict[str, Any] = {
        "pool": "shop",
        "pid": pid,
        "parent_pid": parent,
        "alive": alive,
        "since": time.time() - 100.0,
        "size": 5,
        "max_overflow": 10,
        "overflow": len(connections) - 5,
        "idle": sum(each.state == "idle" for each in connections),
        "used": sum(each.state == "used" for each in connections),
        "waiting": 0,
        "overdue": None,
        "counters": counters,
        "connections": tuple(connections),
        **fields,
    }
    return PoolStats(**values)


def family(*processes: PoolStats, pool: str = "shop", **fields: Any) -> FamilyStats:
    """Return a family whose counters are the sums over its processes."""
    values: dict[str, Any] = {
        "pool": pool,
        "taken_at": time.time(),
        "processes": processes,
        "departed": 0,
        "unlisted": 0,
        "server_max_connections": 100,
        "permits": sum(each.permits for each in processes),
        "counters": sum((each.counters for each in processes), _NOTHING),
        **fields,
    }
    return FamilyStats(**values)


def small_family(**fields: Any) -> FamilyStats:
    """Return a parent, a child that inherited a connection in a transaction, and one that has ended."""
    parent = process(
        41,
        None,
        Counters(
            opened=2,
            failed={"OperationalError": 2},
            checkouts=7,
            checkins=6,
            forks=2,
            wait_time=histogram(1e-5, 0.002),
            timeouts=1,
            overdue=4,
        ),
        connections=[connection(41, 1), connection(41, 2, "used", thread="MainThread")],
        waiting=3,
        overdue=1,
    )
    child = process(
        57,
        41,
        Counters(
            opened=1,
            checkouts=2,
            checkins=2,
            inherited={"idle": 1, "in transaction": 1},
            severed=2,
            refused=1,
            adoptions={"hook": 1},
            closed={"recycled": 1},
            wait_time=histogram(0.5),
            use_time=histogram(0.1, 40.0),
            create_time=histogram(0.004),
        ),
        connections=[connection(57, 1)],
    )
    ended = process(58, 41, Counters(checkouts=30, checkins=30, adoptions={"lazy": 1}), alive=False)
    return family(parent, child, ended, **fields)
