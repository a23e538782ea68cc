"""Adds the conventions' three histograms to what an OpenTelemetry SDK exports. The SDK has no instrument that
takes buckets which are counted already; but its exporters can be wrapped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from pidpool.export.opentelemetry import SCOPE, common_attributes, instrumented_pools
from pidpool.pool import PidPool
from pidpool.stats.metrics import DURATIONS, POOL_NAME
from pidpool.stats.snapshots import BOUNDS, Counters, Histogram, PoolStats

try:
    from opentelemetry.sdk.metrics import Histogram as HistogramInstrument
    from opentelemetry.sdk.metrics.export import (
        AggregationTemporality,
        HistogramDataPoint,
        Metric,
        MetricExporter,
        MetricExportResult,
        MetricsData,
        ScopeMetrics,
    )
    from opentelemetry.sdk.metrics.export import Histogram as HistogramPoints
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"pidpool.otel.exporter needs opentelemetry-sdk ({error}): pip install opentelemetry-sdk",
        name=error.name,
    ) from error


class _Exported:
    """What was exported of one pool last, in one process."""

    def __init__(self, at: int, counters: Counters) -> None:
        self.pid = os.getpid()
        self.at = at
        self.counters = counters


class HistogramExporter(MetricExporter):
    """Passes all metrics on to another exporter, and the histograms of the instrumented pools with them.

    They are cumulative or the difference since the last export, as the other exporter wants histograms. Least
    and greatest value are not known, and absent.

    :param inner: the exporter.
    """

    def __init__(self, inner: MetricExporter) -> None:
        super().__init__(
            preferred_temporality=inner._preferred_temporality,
            preferred_aggregation=inner._preferred_aggregation,
        )
        self._inner = inner
        preferred = (inner._preferred_temporality or {}).get(HistogramInstrument)
        self._temporality = preferred or AggregationTemporality.CUMULATIVE
        # By the pool's events. A child's is its own, since it has another pid: its numbers begin at zero.
        self._exported: WeakKeyDictionary[Any, _Exported] = WeakKeyDictionary()

    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **options: Any
    ) -> MetricExportResult:
        """Export the metrics, the histograms included."""
        resources = [
            replace(resource, scope_metrics=[self._completed(scope) for scope in resource.scope_metrics])
            for resource in metrics_data.resource_metrics
        ]
        return self._inner.export(MetricsData(resources), timeout_millis, **options)

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Have the other exporter do it."""
        return self._inner.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **options: Any) -> None:
        """Have the other exporter do it."""
        self._inner.shutdown(timeout_millis, **options)

    def _completed(self, scope: ScopeMetrics) -> ScopeMetrics:
        if scope.scope.name != SCOPE:
            return scope
        # Several providers may each collect some of the process's pools: those that are in this batch.
        names = {
            point.attributes.get(POOL_NAME)
            for metric in scope.metrics
            for point in metric.data.data_points
            if point.attributes
        }
        pools = {name: pool for name, pool in instrumented_pools().items() if name in names}
        return replace(scope, metrics=[*scope.metrics, *self._histograms(list(pools.values()))])

    def _histograms(self, pools: list[PidPool]) -> Iterator[Metric]:
        now = time.time_ns()
        stats = [pool.stats() for pool in pools]
        before = [self._before(pool, each) for pool, each in zip(pools, stats, strict=True)]
        for durations in DURATIONS:
            points = [
                _point(each, durations.read(each), then.at, now, durations.of(then.counters))
                for each, then in zip(stats, before, strict=True)
            ]
            data = HistogramPoints(points, self._temporality)
            yield Metric(durations.name, durations.description, "s", data)
        for pool, each in zip(pools, stats, strict=True):
            self._exported[pool.pool_events] = _Exported(now, each.counters)

    def _before(self, pool: PidPool, stats: PoolStats) -> _Exported:
        exported = self._exported.get(pool.pool_events)
        if (
            self._temporality is AggregationTemporality.CUMULATIVE
            or exported is None
            or exported.pid != os.getpid()
        ):
            return _Exported(int(stats.since * 1e9), Counters())
        return exported


def _point(
    stats: PoolStats, measured: Histogram, start: int, now: int, before: Histogram
) -> HistogramDataPoint:
    counts = [count - earlier for count, earlier in zip(measured.counts, before.counts, strict=True)]
    return HistogramDataPoint(
        attributes=common_attributes(stats),
        start_time_unix_nano=start,
        time_unix_nano=now,
        count=sum(counts),
        sum=measured.sum - before.sum,
        bucket_counts=counts,
        explicit_bounds=BOUNDS,
        min=None,  # type: ignore[arg-type]  # optional in the protocol, and not known
        max=None,  # type: ignore[arg-type]
    )
