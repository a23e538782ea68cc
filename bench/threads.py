"""Question 2: how many checkouts a second do many threads get out of five connections, and how evenly?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench import contenders
from bench.contenders import PID, PSYCOPG, QUEUE, RECIPE
from bench.harness import Answer, Panel, Row, Scale, Spread, alternate, at_least, main, ratios

QUESTION = "Threads on 5 connections without overflow, fake driver"

READING = """\
Each thread checks out and in again as often as it can for a second; the contenders take turns. Cycles a
second are the sum over all threads, by the clock. The wait is what `connect()` took, over all checkouts of
a slice, those that were still waiting at its end included. A thread *starves* if it finished not one cycle
in a slice in which the others went on. The rows without work are about what the pool's own locks cost: a
thread that is interrupted while it holds QueuePool's has all others queue up behind it. The rows with 0.2
ms of work, during which the thread lets go of the interpreter as a driver does, show which thread gets the
next connection. QueuePool's 99th percentile is small there because its waiting threads never get one, and so
hardly count. On a machine that is busy with other things the threads seldom run at the same time, and
QueuePool fares better than on an idle one. psycopg2's own pool is not here: it raises when it is empty, so
that no thread can wait."""

TARGETS = {4: 2.0, 16: 3.0, 64: 3.0}
WORK = 0.0002
# Two of one kind differ by as much.
NO_WORSE = 1.05


@dataclass
class Contender:
    """One pool under many threads, slice by slice."""

    check_out: Callable[[], Any]
    check_in: Callable[[Any], Any]
    threads: int
    seconds: float

    def __post_init__(self) -> None:
        self.waits: list[float] = []  # the 99th percentile of each slice, seconds
        self.longest: list[float] = []
        self.starved = 0  # over all slices
        self.least: list[float] = []  # the share of the thread with the fewest cycles, 1.0 being a fair one

    def run(self) -> float:
        """Return cycles a second."""
        barrier = threading.Barrier(self.threads + 1)
        ends: list[float] = []
        waits: list[list[float]] = [[] for _ in range(self.threads)]
        errors: list[BaseException] = []

        def work(mine: list[float]) -> None:
            now, check_out, check_in, note = time.perf_counter, self.check_out, self.check_in, mine.append
            barrier.wait()
            try:
                while True:
                    started = now()
                    connection = check_out()
                    got = now()
                    check_in(connection)
                    if ends:
                        break
                    note(got - started)
                # This one was not over in time, and may have waited until long after.
                note(max(0.0, min(got, ends[0]) - started))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(mine,)) for mine in waits]
        for thread in threads:
            thread.start()
        barrier.wait()
        started = time.perf_counter()
        time.sleep(self.seconds)
        ends.append(time.perf_counter())
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        every = sorted(wait for mine in waits for wait in mine)
        self.waits.append(every[int(len(every) * 0.99)])
        self.longest.append(every[-1])
        cycles = [len(mine) - 1 for mine in waits]  # the last one was not over in time
        total = max(1, sum(cycles))
        self.least.append(min(cycles) * self.threads / total)
        self.starved += cycles.count(0)
        return total / (ends[0] - started)


def _measure(
    names: tuple[str, ...], threads: int, scale: Scale, *, seconds: float, work: float = 0.0
) -> tuple[dict[str, Contender], dict[str, list[float]]]:
    made = {}
    for name in names:
        check_out: Callable[[], Any]
        check_in: Callable[[Any], None]
        if name == PSYCOPG:
            psycopg = contenders.psycopg3_pool(5)
            check_out, check_in = psycopg.getconn, psycopg.putconn
        else:
            pool = contenders.pool(name, pool_size=5, max_overflow=0, timeout=60.0)
            check_out, check_in = pool.connect, _close
        if work:
            check_in = _working(check_in, work)
        made[name] = Contender(check_out, check_in, threads, scale.seconds(seconds))
    rates = alternate({name: contender.run for name, contender in made.items()}, scale.rounds(7))
    return made, rates


def _close(connection: Any) -> None:
    connection.close()


def _working(check_in: Callable[[Any], None], work: float) -> Callable[[Any], None]:
    """Return a checkin after so many seconds of use, during which other threads run."""

    def operation(connection: Any) -> None:
        time.sleep(work)
        check_in(connection)

    return operation


def answer(scale: Scale) -> Answer:
    names = (QUEUE, RECIPE, PSYCOPG, PID)
    rows = []
    rate: dict[str, list[float]] = {name: [] for name in names}
    for threads, target in TARGETS.items():
        made, rates = _measure(names, threads, scale, seconds=1.0)
        label = f"{threads} threads"
        rows.append(
            at_least(f"{label}: cycles a second", ratios(rates[PID], rates[QUEUE]), target, "QueuePool")
        )
        rows += [_waiting_row(label, made), _starving_row(label, made)]
        for name in names:
            spread = Spread.of(rates[name])
            rate[name].append(spread.median)
            rows.append(
                Row(f"{label}: {name}", f"{spread.text(' cycles/s', digits=0)}; {_waits(made[name])}")
            )
    made, rates = _measure((QUEUE, PSYCOPG, PID), 16, scale, seconds=1.0, work=WORK)
    label = "16 threads, 0.2 ms of work"
    rows.append(Row(f"{label}: cycles a second", ratios(rates[PID], rates[QUEUE]).text(" ×")))
    longest = ratios(made[PID].longest, made[QUEUE].longest)
    rows += [Row(f"{label}: longest wait", longest.text(" ×")), _starving_row(label, made)]
    for name in made:
        spread = Spread.of(rates[name])
        rows.append(Row(f"{label}: {name}", f"{spread.text(' cycles/s', digits=0)}; {_waits(made[name])}"))
    panel = Panel(
        "Many threads, 5 connections", "cycles a second", [f"{threads} threads" for threads in TARGETS], rate
    )
    return Answer(QUESTION, READING, rows, [panel])


def _waiting_row(label: str, made: dict[str, Contender]) -> Row:
    wait = ratios(made[PID].waits, made[QUEUE].waits)
    target = "no worse than QueuePool's"
    return Row(f"{label}: 99th percentile of the wait", wait.text(" ×"), target, wait.median <= NO_WORSE)


def _starving_row(label: str, made: dict[str, Contender]) -> Row:
    measured = f"{made[PID].starved} (QueuePool: {made[QUEUE].starved})"
    return Row(f"{label}: threads that starved", measured, "none", made[PID].starved == 0)


def _waits(contender: Contender) -> str:
    wait, longest = Spread.of(contender.waits).median, Spread.of(contender.longest).median
    least = Spread.of(contender.least).median
    return f"p99 {wait * 1e3:.3f} ms, longest {longest * 1e3:.0f} ms, least thread {least:.0%} of its share"


if __name__ == "__main__":
    main(answer)
