"""`pidpool.otel.exporter`: the conventions' three histograms beside the SDK's metrics, bucket by bucket what
`stats()` says, cumulative and delta, in this process and in a forked child."""

from __future__ import annotations

import io
import json
import math
import os
from importlib.metadata import version
from typing import Any

import pytest
from engines import MakeEngine
from forking import run_in_child
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    ConsoleMetricExporter,
    PeriodicExportingMetricReader,
)
from opentelemetry.semconv.schemas import Schemas
from sqlalchemy import Engine

from pidpool import otel
from pidpool.stats.snapshots import BOUNDS, Counters

POOL = "db.client.connection.pool.name"
NAMES = ("create_time", "wait_time", "use_time")


class Console:
    """An SDK whose exporter prints JSON, wrapped by pidpool's."""

    def __init__(self, temporality: AggregationTemporality | None = None) -> None:
        self._out = io.StringIO()
        preferred = None if temporality is None else {Histogram: temporality}
        inner = ConsoleMetricExporter(self._out, preferred_temporality=preferred)
        reader = PeriodicExportingMetricReader(otel.exporter(inner), export_interval_millis=math.inf)
        self.provider = MeterProvider([reader], shutdown_on_exit=False)

    def scopes(self) -> dict[str, Any]:
        """Export, and return what was printed, by the name of the scope."""
        self._out.seek(0)
        self._out.truncate()
        self.provider.force_flush()
        printed = json.loads(self._out.getvalue())
        return {
            scope["scope"]["name"]: scope
            for resource in printed["resource_metrics"]
            for scope in resource["scope_metrics"]
        }

    def points(self) -> dict[str, Any]:
        """Export, and return the one data point of each of the three histograms, by its short name."""
        found = {}
        for metric in self.scopes()["pidpool"]["metrics"]:
            prefix, _, name = metric["name"].rpartition(".")
            if prefix == "db.client.connection" and name in NAMES:
                assert name not in found and metric["unit"] == "s" and metric["description"]
                (point,) = metric["data"]["data_points"]
                found[name] = {**point, "temporality": metric["data"]["aggregation_temporality"]}
        return found


@pytest.fixture
def engine(tls_url: str, make_engine: MakeEngine) -> Engine:
    return make_engine(tls_url, pool_logging_name="shop", pool_size=2)


def use(engine: Engine, times: int) -> None:
    for _ in range(times):
        with engine.connect() as one, engine.connect() as other:
            assert one is not other


def counters(engine: Engine) -> Counters:
    found: Counters = engine.pool.stats().counters  # type: ignore[attr-defined]
    return found


def check(points: dict[str, Any], now: Counters, before: Counters) -> None:
    """Check that the points are the difference of two snapshots in every bucket."""
    assert list(points) == list(NAMES)
    for name, point in points.items():
        measured, earlier = getattr(now, name), getattr(before, name)
        counts = [count - then for count, then in zip(measured.counts, earlier.counts, strict=True)]
        assert point["bucket_counts"] == counts
        assert point["explicit_bounds"] == list(BOUNDS)
        assert point["count"] == measured.count - earlier.count == sum(counts)
        assert point["sum"] == pytest.approx(measured.sum - earlier.sum)
        assert point["attributes"] == {POOL: "shop", "process.pid": os.getpid()}
        assert point["start_time_unix_nano"] < point["time_unix_nano"]


def test_cumulative_histograms_are_what_stats_says_in_a_child_too(engine: Engine) -> None:
    console = Console()
    otel.instrument(engine, console.provider)
    for times in (3, 4):
        use(engine, times)
        check(console.points(), counters(engine), Counters())
    since = console.points()["use_time"]["start_time_unix_nano"]

    def child() -> tuple[int, int]:
        use(engine, 2)
        points = console.points()
        check(points, counters(engine), Counters())
        started: int = points["use_time"]["start_time_unix_nano"]
        engine.dispose()
        return started, counters(engine).checkouts

    with engine.connect():
        started, checkouts = run_in_child(child)
    assert started > since and checkouts == 4
    engine.dispose()
    use(engine, 1)
    check(console.points(), counters(engine), Counters())


def test_delta_histograms_are_the_difference_since_the_last_export(engine: Engine) -> None:
    console = Console(AggregationTemporality.DELTA)
    otel.instrument(engine, console.provider)
    before, until = Counters(), 0
    for times in (3, 1, 0):
        use(engine, times)
        points = console.points()
        check(points, counters(engine), before)
        assert points["wait_time"]["temporality"] == AggregationTemporality.DELTA
        if until:
            assert points["wait_time"]["start_time_unix_nano"] == until
        before, until = counters(engine), points["wait_time"]["time_unix_nano"]

    def child() -> list[int]:
        counts = []
        for times in (2, 1):
            use(engine, times)
            counts.append(console.points()["wait_time"]["count"])
        engine.dispose()
        return counts

    assert run_in_child(child) == [4, 2]


def test_the_scope_has_a_version_and_a_schema(engine: Engine) -> None:
    console = Console()
    otel.instrument(engine, console.provider)
    scope = console.scopes()["pidpool"]
    assert scope["scope"]["version"] == version("pidpool")
    assert scope["schema_url"] == scope["scope"]["schema_url"]
    assert scope["schema_url"] in {each.value for each in Schemas}


def test_other_scopes_and_other_providers_pools_are_left_alone(
    engine: Engine, tls_url: str, make_engine: MakeEngine
) -> None:
    console, other = Console(), Console()
    console.provider.get_meter("shop").create_counter("shop.orders").add(1)
    assert [metric["name"] for metric in console.scopes()["shop"]["metrics"]] == ["shop.orders"]
    otel.instrument(engine, console.provider)
    otel.instrument(make_engine(tls_url, pool_logging_name="books"), other.provider)
    assert {point["attributes"][POOL] for point in console.points().values()} == {"shop"}
    assert {point["attributes"][POOL] for point in other.points().values()} == {"books"}


def test_own_attributes_are_in_the_own_namespace_and_have_no_blanks(engine: Engine) -> None:
    console = Console()
    otel.instrument(engine, console.provider)
    conventional = {POOL, "process.pid", "db.client.connection.state", "error.type"}
    for metric in console.scopes()["pidpool"]["metrics"]:
        for point in metric["data"]["data_points"]:
            for name, value in point["attributes"].items():
                assert name in conventional or name.startswith("pidpool."), metric["name"]
                assert " " not in str(value), metric["name"]
