"""Event logs for tests: written as structlog's JSONRenderer writes them, by hand, or by a program that runs
with a real pool on a real server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

AT = 1_764_000_000.0
"""2025-11-24 16:00:00 UTC"""

_PREAMBLE = """
import gc, os, sys, threading, time
import structlog
from sqlalchemy import create_engine, exc, text
from sqlalchemy.orm import Session
from pidpool import PidPool

structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.JSONRenderer(),
    ],
    wrapper_class=structlog.make_filtering_bound_logger("debug"),
    logger_factory=structlog.WriteLoggerFactory(open(sys.argv[1], "a")),
)

def engine(**options):
    return create_engine(os.environ["DB_URL"], poolclass=PidPool, **options)

def fork(function):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    return pid
"""


def run(program: str, log: Path, url: str) -> None:
    """Run a program that logs its pool's events, at level DEBUG, to `log`."""
    source = _PREAMBLE + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-c", source, str(log)],
        env={**os.environ, "DB_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def event(name: str, pid: int, at: float, **fields: Any) -> dict[str, Any]:
    """An event `at` seconds after `AT`."""
    return {"pool": "app", "pid": pid, "at": round(AT + at, 6), **fields, "event": name, "level": "info"}


def tag(owner_pid: int, number: int, opened_at: float = 0.0) -> dict[str, Any]:
    """The fields of a connection that was opened `opened_at` seconds after `AT`."""
    return {
        "connection_id": f"{owner_pid}-{number}",
        "owner_pid": owner_pid,
        "fd": 6 + number,
        "socket_inode": 1000 + number,
        "server_pid": 50_000 + owner_pid + number,
        "opened_at": AT + opened_at,
    }


def opened(pid: int, number: int, at: float) -> dict[str, Any]:
    return event("connection.opened", pid, at, **tag(pid, number, at), create_time=0.01)


def checkout(
    pid: int, number: int, at: float, wait: float = 0.001, opened_at: float = 0.0, **own: Any
) -> dict[str, Any]:
    return event("connection.checked_out", pid, at, **tag(pid, number, opened_at), wait_time=wait, **own)


def checkin(
    pid: int, number: int, at: float, use: float, opened_at: float = 0.0, **own: Any
) -> dict[str, Any]:
    return event("connection.checked_in", pid, at, **tag(pid, number, opened_at), use_time=use, **own)


def adopted(pid: int, parent_pid: int, at: float, idle: int = 0, checked_out: int = 1) -> dict[str, Any]:
    return event(
        "pool.adopted",
        pid,
        at,
        parent_pid=parent_pid,
        trigger="hook",
        idle=idle,
        checked_out=checked_out,
        in_transaction=checked_out,
        connects_in_flight=0,
    )


def inherited(
    pid: int,
    owner_pid: int,
    number: int,
    at: float,
    state: str = "in transaction",
    where: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    return event(
        "connection.inherited",
        pid,
        at,
        **tag(owner_pid, number),
        state=state,
        action="severed",
        where=where,
        **more,
    )


def read(log: Path) -> list[dict[str, Any]]:
    """Return the events of a log that has one JSON object on each line."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(each) + "\n" for each in events)


def write(path: Path, events: list[dict[str, Any]]) -> Path:
    path.write_text(text_of(events))
    return path
