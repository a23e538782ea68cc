"""Which line of the user's code is running: at a checkout the nearest caller outside of SQLAlchemy and
pidpool, looked up only for pools with `hold_warning`; at a fork the line that forked, looked up only if a
connection is open.
"""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType
from typing import Any

# By the module and not by the file: SQLAlchemy's generated functions have neither.
_NOT_THE_USERS = frozenset(["sqlalchemy", "pidpool", "contextlib", ""])

_MOST_AT_A_FORK = 4
"""The line that forked and three callers."""

_MOST_LOOKED_AT = 40
"""Callers of a fork that are looked at: multiprocessing, Celery and gunicorn have a dozen of their own."""

_STANDARD_LIBRARY = (os.path.dirname(os.__file__) + os.sep, "<frozen ")
_SCRIPTS = os.path.dirname(sys.executable) + os.sep
"""The starting scripts of installed commands are no user's code."""


class CodeLine:
    """A line of code, kept without its frame: a frame would keep the caller's variables alive."""

    __slots__ = ("code", "line")

    def __init__(self, code: CodeType, line: int | None) -> None:
        self.code = code
        self.line = line

    def __str__(self) -> str:
        return f"{self.code.co_filename}:{self.line} in {self.code.co_name}"


def calling_line() -> CodeLine | None:
    """Return the line that called into SQLAlchemy, or None if there is none (an engine's own thread)."""
    found = _outside(sys._getframe(1))
    if found is None and "greenlet" in sys.modules:
        # SQLAlchemy's asyncio runs the pool in a greenlet of its own; the coroutine is its parent's.
        greenlet = sys.modules["greenlet"].getcurrent().parent
        while greenlet is not None and found is None:
            found = _outside(greenlet.gr_frame)
            greenlet = greenlet.parent
    return found


ForkingLines = list[tuple[CodeType, "int | None", Any]]
"""The lines that ran at a fork, the nearest first: code, line, name of the module. They become a text when it
is asked for: to make it touches dozens of memory pages, each of which the fork that follows has to copy."""


def forking_lines(skipped: int = 0) -> ForkingLines:
    """Return the lines that run at a fork. May be called inside an at-fork hook.

    :param skipped: callers of this function that are known to be pidpool's own: each costs a page.
    """
    lines: ForkingLines = []
    left = _MOST_LOOKED_AT
    try:
        frame: FrameType | None = sys._getframe(1 + skipped)
    except ValueError:  # a fork in C that runs Python's hooks, as uWSGI's: no Python code has called it
        return lines
    while frame is not None and left:
        module = frame.f_globals["__name__"] if "__name__" in frame.f_globals else None  # noqa: SIM401  a call
        lines += ((frame.f_code, frame.f_lineno, module),)
        frame = frame.f_back
        left -= 1
    return lines


def text_of(lines: ForkingLines) -> str | None:
    """Return the line of the user's code that forked and its callers, separated by `` < ``.

    The user's code is what is neither the standard library (multiprocessing, concurrent.futures) nor
    installed beside it (gunicorn, billiard). If no line of the user's code ran, as when gunicorn forks
    its workers, it is the lines of the installed package.
    """
    found: list[list[str]] = [[], [], []]
    for code, line, module in lines:
        if _is_outside(module):
            found[_distance(code.co_filename)].append(str(CodeLine(code, line)))
    return " < ".join(next(filter(None, found), [])[:_MOST_AT_A_FORK]) or None


def _distance(filename: str) -> int:
    """Return 0 for a file of the user's, 1 for an installed package's, 2 for the standard library's."""
    if "site-packages" in filename or "dist-packages" in filename or filename.startswith(_SCRIPTS):
        return 1
    return 2 if filename.startswith(_STANDARD_LIBRARY) else 0


def _is_outside(module: Any) -> bool:
    return (module or "").partition(".")[0] not in _NOT_THE_USERS


def _outside(frame: FrameType | None) -> CodeLine | None:
    while frame is not None:
        if _is_outside(frame.f_globals.get("__name__")):
            return CodeLine(frame.f_code, frame.f_lineno)
        frame = frame.f_back
    return None
