"""``pidpool demo`` measures the failures of a fork on a real PostgreSQL. Needs ``pidpool[demo]``.

It compares SQLAlchemy's own pool, the same pool with either of the two remedies that SQLAlchemy's
documentation names, and PidPool.

With ``--json`` standard output is one document:

``clean``
    true if PidPool had no failure (exit status 0).
``iterations``, ``seconds``
    the ``--iterations`` of this run, and its time.
``versions``
    by name: pidpool, SQLAlchemy, PostgreSQL, Python.
``server``
    ``version``, and ``embedded``: whether the demo started it.
``failures``
    a list of ``{"name", "title", "contenders"}``; ``contenders`` maps ``queuepool``, ``events``,
    ``dispose`` and ``pidpool`` to the measurements: always ``failed`` and ``text`` (the table's
    cell), and

    * ``replaced_session``: ``iterations``, ``done``, ``error``
    * ``dropped_session``, ``forked_in_c``: ``commits``, ``commits_reported``, ``rows_present``,
      ``error``; for the latter ``children_failed`` too
    * ``orphaned_lock``: ``seconds`` from the kill until the lock was free, ``until_child_ended``
    * ``forked_with_threads``: ``forks``, ``children_hung``, ``children_failed``,
      ``hung_after_seconds``, ``parent_errors``, ``error``

    and ``tls``: whether the connections had it. A measurement that broke off has ``broken`` (the
    reason) and ``stderr`` (its end) instead.
``complaints``
    by contender the lines of the server's log that show harm, without those about the killed parent;
    null with ``--database``.
``speed``
    ``tls``, and ``microseconds``: the median time of a ``SELECT 1`` by contender and for ``nullpool``.
``unexpected``
    a list of ``{"name", "contender"}``: failures that are known and did not occur in this run.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from pidpool.cli import MISSING, needing

if TYPE_CHECKING:
    from rich.console import Console
    from sqlalchemy import URL

    from pidpool.tools.demo.measuring import Results, ServerLog
    from pidpool.tools.demo.verdicts import Verdict

_NOT_RUN = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command("demo", epilog="\b\nExample:\n  pidpool demo --iterations 3")
@click.option(
    "--iterations",
    type=click.IntRange(1, 10000),
    default=20,
    show_default=True,
    help="How many turns, commits or forks each measurement makes.",
)
@click.option(
    "--database",
    metavar="URL",
    help="SQLAlchemy URL of a PostgreSQL to use. Default: start one for this run. The demo creates tables "
    "whose names begin with pidpool_demo, and drops them. It can't read that server's log, so the table "
    "shows complaints as unknown.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON to standard output instead of a table.")
def command(iterations: int, database: str | None, as_json: bool) -> None:
    """Fork over a real PostgreSQL with TLS: SQLAlchemy's pool, then pidpool.

    Measures each failure with four pools: QueuePool, QueuePool with either of the two remedies that
    SQLAlchemy's documentation names for processes that fork, and PidPool. Takes about half a minute.
    Every number in the table is measured in this run. The demo starts a PostgreSQL on 127.0.0.1 and
    removes it at the end.

    Exit status: 0 if PidPool had no failure, 1 if it had one, 2 if the demo could not run, 130 after
    Ctrl-C. The other pools' failures do not count.
    """
    with _ended_by_signals():
        with needing("demo"):
            from rich.console import Console

            from pidpool.tools.demo import report
        started = time.monotonic()
        results, server = _measure(iterations, database)
        seconds = time.monotonic() - started
        if as_json:
            click.echo(json.dumps(report.as_json(results, server, seconds), indent=2))
        else:
            report.show(results, server, seconds, Console(highlight=False))
    sys.exit(0 if results.clean else 1)


def _measure(iterations: int, database: str | None) -> tuple[Results, dict[str, Any]]:
    from sqlalchemy.exc import DBAPIError

    from pidpool.tools.demo.measuring import STEPS, TableLeft, measure_all
    from pidpool.tools.demo.postgres import EmbeddedPostgresError

    try:
        with _Progress(STEPS) as progress, contextlib.ExitStack() as stack:
            if database is None:
                url, plain_url, log = stack.enter_context(_embedded(progress))
            else:
                url, plain_url = _given(database)
                log = None
            server = {"version": _server_version(url), "embedded": log is not None}
            return measure_all(url, plain_url, iterations, log, progress.step), server
    except (EmbeddedPostgresError, TableLeft) as error:
        _give_up(str(error))
    except DBAPIError as error:
        _give_up(f"the database reports: {str(error.orig).strip()}")


def _give_up(reason: str) -> NoReturn:
    sys.stderr.write(f"pidpool demo: {reason}\n")
    sys.exit(_NOT_RUN)


# -- the database


@contextlib.contextmanager
def _embedded(progress: _Progress) -> Iterator[tuple[URL, URL, ServerLog]]:
    from sqlalchemy import make_url

    from pidpool.tools.demo.postgres import EmbeddedPostgres

    if not sys.platform.startswith("linux"):
        _give_up(
            f"the demo's own PostgreSQL needs Linux, and this is {sys.platform}; name a server of yours: "
            "pidpool demo --database postgresql://user@host/name"
        )
    progress.status("Starting a PostgreSQL with TLS")
    server = EmbeddedPostgres()
    try:
        server.start()
    except ImportError as error:
        sys.stderr.write(f"pidpool: {error}; or name a server of yours with --database URL\n")
        sys.exit(MISSING)
    with server:
        progress.status(
            f"Started PostgreSQL {server.version} with TLS: pid {server.pid}, 127.0.0.1 port {server.port}"
        )
        yield make_url(server.url(tls=True)), make_url(server.url(tls=False)), server


def _given(database: str) -> tuple[URL, URL]:
    """Return the URL to use, and the same without TLS if the server takes such a client."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

    try:
        url = make_url(database)
    except (ArgumentError, ValueError):
        # Not the text itself: it may hold a password.
        raise click.UsageError("--database takes a SQLAlchemy URL: postgresql://user@host/name") from None
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg2")
    if url.drivername not in ("postgresql+psycopg2", "postgresql+psycopg"):
        raise click.UsageError(
            f"--database takes a URL with postgresql+psycopg2 or postgresql+psycopg, not {url.drivername}"
        )
    if "@" in (url.host or ""):
        raise click.UsageError("--database has more than one @; write an @ in the password as %40")
    if "connect_timeout" not in url.query:
        url = url.update_query_dict({"connect_timeout": "10"})
    plain_url = url.update_query_dict({"sslmode": "disable"})
    try:
        _server_version(url)
    except DBAPIError as error:
        reason = " ".join(str(error.orig).split())
        _give_up(
            f"can't connect to the --database: {reason}; check its host, port, name, user and password, or "
            "leave it out: the demo then starts a PostgreSQL of its own"
        )
    try:
        _server_version(plain_url)
    except OperationalError:
        return url, url
    return url, plain_url


def _server_version(url: URL) -> str:
    from sqlalchemy import create_engine, text
    from sqlalchemy.pool import NullPool

    with needing("psycopg"):
        engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        # Debian's reads "15.18 (Debian 15.18-0+deb12u1)".
        return str(connection.execute(text("show server_version")).scalar_one()).split()[0]


# -- progress, on standard error


class _Progress:
    """Prints one line for each result, and in a terminal a bar below them."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console: Console = Console(stderr=True, highlight=False)
        self._done = 0
        self._title = ""
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not self._console.is_dumb_terminal:
            self._bar = Progress(
                BarColumn(20),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=self._console,
                refresh_per_second=5,
                transient=True,
            )
            self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._bar.stop()

    def status(self, text: str) -> None:
        """Show the present activity."""
        if self._bar is None:
            self._print(text)
        else:
            self._bar.update(self._task, description=text, completed=self._done)

    def step(self, title: str, contender: str, verdict: Verdict | None) -> None:
        """Show a measurement: before it without a verdict, after it with one."""
        if title != self._title:
            self._title = title
            self._print(title)
        if verdict is not None:
            self._done += 1
            self._print(f"  {contender:<20} {'FAIL' if verdict.failed else 'ok':<4} {verdict.text}")
        elif self._bar is not None:
            self._bar.update(self._task, description=contender, completed=self._done)

    def _print(self, line: str) -> None:
        if self._bar is None:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        else:
            self._console.print(line, markup=False, soft_wrap=True)


# -- Ctrl-C, a closed terminal, kill


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Leave by SystemExit with 128 + the signal, so that every context manager on the way cleans up."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # the clean-up is short, and must not be interrupted
        raise SystemExit(128 + number)

    before: dict[signal.Signals, Any] = {}
    for each in _SIGNALS:
        handler = signal.getsignal(each)
        if handler is not signal.SIG_IGN:  # nohup's
            before[each] = handler
            signal.signal(each, leave)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
