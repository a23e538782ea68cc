"""`family_limit`: no more connections than that in all processes together, and none starves for it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import MakeEngine
from events import Events
from forking import run_in_child
from killing import trace_opcodes
from soak import SOAK
from sqlalchemy import create_engine, exc, text
from sqlalchemy.ext.asyncio import create_async_engine
from waiting import until

from pidpool import AsyncPidPool, PidPool
from pidpool.events.pool_events import PoolEvents
from pidpool.stats import budget as budget_module
from pidpool.stats.process_counters import PERMITS, PID
from pidpool.tools.demo.postgres import EmbeddedPostgres


class Connection:
    def rollback(self) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def child(function: Callable[[Callable[[], None]], Any]) -> Iterator[int]:
    """Fork a child that calls `function(ready)`, then sleeps until it is killed; give its pid when ready."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            function(lambda: os.write(writer, b"x") and None)
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"x"
        yield pid
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def permits(pool: PidPool) -> int:
    """Return the permits of this process, as its cell has them."""
    return int(pool.pool_events.counters.cells[PERMITS])


def permits_of_all(pool: PidPool) -> int:
    """Return the permits of all processes that run, at one moment: none is taken or given back meanwhile."""
    family, found = pool.pool_events.family, []

    def add_up() -> None:
        found.append(sum(int(block[PERMITS]) for block in family.blocks() if family.is_alive(block)))

    assert family._lock.run(30, add_up)
    return found[0]


def fill(pool: PidPool, count: int) -> None:
    """Open so many connections and leave them idle."""
    held = [pool.connect() for _ in range(count)]
    for each in held:
        each.close()


# -- permits are exact


def test_one_process_has_no_more_than_the_limit() -> None:
    pool = PidPool(Connection, pool_size=5, max_overflow=5, timeout=0.1, family_limit=3)
    held = [pool.connect() for _ in range(3)]
    started = time.monotonic()
    with pytest.raises(exc.TimeoutError, match="family_limit of 3 reached"):
        pool.connect()
    assert 0.1 <= time.monotonic() - started < 5
    assert (pool.checkedout(), permits(pool), pool.stats().waiting) == (3, 3, 0)
    held.pop().close()
    pool.connect().close()
    for each in held:
        each.close()
    assert permits(pool) == pool.checkedin() == 3


def test_a_waiting_thread_gets_what_its_own_process_returns() -> None:
    pool = PidPool(Connection, pool_size=5, timeout=20, family_limit=1)
    held = pool.connect()
    got: list[float] = []

    def wait() -> None:
        connection = pool.connect()
        got.append(time.monotonic())
        connection.close()

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: pool.stats().waiting == 1, "the thread does not wait")
    returned = time.monotonic()
    held.close()
    thread.join(20)
    assert got[0] - returned < 0.5
    assert pool.stats().counters.opened == 1


def test_every_way_to_lose_a_connection_gives_its_permit_back(tls_url: str, make_engine: MakeEngine) -> None:
    engine = make_engine(tls_url, pool_size=1, max_overflow=3, pool_timeout=2, family_limit=3)
    pool = engine.pool
    assert isinstance(pool, PidPool)
    first, second = engine.connect(), engine.connect()
    assert permits(pool) == 2
    second.invalidate()
    assert permits(pool) == 1
    second.rollback()
    second.execute(text("select 1"))  # opened anew
    assert permits(pool) == 2
    first.close()
    second.close()  # overflow
    assert permits(pool) == 1
    detached = engine.connect()
    detached.detach()
    assert permits(pool) == 1  # it stays with the connection
    detached.close()
    assert permits(pool) == 0
    engine.connect().close()
    pool._recycle = 0
    time.sleep(0.01)
    engine.connect().close()
    assert permits(pool) == 1 and pool.stats().counters.closed["recycled"] == 1
    pool._recycle = -1
    dropped = engine.raw_connection()
    dropped.detach()
    del dropped
    assert permits(pool) == 0
    invalidated = engine.raw_connection()
    invalidated.detach()
    kept = invalidated.dbapi_connection  # as a cycle of the error's does
    invalidated.invalidate()
    assert permits(pool) == 0 and kept is not None and kept.closed
    assert pool.stats().counters.closed["detached"] == 2
    engine.connect().close()
    engine.dispose()
    assert permits(pool) == 0
    held = [engine.connect() for _ in range(3)]
    assert permits(pool) == 3
    for each in held:
        each.close()


def test_a_connect_that_fails_gives_its_permit_back() -> None:
    def fail() -> Any:
        raise OSError("no server")

    pool = PidPool(fail, family_limit=1, timeout=1)
    for _ in range(3):
        with pytest.raises(OSError, match="no server"):
            pool.connect()
    assert permits(pool) == 0


def test_a_connect_event_that_fails_gives_its_permit_back(tls_url: str, make_engine: MakeEngine) -> None:
    from sqlalchemy import event

    engine = make_engine(tls_url, family_limit=1, pool_timeout=1)
    engine.connect().close()
    engine.dispose()

    def fail(*_: object) -> None:
        raise RuntimeError("not this one")

    event.listen(engine, "connect", fail)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="not this one"):
            engine.connect()
    event.remove(engine, "connect", fail)
    engine.connect().close()
    assert permits(engine.pool) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("when", ["at first", "to reconnect"])
def test_a_creator_that_forks_leaves_the_child_with_a_permit_of_its_own(when: str) -> None:
    """And with one connection: the one that was opened for the parent's entry is closed."""
    forked: list[int] = []
    opened: list[OneOfMany] = []

    class OneOfMany(Connection):
        is_open = True

        def close(self) -> None:
            self.is_open = False

    def create() -> Connection:
        if not forked and (when == "at first" or opened):
            forked.append(os.fork())
        opened.append(OneOfMany())
        return opened[-1]

    pool = PidPool(create, family_limit=2, timeout=10)
    if when == "to reconnect":
        pool.connect().invalidate()
        assert permits(pool) == 0
    connection = pool.connect()
    found = permits(pool), sum(each.is_open for each in opened), pool.checkedout()
    if forked == [0]:
        os._exit(0 if found == (1, 1, 1) else 1)
    assert os.waitpid(forked[0], 0)[1] == 0
    assert found == (1, 1, 1)
    connection.close()


def test_a_replaced_connection_takes_a_permit(tls_url: str, make_engine: MakeEngine) -> None:
    engine = make_engine(tls_url, pool_timeout=0.2, family_limit=2)
    held = engine.connect()

    def use(is_free: bool) -> int:
        if is_free:
            held.execute(text("select 1"))
        else:
            with pytest.raises(exc.StatementError, match="family_limit of 2 reached") as caught:
                held.execute(text("select 1"))
            assert isinstance(caught.value.orig, exc.TimeoutError)
        return permits(engine.pool)  # type: ignore[arg-type]

    assert run_in_child(use, True) == 1
    until(lambda: engine.pool.family_stats().alive == 1, "the child lives")  # type: ignore[attr-defined]
    with engine.connect():
        assert run_in_child(use, False) == 0
    held.close()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_detached_connection_of_asyncio_that_is_dropped_gives_its_permit_back(
    postgres: EmbeddedPostgres, driver: str
) -> None:
    engine = create_async_engine(
        postgres.url(driver=f"postgresql+{driver}"), poolclass=AsyncPidPool, family_limit=1, pool_timeout=10
    )

    async def use() -> None:
        connection = await engine.raw_connection()
        connection.detach()
        del connection
        gc.collect()
        async with engine.connect() as other:
            await other.execute(text("select 1"))
        await engine.dispose()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the drivers complain
        asyncio.run(use())
    assert permits(engine.sync_engine.pool) == 0  # type: ignore[arg-type]


def test_a_detached_connection_of_a_driver_without_weak_references_gives_its_permit_back() -> None:
    class Slotted:
        __slots__ = ()

        def rollback(self) -> None: ...

        def close(self) -> None: ...

    pool = PidPool(Slotted, family_limit=1, timeout=1)
    connection: Any = pool.connect()
    connection.detach()
    assert permits(pool) == 1
    del connection
    assert permits(pool) == 0
    pool.connect().close()


def test_a_wait_for_a_permit_is_no_failed_connect() -> None:
    pool = PidPool(Connection, pool_size=2, timeout=0.05, family_limit=1)
    invalidated = pool.connect()
    invalidated.invalidate()
    held = pool.connect()  # reopens that entry
    held.invalidate()

    def hold(ready: Callable[[], None]) -> None:
        kept.append(pool.connect())
        ready()

    kept: list[Any] = []
    with child(hold), pytest.raises(exc.TimeoutError, match="family_limit of 1 reached"):
        pool.connect()
    counters = pool.stats().counters
    assert (counters.failed, counters.timeouts) == ({}, 1)


def test_a_stopped_process_keeps_its_connections_and_others_wait_with_a_bound() -> None:
    pool = PidPool(Connection, pool_size=5, timeout=0.3, family_limit=2)

    def idle(ready: Callable[[], None]) -> None:
        fill(pool, 2)
        ready()

    with child(idle) as pid:
        os.kill(pid, signal.SIGSTOP)
        until(lambda: state_of(pid) == "T", "it is not stopped")
        started = time.monotonic()
        with pytest.raises(exc.TimeoutError, match=r"2 idle connection.* 2 of 2 permits taken"):
            pool.connect()
        assert 0.3 <= time.monotonic() - started < 5
        os.kill(pid, signal.SIGCONT)
        pool._timeout = 30
        pool.connect().close()


def test_a_process_stopped_with_the_familys_lock_does_not_block_others_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget_module, "_LOCK_WAIT", 0.05)
    pool = PidPool(Connection, timeout=0.3, family_limit=2)
    pool.connect().close()

    def stop(ready: Callable[[], None]) -> None:
        lock = pool.pool_events.family._lock
        lock.run(1, lambda: (ready(), os.kill(os.getpid(), signal.SIGSTOP)))

    with child(stop) as pid:
        until(lambda: state_of(pid) == "T", "it is not stopped")
        pool.connect().close()  # there is an idle one
        held = pool.connect()
        with pytest.raises(exc.TimeoutError, match="family_limit of 2 reached"):
            pool.connect()
        os.kill(pid, signal.SIGCONT)
        pool._timeout = 30
        pool.connect().close()
        held.close()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_timeout_names_the_limit_and_what_holds_the_connections() -> None:
    events = Events()
    pool = PidPool(
        Connection, timeout=0.05, family_limit=4, logger=events.logger, hold_warning=60, logging_name="shop"
    )

    def hold(ready: Callable[[], None]) -> None:
        kept.append(pool.connect())
        ready()

    kept: list[Any] = []
    with child(hold) as pid:
        held = [pool.connect() for _ in range(3)]
        with pytest.raises(exc.TimeoutError) as caught:
            pool.connect()
    said = str(caught.value)
    assert said.startswith("family_limit of 4 reached, connection timed out, timeout 0.05; the family has ")
    assert "4 used and 0 idle connection(s) in 2 process(es), 4 of 4 permits taken; held longest: " in said
    assert said.count("pid ") == 3 and f"pid {pid} thread " in said
    assert f"pid {os.getpid()} thread MainThread for 0." in said and "test_family_limit.py:" in said
    event = events.the("checkout.timed_out")
    assert (event["family_limit"], event["family_used"], event["family_idle"]) == (4, 4, 0)
    assert event["holders"] in said and event["family_wanting"] == 0
    for each in held:
        each.close()


def test_a_permit_given_back_while_the_lock_is_not_to_be_had_is_there_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when a process is stopped while it has the family's lock."""
    monkeypatch.setattr(budget_module, "_LOCK_WAIT", 0.05)
    pool = PidPool(Connection, timeout=5, family_limit=1)
    connection = pool.connect()
    lock, is_held, may_end = pool.pool_events.family._lock, threading.Event(), threading.Event()

    def hold() -> None:
        assert lock.acquire(1)
        is_held.set()
        may_end.wait(30)
        lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait(30)
    connection.invalidate()
    assert permits(pool) == 1
    may_end.set()
    thread.join()
    assert run_in_child(lambda: pool.connect().close()) is None
    assert permits(pool) == 0


# -- none starves


def test_an_idle_process_gives_back_within_50_ms_and_costs_nothing_until_then() -> None:
    events = Events()
    pool = PidPool(Connection, pool_size=20, timeout=10, family_limit=20, logger=events.logger)
    reader, writer = os.pipe()

    def idle(ready: Callable[[], None]) -> None:
        fill(pool, 20)
        ready()
        time.sleep(0.5)
        before = time.process_time()
        time.sleep(2)
        os.write(writer, str(time.process_time() - before).encode())
        until(lambda: events.of("connection.given_back"), "nothing is given back")
        given = events.of("connection.given_back")[0]
        assert given["idle"] > 2 and given["owner_pid"] == os.getpid()
        assert events.of("connection.closed")[0]["reason"] == "given back"

    with child(idle) as pid:
        assert float(os.read(reader, 100)) < 0.001
        waits, held = [], []
        for _ in range(10):
            started = time.monotonic()
            held.append(pool.connect())
            waits.append(time.monotonic() - started)
        assert statistics.median(waits) < 0.05, waits
        (other,) = [each for each in pool.family_stats().processes if each.pid == pid]
        assert other.counters.closed["given back"] >= 10
        assert other.idle <= 10
    os.close(reader)
    os.close(writer)


def test_a_busy_process_gives_back_what_is_beyond_its_share() -> None:
    pool = PidPool(Connection, pool_size=20, timeout=10, family_limit=10)

    def busy(ready: Callable[[], None]) -> None:
        def work() -> None:
            while True:
                connection = pool.connect()
                time.sleep(0.002)
                connection.close()

        for _ in range(10):
            threading.Thread(target=work, daemon=True).start()
        until(lambda: permits(pool) == 10, "it does not take all")
        ready()

    with child(busy):
        started = time.monotonic()
        held = [pool.connect() for _ in range(5)]  # its share
        assert time.monotonic() - started < 5
        assert permits_of_all(pool) <= 10
        for each in held:
            each.close()


def test_more_busy_processes_than_the_limit_take_turns() -> None:
    pool = PidPool(Connection, pool_size=1, max_overflow=0, timeout=20, family_limit=2)

    def busy(ready: Callable[[], None]) -> None:
        ready()
        while True:
            connection = pool.connect()
            time.sleep(0.005)
            connection.close()

    with contextlib.ExitStack() as stack:
        pids = {stack.enter_context(child(busy)) for _ in range(5)}

        def all_progress() -> bool:
            stats = pool.family_stats()
            processes = [each for each in stats.processes if each.pid in pids]
            assert permits_of_all(pool) <= 2 and stats.permits <= 2
            return min(each.counters.checkouts for each in processes) > 5

        until(all_progress, "a process starves")
        assert pool.family_stats().counters.timeouts == 0


def test_pools_of_one_process_give_back_too() -> None:
    """One that was disposed of while a connection was checked out, and another engine's of the family."""
    with collector_paused():
        pool = PidPool(Connection, family_limit=1, timeout=10, family=f"of-one-process-{os.getpid()}")
        checkout = pool.connect()
        pool.dispose()
        successor = pool.recreate()
        checkout.close()  # into the pool that it came from, which is there until it is collected
        successor.connect().close()
        another = PidPool(Connection, family_limit=1, timeout=10, family=pool.pool_events.family.name)
        another.connect().close()
        successor.connect().close()
    successor.dispose()
    another.dispose()


def test_a_reconnecting_entry_does_not_starve_behind_its_own_process() -> None:
    pool = PidPool(Connection, pool_size=2, timeout=5, family_limit=1)
    invalidated = pool.connect()
    invalidated.invalidate()
    other = pool.connect()
    thread = threading.Timer(0.05, other.close)
    thread.start()
    pool.connect().close()
    thread.join()
    assert permits(pool) == 1


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_an_idle_event_loop_gives_back_and_no_thread_touches_its_connections(
    postgres: EmbeddedPostgres, driver: str
) -> None:
    engine = create_async_engine(
        postgres.url(driver=f"postgresql+{driver}"), poolclass=AsyncPidPool, family_limit=3, pool_timeout=10
    )
    pool = engine.sync_engine.pool
    assert isinstance(pool, AsyncPidPool)

    def idle(ready: Callable[[], None]) -> None:
        async def run() -> None:
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(3):
                    await stack.enter_async_context(engine.connect())
            ready()
            await asyncio.sleep(60)

        asyncio.run(run())

    async def use() -> list[float]:
        waits = []
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):  # all: the server may complain of one that is open when the child is killed
                started = time.monotonic()
                connection = await stack.enter_async_context(engine.connect())
                assert (await connection.scalar(text("select 1"))) == 1
                waits.append(time.monotonic() - started)
        await engine.dispose()
        return waits

    mark = postgres.log_mark()
    with child(idle) as pid:
        waits = asyncio.run(use())
        assert max(waits) < 5

        def closed() -> dict[str, int]:
            (other,) = [each for each in pool.family_stats().processes if each.pid == pid]
            return dict(other.counters.closed)

        until(lambda: closed()["given back"] == 3, "the child has given back all three")
        assert closed()["failed"] == 0
        assert postgres.complaints(mark) == []  # closed as one closes, not dropped


def test_an_async_checkout_beyond_the_limit_waits_without_stopping_the_loop(
    postgres: EmbeddedPostgres,
) -> None:
    engine = create_async_engine(
        postgres.url(driver="postgresql+asyncpg"), poolclass=AsyncPidPool, family_limit=1, pool_timeout=0.3
    )
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def use() -> None:
        task = asyncio.create_task(tick())
        async with engine.connect():
            with pytest.raises(exc.TimeoutError, match="family_limit of 1 reached"):
                await engine.connect()
        async with engine.connect():
            pass
        task.cancel()
        await engine.dispose()

    asyncio.run(use())
    assert ticks > 5


# -- under load, over TLS


def permits_left_by(pool: PidPool, pid: int) -> int:
    """Return the permits that a process had when it was killed; 0 if its block has been given to another."""
    blocks = pool.pool_events.family.blocks()
    return next((int(block[PERMITS]) for block in reversed(blocks) if block[PID] == pid), 0)


@pytest.mark.soak
def test_a_limit_holds_under_load_while_processes_are_killed(
    tls_url: str, postgres: EmbeddedPostgres, make_engine: MakeEngine
) -> None:
    """Eight processes of 15 threads each and a limit of 20, half of them killed again and again.

    The server notices a moment later that the connections of a killed process have ended.
    """
    limit, processes, seconds = 20, 8, 60.0 if SOAK else 6.0
    engine = make_engine(
        tls_url,
        pool_size=5,
        max_overflow=15,
        pool_timeout=30,
        family_limit=limit,
        connect_args={"application_name": "family_limit"},
    )
    pool = engine.pool
    assert isinstance(pool, PidPool)
    watcher = create_engine(postgres.url(tls=False))

    def work() -> None:
        def load() -> None:
            while True:
                with engine.connect() as connection:
                    connection.execute(text("select pg_sleep(0.002)"))

        for _ in range(15):
            threading.Thread(target=load, daemon=True).start()
        while True:
            signal.pause()

    def start() -> int:
        pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                os._exit(1)
        return pid

    chance = random.Random(12)
    pids = [start() for _ in range(processes)]
    steady = pids[: processes // 2]
    killed_at: list[tuple[float, int]] = []
    worst = worst_on_server = worst_beside_the_killed = 0
    try:
        with watcher.connect().execution_options(isolation_level="AUTOCOMMIT") as look:
            deadline, kill_at = time.monotonic() + seconds, time.monotonic() + 1
            while time.monotonic() < deadline:
                worst = max(worst, permits_of_all(pool))
                assert pool.family_stats().permits <= limit
                now = time.monotonic()
                on_server = look.execute(
                    text("select count(*) from pg_stat_activity where application_name = 'family_limit'")
                ).scalar_one()
                killed = sum(count for at, count in killed_at if now - at < 1)
                worst_on_server = max(worst_on_server, on_server)
                worst_beside_the_killed = max(worst_beside_the_killed, on_server - killed)
                if now > kill_at:
                    kill_at = now + 0.5
                    victim = chance.randrange(processes // 2, processes)
                    os.kill(pids[victim], signal.SIGKILL)
                    os.waitpid(pids[victim], 0)
                    killed_at.append((time.monotonic(), permits_left_by(pool, pids[victim])))
                    pids[victim] = start()
                time.sleep(0.01)
        stats = pool.family_stats()
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    print(
        f"at most {worst} permits; on the server {worst_on_server}, {worst_beside_the_killed} without those "
        f"killed in the last second; {len(killed_at)} processes killed"
    )
    assert 10 < worst <= limit and worst_beside_the_killed <= limit
    progress = {each.pid: each.counters.checkouts for each in stats.processes}
    print(f"checkouts of those that lived on: {[progress[pid] for pid in steady]}")
    assert all(progress[pid] > 10 for pid in steady), progress
    assert stats.counters.timeouts == 0
    # No permit was lost.
    held = [engine.connect() for _ in range(limit)]
    assert permits(pool) == limit
    for each in held:
        each.close()
    watcher.dispose()


def test_a_child_that_is_interrupted_while_it_joins_the_family_keeps_to_the_limit() -> None:
    """At each 11th bytecode, in a child each time; then it uses the pool, as if nothing had been."""

    def interrupted(at: int) -> dict[str, Any]:
        left = at

        def trace(frame: Any, what: str, _: object) -> Any:
            nonlocal left
            caller = frame
            while caller is not None and caller.f_code is not PoolEvents.begin_anew.__code__:
                caller = caller.f_back
            if caller is not None and caller.f_locals["self"] is pool.pool_events:
                frame.f_trace = trace  # Python 3.13 and later look at it in the next line
                frame.f_trace_opcodes, frame.f_trace_lines = True, False
                left -= what == "opcode"
                if left == 0:
                    left = -1
                    raise KeyboardInterrupt
            return trace

        trace_opcodes(trace)
        with contextlib.suppress(KeyboardInterrupt):
            pool.status()
        sys.settrace(None)
        held = [pool.connect() for _ in range(2)]
        with pytest.raises(exc.TimeoutError):
            pool.connect()
        stats = pool.family_stats()
        found = {"used": stats.used, "permits": permits_of_all(pool), "processes": stats.alive}
        found["own"] = pool.stats().pid == os.getpid()
        while held:
            held.pop().invalidate()
        assert (permits(pool), permits_of_all(pool)) == (0, 1)
        return {**found, "was interrupted": left < 0}

    pool = PidPool(Connection, pool_size=5, max_overflow=5, timeout=0.1, family_limit=3)
    held = pool.connect()
    at, found = 1, {"was interrupted": True}
    while found["was interrupted"]:
        found = run_in_child(interrupted, at, how="c")
        expected = {"used": 3, "permits": 3, "own": True, "processes": 2}
        assert found == {**expected, "was interrupted": found["was interrupted"]}, f"bytecode {at}"
        at += 11
    assert at > 300
    held.close()
