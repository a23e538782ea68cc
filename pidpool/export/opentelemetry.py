"""A pool's stats as OpenTelemetry metrics, under the names of the semantic conventions.

Needs opentelemetry-api only (``pip install 'pidpool[otel]'``); the application's own OpenTelemetry SDK
collects and exports the metrics.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

from pidpool.export.pools import checked, pool_of
from pidpool.forks import takeover
from pidpool.stats.metrics import (
    DURATIONS,
    FAMILY_NUMBERS,
    NUMBERS,
    NUMBERS_BY,
    POOL_NAME,
    Durations,
    Numbers,
)

try:
    from opentelemetry.metrics import Meter, MeterProvider, Observation, get_meter_provider
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"pidpool.otel needs opentelemetry-api ({error}): pip install 'pidpool[otel]'", name=error.name
    ) from error

if TYPE_CHECKING:
    from pidpool.export.pools import Source
    from pidpool.pool import PidPool
    from pidpool.stats.snapshots import FamilyStats, PoolStats

    _Read: TypeAlias = "Callable[[Any], Iterable[tuple[dict[str, str], float | None]]]"

SCOPE = "pidpool"
"""The name of the instrumentation scope."""

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
"""The version of the semantic conventions that names and attributes are those of."""


def instrument(engine: Source, meter_provider: MeterProvider | None = None) -> None:
    """Register the metrics of an engine's pool for collection; call it once for each engine.

    Each process reports its own part of the pool, from zero after a fork: forked workers export as
    they would without this, each by itself, and differ in the attribute ``process.pid``. Only
    ``pidpool.processes``, ``.unlisted_processes``, ``.possible_maximum``, ``.family_limit``, ``.permits``,
    ``.wanting`` and ``.server_max_connections`` are of the whole family; don't add those up over processes.

    The conventions' ``create_time``, ``wait_time`` and ``use_time`` are histograms, and OpenTelemetry
    has no histogram whose buckets could be handed over when it collects; to record each checkout would
    cost it several times what it costs now. `pidpool.otel.exporter` adds them when metrics are exported.
    Without it there are counters: ``pidpool.connection.wait_time.sum`` in seconds and
    ``pidpool.connection.wait_time.count``, likewise the others, whose quotient is the mean.

    Nothing is read before a collection, and a collection opens no connection. The engine is not kept
    alive by this. A second call for the same engine and provider changes nothing.

    :param engine: an engine, async engine or pool; two that are instrumented must not have the same
        ``pool_logging_name``.
    :param meter_provider: the provider to use instead of the process's global one.
    :raises TypeError: if the pool is not a `PidPool`.
    """
    _instrumented_by(meter_provider).sources.add(checked(engine))


def instrument_all(meter_provider: MeterProvider | None = None) -> None:
    """Register the metrics of every pool of this process, those that are made later included."""
    _instrumented_by(meter_provider).has_all_pools = True


def uninstrument_all() -> None:
    """Undo `instrument_all`; what `instrument` has registered stays."""
    for instrumented in list(_instrumented.values()):
        instrumented.has_all_pools = False


def instrumented_pools() -> dict[str, PidPool]:
    """Return all pools whose metrics are collected, by whichever provider, by name."""
    pools = (pool for instrumented in list(_instrumented.values()) for pool in instrumented.pools())
    return {pool.stats().pool: pool for pool in pools}


def common_attributes(stats: PoolStats | FamilyStats) -> dict[str, str | int]:
    """Return the attributes that all metrics of a pool have."""
    return {POOL_NAME: stats.pool, "process.pid": os.getpid()}


def _instrumented_by(meter_provider: MeterProvider | None) -> _Instrumented:
    provider = get_meter_provider() if meter_provider is None else meter_provider
    instrumented = _instrumented.get(provider)
    if instrumented is None:
        # One set of instruments for all engines: a second of the same name would be a conflict.
        instrumented = _instrumented[provider] = _Instrumented()
        instrumented.create(provider.get_meter(SCOPE, version("pidpool"), SCHEMA_URL))
    return instrumented


class _Instrumented:
    """The engines whose pools one meter provider collects."""

    def __init__(self) -> None:
        self.sources: WeakSet[Any] = WeakSet()
        self.has_all_pools = False

    def pools(self) -> list[PidPool]:
        """Return the pools, each once, also if it is known by its engine and by itself."""
        sources = [*self.sources, *(takeover.pools() if self.has_all_pools else ())]
        return [*{id(pool.pool_events): pool for pool in map(pool_of, sources)}.values()]

    def create(self, meter: Meter) -> None:
        create = {
            "counter": meter.create_observable_counter,
            "updowncounter": meter.create_observable_up_down_counter,
            "gauge": meter.create_observable_gauge,
        }
        for number in NUMBERS:
            callback = self._callback(_own, _one(number.read))
            create[number.kind](number.name, [callback], number.unit, number.description)
        for gauge in FAMILY_NUMBERS:
            callback = self._callback(_family, _one(gauge.read))
            create["gauge"](gauge.name, [callback], gauge.unit, gauge.description)
        for numbers in NUMBERS_BY:
            callback = self._callback(_own, _several(numbers))
            create[numbers.kind](numbers.name, [callback], numbers.unit, numbers.description)
        for durations in DURATIONS:
            name = durations.name.replace("db.client.", "pidpool.")
            callback = self._callback(_own, _sum(durations))
            create["counter"](f"{name}.sum", [callback], "s", f"{durations.description} All together.")
            callback = self._callback(_own, _count(durations))
            create["counter"](f"{name}.count", [callback], "1", f"{durations.description} How often.")

    def _callback(
        self, snapshot: Callable[[PidPool], Any], read: _Read
    ) -> Callable[[Any], Iterator[Observation]]:
        def observe(options: object) -> Iterator[Observation]:
            for pool in self.pools():
                stats = snapshot(pool)
                for attributes, value in read(stats):
                    if value is not None:
                        yield Observation(value, {**common_attributes(stats), **attributes})

        return observe


def _own(pool: PidPool) -> PoolStats:
    return pool.stats()


def _family(pool: PidPool) -> FamilyStats:
    return pool.family_stats()


def _one(read: Callable[[Any], int | None]) -> _Read:
    return lambda stats: [({}, read(stats))]


def _several(numbers: Numbers) -> _Read:
    return lambda stats: [({numbers.attribute: value}, count) for value, count in numbers.all(stats).items()]


def _sum(durations: Durations) -> _Read:
    return lambda stats: [({}, durations.read(stats).sum)]


def _count(durations: Durations) -> _Read:
    return lambda stats: [({}, durations.read(stats).count)]


_instrumented: WeakKeyDictionary[MeterProvider, _Instrumented] = WeakKeyDictionary()
