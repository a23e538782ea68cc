"""Connects that fail are counted by the class of the error, in one small table for the whole family."""

from __future__ import annotations

import os
import socket
from importlib.metadata import version
from typing import Any

import pytest
from engines import MakeEngine
from events import Events
from forking import run_in_child
from packaging.version import Version
from sqlalchemy import exc, make_url

from pidpool import PidPool
from pidpool.stats import error_types

SECRET = "hunter2-of-nobody"


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def failing_pool(*errors: type[BaseException], **options: Any) -> PidPool:
    """Return a pool whose connects raise these errors, one after the other."""
    to_raise = iter(errors)

    def connect() -> Any:
        raise next(to_raise)

    return PidPool(connect, **options)


def fail(pool: PidPool, times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(BaseException):  # noqa: B017, PT011  whatever the creator raises
            pool.connect()


def error_named(name: str) -> type[Exception]:
    return type(name, (Exception,), {})


def test_a_failed_connect_has_an_event_and_is_counted_in_the_family(
    tls_url: str, make_engine: MakeEngine
) -> None:
    events = Events()
    url = make_url(tls_url).set(port=closed_port(), password=SECRET)
    engine = make_engine(url.render_as_string(hide_password=False), logger=events.logger)
    for _ in range(2):
        with pytest.raises(exc.OperationalError):
            engine.connect()
    first, second = events.of("connection.failed")
    for event in (first, second):
        assert event["error"] == "OperationalError"
        assert 0 <= event["create_time"] < 30
    assert SECRET not in repr(events.all)

    def child() -> Any:
        with pytest.raises(exc.OperationalError):
            engine.connect()
        return engine.pool.stats().counters.failed  # type: ignore[attr-defined]

    assert engine.pool.stats().counters.failed == {"OperationalError": 2}  # type: ignore[attr-defined]
    assert run_in_child(child) == {"OperationalError": 1}
    assert engine.pool.family_stats().counters.failed == {"OperationalError": 3}  # type: ignore[attr-defined]
    assert engine.pool.stats().counters.opened == 0  # type: ignore[attr-defined]


def test_a_connect_listener_that_raises_is_a_failed_connect() -> None:
    from sqlalchemy import event

    class Connection:
        def close(self) -> None: ...

    events = Events()
    pool = PidPool(Connection, logger=events.logger)

    @event.listens_for(pool, "connect")
    def refuse(connection: object, entry: object) -> None:
        raise PermissionError

    fail(pool)
    assert events.the("connection.failed")["error"] == "PermissionError"
    # SQLAlchemy before 2.0.53 leaves the connection to the garbage collector.
    closes = Version(version("sqlalchemy")) >= Version("2.0.53")
    assert [event["reason"] for event in events.of("connection.closed")] == ["failed"] * closes
    assert pool.stats().counters.failed == {"PermissionError": 1}


def test_processes_that_meet_errors_in_another_order_count_the_same_ones() -> None:
    errors = [error_named("One"), error_named("Two")]
    pool = failing_pool(errors[0], errors[1], errors[1])
    other = failing_pool(errors[1])
    pool_in_child = failing_pool(*errors)
    assert pool_in_child.stats().counters.failed == {}

    def child() -> Any:
        fail(pool, 2)
        return pool.stats().counters.failed

    assert run_in_child(child) == {"One": 1, "Two": 1}
    fail(pool)  # the child's iterator was a copy
    assert pool.stats().counters.failed == {"One": 1}
    fail(pool)
    assert pool.family_stats().counters.failed == {"One": 2, "Two": 2}
    fail(other)
    assert other.stats().counters.failed == {"Two": 1}


def test_more_classes_than_there_is_room_for_are_counted_together() -> None:
    errors = [error_named(f"Error{number}") for number in range(error_types.MOST + 3)]
    pool = failing_pool(*errors)
    fail(pool, len(errors))
    counted = pool.stats().counters.failed
    assert counted == {**{f"Error{number}": 1 for number in range(error_types.MOST)}, error_types.OTHER: 3}


@pytest.mark.parametrize("name", ["E" * 40, "Fehler" + "ü" * 20])
def test_a_long_name_is_cut(name: str) -> None:
    error = error_named(name)
    pool = failing_pool(error, error)
    fail(pool, 2)
    ((counted, times),) = pool.stats().counters.failed.items()
    assert times == 2 and name.startswith(counted) and 30 <= len(counted.encode()) <= 32


def test_a_process_that_is_killed_with_the_lock_leaves_the_table_usable() -> None:
    pool = failing_pool(error_named("First"), error_named("First"))

    def child() -> None:
        pool.pool_events.family._lock.acquire(1)
        os._exit(0)

    pid = os.fork()
    if pid == 0:
        child()
    os.waitpid(pid, 0)
    fail(pool)
    assert pool.stats().counters.failed == {"First": 1}
