"""The stats of families as Prometheus metrics, in the formats of prometheus-client's own exposition.

All metrics are of the whole family, so it does not matter which of its processes is scraped. No series
has a pid in it: workers come and go, and each would leave its series behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, TypeAlias

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from pidpool.export.families import Families
from pidpool.stats.metrics import DURATIONS, FAMILY_NUMBERS, NUMBERS, NUMBERS_BY, POOL_NAME
from pidpool.stats.snapshots import BOUNDS, FamilyStats

if TYPE_CHECKING:
    from pidpool.export.pools import Source


def expose(families: Sequence[FamilyStats], accept: str) -> tuple[bytes, str]:
    """Return the metrics of the families and their content type.

    :param accept: the scraper's Accept header, by which the format is chosen.
    """
    # A registry for each scrape: a child could inherit a shared one with its lock held.
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshots(families))
    try:
        encoder, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is not a number
        encoder, content_type = choose_encoder("")
    return encoder(registry), content_type


class PoolCollector(Collector):
    """Gives the metrics of pools to a registry of the application's, as they are at each scrape.

    ``REGISTRY.register(PoolCollector(engine))``. Several engines take one collector together:
    prometheus-client refuses a second one, whose metrics would have the same names. With its multiprocess
    mode (gunicorn, uWSGI) register the collector beside the ``MultiProcessCollector`` in the registry that is
    made for a request, and not in the global one.

    The numbers are those of the whole family, so any process may answer, a forked child too, and nothing is
    summed up over processes. Any thread may collect. A collection opens no connection and waits for none.

    :param engines: engines, async engines or pools.
    :raises TypeError: if there is none, or the pool of one is no `PidPool`.
    """

    def __init__(self, *engines: Source) -> None:
        self._families = Families(engines)

    def collect(self) -> Iterator[Metric]:
        """Return all metrics."""
        return _metrics(self._families.snapshots())

    def describe(self) -> Iterator[Metric]:
        """Return the metrics without their values, by which a registry finds names that are taken."""
        return _metrics(())


class _Snapshots(Collector):
    """Collects the metrics of snapshots that are already taken."""

    def __init__(self, families: Sequence[FamilyStats]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return _metrics(self._families)


def _metrics(families: Sequence[FamilyStats]) -> Iterator[Metric]:
    for numbers in NUMBERS_BY:
        metric = _metric(numbers.kind, numbers.name, numbers.description, numbers.attribute)
        for family in families:
            for value, count in numbers.all(family).items():
                metric.add_metric([family.pool, value], count)
        yield metric
    for number in NUMBERS:
        yield _number(families, _metric(number.kind, number.name, number.description), number.read)
    for gauge in FAMILY_NUMBERS:
        yield _number(families, _metric("gauge", gauge.name, gauge.description), gauge.read)
    for durations in DURATIONS:
        histogram = HistogramMetricFamily(
            _translated(durations.name), durations.description, labels=[_POOL], unit="seconds"
        )
        for family in families:
            measured = durations.read(family)
            buckets = list(zip(_LE, map(float, accumulate(measured.counts)), strict=True))
            histogram.add_metric([family.pool], buckets, measured.sum)
        yield histogram


_Numeric: TypeAlias = CounterMetricFamily | GaugeMetricFamily | UnknownMetricFamily


def _number(
    families: Sequence[FamilyStats], metric: _Numeric, read: Callable[[FamilyStats], int | None]
) -> Metric:
    for family in families:
        value = read(family)
        if value is not None:
            metric.add_metric([family.pool], value)
    return metric


def _metric(kind: str, name: str, description: str, *attributes: str) -> _Numeric:
    labels = [_POOL, *map(_translated, attributes)]
    translated = _translated(name)
    if kind == "counter":  # the exposition adds _total
        return CounterMetricFamily(translated, description, labels=labels)
    # A number that goes up and down is a gauge to Prometheus. But its rules keep the ending _count for
    # histograms, and `promtool check metrics` complains of a gauge db_client_connection_count.
    family = UnknownMetricFamily if translated.endswith("_count") else GaugeMetricFamily
    return family(translated, description, labels=labels)


def _translated(name: str) -> str:
    """Return a name as OpenTelemetry's rules for Prometheus spell it."""
    # The units here are either {annotations}, which those rules drop, or seconds.
    return name.replace(".", "_")


_POOL = _translated(POOL_NAME)
_LE = [*map(floatToGoString, BOUNDS), "+Inf"]
