"""/metrics scraped by a real Prometheus server, which then knows the figures of the whole family: with
the application directly at its server, and with PgBouncer in between."""

from __future__ import annotations

import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from engines import MakeEngine
from parent import server_pid
from servers import free_port, pgbouncer, running
from sqlalchemy import Engine, text
from waiting import until

from pidpool import serve_stats
from pidpool.export.endpoint import StatsServer
from pidpool.tools.demo.postgres import EmbeddedPostgres

pytestmark = pytest.mark.system


@pytest.fixture(params=["direct", "pgbouncer"])
def url(request: pytest.FixtureRequest, postgres: EmbeddedPostgres) -> Iterator[str]:
    if request.param == "direct":
        yield postgres.url(tls=True)
    else:
        with pgbouncer(postgres) as through:
            yield through


# -- Prometheus


class Prometheus:
    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[Any]:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self._url}/api/v1/query?{query}", timeout=20) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def value(self, expression: str) -> float | None:
        """Return the value of an expression that has one; None while there is none."""
        result = self.query(expression)
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False


@contextmanager
def prometheus(directory: Path, stats: StatsServer, token: str) -> Iterator[Prometheus]:
    """Run a Prometheus server that scrapes a stats endpoint every second."""
    configuration = directory / "prometheus.yml"
    configuration.write_text(
        f"""
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
- job_name: shop
  static_configs: [{{targets: ["127.0.0.1:{stats.port}"]}}]
  authorization: {{credentials: {token}}}
"""
    )
    port = free_port()
    command = [
        shutil.which("prometheus") or "prometheus",
        f"--config.file={configuration}",
        f"--storage.tsdb.path={directory / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with running(command, directory / "log") as server:
        found = Prometheus(f"http://127.0.0.1:{port}")

        def is_ready() -> bool:
            assert server.poll() is None, (directory / "log").read_text()
            return found.is_ready()

        until(is_ready, "Prometheus does not get ready")
        yield found


@contextmanager
def child_with_a_connection(engine: Engine) -> Iterator[int]:
    """Fork a child that checks out three times, and keeps the last one until this ends."""
    reader, writer = os.pipe()
    leave, left = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(left)
            for _ in range(2):
                with engine.connect() as connection:
                    connection.execute(text("select 1"))
            with engine.connect():
                os.write(writer, b".")
                os.read(leave, 1)
            engine.dispose()
            os._exit(0)
        finally:
            os._exit(1)
    os.close(leave)
    try:
        assert os.read(reader, 1) == b"."
        yield child
    finally:
        os.close(left)
        _, status = os.waitpid(child, 0)
        for descriptor in (reader, writer):
            os.close(descriptor)
    assert status == 0


def grafana_expressions() -> list[str]:
    dashboard = json.loads(resources.files("pidpool.export.endpoint").joinpath("grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for variable, value in {"$job": ".*", "$pool": ".*", "$__rate_interval": "10s", "$__range": "1m"}.items():
        expressions = [expression.replace(variable, value) for expression in expressions]
    return expressions


def test_prometheus_knows_the_figures_of_the_family(
    url: str, make_engine: MakeEngine, tmp_path: Path, clean_log: None
) -> None:
    engine = make_engine(url, pool_size=3, max_overflow=2, pool_logging_name="shop")
    with engine.connect() as mine, serve_stats(engine, port=0, token="s3cret") as stats:
        own = server_pid(mine)
        mine.commit()
        with child_with_a_connection(engine), prometheus(tmp_path, stats, "s3cret") as server:
            until(lambda: server.value("pidpool_processes") == 2, "Prometheus does not count the child")
            label = 'db_client_connection_pool_name="shop",job="shop"'
            expected = {
                'up{job="shop"}': 1,
                f"pidpool_checkouts_total{{{label}}}": 4,
                f"pidpool_checkins_total{{{label}}}": 2,
                f"pidpool_connections_opened_total{{{label}}}": 2,
                f'db_client_connection_count{{{label},db_client_connection_state="used"}}': 2,
                f'db_client_connection_count{{{label},db_client_connection_state="idle"}}': 0,
                f"db_client_connection_max{{{label}}}": 10,
                f"db_client_connection_idle_max{{{label}}}": 6,
                f"db_client_connection_wait_time_seconds_count{{{label}}}": 4,
                f"db_client_connection_use_time_seconds_count{{{label}}}": 2,
                f"db_client_connection_create_time_seconds_count{{{label}}}": 2,
                f'db_client_connection_wait_time_seconds_bucket{{{label},le="+Inf"}}': 4,
                f"pidpool_forks_total{{{label}}}": 1,
                f'pidpool_adoptions_total{{{label},pidpool_trigger="hook"}}': 1,
                f'pidpool_inherited_total{{{label},pidpool_state="no_transaction"}}': 1,
                f"pidpool_severed_total{{{label}}}": 1,
                f"pidpool_server_max_connections{{{label}}}": 300,
            }
            assert {expression: server.value(expression) for expression in expected} == expected
            median = f"histogram_quantile(0.5, db_client_connection_create_time_seconds_bucket{{{label}}})"
            assert 0 < (server.value(median) or 0) < 30
            # Every question of the dashboard's is one that Prometheus understands and has an answer to.
            until(
                lambda: (server.value("count_over_time(pidpool_processes[10s])") or 0) >= 2,
                "scraped once only",
            )
            unanswered = [expression for expression in grafana_expressions() if not server.query(expression)]
            assert unanswered == []
        # The child is gone, what it did is still counted.
        assert server_pid(mine) == own
        family = engine.pool.family_stats()  # type: ignore[attr-defined]
        assert family.counters.checkouts == 4 and family.alive == 1


def test_a_wrong_token_is_no_scrape(
    make_engine: MakeEngine, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    engine = make_engine(postgres.url(tls=True))
    with serve_stats(engine, port=0, token="s3cret") as stats, prometheus(tmp_path, stats, "wr0ng") as server:
        until(lambda: server.value('up{job="shop"}') == 0, "the scrape does not fail")
        assert server.query("pidpool_processes") == []
