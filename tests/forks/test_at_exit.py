"""Events that wait for the next use of a pool are logged when the process ends without one: once, in the
application's own log, and never to its disadvantage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import event_logs
import pytest

from pidpool.tools.demo.postgres import EmbeddedPostgres

# A parent that forks in a transaction, and uses its pool no more.
PROGRAM = """
from pidpool import PidPool  # before the others, so that their atexit handlers come before its own
import atexit, concurrent.futures, ctypes, gc, logging.handlers, multiprocessing, os, queue, sys
from pathlib import Path
import structlog
from sqlalchemy import create_engine, text

how, url, path = sys.argv[1:]
log = open(path, "a")
if how not in ("unconfigured", "queue with a listener", "queue of multiprocessing"):
    structlog.configure(
        processors=[structlog.processors.add_log_level, structlog.processors.JSONRenderer()],
        logger_factory=structlog.WriteLoggerFactory(log),
    )
engine = create_engine(url, poolclass=PidPool)
connection = engine.connect()
server_pid = connection.execute(text("select pg_backend_pid()")).scalar()
log.flush()
if how == "queue with a listener":
    lines = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(lines, logging.StreamHandler())
    listener.start()
    atexit.register(listener.stop)
    logging.basicConfig(level="INFO", handlers=[logging.handlers.QueueHandler(lines)])
elif how == "queue of multiprocessing":
    lines = multiprocessing.Queue()
    logging.basicConfig(level="INFO", handlers=[logging.handlers.QueueHandler(lines)])

def drop():
    global connection
    connection = None
    gc.collect()

def children():
    fork = multiprocessing.get_context("fork")
    if how == "multiprocessing":
        process = fork.Process(target=drop)
        process.start()
        process.join()
        assert process.exitcode == 0
    elif how == "executor":
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=fork) as executor:
            executor.submit(drop).result()
    else:
        pid = ctypes.PyDLL(None).fork() if how.startswith("C") else os.fork()
        if pid == 0:
            if how == "log closed":
                log.close()
            if how != "C, untouched":
                drop()
            (os._exit if how in ("_exit", "queue with a listener") else sys.exit)(0)
        assert os.waitpid(pid, 0)[1] == 0

children()
assert connection.execute(text("select pg_backend_pid()")).scalar() == server_pid
log.flush()
assert "pool.forked" not in Path(path).read_text()
"""


def run(how: str, postgres: EmbeddedPostgres, log: Path) -> tuple[list[Any], list[Any], str]:
    """Return the events of the parent and of the child, and what is on standard error."""
    program = [sys.executable, "-c", PROGRAM, how, postgres.url(tls=True), str(log)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    logged = event_logs.read(log)
    parent = next((event["pid"] for event in logged), None)
    return (
        [event for event in logged if event["pid"] == parent],
        [event for event in logged if event["pid"] != parent],
        done.stderr,
    )


@pytest.mark.usefixtures("clean_log")
@pytest.mark.parametrize("how", ["fork", "multiprocessing", "executor", "C, dropped"])
def test_child_and_parent_log_their_waiting_events_at_their_end(
    how: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    parents, childs, said = run(how, postgres, tmp_path / "log")
    assert [event["event"] for event in childs] == ["pool.adopted", "connection.inherited"]
    adopted, inherited = childs
    assert adopted["trigger"] == ("lazy" if how.startswith("C") else "hook")
    assert (inherited["state"], inherited["action"]) == ("in transaction", "severed")
    forks = [event for event in parents if event["event"] == "pool.forked"]
    assert len(forks) == (0 if how.startswith("C") else 1)  # a parent does not notice a fork in C
    assert all(event["in_transaction"] == 1 and event["at"] <= adopted["at"] for event in forks)
    assert said == ""


@pytest.mark.usefixtures("clean_log")
@pytest.mark.parametrize("how", ["_exit", "log closed", "C, untouched"])
def test_a_child_that_can_not_log_ends_in_silence(
    how: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    parents, childs, said = run(how, postgres, tmp_path / "log")
    assert childs == []
    assert [event["event"] for event in parents].count("pool.forked") == (0 if how.startswith("C") else 1)
    assert said == ""


@pytest.mark.usefixtures("clean_log")
def test_with_no_configuration_the_leak_is_a_warning_on_standard_error(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    _, _, said = run("unconfigured", postgres, tmp_path / "log")
    (line,) = said.splitlines()
    assert "connection.inherited" in line and "in transaction" in line


@pytest.mark.usefixtures("clean_log")
def test_the_end_is_logged_before_the_log_is_stopped(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    _, _, said = run("queue with a listener", postgres, tmp_path / "log")
    assert said.count("pool.forked") == 1


@pytest.mark.usefixtures("clean_log")
def test_a_log_through_a_queue_of_multiprocessing_does_not_hold_up_the_end(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    run("queue of multiprocessing", postgres, tmp_path / "log")


SLOW_END = """
import atexit, os, sys, threading
atexit.register(lambda: print(len(log.lines) - before))  # the first to be registered runs last
import structlog
from sqlalchemy import create_engine
from pidpool import PidPool
from pidpool.forks import at_exit

class Log:
    def __init__(self):
        self.lines = []
    def write(self, line):
        if line.strip():
            self.lines.append(line)
            entered.set()
            if self is stuck or at_end:
                threading.Event().wait(None if self is stuck else 0.1)
    def flush(self): ...

entered, stuck, at_end = threading.Event(), None, False
at_exit.LOG_SECONDS = 0.5
log = Log()
structlog.configure(
    processors=[structlog.processors.JSONRenderer()], logger_factory=structlog.WriteLoggerFactory(log)
)
engine = create_engine("sqlite://", poolclass=PidPool)
connection = engine.connect()
for _ in range(40):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
before = len(log.lines)
at_end = True
if sys.argv[1] == "stuck":
    stuck = log
    entered.clear()
    threading.Thread(target=structlog.get_logger().info, args=("not read",), daemon=True).start()
    entered.wait()
"""


@pytest.mark.parametrize("log", ["stuck", "slow"])
def test_a_log_that_does_not_go_on_does_not_hold_up_the_end(log: str) -> None:
    """A thread is in the middle of a line for ever; or 40 events wait, and each takes the log 0.1 s."""
    program = [sys.executable, "-c", SLOW_END, log]
    done = subprocess.run(program, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    if log == "stuck":
        assert int(done.stdout) == 1  # the thread's own line
    else:
        assert 1 <= int(done.stdout) <= 5


def test_multiprocessing_is_not_imported_for_it() -> None:
    program = "import os, sys, pidpool\nif os.fork() == 0: os._exit('multiprocessing' in sys.modules)\n"
    program += "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))"
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, timeout=60)
    assert done.returncode == 0
