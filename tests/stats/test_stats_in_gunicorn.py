"""The endpoint in a web server that forks: each worker reports all of them, also a killed one, and no
checkout is lost."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from gunicorn_server import WORKERS, get, gunicorn
from waiting import PATIENCE, until

from pidpool.tools.demo.postgres import EmbeddedPostgres

CHECKOUTS = 3

APPLICATION = f"""
import os, signal
from sqlalchemy import create_engine, text
from pidpool import PidPool, StatsApp

engine = create_engine({{url!r}}, poolclass=PidPool, pool_size=2, max_overflow=1)
with engine.connect() as connection:  # in the master, before it forks
    connection.execute(text("select 1"))

def shop(environ, start_response):
    if environ["PATH_INFO"] == "/die":
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range({CHECKOUTS}):
        with engine.connect() as connection:
            connection.execute(text("select 1"))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"served"]

application = StatsApp(engine).mount(shop, "/pidpool")
"""


def family_of(port: int) -> tuple[int, Any]:
    """Return the pid of the worker that answered, and the family that it reported."""
    stats = json.loads(get(port, "/pidpool/stats.json"))
    (family,) = stats["pools"]
    return stats["answered_by"], family


def test_any_worker_reports_all_and_no_checkout_is_lost(tmp_path: Path, postgres: EmbeddedPostgres) -> None:
    application = APPLICATION.format(url=postgres.url(tls=True))
    with gunicorn(tmp_path, application) as (master, port):
        until(lambda: family_of(port)[1]["alive"] == 1 + WORKERS, "the workers don't appear")
        answered = []
        enough = threading.Event()

        def load() -> None:
            while not enough.is_set():
                assert get(port, "/") == "served"
                answered.append(1)

        clients = [threading.Thread(target=load) for _ in range(4)]
        for client in clients:
            client.start()
        until(lambda: len(answered) > 50, "nothing is answered")
        # It dies in a request of its own, so that no answer to another one is lost with it.
        with pytest.raises(ConnectionResetError):
            get(port, "/die")
        until(lambda: family_of(port)[1]["alive"] == 1 + WORKERS, "no worker takes the place of the dead one")
        so_far = len(answered)
        until(lambda: len(answered) > so_far + 50, "nothing is answered any more")
        enough.set()
        for client in clients:
            client.join(PATIENCE)

        reported: dict[int, Any] = {}

        def all_have_answered() -> bool:
            pid, family = family_of(port)
            reported[pid] = family
            return len(reported) == WORKERS

        until(all_have_answered, "not all workers answer")
        for family in reported.values():
            processes = family["processes"]
            alive = {process["pid"] for process in processes if process["alive"]}
            assert alive == {master, *reported}
            assert [process["pid"] for process in processes if process["parent_pid"] is None] == [master]
            assert {process["parent_pid"] for process in processes[1:]} == {master}
            (dead,) = [process for process in processes if not process["alive"]]
            assert dead["counters"]["checkouts"] % CHECKOUTS == 0
            assert family["counters"]["checkouts"] == 1 + CHECKOUTS * len(answered)
            assert family["counters"]["checkins"] == family["counters"]["checkouts"]
            assert family["counters"]["inherited"]["idle"] == WORKERS + 1
            assert family["maximum"] == (1 + WORKERS) * 3
            assert family["used"] == 0
