"""Stats of one process and of a whole family: exact counts, whichever process forks, exits or is killed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engines import MakeEngine
from events import Events
from forking import How, fork, run_in_child
from killing import is_killed, kill_at
from parent import Parent
from soak import SOAK
from sqlalchemy import event, exc, text
from waiting import until

from pidpool import PidPool
from pidpool._sqlalchemy.wait import Wait
from pidpool.stats import family as family_module
from pidpool.stats import process_counters
from pidpool.stats.family import Family
from pidpool.stats.process_counters import Count
from pidpool.stats.snapshots import BOUNDS, Counters, FamilyStats, Histogram


class FakeConnection:
    """A driver's connection without a server, for tests with very many."""

    def rollback(self) -> None: ...

    def close(self) -> None: ...


def fake_pool(**options: Any) -> PidPool:
    return PidPool(FakeConnection, **options)


def use(pool: PidPool, times: int = 1) -> None:
    for _ in range(times):
        pool.connect().close()


def process(stats: FamilyStats, pid: int) -> Any:
    found = [each for each in stats.processes if each.pid == pid]
    assert len(found) == 1, stats
    return found[0]


def counted(pool: PidPool, pid: int) -> tuple[int, int]:
    """Return a process's checkouts and checkins; zeros before it has joined."""
    for each in pool.family_stats().processes:
        if each.pid == pid:
            return each.counters.checkouts, each.counters.checkins
    return 0, 0


@contextlib.contextmanager
def living_child(function: Callable[[], None], how: How = "python") -> Iterator[int]:
    """Fork a child that calls `function` and lives on until it is killed here, at the latest."""
    pid = fork(how)
    if pid == 0:
        try:
            function()
            while True:
                signal.pause()
        finally:
            os._exit(1)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


# -- one process


def test_a_snapshot_shows_the_state_of_the_pool(tls_url: str, make_engine: MakeEngine) -> None:
    engine = make_engine(tls_url, pool_size=2, max_overflow=1, pool_timeout=0.05)
    pool = engine.pool
    assert isinstance(pool, PidPool)
    first, second, third = engine.connect(), engine.connect(), engine.connect()
    with pytest.raises(Exception, match="limit of size 2 overflow 1"):
        engine.connect()
    stats = pool.stats()
    assert (stats.size, stats.max_overflow, stats.maximum) == (2, 1, 3)
    assert (stats.idle, stats.used, stats.overflow, stats.waiting) == (0, 3, 1, 0)
    assert stats.counters.timeouts == 1
    assert stats.counters.checkouts == 3 and stats.counters.checkins == 0
    backend = text("select pg_backend_pid()")
    pids = {each.execute(backend).scalar_one() for each in (first, second, third)}
    assert {each.tag.server_pid for each in stats.connections} == pids
    assert {each.state for each in stats.connections} == {"used"}
    assert {each.thread_id for each in stats.connections} == {threading.get_ident()}
    assert {each.thread_name for each in stats.connections} == {threading.current_thread().name}
    second.invalidate()
    for connection in (first, second, third):
        connection.close()
    stats = pool.stats()
    assert (stats.idle, stats.used, stats.overflow) == (1, 0, 0)
    assert stats.counters.invalidations == 1
    assert stats.counters.closed == {
        "recycled": 0,
        "invalidated": 1,
        "overflow": 1,
        "disposed": 0,
        "detached": 0,
        "failed": 0,
        "given back": 0,
        "idle": 0,
        "collected": 0,
    }
    detached = engine.connect()
    detached.detach()
    detached.close()
    engine.dispose()
    stats = engine.pool.stats()  # type: ignore[attr-defined]
    assert stats.counters.closed["detached"] == 1
    assert stats.counters.opened == sum(stats.counters.closed.values()) == 4
    assert stats.counters.checkouts == stats.counters.checkins == 4
    assert stats.connections == () and stats.idle == 0


def test_times_are_measured() -> None:
    pool = fake_pool()
    begun = time.perf_counter()
    connection = pool.connect()
    connected = time.perf_counter()
    time.sleep(0.03)  # not waited for: so that a time of 0 is wrong
    returning = time.perf_counter()
    connection.close()
    returned = time.perf_counter()
    counters = pool.stats().counters
    assert counters.use_time.count == counters.wait_time.count == counters.create_time.count == 1
    assert returning - connected <= counters.use_time.sum <= returned - begun
    p50 = counters.use_time.quantile(0.5)
    assert p50 is not None and p50 / 2 < counters.use_time.sum <= p50  # a bound is twice the one before
    assert 0 < counters.create_time.sum <= counters.wait_time.sum <= connected - begun
    assert Histogram().quantile(0.5) is None
    beyond = Histogram((0,) * len(BOUNDS) + (1,), 100.0)
    assert beyond.quantile(0.99) == float("inf")


def test_a_waiting_thread_is_counted() -> None:
    pool = fake_pool(pool_size=1, max_overflow=0)
    held = pool.connect()
    thread = threading.Thread(target=use, args=(pool,))
    thread.start()
    until(lambda: pool.stats().waiting == 1, "the thread does not wait")
    held.close()
    thread.join(10)
    stats = pool.stats()
    assert stats.waiting == 0 and stats.counters.checkouts == 2
    assert stats.counters.wait_time.count == 2


def test_counts_are_exact_under_64_threads() -> None:
    pool = fake_pool(pool_size=5, max_overflow=3)
    start = threading.Barrier(64)

    def work() -> None:
        start.wait(30)
        use(pool, 200)

    threads = [threading.Thread(target=work) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    stats = pool.stats()
    assert stats.counters.checkouts == stats.counters.checkins == 64 * 200
    assert stats.counters.opened - stats.counters.closed["overflow"] == stats.idle <= 5
    assert stats.used == stats.waiting == 0


def test_more_entries_than_slots_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_module, "_MAX_SLOTS", 4)
    pool = fake_pool(pool_size=0)
    out = [pool.connect() for _ in range(20)]
    assert (pool.stats().used, pool.stats().idle) == (20, 0)
    for connection in out[:5]:
        connection.close()
    assert (pool.stats().used, pool.stats().idle) == (15, 5)
    for connection in out[5:]:
        connection.close()
    assert (pool.stats().used, pool.stats().idle) == (0, 20)
    counters = pool.stats().counters
    assert counters.checkouts == counters.checkins == counters.opened == 20


def test_a_connection_has_its_own_checkouts_and_times_though_others_had_its_slot() -> None:
    pool = fake_pool(pool_size=1, max_overflow=0)
    use(pool, 3)
    (first,) = pool.stats().connections
    assert first.checkouts == 3
    connection = pool.connect()
    connection.invalidate()
    connection.close()
    before = time.perf_counter()
    record: Any = pool._do_get()
    record.get_connection()  # opened, and not handed out yet
    (second,) = pool.stats().connections
    assert second.tag != first.tag and second.checkouts == 0
    assert 0 <= second.in_state <= time.perf_counter() - before


def test_a_clock_that_was_set_back_makes_nothing_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = fake_pool()
    held = pool.connect()
    monkeypatch.setattr(process_counters.time, "time", lambda: 1e9)  # type: ignore[attr-defined]
    (connection,) = pool.stats().connections
    assert connection.age == 0 and connection.in_state >= 0
    held.close()


def quiescent(pool: PidPool) -> None:
    """The stats and the pool itself agree while no thread uses it."""
    stats = pool.stats()
    idle = [record for record in pool._pool.queue if record.dbapi_connection is not None]
    assert (stats.used, stats.idle) == (pool.checkedout(), len(idle)), pool.status()
    assert stats.overflow == pool.overflow(), pool.status()
    counters = stats.counters
    assert stats.waiting == 0 and counters.checkouts - counters.checkins == stats.used
    closed = sum(counters.closed.values()) - counters.closed["failed"]
    assert counters.opened - closed == stats.idle + stats.used


@pytest.mark.parametrize(("size", "overflow"), [(5, 3), (1, 0), (3, -1), (0, 10)])
def test_stats_agree_with_the_pool_after_anything(size: int, overflow: int) -> None:
    """Random uses of all kinds, by many threads; in the parent and in a child, which starts from zero."""

    def use_at_random(pool: PidPool, seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(60):
            try:
                connection = pool.connect()
            except exc.TimeoutError:
                continue
            kind = choose.randrange(7)
            if kind == 0:
                connection.invalidate()
            elif kind == 1:
                connection.invalidate(soft=True)
            elif kind == 2:
                connection.detach()
            elif kind == 3:
                del connection
                continue
            connection.close()

    def use_by_threads(pool: PidPool) -> None:
        for round in range(3):
            work = [threading.Thread(target=use_at_random, args=(pool, 100 * round + n)) for n in range(16)]
            for thread in work:
                thread.start()
            for thread in work:
                thread.join(60)
                assert not thread.is_alive()
            quiescent(pool)
        held = [pool.connect()]
        quiescent(pool)
        held.pop().close()

    pool = fake_pool(pool_size=size, max_overflow=overflow, timeout=0.001)
    use_by_threads(pool)
    run_in_child(use_by_threads, pool)
    quiescent(pool)


def test_a_listener_may_detach_what_is_checked_out() -> None:
    pool = fake_pool()

    @event.listens_for(pool, "checkout")
    def detach(connection: object, record: object, proxy: Any) -> None:
        proxy.detach()

    use(pool)
    quiescent(pool)
    assert pool.stats().counters.closed["detached"] == 1


def test_a_copy_of_a_waiting_thread_takes_nothing_from_its_parents_count() -> None:
    """As gevent's greenlets, which go on in a forked child."""
    pool = fake_pool()
    waits = [Wait(pool.pool_events, None)]
    waits[0].left()

    def child() -> int:
        waits.clear()
        return pool.stats().waiting

    assert run_in_child(child) == 0
    assert pool.stats().waiting == 1
    waits.clear()
    assert pool.stats().waiting == 0


# -- a family


@pytest.mark.usefixtures("clean_log", "table")
@pytest.mark.parametrize("how", ["python", "c"])
def test_every_process_sees_the_family(tls_url: str, make_engine: MakeEngine, how: How) -> None:
    engine = make_engine(tls_url)
    held = engine.connect()
    held.execute(text("insert into kept values ('parent')"))
    server_pid = held.execute(text("select pg_backend_pid()")).scalar_one()

    def grandchild() -> int:
        with engine.connect() as connection:
            connection.execute(text("select 1"))
        engine.dispose()
        return os.getpid()

    def child() -> tuple[int, int, FamilyStats]:
        with engine.connect() as connection:
            connection.execute(text("select 1"))
        pid = run_in_child(grandchild, how=how)
        seen = engine.pool.family_stats()  # type: ignore[attr-defined]
        engine.dispose()
        return os.getpid(), pid, seen

    child_pid, grandchild_pid, seen_by_child = run_in_child(child, how=how)
    for stats in (seen_by_child, engine.pool.family_stats()):  # type: ignore[attr-defined]
        parent = process(stats, os.getpid())
        assert parent.alive and parent.parent_pid is None and parent.used == 1
        assert process(stats, child_pid).parent_pid == os.getpid()
        assert process(stats, grandchild_pid).parent_pid == child_pid
        assert not process(stats, grandchild_pid).alive
        assert stats.counters.checkouts == 3
        assert stats.counters.inherited == {"idle": 1, "no transaction": 0, "in transaction": 1, "unknown": 0}
        assert stats.counters.severed == 2
        trigger = {"python": "hook", "c": "lazy"}[how]
        assert stats.counters.adoptions[trigger] == 2
    assert process(seen_by_child, child_pid).alive
    assert not process(engine.pool.family_stats(), child_pid).alive  # type: ignore[attr-defined]
    assert held.execute(text("select pg_backend_pid()")).scalar_one() == server_pid
    held.commit()
    assert held.execute(text("select count(*) from kept")).scalar_one() == 1
    held.close()


def test_a_killed_process_is_seen_with_what_it_counted() -> None:
    pool = fake_pool()
    held = []

    def child() -> None:
        use(pool, 7)
        held.append(pool.connect())

    with living_child(child) as pid:
        until(lambda: counted(pool, pid) == (8, 7), "the child's checkouts are not counted")
        assert process(pool.family_stats(), pid).used == 1
        os.kill(pid, signal.SIGKILL)
        until(lambda: not process(pool.family_stats(), pid).alive, "a zombie counts as alive")
    killed = process(pool.family_stats(), pid)
    assert not killed.alive and killed.used == 0
    assert (killed.counters.checkouts, killed.counters.checkins) == (8, 7)


def test_an_inherited_entry_counts_nothing_for_the_parent() -> None:
    pool = fake_pool()
    held = pool.connect()
    broken = pool.connect()
    broken._connection_record.invalidate()  # type: ignore[attr-defined]  # checked out, with no connection

    def child() -> None:
        held.close()
        broken.close()
        assert pool.checkedout() == 0 and pool.checkedin() == 0
        assert pool.stats().counters.checkins == 0

    run_in_child(child)
    assert process(pool.family_stats(), os.getpid()).counters.checkins == 0
    held.close()
    broken.close()
    assert pool.stats().counters.checkins == 2


@pytest.mark.usefixtures("clean_log")
def test_dispose_goes_on_with_the_counts(tls_url: str, make_engine: MakeEngine) -> None:
    engine = make_engine(tls_url)
    for _ in range(3):
        with engine.connect():
            pass
        engine.dispose()

    def child() -> tuple[int, int]:
        engine.dispose(close=False)
        with engine.connect():
            pass
        engine.dispose()
        stats = engine.pool.stats()  # type: ignore[attr-defined]
        return stats.counters.checkouts, sum(stats.counters.adoptions.values())

    assert run_in_child(child) == (1, 1)
    stats = engine.pool.family_stats()  # type: ignore[attr-defined]
    assert stats.counters.checkouts == 4 and len(stats.processes) == 2


def test_an_ended_process_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_module, "BLOCKS", 4)
    monkeypatch.setattr(family_module, "ENDED_LISTED", 2)
    pool = fake_pool()
    use(pool)
    for _ in range(20):
        run_in_child(use, pool, 3)
    stats = pool.family_stats()
    assert stats.counters.checkouts == 1 + 20 * 3
    assert stats.counters.adoptions == {"hook": 20, "lazy": 0}
    assert stats.alive == 1 and len(stats.processes) == 3
    assert stats.departed == 18 and stats.unlisted == 0


def test_more_processes_than_rows_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_module, "BLOCKS", 3)
    pool = fake_pool()

    def child() -> None:
        use(pool, 2)
        assert pool.stats().counters.checkouts == 2

    with contextlib.ExitStack() as children:
        for _ in range(5):
            children.enter_context(living_child(child))
        until(lambda: pool.family_stats().counters.checkouts == 4, "not 4 checkouts")
        until(lambda: pool.family_stats().unlisted == 3, "not 3 processes without a page")
        assert pool.family_stats().alive == 3


def test_a_reused_pid_is_another_process() -> None:
    memory = Family(5, 10)
    memory.join()
    old = memory.join(parent_pid=os.getpid())
    # As if it had joined before this process, whose pid it has, was started.
    old.cells[process_counters.JOINED] = 1
    processes = memory.read("pool").processes
    assert [each.alive for each in processes] == [False, True]


def test_a_process_killed_while_joining_blocks_no_other() -> None:
    memory = Family(5, 10)
    memory.join()
    pid = os.fork()
    if pid == 0:
        if memory._lock.acquire(1):
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    started = time.monotonic()
    memory.join(parent_pid=os.getpid())
    stats = memory.read("pool")
    assert len(stats.processes) == 2 and stats.unlisted == 0
    assert time.monotonic() - started < 10


@pytest.mark.soak
def test_a_process_killed_at_any_instruction_of_joining_changes_no_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One child for each (in short: each 17th) instruction, killed there while it takes the row of a
    process that has ended."""
    monkeypatch.setattr(family_module, "BLOCKS", 2)
    step = 1 if SOAK else 17

    def join(memory: Family, instruction: int) -> None:
        kill_at(instruction, family_module, process_counters)
        memory.join(parent_pid=os.getppid())

    killed = True
    for instruction in range(0, 10_000, step):
        memory = Family(5, 10)
        memory.join()
        ended = memory.join(parent_pid=os.getpid())
        ended.add(Count.TIMEOUTS, 7)
        ended.cells[process_counters.ENDED] = 1
        killed = is_killed(functools.partial(join, memory, instruction))
        assert memory.read("pool").counters.timeouts == 7, instruction
        memory.join(parent_pid=os.getpid()).add(Count.TIMEOUTS)
        stats = memory.read("pool")
        assert stats.counters.timeouts == 8 and stats.unlisted == 0, instruction
        assert [each.alive for each in stats.processes] == [True, True]
        if not killed:  # it had joined before
            break
    assert instruction > 500 and not killed


def test_a_process_that_executes_another_program_has_left_the_family() -> None:
    pool = fake_pool()
    use(pool)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(reader, 0)
        os.close(writer)
        os.execvp("cat", ["cat"])
    os.close(reader)
    until(lambda: os.readlink(f"/proc/{pid}/exe") != os.readlink("/proc/self/exe"), "no exec")
    until(lambda: not process(pool.family_stats(), pid).alive, "it counts as alive after exec")
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # it runs
    assert pool.family_stats().maximum == 15
    os.close(writer)
    assert os.waitpid(pid, 0) == (pid, 0)


def test_a_lock_held_for_long_is_not_waited_for() -> None:
    memory = Family(5, 10)
    memory.join()
    reader, writer = os.pipe()

    def child() -> None:
        assert memory._lock.acquire(1)
        os.write(writer, b"x")

    with living_child(child):
        assert os.read(reader, 1) == b"x"
        memory.join(parent_pid=os.getpid())
        assert memory.read("pool").unlisted == 1
    os.close(reader)
    os.close(writer)


def storm(pool: PidPool, processes: int, seconds: float) -> None:
    """Fork, exit and kill for a while, with a reader that polls; then compare the sums."""
    torn: list[str] = []
    stop = threading.Event()
    reads = 0

    def read() -> None:
        nonlocal reads
        last = Counters()
        grows = ("opened", "checkouts", "checkins")
        while not stop.is_set():
            stats = pool.family_stats()
            counters = stats.counters
            # Two reads may differ by the events between them; no count goes back.
            torn.extend(name for name in grows if getattr(counters, name) < getattr(last, name))
            torn.extend(
                repr(each)
                for each in stats.processes
                if each.size != 5 or each.used > 15 or each.pid <= 0 or each.since < 1e9
            )
            torn.extend(
                repr(connection)
                for each in stats.processes
                for connection in each.connections
                if connection.tag.owner_pid != each.pid or connection.tag.opened_at < 1e9
            )
            last = counters
            reads += 1

    reader = threading.Thread(target=read)
    reader.start()
    random_number = random.Random(7)
    deadline = time.monotonic() + seconds
    alive: dict[int, tuple[int, bool]] = {}
    clean = killed_at_most = 0
    try:
        while time.monotonic() < deadline or alive:
            if time.monotonic() < deadline and len(alive) < processes:
                times, kill = random_number.randrange(1, 40), random_number.random() < 0.3
                pid = os.fork()
                if pid == 0:
                    use(pool, times)
                    if kill:
                        while True:
                            use(pool)
                    os._exit(0)
                alive[pid] = times, kill
                if random_number.random() < 0.5:
                    continue
            victims = [pid for pid, (_, kill) in alive.items() if kill]
            if victims and (len(alive) >= processes or time.monotonic() >= deadline):
                for victim in victims:
                    os.kill(victim, signal.SIGKILL)
            for child in list(alive):
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    times, kill = alive.pop(pid)
                    assert kill or status == 0, status
                    clean += 0 if kill else times
                    killed_at_most += kill
    finally:
        stop.set()
        reader.join(30)
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert not reader.is_alive() and reads > 3
    assert torn == []
    stats = pool.family_stats()
    assert stats.unlisted == 0
    # Those that were killed have counted what they did; those that ended cleanly, all of it.
    assert stats.counters.checkouts >= clean
    if not killed_at_most:
        assert stats.counters.checkouts == clean
    assert stats.counters.checkouts - stats.counters.checkins <= killed_at_most
    ended = len(stats.processes) - stats.alive + stats.departed
    assert stats.counters.adoptions["hook"] == ended


@pytest.mark.soak
def test_a_family_in_a_storm() -> None:
    storm(fake_pool(), 200 if SOAK else 30, 60 if SOAK else 4)


@pytest.mark.usefixtures("table", "clean_log")
def test_more_than_the_server_takes_is_logged_once(tls_url: str, make_engine: MakeEngine) -> None:
    events = Events()
    engine = make_engine(tls_url, pool_size=100, max_overflow=100, logger=events.logger)
    with engine.connect() as connection:
        limit = int(connection.execute(text("show max_connections")).scalar_one())
    assert engine.pool.family_stats().server_max_connections == limit == 300  # type: ignore[attr-defined]
    parent = Parent(engine, "idle")

    def child() -> list[dict[str, Any]]:
        events.clear()
        for _ in range(2):
            with engine.connect():
                pass
        engine.dispose()
        return events.of("pool.over_maximum")

    (event,) = run_in_child(child)
    assert event["level"] == "warning" and event["processes"] == 2
    assert event["maximum"] == 400 and event["server_max_connections"] == 300
    assert run_in_child(child) == []
    parent.notices_nothing()


def test_the_servers_limit_is_compared_only_when_a_process_has_joined_that_may_exceed_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes a look at every process, which not each opened connection is to pay for, nor each child."""
    memory = Family(100, 0)
    looks: list[memoryview] = []
    is_alive = memory.is_alive
    monkeypatch.setattr(memory, "is_alive", lambda block: looks.append(block) or is_alive(block))
    memory.join()
    memory.learn_server_max_connections(lambda: 250)
    run_in_child(lambda: memory.join(parent_pid=os.getppid()) and None)
    assert memory.exceeds_server("pool") is None
    assert looks == []
    memory.join(parent_pid=os.getpid())
    for _ in range(3):
        assert memory.exceeds_server("pool") is None  # since one of the three has ended
    assert len(looks) == 3
    memory.join(parent_pid=os.getpid())
    over = memory.exceeds_server("pool")
    assert over is not None and over.maximum == 300
    assert memory.exceeds_server("pool") is None


def test_a_snapshot_as_dicts_has_all_its_fields() -> None:
    pool = fake_pool()
    held = pool.connect()
    run_in_child(use, pool)
    stats = pool.family_stats()
    plain = json.loads(json.dumps(stats.to_dict()))
    fields = json.loads(json.dumps(dataclasses.asdict(stats)))
    derived = {"alive": 1, "maximum": 15, "idle": 0, "used": 1, "waiting": 0, "overdue": None}
    derived |= {"wanting": 0}
    for each, process in zip(fields["processes"], stats.processes, strict=True):
        each["maximum"] = process.maximum
    assert plain == {**fields, **derived}
    held.close()


def test_the_family_has_counted_what_its_processes_have() -> None:
    pool = fake_pool()
    use(pool, 3)
    run_in_child(use, pool, 5)
    stats = pool.family_stats()
    total = sum((each.counters for each in stats.processes), Counters())
    for name in ("create_time", "wait_time", "use_time"):
        of_family, of_processes = getattr(stats.counters, name), getattr(total, name)
        assert of_family.counts == of_processes.counts and of_family.count > 1
        assert of_family.sum == pytest.approx(of_processes.sum)  # added in another order
        total = dataclasses.replace(total, **{name: of_family})
    assert stats.counters == total


def test_counters_add_up() -> None:
    one = Counters(opened=1, closed={"recycled": 2}, use_time=Histogram((1,) * (len(BOUNDS) + 1), 1.5))
    both = one + one
    assert both.opened == 2 and both.closed == {"recycled": 4}
    assert both.use_time.count == 2 * (len(BOUNDS) + 1) and both.use_time.sum == 3.0


def test_a_fork_in_c_is_in_the_family_from_its_first_use() -> None:
    pool = fake_pool()
    with living_child(lambda: use(pool), how="c") as pid:
        until(lambda: counted(pool, pid) == (1, 1), "the child's checkout is not counted")
        assert process(pool.family_stats(), pid).parent_pid == os.getpid()
