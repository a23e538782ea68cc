"""Question 1: what does one checkout and checkin cost, in one thread, on a driver that does nothing?"""

from __future__ import annotations

from bench import contenders
from bench.contenders import FLOOR, NULL, OSLO, PID, PSYCOPG, PSYCOPG2, QUEUE, QUEUE_AGAIN, RECIPE
from bench.harness import (
    Answer,
    Panel,
    Row,
    Scale,
    Slice,
    Spread,
    alternate,
    at_most,
    cpu_slice,
    main,
    ratios,
)

QUESTION = "Checkout and checkin, fake driver, one thread"

READING = """\
A cycle is `pool.connect().close()` on a connection whose methods do nothing, the rollback at checkin
included. CPU time of the thread, in slices of 200 cycles; all pools are made anew several times, since
where their objects happen to lie in memory is worth 2 % (*QueuePool again* is that: the same pool, as a
contender of its own). *The documented recipe* compares pids in a checkout listener; *oslo.db's guard* is
the same idea in its own words. *The floor* is SQLAlchemy's own checkout and checkin round a bare list: no
lock, no bound, no waiting. PidPool goes below it where it takes a shorter way than SQLAlchemy's to the same
end: with no listener for a reset or a checkin, no recycling and no pre-ping, the code for these is not
called. The two drivers' own pools, raw, do much less per cycle: no
events, no recycling, no objects that return a connection when they are dropped."""


def _slices() -> dict[str, Slice]:
    names = (QUEUE, QUEUE_AGAIN, RECIPE, OSLO, FLOOR, NULL, PID)
    slices = {name: cpu_slice(contenders.cycle(contenders.pool(name)), 200) for name in names}
    psycopg = contenders.psycopg3_pool(1)
    slices[PSYCOPG] = cpu_slice(lambda: psycopg.putconn(psycopg.getconn()), 200)
    psycopg2 = contenders.psycopg2_pool(1)
    slices[PSYCOPG2] = cpu_slice(lambda: psycopg2.putconn(psycopg2.getconn()), 200)
    return slices


def answer(scale: Scale) -> Answer:
    measured: dict[str, list[float]] = {}
    for _ in range(scale.rounds(10) if not scale.quick else 1):
        for name, values in alternate(_slices(), scale.rounds(100)).items():
            measured.setdefault(name, []).extend(values)
    cost = {name: Spread.of(values) for name, values in measured.items()}
    against = {name: ratios(measured[PID], values) for name, values in measured.items()}
    rows = [
        at_most("PidPool against QueuePool", against[QUEUE], 0.95, "QueuePool"),
        at_most("PidPool against the documented recipe", against[RECIPE], 0.8, "the recipe"),
        Row("PidPool against oslo.db's guard", against[OSLO].text(" ×")),
        at_most("PidPool against the floor", against[FLOOR], 1.1, "the floor"),
    ]
    rows += [Row(name, spread.text(" µs", 1e6)) for name, spread in cost.items()]
    panel = Panel(
        "One checkout and checkin, one thread",
        "µs of CPU time",
        list(cost),
        {"": [spread.median * 1e6 for spread in cost.values()]},
    )
    return Answer(QUESTION, READING, rows, [panel])


if __name__ == "__main__":
    main(answer)
