"""Where the time goes in one checkout and checkin: SQLAlchemy's QueuePool, the floor and PidPool.

``python -m bench.profile`` writes ``profile.md``: the parts of a cycle, each timed alone with nothing
watching; the calls that a cycle makes, counted; and cProfile's table, which shares the time out by
function but makes every call dearer than it is.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy.pool import Pool

from bench import contenders
from bench.harness import RESULTS, Scale, Spread, alternate, argument, cpu_slice, machine

NAMES = (contenders.QUEUE, contenders.FLOOR, contenders.PID)
WHOLE = "the whole cycle"
REST = "what holds these together"


def parts_of(pool: Pool) -> dict[str, Callable[[], Any]]:
    """Return the parts of a cycle, each of which can be repeated by itself."""
    held: Any = pool.connect()
    record, connection = held._connection_record, held.dbapi_connection
    fairy_class = type(held)
    get, give_back = pool._do_get, pool._do_return_conn

    def take_and_return() -> None:
        give_back(get())

    def check_out_and_forget() -> None:
        fairy = fairy_class(pool, connection, record, False)
        finalizer = getattr(fairy, "_finalizer", None)
        if finalizer is not None:  # SQLAlchemy 2.0's has none of its own
            finalizer.detach()
        fairy._connection_record = None

    def reset() -> None:
        held._reset(pool, transaction_was_reset=False, terminate_only=False, asyncio_safe=True)

    give_back(record)  # so that the queue holds the pool's only record
    return {
        "the record: taken from the queue and put back": take_and_return,
        "the record: is its connection to be recycled?": record.get_connection,
        "the checkout's object, made and forgotten": check_out_and_forget,
        "the reset, with the driver's rollback()": reset,
    }


def breakdown(scale: Scale) -> dict[str, dict[str, float]]:
    """Return for each pool what each part costs, in µs; the whole is measured beside, the rest is left."""
    slices = {}
    kept = []
    for name in NAMES:
        kept.append(pool := contenders.pool(name, pool_size=5))
        slices[name, WHOLE] = cpu_slice(contenders.cycle(pool), 200)
        kept.append(pool := contenders.pool(name, pool_size=5))
        for part, operation in parts_of(pool).items():
            slices[name, part] = cpu_slice(operation, 200)
    labels = {f"{name}\n{part}": each for (name, part), each in slices.items()}
    measured = alternate(labels, scale.rounds(200))
    table: dict[str, dict[str, float]] = {name: {} for name in NAMES}
    for label, values in measured.items():
        name, part = label.split("\n")
        table[name][part] = Spread.of(values).median * 1e6
    for parts in table.values():
        parts[REST] = parts[WHOLE] - sum(cost for part, cost in parts.items() if part != WHOLE)
        parts[WHOLE] = parts.pop(WHOLE)  # last
    return table


def calls_in(operation: Callable[[], Any]) -> tuple[int, int]:
    """Count the calls of Python functions and of built-in ones that an operation makes."""
    counts = {"call": 0, "c_call": 0}

    def count(frame: object, event: str, argument: object) -> None:
        if event in counts:
            counts[event] += 1

    sys.setprofile(count)
    try:
        operation()
    finally:
        sys.setprofile(None)
    return counts["call"] - 1, counts["c_call"] - 1  # less the operation itself, and setprofile()


def profiled(operation: Callable[[], Any], times: int) -> str:
    """Return cProfile's table, by the functions' own time."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(times):
        operation()
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(25)
    return re.sub(r"\n{2,}", "\n\n", text.getvalue()).strip()


def report(scale: Scale) -> str:
    """Return all three views as Markdown."""
    table = breakdown(scale)
    lines = [
        "# Where the time goes in one checkout and checkin",
        "",
        f"Fake driver, one thread; {machine()}.",
        "",
        "µs of CPU time, each part by itself (median of alternating slices):",
        "",
        "| part | " + " | ".join(NAMES) + " |",
        "|---|" + "---:|" * len(NAMES),
    ]
    lines += [
        f"| {part} | " + " | ".join(f"{table[name][part]:.2f}" for name in NAMES) + " |"
        for part in table[contenders.QUEUE]
    ]
    pools = {name: contenders.pool(name) for name in NAMES}
    cycles = {name: contenders.cycle(pool) for name, pool in pools.items()}
    for cycle in cycles.values():
        cycle()
    calls = {name: calls_in(cycle) for name, cycle in cycles.items()}
    lines.append("| calls of Python functions | " + " | ".join(str(calls[name][0]) for name in NAMES) + " |")
    lines.append("| calls of built-in ones | " + " | ".join(str(calls[name][1]) for name in NAMES) + " |")
    for name, cycle in cycles.items():
        times = 300 if scale.quick else 20_000
        lines += ["", f"## {name}, {times:,} cycles under cProfile", "", "```"]
        lines += [profiled(cycle, times), "```"]
    return "\n".join(lines) + "\n"


def write(scale: Scale, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "profile.md").write_text(report(scale))


if __name__ == "__main__":
    write(Scale(quick="--quick" in sys.argv), Path(argument("--results", RESULTS)))
