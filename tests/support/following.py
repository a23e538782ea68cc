"""Following a page: its files are written, its commands run in their order in one shell, and each prints
what the page shows."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pages
from sessions import kill_session
from sqlalchemy import make_url


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def with_server(text: str, driver: str, url: str) -> str:
    """Put a test's server in the place of that of all pages."""
    address = f"{driver}://app@127.0.0.1/app"
    return text.replace(f"{address}?", f"{url}{'&' if '?' in url else '?'}").replace(address, url)


class Adapted:
    """A page's text with this test's database and ports in the place of the page's.

    :param url: gives the database's URL for a driver.
    """

    def __init__(self, url: Callable[[str], str]) -> None:
        self.url = url
        self.ports: dict[str, int] = {}

    def __call__(self, text: str) -> str:
        # Ports first: the database's own is not one of them.
        text = re.sub(r"(?<=127\.0\.0\.1)(:| --port )(\d+)", self._port, text)
        text = re.sub(r"(?<=listen_port)( = )(\d+)", self._port, text)
        url = make_url(self.url("postgresql+psycopg2"))
        text = text.replace(
            "port=5432 dbname=app", f"port={url.port} dbname={url.database} user={url.username}"
        )
        text = re.sub(r"app@127\.0\.0\.1:(\d+)/app", rf"{url.username}@127.0.0.1:\1/{url.database}", text)
        text = text.replace("app = host", f"{url.database} = host")
        if os.geteuid() == 0:  # as which PgBouncer refuses to run
            text = text.replace("pgbouncer --quiet", "pgbouncer --quiet --user nobody")
        for driver in ("postgresql+psycopg2", "postgresql+asyncpg"):
            text = with_server(text, driver, self.url(driver))
        return text

    def _port(self, found: re.Match[str]) -> str:
        return f"{found[1]}{self.ports.setdefault(found[2], free_port())}"


@contextmanager
def shell(directory: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A bash in a session of its own; all that it started ends with it."""
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
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            pass
        kill_session(process)


def follow(
    bash: subprocess.Popen[str], steps: list[pages.Step], adapt: Adapted, directory: Path, bound: float = 60.0
) -> None:
    """Run a transcript in a shell; fail at the first command that does not print what the page shows.

    :param bound: seconds that each command may take.
    """
    assert bash.stdin is not None and bash.stdout is not None
    log = directory / "servers.log"
    for number, step in enumerate(steps):
        command = adapt(step.command)
        if command.endswith("&"):
            # What a server prints is for its terminal, not for the page.
            command = f"{command.removesuffix('&')} >>servers.log 2>&1 </dev/null &"
        elif not command.startswith("export "):  # which is for the commands after it
            command = f"timeout {bound} bash -c {_quoted(command)} </dev/null"
        bash.stdin.write(f"{command}\necho; echo end-of-{number} $?\n")
        bash.stdin.flush()
        lines = []
        for line in bash.stdout:
            if line.startswith(f"end-of-{number} "):
                break
            lines.append(line)
        status = line.split()[-1]
        logged = log.read_text()[-5000:] if log.exists() else ""
        output = "".join(lines).removesuffix("\n")
        assert step.prints(output), f"{step}\nprinted {output!r}, status {status}\n{logged}"
        assert status == "0", f"{step}\nprinted {output!r}, status {status}\n{logged}"


def write_files(files: Mapping[str, str], adapt: Adapted, directory: Path) -> None:
    """Write the files that a page has its reader write."""
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(adapt(text))


def _quoted(command: str) -> str:
    return "'" + command.replace("'", "'\\''") + "'"
