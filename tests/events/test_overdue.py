"""A checkout that lasts longer than `hold_warning` seconds is logged once while it lasts, and once
more when it comes back; in a forked child as well."""

from __future__ import annotations

import gc
import inspect
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import structlog
from engines import MakeEngine
from events import Events
from forking import How, run_in_child
from parent import Parent
from sqlalchemy import Connection, Engine, text
from waiting import until

from pidpool import tag_of
from pidpool.events import overdue
from pidpool.forks import detection

SHORT = 0.05


@pytest.fixture
def events() -> Events:
    return Events()


def _watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pidpool-overdue"]


def _wait_for(events: Events, name: str, number: int = 1) -> list[dict[str, Any]]:
    until(lambda: len(events.of(name)) >= number, lambda: f"not {number} {name} in {events.names}")
    return events.of(name)


def test_an_overdue_checkout_is_logged_once_with_its_place_and_context(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    engine = make_engine(tls_url, logger=events.logger, hold_warning=SHORT)
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        connection = engine.connect()
        line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    (logged,) = _wait_for(events, "checkout.overdue")
    tag = tag_of(connection)
    assert tag is not None
    assert logged["connection_id"] == tag.connection_id and logged["server_pid"] == tag.server_pid
    assert logged["hold_warning"] == SHORT <= logged["held"] < 10
    assert logged["where"] == f"{__file__}:{line} in {inspect.currentframe().f_code.co_name}"  # type: ignore[union-attr]
    assert logged["request_id"] == "r-1"
    with engine.connect():  # the watching thread looks again for this one
        _wait_for(events, "checkout.overdue", 2)
    connection.close()
    assert len(events.of("checkout.overdue")) == 2
    first, second = events.of("checkout.returned_late")
    assert second["connection_id"] == tag.connection_id and second["use_time"] >= logged["held"]
    assert second["where"] == logged["where"] and second["hold_warning"] == SHORT
    assert first["connection_id"] != tag.connection_id
    assert "request_id" not in second  # logged in the context in which the connection comes back


def test_a_checkout_that_comes_back_in_time_is_not_logged(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    engine = make_engine(tls_url, logger=events.logger, hold_warning=0.5)
    for _ in range(20):
        engine.connect().close()
    connection = engine.connect()
    _wait_for(events, "checkout.overdue")  # long after the others would have been
    connection.close()
    assert len(events.of("checkout.overdue")) == len(events.of("checkout.returned_late")) == 1


def test_the_checkin_logs_it_if_the_thread_has_not_come_round_to_it(
    tls_url: str, make_engine: MakeEngine, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when something holds the GIL for long."""
    monkeypatch.setattr(overdue, "watch", lambda due_at, watched: None)
    engine = make_engine(tls_url, logger=events.logger, hold_warning=60)
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        connection = engine.connect()
    connection.connection._connection_record.watched.since -= 61  # type: ignore[attr-defined]
    connection.close()
    late = [event for event in events.all if event["event"].startswith("checkout.")]
    assert [event["event"] for event in late] == ["checkout.overdue", "checkout.returned_late"]
    assert late[0]["request_id"] == "r-1" and late[0]["held"] == late[1]["use_time"] > 61


def test_of_two_threads_that_would_log_it_one_does(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    engine = make_engine(tls_url, logger=events.logger, hold_warning=60)
    for _ in range(50):
        connection = engine.connect()
        entry: Any = connection.connection._connection_record
        checkout = entry.watched
        checkout.since -= 61
        barrier = threading.Barrier(2)

        def log_it(
            checkout: Any = checkout, entry: Any = entry, barrier: threading.Barrier = barrier
        ) -> None:
            barrier.wait(10)
            checkout.log_overdue(entry, time.perf_counter())

        logging_thread = threading.Thread(target=log_it)
        logging_thread.start()
        barrier.wait(10)
        connection.close()
        logging_thread.join(10)
    assert len(events.of("checkout.overdue")) == len(events.of("checkout.returned_late")) == 50


def _drop(engine: Engine, connections: list[Connection]) -> None:
    connections.clear()
    gc.collect()
    engine.pool.status()  # the events of a finalizer are logged at the next use


def _detach(engine: Engine, connections: list[Connection]) -> None:
    connections[0].detach()
    connections[0].close()


def _invalidate(engine: Engine, connections: list[Connection]) -> None:
    connections[0].invalidate()
    connections[0].close()


@pytest.mark.parametrize(("end", "late"), [(_drop, 1), (_invalidate, 1), (_detach, 0)])
def test_however_it_ends_it_is_watched_no_longer(
    tls_url: str,
    make_engine: MakeEngine,
    events: Events,
    end: Callable[[Engine, list[Connection]], None],
    late: int,
) -> None:
    """A detached connection is no longer a checkout of the pool's."""
    engine = make_engine(tls_url, logger=events.logger, hold_warning=SHORT)
    connections = [engine.connect()]
    _wait_for(events, "checkout.overdue")
    end(engine, connections)
    assert len(events.of("checkout.returned_late")) == late
    assert not [record for record in engine.pool.records() if record.watched]  # type: ignore[attr-defined]


def test_a_shorter_hold_warning_wakes_the_thread(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    patient = make_engine(tls_url, logger=events.logger, hold_warning=60)
    strict = make_engine(tls_url, logger=events.logger, hold_warning=SHORT, pool_logging_name="strict")
    with patient.connect(), strict.connect():
        (logged,) = _wait_for(events, "checkout.overdue")
    assert logged["pool"] == "strict"


def test_the_thread_is_woken_once_and_not_by_every_checkout(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    engine = make_engine(tls_url, logger=events.logger, hold_warning=60)
    with engine.connect():
        until(_is_asleep, "the thread does not sleep")
        for _ in range(100):
            engine.connect().close()
            assert overdue._wake.empty()


def _is_asleep() -> bool:
    return overdue._next_look != float("inf") and overdue._wake.empty()


@pytest.mark.usefixtures("clean_log")
@pytest.mark.parametrize("how", ["python", "c"])
def test_no_thread_before_the_first_checkout_that_is_watched(
    tls_url: str, make_engine: MakeEngine, how: How
) -> None:
    unwatched, watched = make_engine(tls_url), make_engine(tls_url, hold_warning=60)

    def child() -> list[int]:
        known = set(_watchers())  # with no hook, threading still lists the parent's
        counts = []
        for engine in (unwatched, watched, watched):
            engine.connect().close()
            counts.append(len(set(_watchers()) - known))
        unwatched.dispose()
        watched.dispose()
        return counts

    assert run_in_child(child, how=how) == [0, 1, 1]


@pytest.mark.usefixtures("table", "clean_log")
@pytest.mark.parametrize("how", ["python", "c"])
def test_it_works_in_a_child_and_the_parents_go_on(
    tls_url: str, make_engine: MakeEngine, events: Events, how: How
) -> None:
    engine = make_engine(tls_url, logger=events.logger, hold_warning=SHORT)
    parent = Parent(engine, "in transaction")
    carried = engine.connect()
    _wait_for(events, "checkout.overdue", 2)
    events.clear()

    def child() -> list[dict[str, Any]]:
        parent.connection = None
        with engine.connect():
            _wait_for(events, "checkout.overdue")
        # An inherited checkout is watched as soon as it has a connection of the child's own.
        carried.execute(text("select 1"))
        _wait_for(events, "checkout.overdue", 2)
        carried.close()
        engine.dispose()
        return [event for event in events.all if event["event"].startswith("checkout.")]

    logged = run_in_child(child, how=how)
    assert [event["event"] for event in logged] == ["checkout.overdue", "checkout.returned_late"] * 2
    assert {event["owner_pid"] for event in logged} == {logged[0]["pid"]}
    assert all(event["where"].startswith(f"{__file__}:") for event in logged)
    with engine.connect():
        _wait_for(events, "checkout.overdue")
    carried.close()
    parent.notices_nothing()


@pytest.mark.usefixtures("clean_log")
def test_a_grandchild_has_a_thread_of_its_own(tls_url: str, make_engine: MakeEngine, events: Events) -> None:
    engine = make_engine(tls_url, logger=events.logger, hold_warning=SHORT)

    def overdue_once() -> int:
        events.clear()
        with engine.connect():
            (logged,) = _wait_for(events, "checkout.overdue")
        engine.dispose()
        pid: int = logged["pid"]
        return pid

    def child() -> list[int]:
        own = overdue_once()
        return [own, run_in_child(overdue_once), detection.process_pid()]

    own, grandchilds, pid = run_in_child(child)
    assert own == pid != grandchilds


@pytest.mark.usefixtures("clean_log")
def test_a_thread_that_can_not_be_started_is_tried_again(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    engine = make_engine(tls_url, logger=events.logger, hold_warning=SHORT)

    def child() -> list[str]:
        start, threading.Thread.start = threading.Thread.start, _no_more_threads  # type: ignore[method-assign]
        engine.connect().close()
        threading.Thread.start = start  # type: ignore[method-assign]
        with engine.connect():
            _wait_for(events, "checkout.overdue")
        engine.dispose()
        return events.names

    assert "checkout.overdue" in run_in_child(child)


def _no_more_threads(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_overdue_checkouts_are_counted_and_those_that_last_are_a_gauge(
    tls_url: str, make_engine: MakeEngine, events: Events
) -> None:
    pool: Any = make_engine(tls_url, logger=events.logger, hold_warning=0.05).pool
    assert (pool.stats().overdue, pool.stats().counters.overdue) == (0, 0)
    held = pool.connect()
    _wait_for(events, "checkout.overdue")
    assert (pool.stats().overdue, pool.stats().counters.overdue) == (1, 1)

    def child() -> tuple[int, int, int]:
        return pool.stats().overdue, pool.stats().counters.overdue, pool.family_stats().overdue

    assert run_in_child(child) == (0, 0, 1)
    held.close()
    assert (pool.stats().overdue, pool.stats().counters.overdue) == (0, 1)
    unwatched: Any = make_engine(tls_url).pool
    assert unwatched.stats().overdue is unwatched.family_stats().overdue is None
