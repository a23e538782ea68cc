"""MLflow's tracking server as its guide starts it: under uvicorn and under gunicorn, by a database URL."""

from __future__ import annotations

from collections.abc import Callable

import pages
import pytest
from applications import Application

pytestmark = [pytest.mark.applications, pytest.mark.timeout(600)]

GUIDE = pages.DOCS / "guides" / "mlflow.md"
RUNS = 12
METRICS = 4


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn"])
def test_mlflow(
    application: Callable[[str, str], Application],
    record_property: Callable[[str, object], None],
    server: str,
) -> None:
    mlflow = application("mlflow", "page")
    mlflow.environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # seven more processes
    mlflow.write_files_of(GUIDE)
    steps = [*pages.steps(GUIDE)[:1], *pages.steps(GUIDE, f"Under {server}")]
    with mlflow.watched() as family, mlflow.followed(steps, bound=300):
        complaints = mlflow.complaints()
        seen = family()
    found = (
        mlflow.ask("select count(*) from metrics"),
        mlflow.ask("select count(*) from runs where status = 'FINISHED'"),
    )
    figures = (
        f"processes {len(seen.processes) - 1}, "
        f"connections inherited {sum(seen.counters.inherited.values())}, "
        f"rows expected {RUNS * METRICS + RUNS}, found {sum(found)}, log lines {len(complaints)}"
    )
    record_property("application", f"MLflow under {server}: {figures}")
    assert found == (RUNS * METRICS, RUNS)
    assert complaints == []
    assert seen.counters.checkouts > RUNS * METRICS
    assert not any(seen.counters.inherited.values())  # as the guide says
