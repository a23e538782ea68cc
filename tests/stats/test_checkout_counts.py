"""Checkouts that end in odd ways: a connection is in one place at a time, and the pool keeps its room."""

from __future__ import annotations

import gc
import os
import signal
import threading
from typing import Any

import pytest
from forking import How, fork, has_ended, run_in_child
from sqlalchemy import event, exc
from sqlalchemy.pool import PoolProxiedConnection, QueuePool
from sqlalchemy.util.queue import Empty
from waiting import until

from pidpool import PidPool
from pidpool._sqlalchemy.idle_queue import IdleQueue

both_hows = pytest.mark.parametrize("how", ["python", "c"])
BOUND = 30.0


class Connection:
    """A connection of a driver that does nothing, and fails if `fails` is set."""

    def __init__(self, number: int, calls: list[Any]) -> None:
        self.number = number
        self.calls = calls
        self.fails = False

    def _do(self, what: str) -> None:
        self.calls.append((what, self.number))
        if self.fails:
            raise ValueError(what)

    def rollback(self) -> None:
        self._do("rollback")

    def commit(self) -> None:
        self._do("commit")

    def close(self) -> None:
        self._do("close")


class Driver:
    """Opens connections, and records in order what is done with them."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.opened = 0
        self.fails = False

    def __call__(self) -> Connection:
        if self.fails:
            raise ValueError("connect")
        self.opened += 1
        self.calls.append(("open", self.opened))
        return Connection(self.opened, self.calls)


def held(checkout: PoolProxiedConnection) -> Any:
    return checkout.dbapi_connection


class Refused(Exception):
    pass


def test_a_failed_checkout_that_lives_on_does_not_return_anybody_elses() -> None:
    """The error's traceback refers to it, as long as the error is kept."""
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
        # As another thread does that returns a connection, one step before this one can go on.
        queue._waiters.popleft()().inbox.append("item")
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


def test_an_item_comes_back_while_a_thread_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits no more, and is on the list still."""
    queue: IdleQueue[str] = IdleQueue(1)
    forget = queue._forget

    def come_back(reference: Any) -> None:
        monkeypatch.undo()
        queue.put("item")
        forget(reference)

    monkeypatch.setattr(queue, "_forget", come_back)
    with pytest.raises(Empty):
        queue.get(True, 0)
    assert queue.get(False) == "item"


@both_hows
@pytest.mark.parametrize("timeout", [None, BOUND])
def test_a_child_forked_by_a_handler_in_a_waiting_thread_goes_on_with_its_own(
    timeout: float | None, how: How
) -> None:
    driver = Driver()
    pool = PidPool(driver, pool_size=1, max_overflow=0, timeout=timeout)
    checkout = pool.connect()
    own = os.getpid()
    reader, writer = os.pipe()
    children: list[int] = []

    def let_in() -> None:
        until(lambda: pool.stats().waiting == 1, "the thread does not wait")
        os.kill(own, signal.SIGUSR1)

    def handle(*_: Any) -> None:
        # The child returns from here into the wait that its parent was in.
        pid = fork(how)
        if pid:
            children.append(pid)
            checkout.close()
        elif how == "c":
            pool.status()

    before = signal.signal(signal.SIGUSR1, handle)
    thread = threading.Thread(target=let_in)
    thread.start()
    try:
        again = pool.connect()
        if os.getpid() != own:
            os.write(writer, b"1" if driver.opened == 2 and pool.checkedout() == 1 else b"0")
    finally:
        if os.getpid() != own:
            os._exit(0)
        signal.signal(signal.SIGUSR1, before)
        thread.join(BOUND)
        os.close(writer)
    assert held(again).number == 1
    child = children[0]
    try:
        until(lambda: has_ended(child), "the child waits for a connection of its parent's", 10)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.read(reader, 1) == b"1"
    os.close(reader)
    assert pool.stats().waiting == 0
    again.close()
    assert pool.stats().counters.checkins == 2


def test_a_child_that_fails_to_open_what_its_parent_began_has_no_more_room() -> None:
    driver = Driver()
    pool = PidPool(driver, pool_size=1, max_overflow=0, timeout=0)

    own = os.getpid()
    answers: list[Any] = []

    def open_and_fork() -> Connection:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            answers.append(writer)
            raise ValueError("in the child")
        os.close(writer)
        answers.append(os.read(reader, 10))
        os.close(reader)
        os.waitpid(pid, 0)
        return driver()

    pool._creator = open_and_fork
    try:
        pool.connect().close()
    except ValueError:
        pass
    finally:
        if os.getpid() != own:
            os.write(answers[0], str(pool.checkedout()).encode())
            os._exit(0)
    assert answers == [b"0"]


@both_hows
def test_a_childs_entries_give_their_slots_back(how: How) -> None:
    pool = PidPool(Driver(), pool_size=1, max_overflow=3)
    pool.connect().close()

    def come_and_go() -> list[int]:
        overflow = []
        for _ in range(5):
            checkouts = [pool.connect() for _ in range(4)]
            while checkouts:
                checkouts.pop().close()
            overflow.append(pool.stats().overflow)
        return [*overflow, pool.stats().counters.checkins, len(pool.stats().connections)]

    assert run_in_child(come_and_go, how=how) == [0, 0, 0, 0, 0, 20, 1]
    assert come_and_go() == [0, 0, 0, 0, 0, 21, 1]


def test_a_dropped_checkout_comes_back_beside_a_queuepools_own() -> None:
    """SQLAlchemy 2.0 keeps a dict of the checkouts of all pools."""
    other, pool = QueuePool(Driver()), PidPool(Driver(), pool_size=1, max_overflow=0, timeout=0)
    checkout_of_other = other.connect()
    checkout = pool.connect()
    number = held(checkout).number
    del checkout
    gc.collect()
    assert held(pool.connect()).number == number
    checkout_of_other.close()
