"""A throwaway MariaDB with TLS, from the system's packages; the MySQL drivers are tested on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trustme
from servers import free_port, running
from waiting import until

# From MariaDB's sql_class.cc and sql_connect.cc: a client that went without a goodbye, or sent what is none.
_COMPLAINT = re.compile(r"\[(?:Warning|ERROR)\]|Got packets out of order|Got an error reading")


class MariaDB:
    """A running server: an empty database `app`, whose user `app` has no password."""

    def __init__(self, directory: Path, port: int) -> None:
        self.port = port
        self.ca_file = str(directory / "ca.pem")
        self.unix_socket = str(directory / "socket")
        self._log = directory / "error.log"

    def log_mark(self) -> int:
        return len(self._log.read_bytes())

    def complaints(self, since: int) -> list[str]:
        added = self._log.read_bytes()[since:].decode(errors="replace")
        return [line for line in added.splitlines() if _COMPLAINT.search(line)]


@contextmanager
def mariadb() -> Iterator[MariaDB]:
    """Run a server on 127.0.0.1; about 6 s, most of which its own set-up takes."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    names = ("mariadbd", "mariadb-install-db", "mariadb")
    server, set_up, client = (shutil.which(name, path=path) for name in names)
    assert server and set_up and client, "apt-get install mariadb-server"
    directory = Path(tempfile.mkdtemp(prefix="pidpool-mariadb-"))
    try:
        found = MariaDB(directory, free_port())
        (directory / "my.cnf").write_text(_SETTINGS.format(directory=directory, port=found.port))
        _make_certificates(directory)
        user = []
        if os.geteuid() == 0:  # as which it refuses to run
            user = ["--user=nobody"]
            for each in (directory, *directory.iterdir()):
                shutil.chown(each, "nobody", "nogroup")
        settings = f"--defaults-file={directory}/my.cnf"
        subprocess.run([set_up, settings, *user, *_BARE], check=True, capture_output=True, timeout=60)
        with running([server, settings, *user], directory / "output"):
            ask = [client, "--no-defaults", f"--socket={found.unix_socket}", "--user=root"]
            until(
                lambda: subprocess.run(ask, input=b"", capture_output=True).returncode == 0,
                lambda: (directory / "error.log").read_text(),
            )
            subprocess.run(ask, input=_USERS, check=True, timeout=20)
            yield found
    finally:
        shutil.rmtree(directory)


# Nothing has to survive a crash.
_SETTINGS = """
[mysqld]
datadir = {directory}/data
bind_address = 127.0.0.1
port = {port}
socket = {directory}/socket
pid_file = {directory}/data/pid
log_error = {directory}/error.log
log_warnings = 4
skip_name_resolve
ssl_ca = {directory}/ca.pem
ssl_cert = {directory}/cert.pem
ssl_key = {directory}/key.pem
innodb_log_file_size = 4M
innodb_buffer_pool_size = 16M
innodb_flush_log_at_trx_commit = 0
"""
_BARE = ("--skip-test-db", "--auth-root-authentication-method=normal")
_USERS = b"""
create database app;
create user app@'127.0.0.1'; grant all on app.* to app@'127.0.0.1';
create user app@localhost; grant all on app.* to app@localhost;
"""


def _make_certificates(directory: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    certificate.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    certificate.private_key_pem.write_to_path(directory / "key.pem")
