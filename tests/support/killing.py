"""A child that is killed at one bytecode instruction, for tests of what a death leaves behind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def kill_at(instruction: int, *modules: ModuleType) -> None:
    """Have this process killed before that instruction of these modules, counted from here."""
    files = {module.__file__ for module in modules}
    left = instruction

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename in files:
            frame.f_trace = trace  # Python 3.13 and later look at it in the next line
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
            left -= event == "opcode"
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    trace_opcodes(trace)


def trace_opcodes(trace: Callable[[Any, str, Any], Any]) -> None:
    """As sys.settrace, for a tracer that has opcodes traced in some frames."""
    # Python 3.12 looks only now whether there is a frame that wants it.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)


def is_killed(function: Callable[[], Any]) -> bool:
    """Return whether a forked child was killed in `function()`; otherwise it came to the end of it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    exitcode = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert exitcode in (0, -signal.SIGKILL)
    return exitcode != 0
