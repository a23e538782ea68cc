"""Which checkouts keep others waiting: the state of a family in one line, for an error and an event."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from pidpool.stats.snapshots import FamilyStats

NAMED = 3
"""How many holders are named."""


def state(family: FamilyStats) -> str:
    """Describe how many connections a family has, and for what."""
    opened = f"{family.used} used and {family.idle} idle connection(s) in {family.alive} process(es)"
    return opened if family.limit is None else f"{opened}, {family.permits} of {family.limit} permits taken"


def longest(family: FamilyStats, lines: Mapping[str, str | None]) -> str:
    """Name the checkouts that have lasted longest, the longest first; "" if there is none.

    :param lines: the lines of code that made them, by connection id, as far as they are known.
    """
    checkouts = (
        (connection.in_state, process.pid, connection)
        for process in family.processes
        if process.alive
        for connection in process.connections
        if connection.state == "used"
    )
    named = []
    for held, pid, connection in heapq.nlargest(NAMED, checkouts, key=lambda each: each[0]):
        line = lines.get(connection.tag.connection_id)
        thread = connection.thread_name or connection.thread_id
        named.append(f"pid {pid} thread {thread} for {held:.3f} s" + ("" if line is None else f" at {line}"))
    return "; ".join(named)
