"""The process in which one failure of one contender is measured: ``python -c`` with `COMMAND`. It reads
what to measure from standard input (a URL may hold a password, so not from its arguments), and writes
the numbers to standard output, both as one JSON document.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from pidpool.tools.demo import failures

COMMAND = "import sys; sys.path[:] = sys.argv[1:]; from pidpool.tools.demo import worker; worker.main()"
"""Its arguments are the starting process's ``sys.path``, so that both import the same packages, and
nothing from the current directory that the other would not."""

_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 5.0  # that the starting process has to end this one itself


def main() -> None:
    """Measure what standard input asks for, and end this process."""
    request: Mapping[str, Any] = json.load(sys.stdin)
    # Ends with whoever started it, even where that was killed; its children have timers of their own.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.setitimer(signal.ITIMER_REAL, request["seconds"] + _GRACE_SECONDS)
    # Python 3.12 and later warn of every fork of a process with threads. Such forks are measured here.
    warnings.simplefilter("ignore", DeprecationWarning)
    measured = failures.measure(
        request["failure"], request["contender"], request["url"], request["table"], request["iterations"]
    )
    json.dump(measured, sys.stdout)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at once: daemon threads may be stuck in a driver
