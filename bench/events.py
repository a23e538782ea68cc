"""Question 6: what do a pool's events cost, when everything is logged and when nothing is?"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any, TextIO

import structlog

from bench import contenders, fake_driver
from bench.contenders import PID
from bench.harness import Answer, Panel, Row, Scale, Slice, Spread, alternate, cpu_slice, differences, main
from pidpool import PidPool

QUESTION = "Events at DEBUG, as JSON lines in a file"

READING = """\
With everything logged, each checkout and each checkin is one line. *An event* is half of the time that a
cycle takes more than with events off. *Structlog's own* is the same line, its fields ready, written by a
logger of the same kind. *Off* is the default: no logging is configured. Each checkout then only asks whether
debug events are enabled. That counts as not measurable below 0.15 µs, by which the cycles of two pools of
one kind differ (see *QueuePool again* of the first question)."""

UNMEASURABLE = 0.15e-6


def _logger(file: TextIO, level: int) -> Any:
    return structlog.wrap_logger(
        structlog.WriteLogger(file),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ],
        cache_logger_on_first_use=True,
    )


def _line(logger: Any) -> Callable[[], Any]:
    """Return structlog's own: a line as long as pidpool's."""
    fields = {
        "pool": "pool-1",
        "pid": os.getpid(),
        "at": round(time.time(), 6),
        "connection_id": f"{os.getpid()}-1",
        "owner_pid": os.getpid(),
        "fd": 12,
        "socket_inode": 1234567,
        "server_pid": 54321,
        "opened_at": time.time(),
        "wait_time": 0.000012,
    }

    def operation() -> None:
        logger.debug("connection.checked_out", **fields)

    return operation


def answer(scale: Scale) -> Answer:
    with tempfile.TemporaryFile("w") as file:
        pools = {
            "off": PidPool(fake_driver.SocketConnection),
            "a logger at INFO": PidPool(fake_driver.SocketConnection, logger=_logger(file, 20)),
            "on": PidPool(fake_driver.SocketConnection, logger=_logger(file, 10)),
        }
        slices: dict[str, Slice] = {
            name: cpu_slice(contenders.cycle(pool), 50) for name, pool in pools.items()
        }
        slices["line"] = cpu_slice(_line(_logger(file, 10)), 50)
        slices["question"] = cpu_slice(pools["off"].pool_events.is_enabled, 50)
        slices["nothing"] = cpu_slice(lambda: None, 50)
        measured = alternate(slices, scale.rounds(400))
    event = Spread.of([(on - off) / 2 for on, off in zip(measured["on"], measured["off"], strict=True)])
    line = Spread.of(measured["line"])
    off = Spread.of(measured["off"])
    question = differences(measured["question"], measured["nothing"])
    rows = [
        Row("an event", event.text(" µs", 1e6)),
        Row("structlog's own, for the same line", line.text(" µs", 1e6)),
        Row("what pidpool adds to that", f"{(event.median - line.median) * 1e6:.2f} µs"),
        Row("a cycle with events off", off.text(" µs", 1e6)),
        Row("a cycle with a logger at INFO", Spread.of(measured["a logger at INFO"]).text(" µs", 1e6)),
        Row(
            "events off: what they cost a cycle",
            question.text(" µs", 1e6),
            "nothing measurable",
            question.median <= UNMEASURABLE,
        ),
    ]
    panel = Panel(
        "One event, as a JSON line in a file",
        "µs of CPU time",
        [PID, "structlog alone"],
        {"": [event.median * 1e6, line.median * 1e6]},
    )
    return Answer(QUESTION, READING, rows, [panel])


if __name__ == "__main__":
    main(answer)
