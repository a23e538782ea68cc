"""Exceptions that a signal handler raises in the middle of the pool, such as a soft time limit's."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from soak import SOAK
from sqlalchemy import create_engine, event, exc
from sqlalchemy.pool import Pool, PoolProxiedConnection

from pidpool import PidPool
from pidpool._sqlalchemy import entry_list
from pidpool._sqlalchemy.idle_queue import PATIENCE


class SoftTimeLimit(Exception):
    pass


@pytest.fixture
def interrupts() -> Iterator[None]:
    def handle(number: int, frame: object) -> None:
        raise SoftTimeLimit

    # The test's own time limit is this timer, too.
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    before = signal.signal(signal.SIGALRM, handle)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    signal.setitimer(signal.ITIMER_REAL, left)


class ClosedAtLast(sqlite3.Connection):
    """Closed when it is lost with an interrupt: Python 3.13 and later warn of one that is not."""

    def __del__(self) -> None:
        self.close()


@pytest.mark.usefixtures("interrupts")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a finalizer
def test_an_interrupted_close_leaves_no_thread_waiting_for_ever() -> None:
    """It may fall between taking the connection for a waiting thread and handing it over."""
    numbers = random.Random(1)
    interrupted = 0
    for _ in range(100):
        pool = PidPool(
            lambda: sqlite3.connect(":memory:", check_same_thread=False, factory=ClosedAtLast),
            pool_size=1,
            max_overflow=0,
            timeout=0.1,
            reset_on_return=None,
        )
        held = pool.connect()
        ended = threading.Event()

        def wait(pool: PidPool = pool, ended: threading.Event = ended) -> None:
            try:
                pool.connect().close()
            except exc.TimeoutError:
                pass  # the connection was lost with the interrupt
            finally:
                ended.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(PATIENCE + 0.003)  # from then on a connection is handed over
        try:
            signal.setitimer(signal.ITIMER_REAL, numbers.uniform(2e-6, 6e-5))
            held.close()
            time.sleep(0.0003)
        except SoftTimeLimit:
            interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert ended.wait(30), "a thread still waits, though pool_timeout is 0.1 s"
        waiting.join(30)
    assert interrupted


def test_a_connection_whose_close_is_interrupted_counts_as_closed() -> None:
    """As when a task of asyncio is cancelled that closes one."""

    class Interrupted(sqlite3.Connection):
        def close(self) -> None:
            super().close()
            raise KeyboardInterrupt

    pool = PidPool(lambda: sqlite3.connect(":memory:", factory=Interrupted), pool_size=1, max_overflow=0)
    checkout = pool.connect()
    with pytest.raises(KeyboardInterrupt):
        checkout.invalidate()
    counts = pool.stats().counters
    assert (counts.opened, counts.closed["invalidated"]) == (1, 1)
    assert pool.checkedout() == 0


def lose_at_checkin(pool: Pool, checkout: PoolProxiedConnection) -> None:
    """End a checkout, and interrupt it just before its entry goes back."""

    def interrupted(entry: object) -> None:
        del entry
        raise SoftTimeLimit

    pool._do_return_conn = interrupted  # type: ignore[method-assign]
    with contextlib.suppress(SoftTimeLimit):
        checkout.close()
    del pool._do_return_conn


@pytest.mark.parametrize("family_limit", [None, 1])
def test_a_connection_that_an_interrupt_loses_is_closed_though_a_cursor_keeps_it(
    family_limit: int | None,
) -> None:
    """As one of a statement that failed, in a cycle of the error's, until that is collected."""

    class Counted(sqlite3.Connection):
        closed = 0

        def close(self) -> None:
            Counted.closed += 1
            super().close()

    pool = PidPool(
        lambda: sqlite3.connect(":memory:", factory=Counted),
        pool_size=1,
        max_overflow=0,
        timeout=1,
        family_limit=family_limit,
    )
    checkout = pool.connect()
    cursor = checkout.cursor()
    cursor.close()
    lose_at_checkin(pool, checkout)
    pool.connect().close()
    counters = pool.stats().counters
    assert (Counted.closed, counters.opened, sum(counters.closed.values())) == (1, 2, 1)
    del cursor
    pool.dispose()


def test_an_error_of_an_earlier_connect_keeps_no_entry_that_an_interrupt_loses() -> None:
    engine = create_engine(
        "sqlite://",
        poolclass=PidPool,
        connect_args={"factory": ClosedAtLast},
        pool_size=1,
        max_overflow=0,
        pool_timeout=1,
    )
    is_down = []

    @event.listens_for(engine, "do_connect")
    def connect(*given: object) -> None:
        del given  # the application's own frames are left as they are
        if is_down:
            raise sqlite3.OperationalError("the server is down")

    checkout: Any = engine.raw_connection()
    checkout.invalidate()
    checkout.close()
    is_down.append(True)
    with pytest.raises(exc.OperationalError) as kept:
        engine.connect()
    is_down.clear()
    checkout = engine.raw_connection()
    lose_at_checkin(engine.pool, checkout)
    engine.connect().close()
    engine.dispose()
    del kept


def test_a_look_for_what_was_lost_takes_nothing_that_another_thread_has_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The collector clears weak references before it runs finalizers: until its finalizer has returned the
    entry, a checkout that is being collected looks lost."""
    engine = create_engine(
        "sqlite://",
        poolclass=PidPool,
        connect_args={"check_same_thread": False},
        pool_size=1,
        max_overflow=0,
        pool_timeout=5,
    )
    collecting, looked, used = threading.Event(), threading.Event(), threading.Event()

    class Slow:
        def __del__(self) -> None:
            collecting.set()
            looked.wait(30)

    def drop() -> None:
        cycle: list[Any] = [Slow(), engine.raw_connection()]
        cycle.append(cycle)
        del cycle
        gc.collect()

    def look() -> None:
        collecting.wait(30)
        engine.pool.checkedout()  # type: ignore[attr-defined]

    looking = threading.Thread(target=look)

    def switching_id(thing: object) -> int:
        if threading.current_thread() is looking and not looked.is_set():
            looked.set()
            used.wait(30)
        return id(thing)

    # A call, where CPython may switch to another thread. It can't be made to do so otherwise.
    monkeypatch.setattr(entry_list, "id", switching_id, raising=False)
    dropping = threading.Thread(target=drop)
    looking.start()
    dropping.start()
    dropping.join(30)
    with engine.connect() as connection:
        used.set()
        looking.join(30)
        assert connection.exec_driver_sql("select 1").scalar() == 1
    engine.dispose()


PROGRAM = Path(__file__).parent.parent / "programs" / "interrupts.py"
OPERATIONS = [
    *("checkout, idle", "checkout, opens", "checkout, recycles", "checkout, dead", "checkout, times out"),
    *("checkin", "checkin, overflow", "checkin, dead", "checkin, after dead", "drop", "drop, disposed"),
    *("invalidate", "invalidate, detached", "detach", "dispose"),
]


def harm(pool: str, *arguments: str, copies: str = "1") -> dict[str, Any]:
    """Return what the interrupts of `tests/programs/interrupts.py` did to a pool."""
    run = subprocess.run(
        [sys.executable, str(PROGRAM), pool, *arguments],
        env={**os.environ, "PIDPOOL_COPIES": copies},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@pytest.mark.soak
@pytest.mark.parametrize("copies", ["1", "0"])
@pytest.mark.parametrize("pool", ["PidPool"] + ["family_limit"] * SOAK)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_interrupt_at_any_bytecode_leaves_the_capacity_whole(
    operation: str, pool: str, copies: str
) -> None:
    """In short at each 13th bytecode, of long operations at fewer, with one error of four."""
    step = {"checkout, times out": 53, "dispose": 79}.get(operation, 13)
    form = ("--every",) if SOAK else ("--step", str(step))
    found = harm(pool, "--only", operation, *form, copies=copies)[operation]
    assert found["bytecodes"] > 100
    assert not found["harmful"]


def test_an_interrupt_of_a_drop_leaves_no_permit_taken() -> None:
    """Also if there is room for the next checkout, so that it waits for the permit alone."""
    found = harm("family_limit", "--only", "drop, disposed", "--step", "13")["drop, disposed"]
    assert found["bytecodes"] > 100
    assert not found["harmful"]


@pytest.mark.soak
@pytest.mark.parametrize("copies", ["1", "0"])
@pytest.mark.parametrize(
    "operation",
    ["child, first use", "child, first use, detached", "child, first use, in C", "child, detach"],
)
def test_an_interrupt_while_a_child_replaces_a_connection_leaves_the_capacity_whole(
    operation: str, copies: str
) -> None:
    """And the checkout can be used again."""
    form = ("--every",) if SOAK else ("--step", "17")
    found = harm("PidPool", "--only", operation, *form, copies=copies)[operation]
    assert found["bytecodes"] > 100
    assert not found["harmful"]


@pytest.mark.soak
@pytest.mark.parametrize("operation", ["fork", "child, forked"])
def test_an_interrupt_in_an_at_fork_hook_keeps_no_lock(operation: str) -> None:
    """CPython prints it, and the fork goes on."""
    form = ("--every",) if SOAK else ("--step", "13")
    found = harm("PidPool", "--only", operation, *form)[operation]
    assert found["bytecodes"] > 100
    assert not found["harmful"]


@pytest.mark.parametrize(
    ("operation", "functions"),
    [
        ("fork", ("hold", "_after_fork_in_parent", "release", "after_fork_in_parent")),
        ("child, forked", ("_after_fork_in_child", "renew", "release")),
        ("child, first use, in C", ("notice_fork", "renew", "_becomes_free")),
    ],
)
def test_an_interrupt_of_a_fork_keeps_no_lock_and_garbage_is_collected(
    operation: str, functions: tuple[str, ...]
) -> None:
    """At each bytecode of the functions that take and release the locks of log writers, or that have no
    garbage collected meanwhile."""
    found = harm("PidPool", "--only", operation, "--within", *functions)[operation]
    assert found["bytecodes"] > 100
    assert not found["harmful"]


@pytest.mark.soak
@pytest.mark.parametrize("copies", ["1", "0"])
@pytest.mark.parametrize("pool", ["watched", "echoing"])
def test_an_interrupt_leaves_the_capacity_of_a_pool_that_logs_whole(pool: str, copies: str) -> None:
    """What is logged, or is to be logged later, keeps neither an entry nor a connection."""
    operations = ("checkout, idle", "checkout, opens", "checkin", "drop", "invalidate", "detach")
    form = ("--every",) if SOAK else ("--step", "13")
    found = harm(pool, "--only", *operations, *form, copies=copies)
    assert not {name: each["harmful"] for name, each in found.items() if each["harmful"]}


@pytest.mark.soak
@pytest.mark.parametrize("operation", ["task, times out", "task, handed over"])
def test_an_interrupt_of_a_task_that_waits_leaves_the_capacity_whole(operation: str) -> None:
    form = ("--every",) if SOAK else ("--step", "7")
    found = harm("AsyncPidPool", "--only", operation, *form)[operation]
    assert found["bytecodes"] > 100
    assert not found["harmful"]


def test_an_interrupt_harms_a_queue_pool() -> None:
    """Otherwise the test above could not fail."""
    found = harm("QueuePool", "--only", "checkin", "--most", "2", "--step", "7")
    assert found["checkin"]["harmful"]
