"""Programs that are started in a session of their own (``start_new_session``), and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any


def kill_session(process: subprocess.Popen[Any]) -> None:
    """Kill what is left of a program and of all that it started, and reap it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
