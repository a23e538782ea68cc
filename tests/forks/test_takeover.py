"""What a child finds when it takes over: pools that come and go, entries that were lost and found, and a call
of the driver's that the fork fell into."""

from __future__ import annotations

import gc
import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from engines import MakeEngine
from forking import How, fork, run_in_child
from parent import Parent, server_pid
from sqlalchemy import create_engine, event, text

from pidpool import PidPool, tag_of
from pidpool.forks import detection

both_hows = pytest.mark.parametrize("how", ["python", "c"])


def copy_and_fork(cursor: Any, how: How, in_child: Callable[[], object]) -> None:
    """COPY three lines. In the middle fork a child that calls `in_child`, unwinds the driver's call, ends."""
    parent = os.getpid()

    class Lines(io.StringIO):
        reads = 0

        def read(self, size: int | None = -1) -> str:
            self.reads += 1
            if self.reads == 2:
                child = fork(how)
                if child == 0:
                    in_child()
                    raise ZeroDivisionError
                assert os.waitpid(child, 0)[1] == 0
            return "line\n" if self.reads < 4 else ""

    cursor.execute("create temp table copied (line text)")
    try:
        cursor.copy_expert("copy copied from stdin", Lines())
    except BaseException:
        if os.getpid() != parent:
            os._exit(0)
        raise


@pytest.mark.usefixtures("clean_log")
@pytest.mark.parametrize("dropped", [False, True], ids=["held", "dropped first"])
@pytest.mark.parametrize("inherited_sockets", ["sever", "keep"])
@both_hows
def test_a_copy_in_flight_is_the_parents(
    tls_url: str, make_engine: MakeEngine, how: How, inherited_sockets: str, dropped: bool
) -> None:
    """The child unwinds the driver's call, and would end the COPY on its parent's socket."""
    engine = make_engine(tls_url, inherited_sockets=inherited_sockets)
    connection = engine.raw_connection()
    cursor = connection.cursor()
    cursor.execute("select pg_backend_pid()")
    pid_before = cursor.fetchone()

    def drop_or_look() -> None:
        nonlocal connection
        if dropped:
            cycle: list[Any] = [connection]
            cycle.append(cycle)
            del cycle, connection
            gc.collect()
        else:
            engine.pool.status()

    copy_and_fork(cursor, how, drop_or_look)
    cursor.execute("select count(*), pg_backend_pid() from copied")
    assert cursor.fetchone() == (3, *pid_before)  # type: ignore[misc]
    connection.commit()
    connection.close()


@pytest.mark.usefixtures("clean_log")
@pytest.mark.parametrize("name", ["connect", "first_connect", "checkin", "close"])
@both_hows
def test_a_copy_of_a_listener_between_checkouts_is_the_parents(
    tls_url: str, make_engine: MakeEngine, how: How, name: str
) -> None:
    """The connection is checked out by nobody, and a call of the driver's is in flight all the same."""
    engine = make_engine(tls_url, inherited_sockets="keep")
    found: list[Any] = []

    def copy(connection: Any, *_: Any) -> None:
        cursor = connection.cursor()
        copy_and_fork(cursor, how, engine.pool.status)
        cursor.execute("select count(*) from copied")
        found.append(cursor.fetchone())
        connection.commit()

    event.listen(engine.pool, name, copy)
    engine.raw_connection().close()
    engine.dispose()
    assert found == [(3,)]


@pytest.mark.usefixtures("table", "clean_log")
def test_kept_descriptors_of_connections_that_rest_are_left_alone(
    tls_url: str, make_engine: MakeEngine
) -> None:
    parent = Parent(make_engine(tls_url, inherited_sockets="keep"), "in transaction")
    stats = run_in_child(lambda: parent.engine.pool.stats().counters)  # type: ignore[attr-defined]
    assert (stats.kept, stats.severed) == (1, 0)
    parent.notices_nothing()


@pytest.mark.usefixtures("table", "clean_log")
def test_engines_come_and_go_in_other_threads_while_one_forks(
    tls_url: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = Parent(make_engine(tls_url), "in transaction")
    pool = parent.engine.pool
    assert isinstance(pool, PidPool)
    raised: list[Any] = []  # what an at-fork hook raises is only reported here
    monkeypatch.setattr(sys, "unraisablehook", lambda report: raised.append(report.exc_value))
    ended = threading.Event()

    def make_engines() -> None:
        while not ended.is_set():
            for _ in range(5):
                assert create_engine("sqlite://", poolclass=PidPool).pool is not None

    interval = sys.getswitchinterval()
    makers = [threading.Thread(target=make_engines) for _ in range(2)]
    kept = [create_engine("sqlite://", poolclass=PidPool).pool for _ in range(300)]
    sys.setswitchinterval(1e-5)  # so that the threads come between the steps of a hook
    try:
        for maker in makers:
            maker.start()
        for _ in range(30):
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        for maker in makers:
            maker.join(30)
    assert not raised
    assert pool.stats().counters.forks == 30
    assert len(kept) == 300
    parent.notices_nothing()


@both_hows
@pytest.mark.usefixtures("table", "clean_log")
def test_an_entry_that_was_collected_in_a_cycle_is_inherited(
    tls_url: str, make_engine: MakeEngine, how: How
) -> None:
    """Its checkout resurrects it: the garbage collector has taken it off every list by then."""
    engine = make_engine(tls_url, pool_size=1, max_overflow=0, pool_timeout=5)
    pool = engine.pool
    assert isinstance(pool, PidPool)

    def lose_in_a_cycle() -> None:
        checkout = engine.connect().connection
        checkout._connection_record.invalidate()  # type: ignore[attr-defined]
        cycle: list[Any] = [checkout]
        cycle.append(cycle)

    lose_in_a_cycle()
    gc.collect()
    assert len(pool.records()) == pool.checkedin() == 1
    parent = Parent(engine, "in transaction")
    before = pool.stats()

    def child() -> int:
        parent.connection.invalidate()
        assert (pool.checkedout(), pool.checkedin()) == (0, 0)
        with engine.connect() as own:
            pid = server_pid(own)
        assert (pool.checkedout(), pool.checkedin()) == (0, 1)
        parent.connection.close()
        engine.dispose()
        return pid

    assert run_in_child(child, how=how) != parent.server_pid
    after = pool.stats()
    assert (after.counters.checkins, after.used) == (before.counters.checkins, before.used)
    parent.notices_nothing()


def test_a_negative_max_overflow_is_no_limit() -> None:
    engine = create_engine(
        "sqlite:///file:?mode=memory&uri=true", poolclass=PidPool, pool_size=1, max_overflow=-3
    )
    connections = [engine.connect() for _ in range(4)]
    assert [connection.scalar(text("select 1")) for connection in connections] == [1, 1, 1, 1]
    for connection in connections:
        connection.close()
    assert engine.pool.recreate()._max_overflow == -1  # type: ignore[attr-defined]
    engine.dispose()


class Resource:
    """A driver's connection with a socket, and a destructor that must not run in a child."""

    destroyed: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self._socket, self._other_end = socket.socketpair()

    def fileno(self) -> int:
        return self._socket.fileno()

    def rollback(self) -> None: ...

    def close(self) -> None:
        self._socket.close()
        self._other_end.close()

    def __del__(self) -> None:
        self.destroyed.append(os.getpid())


@pytest.mark.parametrize("state", ["idle", "checked out", "detached"])
@pytest.mark.parametrize("inherited_sockets", ["sever", "keep"])
def test_a_child_that_drops_a_pool_before_it_uses_it_destroys_no_connection(
    state: str, inherited_sockets: str
) -> None:
    """Most is left to the first use of a pool, which never comes here; the hook itself severs."""
    pool: Any = PidPool(Resource, inherited_sockets=inherited_sockets)
    checkout = pool.connect()
    tag = tag_of(checkout)
    assert tag is not None and tag.fd is not None
    if state == "detached":
        checkout.detach()
    elif state == "idle":
        checkout.close()
    kept = [pool, checkout]
    del pool, checkout

    def child() -> tuple[bool, list[int]]:
        assert tag.fd is not None
        is_severed = os.fstat(tag.fd).st_ino != tag.socket_inode
        cycle: list[Any] = kept[:]
        cycle.append(cycle)
        kept.clear()
        del cycle
        gc.collect()
        return is_severed, Resource.destroyed

    # This driver can't say that no call of it is in flight.
    assert run_in_child(child) == (inherited_sockets == "sever" or state != "idle", [])
    pool, checkout = kept
    if state == "detached":
        checkout.dbapi_connection.close()
    checkout.close()
    pool.dispose()
    kept.clear()
    del pool, checkout
    gc.collect()
    assert Resource.destroyed.pop() == os.getpid()


def _use_after_a_fork() -> tuple[bool, int, int, int]:
    pool: Any = PidPool(Resource)
    first, second = pool.connect(), pool.connect()
    first.close()

    def child() -> tuple[bool, int, int, int]:
        was_left = detection.is_hooked()
        counters = pool.stats().counters
        return was_left, counters.adoptions["hook"], counters.severed, counters.inherited["idle"]

    counted: tuple[bool, int, int, int] = run_in_child(child)
    second.close()
    pool.dispose()
    return counted


def test_what_a_hook_severed_is_counted_at_the_first_use_of_the_pool() -> None:
    # In a child, whose parent is this process with whatever connections other tests have left.
    assert run_in_child(_use_after_a_fork) == (True, 1, 2, 1)


def _use_in_the_hook() -> dict[str, int]:
    pool: Any = PidPool(Resource)
    checkout = pool.connect()

    def use(is_alone: bool) -> bool:
        pool.connect().close()
        return True

    detection.register_hook_callback(use)
    counted: dict[str, int] = run_in_child(lambda: dict(pool.stats().counters.adoptions))
    checkout.close()
    pool.dispose()
    return counted


def test_a_use_in_the_middle_of_the_hook_counts_as_the_hooks() -> None:
    """As a finalizer's, or a signal handler's."""
    assert run_in_child(_use_in_the_hook) == {"hook": 1, "lazy": 0}


USED_BY_AN_EARLIER_HOOK = """
import os, sys

def use():
    engine.connect().close()

os.register_at_fork(after_in_child=use)
from sqlalchemy import create_engine, text
from pidpool import PidPool

engine = create_engine(sys.argv[1], poolclass=PidPool)
connection = engine.connect()
pid = os.fork()
if pid == 0:
    assert engine.pool.checkedin() == 1
    engine.connect().execute(text("select 1"))
    sys.exit(len(engine.pool.records()) != 1)
assert os.waitpid(pid, 0)[1] == 0
connection.execute(text("select 1"))
"""


@pytest.mark.usefixtures("clean_log")
def test_a_pool_may_be_used_in_a_hook_that_runs_before_its_own(tls_url: str) -> None:
    """One that was registered before pidpool was imported: what is owned is the child's by then."""
    subprocess.run([sys.executable, "-c", USED_BY_AN_EARLIER_HOOK, tls_url], check=True, timeout=60)
