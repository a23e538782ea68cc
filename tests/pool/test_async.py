"""`AsyncPidPool`: a fork in the middle of an event loop, and a child that runs a loop of its own."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from events import Events
from forking import How, run_in_child, run_in_child_of_loop
from parent import bytes_on_the_wire
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.queue import Empty, Full

from pidpool import AsyncPidPool, ConnectionTag, ForeignConnectionError, tag_of
from pidpool._sqlalchemy import idle_queue
from pidpool._sqlalchemy.async_idle_queue import AsyncIdleQueue
from pidpool.forks import stand_in
from pidpool.tools.demo.postgres import EmbeddedPostgres

pytestmark = pytest.mark.usefixtures("clean_log")
both_hows = pytest.mark.parametrize("how", ["python", "c"])
both_drivers = pytest.mark.parametrize("driver", ["postgresql+asyncpg", "postgresql+psycopg"])
STATES = ["idle", "no transaction", "in transaction", "detached in transaction"]


@asynccontextmanager
async def an_engine(url: str, **options: Any) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url, poolclass=AsyncPidPool, **options)
    try:
        yield engine
    finally:
        await engine.dispose()


async def server_pid(connection: AsyncConnection) -> int:
    return int((await connection.execute(text("select pg_backend_pid()"))).scalar_one())


def wire(tag: Any) -> tuple[int, int]:
    return bytes_on_the_wire(tag.fd)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@both_hows
@both_drivers
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("action", ["use", "close", "drop", "dispose"])
def test_an_async_parent_never_notices(
    postgres: EmbeddedPostgres,
    loop: asyncio.AbstractEventLoop,
    driver: str,
    state: str,
    action: str,
    how: How,
) -> None:
    engine = create_async_engine(postgres.url(driver=driver), poolclass=AsyncPidPool)
    holder: list[AsyncConnection | None] = []  # nothing else refers to the connection at the fork

    async def open_one() -> tuple[int, ConnectionTag, Any]:
        connection = await engine.connect()
        if state.startswith("detached"):
            await connection.run_sync(lambda sync: sync.detach())
        number = await server_pid(connection)
        tag = tag_of(connection)
        assert tag is not None and tag.server_pid == number and tag.owner_pid == os.getpid()
        assert tag.fd is not None and os.fstat(tag.fd).st_ino == tag.socket_inode
        transaction = None
        if state.endswith("in transaction"):
            transaction = await connection.scalar(text("select txid_current()"))
        else:
            await connection.rollback()
        if state == "idle":
            await connection.close()
        holder.append(None if state == "idle" else connection)
        return number, tag, transaction

    async def child() -> None:
        connection = holder.pop()
        if action == "use":
            if connection is None:
                async with engine.connect() as own:
                    assert await server_pid(own) != number
            else:
                if transaction is not None:
                    with pytest.raises(OperationalError) as caught:
                        await server_pid(connection)
                    assert caught.value.connection_invalidated
                    error = caught.value.orig
                    assert isinstance(error, ForeignConnectionError)
                    assert (error.owner_pid, error.pid) == (os.getppid(), os.getpid())
                    await connection.rollback()
                assert await server_pid(connection) != number
                own_tag = tag_of(connection)
                assert own_tag is not None and own_tag.owner_pid == os.getpid()
                await connection.close()
        elif action == "close" and connection is not None:
            await connection.close()
        elif action == "dispose":
            await engine.dispose()
        del connection
        gc.collect()
        async with engine.connect() as own:
            assert await server_pid(own) != number
        assert os.fstat(tag.fd).st_ino != tag.socket_inode
        await engine.dispose()

    async def go_on() -> None:
        connection = holder.pop() or await engine.connect()
        assert await server_pid(connection) == number
        if transaction is not None:
            assert await connection.scalar(text("select txid_current()")) == transaction
        await connection.commit()
        raw = (await connection.get_raw_connection()).dbapi_connection
        driver_connection = None if raw is None else raw.driver_connection
        await connection.close()
        if state.startswith("detached") and driver == "postgresql+psycopg":
            await driver_connection.close()  # SQLAlchemy leaves that to the garbage collector
        await engine.dispose()

    number, tag, transaction = loop.run_until_complete(open_one())
    before = wire(tag)
    run_in_child_of_loop(loop, child, how)
    assert wire(tag) == before
    loop.run_until_complete(go_on())


@both_drivers
def test_a_replacement_has_the_settings_of_the_inherited_connection(
    postgres: EmbeddedPostgres, driver: str
) -> None:
    async def seen(connection: AsyncConnection) -> list[Any]:
        names = ("transaction_isolation", "transaction_read_only", "transaction_deferrable")
        shown = [await connection.scalar(text(f"show {name}")) for name in names]
        await connection.rollback()
        return shown

    async def parent() -> None:
        async with an_engine(postgres.url(driver=driver), pool_size=1, max_overflow=0) as engine:
            connection = await (await engine.connect()).execution_options(
                isolation_level="SERIALIZABLE", postgresql_readonly=True, postgresql_deferrable=True
            )
            assert await seen(connection) == ["serializable", "on", "on"]

            async def child() -> None:
                assert await seen(connection) == ["serializable", "on", "on"]
                await connection.close()
                async with engine.connect() as again:
                    assert await seen(again) == ["read committed", "off", "off"]
                await engine.dispose()

            run_in_child(lambda: asyncio.run(child()))
            assert await seen(connection) == ["serializable", "on", "on"]
            await connection.close()

    asyncio.run(parent())


@both_drivers
def test_kept_sockets(postgres: EmbeddedPostgres, driver: str) -> None:
    async def parent() -> None:
        async with an_engine(postgres.url(driver=driver), inherited_sockets="keep") as engine:
            connection = await engine.connect()
            number = await server_pid(connection)
            tag = tag_of(connection)
            assert tag is not None and tag.fd is not None

            async def child() -> None:
                with pytest.raises(OperationalError):
                    await server_pid(connection)
                assert os.fstat(tag.fd).st_ino == tag.socket_inode
                await connection.close()
                await engine.dispose()

            run_in_child(lambda: asyncio.run(child()))
            assert await server_pid(connection) == number
            await connection.close()

    asyncio.run(parent())


@both_drivers
@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up:sqlalchemy.exc.SAWarning")
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")  # psycopg's own
def test_a_collected_checkout_is_closed_as_such(postgres: EmbeddedPostgres, driver: str) -> None:
    """SQLAlchemy terminates asyncpg's connection, and drops psycopg's."""

    async def collect() -> None:
        events = Events()
        options: Any = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5, "family_limit": 1}
        async with an_engine(postgres.url(driver=driver), logger=events.logger, **options) as engine:
            pool = engine.pool
            assert isinstance(pool, AsyncPidPool)
            tags = []
            for _ in range(3):  # each needs the permit of the one before
                connection: AsyncConnection | None = await engine.connect()
                assert connection is not None
                await connection.rollback()
                tags.append(tag_of(connection))
                del connection
                gc.collect()
                assert (pool.checkedin(), pool.stats().connections) == (1, ())
            pool.log_waiting_events()
            closed = [(event["reason"], event["connection_id"]) for event in events.of("connection.closed")]
            assert closed == [("collected", tag and tag.connection_id) for tag in tags]
            assert pool.stats().counters.closed["collected"] == 3
            async with engine.connect() as connection:
                await server_pid(connection)

    asyncio.run(collect())


def test_the_transaction_state_is_read_without_the_server(postgres: EmbeddedPostgres) -> None:
    async def use() -> None:
        async with (
            an_engine(postgres.url(driver="postgresql+asyncpg")) as engine,
            engine.connect() as connection,
        ):
            raw = (await connection.get_raw_connection()).dbapi_connection
            assert stand_in.transaction_state(raw) == "no transaction"
            await server_pid(connection)
            assert stand_in.transaction_state(raw) == "in transaction"

    asyncio.run(use())


async def _in_greenlet(function: Any, *arguments: Any) -> Any:
    return await greenlet_spawn(function, *arguments)


def test_an_item_of_the_queue_goes_to_the_task_that_waits_longest() -> None:
    async def wait() -> None:
        queue: AsyncIdleQueue[int] = AsyncIdleQueue(1)
        first, second = (asyncio.create_task(_in_greenlet(queue.get, True, 5)) for _ in range(2))
        await asyncio.sleep(0)
        for item in (1, 2):
            assert queue.keep(item) is None  # a task has the room for it
            with pytest.raises(Empty):  # it is that task's already
                queue.get(False)
        queue.put(3)
        with pytest.raises(Full):
            queue.put(4)
        assert (queue.qsize(), queue.full(), queue.empty()) == (1, True, False)
        assert [await first, await second, queue.get(False)] == [1, 2, 3]
        assert (queue.qsize(), queue.full(), queue.empty()) == (0, False, True)

    asyncio.run(wait())


@pytest.mark.parametrize("use_lifo", [False, True])
def test_an_item_for_a_task_that_gave_up_is_not_lost(use_lifo: bool) -> None:
    async def give_up() -> None:
        queue: AsyncIdleQueue[int] = AsyncIdleQueue(2, use_lifo)
        with pytest.raises(Empty):
            await _in_greenlet(queue.get, True, 0.01)
        cancelled, other = (asyncio.create_task(_in_greenlet(queue.get, True, 5)) for _ in range(2))
        await asyncio.sleep(0)
        queue.put(1)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await other == 1
        alone = asyncio.create_task(_in_greenlet(queue.get, True, 5))
        await asyncio.sleep(0)
        queue.put(1)
        queue.put(2)
        alone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await alone
        assert queue.qsize() == 2
        assert {queue.get_nowait(), queue.get_nowait()} == {1, 2}
        for item in (1, 2):
            queue.put_nowait(item)
        with pytest.raises(Full):
            queue.put_nowait(3)
        assert queue.get(False) == (2 if use_lifo else 1)

    asyncio.run(give_up())


def test_a_task_gets_the_item_whose_handing_over_was_interrupted() -> None:
    class SoftTimeLimit(Exception):
        pass

    async def wait() -> None:
        queue: AsyncIdleQueue[int] = AsyncIdleQueue(2)
        task = asyncio.create_task(_in_greenlet(queue.get, True, 30))
        await asyncio.sleep(0)

        def pop() -> int:
            raise SoftTimeLimit

        with pytest.MonkeyPatch.context() as interrupted:
            interrupted.setattr(queue, "_pop", pop)
            with pytest.raises(SoftTimeLimit):
                queue.put(1)
        assert await task == 1

    asyncio.run(wait())


def test_a_task_is_woken_at_once_by_another_thread() -> None:
    """The garbage collector may return a connection in any thread."""

    async def wait() -> None:
        queue: AsyncIdleQueue[int] = AsyncIdleQueue(1)
        with pytest.MonkeyPatch.context() as patient:
            patient.setattr(idle_queue, "LOOK_AGAIN", 30)
            task = asyncio.create_task(_in_greenlet(queue.get, True, 60))
            await asyncio.sleep(0)
            thread = threading.Thread(target=queue.put, args=(1,))
            thread.start()
            assert await asyncio.wait_for(task, 20) == 1
        thread.join()

    asyncio.run(wait(), debug=True)  # raises if a thread does to a loop what only the loop's own may


def test_a_task_whose_loop_was_closed_takes_no_item_with_it() -> None:
    queue: AsyncIdleQueue[int] = AsyncIdleQueue(1)

    async def begin() -> asyncio.Task[int]:
        task = asyncio.create_task(_in_greenlet(queue.get, True, 60))
        await asyncio.sleep(0)
        return task

    async def go_on() -> None:
        waiting = await begin()
        queue.put(1)
        assert await waiting == 1
        queue.put(2)
        assert queue.get(False) == 2

    loop = asyncio.new_event_loop()
    lost = loop.run_until_complete(begin())
    loop.close()
    asyncio.run(go_on())
    lost._log_destroy_pending = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("end", ["failed connect", "interrupted return"])
def test_a_task_does_not_wait_on_when_a_place_has_become_free(end: str) -> None:
    """Without a bound for the wait, and no connection comes back."""

    class Connection:
        def rollback(self) -> None: ...

        def close(self) -> None: ...

    async def use() -> None:
        may_go_on, attempts = asyncio.Event(), itertools.count()

        def connect() -> Connection:
            if end == "failed connect" and next(attempts) == 0:
                await_only(may_go_on.wait())
                raise ConnectionRefusedError
            return Connection()

        def fail(*_: Any) -> None:
            raise ConnectionResetError

        pool = AsyncPidPool(connect, pool_size=1, max_overflow=0, timeout=None)
        first = asyncio.create_task(_in_greenlet(pool.connect))
        await asyncio.sleep(0)
        second = asyncio.create_task(_in_greenlet(pool.connect))
        await asyncio.sleep(0)
        assert pool.stats().waiting == 1
        may_go_on.set()
        if end == "failed connect":
            with pytest.raises(ConnectionRefusedError):
                await first
        else:
            event.listen(pool, "checkin", fail)
            with pytest.raises(ConnectionResetError):
                (await first).close()
            event.remove(pool, "checkin", fail)
        (await asyncio.wait_for(second, 20)).close()
        assert (pool.checkedin(), pool.checkedout(), pool.stats().waiting) == (1, 0, 0)

    asyncio.run(use())


def test_a_child_does_not_wake_the_loop_of_its_parent() -> None:
    """It has the socket by which a loop is woken too."""

    async def wait() -> None:
        pool = AsyncPidPool(lambda: None, pool_size=1, max_overflow=0)
        queue: Any = pool._pool
        task = asyncio.create_task(_in_greenlet(queue.get, True, 60))
        await asyncio.sleep(0)
        run_in_child(pool.stats)
        loop: Any = asyncio.get_running_loop()
        with pytest.raises(BlockingIOError):
            loop._ssock.recv(1)
        queue.put(1)
        assert await task == 1

    asyncio.run(wait())


@both_drivers
def test_a_child_forked_in_the_middle_of_a_first_connect_connects(
    postgres: EmbeddedPostgres, driver: str
) -> None:
    """It has a copy of the task that connects, which never runs there, and of its lock."""

    async def use(engine: AsyncEngine) -> int:
        async with engine.connect() as connection:
            return await server_pid(connection)

    async def use_and_dispose(engine: AsyncEngine) -> int:
        number = await asyncio.wait_for(use(engine), 20)
        await engine.dispose()
        return number

    async def fork_meanwhile() -> None:
        async with an_engine(postgres.url(driver=driver)) as engine:
            connecting = asyncio.create_task(use(engine))
            dialect = engine.sync_engine.dialect
            has_begun = asyncio.Event()
            initialize = dialect.initialize

            def note_and_initialize(connection: Any) -> None:
                has_begun.set()
                initialize(connection)

            dialect.initialize = note_and_initialize  # type: ignore[method-assign]
            await has_begun.wait()
            childs = run_in_child(lambda: asyncio.run(use_and_dispose(engine)))
            assert childs != await connecting

    asyncio.run(fork_meanwhile())
