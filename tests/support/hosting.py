"""Runs a host (a program that forks, or a server with workers) over a PostgreSQL, has it work, and compares
what it reported with the rows that are there and with the server's log.

The application is tests/programs/hosts/shop.py. The server's log has a run's name in each line, so that
runs can go on side by side.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from sessions import kill_session
from sqlalchemy import Engine, create_engine, text
from waiting import until

from pidpool.tools.demo.postgres import EmbeddedPostgres

PROGRAMS = Path(__file__).parent.parent / "programs" / "hosts"
BIN = Path(sys.executable).parent
START = 60.0
LOG_PREFIX = "%m [%p] %a "
HEADING = (
    f"{'':55}{'asked':>6}{'done':>6}{'processes':>10}{'rows':>6}{'found':>6}{'log lines':>10}{'seconds':>8}"
)
"""Of the table of outcomes."""


@dataclass(frozen=True)
class Outcome:
    """What a run did: a row of the table."""

    asked: int
    done: int
    """Pieces of work that a process reported as committed; a request or a task is one of them."""
    processes: int
    expected: int
    """Rows that were reported as committed, and those of the parents."""
    found: int
    complaints: list[str]
    seconds: float
    problems: list[str]
    """All that is not as it should be, in words."""

    def row(self, host: str, pool: str) -> str:
        return (
            f"{host:47}{pool:8}{self.asked:6}{self.done:6}{self.processes:10}{self.expected:6}{self.found:6}"
            f"{len(self.complaints):10}{self.seconds:8.1f}"
        )


@dataclass(frozen=True)
class Host:
    """A host. `serve` starts it, has it work and ends it."""

    name: str
    serve: Callable[[Run], None]
    workers: int = 2
    """Processes that have to have done a piece of work."""
    inherits: bool = True
    """Whether its workers inherit connections: with `QueuePool` rows are lost then, or the log complains."""
    tasks: int = 12
    system: bool = False
    """Whether it needs a package of the system's: Redis."""
    ends_by: signal.Signals | None = None
    """A signal to all processes, workers included, that ends them; None for SIGTERM to the first one."""
    starts_anew: bool = False
    """Whether it starts workers in the place of others: it should have done so before it is ended."""
    workers_end_by: signal.Signals | None = None
    """A signal that the first process sends each worker, to have it end. It is sent again after a while: a
    worker of uWSGI that is just being started loses it, and goes on waiting for requests for ever."""
    says_goodbye: bool = True
    """Whether its workers run Python's exit handlers. If not, they break off their connections, and the log
    is read before."""


def members(group: int) -> list[int]:
    """Return the pids of the processes of a process group that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # pid (name) state ppid pgrp ...
                state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(its_group) == group and state != "Z":
                    found.append(int(entry.name))
    return found


def age_of_youngest(group: int) -> float:
    """Return for how many seconds the newest process of a group has been there; 0 if one is just ending."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return time.time() - max(psutil.Process(each).create_time() for each in members(group))
    return 0


class Run:
    """One run of a host with one pool."""

    def __init__(
        self, host: Host, pool: str, name: str, postgres: EmbeddedPostgres, directory: Path, tasks: int
    ) -> None:
        self.host = host
        self.pool = pool
        self.name = name
        self.tasks = tasks
        # With QueuePool workers wait for answers that another one has read: not for long here.
        self.patience = START + 2.0 * tasks if pool == "pidpool" else 10.0
        self.directory = directory
        self.log = directory / "log"
        self.report = directory / "report"
        self.socket = directory / "s"
        self.postgres = postgres
        self.started = time.monotonic()
        self.mark = postgres.log_mark()
        self.asked = 0
        self.failed = False
        self.held_at_first: Any = None
        self.complaints: list[str] | None = None
        self.observer: Engine = create_engine(postgres.url(tls=False))
        with self.observer.begin() as connection:
            connection.execute(text(f"create table {name} (what text, number int, pid int)"))
        self.environment = {
            **os.environ,
            "DB_URL": postgres.url(tls=True, application_name=name),
            "POOL": pool,
            "TABLE": name,
            "REPORT": str(self.report),
            "PYTHONPATH": str(PROGRAMS),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    @contextlib.contextmanager
    def process(self, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a program until the body is over; what it wrote is in `log`."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                arguments,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**self.environment, **environment},
            )
        try:
            yield process
            self.held_sessions_heard_nothing()
            if not self.host.says_goodbye:
                self.complaints = self.read_complaints()
            if self.host.starts_anew:
                until(lambda: age_of_youngest(process.pid) > 3, "it goes on starting workers", 60)
            if self.host.ends_by is None:
                process.terminate()
            else:  # a uWSGI without a master hands nothing on
                os.killpg(process.pid, self.host.ends_by)
            try:
                if self.host.workers_end_by is not None:
                    self.end_workers(process, self.host.workers_end_by)
                process.wait(self.patience)
                until(lambda: not members(process.pid), f"{self.name} leaves processes behind", self.patience)
            except (subprocess.TimeoutExpired, AssertionError) as error:
                self.note(str(error))
        finally:
            kill_session(process)

    def end_workers(self, process: subprocess.Popen[bytes], how: signal.Signals) -> None:
        """Wait until a process that was ended has ended its workers; send each the signal now and then."""
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
                return
            for each in members(process.pid):
                if each != process.pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(each, how)

    def note(self, problem: str) -> None:
        with self.report.open("a") as file:
            file.write(json.dumps({"what": "failed", "number": 0, "pid": 0, "error": problem}) + "\n")

    def lines(self, what: str) -> list[dict[str, Any]]:
        """Return what was reported so far."""
        if not self.report.exists():
            return []
        lines = [json.loads(line) for line in self.report.read_text().splitlines()]
        return [line for line in lines if line["what"] == what]

    def wait_for_the_work(self, process: subprocess.Popen[bytes]) -> None:
        """Return when all that was asked for has been done, or has failed; with `QueuePool` it may not be."""

        def done() -> bool:
            assert process.poll() is None, self.log.read_text()
            if self.held_at_first is None and self.lines("parent"):
                self.held_at_first = self.held_sessions()
            return len(self.lines("row")) + len(self.lines("failed")) >= self.asked

        try:
            until(done, "the work is not done", self.patience, interval=0.05)
        except AssertionError as error:
            self.note(str(error))

    def workers_so_far(self) -> int:
        return len({line["pid"] for line in self.lines("row")})

    def held_sessions(self) -> Any:
        """Return the server's view of the sessions that the parents hold."""
        numbers = [line["server_pid"] for line in self.lines("parent")]
        with self.observer.connect() as connection:
            return connection.execute(
                text(
                    "select pid, state, backend_start, xact_start, query_start, query, backend_xid "
                    "from pg_stat_activity where pid = any(:numbers) order by pid"
                ),
                {"numbers": numbers},
            ).all()

    def held_sessions_heard_nothing(self) -> None:
        """Check that the sessions which parents hold are as `held_sessions` found them before the work."""
        if self.host.inherits and self.held_at_first and self.held_sessions() != self.held_at_first:
            self.note("the session that the parent holds has heard something")

    def outcome(self) -> Outcome:
        try:
            return self._outcome()
        finally:
            with self.observer.begin() as connection:
                connection.execute(text(f"drop table {self.name}"))
            self.observer.dispose()

    def _outcome(self) -> Outcome:
        with self.observer.connect() as connection:
            sessions = text("select count(*) from pg_stat_activity where application_name = :name")

            def have_ended() -> bool:
                count = connection.scalar(sessions, {"name": self.name})
                connection.rollback()
                return count == 0

            # A session's last lines in the log are written before it ends.
            until(have_ended, f"{self.name} has left sessions behind", START)
            found = connection.execute(text(f"select what, number, pid from {self.name}")).all()
        expected = {(line["what"], line["number"], line["pid"]) for line in self.lines("row")}
        expected |= {("held", line["number"], line["pid"]) for line in self.lines("held")}
        for line in self.lines("parent"):
            expected |= {("parent", line["pid"], line["pid"]), ("pool", line["pid"], line["pid"])}
        complaints = self.read_complaints() if self.complaints is None else self.complaints
        done = len({line["number"] for line in self.lines("row")})
        problems = [line["error"] for line in self.lines("failed")]
        problems += [f"{row} is lost" for row in sorted(expected - {tuple(row) for row in found})]
        problems += [f"{row} is there too" for row in sorted({tuple(row) for row in found} - expected)]
        problems += complaints
        if done != self.asked:
            problems.append(f"{done} of {self.asked} were done")
        if self.workers_so_far() < self.host.workers:
            problems.append(f"{self.workers_so_far()} of {self.host.workers} processes have worked")
        problems += self._shared_sessions()
        for line in self.lines("held"):
            if line["error"] != "ForeignConnectionError":
                problems.append(f"a worker could use its parent's transaction: {line['error'] or 'no error'}")
        if self.host.inherits and not self.lines("held"):
            problems.append("no worker has inherited a connection")
        return Outcome(
            asked=self.asked,
            done=done,
            processes=self.workers_so_far(),
            expected=len(expected),
            found=len(expected & {tuple(row) for row in found}),
            complaints=complaints,
            seconds=time.monotonic() - self.started,
            problems=problems,
        )

    def read_complaints(self) -> list[str]:
        """Return the complaints in the server's log about this run, and those about no run that is known."""
        complaints = self.postgres.complaints(self.mark)
        return [line for line in complaints if f"] {self.name} " in line or "] run" not in line]

    def _shared_sessions(self) -> list[str]:
        users: dict[int, set[int]] = {}
        for what in ("parent", "row", "held"):
            for line in self.lines(what):
                users.setdefault(line["server_pid"], set()).add(line["pid"])
        return [
            f"processes {pids} shared session {number}" for number, pids in users.items() if len(pids) > 1
        ]
