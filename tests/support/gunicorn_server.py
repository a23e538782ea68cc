"""gunicorn with preloaded workers, for tests of the endpoint in a web server that forks."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from waiting import PATIENCE, until

WORKERS = 4


@contextmanager
def gunicorn(directory: Path, application: str, **environment: str) -> Iterator[tuple[int, int]]:
    """Run a program that defines `application`; gives the pid of the master, and its port."""
    (directory / "shop.py").write_text(application)
    options = ("--preload", f"--workers={WORKERS}", "--bind=127.0.0.1:0")
    log = directory / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *options, "shop"],
            cwd=directory,
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
        ) as server,
    ):
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


def get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode()
        assert response.status == 200, body
        return body
    finally:
        connection.close()
