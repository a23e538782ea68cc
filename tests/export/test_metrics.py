"""/metrics: accepted by the official parsers in both formats, named as the conventions have it, with the
figures of the family; and a Grafana dashboard that asks for nothing that is not there."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

import pytest
from families import family, process, small_family
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from pidpool.export.prometheus import expose
from pidpool.stats.snapshots import BOUNDS, Counters, FamilyStats

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
# What a Prometheus server of today sends.
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
    "text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)
PARSERS = {"": parse_text, OPENMETRICS: parse_openmetrics, PROMETHEUS: parse_openmetrics}
POOL = "db_client_connection_pool_name"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(accept: str, *families: FamilyStats) -> Samples:
    body, _ = expose(families, accept)
    found: Samples = {}
    for metric in PARSERS[accept](body.decode()):
        for sample in metric.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, "the same series twice"
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, pool: str = "shop", **labels: str) -> float:
    return samples[name, frozenset({POOL: pool, **labels}.items())]


@pytest.mark.parametrize("accept", PARSERS, ids=["text", "openmetrics", "prometheus"])
def test_the_official_parsers_accept_it(accept: str) -> None:
    samples = samples_of(accept, small_family(), small_family(pool='with "quotes" and \\ and \n'))
    assert len({name for name, _ in samples}) >= 30
    pools = {dict(labels)[POOL] for _, labels in samples}
    assert pools == {"shop", 'with "quotes" and \\ and \n'}


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/html,*/*;q=0.8", "text/plain; version=0.0.4; charset=utf-8"),
        (OPENMETRICS, "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        ("application/openmetrics-text;version=new", "text/plain; version=0.0.4; charset=utf-8"),
    ],
)
def test_the_format_is_what_the_scraper_asks_for(accept: str, content_type: str) -> None:
    body, given = expose([small_family()], accept)
    assert given.startswith(content_type.partition(" charset")[0])
    assert body.endswith(b"# EOF\n") == given.startswith("application/openmetrics-text")


# The semantic conventions' instruments, with the type and unit that each has there, and the name that
# OpenTelemetry's rules for Prometheus make of it: dots to underscores, {annotations} dropped, s to
# seconds, _total for a counter.
CONVENTIONS = {
    # Prometheus keeps _count for histograms: promtool complains of a gauge with that ending.
    "db.client.connection.count": ("unknown", "db_client_connection_count"),
    "db.client.connection.idle.max": ("gauge", "db_client_connection_idle_max"),
    "db.client.connection.max": ("gauge", "db_client_connection_max"),
    "db.client.connection.pending_requests": ("gauge", "db_client_connection_pending_requests"),
    "db.client.connection.timeouts": ("counter", "db_client_connection_timeouts_total"),
    "db.client.connection.create_time": ("histogram", "db_client_connection_create_time_seconds"),
    "db.client.connection.wait_time": ("histogram", "db_client_connection_wait_time_seconds"),
    "db.client.connection.use_time": ("histogram", "db_client_connection_use_time_seconds"),
}


def test_the_names_are_those_of_the_semantic_conventions() -> None:
    from opentelemetry.semconv._incubating.metrics import db_metrics

    metrics = {
        metric.name: metric for metric in parse_openmetrics(expose([small_family()], OPENMETRICS)[0].decode())
    }
    named = {
        getattr(db_metrics, name) for name in dir(db_metrics) if name.startswith("DB_CLIENT_CONNECTION_")
    }
    # SQLAlchemy's pools have no least number of idle connections.
    assert set(CONVENTIONS) == named - {"db.client.connection.idle.min"}
    for kind, name in CONVENTIONS.values():
        metric = metrics[name.removesuffix("_total")]
        assert metric.type == kind
        assert metric.unit == ("seconds" if kind == "histogram" else "")
        assert all(POOL in sample.labels for sample in metric.samples)
    states = {
        sample.labels["db_client_connection_state"]
        for sample in metrics["db_client_connection_count"].samples
    }
    assert states == {"idle", "used"}
    assert {name for name in metrics if not name.startswith("pidpool_")} == {
        name.removesuffix("_total") for _, name in CONVENTIONS.values()
    }


@pytest.mark.parametrize("accept", PARSERS, ids=["text", "openmetrics", "prometheus"])
def test_the_figures_are_the_family_s(accept: str) -> None:
    samples = samples_of(accept, small_family())
    assert value(samples, "db_client_connection_count", db_client_connection_state="idle") == 2
    assert value(samples, "db_client_connection_count", db_client_connection_state="used") == 1
    assert value(samples, "db_client_connection_max") == 30
    assert value(samples, "pidpool_possible_maximum") == 30
    assert value(samples, "db_client_connection_idle_max") == 10
    assert value(samples, "db_client_connection_pending_requests") == 3
    assert value(samples, "db_client_connection_timeouts_total") == 1
    assert value(samples, "pidpool_processes") == 2
    assert value(samples, "pidpool_server_max_connections") == 100
    limited = samples_of(accept, small_family(limit=20))
    assert value(limited, "pidpool_family_limit") == value(limited, "pidpool_possible_maximum") == 20
    assert value(limited, "pidpool_permits") == value(limited, "pidpool_wanting") == 0
    assert value(samples, "pidpool_checkouts_total") == 39
    assert value(samples, "pidpool_checkins_total") == 38
    assert value(samples, "pidpool_checkouts_overdue_total") == 4
    assert value(samples, "pidpool_overdue_checkouts") == 1
    assert value(samples, "pidpool_connections_opened_total") == 3
    assert value(samples, "pidpool_forks_total") == 2
    assert value(samples, "pidpool_severed_total") == 2
    assert value(samples, "pidpool_refused_total") == 1
    assert value(samples, "pidpool_kept_total") == value(samples, "pidpool_replaced_total") == 0
    assert value(samples, "pidpool_adoptions_total", pidpool_trigger="hook") == 1
    assert value(samples, "pidpool_adoptions_total", pidpool_trigger="lazy") == 1
    assert value(samples, "pidpool_connections_failed_total", error_type="OperationalError") == 2
    assert value(samples, "pidpool_connections_closed_total", pidpool_reason="recycled") == 1
    assert value(samples, "pidpool_inherited_total", pidpool_state="in_transaction") == 1


@pytest.mark.parametrize("accept", PARSERS, ids=["text", "openmetrics", "prometheus"])
def test_a_histogram_counts_upwards_to_all(accept: str) -> None:
    samples = samples_of(accept, small_family())
    name = "db_client_connection_use_time_seconds"
    buckets = {
        dict(labels)["le"]: count for (each, labels), count in samples.items() if each == f"{name}_bucket"
    }
    ordered = sorted(buckets.items(), key=lambda item: float(item[0]))
    assert [float(le) for le, _ in ordered] == [*BOUNDS, float("inf")]
    counts = [count for _, count in ordered]
    assert counts == sorted(counts)
    # One took 0.1 s, the other 40: longer than the last bound.
    assert [count for le, count in ordered if 0.05 < float(le) < 0.2] == [0, 1]
    assert counts[-2:] == [1, 2]
    assert value(samples, f"{name}_count") == 2
    assert value(samples, f"{name}_sum") == pytest.approx(40.1)


def test_what_has_not_happened_yet_is_there_as_zero() -> None:
    # A counter that appears with its first increase loses that increase: rate() needs two points.
    samples = samples_of("", family(process(1, None, Counters())))
    for name, label, known in (
        (
            "pidpool_connections_closed_total",
            "pidpool_reason",
            [
                *("recycled", "invalidated", "overflow", "disposed", "detached"),
                *("failed", "given_back", "idle", "collected"),
            ],
        ),
        ("pidpool_connections_failed_total", "error_type", ["OperationalError"]),
        ("pidpool_inherited_total", "pidpool_state", ["idle", "no_transaction", "in_transaction", "unknown"]),
        ("pidpool_adoptions_total", "pidpool_trigger", ["hook", "lazy"]),
    ):
        assert [value(samples, name, **{label: each}) for each in known] == [0] * len(known)


def test_what_is_not_known_is_not_told() -> None:
    boundless = [process(1, None, size=0), process(2, 1, max_overflow=-1)]
    samples = samples_of("", family(*boundless, server_max_connections=None))
    names = {name for name, _ in samples}
    assert names.isdisjoint(
        [
            "db_client_connection_max",
            "db_client_connection_idle_max",
            "pidpool_overdue_checkouts",
            "pidpool_possible_maximum",
            "pidpool_family_limit",
            "pidpool_permits",
            "pidpool_wanting",
            "pidpool_server_max_connections",
        ]
    )


def test_no_series_is_named_after_a_process() -> None:
    one, many = family(process(1, None)), family(*[process(pid, None) for pid in range(1, 300)])
    assert samples_of("", one).keys() == samples_of("", many).keys()


# -- Grafana


def dashboard() -> Any:
    return json.loads(resources.files("pidpool.export.endpoint").joinpath("grafana.json").read_text())


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_asks_for_nothing_that_is_not_exposed() -> None:
    exposed = {name for name, _ in samples_of("", small_family())}
    asked = set()
    for expression in [
        *expressions(),
        *(each["definition"] for each in dashboard()["templating"]["list"] if each["type"] == "query"),
    ]:
        asked.update(re.findall(r"\b(?:db_client|pidpool)_\w+(?=\{|,)", expression))
    assert len(asked) > 15
    assert asked <= exposed


def test_the_dashboard_s_labels_are_exposed() -> None:
    exposed = {label for _, labels in samples_of("", small_family()) for label, _ in labels}
    for expression in expressions():
        for labels in re.findall(r"\{([^}]*)\}", expression):
            assert {each.split("=")[0].strip("!~ ") for each in labels.split(",")} <= exposed | {"job"}
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            assert {each.strip() for each in labels.split(",")} <= exposed


def test_the_dashboard_s_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])
