"""The public names of the OpenTelemetry export: `instrument`, `exporter` and `PidPoolInstrumentor`.

``pidpool.otel.instrument(engine)`` has a pool's metrics collected by the application's OpenTelemetry SDK. The
SDK can't collect the three histograms of the conventions (create_time, wait_time, use_time); an exporter that
is wrapped exports them as well::

    reader = PeriodicExportingMetricReader(pidpool.otel.exporter(OTLPMetricExporter()))
    set_meter_provider(MeterProvider([reader]))
    pidpool.otel.instrument(engine)

With ``opentelemetry-instrument`` no code is needed for the other metrics: the entry point ``pidpool``
(`PidPoolInstrumentor`) instruments every pool. A pool that was passed to `instrument` too is collected once.

Beside opentelemetry-instrumentation-sqlalchemy: that package makes spans of statements, which pidpool does
not. It also counts a pool's connections, under the conventions' older name ``db.client.connections.usage``.
So no series stands twice, but that metric is what ``db.client.connection.count`` says, and after a fork it
goes on with the parent's connections. To have each number once, drop it with a view of the SDK::

    View(instrument_name="db.client.connections.usage", aggregation=DropAggregation())
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pidpool.export.opentelemetry import instrument

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter

    from pidpool.export.instrumentor import PidPoolInstrumentor

__all__ = ["PidPoolInstrumentor", "exporter", "instrument"]


def exporter(inner: MetricExporter) -> MetricExporter:
    """Return an exporter that exports what `inner` would, and the histograms of the instrumented pools.

    They have the buckets of ``pool.stats()``, count by count, and start from zero in a forked child.

    :param inner: an exporter of the SDK's; it decides between cumulative and delta temporality.
    :raises ModuleNotFoundError: if opentelemetry-sdk is not installed.
    """
    from pidpool.export.histograms import HistogramExporter

    return HistogramExporter(inner)


def __getattr__(name: str) -> object:
    # Not before it is asked for: it needs opentelemetry-instrumentation.
    if name == "PidPoolInstrumentor":
        from pidpool.export.instrumentor import PidPoolInstrumentor

        return PidPoolInstrumentor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
