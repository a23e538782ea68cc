"""Question 7: how much memory does a pooled connection take, apart from the driver's own?"""

from __future__ import annotations

import gc
import tracemalloc

from bench import contenders, fake_driver
from bench.contenders import PID, QUEUE
from bench.harness import Answer, Panel, Row, Scale, main
from pidpool import PidPool

QUESTION = "Memory"

READING = """\
What Python allocates (tracemalloc) for 1,000 connections of one pool, per connection; the driver's
connections are made before and don't count. *Idle* is the pool's entry and, with PidPool, the tag and the
register by which a child finds what it inherited. *Checked out* is what comes on top of that while a
connection is in use."""


def per_connection(name: str, number: int) -> tuple[float, float]:
    """Return the bytes of an idle connection, and those that a checkout adds."""
    connections = [fake_driver.Connection() for _ in range(number)]
    pool = contenders.pool(name, iter(connections).__next__, pool_size=number)
    held = [pool.connect()]  # what comes once for the pool
    tracemalloc.start()
    try:
        gc.collect()
        empty = _now()
        held += [pool.connect() for _ in range(number - 1)]
        gc.collect()
        checked_out = _now()
        while held:
            held.pop().close()
        gc.collect()
        idle = _now()
    finally:
        tracemalloc.stop()
    return (idle - empty) / number, (checked_out - idle) / number


def _now() -> int:
    return tracemalloc.get_traced_memory()[0]


def answer(scale: Scale) -> Answer:
    number = 100 if scale.quick else 1000
    measured = {name: per_connection(name, number) for name in (QUEUE, PID)}
    rows = [
        Row(f"{name}, per connection", f"{idle:,.0f} bytes idle, {checked_out:,.0f} more checked out")
        for name, (idle, checked_out) in measured.items()
    ]
    family = PidPool(fake_driver.Connection)._telemetry.family
    row = family.block_cells * 8
    rows.append(Row("the family's memory, per process", f"{row:,} bytes for a pool of 5 + 10"))
    bars = {
        label: value
        for name, (idle, checked_out) in measured.items()
        for label, value in ((name, idle), (f"{name}, more while checked out", checked_out))
    }
    panel = Panel("Memory per pooled connection", "bytes", list(bars), {"": list(bars.values())})
    return Answer(QUESTION, READING, rows, [panel])


if __name__ == "__main__":
    main(answer)
