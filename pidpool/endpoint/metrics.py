"""The figures of families as Prometheus metrics, in the words of prometheus-client's own exposition.

Names are those of OpenTelemetry's semantic conventions for connection pools, spelled as its rules for
Prometheus have it; what only a pool of forking processes has is called ``pidpool_*``. All figures are
of the whole family, so it does not matter which of its processes is scraped. No series has a pid in
it: workers come and go, and each would leave its series behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import get_args

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

from pidpool import inherited
from pidpool.stats import BOUNDS, Counters, FamilyStats, Histogram
from pidpool.telemetry import ClosedReason, Trigger

_POOL = "db_client_connection_pool_name"
_STATE = "db_client_connection_state"


def expose(families: Sequence[FamilyStats], accept: str) -> tuple[bytes, str]:
    """Return the metrics of the families and their content type.

    :param accept: the scraper's Accept header, by which the format is chosen.
    """
    # A registry for each scrape: one with a lock in it could be inherited by a child, locked.
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FamilyCollector(families))
    try:
        encoder, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is no number
        encoder, content_type = choose_encoder("")
    return encoder(registry), content_type


class FamilyCollector(Collector):
    """Gives the figures of families to a registry, as they were when the snapshots were taken."""

    def __init__(self, families: Sequence[FamilyStats]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield self._connections()
        for name, help_text, gauge in _GAUGES:
            yield self._gauge(name, help_text, gauge)
        for name, help_text, count in _COUNTERS:
            yield self._counter(name, help_text, count)
        for name, help_text, label, known, counts in _LABELLED_COUNTERS:
            yield self._labelled_counter(name, help_text, label, known, counts)
        for name, help_text, histogram in _HISTOGRAMS:
            yield self._histogram(name, help_text, histogram)

    def _connections(self) -> Metric:
        metric = GaugeMetricFamily(
            "db_client_connection_count",
            "Connections that are currently in the state described by the state label.",
            labels=[_POOL, _STATE],
        )
        for family in self._families:
            metric.add_metric([family.pool, "idle"], family.idle)
            metric.add_metric([family.pool, "used"], family.used)
        return metric

    def _gauge(self, name: str, help_text: str, gauge: Callable[[FamilyStats], int | None]) -> Metric:
        metric = GaugeMetricFamily(name, help_text, labels=[_POOL])
        for family in self._families:
            value = gauge(family)
            if value is not None:  # no limit, or not known: no number would be true
                metric.add_metric([family.pool], value)
        return metric

    def _counter(self, name: str, help_text: str, count: Callable[[Counters], int]) -> Metric:
        metric = CounterMetricFamily(name, help_text, labels=[_POOL])
        for family in self._families:
            metric.add_metric([family.pool], count(family.counters))
        return metric

    def _labelled_counter(
        self,
        name: str,
        help_text: str,
        label: str,
        known: tuple[str, ...],
        counts: Callable[[Counters], Mapping[str, int]],
    ) -> Metric:
        metric = CounterMetricFamily(name, help_text, labels=[_POOL, label])
        for family in self._families:
            # All values from the start: the first increase of a series that was not there is lost.
            for value, count in {**dict.fromkeys(known, 0), **counts(family.counters)}.items():
                metric.add_metric([family.pool, value], count)
        return metric

    def _histogram(self, name: str, help_text: str, histogram: Callable[[Counters], Histogram]) -> Metric:
        metric = HistogramMetricFamily(name, help_text, labels=[_POOL], unit="seconds")
        for family in self._families:
            measured = histogram(family.counters)
            buckets = list(zip(_LE, map(float, accumulate(measured.counts)), strict=True))
            metric.add_metric([family.pool], buckets, measured.sum)
        return metric


_LE = [*map(floatToGoString, BOUNDS), "+Inf"]


def _idle_maximum(family: FamilyStats) -> int | None:
    sizes = [process.size for process in family.processes if process.alive]
    return None if 0 in sizes else sum(sizes)


_GAUGES: tuple[tuple[str, str, Callable[[FamilyStats], int | None]], ...] = (
    (
        "db_client_connection_max",
        "Connections that the running processes may have open together; absent if there is no limit.",
        lambda family: family.maximum,
    ),
    (
        "db_client_connection_idle_max",
        "Idle connections that the running processes may keep open together; absent if there is no limit.",
        _idle_maximum,
    ),
    (
        "db_client_connection_pending_requests",
        "Threads that currently wait for a connection.",
        lambda family: family.waiting,
    ),
    ("pidpool_processes", "Processes of the family that run.", lambda family: family.alive),
    (
        "pidpool_unlisted_processes",
        "Processes that found no room in the family's memory: their connections are not counted.",
        lambda family: family.unlisted,
    ),
    (
        "pidpool_possible_maximum",
        "Running processes times what each may open (pool_size + max_overflow); absent if there is no limit.",
        lambda family: family.maximum,
    ),
    (
        "pidpool_server_max_connections",
        "The server's max_connections; absent if not known.",
        lambda family: family.server_max_connections,
    ),
)

_COUNTERS: tuple[tuple[str, str, Callable[[Counters], int]], ...] = (
    (
        "db_client_connection_timeouts",
        "Checkouts that found no connection free within the pool's timeout.",
        lambda counters: counters.timeouts,
    ),
    ("pidpool_connections_opened", "Connections opened.", lambda counters: counters.opened),
    ("pidpool_checkouts", "Connections checked out.", lambda counters: counters.checkouts),
    ("pidpool_checkins", "Connections checked in.", lambda counters: counters.checkins),
    ("pidpool_invalidations", "Connections invalidated.", lambda counters: counters.invalidations),
    (
        "pidpool_severed",
        "Inherited sockets that a child replaced by dead ones.",
        lambda counters: counters.severed,
    ),
    (
        "pidpool_kept",
        "Inherited connections whose descriptors a child left alone.",
        lambda counters: counters.kept,
    ),
    (
        "pidpool_replaced",
        "Uses of an inherited connection that went on with one of the child's own.",
        lambda counters: counters.replaced,
    ),
    (
        "pidpool_refused",
        "Uses of an inherited connection that were refused.",
        lambda counters: counters.refused,
    ),
    ("pidpool_forks", "Children forked.", lambda counters: counters.forks),
)

_LABELLED_COUNTERS: tuple[
    tuple[str, str, str, tuple[str, ...], Callable[[Counters], Mapping[str, int]]], ...
] = (
    (
        "pidpool_connections_closed",
        "Connections closed, by reason.",
        "reason",
        get_args(ClosedReason),
        lambda counters: counters.closed,
    ),
    (
        "pidpool_inherited",
        "Connections that children inherited, by what they were doing at the fork.",
        "state",
        (inherited.IDLE, inherited.NO_TRANSACTION, inherited.IN_TRANSACTION, inherited.UNKNOWN),
        lambda counters: counters.inherited,
    ),
    (
        "pidpool_adoptions",
        "Pools that forked children took over, by what noticed the fork.",
        "trigger",
        get_args(Trigger),
        lambda counters: counters.adoptions,
    ),
)

_HISTOGRAMS: tuple[tuple[str, str, Callable[[Counters], Histogram]], ...] = (
    (
        "db_client_connection_create_time",
        "The time it took to create a new connection.",
        lambda counters: counters.create_time,
    ),
    (
        "db_client_connection_wait_time",
        "The time it took to obtain an open connection from the pool.",
        lambda counters: counters.wait_time,
    ),
    (
        "db_client_connection_use_time",
        "The time between borrowing a connection and returning it to the pool.",
        lambda counters: counters.use_time,
    ),
)
