"""The process that measures one failure of one contender: ``python -c`` with `COMMAND`.

It reads its request from standard input and writes the numbers to standard output, both as one JSON
document. The request is no argument, because its URL may hold a password.
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
"""Its arguments are the ``sys.path`` of the process that starts it, so that both import the same files."""

_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 5.0  # for the process that started this one to end it


def main() -> None:
    """Measure what the request on standard input names, and end this process."""
    request: Mapping[str, Any] = json.load(sys.stdin)
    # It ends with the process that started it, also if that was killed. Its children have own timers.
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
