"""A fork never lands inside a log line: a child finds every writer free, whichever the application
uses, and its log does not stop there."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import logging.handlers
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import structlog
from engines import MakeEngine
from forking import HOWS, How, run_in_child
from parent import Parent
from soak import SOAK
from sqlalchemy import text
from waiting import until

from pidpool.forks import log_locks
from pidpool.tools.demo.postgres import EmbeddedPostgres

FORKS = {"python": 2000 if SOAK else 20, "c with child hooks": 2000 if SOAK else 10}

TESTS = Path(__file__).parent.parent


@pytest.mark.soak
@pytest.mark.timeout(3600 if SOAK else 300)
@pytest.mark.parametrize("how", [how for how in HOWS if how != "c"])
@pytest.mark.parametrize(
    "writer",
    ["PrintLogger", "WriteLogger", "FileHandler", "StreamHandlers", "QueueHandler", "unconfigured"],
)
@pytest.mark.usefixtures("clean_log")
def test_no_child_hangs_while_eight_threads_log(postgres: EmbeddedPostgres, writer: str, how: How) -> None:
    """`make soak` (PIDPOOL_SOAK=1) has 2,000 forks of each."""
    program = TESTS / "programs" / "fork_while_logging.py"
    arguments = [postgres.url(tls=False), writer, how, str(FORKS[how])]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", str(program), *arguments],
        env={**os.environ, "PYTHONPATH": str(TESTS / "support")},
        capture_output=True,
        text=True,
        timeout=3500 if SOAK else 280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["forks"] == FORKS[how]


class Pipe:
    """A file that blocks its writer once it is full. A child that puts something else in its place can
    write, as long as nothing but the pipe blocks it."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        self.file: IO[str] = open(writer, "w")  # noqa: SIM115

    def fill(self) -> None:
        writer = self.file.fileno()
        flags = fcntl.fcntl(writer, fcntl.F_GETFL)
        fcntl.fcntl(writer, fcntl.F_SETFL, flags | os.O_NONBLOCK)
        try:
            while True:
                os.write(writer, b"x" * 65536)
        except BlockingIOError:
            fcntl.fcntl(writer, fcntl.F_SETFL, flags)

    def let_everything_through(self) -> None:
        """In a child: for this process alone."""
        void = os.open(os.devnull, os.O_WRONLY)
        os.dup2(void, self.file.fileno())
        os.close(void)

    def drain(self) -> None:
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        while os.read(self.reader, 65536):
            pass


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.drain()
    pipe.file.close()


@pytest.fixture
def handlers() -> Iterator[list[logging.Handler]]:
    """Handlers of the logger `application`, taken off again."""
    application, other = logging.getLogger("application"), logging.getLogger("application.other")
    application.setLevel(logging.DEBUG)
    application.propagate = other.propagate = False
    yield application.handlers
    application.handlers.clear()
    other.handlers.clear()
    application.setLevel(logging.NOTSET)
    application.propagate = other.propagate = True


def _print_logger(pipe: Pipe) -> Any:
    return structlog.wrap_logger(structlog.PrintLogger(pipe.file), processors=[_render])


def _write_logger(pipe: Pipe) -> Any:
    return structlog.wrap_logger(structlog.WriteLogger(pipe.file), processors=[_render])


def _bytes_logger(pipe: Pipe) -> Any:
    file: Any = pipe.file
    return structlog.wrap_logger(
        structlog.BytesLogger(file.buffer), processors=[_render, lambda _, __, line: line.encode()]
    )


def _stream_handler(pipe: Pipe) -> Any:
    logging.getLogger("application").addHandler(logging.StreamHandler(pipe.file))
    return logging.getLogger("application")


def _another_ones_handler(pipe: Pipe) -> Any:
    """The line that blocks is another logger's, which writes to the same file."""
    logging.getLogger("application.other").addHandler(logging.StreamHandler(pipe.file))
    return _stream_handler(pipe)


def _render(_: Any, __: str, event: Any) -> str:
    return structlog.processors.JSONRenderer()(_, __, event)  # type: ignore[return-value]


@pytest.mark.usefixtures("table", "clean_log", "handlers")
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "make_logger", [_print_logger, _write_logger, _bytes_logger, _stream_handler, _another_ones_handler]
)
def test_a_child_can_log_though_a_line_was_being_written_for_long(
    pipe: Pipe,
    tls_url: str,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    make_logger: Callable[[Pipe], Any],
    how: How,
) -> None:
    monkeypatch.setattr(log_locks, "LOG_LINE_WAIT", 0.1)
    log = make_logger(pipe)
    parent = Parent(make_engine(tls_url, logger=log), "in transaction")
    other = logging.getLogger("application.other") if make_logger is _another_ones_handler else log
    pipe.fill()
    blocked = threading.Thread(target=other.warning, args=("a line",))
    blocked.start()
    until(lambda: _is_in_write(blocked), "the thread is not in write(2)")

    def child() -> None:
        pipe.let_everything_through()
        if how != "c":
            log.warning("at once")
        parent.connection = None
        with parent.engine.connect() as connection:
            connection.execute(text("select 1"))
        log.warning("later")
        parent.engine.dispose()

    try:
        run_in_child(child, how=how, life=10)
        assert blocked.is_alive()  # it still is in the middle of its line
    finally:  # otherwise the end of the test would log into the full pipe
        pipe.drain()
        blocked.join(10)
    parent.notices_nothing()


@pytest.mark.usefixtures("table", "clean_log")
@pytest.mark.parametrize("how", HOWS)
def test_a_child_can_log_to_a_queue_whose_lock_was_taken(
    tls_url: str,
    make_engine: MakeEngine,
    handlers: list[logging.Handler],
    monkeypatch: pytest.MonkeyPatch,
    how: How,
) -> None:
    monkeypatch.setattr(log_locks, "LOG_LINE_WAIT", 0.1)
    lines: queue.Queue[Any] = queue.Queue()
    log = logging.getLogger("application")
    handlers += [logging.handlers.QueueHandler(lines), logging.handlers.QueueHandler(lines)]
    engine = make_engine(tls_url, logger=log)
    parent = Parent(engine, "idle")
    with _held_by_another_thread(lines.mutex):
        got = run_in_child(
            lambda: (engine.dispose(), log.warning("a line"), lines.qsize())[2], how=how, life=10
        )
    assert got >= 2
    assert not lines.mutex.locked()
    parent.notices_nothing()


def test_a_fork_waits_for_a_line_that_is_being_written() -> None:
    file = SlowFile()
    log = structlog.PrintLogger(file)  # type: ignore[arg-type]
    writing = threading.Thread(target=log.info, args=("a line",))
    writing.start()
    assert file.begun.wait(10)

    def finish_once_the_fork_waits() -> None:
        until(lambda: log_locks._held, "the fork does not wait for the locks")
        file.go_on.set()

    finishing = threading.Thread(target=finish_once_the_fork_waits)
    finishing.start()
    assert run_in_child(lambda: ("".join(file.lines), log._lock.locked())) == ("a line\n", False)
    finishing.join(10)
    writing.join(10)
    assert not log._lock.locked() and not log_locks._held


class SlowFile:
    """Stops in the middle of a line until `go_on` is set."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def write(self, line: str) -> None:
        self.begun.set()
        assert self.go_on.wait(10)
        self.lines.append(line)

    def flush(self) -> None:
        pass


def test_a_fork_passes_a_thread_that_configures_logging(handlers: list[logging.Handler]) -> None:
    """logging.config takes the module's lock, then each handler's; the stdlib's own hook the former."""
    handler = logging.StreamHandler()
    handlers.append(handler)
    locked = threading.Event()
    module_lock: Any = logging._lock  # type: ignore[attr-defined]

    def configure() -> None:
        with module_lock:
            locked.set()
            until(lambda: log_locks._held, "the fork does not wait for the locks")
            assert handler.lock is not None and handler.lock.acquire(timeout=10)
            handler.lock.release()

    configuring = threading.Thread(target=configure)
    configuring.start()
    assert locked.wait(10)
    run_in_child(lambda: logging.getLogger("application").debug("a line"))
    configuring.join(10)
    assert not configuring.is_alive()


def test_the_parent_has_its_locks_back_after_a_fork_in_the_middle_of_another_ones_hooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a signal handler."""
    monkeypatch.setattr(log_locks, "LOG_LINE_WAIT", 0.1)
    log = structlog.PrintLogger(io.StringIO())
    forks: list[None] = []
    main = threading.get_ident()

    def signal_the_fork() -> None:
        until(lambda: log_locks._held, "the fork does not wait for the locks")
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: forks.append(run_in_child(lambda: None)))
    try:
        with _held_by_another_thread(log._lock):
            signalling = threading.Thread(target=signal_the_fork)
            signalling.start()
            run_in_child(lambda: None)
            signalling.join(10)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert forks and not log_locks._held
    free: list[bool] = []
    looking = threading.Thread(target=lambda: free.append(log_locks.are_free(time.monotonic() + 10)))
    looking.start()
    looking.join(30)
    assert free == [True]


def test_the_parent_has_its_locks_back_after_forks_in_two_threads() -> None:
    file = open(os.devnull, "w")  # noqa: SIM115
    log = structlog.PrintLogger(file)
    failed: list[BaseException] = []

    def fork_a_few() -> None:
        try:
            for _ in range(10):
                run_in_child(log.info, "a line")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=fork_a_few) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed and not log_locks._held and not log._lock.locked()
    file.close()


@pytest.mark.usefixtures("table", "clean_log")
def test_what_a_child_has_written_before_it_used_a_pool_stays(
    tmp_path: Path, tls_url: str, make_engine: Any
) -> None:
    """With no hook the writers are looked at later, and nothing that works is made anew."""
    file = (tmp_path / "log").open("w")
    structlog.PrintLogger(file)
    engine = make_engine(tls_url)
    parent = Parent(engine, "idle")

    def child() -> None:
        file.write("not flushed yet\n")
        engine.dispose()
        file.flush()

    run_in_child(child, how="c")
    file.close()
    assert (tmp_path / "log").read_text() == "not flushed yet\n"
    parent.notices_nothing()


def test_a_child_drops_what_the_parent_had_not_flushed_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise both would write it."""
    monkeypatch.setattr(log_locks, "LOG_LINE_WAIT", 0.1)
    file = (tmp_path / "log").open("wb")
    log = structlog.BytesLogger(file)
    file.write(b"the parent's\n")
    with _held_by_another_thread(log._lock):
        run_in_child(log.info, b"the child's")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"the child's\nthe parent's\n"


class _held_by_another_thread:
    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._taken, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold)

    def _hold(self) -> None:
        with self._lock:
            self._taken.set()
            self._done.wait(30)

    def __enter__(self) -> None:
        self._thread.start()
        assert self._taken.wait(10)

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join(10)


def _is_in_write(thread: threading.Thread) -> bool:
    call = Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().split()
    return call[0] in {"1", "64"}  # write(2) on x86-64 and on arm64
