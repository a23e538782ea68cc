"""One family for gunicorn without --preload, uvicorn with workers, and a Celery worker beside them: each
endpoint shows all of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sessions import kill_session
from waiting import until

from pidpool.tools.demo.postgres import EmbeddedPostgres

WORKERS = 4

SHOP = """
import os
from sqlalchemy import create_engine, text
from pidpool import PidPool, StatsApp

engine = create_engine(
    os.environ["DB_URL"], poolclass=PidPool, pool_size=2, family="shop", family_limit=12
)
with engine.connect() as connection:
    connection.execute(text("select 1"))
application = StatsApp(engine)
asgi = application.asgi
"""

TASKS = """
import os
from celery import Celery
from celery.signals import worker_process_init

app = Celery(broker="filesystem://")
app.conf.broker_transport_options = {
    "data_folder_in": os.environ["QUEUE"], "data_folder_out": os.environ["QUEUE"],
    "control_folder": os.environ["QUEUE"],
}

@worker_process_init.connect
def use(**_):
    import shop
"""


@contextmanager
def running(name: str, directory: Path, environment: dict[str, str], *command: str) -> Iterator[Path]:
    """Run a program of Python's; give the file with its output."""
    log = directory / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=directory,
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield log
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                pass
            kill_session(process)


def port_in(log: Path, pattern: str) -> int:
    return int(
        until(lambda: re.search(pattern, log.read_text()), f"it does not listen: {log.read_text()}")[1]
    )


def family_at(port: int) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats.json", timeout=20) as response:
        (family,) = json.load(response)["pools"]
    return family


def alive(family: Any) -> set[int]:
    return {each["pid"] for each in family["processes"] if each["alive"]}


@pytest.mark.timeout(240)
def test_each_endpoint_shows_all_and_what_a_killed_worker_counted(
    tmp_path: Path, postgres: EmbeddedPostgres
) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "tasks.py").write_text(TASKS)
    (tmp_path / "queue").mkdir()
    environment = {
        "DB_URL": postgres.url(tls=True),
        "PIDPOOL_FAMILY_DIR": str(tmp_path),
        "QUEUE": str(tmp_path / "queue"),
        "PYTHONPATH": str(tmp_path),
    }
    gunicorn = ("gunicorn", f"--workers={WORKERS}", "--bind=127.0.0.1:0", "shop:application")
    uvicorn = ("uvicorn", f"--workers={WORKERS}", "--port=0", "shop:asgi")
    celery = ("celery", "-A", "tasks", "worker", "--concurrency=2", "--without-mingle", "--without-gossip")
    with ExitStack() as stack:
        logs = [
            stack.enter_context(running(command[0], tmp_path, environment, *command))
            for command in (gunicorn, uvicorn, celery)
        ]
        ports = [
            port_in(logs[0], r"Listening at: http://127\.0\.0\.1:(\d+)"),
            port_in(logs[1], r"running on http://127\.0\.0\.1:(\d+)"),
        ]
        workers = 2 * WORKERS + 2

        def all_have_connected() -> bool:
            try:  # uvicorn names its port before its workers listen
                return all(family_at(port)["counters"]["checkouts"] == workers for port in ports)
            except OSError:
                return False

        until(all_have_connected, "not all appear")
        families = [family_at(port) for port in ports]
        assert alive(families[0]) == alive(families[1])
        for family in families:
            assert family["limit"] == 12 and family["permits"] <= 12
            assert family["counters"]["checkouts"] == workers
            assert all(each["counters"]["checkouts"] == 1 for each in family["processes"])
        victim = max(alive(families[0]))
        os.kill(victim, signal.SIGKILL)
        until(lambda: victim not in alive(family_at(ports[1])), "the killed one is alive")
        for port in ports:
            (dead,) = [each for each in family_at(port)["processes"] if each["pid"] == victim]
            assert dead["counters"]["checkouts"] == 1
