"""Airflow with its LocalExecutor: scheduler, DAG processor and API server share a database URL."""

from __future__ import annotations

import contextlib
import secrets
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from applications import Application
from waiting import until

pytestmark = [pytest.mark.applications, pytest.mark.timeout(1500)]

DAGS = Path(__file__).parent.parent / "programs" / "applications" / "dags"
TASKS = 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_airflow(
    application: Callable[[str, str], Application], record_property: Callable[[str, object], None]
) -> None:
    airflow = application("airflow", "pidpool")
    port = free_port()
    airflow.environment |= {
        "AIRFLOW_HOME": str(airflow.directory),
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": airflow.url(),
        # The first answer takes the API server long on a slow machine.
        "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "120",
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC": airflow.url("postgresql+asyncpg"),
    }
    airflow.run("airflow", "db", "migrate", seconds=600)
    with (
        airflow.watched() as family,
        airflow.running("airflow", "api-server") as server,
        contextlib.ExitStack() as stack,
    ):

        def answers() -> bool:
            assert server.poll() is None, airflow.log.read_text()[-5000:]
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v2/version"),
            ):
                return True
            return False

        until(answers, lambda: airflow.log.read_text()[-5000:], 300.0, interval=0.5)
        for job in ("scheduler", "dag-processor"):
            stack.enter_context(airflow.running("airflow", job))
        state = "select state from dag_run"
        until(lambda: airflow.ask(state) in ("success", "failed"), airflow.log.read_text, 600.0, interval=1.0)
        complaints = airflow.complaints()
        counters = family().counters
    found = airflow.ask("select count(*) from task_instance where state = 'success'")
    inherited = sum(counters.inherited.values())
    figures = f"forks {counters.forks}, connections inherited {inherited}"
    record_property(
        "application", f"Airflow: tasks {TASKS}, {found} succeeded, {figures}, log lines {len(complaints)}"
    )
    assert found == TASKS
    assert complaints == []
    assert counters.forks and inherited
