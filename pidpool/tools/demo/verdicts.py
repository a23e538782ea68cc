"""Judges the demo's numbers: each failure's title, whether a contender failed, and the table's text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Measured = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Whether a contender failed, and the text of its cell."""

    failed: bool
    text: str


@dataclass(frozen=True)
class Failure:
    """One line of the table; `name` is that of a function in failures.py."""

    name: str
    title: str
    judge: Callable[[Measured], Verdict]
    plain: bool = False
    """Whether it is measured without TLS, which would turn silent harm into an error."""
    survivors: frozenset[str] = frozenset()
    """The contenders beside PidPool that are known to pass."""
    kills_a_client: bool = False
    """Whether the server logs a complaint whatever the pool does."""

    def verdict(self, measured: Measured) -> Verdict:
        """Judge a measurement, which is ``{"broken": reason}`` if it broke off."""
        if "broken" in measured:
            return Verdict(True, measured["broken"])
        return self.judge(measured)


def _replaced_session(measured: Measured) -> Verdict:
    done, asked = measured["done"], measured["iterations"]
    if measured["error"] is None:
        return Verdict(False, f"{done} of {asked} turns")
    return Verdict(True, f"dies in turn {done + 1} of {asked}")


def _commits(measured: Measured) -> Verdict:
    asked, reported, present = measured["commits"], measured["commits_reported"], measured["rows_present"]
    parts = []
    if reported != asked:
        parts.append(f"{asked - reported} of {asked} commits raise")
    if present != reported:
        parts.append(f"{reported - present} of {reported} rows lost")
    if measured.get("children_failed"):
        parts.append(f"{measured['children_failed']} of {asked} children fail")
    if parts:
        return Verdict(True, ", ".join(parts))
    return Verdict(False, f"{present} of {asked} rows present")


def _orphaned_lock(measured: Measured) -> Verdict:
    held = measured["seconds"]
    if measured["until_child_ended"]:
        return Verdict(True, f"held {held:.1f} s, until child ends")
    return Verdict(False, f"free after {held * 1000:.0f} ms")


def _forked_with_threads(measured: Measured) -> Verdict:
    forks, hung, failed = measured["forks"], measured["children_hung"], measured["children_failed"]
    parts = []
    if hung:
        parts.append(f"{hung} of {forks} hang")
    if failed:
        parts.append(f"{failed} of {forks} fail")
    if measured["parent_errors"]:
        parts.append(f"{measured['parent_errors']} errors in the parent")
    if parts:
        return Verdict(True, ", ".join(parts))
    return Verdict(False, f"{forks} of {forks} succeed")


FAILURES = (
    Failure(
        "replaced_session",
        "Child replaces the Session it inherits",
        _replaced_session,
    ),
    Failure(
        "dropped_session",
        "Child drops the Session of an open transaction",
        _commits,
        plain=True,
    ),
    Failure(
        "forked_in_c",
        "Child forked in C drops or uses that Session",
        _commits,
        plain=True,
    ),
    Failure(
        "orphaned_lock",
        "Parent killed holding a row lock, child lives on",
        _orphaned_lock,
        kills_a_client=True,
    ),
    Failure(
        "forked_with_threads",
        "Children forked while 8 threads use the pool",
        _forked_with_threads,
        survivors=frozenset({"dispose"}),
    ),
)

COMPLAINTS_TITLE = "Complaints in the server's log"


def complaints_verdict(count: int | None) -> Verdict:
    """Judge the number of the server's complaints; None if its log can't be read."""
    if count is None:
        return Verdict(False, "unknown")
    return Verdict(count > 0, str(count or "none"))
