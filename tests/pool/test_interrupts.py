"""Exceptions that a signal handler raises in the middle of the pool, such as a soft time limit's."""

from __future__ import annotations

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
from sqlalchemy import exc

from pidpool import PidPool
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
