"""MLflow's tracking server under gunicorn and under uvicorn, with nothing but a database URL of its own."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from applications import Application
from waiting import until

pytestmark = [pytest.mark.applications, pytest.mark.timeout(600)]

RUNS = 12
METRICS = 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    "server",
    [
        "--gunicorn-opts=--preload --timeout=120",
        "--uvicorn-opts=--log-level=warning --timeout-worker-healthcheck=120",
    ],
)
def test_mlflow(
    application: Callable[[str, str], Application],
    record_property: Callable[[str, object], None],
    server: str,
) -> None:
    mlflow = application("mlflow", "pidpool")
    port = free_port()

    def call(path: str, **body: Any) -> Any:
        question = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(question, timeout=60) as answer:
            return json.load(answer)

    mlflow.environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # seven more processes
    command = ("mlflow", "server", f"--backend-store-uri={mlflow.url()}", "--workers=2", f"--port={port}")
    command += ("--default-artifact-root=artifacts",)
    with mlflow.watched() as family, mlflow.running(*command, server) as process:

        def answers() -> bool:
            assert process.poll() is None, mlflow.log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        until(answers, lambda: mlflow.log.read_text()[-3000:], 300.0, interval=0.2)
        experiment = call("experiments/create", name="shop")["experiment_id"]

        def log_a_run(number: int) -> None:
            run = call("runs/create", experiment_id=experiment, start_time=1)["run"]["info"]["run_id"]
            for step in range(METRICS):
                call("runs/log-metric", run_id=run, key="m", value=number, timestamp=step, step=step)
            call("runs/update", run_id=run, status="FINISHED", end_time=2)

        with ThreadPoolExecutor(4) as clients:
            list(clients.map(log_a_run, range(RUNS)))
        complaints = mlflow.complaints()
        seen = family()
    found = (
        mlflow.ask("select count(*) from metrics"),
        mlflow.ask("select count(*) from runs where status = 'FINISHED'"),
    )
    figures = (
        f"requests {1 + RUNS * (METRICS + 2)}, processes {len(seen.processes) - 1}, "
        f"connections inherited {sum(seen.counters.inherited.values())}, "
        f"rows expected {RUNS * METRICS + RUNS}, found {sum(found)}, log lines {len(complaints)}"
    )
    record_property("application", f"MLflow {server.split('=')[0]}: {figures}")
    assert found == (RUNS * METRICS, RUNS)
    assert complaints == []
    assert seen.counters.checkouts > RUNS * METRICS
