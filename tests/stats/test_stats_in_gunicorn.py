"""The endpoint in a web server that forks: whichever worker answers, it tells of all, also of one that
was killed, and no checkout is lost."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from waiting import PATIENCE, until

from pidpool.tools.demo.postgres import EmbeddedPostgres

WORKERS = 4
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


@contextmanager
def gunicorn(directory: Path, url: str) -> Iterator[tuple[int, int]]:
    """Run gunicorn with preloaded workers; gives its pid and port."""
    (directory / "shop.py").write_text(APPLICATION.format(url=url))
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "--preload",
        f"--workers={WORKERS}",
        "--bind=127.0.0.1:0",
        "shop",
    ]
    log = directory / "log"
    with log.open("wb") as output, subprocess.Popen(command, cwd=directory, stderr=output) as server:
        try:

            def port() -> int | None:
                assert server.poll() is None, log.read_text()
                found = re.search(r"Listening at: http://127\.0\.0\.1:(\d+)", log.read_text())
                return None if found is None else int(found[1])

            yield server.pid, until(port, "gunicorn does not start")
        finally:
            server.terminate()
            try:
                server.wait(20)
            finally:
                server.kill()


def get(port: int, path: str) -> bytes | None:
    """Return what is answered; None if the worker died over it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        return body
    except (http.client.RemoteDisconnected, ConnectionResetError):
        return None
    finally:
        connection.close()


def family_of(port: int) -> tuple[int, Any]:
    """Return the pid of the worker that answered, and the family that it reported."""
    body = get(port, "/pidpool/stats.json")
    assert body is not None
    stats = json.loads(body)
    (family,) = stats["pools"]
    return stats["answered_by"], family


def test_any_worker_reports_all_and_no_checkout_is_lost(tmp_path: Path, postgres: EmbeddedPostgres) -> None:
    with gunicorn(tmp_path, postgres.url(tls=True)) as (master, port):
        until(lambda: family_of(port)[1]["alive"] == 1 + WORKERS, "the workers don't appear")
        answered = []
        enough = threading.Event()

        def load() -> None:
            while not enough.is_set():
                assert get(port, "/") == b"served"
                answered.append(1)

        clients = [threading.Thread(target=load) for _ in range(4)]
        for client in clients:
            client.start()
        until(lambda: len(answered) > 50, "nothing is answered")
        # It dies in a request of its own, so that no answer to another one is lost with it.
        assert get(port, "/die") is None
        until(lambda: family_of(port)[1]["alive"] == 1 + WORKERS, "no worker takes the place of the dead one")
        so_far = len(answered)
        until(lambda: len(answered) > so_far + 50, "nothing is answered any more")
        enough.set()
        for client in clients:
            client.join(PATIENCE)

        told: dict[int, Any] = {}

        def all_have_answered() -> bool:
            pid, family = family_of(port)
            told[pid] = family
            return len(told) == WORKERS

        until(all_have_answered, "not all workers answer")
        for family in told.values():
            processes = family["processes"]
            alive = {process["pid"] for process in processes if process["alive"]}
            assert alive == {master, *told}
            assert [process["pid"] for process in processes if process["parent_pid"] is None] == [master]
            assert {process["parent_pid"] for process in processes[1:]} == {master}
            (dead,) = [process for process in processes if not process["alive"]]
            assert dead["counters"]["checkouts"] % CHECKOUTS == 0
            assert family["counters"]["checkouts"] == 1 + CHECKOUTS * len(answered)
            assert family["counters"]["checkins"] == family["counters"]["checkouts"]
            assert family["counters"]["inherited"]["idle"] == WORKERS + 1
            assert family["maximum"] == (1 + WORKERS) * 3
            assert family["used"] == 0
