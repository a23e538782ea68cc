"""Every event, with all its fields and at its level: logged once, in the user's own structlog
configuration and context, and never with a secret in it."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from engines import MakeEngine, pool_of
from events import LEVELS_AND_FIELDS, Events
from forking import How, run_in_child
from parent import Parent, server_pid
from sqlalchemy import Connection, Engine, create_engine, exc, text
from sqlalchemy import event as sqlalchemy_event
from waiting import until

from pidpool import ForeignConnectionError, PidPool, tag_of
from pidpool.events import logger as event_logger
from pidpool.events.pool_events import PoolEvents
from pidpool.forks import detection
from pidpool.forks.gate import Fork
from pidpool.stats.family import Family
from pidpool.tools.demo.postgres import EmbeddedPostgres


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture(autouse=True)
def structlog_as_it_was() -> Iterator[None]:
    assert not structlog.is_configured()
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


# -- the events


@pytest.mark.usefixtures("table", "clean_log")
def test_every_event_is_complete(tls_url: str, make_engine: MakeEngine, events: Events) -> None:
    engine = make_engine(
        tls_url, logger=events.logger, pool_logging_name="main", pool_size=3, max_overflow=0, hold_warning=60
    )
    began = time.time()
    fails = [True]

    @sqlalchemy_event.listens_for(engine, "do_connect")
    def fail_once(*_: object) -> None:
        if fails:
            fails.pop()
            raise ConnectionRefusedError

    with pytest.raises(ConnectionRefusedError):
        engine.connect()
    with engine.connect() as one, engine.connect() as other, engine.connect() as third:
        engine.pool._timeout = 0.01  # type: ignore[attr-defined]
        with pytest.raises(exc.TimeoutError):
            engine.connect()
        third.invalidate()
        third.close()
        checkout = other.connection._connection_record.watched  # type: ignore[attr-defined]
        checkout.since -= 61
        one.execute(text("insert into kept values ('parent')"))

        def child() -> tuple[int, list[dict[str, Any]]]:
            events.clear()
            other.execute(text("select 1"))
            with pytest.raises(exc.OperationalError):
                one.execute(text("select 1"))
            one.close()
            other.close()
            engine.dispose()
            return os.getpid(), events.all

        child_pid, logged_by_child = run_in_child(child)
        one.commit()
        assert one.scalars(text("select v from kept")).all() == ["parent"]
    engine.dispose()

    logged = events.all + logged_by_child
    # These take many processes (tests/stats/), or another driver (tests/drivers/).
    elsewhere = {
        "pool.over_maximum",
        "family.private",
        "family.limits_differ",
        "connection.given_back",
        "driver.unknown",
    }
    assert {event["event"] for event in logged} == LEVELS_AND_FIELDS.keys() - elsewhere
    for event in logged:
        level, fields = LEVELS_AND_FIELDS[event["event"]]
        if event.get("state") == "no transaction":
            level = "info"  # it does no harm
        assert event.keys() == fields | {"event", "level", "pool", "pid", "at"}
        assert event["level"] == level, event
        assert event["pool"] == "main"
        assert began <= event["at"] <= time.time()
        assert all(type(value) in (str, int, float, bool, type(None)) for value in event.values()), event
    assert {event["pid"] for event in events.all} == {os.getpid()}
    assert {event["pid"] for event in logged_by_child} == {child_pid}


def test_each_method_is_an_event_of_the_table() -> None:
    events = Events()
    pool_events = PoolEvents("a pool", events.logger, Family(5, 10))
    tag = _tag()
    for name, method in inspect.getmembers(pool_events, inspect.ismethod):
        parameters = inspect.signature(method).parameters.values()
        if name.partition("_")[0] in ("connection", "checkout", "pool", "family", "driver"):
            family = Family(5, 10).read("a pool")
            given: dict[str, Any] = {"reason": "recycled", "state": "idle", "idle": 1}
            if name == "checkout_timed_out":
                given["family"] = family
            method(
                *[
                    tag if "ConnectionTag" in str(each.annotation) else given.get(each.name, 0)
                    for each in parameters
                ]
            )
            assert events.names[-1].replace(".", "_") == name
    assert sorted(events.names) == sorted(LEVELS_AND_FIELDS)


def test_a_fork_with_connects_in_flight_is_a_warning() -> None:
    events = Events()
    PoolEvents("a pool", events.logger, Family(5, 10)).pool_adopted(0.0, 1, "hook", 0, 0, 0, 1, None)
    assert events.the("pool.adopted")["level"] == "warning"


def _tag() -> Any:
    from pidpool import ConnectionTag

    return ConnectionTag("1-1", os.getpid(), 2, 3, 4, 5.0)


def _recycle(engine: Engine, connection: Connection) -> None:
    entry: Any = connection.connection._connection_record
    connection.close()
    engine.pool._recycle = 3600
    entry.starttime -= 3601
    engine.connect().close()


def _overflow(engine: Engine, connection: Connection) -> None:
    with engine.connect() as first:
        first.commit()
    connection.close()  # the pool's only slot is taken by the other one


def _dispose(engine: Engine, connection: Connection) -> None:
    connection.close()
    engine.dispose()


def _detach(engine: Engine, connection: Connection) -> None:
    connection.detach()
    connection.close()


@pytest.mark.parametrize(
    ("reason", "end"),
    [
        ("recycled", _recycle),
        ("invalidated", lambda engine, connection: connection.invalidate()),
        ("overflow", _overflow),
        ("disposed", _dispose),
        ("detached", _detach),
    ],
)
def test_the_end_of_a_connection_has_its_reason(
    tls_url: str,
    make_engine: MakeEngine,
    events: Events,
    reason: str,
    end: Callable[[Engine, Connection], None],
) -> None:
    engine = make_engine(tls_url, logger=events.logger, pool_size=1)
    connection = engine.connect()
    tag = tag_of(connection)
    assert tag is not None
    end(engine, connection)
    closed = events.the("connection.closed")
    assert (closed["reason"], closed["connection_id"]) == (reason, tag.connection_id)


def test_a_checkout_logs_its_wait_time_and_a_checkin_its_use_time(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    engine = make_engine(tls_url, logger=events.logger, pool_size=1, max_overflow=0)
    waiting = threading.Thread(target=lambda: engine.connect().close())
    read = time.perf_counter
    begun = read()
    held = engine.connect()
    connected = read()
    waiting.start()
    until(lambda: pool_of(engine).stats().waiting == 1, "the thread does not wait")
    waits = read()
    time.sleep(0.02)  # not waited for: so that a time of 0 is wrong
    returning = read()
    held.close()
    returned = read()
    waiting.join(10)
    assert not waiting.is_alive()
    ended = read()
    (first_out, second_out) = events.of("connection.checked_out")
    (first_in, second_in) = events.of("connection.checked_in")
    create_time = events.the("connection.opened")["create_time"]
    assert 0 < create_time <= first_out["wait_time"] <= micro(connected - begun)
    assert micro(returning - connected) <= first_in["use_time"] <= micro(returned - begun)
    assert micro(returning - waits) <= second_out["wait_time"] <= micro(ended - connected)
    assert 0 < second_in["use_time"] <= micro(ended - returning)


def micro(seconds: float) -> float:
    """Round to microseconds, as events do."""
    return round(seconds, 6)


def test_a_pool_keeps_its_name(tls_url: str, make_engine: MakeEngine, events: Events) -> None:
    engine = make_engine(tls_url, logger=events.logger, pool_logging_name="main")
    for _ in range(2):
        engine.connect().close()
        engine.dispose()
    assert {event["pool"] for event in events.all} == {"main"}


# -- forks


@pytest.mark.usefixtures("table", "clean_log")
@pytest.mark.parametrize("how", ["python", "c"])
def test_a_leak_is_logged_with_both_pids(
    tls_url: str, make_engine: MakeEngine, events: Events, how: How
) -> None:
    engine = make_engine(tls_url, logger=events.logger, hold_warning=60)
    idle = engine.connect()
    parent = Parent(engine, "in transaction")
    idle_tag = tag_of(idle)
    idle.close()
    assert idle_tag is not None
    events.clear()

    def child() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        unlogged = list(events.all)  # recorded in the hook, if there is one, and no more
        parent.connection = None
        with engine.connect():
            pass
        logged = list(events.all)
        engine.dispose()
        return unlogged, logged

    unlogged, logged = run_in_child(child, how=how)
    noticed_by = time.time()
    assert unlogged == []
    adopted, *inherited = logged[:3]
    assert adopted["event"] == "pool.adopted"
    assert adopted["trigger"] == ("hook" if how == "python" else "lazy")
    assert adopted["parent_pid"] == os.getpid() != adopted["pid"]
    assert (adopted["idle"], adopted["checked_out"], adopted["in_transaction"]) == (1, 1, 1)
    by_state = {event["state"]: event for event in inherited}
    for state, tag, level in [("idle", idle_tag, "info"), ("in transaction", parent.tag, "warning")]:
        event = by_state[state]
        assert event["event"] == "connection.inherited" and event["level"] == level
        assert event["owner_pid"] == os.getpid() and event["pid"] == adopted["pid"]
        assert (event["fd"], event["server_pid"]) == (tag.fd, tag.server_pid)
        assert event["connection_id"] == tag.connection_id and event["socket_inode"] == tag.socket_inode
        assert event["action"] == "severed"
    assert by_state["idle"]["where"] is None
    assert by_state["in transaction"]["where"].partition(":")[0] == inspect.getfile(Parent)
    assert [event["event"] for event in logged[3:]] == [
        "connection.opened",
        "connection.checked_out",
        "connection.checked_in",
    ]

    # The parent logs at its own next use; it does not notice a fork in C.
    assert events.all == []
    parent.notices_nothing()
    engine.connect().close()
    forked = events.of("pool.forked")
    assert len(forked) == (how == "python")
    for event in forked:
        assert (event["idle"], event["checked_out"], event["in_transaction"]) == (1, 1, 1)
        # The times are the hooks', of which either may be first, and not those of the log lines.
        assert max(event["at"], adopted["at"]) <= noticed_by


@pytest.mark.usefixtures("table", "clean_log")
def test_a_fork_is_before_all_that_the_child_does_also_if_the_child_is_ahead(
    tls_url: str, make_engine: MakeEngine, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tls_url, logger=events.logger)
    parent = Parent(engine, "in transaction")
    reader, writer = os.pipe()

    def child() -> list[dict[str, Any]]:
        engine.connect().close()
        engine.dispose()
        os.write(writer, b"logged")
        return events.all

    monkeypatch.setattr(detection, "_has_dead_threads", True)  # so that it does not count as alone
    after_fork = detection._gate.after_fork_in_parent  # runs in the parent's hook, after the fork

    def wait_for_the_child(fork: Fork) -> None:
        assert os.read(reader, 6) == b"logged"
        after_fork(fork)

    monkeypatch.setattr(detection._gate, "after_fork_in_parent", wait_for_the_child)
    logged = run_in_child(child)
    parent.notices_nothing()
    engine.connect().close()
    (adopted,) = [event for event in logged if event["event"] == "pool.adopted"]
    assert events.the("pool.forked")["at"] <= adopted["at"]
    os.close(reader)
    os.close(writer)


@pytest.mark.usefixtures("clean_log")
def test_a_pool_and_its_predecessors_are_adopted_once(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    engine = make_engine(tls_url, logger=events.logger)
    holder = [engine.connect()]
    number = server_pid(holder[0])
    engine.dispose()  # the pool that it was checked out from lives on
    engine.connect().close()

    def child() -> tuple[list[dict[str, Any]], int]:
        events.clear()
        adoptions = pool_of(engine).stats().counters.adoptions
        inherited = len(events.of("connection.inherited"))
        holder.pop().close()
        engine.dispose()
        assert inherited == 2
        return events.of("pool.adopted"), sum(adoptions.values())

    (adopted,), counted = run_in_child(child)
    assert (adopted["idle"], adopted["checked_out"], adopted["in_transaction"]) == (1, 1, 1)
    assert counted == 1
    assert server_pid(holder[0]) == number
    holder.pop().close()


def test_an_idle_entry_without_a_connection_is_no_other_pools_connection(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    without = make_engine(tls_url, pool_logging_name="without", logger=events.logger)
    engine = make_engine(tls_url, pool_logging_name="with", logger=events.logger)
    with without.connect() as connection:
        connection.invalidate()
    with engine.connect() as connection:
        run_in_child(int)
        engine.connect().close()
    forked = events.the("pool.forked")
    assert (forked["pool"], forked["idle"], forked["checked_out"]) == ("with", 0, 1)


def test_an_idle_entry_without_a_connection_is_no_disposed_pools_connection(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    engine = make_engine(tls_url, logger=events.logger)
    with engine.connect():
        engine.dispose()
        with engine.connect() as connection:
            connection.invalidate()
        run_in_child(int)
        engine.connect().close()
    forked = events.the("pool.forked")
    assert (forked["idle"], forked["checked_out"]) == (0, 1)


@pytest.mark.usefixtures("table", "clean_log")
@pytest.mark.parametrize("how", ["python", "c"])
def test_an_inherited_connection_is_logged_before_it_is_refused(
    tls_url: str, make_engine: MakeEngine, events: Events, how: How
) -> None:
    engine = make_engine(tls_url, logger=events.logger)
    parent = Parent(engine, "in transaction")
    events.clear()

    def child() -> list[str]:
        assert parent.connection is not None
        with pytest.raises(exc.OperationalError):
            parent.connection.execute(text("select 1"))
        return events.names

    logged = run_in_child(child, how=how)
    assert logged[:3] == ["pool.adopted", "connection.inherited", "connection.refused"]
    assert logged.count("connection.refused") == 1
    parent.notices_nothing()


# -- secrets

SECRET = "hunter2secret"


@pytest.mark.usefixtures("table", "clean_log")
def test_no_event_and_no_error_has_a_secret(
    postgres: EmbeddedPostgres, events: Events, capfd: pytest.CaptureFixture[str]
) -> None:
    url = postgres.url(tls=True).replace("//pidpool@", f"//pidpool:{SECRET}@")
    assert SECRET in url
    engine = create_engine(
        url,
        poolclass=PidPool,
        logger=events.logger,
        pool_size=1,
        max_overflow=0,
        pool_timeout=0.01,
        hold_warning=0,
    )
    logged: list[str] = []

    def failed(error: BaseException) -> None:
        logged.extend([str(error), repr(error), repr(error.__cause__), repr(getattr(error, "orig", None))])

    with engine.connect() as connection:
        with pytest.raises(exc.TimeoutError) as timeout:
            engine.connect()
        failed(timeout.value)
        for x in (connection.connection.dbapi_connection, url):
            with pytest.raises(TypeError) as no_tag:
                tag_of(x)  # type: ignore[arg-type]
            failed(no_tag.value)
        connection.execute(text("insert into kept values (:v)"), {"v": SECRET})
        number = server_pid(connection)
        logged += run_in_child(_uses_of_what_is_not_its_own, engine, connection, events)
        assert server_pid(connection) == number
        assert connection.scalars(text("select v from kept")).all() == [SECRET]
        # A driver's error quotes the statement.
        error = exc.DBAPIError(f"insert into kept values ('{SECRET}')", {"v": SECRET}, Exception(SECRET))
        connection.invalidate(error)
    logged += [repr(engine.pool), engine.pool.status()]
    logged += [repr(pool_of(engine).stats()), repr(pool_of(engine).family_stats())]
    engine.dispose()

    for wrong in (url.replace("//pidpool:", "//nobody:"), url.replace("/postgres", "/nowhere")):
        unable = create_engine(wrong, poolclass=PidPool, logger=events.logger)
        with pytest.raises(exc.OperationalError) as refused:
            unable.connect()
        failed(refused.value)
    for event in events.all:
        logged += [repr(event)]
    logged += capfd.readouterr()
    assert {"connection.opened", "connection.invalidated", "checkout.timed_out"} <= set(events.names)
    for each in logged:
        assert SECRET not in each
    assert not [each for each in logged if "postgresql" in each]


def _uses_of_what_is_not_its_own(engine: Engine, connection: Connection, events: Events) -> list[str]:
    logged = [repr(connection.connection.dbapi_connection), repr(tag_of(connection))]
    with pytest.raises(exc.OperationalError) as caught:
        connection.execute(text("select 1"))
    error = caught.value.orig
    assert isinstance(error, ForeignConnectionError)
    logged += [str(error), repr(error), repr(error.args)]
    connection.close()
    engine.dispose()
    return logged + [repr(event) for event in events.all]


# -- the context


@pytest.mark.usefixtures("clean_log")
def test_events_have_what_the_application_bound(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    engine = make_engine(tls_url, logger=events.logger.bind(service="shop"))
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        connection = engine.connect()
    number = server_pid(connection)
    assert {event["request_id"] for event in events.all} == {"r-1"}
    assert {event["service"] for event in events.all} == {"shop"}
    events.clear()

    def child() -> list[dict[str, Any]]:
        with structlog.contextvars.bound_contextvars(task_id="t-1"):
            engine.connect().close()
            engine.dispose()
        return events.all

    logged = run_in_child(child)
    assert logged[0]["event"] == "pool.adopted"
    assert {event["task_id"] for event in logged} == {"t-1"}
    assert server_pid(connection) == number
    connection.close()


def test_the_events_of_a_finalizer_are_logged_at_the_next_use_in_its_own_context(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    engine = make_engine(tls_url, logger=events.logger)
    raw = engine.raw_connection()
    events.clear()
    with structlog.contextvars.bound_contextvars(request_id="dropped in"):
        del raw
        gc.collect()
    assert events.all == []
    with structlog.contextvars.bound_contextvars(request_id="used in"):
        engine.connect().close()
    assert [(event["event"], event["request_id"]) for event in events.all] == [
        ("connection.checked_in", "dropped in"),
        ("connection.checked_out", "used in"),
        ("connection.checked_in", "used in"),
    ]


@pytest.mark.usefixtures("table", "clean_log")
def test_a_child_does_not_log_the_waiting_events_of_its_parent(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    engine = make_engine(tls_url, logger=events.logger)
    parent = Parent(engine, "idle")
    raw = engine.raw_connection()
    del raw
    gc.collect()
    events.clear()

    def child() -> list[str]:
        engine.pool.status()
        return events.names

    assert run_in_child(child) == ["pool.adopted", "connection.inherited"]
    engine.pool.status()
    assert events.names == ["connection.checked_in", "pool.forked"]
    parent.notices_nothing()


# -- the user's logger


def test_the_configuration_may_come_after_the_pool(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    engine = make_engine(tls_url)
    for cache in (True, False):
        events.clear()
        engine.connect().close()
        assert events.all == []
        structlog.configure(
            processors=[structlog.processors.add_log_level, events._keep],
            wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
            cache_logger_on_first_use=cache,
        )
        engine.connect().close()
        assert events.names == ["connection.checked_out", "connection.checked_in"]
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
        engine.connect().close()
        assert len(events.all) == 2
        structlog.reset_defaults()


def test_a_logger_of_the_stdlib_will_do(
    tls_url: str, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(tls_url, logger=logging.getLogger("shop.database"), pool_logging_name="main")
    with caplog.at_level(logging.DEBUG, "shop.database"):
        engine.connect().close()
    assert [record.name for record in caplog.records] == ["shop.database"] * 3
    assert caplog.messages[0].startswith("event='connection.opened' pool='main' pid=")


@pytest.mark.filterwarnings("ignore:.*AsyncBoundLogger.*:DeprecationWarning")
@pytest.mark.parametrize(
    "wrapper",
    [
        structlog.BoundLogger,
        structlog.stdlib.BoundLogger,
        structlog.stdlib.AsyncBoundLogger,
        structlog.make_filtering_bound_logger(logging.DEBUG),
    ],
)
def test_every_wrapper_of_structlog_will_do(
    tls_url: str, make_engine: MakeEngine, events: Events, wrapper: Any
) -> None:
    structlog.configure(
        processors=[structlog.processors.add_log_level, events._keep],
        wrapper_class=wrapper,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    pidpool_logger = logging.getLogger("pidpool")
    engine = make_engine(tls_url)
    pidpool_logger.setLevel(logging.DEBUG)
    try:
        engine.connect().close()
    finally:
        pidpool_logger.setLevel(logging.NOTSET)
    assert events.names == ["connection.opened", "connection.checked_out", "connection.checked_in"]


def test_a_checkout_knows_at_once_whether_debug_events_are_enabled() -> None:
    pidpool_logger = logging.getLogger("pidpool")
    stdlib = {
        "logger_factory": structlog.stdlib.LoggerFactory(),
        "wrapper_class": structlog.stdlib.BoundLogger,
    }
    of_structlog = PoolEvents(None, None, Family(5, 10))
    given = PoolEvents(None, structlog.get_logger("given"), Family(5, 10))

    def levels_taken() -> tuple[bool, bool]:
        return of_structlog.is_enabled(), given.is_enabled()

    try:
        assert levels_taken() == (False, True)  # structlog's own logger, not configured, has its defaults
        pidpool_logger.setLevel(logging.DEBUG)
        assert levels_taken() == (True, True)
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
        assert levels_taken() == (False, False)
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))
        assert levels_taken() == (True, True)
        structlog.configure(**stdlib)
        assert levels_taken() == (True, False)
        pidpool_logger.setLevel(logging.INFO)
        assert levels_taken() == (False, False)
        logging.getLogger("given").setLevel(logging.DEBUG)
        assert levels_taken() == (False, True)
        # Both of structlog's levels and the stdlib's have to let it pass.
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
        assert levels_taken() == (False, False)
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))
        assert levels_taken() == (False, True)
        logging.disable(logging.DEBUG)
        assert levels_taken() == (False, False)
        logging.disable(logging.NOTSET)
        structlog.configure(
            wrapper_class=structlog.BoundLogger, logger_factory=structlog.PrintLoggerFactory()
        )
        assert levels_taken() == (True, True)  # it has no level
        structlog.reset_defaults()
        assert levels_taken() == (False, True)
    finally:
        logging.disable(logging.NOTSET)
        for name in ("pidpool", "given"):
            logging.getLogger(name).setLevel(logging.NOTSET)


def test_structlog_may_keep_its_configuration_elsewhere_one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_logger, "_configuration", event_logger._AskedConfiguration())
    test_a_checkout_knows_at_once_whether_debug_events_are_enabled()


class UsesThePool(logging.Handler):
    """A handler that keeps its records in the database, by the pool that they are of."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        with self.engine.begin() as connection:
            connection.execute(text("insert into kept values (:line)"), {"line": record.getMessage()})
        self.kept.append(record.getMessage().split("'")[1])


@pytest.mark.usefixtures("clean_log")
def test_a_log_handler_may_use_the_pool(tls_url: str, make_engine: MakeEngine, table: str) -> None:
    logger = logging.getLogger("shop.audit")
    engine = make_engine(tls_url, logger=logger)
    handler = UsesThePool(engine)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        engine.connect().close()
        assert handler.kept == ["connection.opened", "connection.checked_out", "connection.checked_in"]

        def child() -> list[str]:
            handler.kept.clear()
            with engine.connect() as connection:
                connection.scalar(text("select 1"))
            pool = engine.pool
            engine.dispose()
            logger.removeHandler(handler)
            pool.dispose()  # closes what the handler opened for the events of dispose()
            return handler.kept

        logged = run_in_child(child)
        assert logged[0] == "pool.adopted"
        assert logged.count("connection.inherited") == 2
        closed = logged.count("connection.closed")
        assert logged[-closed - 1 :] == ["connection.closed"] * closed + ["pool.disposed"]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    with engine.connect() as connection:
        kept = connection.scalar(text("select count(*) from kept"))
    assert kept == len(handler.kept) + len(logged)


class Broken:
    """A logger whose disk is full."""

    def _fail(self, event: str, **fields: object) -> None:
        raise OSError("no space left on device")

    debug = info = warning = _fail


class BrokenInside(structlog.BoundLogger):  # type: ignore[misc]
    """Fails before it logs anything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("wrongly configured")


@pytest.mark.usefixtures("table", "clean_log")
@pytest.mark.parametrize("broken", ["a full disk", "a wrong configuration"])
def test_a_logger_that_fails_costs_an_event_and_no_connection(
    tls_url: str, make_engine: MakeEngine, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    logger = Broken() if broken == "a full disk" else None
    if logger is None:
        structlog.configure(wrapper_class=BrokenInside)
    engine = make_engine(tls_url, logger=logger, pool_size=1, max_overflow=0)
    parent = Parent(engine, "in transaction")

    def child() -> int:
        parent.connection = None
        with engine.connect() as connection:
            one: int = connection.scalar(text("select 1"))
        engine.dispose()
        return one

    assert run_in_child(child) == 1
    parent.notices_nothing()
    engine.connect().close()
    logged = capsys.readouterr()
    assert "pidpool: the event connection.opened could not be logged:" in logged.err
    assert "no space left" in logged.err or "wrongly configured" in logged.err
    assert logged.out == ""


def test_a_failing_logger_is_not_reported_if_logging_is_set_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    PoolEvents("a pool", Broken(), Family(5, 10)).pool_disposed(0, 0)
    assert capsys.readouterr().err == ""


def test_nothing_is_printed_to_stdout_while_structlog_is_not_configured(
    tls_url: str, make_engine: MakeEngine, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(tls_url, pool_size=1, max_overflow=0, pool_timeout=0.01)
    with (
        structlog.contextvars.bound_contextvars(request_id="r-1"),
        engine.connect(),
        pytest.raises(exc.TimeoutError),
    ):
        engine.connect()
    assert capfd.readouterr().out == ""
    (record,) = [record for record in caplog.records if record.name == "pidpool"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("event='checkout.timed_out' pool=")
    assert "request_id='r-1'" in record.getMessage()


# -- under pytest's own capture


@pytest.mark.usefixtures("table", "clean_log")
def test_children_of_a_parent_whose_threads_log_under_pytest_log_too(
    tls_url: str, make_engine: MakeEngine, tmp_path: Path
) -> None:
    structlog.configure(
        processors=[structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    parent = Parent(make_engine(tls_url), "in transaction")
    log = structlog.get_logger("shop")
    ended = threading.Event()

    def keep_logging() -> None:
        while not ended.is_set():
            log.warning("a line")
            ended.wait(0.0005)

    threads = [threading.Thread(target=keep_logging) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            run_in_child(_log_and_use, log, parent)
    finally:
        ended.set()
        for thread in threads:
            thread.join(10)
    parent.notices_nothing()


def _log_and_use(log: Any, parent: Parent) -> None:
    log.warning("at once")
    parent.connection = None
    with contextlib.closing(parent.engine.raw_connection()):
        log.warning("later")
    parent.engine.dispose()
