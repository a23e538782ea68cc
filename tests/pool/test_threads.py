"""Forks in processes with threads: whatever another thread is doing, neither the child nor the fork hangs,
and the pool's own limits hold."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
import pytest
from engines import MakeEngine, pool_of
from events import Events
from forking import How, run_in_child
from parent import Parent, server_pid
from sqlalchemy import Engine, text
from sqlalchemy.exc import TimeoutError as CheckoutTimeoutError
from waiting import until

from pidpool import tag_of
from pidpool.forks import detection, gate
from pidpool.forks.gate import Passage
from pidpool.tools.demo.postgres import EmbeddedPostgres

pytestmark = pytest.mark.usefixtures("clean_log")
both_hows = pytest.mark.parametrize("how", ["python", "c"])
BOUND = 30.0


@contextmanager
def threads(count: int, work: Callable[[int], None]) -> Iterator[None]:
    """Run `work(number)` in so many threads; the body may let them go on as long as it needs."""
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        for thread in running:
            thread.join(BOUND)
    assert not any(thread.is_alive() for thread in running)
    assert failures == []


def use(engine: Engine) -> int:
    with engine.connect() as connection:
        return server_pid(connection)


def use_and_leave(engine: Engine) -> int:
    number = use(engine)
    engine.dispose()
    gc.collect()
    return number


def test_forks_while_threads_use_the_pool(tls_url: str, make_engine: MakeEngine) -> None:
    engine = make_engine(tls_url, pool_size=3, max_overflow=0, pool_timeout=BOUND)
    stop = threading.Event()
    turns = [0] * 8
    seen: set[int] = set()

    def work(number: int) -> None:
        while not stop.is_set():
            seen.add(use(engine))
            turns[number] += 1

    with threads(8, work):
        try:
            children = {run_in_child(use_and_leave, engine) for _ in range(15)}
        finally:
            stop.set()
    assert len(children) == 15 and not children & seen
    assert len(seen) == 3 and all(turns)
    assert engine.pool.checkedout() == 0


def five_sleep(engine: Engine) -> bool:
    """Return whether five threads wait, each past its first short sleep, after which it looks again."""
    pool = pool_of(engine)
    waiters = list(pool._pool._waiters)  # type: ignore[attr-defined]
    return pool.stats().waiting == 5 and all(waiter().is_due for waiter in waiters)


def test_forks_in_c_while_threads_use_the_pool(tls_url: str, make_engine: MakeEngine) -> None:
    """Threads that wait, on the pool or with a checkout: one that wanted the interpreter's own lock at the
    fork would make any child hang that was forked in C without PyOS_AfterFork_Child()."""
    engine = make_engine(tls_url, pool_size=3, max_overflow=0, pool_timeout=BOUND)
    stop = threading.Event()
    out = threading.Barrier(4, timeout=BOUND)
    turns: list[int] = []

    def work(number: int) -> None:
        with engine.connect() as connection:
            own = server_pid(connection)
            if number < 3:
                out.wait()
                assert stop.wait(BOUND)
            assert server_pid(connection) == own
            turns.append(own)

    with threads(3, work):
        try:
            out.wait()
            with threads(5, lambda number: work(number + 3)):
                until(lambda: five_sleep(engine), "not all five wait in the pool")
                children = {run_in_child(use_and_leave, engine, how="c") for _ in range(10)}
                stop.set()
        finally:
            stop.set()
    assert len(children) == 10 and not children & set(turns)
    assert len(turns) == 8 and len(set(turns)) == 3


class SlowCreator:
    """Opens connections, in the parent not before `go_on` is set."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.dsn = postgres.url(tls=True, driver="postgresql")
        self.owner = os.getpid()

    def __call__(self) -> Any:
        self.begun.set()
        if os.getpid() == self.owner:
            assert self.go_on.wait(BOUND)
        return psycopg2.connect(self.dsn)


def test_a_fork_waits_for_the_first_connect_of_another_thread(
    postgres: EmbeddedPostgres, make_engine: MakeEngine
) -> None:
    creator = SlowCreator(postgres)
    events = Events()
    engine = make_engine("postgresql+psycopg2://", creator=creator, logger=events.logger)
    forked = threading.Event()

    def connect(number: int) -> None:
        use(engine)
        assert not forked.is_set()

    def let_go(number: int) -> None:
        until(lambda: detection._gate.forking, "the fork does not wait at the gate")
        creator.go_on.set()

    with threads(1, connect):
        assert creator.begun.wait(BOUND)
        with threads(1, let_go):
            adopted = run_in_child(use_and_return_adoption, engine, events)
            forked.set()
    assert adopted["connects_in_flight"] == 0
    assert adopted["idle"] + adopted["checked_out"] == 1  # the connect was over


def use_and_return_adoption(engine: Engine, events: Events) -> dict[str, Any]:
    """Use the pool in a child; return its event `pool.adopted`."""
    use_and_leave(engine)
    return events.the("pool.adopted")


@both_hows
def test_a_fork_waits_no_longer_than_its_bound_and_says_so(
    postgres: EmbeddedPostgres, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, how: How
) -> None:
    """The connect in flight is the first one: the child's own must not wait for its mutex."""
    monkeypatch.setattr(gate, "CONNECT_WAIT", 0.3)
    creator = SlowCreator(postgres)
    events = Events()
    engine = make_engine("postgresql+psycopg2://", creator=creator, logger=events.logger)
    with threads(1, lambda number: use(engine) and None):
        try:
            assert creator.begun.wait(BOUND)
            begun = time.monotonic()
            adopted = run_in_child(use_and_return_adoption, engine, events, how=how)
            assert how == "c" or time.monotonic() - begun >= 0.3
        finally:
            creator.go_on.set()
    assert adopted["connects_in_flight"] == 1
    assert adopted["trigger"] == {"python": "hook", "c": "lazy"}[how]
    assert use(engine) > 0


@both_hows
def test_a_first_connect_in_flight_leaves_no_mutex_behind(
    postgres: EmbeddedPostgres, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, how: How
) -> None:
    """Held in the middle of SQLAlchemy's once-only initialisation, with the mutex taken."""
    monkeypatch.setattr(gate, "CONNECT_WAIT", 0.2)
    engine = make_engine(postgres.url(tls=True))
    inside, go_on = threading.Event(), threading.Event()
    owner = os.getpid()
    initialize = engine.dialect.initialize

    def slow(connection: Any) -> None:
        inside.set()
        if os.getpid() == owner:
            assert go_on.wait(BOUND)
        initialize(connection)

    monkeypatch.setattr(engine.dialect, "initialize", slow)

    def child() -> tuple[Any, ...]:
        use(engine)
        version = engine.dialect.server_version_info
        engine.dispose()
        return version

    with threads(1, lambda number: use(engine) and None):
        try:
            assert inside.wait(BOUND)
            version = run_in_child(child, how=how)
        finally:
            go_on.set()
    assert version == engine.dialect.server_version_info


def test_a_thread_that_forks_in_its_own_creator_does_not_wait_for_itself(
    tls_url: str, make_engine: MakeEngine
) -> None:
    codes = []

    def creator() -> Any:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        codes.append(os.waitpid(pid, 0)[1])
        return psycopg2.connect(tls_url.replace("+psycopg2", ""))

    engine = make_engine("postgresql+psycopg2://", creator=creator)
    begun = time.monotonic()
    use(engine)
    assert codes == [0]
    assert time.monotonic() - begun < gate.CONNECT_WAIT


def test_connecting_threads_that_fork_do_not_wait_for_each_other(
    tls_url: str, make_engine: MakeEngine
) -> None:
    inside = threading.Barrier(4, timeout=BOUND)

    def creator() -> Any:
        inside.wait()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        return psycopg2.connect(tls_url.replace("+psycopg2", ""))

    engine = make_engine("postgresql+psycopg2://", creator=creator)
    engine.dialect.initialize = lambda connection: None  # otherwise the first connects alone
    begun = time.monotonic()
    with threads(4, lambda number: use(engine) and None):
        pass
    assert time.monotonic() - begun < gate.CONNECT_WAIT


def test_a_connect_waits_until_a_fork_is_over(tls_url: str, make_engine: MakeEngine) -> None:
    engine = make_engine(tls_url)
    connected, waiting = threading.Event(), threading.Event()

    def connect(number: int) -> None:
        waiting.set()
        use(engine)
        connected.set()

    fork = threading.get_ident(), 0
    detection._gate.before_fork(fork)  # as os.fork() does in this thread
    with threads(1, connect):
        try:
            assert waiting.wait(BOUND)
            assert not connected.wait(0.3)
        finally:
            detection._gate.after_fork_in_parent(fork)
    assert connected.is_set()


@both_hows
def test_a_fork_in_a_signal_handler_wherever_the_pool_is(
    tls_url: str, make_engine: MakeEngine, how: How
) -> None:
    """The thread that forks may itself be in the middle of the pool, its locks held."""
    engine = make_engine(tls_url, pool_size=1, max_overflow=0, pool_timeout=BOUND)
    number = use(engine)
    children: list[int] = []

    def handle(signal_number: int, frame: object) -> None:
        children.append(run_in_child(use_and_leave, engine, how=how))
        if len(children) < 10:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.001)  # of this process's own time

    before = signal.signal(signal.SIGVTALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.001)
        deadline = time.monotonic() + BOUND
        while len(children) < 10:
            assert use(engine) == number
            assert time.monotonic() < deadline
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert len(children) == len({number, *children}) - 1 == 10


@both_hows
@pytest.mark.usefixtures("table")
def test_checkouts_of_other_threads_are_inherited_as_checkouts(
    tls_url: str, make_engine: MakeEngine, how: How
) -> None:
    events = Events()
    engine = make_engine(tls_url, logger=events.logger)
    ready = threading.Barrier(4, timeout=BOUND)
    done = threading.Event()
    kept: dict[int, tuple[int, Any]] = {}

    def work(number: int) -> None:
        with engine.connect() as connection:
            own = server_pid(connection)
            kept[own] = (connection.scalar(text("select txid_current()")), tag_of(connection))
            ready.wait()
            assert done.wait(BOUND)
            assert server_pid(connection) == own
            assert connection.scalar(text("select txid_current()")) == kept[own][0]
            connection.commit()

    with threads(3, work):
        try:
            ready.wait()
            parent = Parent(engine, "in transaction")
            adopted = run_in_child(use_and_return_adoption, engine, events, how=how)
        finally:
            done.set()
        parent.notices_nothing()
    assert (adopted["idle"], adopted["checked_out"], adopted["in_transaction"]) == (0, 4, 4)


@pytest.mark.usefixtures("table")
def test_threads_of_a_child_share_its_pool(tls_url: str, make_engine: MakeEngine) -> None:
    """Three threads have all its connections, five wait for one of these three."""
    engine = make_engine(tls_url, pool_size=2, max_overflow=1, pool_timeout=BOUND)
    parent = Parent(engine, "in transaction")

    def child() -> tuple[list[int], list[int]]:
        parent.connection = None
        out = threading.Barrier(4, timeout=BOUND)
        go_on = threading.Event()
        first: list[int] = []
        later: list[int] = []

        def hold(number: int) -> None:
            with engine.connect() as connection:
                first.append(server_pid(connection))
                out.wait()
                assert go_on.wait(BOUND)

        with threads(3, hold):
            try:
                out.wait()
                with threads(5, lambda number: later.append(use(engine))):
                    try:
                        until(lambda: pool_of(engine).stats().waiting == 5, "not all five wait in the pool")
                        assert later == []
                    finally:
                        go_on.set()
            finally:
                go_on.set()
        engine.dispose()
        return first, later

    first, later = run_in_child(child)
    assert len(set(first)) == 3 and parent.server_pid not in first
    assert len(later) == 5 and set(later) <= set(first)
    parent.notices_nothing()


def test_the_pools_limits_are_exact_with_64_threads(tls_url: str, make_engine: MakeEngine) -> None:
    engine = make_engine(tls_url, pool_size=4, max_overflow=3, pool_timeout=BOUND)
    lock = threading.Lock()
    full = threading.Event()
    out = most = 0

    def work(number: int) -> None:
        nonlocal out, most
        for _ in range(10):
            with engine.connect():
                with lock:
                    out += 1
                    most = max(most, out)
                    if out == 7:
                        full.set()
                assert full.wait(BOUND)
                with lock:
                    out -= 1

    with threads(64, work):
        pass
    assert most == 7
    assert (engine.pool.checkedout(), engine.pool.checkedin()) == (0, 4)
    assert engine.pool.overflow() == 0
    every = [engine.connect() for _ in range(7)]
    engine.pool._timeout = 0
    with pytest.raises(CheckoutTimeoutError, match="size 4 overflow 3 reached"):
        engine.connect()
    for connection in every:
        connection.close()


@both_hows
def test_a_child_forked_inside_a_creator_leaves_the_parents_gate_alone(tls_url: str, how: How) -> None:
    gate, passage = detection._gate, Passage()
    gate.enter_connect(passage)
    try:
        run_in_child(detection.leave_connect, gate, passage, how=how, life=10)
        assert gate.in_flight(0) == 1
    finally:
        detection.leave_connect(gate, passage)
    assert not gate.connecting
