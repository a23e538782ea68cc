"""``pidpool logs``: reads event logs and shows the process tree, the leaks, and the longest waits and holds.

The reading and the summary are in pidpool/tools/logs; here are the options, the progress bar and the exit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pidpool.tools.logs import document, page, reading, terminal
from pidpool.tools.logs.reading import Source, Unreadable
from pidpool.tools.logs.summary import Summary

USAGE = 2
"""The exit status if a log can't be read or the page can't be written."""

LEAKED = 1
"""The exit status of ``--check`` if a connection with an open transaction crossed a fork."""


@click.command("logs", epilog="\b\nExample:\n  pidpool logs --html timeline.html app.log app.log.1")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-f", "--follow", is_flag=True, help="Go on reading new events; Ctrl-C for the summary.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
@click.option("--html", "html", type=click.Path(), metavar="FILE", help="Also write a page with a timeline.")
@click.option("--check", is_flag=True, help="Exit with 1 if an open transaction crossed a fork.")
@click.option(
    "--top",
    type=click.IntRange(1, 1000),
    default=10,
    show_default=True,
    help="How many of the longest waits and holds are listed.",
)
def command(
    files: tuple[str, ...], follow: bool, as_json: bool, html: str | None, check: bool, top: int
) -> None:
    """Read event logs: the process tree, the leaks, the longest waits and holds.

    FILE is a log of JSON lines as structlog's JSONRenderer writes them, plain or gzipped; - is the standard
    input. Several logs are read as one, in the order of their events: those of many processes, or one with
    its rotated predecessors (app.log app.log.1 app.log.2.gz). Their pids have to be those of one machine or
    container. Other lines are counted and skipped.

    Checkouts are logged at level DEBUG. Without them the tree and the leaks are shown, but no holds.

    Exit status: 0; 1 with --check if a connection crossed a fork with an open transaction, or perhaps one; 2
    if a log can't be read.
    """
    try:
        sources = reading.open_all(files, follow)
        page_path = None if html is None else _page_path(html, sources)
    except Unreadable as error:
        _fail(str(error))
    summary = Summary(longest=top if page_path is None else max(top, page.MOST_BARS))
    broken = None
    try:
        if follow:
            _follow(sources, summary, quiet=as_json)
        else:
            with _progress(sources) as advance:
                for events in reading.merged(sources):
                    summary.feed(events)
                    advance()
    except Unreadable as error:
        if not follow:
            _fail(str(error))
        broken = str(error)  # after the summary of the events read up to here
    except BrokenPipeError:
        _close_stdout()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    summary.finish()
    if page_path is not None:
        _write_page(page_path, page.render(summary, sources))
    if as_json:
        _print(json.dumps(document.document(summary, sources, top), indent=2, allow_nan=False) + "\n")
    else:
        _print(terminal.render(summary, sources, _width(), _wants_colour(), top))
    if broken is not None:
        _fail(broken)
    sys.exit(LEAKED if check and summary.open_leaks else 0)


def _follow(sources: Sequence[Source], summary: Summary, quiet: bool) -> None:
    stopping: list[int] = []

    def stop(number: int, frame: object) -> None:
        stopping.append(number)
        signal.signal(number, before)  # a second Ctrl-C ends the program at once

    def stopped() -> bool:
        return bool(stopping)

    before = signal.signal(signal.SIGINT, stop)
    try:
        for events in reading.merged(sources):
            summary.feed(events)
            if stopping:
                return
        sys.stderr.write(f"following after {summary.events:,} events; Ctrl-C for the summary\n")
        sys.stderr.flush()
        for events in reading.Followed(sources).news(stopped):
            lines = [terminal.line_of(event) + "\n" for event in summary.feed(events)]
            if lines and not quiet:
                _write("".join(lines))
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _progress(sources: Sequence[Source]) -> Iterator[Any]:
    console = Console(stderr=True)
    total = sum(source.size for source in sources)
    columns = (TextColumn("reading"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=total or None)

        def advance() -> None:
            progress.update(task, completed=sum(source.position for source in sources))

        yield advance


# -- output


def _width() -> int:
    return max(40, shutil.get_terminal_size((80, 24)).columns)


def _wants_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _print(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        _write(text)
        return
    _close_stdout()


def _write(text: str) -> None:
    # A character that the terminal's encoding lacks is no reason to fail.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _close_stdout() -> None:
    """Let the interpreter's last flush go nowhere: the reader of the pipe has closed it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _page_path(html: str, sources: Sequence[Source]) -> Path:
    """Check before hours of reading that the page can be written.

    :raises Unreadable: if it can't be.
    """
    path = Path(html)
    if path.is_dir():
        raise Unreadable(f"--html {html} is a directory; name a file in it")
    if not path.parent.is_dir():
        raise Unreadable(f"--html {html}: there is no directory {path.parent}; make it first")
    if path.exists() and any(os.path.samestat(path.stat(), os.fstat(source.fileno())) for source in sources):
        raise Unreadable(f"--html {html} is one of the logs; name another file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Unreadable(f"--html {html}: no permission to write it; name a file elsewhere")
    return path


def _write_page(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        _fail(f"--html {path}: {error.strerror}; name a file elsewhere")
    sys.stderr.write(f"page written: {path} ({len(text) / 1e6:.1f} MB)\n")


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"pidpool logs: {message}\n")
    sys.exit(USAGE)
