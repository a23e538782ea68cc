"""Airflow with its LocalExecutor as its guide starts it: all processes share one database URL."""

from __future__ import annotations

from collections.abc import Callable

import pages
import pytest
from applications import Application
from following import free_port

pytestmark = [pytest.mark.applications, pytest.mark.timeout(1500)]

GUIDE = pages.DOCS / "guides" / "airflow.md"
TASKS = 8


def test_airflow(
    application: Callable[[str, str], Application], record_property: Callable[[str, object], None]
) -> None:
    airflow = application("airflow", "page")
    airflow.environment |= {
        # The first answer takes the API server long on a slow machine.
        "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "120",
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
    }
    airflow.write_files_of(GUIDE)
    with airflow.watched() as family, airflow.followed(pages.steps(GUIDE), bound=600):
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
