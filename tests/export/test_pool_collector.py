"""`pidpool.prometheus.PoolCollector`: the pool's metrics in a registry of the application's, live, each once;
in forked children; and in gunicorn beside prometheus-client's multiprocess mode."""

from __future__ import annotations

import builtins
import importlib
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from engines import MakeEngine
from families import pool_reporting, small_family
from forking import run_in_child
from gunicorn_server import WORKERS, get, gunicorn
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import create_engine
from sqlalchemy.pool import QueuePool
from waiting import until

from pidpool.export.prometheus import expose
from pidpool.prometheus import PoolCollector
from pidpool.tools.demo.postgres import EmbeddedPostgres


def registry_with(*engines: Any) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(PoolCollector(*engines))
    return registry


def checkouts(registry: CollectorRegistry, pool: str) -> float | None:
    return registry.get_sample_value("pidpool_checkouts_total", {"db_client_connection_pool_name": pool})


def test_it_gives_what_the_endpoint_gives() -> None:
    family = small_family()
    assert generate_latest(registry_with(pool_reporting(family))) == expose([family], "")[0]


def test_it_is_live(tls_url: str, make_engine: MakeEngine) -> None:
    engine = make_engine(tls_url, pool_logging_name="shop")
    registry = registry_with(engine)
    assert checkouts(registry, "shop") == 0
    engine.connect().close()
    assert checkouts(registry, "shop") == 1
    engine.dispose()
    engine.connect().close()
    assert checkouts(registry, "shop") == 2


def test_a_child_gives_the_familys_metrics_too(tls_url: str, make_engine: MakeEngine) -> None:
    engine = make_engine(tls_url, pool_logging_name="shop")
    registry = registry_with(engine)
    engine.connect().close()

    def child() -> float | None:
        engine.connect().close()
        engine.dispose()
        return checkouts(registry, "shop")

    assert run_in_child(child) == 2
    assert checkouts(registry, "shop") == 2


def test_its_names_are_known_without_a_look_at_a_pool() -> None:
    def never() -> Any:
        raise AssertionError("looked at")

    engine = pool_reporting(never)
    registry = registry_with(engine)
    with pytest.raises(ValueError, match="pidpool_checkouts"):
        registry.register(PoolCollector(engine))
    with pytest.raises(ValueError, match="pidpool_checkouts"):
        prometheus_client.Counter("pidpool_checkouts", "The application's own", registry=registry)


def test_pools_of_one_name_make_no_series_twice() -> None:
    names = ["shop", "shop", "shop#2", "shop"]
    engines = [pool_reporting(small_family(pool=name)) for name in names]
    body = generate_latest(registry_with(*engines)).decode()
    assert set(re.findall(r'pool_name="([^"]+)"', body)) == {"shop", "shop#2", "shop#2#2", "shop#3"}
    assert series_of(body).most_common(1)[0][1] == 1


def test_a_pool_without_stats_is_refused() -> None:
    with pytest.raises(TypeError, match=r"QueuePool.*poolclass=PidPool"):
        PoolCollector(create_engine("sqlite://", poolclass=QueuePool))
    with pytest.raises(TypeError, match="at least one engine"):
        PoolCollector()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("prometheus_client"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **more)

    for module in ("pidpool.prometheus", "pidpool.export.prometheus"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pidpool\[endpoint\]'"):
        importlib.import_module("pidpool.prometheus")


# -- gunicorn, with prometheus-client's multiprocess mode

APPLICATION = """
from prometheus_client import CollectorRegistry, Counter, generate_latest, multiprocess
from sqlalchemy import create_engine, text
from pidpool import PidPool
from pidpool.prometheus import PoolCollector

engine = create_engine({url!r}, poolclass=PidPool, pool_size=2, max_overflow=1, pool_logging_name="shop")
with engine.connect() as connection:  # in the master, before it forks
    connection.execute(text("select 1"))
orders = Counter("shop_orders", "Orders taken")
pools = PoolCollector(engine)

def application(environ, start_response):
    if environ["PATH_INFO"] == "/metrics":
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        registry.register(pools)
        body = generate_latest(registry)
    else:
        orders.inc()
        with engine.connect() as connection:
            body = str(connection.scalar(text("select 1"))).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
"""


def series_of(body: str) -> Counter[str]:
    """Count how often each series stands in an exposition."""
    return Counter(line.rpartition(" ")[0] for line in body.splitlines() if not line.startswith("#"))


def number(body: str, series: str) -> float:
    (found,) = re.findall(rf"^{re.escape(series)} (\S+)$", body, re.MULTILINE)
    return float(found)


@pytest.mark.system
def test_one_scrape_of_gunicorn_has_the_applications_series_and_the_pools_each_once(
    tmp_path: Path, postgres: EmbeddedPostgres
) -> None:
    shared = tmp_path / "multiprocess"
    shared.mkdir()
    application = APPLICATION.format(url=postgres.url(tls=True))
    with gunicorn(tmp_path, application, PROMETHEUS_MULTIPROC_DIR=str(shared)) as (_, port):
        pool = '{db_client_connection_pool_name="shop"}'
        until(
            lambda: number(get(port, "/metrics"), f"pidpool_processes{pool}") == 1 + WORKERS,
            "the workers don't appear",
        )
        for _ in range(40):
            assert get(port, "/") == "1"
        body = get(port, "/metrics")
    assert series_of(body).most_common(1)[0][1] == 1
    assert number(body, "shop_orders_total") == 40
    assert number(body, f"pidpool_checkouts_total{pool}") == 41
    assert number(body, f"db_client_connection_wait_time_seconds_count{pool}") == 41
    promtool = shutil.which("promtool")
    assert promtool is not None, "apt-get install prometheus"
    done = subprocess.run(
        [promtool, "check", "metrics"], input=body, text=True, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
