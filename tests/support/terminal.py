"""A terminal for tests: runs a command in one of a given size and reads what it draws."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from types import TracebackType

SECONDS = 20.0
"""How long the command may take for whatever is waited for."""

_STEERING = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])")


class Terminal:
    """Run a command in a terminal of its own; at the end of the ``with`` block it is killed."""

    def __init__(self, command: list[str], columns: int, lines: int = 24) -> None:
        self._command = command
        self._size = struct.pack("HHHH", lines, columns, 0, 0)
        self.drawn = ""
        """All that it has written so far and that was not waited for yet."""

    def __enter__(self) -> Terminal:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, self._size)
        env = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            env.pop(name, None)
        self._process = subprocess.Popen(
            self._command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
        )
        os.close(theirs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def reads(self, wanted: str, steering: bool = False) -> str:
        """Wait until it has drawn this since the last such wait; return all up to there.

        :param steering: whether `wanted` is among the sequences that steer the terminal.
        """
        deadline = time.monotonic() + SECONDS
        while True:
            drawn = self.drawn if steering else _STEERING.sub("", self.drawn)
            if wanted in drawn:
                self.drawn = drawn.partition(wanted)[2]
                return drawn.partition(wanted)[0] + wanted
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{wanted!r} is not in what it has drawn:\n{drawn}"
            self._read()

    def _read(self) -> bool:
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # EIO: it has ended
            data = b""
        self.drawn += data.decode(errors="replace")
        return bool(data)

    def interrupt(self) -> int:
        """Do as Ctrl-C does; return its exit status, and have the rest in `drawn`."""
        self._process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + SECONDS
        while select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))[0] and self._read():
            pass
        return self._process.wait(timeout=SECONDS)
