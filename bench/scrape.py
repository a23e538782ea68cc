"""Question 9: what do the numbers of a whole family cost, in the reader and in the other processes?"""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from bench import contenders, fake_driver
from bench.contenders import PID
from bench.growth import Family
from bench.harness import Answer, Panel, Row, Scale, Slice, Spread, alternate, cpu_slice, main, ratios
from pidpool.export.endpoint import StatsApp
from pidpool.export.endpoint.answers import Request

QUESTION = "A scrape"

READING = """\
CPU time of one `family_stats()`, and of one answer of the endpoint, with 1, 64 and 256 processes of a family
alive, each with five connections, two of them checked out. Then a worker, one of 64 processes, checks out
and in while another process does nothing, polls `family_stats()` without a pause, or is as busy with
something outside the family (the price of a neighbour on this machine): CPU time of the worker's cycle,
compared within each round. A real scraper pauses: once a second costs a hundredth of it."""

PROCESSES = (1, 64, 256)
WORKERS = 64

SNAPSHOT = "family_stats()"
METRICS = "/metrics"
JSON = "/stats.json"

REST, POLL, OTHER = range(3)
ALONE = "beside nobody"
POLLED = "while polled"
BUSY = "beside a busy process"

NOTHING = 1.03
"""Differences below this are noise: QueuePool differs from itself by about as much between two moments."""


def _use(pool: Any, kept: list[object]) -> None:
    """Open five connections, and keep two of them checked out."""
    checkouts = [pool.connect() for _ in range(5)]
    for checkout in checkouts[2:]:
        checkout.close()
    kept.append(checkouts[:2])


def _by_processes(scale: Scale) -> dict[str, list[Spread]]:
    """Return what each thing takes with so many processes alive."""
    kept: list[object] = []
    pool: Any = contenders.pool(PID, fake_driver.Connection)
    app = StatsApp(pool)

    def ask(path: str) -> Callable[[], object]:
        request = Request("GET", path, host="localhost")
        answered = app.answer(request)
        if answered.status is not HTTPStatus.OK:
            raise RuntimeError(answered.body.decode())
        return lambda: app.answer(request)

    slices = {name: cpu_slice(ask(name), 1) for name in (METRICS, JSON)}
    slices[SNAPSHOT] = cpu_slice(pool.family_stats, 1)
    costs: dict[str, list[Spread]] = {SNAPSHOT: [], METRICS: [], JSON: []}
    family = Family(lambda: _use(pool, kept))
    try:
        for processes in range(1, max(PROCESSES) + 1):
            if processes == 1:
                _use(pool, kept)
            else:
                family.grow()
            if processes in PROCESSES:
                for name, values in alternate(slices, scale.rounds(100)).items():
                    costs[name].append(Spread.of(values))
    finally:
        family.end()
    return costs


@contextmanager
def _neighbour(poll: Callable[[], object]) -> Iterator[Callable[[int], None]]:
    """Fork a process that rests, polls, or is busy with something else, as its pipe says."""
    page = mmap.mmap(-1, mmap.PAGESIZE)  # its first byte: what to do; the second: what is being done
    pid = os.fork()
    if pid == 0:
        try:
            numbers = list(range(1000))
            while page[0] != 255:
                page[1] = page[0]
                if page[0] == POLL:
                    poll()
                elif page[0] == OTHER:
                    for _ in range(100):
                        sorted(str(number) for number in numbers)
                else:
                    time.sleep(0.0005)
        finally:
            os._exit(0)

    def tell(what: int) -> None:
        page[0] = what
        while page[1] != what:
            time.sleep(0.0002)

    try:
        yield tell
    finally:
        page[0] = 255
        os.waitpid(pid, 0)


def _beside(scale: Scale) -> dict[str, list[float]]:
    """Return a worker's cycles beside each neighbour, round by round."""
    kept: list[object] = []
    pool: Any = contenders.pool(PID, fake_driver.Connection)
    _use(pool, kept)
    family = Family(lambda: _use(pool, kept))
    cycle = cpu_slice(contenders.cycle(pool), 1000)
    try:
        for _ in range(WORKERS - 2):
            family.grow()
        with _neighbour(pool.family_stats) as tell:

            def beside(what: int) -> Slice:
                def run() -> float:
                    tell(what)
                    return cycle()

                return run

            slices = {ALONE: beside(REST), POLLED: beside(POLL), BUSY: beside(OTHER)}
            return alternate(slices, scale.rounds(300))
    finally:
        family.end()


def answer(scale: Scale) -> Answer:
    logging.getLogger("pidpool").setLevel(logging.ERROR)  # 255 children that inherit two checkouts each
    costs = _by_processes(scale)
    measured = _beside(scale)
    rows = []
    for name, spreads in costs.items():
        times = ", ".join(spread.text(digits=2, factor=1e3) for spread in spreads)
        rows.append(Row(f"{name}: 1, 64, 256 processes", f"{times} ms"))
    polled = ratios(measured[POLLED], measured[BUSY])
    target = f"at most {NOTHING:g} × {BUSY}"
    rows.append(
        Row(f"a worker's cycle {POLLED}", polled.text(" ×", digits=3), target, polled.median <= NOTHING)
    )
    rows.append(
        Row(f"the same, against {ALONE}", ratios(measured[POLLED], measured[ALONE]).text(" ×", digits=3))
    )
    each = ", ".join(f"{Spread.of(measured[name]).median * 1e6:.2f}" for name in (ALONE, BUSY, POLLED))
    rows.append(Row(f"a worker's cycle {ALONE}, {BUSY}, {POLLED}", f"{each} µs"))
    panel = Panel(
        "Asking for everybody's numbers",
        "ms of CPU time",
        list(PROCESSES),
        {name: [spread.median * 1e3 for spread in spreads] for name, spreads in costs.items()},
        "processes alive",
    )
    return Answer(QUESTION, READING, rows, [panel])


if __name__ == "__main__":
    main(answer)
