"""Servers from the system's packages: run on 127.0.0.1, ended by their pid."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import make_url
from waiting import until

from pidpool.tools.demo.postgres import EmbeddedPostgres


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server, and end it by its pid."""
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, **options) as server,
    ):
        try:
            yield server
            assert server.poll() is None, log.read_text()
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


@contextmanager
def pgbouncer(postgres: EmbeddedPostgres, pool_mode: str = "session") -> Iterator[str]:
    """Run a PgBouncer before the server; gives the URL to connect to through it."""
    url, port = make_url(postgres.url(tls=True)), free_port()
    # It refuses to run as root, and the user `nobody` has to be able to read its files.
    directory = Path(tempfile.mkdtemp(prefix="pidpool-pgbouncer-"))
    try:
        directory.chmod(0o755)
        configuration = directory / "pgbouncer.ini"
        configuration.write_text(
            f"""
[databases]
postgres = host=127.0.0.1 port={postgres.port} user={url.username} dbname=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {pool_mode}
server_tls_sslmode = require
"""
        )
        options = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
        binary = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
        assert binary is not None, "apt-get install pgbouncer"
        with running([binary, str(configuration)], directory / "log", cwd=directory, **options) as server:

            def answers() -> bool:
                assert server.poll() is None, (directory / "log").read_text()
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0

            until(answers, "PgBouncer does not answer")
            through = url.set(port=port, query={"sslmode": "disable"})
            yield through.render_as_string(hide_password=False)
    finally:
        shutil.rmtree(directory)
