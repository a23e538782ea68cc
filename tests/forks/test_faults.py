"""What a system call that fails, or a limit that is reached, costs: an error with its numbers, or one
feature. Never the parent's transaction, never a hang."""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from child import raises_foreign
from descriptors import is_severed, open_descriptors
from engines import MakeEngine, pool_of
from events import Events
from forking import How, run_in_child
from limits import few_descriptors
from parent import Parent, server_pid
from sqlalchemy.exc import DBAPIError

from pidpool import PidPool
from pidpool.forks import severing
from pidpool.stats import family_memory
from pidpool.tools.demo.postgres import EmbeddedPostgres

pytestmark = pytest.mark.usefixtures("clean_log")
both_hows = pytest.mark.parametrize("how", ["python", "c"])


def failing(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@both_hows
@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("call", ["dup2", "socketpair"])
def test_a_child_that_can_sever_nothing_keeps_what_it_inherited_and_does_not_use_it(
    tls_url: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, call: str, how: How
) -> None:
    events = Events()
    engine = make_engine(tls_url, logger=events.logger)
    parent = Parent(engine, "in transaction")
    with engine.connect() as idle:
        server_pid(idle)
    if call == "dup2":
        monkeypatch.setattr(os, "dup2", failing(errno.EBUSY))
    else:
        # As if a daemon had closed all descriptors, and then opened as many others as it may.
        monkeypatch.setattr(severing, "_dead_socket", severing._DeadSocket())
        monkeypatch.setattr(socket, "socketpair", failing(errno.EMFILE))

    def child() -> list[Any]:
        raises_foreign(parent.connection)
        assert not is_severed(parent.tag)
        monkeypatch.undo()
        parent.connection.rollback()
        assert server_pid(parent.connection) != parent.server_pid
        parent.connection.close()
        engine.dispose()
        inherited = events.of("connection.inherited")
        return sorted((event["state"], event["action"]) for event in inherited)

    assert run_in_child(child, how=how) == [("idle", "kept"), ("in transaction", "kept")]
    monkeypatch.undo()
    parent.notices_nothing()


@pytest.mark.usefixtures("table")
def test_each_number_of_free_descriptors_costs_an_error_at_most(
    postgres: EmbeddedPostgres, make_engine: MakeEngine
) -> None:
    """In the parent and in a child, from none on, until a connection can be opened.

    Not over TLS: the server would complain of a handshake that its client has broken off.
    """
    engine = make_engine(postgres.url(tls=False), pool_size=2, max_overflow=0, pool_timeout=5)
    parent = Parent(engine, "in transaction")
    pool = pool_of(engine)

    def connect(left: int) -> str:
        with few_descriptors(left=left):
            try:
                connection = engine.connect()
            except Exception as error:
                return type(error).__name__
            connection.close()
            return ""

    def until_opened(checked_out: int) -> list[str]:
        said = []
        before = len(open_descriptors())
        while not said or said[-1]:
            assert len(said) < 40
            said.append(connect(len(said)))
            assert pool.checkedout() == checked_out
            if said[-1]:
                assert len(open_descriptors()) == before
        with engine.connect() as own:
            assert server_pid(own) != parent.server_pid
        return said

    def child() -> list[str]:
        raises_foreign(parent.connection)
        parent.connection.close()
        said = until_opened(0)
        engine.dispose()
        return said

    for said in (until_opened(1), run_in_child(child)):
        assert len(said) > 1  # the driver's own text is empty, or no text at all
    parent.notices_nothing()


def test_a_connect_without_descriptors_for_a_child_says_what_is_missing(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(severing, "_dead_socket", severing._DeadSocket())
    monkeypatch.setattr(socket, "socketpair", failing(errno.EMFILE))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    engine = make_engine("sqlite://")
    with pytest.raises(OSError, match=rf"two descriptors more.*pid {os.getpid()}.*open files, {limit}"):
        engine.connect()
    monkeypatch.undo()
    engine.connect().close()


@pytest.mark.usefixtures("table")
def test_a_family_without_shared_memory_is_not_shared_and_says_so(
    tls_url: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family_memory.mmap, "mmap", failing(errno.ENOMEM))
    events = Events()
    with pytest.raises(OSError, match=r"family_limit=3 needs shared.*no \d+ bytes.*RLIMIT_AS"):
        make_engine(tls_url, family_limit=3)
    engine = make_engine(tls_url, logger=events.logger)
    parent = Parent(engine, "in transaction")
    reason = events.the("family.private")["reason"]
    assert "bytes of shared memory" in reason and "Cannot allocate memory" in reason
    pool = pool_of(engine)

    def child() -> tuple[int, int]:
        raises_foreign(parent.connection)
        parent.connection.rollback()
        server_pid(parent.connection)
        used = pool.stats().used
        parent.connection.close()
        engine.dispose()
        return used, pool.stats().counters.checkouts

    assert run_in_child(child) == (1, 1)
    assert pool.family_stats().alive == 1
    parent.notices_nothing()


@pytest.mark.parametrize("left", [0, 1])
def test_a_named_family_without_descriptors_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """With one left its directory can be opened, and not its file."""
    monkeypatch.setenv(family_memory.DIRECTORY_VARIABLE, str(tmp_path))
    events = Events()
    with few_descriptors(left=left):
        pool = PidPool(lambda: None, family="shop", logger=events.logger)
    pool.log_waiting_events()
    assert "Too many open files" in events.the("family.private")["reason"]


def test_a_named_family_on_a_file_system_without_locks_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(family_memory.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(family_memory.fcntl, "flock", failing(errno.ENOLCK))
    events = Events()
    pool = PidPool(lambda: None, family="shop", logger=events.logger)
    pool.log_waiting_events()
    assert "can't be locked: No locks available" in events.the("family.private")["reason"]


@both_hows
@pytest.mark.usefixtures("table")
def test_a_child_at_its_limit_of_memory_does_its_parent_no_harm(
    tls_url: str, make_engine: MakeEngine, how: How
) -> None:
    engine = make_engine(tls_url, hold_warning=60, max_idle=60)
    parent = Parent(engine, "in transaction")

    def child() -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size, limit[1]))  # a thread's stack would be too much
        raises_foreign(parent.connection)
        parent.connection.rollback()
        try:
            server_pid(parent.connection)
        except (DBAPIError, MemoryError):
            parent.connection.rollback()
        resource.setrlimit(resource.RLIMIT_AS, limit)
        assert server_pid(parent.connection) != parent.server_pid
        parent.connection.close()
        engine.dispose()

    run_in_child(child, how=how)
    parent.notices_nothing()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("through", ["structlog", "logging"])
def test_a_full_disk_under_the_log_costs_lines_and_nothing_more(
    tls_url: str,
    make_engine: MakeEngine,
    capsys: pytest.CaptureFixture[str],
    through: str,
) -> None:
    with open("/dev/full", "w") as full:
        if through == "structlog":
            logger: Any = structlog.wrap_logger(
                structlog.WriteLogger(full),
                processors=[structlog.processors.JSONRenderer()],
                wrapper_class=structlog.make_filtering_bound_logger(0),
            )
        else:
            logger = logging.getLogger("pidpool.test_faults")
            logger.setLevel(logging.DEBUG)
            logger.propagate = False
            logger.addHandler(logging.StreamHandler(full))
        engine = make_engine(tls_url, logger=logger)
        parent = Parent(engine, "in transaction")

        def child() -> None:
            raises_foreign(parent.connection)
            parent.connection.rollback()
            assert server_pid(parent.connection) != parent.server_pid
            parent.connection.close()
            engine.dispose()

        run_in_child(child)
        parent.notices_nothing()
        engine.dispose()
        if through == "logging":
            logger.removeHandler(logger.handlers[0])
        with pytest.raises(OSError, match="No space left on device"):
            full.close()
    assert "No space left on device" in capsys.readouterr().err


WITHOUT_PROC = """
import os, subprocess, sys
sys.path.insert(0, "tests/support")
subprocess.run(["mount", "-t", "tmpfs", "none", "/proc"], check=True)
assert os.listdir("/proc") == []
from child import raises_foreign
from events import Events
from forking import run_in_child
from parent import Parent, server_pid
from sqlalchemy import create_engine, text
from pidpool import PidPool
from pidpool.forks import severing

events = Events()
options = {"family": "without-proc", "family_limit": 4, "hold_warning": 60, "logger": events.logger}
engine = create_engine(sys.argv[1], poolclass=PidPool, **options)
parent = Parent(engine, "in transaction")

def child():
    raises_foreign(parent.connection)
    parent.connection.rollback()
    assert server_pid(parent.connection) != parent.server_pid
    alive = engine.pool.family_stats().alive
    parent.connection.close()
    engine.dispose()
    return alive, [event["action"] for event in events.of("connection.inherited")]

for how in ("python", "c"):
    assert run_in_child(child, how=how) == (2, ["severed"])
assert engine.pool.family_stats().alive == 1
parent.notices_nothing()
engine.dispose()
"""


@pytest.mark.usefixtures("table")
def test_without_proc(tls_url: str, tmp_path: Path) -> None:
    """As in some containers and sandboxes."""
    command = ["unshare", "--mount", "--map-root-user", sys.executable, "-c", WITHOUT_PROC, tls_url]
    environment = {**os.environ, family_memory.DIRECTORY_VARIABLE: str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
