"""Question 8: do the costs grow, with the connections of a pool or with the processes of a family?"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.pool import Pool

from bench import contenders, fake_driver
from bench.contenders import PID, QUEUE
from bench.harness import Answer, Panel, Row, Scale, Spread, alternate, cpu_slice, main, ratios, settle

QUESTION = "How it grows"

READING = """\
CPU time of one checkout and checkin in a pool of 1 to 1,000 connections, all idle (so that they take turns)
or all but one checked out; and, with 1 to 256 processes of a family alive, each with the pool, of a cycle
in the parent (against QueuePool's in the same process, by turns), of its next `os.fork()` and of a snapshot
of all processes' numbers. *Flat* allows for the processor's caches, which more memory slows: the most that
QueuePool's own cycle grows by, and a quarter."""

CONNECTIONS = (1, 10, 100, 1000)
PROCESSES = (1, 16, 64, 256)
FLAT = 1.25

CYCLE = "a cycle in the parent, against QueuePool's,"
FORK = "the parent's next os.fork(),"
SNAPSHOT = "family_stats(), per process,"


def _pool_of(name: str, connections: int, held: bool, kept: list[object]) -> Pool:
    """Return a pool with so many connections, `held` but one, and keep alive what holds them."""
    pool = contenders.pool(name, fake_driver.Connection, pool_size=connections, max_overflow=0)
    checkouts = [pool.connect() for _ in range(connections)]
    for checkout in checkouts[: 1 if held else None]:
        checkout.close()
    kept.append(checkouts)
    return pool


def _by_connections(scale: Scale) -> dict[tuple[str, bool], list[list[float]]]:
    """Return, for each pool, held or not, the values of each size."""
    kept: list[object] = []
    slices = {}
    for name in (QUEUE, PID):
        for held in (False, True):
            for size in CONNECTIONS:
                cycle = contenders.cycle(_pool_of(name, size, held, kept))
                slices[f"{name} {held} {size}"] = cpu_slice(cycle, 200)
    measured = alternate(slices, scale.rounds(200))
    return {
        (name, held): [measured[f"{name} {held} {size}"] for size in CONNECTIONS]
        for name in (QUEUE, PID)
        for held in (False, True)
    }


class Family:
    """Forked children that have made some use of their pool and then wait for their end."""

    def __init__(self, use: Callable[[], object]) -> None:
        self._use = use
        self._end, self._ending = os.pipe()
        self._pids: list[int] = []

    def grow(self) -> float:
        """Fork one more; return the CPU time that the parent spent on it."""
        ready, told = os.pipe()
        started = time.thread_time()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(self._ending)
                self._use()
                os.write(told, b".")
                os.read(self._end, 1)
            finally:
                os._exit(0)
        took = time.thread_time() - started
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        self._pids.append(pid)
        return took

    def end(self) -> None:
        os.close(self._ending)
        for pid in self._pids:
            os.waitpid(pid, 0)
        os.close(self._end)


def _by_processes(scale: Scale) -> dict[str, list[Spread]]:
    """Return the cost of each thing with so many processes alive, this one included."""
    pool: Any = contenders.pool(PID, fake_driver.SocketConnection)
    queue = contenders.pool(QUEUE, fake_driver.SocketConnection)
    cycles = {QUEUE: cpu_slice(contenders.cycle(queue), 200), PID: cpu_slice(contenders.cycle(pool), 200)}
    snapshot = cpu_slice(pool.family_stats, 1)
    for cycle in cycles.values():
        cycle()
    settle()
    family = Family(pool.status)
    costs: dict[str, list[Spread]] = {CYCLE: [], FORK: [], SNAPSHOT: []}
    try:
        took: list[float] = []
        for processes in range(1, max(PROCESSES) + 1):
            if processes in PROCESSES:
                measured = alternate(cycles, scale.rounds(200))
                costs[CYCLE].append(ratios(measured[PID], measured[QUEUE]))
                each = [snapshot() / processes for _ in range(scale.rounds(50))]
                costs[SNAPSHOT].append(Spread.of(each))
            took.append(family.grow())
            if processes in PROCESSES:
                # The last few, or there would be one alone.
                costs[FORK].append(Spread.of((took * 2)[-16:]))
    finally:
        family.end()
    return costs


def answer(scale: Scale) -> Answer:
    costs_by_processes = _by_processes(scale)  # first, while this process is small
    measured = _by_connections(scale)
    rows = []
    for held in (False, True):
        kind = "all but one checked out" if held else "all idle"
        mine, theirs = measured[PID, held], measured[QUEUE, held]
        growth = max((ratios(values, mine[0]) for values in mine), key=lambda spread: spread.median)
        allowed = FLAT * max(ratios(values, theirs[0]).median for values in theirs)
        rows.append(
            Row(
                f"1 to 1,000 connections, {kind}: a cycle at the most",
                f"{growth.text(' ×')} that with 1",
                "flat",
                growth.median <= allowed,
            )
        )
        for name in (QUEUE, PID):
            costs = ", ".join(f"{Spread.of(values).median * 1e6:.2f}" for values in measured[name, held])
            rows.append(Row(f"{name}, {kind}: 1, 10, 100, 1,000 connections", f"{costs} µs"))
    for what, spreads in costs_by_processes.items():
        growth_by = max(spread.median for spread in spreads) / spreads[0].median
        label = f"1 to 256 processes: {what} at the most"
        rows.append(Row(label, f"{growth_by:.2f} × that with 1", "flat", growth_by <= FLAT))
        factor, unit = (1, "×") if what == CYCLE else (1e6, "µs")
        costs = ", ".join(f"{spread.median * factor:,.2f}" for spread in spreads)
        rows.append(Row(f"{what} 1, 16, 64, 256 processes", f"{costs} {unit}"))
    panel = Panel(
        "A cycle in a pool of many connections, all idle",
        "µs of CPU time",
        list(CONNECTIONS),
        {name: [Spread.of(values).median * 1e6 for values in measured[name, False]] for name in (QUEUE, PID)},
        "connections",
    )
    return Answer(QUESTION, READING, rows, [panel])


if __name__ == "__main__":
    main(answer)
