"""Runs the demo's measurements one after the other, each in a process of its own that is bounded in
time and ended with all its children; makes and drops the tables that they need.
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

_BASE_SECONDS = 60.0  # and a second for each iteration: many times what is needed
_GONE_SECONDS = 5.0
_ENDED_SECONDS = 10.0


class ServerLog(Protocol):
    """The part of `EmbeddedPostgres` that tells of harm to clients."""

    def log_mark(self) -> int:
        """Return where the log ends now."""

    def complaints(self, since: int = 0) -> list[str]:
        """Return the lines since then that tell of harm."""


class TableLeft(RuntimeError):
    """A table of the demo could not be dropped; the text names it."""


@dataclass
class Results:
    """Everything that one run has measured."""

    iterations: int
    measured: dict[tuple[str, str], Measured] = field(default_factory=dict)
    """By the names of failure and contender."""
    complaints: dict[tuple[str, str], list[str]] | None = None
    """The same; None where the server's log can't be read."""
    speed: Measured = field(default_factory=dict)

    def verdict(self, failure: Failure, contender: Contender) -> Verdict:
        """Judge one contender in one failure."""
        return failure.verdict(self.measured[failure.name, contender.key])

    def complaints_of(self, contender: Contender) -> list[str] | None:
        """Return what the server had to complain of a contender, but for clients that were killed."""
        if self.complaints is None:
            return None
        return [
            line
            for failure in FAILURES
            if not failure.kills_a_client
            for line in self.complaints[failure.name, contender.key]
        ]

    def complaints_verdict(self, contender: Contender) -> Verdict:
        """Judge what the server had to complain of a contender."""
        lines = self.complaints_of(contender)
        return verdicts.complaints_verdict(None if lines is None else len(lines))

    @property
    def clean(self) -> bool:
        """Whether PidPool got through everything."""
        failed = any(self.verdict(failure, PIDPOOL).failed for failure in FAILURES)
        return not failed and not self.complaints_verdict(PIDPOOL).failed

    def unexpected(self) -> list[tuple[Failure, Contender]]:
        """Return what was known to fail and has not, in this run."""
        return [
            (failure, contender)
            for failure in FAILURES
            for contender in CONTENDERS
            if contender is not PIDPOOL
            and contender.key not in failure.survivors
            and not self.verdict(failure, contender).failed
        ]


STEPS = len(FAILURES) * len(CONTENDERS) + 1
"""How many measurements there are; each is told of once."""


def measure_all(
    url: URL,
    plain_url: URL,
    iterations: int,
    log: ServerLog | None,
    tell: Callable[[str, str, Verdict | None], None],
) -> Results:
    """Run all measurements; blocks for half a minute or more. Ends what it has started, however it ends.

    :param url: the database, over TLS where it has that.
    :param plain_url: the same without TLS, where it can be had.
    :param iterations: how many turns, commits and forks.
    :param log: the server's log, None where it can't be read.
    :param tell: called with a failure's title, the contender's and None before each measurement, and
        with the verdict after it.
    :raises TableLeft: a table could not be dropped.
    """
    results = Results(iterations, complaints=None if log is None else {})
    for failure in FAILURES:
        where = plain_url if failure.plain else url
        for contender in CONTENDERS:
            tell(failure.title, contender.title, None)
            mark = 0 if log is None else log.log_mark()
            key = failure.name, contender.key
            results.measured[key] = _measure(failure.name, contender, where, iterations)
            if log is not None and results.complaints is not None:
                results.complaints[key] = log.complaints(mark)
            tell(failure.title, contender.title, results.verdict(failure, contender))
    tell("SELECT 1 with each pool in turn", "", None)
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
            # So that whatever the server logs of them is logged, and no lock keeps the table.
            _wait_until_gone(engine, token)


@contextlib.contextmanager
def _table(engine: Engine, name: str) -> Iterator[None]:
    rows = failures.rows_table(name)
    rows.create(engine, checkfirst=False)
    try:
        yield
    finally:
        try:
            with engine.begin() as connection:
                connection.execute(text("set local lock_timeout = '5s'"))
                rows.drop(connection, checkfirst=False)
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
    # Files, not pipes: a child that hangs would keep the end of a pipe open.
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", worker.COMMAND, *sys.path],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=errors,
            start_new_session=True,  # a process group of its own, by which it is ended with its children
            text=True,
        )
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                json.dump(request, pipe)
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"broken": f"not over after {seconds:.0f} s", "stderr": _tail(errors)}
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(_ENDED_SECONDS)
        said.seek(0)
        answer = said.read()
        if process.returncode != 0 or not answer:
            return {"broken": f"breaks off with status {process.returncode}", "stderr": _tail(errors)}
        measured: Measured = json.loads(answer)
        return measured


def _tail(errors: IO[str]) -> str:
    errors.seek(0)
    return errors.read()[-2000:]
