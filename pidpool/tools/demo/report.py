"""Shows the demo's results: a table for people, a JSON document for programs."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pidpool.tools.demo.contenders import CONTENDERS, NULLPOOL, PIDPOOL
from pidpool.tools.demo.measuring import Results
from pidpool.tools.demo.verdicts import COMPLAINTS_TITLE, FAILURES, Verdict


def as_json(results: Results, server: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return everything as one document; cli/demo.py describes its shape."""
    failures = []
    for failure in FAILURES:
        contenders = {}
        for contender in CONTENDERS:
            verdict = results.verdict(failure, contender)
            contenders[contender.key] = {
                "failed": verdict.failed,
                "text": verdict.text,
                **results.measured[failure.name, contender.key],
            }
        failures.append({"name": failure.name, "title": failure.title, "contenders": contenders})
    return {
        "clean": results.clean,
        "iterations": results.iterations,
        "seconds": round(seconds, 1),
        "versions": _versions(server),
        "server": server,
        "failures": failures,
        "complaints": {contender.key: results.complaints_of(contender) for contender in CONTENDERS},
        "speed": dict(results.speed),
        "unexpected": [
            {"name": failure.name, "contender": contender.key} for failure, contender in results.unexpected()
        ],
    }


def show(results: Results, server: dict[str, Any], seconds: float, console: Console) -> None:
    """Print the table, and below it the notes that a reader needs."""
    table = _table(console.width)
    for failure in FAILURES:
        verdicts = [results.verdict(failure, contender) for contender in CONTENDERS]
        tls = {results.measured[failure.name, contender.key].get("tls") for contender in CONTENDERS}
        table.add_row(f"{failure.title}{_over(tls)}", *map(_cell, verdicts))
    table.add_row(COMPLAINTS_TITLE, *(_cell(results.complaints_verdict(each)) for each in CONTENDERS))
    times = results.speed.get("microseconds", {})
    if times:
        title = f"Time of a SELECT 1{_over({results.speed['tls']})}"
        table.add_row(title, *(Text(f"{times[each.key] / 1000:.2f} ms") for each in CONTENDERS))
    console.print()
    console.print(table)
    console.print()
    for line in _notes(results, server, seconds):
        console.print(Text(line))


def _table(width: int) -> Table:
    """Return an empty table that fills the width with columns of one size for all contenders."""
    # Between five columns: four lines, and a blank at each side of a line.
    room = min(width, 120) - 4 - 8
    each = max(10, min(20, room * 12 // 68))
    table = Table(box=box.ASCII2, show_lines=True, show_edge=False, pad_edge=False)
    table.add_column("", width=max(12, room - each * len(CONTENDERS)))
    for contender in CONTENDERS:
        table.add_column(Text(contender.title, "bold"), width=each)
    return table


def _over(tls: set[bool | None]) -> str:
    return {True: ", over TLS", False: ", without TLS", None: ""}[tls.pop() if len(tls) == 1 else None]


def _cell(verdict: Verdict) -> Text:
    if verdict.text == "unknown":
        return Text("unknown", "dim")
    mark, style = ("FAIL", "bold red") if verdict.failed else ("ok", "bold green")
    return Text.assemble((mark, style), "\n", verdict.text)


def _notes(results: Results, server: dict[str, Any], seconds: float) -> Iterator[str]:
    yield "rows lost: their commit reported success, but the table does not have them."
    yield (
        "events: with the documented connect and checkout listeners, which compare pids. "
        "dispose: each child begins with the documented engine.dispose(close=False)."
    )
    times = results.speed.get("microseconds", {})
    if times:
        null, ours = times[NULLPOOL.key], times[PIDPOOL.key]
        yield (
            f"NullPool, the third documented remedy: {null / 1000:.2f} ms for a SELECT 1, "
            f"{null / ours:.0f} times PidPool's {ours / 1000:.2f} ms."
        )
    else:
        yield f"The time of a SELECT 1 could not be measured: {results.speed.get('broken')}."
    if results.complaints is not None:
        yield "Complaints: without those about the killed parent, which no pool can prevent."
    for failure, contender in results.unexpected():
        yield (
            f"Not as expected: {contender.title} got through '{failure.title}' this time "
            f"({results.iterations} iterations; more may show the failure)."
        )
    named = ", ".join(f"{name} {number}" for name, number in _versions(server).items())
    yield f"Measured in {seconds:.0f} s with {results.iterations} iterations: {named}."
    yield "PidPool: no failure." if results.clean else "PidPool FAILED; its column shows where."


def _versions(server: dict[str, Any]) -> dict[str, str]:
    return {
        "pidpool": version("pidpool"),
        "SQLAlchemy": version("sqlalchemy"),
        "PostgreSQL": server["version"],
        "Python": platform.python_version(),
    }
