"""Which line of the user's code is running: the nearest caller outside of SQLAlchemy and pidpool. Looked up
at a checkout only for pools with `hold_warning`.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType

# By the module and not by the file: SQLAlchemy's generated functions have neither.
_NOT_THE_USERS = frozenset(["sqlalchemy", "pidpool", "contextlib", ""])


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


def _outside(frame: FrameType | None) -> CodeLine | None:
    while frame is not None:
        module = frame.f_globals.get("__name__") or ""
        if module.partition(".")[0] not in _NOT_THE_USERS:
            return CodeLine(frame.f_code, frame.f_lineno)
        frame = frame.f_back
    return None
