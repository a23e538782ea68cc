"""`pidpool.otel`: the semantic conventions' instruments, collected by a real SDK, in this process and in
forked children."""

from __future__ import annotations

import builtins
import gc
import importlib
import os
import sys
from typing import Any

import pytest
from families import connection, family, histogram, pool_reporting, process, small_family
from forking import run_in_child
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import create_engine
from sqlalchemy.pool import QueuePool

from pidpool import otel
from pidpool.export import opentelemetry
from pidpool.stats.snapshots import Counters

POOL = "db.client.connection.pool.name"


class Collector:
    """An application's OpenTelemetry SDK."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader], shutdown_on_exit=False)

    def metrics(self) -> dict[str, Any]:
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        return {
            metric.name: metric
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def values(self, name: str) -> dict[tuple[tuple[str, Any], ...], float]:
        return {
            tuple(sorted(point.attributes.items())): point.value
            for point in self.metrics()[name].data.data_points
        }

    def value(self, name: str) -> float:
        (value,) = self.values(name).values()
        return value


@pytest.fixture
def sdk() -> Collector:
    return Collector()


def of_this_process(**attributes: str) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted({POOL: "shop", "process.pid": os.getpid(), **attributes}.items()))


CONVENTIONS = {
    "db.client.connection.count": ("{connection}", False),
    "db.client.connection.idle.max": ("{connection}", False),
    "db.client.connection.max": ("{connection}", False),
    "db.client.connection.pending_requests": ("{request}", False),
    "db.client.connection.timeouts": ("{timeout}", True),
}


def test_the_instruments_are_those_of_the_semantic_conventions(sdk: Collector) -> None:
    engine = pool_reporting(small_family())
    otel.instrument(engine, sdk.provider)
    metrics = sdk.metrics()
    assert {name for name in metrics if name.startswith("db.")} == set(CONVENTIONS)
    for name, (unit, monotonic) in CONVENTIONS.items():
        assert metrics[name].unit == unit
        assert metrics[name].data.is_monotonic == monotonic  # a counter, or one that goes up and down
        assert metrics[name].description
        for point in metrics[name].data.data_points:
            assert point.attributes[POOL] == "shop"


def test_the_figures_are_this_process_s(sdk: Collector) -> None:
    engine = pool_reporting(small_family())
    otel.instrument(engine, sdk.provider)
    assert sdk.values("db.client.connection.count") == {
        of_this_process(**{"db.client.connection.state": "idle"}): 1,
        of_this_process(**{"db.client.connection.state": "used"}): 1,
    }
    assert sdk.values("db.client.connection.max") == {of_this_process(): 15}
    assert sdk.value("db.client.connection.idle.max") == 5
    assert sdk.value("db.client.connection.pending_requests") == 3
    assert sdk.value("db.client.connection.timeouts") == 1
    assert sdk.value("pidpool.checkouts") == 7
    assert sdk.value("pidpool.connection.wait_time.count") == 2
    assert sdk.value("pidpool.connection.wait_time.sum") == pytest.approx(0.00201)
    assert sdk.metrics()["pidpool.connection.wait_time.sum"].unit == "s"
    assert sdk.values("pidpool.adoptions")[of_this_process(**{"pidpool.trigger": "hook"})] == 0
    # Those of the family:
    assert sdk.value("pidpool.processes") == 2
    assert sdk.value("pidpool.possible_maximum") == 30
    assert sdk.value("pidpool.server_max_connections") == 100


def test_what_has_no_number_is_not_told(sdk: Collector) -> None:
    engine = pool_reporting(family(process(1, None, size=0), server_max_connections=None))
    otel.instrument(engine, sdk.provider)
    reported = set(sdk.metrics())
    assert "db.client.connection.count" in reported
    assert reported.isdisjoint(
        ["db.client.connection.max", "db.client.connection.idle.max", "pidpool.server_max_connections"]
    )


def test_several_engines_share_one_set_of_instruments(
    sdk: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    shop, books = (
        pool_reporting(small_family()),
        pool_reporting(family(process(1, None, Counters(checkouts=4), pool="books"), pool="books")),
    )
    for engine in (shop, books, shop):
        otel.instrument(engine, sdk.provider)
    by_pool = {dict(attributes)[POOL]: value for attributes, value in sdk.values("pidpool.checkouts").items()}
    assert by_pool == {"shop": 7, "books": 4}
    assert caplog.text == ""  # the SDK warns of instruments made twice
    second = Collector()
    otel.instrument(books, second.provider)
    assert second.value("pidpool.checkouts") == 4


def test_nothing_is_read_before_a_collection_and_counters_are_read_at_each(sdk: Collector) -> None:
    reads = []

    def reported() -> Any:
        reads.append(None)
        return family(
            process(1, None, Counters(checkouts=len(reads), use_time=histogram(*[0.5] * len(reads))))
        )

    engine = pool_reporting(reported)
    otel.instrument(engine, sdk.provider)
    assert reads == []
    assert sdk.value("pidpool.checkouts") < sdk.value("pidpool.checkouts")


def test_the_pool_is_looked_up_again_after_dispose(sdk: Collector) -> None:
    engine = pool_reporting(small_family())
    otel.instrument(engine, sdk.provider)
    engine.dispose()
    engine.pool.reported = family(process(1, None, connections=[connection(1, 1)]))  # type: ignore[attr-defined]
    assert sum(sdk.values("db.client.connection.count").values()) == 1


def test_an_engine_is_not_kept_alive(sdk: Collector) -> None:
    otel.instrument(pool_reporting(small_family()), sdk.provider)
    gc.collect()
    assert sdk.metrics() == {}


def test_without_a_provider_the_process_s_own_is_used(
    monkeypatch: pytest.MonkeyPatch, sdk: Collector
) -> None:
    monkeypatch.setattr(opentelemetry, "get_meter_provider", lambda: sdk.provider)
    engine = pool_reporting(small_family())
    otel.instrument(engine)
    assert sdk.value("pidpool.checkouts") == 7


def test_a_forked_child_collects_for_itself(sdk: Collector) -> None:
    parent = os.getpid()
    engine = pool_reporting(
        lambda: family(process(os.getpid(), None, Counters(checkouts=5 if os.getpid() == parent else 1)))
    )
    otel.instrument(engine, sdk.provider)
    assert sdk.values("pidpool.checkouts") == {of_this_process(): 5}
    # Values of a child's first collection begin at its own zero, under its own pid.
    child = run_in_child(lambda: (of_this_process(), sdk.values("pidpool.checkouts")))
    assert child[1][child[0]] == 1
    assert sdk.values("pidpool.checkouts") == {of_this_process(): 5}


def test_what_keeps_no_stats_is_refused(sdk: Collector) -> None:
    with pytest.raises(TypeError, match=r"QueuePool.*poolclass=PidPool"):
        otel.instrument(create_engine("sqlite://", poolclass=QueuePool), sdk.provider)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **more)

    monkeypatch.delitem(sys.modules, "pidpool.otel")
    monkeypatch.delitem(sys.modules, "pidpool.export.opentelemetry")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pidpool\[otel\]'"):
        importlib.import_module("pidpool.otel")
