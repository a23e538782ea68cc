"""`Stage`: what all histories share. A server, a proxy before it, and the process that forks their roots."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg2
from waiting import until

from histories.proxy import TcpProxy
from pidpool.tools.demo.postgres import EmbeddedPostgres
from pidpool.tools.demo.supervisor import open_pidfd, readable

BOUND = 40.0
"""Seconds after which a command counts as hung: the stacks of its process are dumped."""


class HistoryFailed(AssertionError):
    """What a history showed is not what its model says."""


class Line:
    """The test's end of a process's thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.settimeout(BOUND)
        self._file = connection.makefile("rb")
        self.is_busy = False

    def send(self, command: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(command).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None if the process has ended."""
        try:
            line = self._file.readline()
        except ConnectionResetError:
            return None
        return dict(json.loads(line)) if line else None

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Stage:
    """A context manager; histories run on it one after the other."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._number = 0

    def __enter__(self) -> Stage:
        with contextlib.ExitStack() as stack:
            # Committed means written: the server's crash must not lose what it has confirmed.
            self.postgres = stack.enter_context(EmbeddedPostgres(settings={"synchronous_commit": "on"}))
            self.proxy = TcpProxy(self.postgres.port)
            stack.callback(self.proxy.stop)
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            self._path = f"{directory}/lines"
            self._listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            self._listener.bind(self._path)
            self._listener.listen(50)
            self._listener.settimeout(BOUND)
            self._stderr = stack.enter_context(open(f"{directory}/stderr", "a+b"))
            support = str(Path(__file__).parent.parent)
            self._first = subprocess.Popen(
                [sys.executable, "-m", "histories.process", self._path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**os.environ, "PYTHONPATH": support},
                text=True,
            )
            stack.callback(self._end_first)
            self.server = self._connect()
            stack.callback(lambda: self.server.close())
            self.ask("create table kept (history int, v int)")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start_root(self, options: dict[str, Any], collect: str, tls: bool) -> tuple[int, int, Line]:
        """Fork the root of a new history; return the history's number, the root's pid and its line."""
        self._number += 1
        url = self.postgres.url(tls=tls).replace(f":{self.postgres.port}/", f":{self.proxy.port}/")
        request = {
            "number": self._number,
            "url": url,
            "options": {**options, "proxy_port": self.proxy.port},
            "collect": collect,
        }
        assert self._first.stdin is not None
        self._first.stdin.write(json.dumps(request) + "\n")
        self._first.stdin.flush()
        pid, line = self.accept()
        return self._number, pid, line

    def accept(self) -> tuple[int, Line]:
        """Accept the line of a thread or process that has just started; return its pid and the line."""
        connection, _ = self._listener.accept()
        line = Line(connection)
        hello = line.receive()
        if hello is None:
            raise HistoryFailed(f"a process ended at its start\n{self.stderr()}")
        return int(hello["pid"]), line

    def accept_child(self, parent: Line) -> tuple[int, Line, dict[str, Any] | None]:
        """Accept a child's line; return with it the answer of the parent, if that was first."""
        answer = None
        if select.select([self._listener, parent], [], [], BOUND)[0] == [parent]:
            answer = parent.receive()
            if answer is None or "error" in answer:
                raise HistoryFailed(f"nothing was forked: {answer}")
        return *self.accept(), answer

    def receive(self, line: Line, pid: int, what: str) -> dict[str, Any] | None:
        """Receive an answer; if there is none in time, dump the stacks of the process and fail."""
        try:
            return line.receive()
        except TimeoutError:
            raise self.hung(pid, what) from None

    def hung(self, pid: int, what: str) -> HistoryFailed:
        """Return the failure of a process that hangs, with its stacks; the process ends."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)
        time.sleep(1.0)
        return HistoryFailed(f"{what} hung for {BOUND} s\n{self.stderr()}")

    def stderr(self) -> str:
        self._stderr.flush()
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), size, 0).decode(errors="replace")[-6000:]

    def forget_stderr(self) -> None:
        os.ftruncate(self._stderr.fileno(), 0)

    def wait_for_end(self, pid: int, pidfd: int, what: str, *lines: Line) -> bool:
        """Wait until a process has ended; return False if one of its lines says something instead."""
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        for line in lines:
            poll.register(line, select.POLLIN)
        ready = poll.poll(BOUND * 1000)
        if not ready:
            raise self.hung(pid, what)
        # A line is readable too when its process has ended.
        return readable(pidfd, seconds=0) or (
            not any(_has_message(line) for line in lines) and self.wait_for_end(pid, pidfd, what)
        )

    def reap(self) -> None:
        """Have the first process reap what has ended; all processes of a history must have."""
        assert self._first.stdin is not None and self._first.stdout is not None

        def left() -> bool:
            self._first.stdin.write("null\n")  # type: ignore[union-attr]
            self._first.stdin.flush()  # type: ignore[union-attr]
            return self._first.stdout.readline().strip() == "0"  # type: ignore[union-attr]

        until(left, "a process of the history still runs", patience=BOUND)

    # -- the server

    def ask(self, statement: str) -> list[Any]:
        """Run a statement as the test, past the proxy."""
        with self.server.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def restart(self) -> None:
        """Kill a server process: the server ends all of its sessions, and starts again."""
        mark = self.postgres.log_mark()
        (pid,) = self.ask("select pg_backend_pid()")[0]
        os.kill(pid, signal.SIGKILL)
        until(
            lambda: "system is ready to accept connections" in self.postgres.log_since(mark),
            "the server did not come back",
            interval=0.02,
        )
        self.server.close()
        self.server = self._connect()

    def _connect(self) -> Any:
        connection = psycopg2.connect(
            self.postgres.url(tls=False).replace("+psycopg2", ""), application_name="histories"
        )
        connection.autocommit = True
        return connection

    def _end_first(self) -> None:
        assert self._first.stdin is not None and self._first.stdout is not None
        self._first.stdin.close()
        self._first.wait(20)
        self._first.stdout.close()


def _has_message(line: Line) -> bool:
    with contextlib.suppress(BlockingIOError, ConnectionResetError):
        return bool(line._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    return False


def pidfd_of(pid: int) -> int:
    """Return a descriptor that becomes readable when the process ends."""
    return open_pidfd(pid)
