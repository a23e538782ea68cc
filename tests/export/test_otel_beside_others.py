"""pidpool's OpenTelemetry metrics beside opentelemetry-instrumentation-sqlalchemy's, and found by
`opentelemetry-instrument`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import MakeEngine
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.metrics.view import DropAggregation, View
from sqlalchemy import Engine, text

from pidpool import otel
from pidpool.otel import PidPoolInstrumentor
from pidpool.tools.demo.postgres import EmbeddedPostgres

THEIRS = "db.client.connections.usage"
OURS = "db.client.connection.count"


class Sdk:
    """An application's OpenTelemetry SDK, which keeps in memory what it collects."""

    def __init__(self, *views: View) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader], views=views, shutdown_on_exit=False)

    def series(self) -> Counter[tuple[str, tuple[Any, ...]]]:
        """Collect, and count how often each series is there: name and attributes, of all scopes."""
        data = self._reader.get_metrics_data()
        return Counter(
            (metric.name, tuple(sorted(point.attributes.items())))
            for resource in ([] if data is None else data.resource_metrics)
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        )

    def names(self) -> set[str]:
        return {name for name, _ in self.series()}


@pytest.fixture
def engine(tls_url: str, make_engine: MakeEngine) -> Engine:
    return make_engine(tls_url, pool_logging_name="shop")


@pytest.fixture
def sqlalchemy_instrumentor() -> Iterator[SQLAlchemyInstrumentor]:
    instrumentor = SQLAlchemyInstrumentor()
    yield instrumentor
    instrumentor.uninstrument()


@pytest.fixture
def pidpool_instrumentor() -> Iterator[PidPoolInstrumentor]:
    instrumentor = PidPoolInstrumentor()
    yield instrumentor
    instrumentor.uninstrument()


def use(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text("select 1"))


def test_sqlalchemys_instrumentor_and_pidpool_have_each_series_once(
    engine: Engine, sqlalchemy_instrumentor: SQLAlchemyInstrumentor
) -> None:
    sdk = Sdk()
    # It does not say that it knows SQLAlchemy 2.1 yet; it works there.
    sqlalchemy_instrumentor.instrument(engine=engine, meter_provider=sdk.provider, skip_dep_check=True)
    otel.instrument(engine, sdk.provider)
    use(engine)
    series = sdk.series()
    assert set(series.values()) == {1}
    assert {THEIRS, OURS} <= {name for name, _ in series}
    assert sum(name == OURS for name, _ in series) == 2  # idle and used


def test_a_view_leaves_one_number_of_connections(
    engine: Engine, sqlalchemy_instrumentor: SQLAlchemyInstrumentor
) -> None:
    assert otel.__doc__ is not None and f'instrument_name="{THEIRS}"' in otel.__doc__
    sdk = Sdk(View(instrument_name=THEIRS, aggregation=DropAggregation()))
    sqlalchemy_instrumentor.instrument(engine=engine, meter_provider=sdk.provider, skip_dep_check=True)
    otel.instrument(engine, sdk.provider)
    use(engine)
    names = sdk.names()
    assert OURS in names and THEIRS not in names


def test_the_instrumentor_has_every_pool_collected_once(
    engine: Engine, tls_url: str, make_engine: MakeEngine, pidpool_instrumentor: PidPoolInstrumentor
) -> None:
    sdk = Sdk()
    pidpool_instrumentor.instrument(meter_provider=sdk.provider)
    otel.instrument(engine, sdk.provider)
    later = make_engine(tls_url, pool_logging_name="later")
    for each in (engine, later):
        use(each)
        each.dispose()
        use(each)

    def pools() -> Counter[str]:
        return Counter(
            dict(attributes)["db.client.connection.pool.name"]
            for (name, attributes), times in sdk.series().items()
            for _ in range(times)
            if name == "pidpool.checkouts"
        )

    found = pools()
    assert found["shop"] == found["later"] == 1
    pidpool_instrumentor.uninstrument()
    assert pools() == {"shop": 1}
    pidpool_instrumentor.instrument(meter_provider=sdk.provider)


def test_opentelemetry_instrument_finds_pidpool(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    program = tmp_path / "shop.py"
    program.write_text(
        "import os\n"
        "from sqlalchemy import create_engine\n"
        "from pidpool import PidPool\n"
        'engine = create_engine(os.environ["DB_URL"], poolclass=PidPool, pool_logging_name="shop")\n'
        "for _ in range(3):\n"
        "    engine.connect().close()\n"
    )
    command = Path(sys.executable).with_name("opentelemetry-instrument")
    environment = {
        **os.environ,
        "DB_URL": postgres.url(tls=True),
        "OTEL_METRICS_EXPORTER": "console",
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
    }
    done = subprocess.run(
        [str(command), sys.executable, str(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    (checkouts,) = [
        point["value"]
        for resource in json.loads(done.stdout)["resource_metrics"]
        for scope in resource["scope_metrics"]
        if scope["scope"]["name"] == "pidpool"
        for metric in scope["metrics"]
        if metric["name"] == "pidpool.checkouts"
        for point in metric["data"]["data_points"]
    ]
    assert checkouts == 3
