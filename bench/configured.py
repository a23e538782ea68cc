"""Question 10: what does a checkout and checkin cost in a pool with pre-ping, a recycle time or listeners?"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy.pool import Pool

from bench import contenders
from bench.contenders import PID, QUEUE
from bench.harness import Answer, Panel, Row, Scale, Spread, alternate, at_most, cpu_slice, main, ratios

QUESTION = "Checkout and checkin in configured pools, fake driver"

READING = """\
The cycle of the first question, with one option or one listener more: what an application adds to its pool
must not take back what PidPool saves. The listeners do nothing. CPU time of the thread, each way of
configuring against QueuePool configured alike."""

Configure = Callable[[str], Pool]

CONFIGURED: dict[str, tuple[Configure, float]] = {
    "pre-ping": (lambda name: contenders.pool(name, pre_ping=True), 0.83),
    "recycle": (lambda name: contenders.pool(name, recycle=3600), 0.70),
    "a checkout listener": (
        lambda name: contenders.with_listeners(contenders.pool(name), "checkout"),
        0.80,
    ),
    "a checkin listener": (lambda name: contenders.with_listeners(contenders.pool(name), "checkin"), 0.85),
    "a reset listener": (lambda name: contenders.with_listeners(contenders.pool(name), "reset"), 1.0),
}
"""What is configured: how, and the most that PidPool may take of QueuePool's time."""


def answer(scale: Scale) -> Answer:
    measured: dict[str, list[float]] = {}
    for _ in range(scale.rounds(6) if not scale.quick else 1):
        slices = {
            f"{name} {what}": cpu_slice(contenders.cycle(configure(name)), 200)
            for what, (configure, _) in CONFIGURED.items()
            for name in (QUEUE, PID)
        }
        for name, values in alternate(slices, scale.rounds(100)).items():
            measured.setdefault(name, []).extend(values)
    rows = []
    for what, (_, most) in CONFIGURED.items():
        against = ratios(measured[f"{PID} {what}"], measured[f"{QUEUE} {what}"])
        rows.append(at_most(f"PidPool with {what}", against, most, "QueuePool"))
    cost = {name: Spread.of(values) for name, values in measured.items()}
    rows += [Row(name, spread.text(" µs", 1e6)) for name, spread in cost.items()]
    panel = Panel(
        "One checkout and checkin, configured pools",
        "µs of CPU time",
        list(CONFIGURED),
        {name: [cost[f"{name} {what}"].median * 1e6 for what in CONFIGURED] for name in (QUEUE, PID)},
    )
    return Answer(QUESTION, READING, rows, [panel])


if __name__ == "__main__":
    main(answer)
