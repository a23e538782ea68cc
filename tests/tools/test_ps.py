"""`pidpool ps` finds the database sockets that several processes hold open and the process that opened each;
if no socket is shared it finds none. Real servers, real forks, real /proc.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from engines import MakeEngine
from forking import run_in_child
from parent import bytes_on_the_wire, server_pid
from sqlalchemy import NullPool, QueuePool, create_engine, text
from terminal import Terminal
from waiting import until

from pidpool import tag_of
from pidpool.cli import ps
from pidpool.tools.demo.postgres import EmbeddedPostgres
from pidpool.tools.ps import servers, socket_tables, sockets
from pidpool.tools.ps.processes import Process
from pidpool.tools.ps.sockets import Scan, SharedSocket, find

SECONDS = 20.0  # how long anything here may take, on a slow machine
ROOT = os.geteuid() == 0
COMMAND = [sys.executable, "-c", "from pidpool.cli import main; main()", "ps"]
HOMES = ("HOME", "XDG_RUNTIME_DIR")
PROGRAMS = Path(__file__).parent.parent / "programs"

PR_SET_DUMPABLE, PR_SET_NAME = 4, 15
prctl = ctypes.CDLL(None).prctl


class Family:
    """Forked processes that touch nothing and stay until `end`."""

    def __init__(self) -> None:
        self._ready, self._ready_end = os.pipe()
        self._leave, self._leave_end = os.pipe()
        self._children: list[int] = []

    def fork(self, grow: Callable[[], object] = lambda: None) -> int:
        """Fork a process that runs `grow()`, where it may fork others, and stays; return its pid."""
        pid = os.fork()
        if pid == 0:
            try:
                if self._leave_end >= 0:
                    os.close(self._leave_end)
                    self._leave_end = -1
                grow()
                os.write(self._ready_end, struct.pack("i", os.getpid()))
                os.read(self._leave, 1)
                os._exit(0)
            finally:
                os._exit(1)
        self._children.append(pid)
        return pid

    def settled(self, count: int) -> set[int]:
        """Wait until so many more processes are what they are to be, and return their pids.

        They report through one pipe: only one process at a time may wait.
        """
        pids = set()
        while len(pids) < count:
            ready, _, _ = select.select([self._ready], [], [], SECONDS)
            assert ready, f"{len(pids)} of {count} processes came up"
            pids.add(struct.unpack("i", os.read(self._ready, 4))[0])
        return pids

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.wait(pid)

    def wait(self, pid: int) -> None:
        os.waitpid(pid, 0)
        self._children.remove(pid)

    def end(self) -> None:
        for fd in (self._leave_end, self._ready_end):
            os.close(fd)
        for pid in self._children:
            os.waitpid(pid, 0)
        # The end of the stream: orphaned processes have ended, too.
        assert select.select([self._ready], [], [], SECONDS)[0] and os.read(self._ready, 1) == b""
        os.close(self._ready)
        os.close(self._leave)


@pytest.fixture
def family() -> Iterator[Family]:
    members = Family()
    yield members
    members.end()


@pytest.fixture(params=["tls", "plain", "unix"])
def any_url(request: pytest.FixtureRequest, postgres: EmbeddedPostgres) -> str:
    return postgres.url(tls=request.param == "tls", unix=request.param == "unix")


@pytest.fixture
def connected(postgres: EmbeddedPostgres) -> Iterator[int]:
    """The descriptor of this process's connection to the server: a socket that nothing uses."""
    with socket.create_connection(("127.0.0.1", postgres.port)) as client:
        yield client.fileno()


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def only(scan: Scan, fd: int) -> SharedSocket:
    """The one finding, which must be the socket of this descriptor."""
    assert [each.inode for each in scan.sockets] == [inode(fd)]
    return scan.sockets[0]


def pids(found: SharedSocket) -> list[int]:
    return [holder.pid for holder in found.holders]


# -- what is found


@pytest.mark.usefixtures("clean_log")
def test_a_forked_child_shares_its_parents_connection(
    any_url: str, postgres: EmbeddedPostgres, make_engine: MakeEngine, family: Family
) -> None:
    engine = make_engine(any_url, poolclass=QueuePool)
    with engine.connect() as connection:
        ours = server_pid(connection)
        fd = connection.connection.dbapi_connection.fileno()
        child = family.fork()
        family.settled(1)
        unix = "host=" in any_url
        before = None if unix else bytes_on_the_wire(fd)
        started = time.time()
        found = only(find([os.getpid()]), fd)
        assert pids(found) == [os.getpid(), child]
        assert [holder.fds for holder in found.holders] == [(fd,), (fd,)]
        assert (found.owner.pid, found.owner.certain, found.owner.holds) == (os.getpid(), True, True)
        assert [holder.pid for holder in found.inheritors] == [child]
        assert (found.server, found.port) == ("PostgreSQL", postgres.port)
        if unix:
            path = str(postgres.directory / "socket" / f".s.PGSQL.{postgres.port}")
            assert (found.family, found.address) == ("unix", path)
        else:
            assert (found.family, found.address) == ("ipv4", "127.0.0.1")
        # Since the child's birth, to a tick of the kernel's clock and the second of the boot's.
        assert started - 10 < found.shared_since == found.holders[1].started_at < started + 2
        assert before is None or bytes_on_the_wire(fd) == before
        assert server_pid(connection) == ours


@pytest.mark.usefixtures("clean_log")
def test_what_pidpool_has_severed_is_not_found(any_url: str, make_engine: MakeEngine, family: Family) -> None:
    engine = make_engine(any_url)
    with engine.connect() as connection:
        ours, tag = server_pid(connection), tag_of(connection)
        assert tag is not None and tag.fd is not None
        family.fork()
        family.settled(1)
        assert find([os.getpid()]).sockets == ()
        # A copy of the descriptor, which pidpool does not know of, is found.
        copy = os.dup(tag.fd)
        child = family.fork()
        family.settled(1)
        found = only(find([os.getpid()]), tag.fd)
        assert [(holder.pid, holder.fds) for holder in found.inheritors] == [(child, (copy,))]
        os.close(copy)
        assert server_pid(connection) == ours


def test_only_the_given_processes_and_their_descendants_count(connected: int, family: Family) -> None:
    child = family.fork()
    family.settled(1)
    # Whichever holder is named, all of them are reported.
    assert pids(only(find([child]), connected)) == [os.getpid(), child]
    assert pids(only(find([os.getpid()]), connected)) == [os.getpid(), child]
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as bystander:
        assert find([bystander.pid]).sockets == ()
        assert pids(only(find([bystander.pid, child]), connected)) == [os.getpid(), child]
    with pytest.raises(sockets.NoSuchProcess):
        find([bystander.pid])


def test_a_port_that_the_caller_names_over_ipv6(family: Family) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("::1", port)) as client:
            accepted, _ = listener.accept()
            family.fork()
            family.settled(1)
            assert find([os.getpid()]).sockets == ()
            # The child holds the accepted end as well: that one leads to no database.
            found = only(find([os.getpid()], [port]), client.fileno())
            assert (found.server, found.family, found.address, found.port) == (
                "database",
                "ipv6",
                "::1",
                port,
            )
            assert ps.where(found) == f"[::1]:{port}"
            accepted.close()


def test_an_ipv4_address_wrapped_into_ipv6(postgres: EmbeddedPostgres, family: Family) -> None:
    with socket.socket(socket.AF_INET6) as client:
        client.connect(("::ffff:127.0.0.1", postgres.port))
        family.fork()
        family.settled(1)
        found = only(find([os.getpid()]), client.fileno())
        assert (found.server, found.family, found.address) == ("PostgreSQL", "ipv4", "127.0.0.1")


def test_a_database_servers_own_processes_are_no_leak(connected: int, family: Family) -> None:
    family.fork(lambda: prctl(PR_SET_NAME, b"pgbouncer"))
    family.settled(1)
    assert find([os.getpid()]).sockets == ()


def test_a_database_server_that_is_somebodys_client_is_no_database_there(family: Family) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        members = []

        def connect_as_server() -> None:
            prctl(PR_SET_NAME, b"postgres")
            members.append(socket.create_connection(address))

        family.fork(connect_as_server)
        family.settled(1)
        accepted, _ = listener.accept()
        with accepted:
            family.fork()
            family.settled(1)
            assert find([os.getpid()]).sockets == ()


def test_a_server_that_may_not_be_looked_into_is_known_by_where_it_listens(
    any_url: str, make_engine: MakeEngine, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(any_url, poolclass=QueuePool)
    with engine.connect() as connection:
        ours, fd = server_pid(connection), connection.connection.dbapi_connection.fileno()
        family.fork()
        family.settled(1)
        monkeypatch.setattr(servers.Network, "_held_by_server", lambda network, inode: None)
        assert only(find([os.getpid()]), fd).server == "PostgreSQL"
        assert server_pid(connection) == ours


def test_without_the_kernels_diagnostics_tcp_is_still_found(
    connected: int, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError(2, "no unix_diag")

    monkeypatch.setattr(socket_tables, "dump_unix", refuse)
    family.fork()
    family.settled(1)
    scan = find([os.getpid()])
    only(scan, connected)
    assert "unix sockets could not be looked at" in scan.notes[0]


# -- whose it is


def test_an_owner_that_ended_is_not_made_up(postgres: EmbeddedPostgres, family: Family) -> None:
    members = []

    def open_fork_and_end() -> None:
        members.append(socket.create_connection(("127.0.0.1", postgres.port)))
        family.fork()
        family.settled(1)
        family.fork()
        os._exit(0)

    owner = family.fork(open_fork_and_end)
    family.wait(owner)
    (younger,) = family.settled(1)
    found = find([younger]).sockets[0]
    assert owner not in pids(found) and pids(found)[1] == younger
    assert (found.owner.pid, found.owner.certain) == (pids(found)[0], False)


def test_an_owner_that_let_go_is_known_by_the_processes_it_forked(
    postgres: EmbeddedPostgres, family: Family
) -> None:
    def open_fork_and_close() -> None:
        client = socket.create_connection(("127.0.0.1", postgres.port))
        family.fork()
        family.fork()
        client.close()

    owner = family.fork(open_fork_and_close)
    children = family.settled(3) - {owner}
    found = find([owner]).sockets[0]
    assert set(pids(found)) == children
    assert (found.owner.pid, found.owner.certain, found.owner.holds) == (owner, False, False)


def test_an_owner_that_was_forked_itself_is_probable(postgres: EmbeddedPostgres, family: Family) -> None:
    members = []

    def open_and_fork() -> None:
        members.append(socket.create_connection(("127.0.0.1", postgres.port)))
        family.fork(family.fork)

    owner = family.fork(open_and_fork)
    everyone = family.settled(3)
    found = find([owner]).sockets[0]
    assert set(pids(found)) == everyone
    assert (found.owner.pid, found.owner.certain, found.owner.holds) == (owner, False, True)


def test_a_socket_passed_on_to_another_program(connected: int) -> None:
    dsn = "postgresql://u:hidden1@h/d"
    code = "print(flush=True); input()"
    arguments = [sys.executable, "-c", code, dsn, "password=hidden2", "--password", "hidden3"]
    child = subprocess.Popen(arguments, pass_fds=[connected], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        found = only(find([child.pid]), connected)
        child.communicate(b"\n", timeout=SECONDS)
    # Both have run a program of their own, so either may have opened it: the likelier is the parent.
    assert (found.owner.pid, found.owner.certain) == (os.getpid(), False)
    command = found.inheritors[0].command
    assert "postgresql://u:***@h/d password=*** --password ***" in command
    assert "hidden" not in command


# -- while it is looked at


def test_a_process_that_lets_go_meanwhile_is_no_finding(
    connected: int, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = family.fork()
    family.settled(1)
    only(find([os.getpid()]), connected)

    def end_the_child(seconds: float) -> None:
        assert seconds == sockets.SETTLE
        family.kill(child)

    monkeypatch.setattr(sockets.time, "sleep", end_the_child)
    assert find([os.getpid()]).sockets == ()


def test_a_process_that_ends_before_it_is_looked_into(
    connected: int, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, other = family.fork(), family.fork()
    family.settled(2)
    read_tree = sockets.read_tree

    def read_tree_and_end_the_child() -> Any:
        tree = read_tree()
        family.kill(child)
        return tree

    monkeypatch.setattr(sockets, "read_tree", read_tree_and_end_the_child)
    assert pids(only(find([os.getpid()]), connected)) == [os.getpid(), other]


# -- as an ordinary user


def become_nobody() -> None:
    """As root, go on as a user with no rights; a process that may be looked into all the same."""
    if ROOT:
        nobody = pwd.getpwnam("nobody")
        os.setgroups([])
        os.setresgid(*[nobody.pw_gid] * 3)
        os.setresuid(*[nobody.pw_uid] * 3)
        prctl(PR_SET_DUMPABLE, 1)


def test_an_ordinary_user_is_told_what_could_not_be_looked_into(
    postgres: EmbeddedPostgres, family: Family
) -> None:
    members = []

    def open_and_fork() -> None:
        members.append(socket.create_connection(("127.0.0.1", postgres.port)))
        family.fork(become_nobody)
        family.fork(become_nobody)
        prctl(PR_SET_DUMPABLE, 0)  # also its own user may not look into it

    def look() -> Scan:
        become_nobody()
        return find([owner])

    def look_at_all() -> Scan:
        become_nobody()
        return find()

    owner = family.fork(open_and_fork)
    family.settled(3)
    scan = run_in_child(look)
    # As another user's neither can the one be from which the owner was forked.
    unreadable = {process.pid for process in scan.unreadable}
    assert unreadable == ({owner, os.getpid()} if ROOT else {owner})
    found = scan.sockets[0]
    assert len(found.holders) == 2 and owner not in pids(found)
    # The server's own processes can't be looked into either; its port is known all the same.
    assert (found.server, found.port) == ("PostgreSQL", postgres.port)
    assert (found.owner.pid, found.owner.certain, found.owner.holds) == (owner, False, None)
    unreadable = {process.pid for process in run_in_child(look_at_all).unreadable}
    assert owner in unreadable and postgres.pid not in unreadable
    # A child of the given one is reason enough to say that its parent could not be looked into.
    child = found.holders[0].pid
    scan = run_in_child(lambda: (become_nobody(), find([child]))[1])
    assert owner in [process.pid for process in scan.unreadable]


# -- the command


@contextlib.contextmanager
def gunicorn(url: str, pool: str, directory: Path) -> Iterator[tuple[int, list[int]]]:
    """Run the application under ``gunicorn --preload`` with two workers; give its pid and theirs."""
    options = ["--preload", "--workers=2", "--bind=127.0.0.1:0", f"--chdir={PROGRAMS}"]
    program = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", *options, "web_application:application"],
        # Newer ones put a socket of their own into the home directory.
        env={**os.environ, "DATABASE_URL": url, "POOL": pool, **dict.fromkeys(HOMES, str(directory))},
        stderr=subprocess.PIPE,
        text=True,
    )
    workers: list[int] = []
    log: list[str] = []
    try:
        assert program.stderr is not None
        alarm = threading.Timer(SECONDS, program.kill)
        alarm.start()
        for line in program.stderr:
            log.append(line)
            if "Booting worker with pid" in line:
                workers.append(int(line.split()[-1]))
            if len(workers) == 2:
                break
        alarm.cancel()
        assert len(workers) == 2, "".join(log)
        yield program.pid, workers
    finally:
        if pool == "PidPool":
            program.terminate()
        else:
            # Otherwise each worker would send its farewell on the connection that they share.
            for pid in (program.pid, *workers):
                os.kill(pid, signal.SIGKILL)
        program.communicate(timeout=SECONDS)


def run(*arguments: object, columns: int = 80) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "COLUMNS": str(columns), "PYTHONIOENCODING": "utf-8"},
    )


@pytest.mark.parametrize("unix", [False, True], ids=["tls", "unix"])
def test_the_questions_application_under_gunicorn(
    postgres: EmbeddedPostgres, unix: bool, tmp_path: Path
) -> None:
    url = postgres.url(unix=unix, application_name="shared by workers")
    with gunicorn(url, "QueuePool", tmp_path) as (master, workers):
        looked = run("--json", master)
        (found,) = json.loads(looked.stdout)["sockets"]
        assert found["owner"]["pid"] == master
        assert found["owner"]["certain"] and found["owner"]["holds"]
        assert [holder["pid"] for holder in found["holders"]] == [master, *sorted(workers)]
        for holder in found["holders"]:
            (fd,) = holder["fds"]
            assert os.readlink(f"/proc/{holder['pid']}/fd/{fd}") == f"socket:[{found['inode']}]"
            assert "gunicorn" in holder["command"]
        assert found["port"] == postgres.port
        shown = run("--check", master)
        assert shown.returncode == ps.FOUND
        assert max(map(len, shown.stdout.splitlines())) <= 80
        words = " ".join(shown.stdout.split())
        assert "1 database socket is held by more than one process" in words
        assert f"{master} opened it fd" in words
        for worker in workers:
            assert f"{worker} inherited it fd" in words
        first, second = sorted(workers)
        assert f"Anything that pids {first} and {second} may send" in words
        assert f"the server session of pid {master} and can end its transactions" in words
        assert ("over TLS" in words) is not unix
        assert "poolclass=PidPool" in words
        assert run(master).returncode == 0
    # The server's sessions end with their clients, and complain of it; before the next test looks.
    engine = create_engine(postgres.url(superuser=True), poolclass=NullPool)
    sessions = text("select count(*) from pg_stat_activity where application_name = 'shared by workers'")

    def gone() -> bool:
        with engine.connect() as connection:
            return bool(connection.scalar(sessions) == 0)

    until(gone, "the sessions of the server's clients don't end", interval=0.05)


@pytest.mark.usefixtures("clean_log")
@pytest.mark.parametrize("unix", [False, True], ids=["tls", "unix"])
def test_the_same_application_with_pidpool(postgres: EmbeddedPostgres, unix: bool, tmp_path: Path) -> None:
    with gunicorn(postgres.url(unix=unix), "PidPool", tmp_path) as (master, _):
        shown = run("--check", master)
        assert shown.returncode == 0
        assert "No database socket is held by more than one process" in " ".join(shown.stdout.split())


def test_the_json_has_the_documented_fields(connected: int, family: Family) -> None:
    family.fork()
    family.settled(1)
    result = CliRunner().invoke(ps.command, ["--json", str(os.getpid())])
    assert result.exit_code == 0
    scan = json.loads(result.stdout)
    process = {"pid", "parent_pid", "name", "command", "user", "started_at"}
    assert set(scan) == {"taken_at", "looked_into", "sockets", "unreadable", "notes"}
    (found,) = scan["sockets"]
    fields = {"inode", "server", "family", "address", "port", "shared_since", "owner", "holders"}
    assert set(found) == fields
    assert set(found["owner"]) == process | {"certain", "holds"}
    assert {*found["holders"][0]} == {*found["holders"][1]} == process | {"fds"}
    assert abs(scan["taken_at"] - time.time()) < 60
    assert scan["looked_into"] >= 2


def test_what_could_not_be_looked_into_is_shown_by_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def one(pid: int, user: str) -> Process:
        return Process(pid, 1, "worker", "worker", user, 0.0)

    unreadable = (*(one(pid, "www") for pid in range(11, 18)), one(40, "cron"))
    scan = Scan(time.time(), 2, (), unreadable, ("nothing else was seen",))
    monkeypatch.setattr(sockets, "find", lambda pids, ports: scan)
    result = CliRunner().invoke(ps.command, ["--check"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert (
        "Could not look into 8 processes: 1 of cron (40); 7 of www (11, 12, 13, 14, 15, …)" in result.output
    )
    assert "Note: nothing else was seen." in result.output
    # A process that was asked for may hold a socket unseen: --check must not pass.
    assert CliRunner().invoke(ps.command, ["--check", "40"]).exit_code == 2
    assert CliRunner().invoke(ps.command, ["40"]).exit_code == 0


def test_nothing_that_is_shown_steers_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    process: dict[str, Any] = {"parent_pid": 1, "name": "n", "user": "u\x1b[2J", "started_at": 0.0}
    owner = sockets.Owner(pid=11, command="one\x1b[2J\r\ntwo", certain=True, holds=False, **process)
    holders = [sockets.Holder(pid=pid, command="/bin/\x07three", fds=(3,), **process) for pid in (12, 13)]
    found = SharedSocket(5, "MySQL", "unix", "/run/\x9bmysqld.sock", None, owner, tuple(holders), 1e9)
    scan = Scan(time.time(), 2, (found,), (Process(pid=14, command="four", **process),), ())
    monkeypatch.setattr(sockets, "find", lambda pids, ports: scan)
    result = CliRunner().invoke(ps.command, env={"COLUMNS": "200"})
    assert "MySQL at /run/?mysqld.sock, shared since 2001-09-0" in result.output
    assert "  11  opened it, let it go        one?[2J??two" in result.output
    assert "  12  inherited it          fd 3  ?three" in result.output
    assert "1 of u?[2J (14)" in result.output
    assert result.output.replace("\n", "").isprintable()


def test_usage_errors_and_other_systems_end_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    for arguments, said in [
        (["--check", "--watch"], "--check scans once"),
        (["--port", "0"], "--port"),
        (["soon"], "soon"),
        ([str(ended.pid)], f"there is no process {ended.pid}"),
    ]:
        result = CliRunner().invoke(ps.command, arguments)
        assert (result.exit_code, said in result.output) == (2, True), result.output
    exists = os.path.exists
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "exists", lambda path: not str(path).startswith("/proc") and exists(path))
        result = CliRunner().invoke(ps.command, [])
    assert result.exit_code == 2
    assert "mount it" in result.output
    monkeypatch.setattr(sys, "platform", "darwin")
    result = CliRunner().invoke(ps.command, [])
    assert result.exit_code == 2
    assert "needs the /proc of Linux; this is darwin" in result.output


def test_watch_shows_what_comes_and_goes(connected: int, family: Family) -> None:
    with Terminal([*COMMAND, "--watch", "--interval", "0.1", str(os.getpid())], columns=80) as terminal:
        terminal.reads("No database socket is held by more than one process")
        child = family.fork()
        family.settled(1)
        terminal.reads(f"{child}  inherited it")
        family.kill(child)
        terminal.reads("No database socket is held by more than one process")
        assert terminal.interrupt() == 0


def test_watch_without_a_terminal_is_a_line_of_json_for_each_look(connected: int, family: Family) -> None:
    arguments = [*COMMAND, "--watch", "--json", "--interval", "0.1", str(os.getpid())]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert json.loads(program.stdout.readline())["sockets"] == []
        child = family.fork()
        family.settled(1)
        for line in program.stdout:
            found = json.loads(line)["sockets"]
            if found:
                break
        assert [holder["pid"] for holder in found[0]["holders"]] == [os.getpid(), child]
        program.send_signal(signal.SIGINT)
        program.communicate(timeout=SECONDS)
    assert program.returncode == 0
