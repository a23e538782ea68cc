"""Every guide can be followed: its files are written, its commands run in their order and print what the page
shows, on a real PostgreSQL with TLS whose log stays clean."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pages
import pytest
from sqlalchemy import make_url

from pidpool.tools.demo.postgres import EmbeddedPostgres

STEP_BOUND = 60
OF_OTHER_PACKAGES = {"airflow", "mlflow", "superset"}
"""Applications with a virtual environment of their own; tests/applications/ runs them as the pages say."""
OF_THE_SYSTEM = {"pgbouncer", "rq"}
GUIDES = [page for page in pages.PAGES if pages.steps(page)]


def parameters() -> Iterator[object]:
    for page in GUIDES:
        if page.stem not in OF_OTHER_PACKAGES:
            marks = [pytest.mark.system] if page.stem in OF_THE_SYSTEM else []
            yield pytest.param(page, id=page.stem, marks=marks)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Adapted:
    """A page's text with this test's server and ports in the place of the page's."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self.postgres = postgres
        self.ports: dict[str, int] = {}

    def __call__(self, text: str) -> str:
        # Ports first: the database's own is not one of them.
        text = re.sub(r"(?<=127\.0\.0\.1)(:| --port )(\d+)", self._port, text)
        text = re.sub(r"(?<=listen_port)( = )(\d+)", self._port, text)
        url = make_url(self.postgres.url())
        text = text.replace(
            "port=5432 dbname=app", f"port={url.port} dbname={url.database} user={url.username}"
        )
        text = re.sub(r"app@127\.0\.0\.1:(\d+)/app", rf"{url.username}@127.0.0.1:\1/{url.database}", text)
        text = text.replace("app = host", f"{url.database} = host")
        if os.geteuid() == 0:  # as which PgBouncer refuses to run
            text = text.replace("pgbouncer --quiet", "pgbouncer --quiet --user nobody")
        for driver in ("postgresql+psycopg2", "postgresql+asyncpg"):
            address, url = f"{driver}://app@127.0.0.1/app", self.postgres.url(driver=driver)
            text = text.replace(f"{address}?", f"{url}&").replace(address, url)
        return text

    def _port(self, found: re.Match[str]) -> str:
        return f"{found[1]}{self.ports.setdefault(found[2], free_port())}"


@contextmanager
def shell(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A bash in a session of its own; all that it started ends with it."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}"}
    environment.pop("PYTHONWARNINGS", None)
    process = subprocess.Popen(
        ["bash"],
        cwd=directory,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        # First as a person would end them: servers tidy up.
        process.stdin.write("kill $(jobs -p) 2>/dev/null; wait; exit\n")
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def follow(steps: list[pages.Step], adapt: Adapted, directory: Path) -> None:
    """Run a transcript; fail at the first command that does not print what the page shows."""
    with shell(directory) as bash:
        assert bash.stdin is not None and bash.stdout is not None
        for number, step in enumerate(steps):
            command = adapt(step.command)
            if command.endswith("&"):
                # What a server prints is for its terminal, not for the page.
                command = f"{command.removesuffix('&')} >>servers.log 2>&1 </dev/null &"
            else:
                command = f"timeout {STEP_BOUND} bash -c {_quoted(command)} </dev/null"
            bash.stdin.write(f"{command}\necho; echo end-of-{number} $?\n")
            bash.stdin.flush()
            lines = []
            for line in bash.stdout:
                if line.startswith(f"end-of-{number} "):
                    break
                lines.append(line)
            status = line.split()[-1]
            log = directory / "servers.log"
            logged = log.read_text() if log.exists() else ""
            output = "".join(lines).removesuffix("\n")
            assert step.prints(output), f"{step}\nprinted {output!r}, status {status}\n{logged}"
            assert status == "0", f"{step}\nstatus {status}\n{logged}"


def _quoted(command: str) -> str:
    return "'" + command.replace("'", "'\\''") + "'"


@pytest.mark.parametrize("page", list(parameters()))
def test_a_guide_can_be_followed(page: Path, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    adapt = Adapted(postgres)
    for name, text in pages.files(page).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(adapt(text))
    mark = postgres.log_mark()
    follow(pages.steps(page), adapt, tmp_path)
    # A worker that ends without closing its own connections leaves that line, with every pool.
    harmed = [line for line in postgres.complaints(mark) if "Connection reset by peer" not in line]
    assert harmed == []


def test_every_guide_has_something_to_follow() -> None:
    guides = {page for page in pages.PAGES if page.parent.name == "guides" and page.stem != "index"}
    assert len(guides) >= 14
    assert guides <= set(GUIDES)
