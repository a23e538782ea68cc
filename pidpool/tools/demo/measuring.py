"""Runs the demo's measurements one after the other, and makes and drops their tables.

Each measurement runs in a process of its own, which is bounded in time and killed with its children.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from sqlalchemy import URL, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from pidpool.tools.demo import failures, verdicts, worker
from pidpool.tools.demo.contenders import CONTENDERS, PIDPOOL, Contender
from pidpool.tools.demo.failures import Measured
from pidpool.tools.demo.verdicts import FAILURES, Failure, Verdict

TABLE_PREFIX = "pidpool_demo_"

_BASE_SECONDS = 60.0  # and a second for each iteration, many times the usual time
_GONE_SECONDS = 5.0
_ENDED_SECONDS = 10.0


class ServerLog(Protocol):
    """The part of `EmbeddedPostgres` that reports harm to clients."""

    def log_mark(self) -> int:
        """Return the present length of the log."""

    def complaints(self, since: int = 0) -> list[str]:
        """Return the lines since then that show harm."""


class TableLeft(RuntimeError):
    """A table of the demo could not be dropped; the text names it."""


@dataclass
class Results:
    """The results of one run."""

    iterations: int
    measured: dict[tuple[str, str], Measured] = field(default_factory=dict)
    """By the names of failure and contender."""
    complaints: dict[tuple[str, str], list[str]] | None = None
    """The same; None if the server's log can't be read."""
    speed: Measured = field(default_factory=dict)

    def verdict(self, failure: Failure, contender: Contender) -> Verdict:
        """Judge one contender in one failure."""
        return failure.verdict(self.measured[failure.name, contender.key])

    def complaints_of(self, contender: Contender) -> list[str] | None:
        """Return the server's complaints about a contender, without those about killed clients."""
        if self.complaints is None:
            return None
        return [
            line
            for failure in FAILURES
            if not failure.kills_a_client
            for line in self.complaints[failure.name, contender.key]
        ]

    def complaints_verdict(self, contender: Contender) -> Verdict:
        """Judge the server's complaints about a contender."""
        lines = self.complaints_of(contender)
        return verdicts.complaints_verdict(None if lines is None else len(lines))

    @property
    def clean(self) -> bool:
        """Whether PidPool had no failure."""
        failed = any(self.verdict(failure, PIDPOOL).failed for failure in FAILURES)
        return not failed and not self.complaints_verdict(PIDPOOL).failed

    def unexpected(self) -> list[tuple[Failure, Contender]]:
        """Return the known failures that did not occur in this run."""
        return [
            (failure, contender)
            for failure in FAILURES
            for contender in CONTENDERS
            if contender is not PIDPOOL
            and contender.key not in failure.survivors
            and not self.verdict(failure, contender).failed
        ]


STEPS = len(FAILURES) * len(CONTENDERS) + 1
"""How many measurements a run has."""


def measure_all(
    url: URL,
    plain_url: URL,
    iterations: int,
    log: ServerLog | None,
    on_step: Callable[[str, str, Verdict | None], None],
) -> Results:
    """Run all measurements, in half a minute or more. Leaves no process and no table, also on an error.

    :param url: the database, over TLS if the server has it.
    :param plain_url: the same without TLS, if the server allows that.
    :param iterations: how many turns, commits and forks.
    :param log: the server's log; None if it can't be read.
    :param on_step: called with a failure's title, the contender's and None before each measurement, and
        with the verdict after it.
    :raises TableLeft: a table could not be dropped.
    """
    results = Results(iterations, complaints=None if log is None else {})
    for failure in FAILURES:
        database = plain_url if failure.plain else url
        for contender in CONTENDERS:
            on_step(failure.title, contender.title, None)
            mark = 0 if log is None else log.log_mark()
            key = failure.name, contender.key
            results.measured[key] = _measure(failure.name, contender, database, iterations)
            if log is not None and results.complaints is not None:
                results.complaints[key] = log.complaints(mark)
            on_step(failure.title, contender.title, results.verdict(failure, contender))
    on_step("SELECT 1 with each pool in turn", "", None)
    results.speed = _measure("speed", PIDPOOL, url, iterations)
    return results


def _measure(name: str, contender: Contender, url: URL, iterations: int) -> Measured:
    token = f"{TABLE_PREFIX}{secrets.token_hex(4)}"
    url = url.update_query_dict({"application_name": token})
    engine = create_engine(url.update_query_dict({"application_name": "pidpool demo"}), poolclass=NullPool)
    with _table(engine, token):
        try:
            return _run_worker(
                {
                    "failure": name,
                    "contender": contender.key,
                    "url": url.render_as_string(hide_password=False),
                    "table": token,
                    "iterations": iterations,
                    "seconds": _BASE_SECONDS + iterations,
                }
            )
        finally:
            # Afterwards the server has logged their ends, and no lock keeps the table.
            _wait_until_gone(engine, token)


@contextlib.contextmanager
def _table(engine: Engine, name: str) -> Iterator[None]:
    rows = failures.rows_table(name)
    try:
        rows.create(engine, checkfirst=False)
        yield
    finally:
        try:
            with engine.begin() as connection:
                connection.execute(text("set local lock_timeout = '5s'"))
                rows.drop(connection, checkfirst=True)  # Ctrl-C may have come while it was created
        except DBAPIError as error:
            raise TableLeft(f"the table {name} could not be dropped: {error.orig}") from error


def _wait_until_gone(engine: Engine, application_name: str) -> None:
    sessions = text("select count(*) from pg_stat_activity where application_name = :name")
    deadline = time.monotonic() + _GONE_SECONDS
    with engine.connect() as connection:
        while connection.execute(sessions, {"name": application_name}).scalar_one():
            if time.monotonic() > deadline:
                return
            connection.rollback()
            time.sleep(0.02)


def _run_worker(request: dict[str, Any]) -> Measured:
    seconds = request["seconds"]
    # Files, not pipes: a hung child would keep the end of a pipe open.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", worker.COMMAND, *sys.path],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            start_new_session=True,  # a process group, by which it is killed with its children
            text=True,
        )
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                json.dump(request, pipe)
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"broken": f"no result after {seconds:.0f} s", "stderr": _tail(errors)}
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(_ENDED_SECONDS)
        output.seek(0)
        answer = output.read()
        if process.returncode != 0 or not answer:
            return {"broken": f"ends with status {process.returncode}", "stderr": _tail(errors)}
        measured: Measured = json.loads(answer)
        return measured


def _tail(errors: IO[str]) -> str:
    errors.seek(0)
    return errors.read()[-2000:]
