"""`serve_stats` in a Celery worker, which has no web server: its parent reports all its children."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from waiting import PATIENCE, until

from pidpool.tools.demo.postgres import EmbeddedPostgres

CHILDREN = 2
TASKS = 12
CHECKOUTS = 3

WORKER = f"""
import os, pathlib, time
from celery import Celery
from celery.signals import worker_init
from sqlalchemy import create_engine, text
from pidpool import PidPool, serve_stats

here = pathlib.Path({{here!r}})
app = Celery("tasks", broker="filesystem://")
app.conf.broker_transport_options = {{{{
    "data_folder_in": str(here / "queue"), "data_folder_out": str(here / "queue"),
    "control_folder": str(here / "control"),
}}}}
app.conf.worker_hijack_root_logger = False
engine = create_engine({{url!r}}, poolclass=PidPool, pool_size=2)

@worker_init.connect
def serve(**_):
    with engine.connect() as connection:  # in the parent, before it forks
        connection.execute(text("select 1"))
    (here / "port.new").write_text(str(serve_stats(engine, port=0).port))
    (here / "port.new").rename(here / "port")

@app.task(name="shop.buy")
def buy():
    # Until each child has a task: one of them might do them all.
    (here / "working" / str(os.getpid())).touch()
    deadline = time.monotonic() + {PATIENCE}
    while len(os.listdir(here / "working")) < {CHILDREN} and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range({CHECKOUTS}):
        with engine.connect() as connection:
            connection.execute(text("select 1"))
"""


def test_the_parent_serves_for_all_its_children(tmp_path: Path, postgres: EmbeddedPostgres) -> None:
    (tmp_path / "queue").mkdir()
    (tmp_path / "working").mkdir()
    (tmp_path / "tasks.py").write_text(WORKER.format(here=str(tmp_path), url=postgres.url(tls=True)))
    send = f"import tasks\nfor _ in range({TASKS}): tasks.app.send_task('shop.buy')"
    subprocess.run([sys.executable, "-c", send], cwd=tmp_path, check=True, timeout=PATIENCE)
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", f"--concurrency={CHILDREN}"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    log = tmp_path / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output) as worker,
    ):
        try:
            family = wait_for_the_work_to_be_done(worker, tmp_path / "port", log)
        finally:
            worker.terminate()
            try:
                worker.wait(PATIENCE)
            finally:
                worker.kill()
    parent, *children = family["processes"]
    assert parent["pid"] == worker.pid and parent["parent_pid"] is None
    assert [child["parent_pid"] for child in children] == [worker.pid] * CHILDREN
    assert [child["alive"] for child in children] == [True] * CHILDREN
    assert [child["counters"]["inherited"]["idle"] for child in children] == [1] * CHILDREN


def wait_for_the_work_to_be_done(worker: Any, port: Path, log: Path) -> Any:
    """Return the family as it is once it has made all the checkouts of all the tasks."""

    def family_at_the_end() -> Any:
        assert worker.poll() is None, log.read_text()
        if not port.exists():
            return None
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port.read_text()}/stats.json", timeout=20
        ) as response:
            (family,) = json.load(response)["pools"]
        return family if family["counters"]["checkins"] == 1 + TASKS * CHECKOUTS else None

    family = until(family_at_the_end, log.read_text, interval=0.1)
    assert family["counters"]["checkouts"] == 1 + TASKS * CHECKOUTS
    return family
