"""Checkouts that end in odd ways: a connection is in one place at a time, and the pool keeps its room."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from typing import Any

import pytest
from forking import How, fork, run_in_child
from sqlalchemy import event, exc
from sqlalchemy.pool import PoolProxiedConnection, QueuePool

from pidpool import PidPool
from pidpool.idle import IdleQueue

both_hows = pytest.mark.parametrize("how", ["python", "c"])
BOUND = 30.0


class Connection:
    """A connection of a driver that does nothing, except fail when it is told to."""

    def __init__(self, number: int, told: list[Any]) -> None:
        self.number = number
        self.told = told
        self.fails = False

    def _do(self, what: str) -> None:
        self.told.append((what, self.number))
        if self.fails:
            raise ValueError(what)

    def rollback(self) -> None:
        self._do("rollback")

    def commit(self) -> None:
        self._do("commit")

    def close(self) -> None:
        self._do("close")


class Driver:
    """Opens connections, and notes all that is done with them, in order."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.opened = 0
        self.fails = False

    def __call__(self) -> Connection:
        if self.fails:
            raise ValueError("connect")
        self.opened += 1
        self.told.append(("open", self.opened))
        return Connection(self.opened, self.told)


def held(checkout: PoolProxiedConnection) -> Any:
    return checkout.dbapi_connection


class Refused(Exception):
    pass


def test_a_failed_checkout_that_lives_on_does_not_return_anybody_elses() -> None:
    """The traceback of the error has it, for as long as somebody keeps that."""
    pool = PidPool(Driver(), pool_size=1, max_overflow=0, timeout=0)

    def refuse(*_: Any) -> None:
        raise Refused

    event.listen(pool, "checkout", refuse)
    with pytest.raises(Refused) as failed:
        pool.connect()
    event.remove(pool, "checkout", refuse)
    checkout = pool.connect()
    del failed
    gc.collect()
    assert pool.status() == (
        "Pool size: 1  Connections in pool: 0 Current Overflow: 0 Current Checked out connections: 1"
    )
    with pytest.raises(exc.TimeoutError):
        pool.connect()
    checkout.close()
    assert pool.checkedin() == 1


@pytest.mark.parametrize("ending", ["detach", "invalidate"])
def test_a_checkout_listener_may_end_the_checkout(ending: str) -> None:
    for pool_class in (QueuePool, PidPool):
        pool = pool_class(Driver(), pool_size=1, max_overflow=0)
        event.listen(pool, "checkout", lambda connection, record, checkout: getattr(checkout, ending)())
        checkout = pool.connect()
        assert checkout.is_detached
        assert checkout.is_valid == (ending == "detach")
        assert pool.checkedout() == 0


class Interrupted(BaseException):
    pass


def test_an_item_handed_to_a_thread_that_is_interrupted_goes_to_the_next() -> None:
    """As gevent's timeouts and kills do, a signal handler raises where a thread waits."""
    queue: IdleQueue[str] = IdleQueue(1)

    def interrupt(*_: Any) -> None:
        # What another thread that returns a connection does, one step before this one can go on.
        waiter = queue._waiters.popleft()
        waiter.hand("item")
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Interrupted):
            queue.get(True, BOUND)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert queue.get(False) == "item"
    assert not queue._waiters
