"""The three configurations that docs/watching.md shows: the same events, wherever the application logs, and
nothing on stdout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import event_logs
import pytest

from pidpool.tools.demo.postgres import EmbeddedPostgres

PROGRAMS = Path(__file__).parent.parent / "programs"

IN_PARENT = [
    ("info", "connection.opened"),
    ("debug", "connection.checked_out"),
    ("debug", "connection.checked_in"),
    ("info", "pool.forked"),
    ("info", "connection.closed"),
    ("info", "pool.disposed"),
]
IN_CHILD = [
    ("info", "pool.adopted"),
    ("warning", "connection.inherited"),
    ("info", "connection.opened"),
    ("debug", "connection.checked_out"),
    ("debug", "connection.checked_in"),
    ("info", "connection.closed"),
    ("info", "pool.disposed"),
]


def _read_text(log: Path) -> list[dict[str, Any]]:
    events = []
    for line in log.read_text().splitlines():
        level, name, message = line.split(" ", 2)
        assert name == "pidpool"
        event = {key: value.strip("'") for key, value in re.findall(r"(\w+)=('[^']*'|\S+)", message)}
        events.append({"level": level.lower(), **event, "pid": int(event["pid"])})
    return events


@pytest.mark.usefixtures("clean_log")
@pytest.mark.parametrize(
    ("program", "read"),
    [
        ("events_as_json", event_logs.read),
        ("events_through_logging", event_logs.read),
        ("events_with_basic_config", _read_text),
    ],
)
def test_the_events_are_in_the_applications_own_log(
    postgres: EmbeddedPostgres, tmp_path: Path, program: str, read: Any
) -> None:
    log = tmp_path / "application.log"
    ran = _run("use_and_fork.py", postgres.url(tls=True), str(log), program)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    events = read(log)
    pids = list(dict.fromkeys(event["pid"] for event in events))
    for pid, expected, request_id in zip(pids, (IN_PARENT, IN_CHILD), ("r-1", "r-2"), strict=True):
        own = [event for event in events if event["pid"] == pid]
        assert [(event["level"], event["event"]) for event in own] == expected
        assert {event["request_id"] for event in own} == {request_id}
        assert {event["pool"] for event in own} == {"main"}
    (leak,) = [event for event in events if event["event"] == "connection.inherited"]
    assert int(leak["owner_pid"]) == pids[0]
    assert leak["state"] == "in transaction" and leak["action"] == "severed"
    assert "use_and_fork.py:" in leak["where"]


def test_with_no_configuration_at_all_warnings_are_on_stderr(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    (tmp_path / "plain.py").write_text(
        "import sys\n"
        "from sqlalchemy import create_engine\n"
        "from pidpool import PidPool\n"
        "engine = create_engine(sys.argv[1], poolclass=PidPool, hold_warning=30)\n"
    )
    ran = _run("use_and_fork.py", postgres.url(tls=True), "-", "plain", path=tmp_path)
    assert (ran.returncode, ran.stdout) == (0, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"event='connection.inherited' pool='127.0.0.1:{postgres.port}/postgres' pid=")


def _run(program: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        # Python 3.12 and later warn of a fork beside threads: hold_warning has one.
        [sys.executable, "-W", "ignore::DeprecationWarning", str(PROGRAMS / program), *arguments],
        env={**os.environ, "PYTHONPATH": str(path or PROGRAMS)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
