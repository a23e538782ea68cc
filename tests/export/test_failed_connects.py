"""Two connects to a closed port, as the person on call sees them: two events and the number 2 in each export,
and no part of the URL's password anywhere."""

from __future__ import annotations

import io
import json
import math
import re
import socket
from typing import Any

import pytest
from engines import MakeEngine
from events import Events
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
from sqlalchemy import exc

from pidpool import StatsApp, otel

SECRET = ("hunter2", "correcthorse")


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(application: StatsApp, path: str) -> str:
    environ: dict[str, Any] = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "HTTP_HOST": "localhost"}
    return b"".join(application(environ, lambda *_: lambda _: None)).decode()  # type: ignore[arg-type,return-value]


def test_two_failed_connects(make_engine: MakeEngine, capfd: pytest.CaptureFixture[str]) -> None:
    events, out = Events(), io.StringIO()
    port = closed_port()
    engine = make_engine(
        f"postgresql+psycopg2://app:{'-'.join(SECRET)}@127.0.0.1:{port}/shop", logger=events.logger
    )
    application = StatsApp(engine)
    reader = PeriodicExportingMetricReader(
        otel.exporter(ConsoleMetricExporter(out)), export_interval_millis=math.inf
    )
    provider = MeterProvider([reader], shutdown_on_exit=False)
    otel.instrument(engine, provider)
    for _ in range(2):
        with pytest.raises(exc.OperationalError):
            engine.connect()
    provider.force_flush()
    stats, metrics = get(application, "/stats.json"), get(application, "/metrics")

    assert [event["error"] for event in events.of("connection.failed")] == ["OperationalError"] * 2
    (pool,) = json.loads(stats)["pools"]
    assert pool["counters"]["failed"] == {"OperationalError": 2}
    name = f"127.0.0.1:{port}/shop"
    labels = f'db_client_connection_pool_name="{name}",error_type="OperationalError"'
    assert re.findall(r"^pidpool_connections_failed_total.*$", metrics, re.MULTILINE) == [
        f"pidpool_connections_failed_total{{{labels}}} 2.0"
    ]
    exported = [
        (
            point["attributes"]["error.type"],
            point["attributes"]["db.client.connection.pool.name"],
            point["value"],
        )
        for resource in json.loads(out.getvalue())["resource_metrics"]
        for scope in resource["scope_metrics"]
        for metric in scope["metrics"]
        if metric["name"] == "pidpool.connections.failed"
        for point in metric["data"]["data_points"]
    ]
    assert exported == [("OperationalError", name, 2)]
    everything = [stats, metrics, out.getvalue(), repr(events.all), *capfd.readouterr()]
    assert [part for part in SECRET for text in everything if part in text] == []
