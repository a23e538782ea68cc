"""The stats of families as Prometheus metrics, in the formats of prometheus-client's own exposition.

All metrics are of the whole family, so it does not matter which of its processes is scraped. No series
has a pid in it: workers come and go, and each would leave its series behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from pidpool.stats.metrics import DURATIONS, FAMILY_NUMBERS, NUMBERS, NUMBERS_BY, POOL_NAME
from pidpool.stats.snapshots import BOUNDS, FamilyStats


def expose(families: Sequence[FamilyStats], accept: str) -> tuple[bytes, str]:
    """Return the metrics of the families and their content type.

    :param accept: the scraper's Accept header, by which the format is chosen.
    """
    # A registry for each scrape: a child could inherit a shared one with its lock held.
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FamilyCollector(families))
    try:
        encoder, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is not a number
        encoder, content_type = choose_encoder("")
    return encoder(registry), content_type


class FamilyCollector(Collector):
    """Collects the metrics of families from snapshots that are already taken."""

    def __init__(self, families: Sequence[FamilyStats]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for numbers in NUMBERS_BY:
            metric = _metric(numbers.kind, numbers.name, numbers.description, numbers.attribute)
            for family in self._families:
                for value, count in numbers.all(family).items():
                    metric.add_metric([family.pool, value], count)
            yield metric
        for number in NUMBERS:
            yield self._number(_metric(number.kind, number.name, number.description), number.read)
        for gauge in FAMILY_NUMBERS:
            yield self._number(_metric("gauge", gauge.name, gauge.description), gauge.read)
        for durations in DURATIONS:
            histogram = HistogramMetricFamily(
                _translated(durations.name), durations.description, labels=[_POOL], unit="seconds"
            )
            for family in self._families:
                measured = durations.read(family)
                buckets = list(zip(_LE, map(float, accumulate(measured.counts)), strict=True))
                histogram.add_metric([family.pool], buckets, measured.sum)
            yield histogram

    def _number(
        self, metric: CounterMetricFamily | GaugeMetricFamily, read: Callable[[FamilyStats], int | None]
    ) -> Metric:
        for family in self._families:
            value = read(family)
            if value is not None:
                metric.add_metric([family.pool], value)
        return metric


def _metric(
    kind: str, name: str, description: str, *attributes: str
) -> CounterMetricFamily | GaugeMetricFamily:
    labels = [_POOL, *map(_translated, attributes)]
    # An updowncounter is a gauge to Prometheus. A counter's _total is added by the exposition.
    family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
    return family(_translated(name), description, labels=labels)


def _translated(name: str) -> str:
    """Return a name as OpenTelemetry's rules for Prometheus spell it."""
    # The units here are either {annotations}, which those rules drop, or seconds.
    return name.replace(".", "_")


_POOL = _translated(POOL_NAME)
_LE = [*map(floatToGoString, BOUNDS), "+Inf"]
