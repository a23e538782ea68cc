"""`pidpool demo` as a user runs it: what it measures, what it says, and that nothing of it is left,
however it ends. Every run here is a real one, in a process of its own."""

from __future__ import annotations

import json
import os
import pty
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from forking import has_ended
from sqlalchemy import Table, create_engine, make_url, text
from sqlalchemy.pool import NullPool
from waiting import until

from pidpool.cli import demo
from pidpool.tools.demo import failures, measuring, verdicts
from pidpool.tools.demo.contenders import BY_KEY, CONTENDERS, PIDPOOL
from pidpool.tools.demo.postgres import EmbeddedPostgres
from pidpool.tools.demo.verdicts import FAILURES

COMMAND = [str(Path(sys.executable).with_name("pidpool")), "demo"]
SECONDS = 280.0  # how long a run may take on a busy machine; half a minute is usual
# A variable of every process that is started for a test, by which the test finds those that are left.
MARK = "PIDPOOL_TEST_RUN"


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, MARK: secrets.token_hex(8), "COLUMNS": "80"}


def left_of(environment: dict[str, str]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == environment[MARK] and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_nothing_is_left_of(environment: dict[str, str], *pids: int, seconds: float = 20.0) -> None:
    def left() -> list[psutil.Process | int]:
        return [*left_of(environment), *(pid for pid in pids if psutil.pid_exists(pid))]

    until(lambda: not left(), lambda: f"still there: {left()}", seconds, interval=0.02)


def tables(url: str) -> list[str]:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg2"), poolclass=NullPool)
    with engine.connect() as connection:
        names = text("select relname from pg_class where relname like 'pidpool_demo_%'")
        return list(connection.execute(names).scalars())


def server_pid(progress: str) -> int:
    found = re.search(r"Started PostgreSQL [\d.]+ with TLS: pid (\d+)", progress)
    assert found is not None, progress
    return int(found[1])


# -- a whole run


@pytest.fixture(scope="module")
def run() -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    environment = {**os.environ, MARK: secrets.token_hex(8)}
    done = subprocess.run(
        [*COMMAND, "--iterations", "10", "--json"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment,
    )
    return done, environment


def contenders(document: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    (found,) = [each for each in document["failures"] if each["name"] == name]
    assert list(found["contenders"]) == ["queuepool", "events", "dispose", "pidpool"]
    measured: dict[str, dict[str, Any]] = found["contenders"]
    return measured


def test_pidpool_gets_through_all_of_it(run: Any) -> None:
    done, _ = run
    document = json.loads(done.stdout)
    ours = {each["name"]: each["contenders"]["pidpool"] for each in document["failures"]}
    assert {name: measured["text"] for name, measured in ours.items() if measured["failed"]} == {}
    assert list(ours) == [failure.name for failure in FAILURES]
    assert document["complaints"]["pidpool"] == []
    assert ours["replaced_session"]["done"] == 10
    assert ours["replaced_session"]["tls"] is True
    for name in ("dropped_session", "forked_in_c"):
        assert ours[name]["commits_reported"] == ours[name]["rows_present"] == 10
    assert ours["orphaned_lock"]["seconds"] < failures.ORPHAN_SECONDS
    assert ours["forked_with_threads"]["children_hung"] == 0
    assert document["clean"] is True
    assert done.returncode == 0


def test_the_others_lose_rows_and_die(run: Any) -> None:
    document = json.loads(run[0].stdout)
    for key in ("queuepool", "events", "dispose"):
        script = contenders(document, "replaced_session")[key]
        assert script["failed"]
        assert script["done"] < 10
        assert "SSL" in script["error"]
        for name in ("dropped_session", "forked_in_c"):
            lost = contenders(document, name)[key]
            assert lost["failed"]
            assert lost["tls"] is False
            assert (lost["commits_reported"], lost["rows_present"]) == (10, 0)
        lock = contenders(document, "orphaned_lock")[key]
        assert lock["failed"]
        assert lock["until_child_ended"]
        assert lock["seconds"] >= failures.ORPHAN_SECONDS
        assert any("no transaction in progress" in line for line in document["complaints"][key])
    # Whether children hang is a matter of chance; that each harm counts as a failure is not.
    for measured in contenders(document, "forked_with_threads").values():
        assert measured["forks"] == 10
        harm = {name: measured[name] for name in ("children_hung", "children_failed", "parent_errors")}
        assert measured["failed"] == any(harm.values()), harm


def test_the_document_tells_what_was_measured_on_what(run: Any) -> None:
    document = json.loads(run[0].stdout)
    assert document["iterations"] == 10
    assert document["seconds"] > 0
    assert set(document["versions"]) == {"pidpool", "SQLAlchemy", "PostgreSQL", "Python"}
    assert document["server"]["embedded"] is True
    assert document["versions"]["PostgreSQL"] == document["server"]["version"]
    times = document["speed"]["microseconds"]
    assert set(times) == set(BY_KEY)
    assert times["nullpool"] > times["pidpool"] > 0


def test_progress_is_plain_lines_where_there_is_no_terminal(run: Any) -> None:
    lines = run[0].stderr.splitlines()
    shown = [line for line in lines if re.match(r"  \S.* (FAIL|ok) +\S", line)]
    assert len(shown) == len(FAILURES) * len(CONTENDERS)
    assert [failure.title in lines for failure in FAILURES] == [True] * len(FAILURES)
    assert all(character.isprintable() for line in lines for character in line)


def test_no_server_and_no_process_is_left(run: Any) -> None:
    done, environment = run
    assert_nothing_is_left_of(environment, server_pid(done.stderr))


# -- on a server of one's own


@pytest.fixture
def own(postgres: EmbeddedPostgres) -> str:
    """A URL as users write it, with a password. (The server asks for none.)"""
    url = make_url(postgres.url(tls=True)).set(drivername="postgresql", password="xyzzy-secret")
    return url.render_as_string(hide_password=False)


def test_on_a_server_of_ones_own_it_leaves_no_table_and_tells_no_password(
    own: str, environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [*COMMAND, "--iterations", "3", "--database", own],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "PidPool: no failure." in done.stdout
    assert "3 of 3 rows" in done.stdout
    assert "Starting" not in done.stderr
    (complaints,) = [line for line in done.stdout.splitlines() if line.startswith("Complaints in")]
    assert complaints.count("unknown") == len(CONTENDERS)
    assert "xyzzy" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(character.isascii() and character.isprintable() for line in lines for character in line)
    assert tables(own) == []
    assert_nothing_is_left_of(environment)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:xyzzy-secret@127.0.0.1:1/none", "Connection refused"),
        ("postgresql://me:xyzzy-secret@127.0.0.1:1/none", "leave it out"),
        ("postgresql://me:part@xyzzy-secret@127.0.0.1/none", "%40"),
        ("mysql://me:xyzzy-secret@127.0.0.1/none", "mysql"),
        ("me:xyzzy-secret", "postgresql://user@host/name"),
        ("postgresql://me:xyzzy-secret@host:port/none", "postgresql://user@host/name"),
    ],
)
def test_a_url_that_does_not_work_ends_it_with_the_reason_and_no_password(url: str, said: str) -> None:
    done = subprocess.run([*COMMAND, "--database", url], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2
    assert said in done.stderr
    assert "xyzzy" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# -- ended early


@pytest.fixture
def default_signals() -> Iterator[None]:
    """A process in the background may ignore these signals; a process that it starts would too."""
    before = {
        each: signal.signal(each, signal.default_int_handler) for each in (signal.SIGINT, signal.SIGHUP)
    }
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_nothing_is_left_when_it_is_interrupted(
    number: signal.Signals, status: int, environment: dict[str, str]
) -> None:
    with subprocess.Popen(
        [*COMMAND, "--iterations", "500"], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if "QueuePool + dispose" in line:  # PidPool has all its turns before it
                break
        pid = server_pid(said)
        assert psutil.pid_exists(pid)
        process.send_signal(number)
        assert process.wait(40) == status
        assert "Traceback" not in process.stderr.read()
    # Killed, it can't clean up: the children's own timers and the server's supervisor do.
    assert_nothing_is_left_of(environment, pid, seconds=20.0 if number == signal.SIGKILL else 3.0)


@pytest.mark.usefixtures("default_signals")
def test_ctrl_c_drops_the_tables_on_a_server_of_ones_own(own: str, environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [*COMMAND, "--iterations", "500", "--database", own],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "QueuePool + dispose" in line:
                break
        deadline = time.monotonic() + 20
        while not tables(own):
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        assert process.wait(40) == 130
    assert tables(own) == []
    assert_nothing_is_left_of(environment)


@pytest.mark.usefixtures("default_signals")
def test_nothing_is_left_when_its_terminal_is_closed(environment: dict[str, str]) -> None:
    environment["TERM"] = "xterm"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(COMMAND[0], [*COMMAND, "--iterations", "500"], environment)
    seen = b""
    deadline = time.monotonic() + 60
    while b"dispose  FAIL" not in seen:
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], seen
        seen += os.read(terminal, 65536)
    assert b"\x1b[" in seen  # the bar
    os.close(terminal)
    until(lambda: has_ended(pid), "it runs on without its terminal", 40)
    assert os.waitpid(pid, 0)[1] != 0
    assert_nothing_is_left_of(environment)


# -- its parts


def test_a_measurement_that_does_not_end_is_ended_with_all_its_children(
    postgres: EmbeddedPostgres, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, environment[MARK])
    request = {"failure": "forked_with_threads", "contender": "queuepool", "url": postgres.url(tls=True)}
    measured = measuring._run_worker({**request, "table": "", "iterations": 1000, "seconds": 2.0})
    assert measured["broken"] == "no result after 2 s"
    monkeypatch.delenv(MARK)
    assert_nothing_is_left_of(environment, seconds=2.0)  # sooner than the children's own timers
    verdict = FAILURES[0].verdict(measured)
    assert verdict.failed
    assert verdict.text == "no result after 2 s"


def test_ctrl_c_while_its_table_is_created_drops_the_table(
    own: str, postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Table.create

    def create_and_be_interrupted(table: Table, *arguments: Any, **options: Any) -> None:
        create(table, *arguments, **options)
        assert tables(own)
        raise KeyboardInterrupt

    monkeypatch.setattr(Table, "create", create_and_be_interrupted)
    with pytest.raises(KeyboardInterrupt):
        measuring._measure("speed", PIDPOOL, make_url(postgres.url()), iterations=1)
    assert tables(own) == []


def test_a_measurement_that_breaks_off_says_with_what(postgres: EmbeddedPostgres) -> None:
    measured = measuring._measure("no such failure", PIDPOOL, make_url(postgres.url()), iterations=1)
    assert measured["broken"] == "ends with status 1"
    assert "KeyError: 'no such failure'" in measured["stderr"]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("replaced_session", {"done": 1, "error": "SSL error"}, "dies in turn 2 of 4"),
        ("dropped_session", {"rows_present": 3}, "1 of 4 rows lost"),
        ("dropped_session", {"commits_reported": 3, "rows_present": 3}, "1 of 4 commits raise"),
        ("forked_in_c", {"children_failed": 1}, "1 of 4 children fail"),
        ("orphaned_lock", {"until_child_ended": True}, "held 0.0 s, until child ends"),
        ("forked_with_threads", {"children_hung": 2}, "2 of 4 hang"),
        (
            "forked_with_threads",
            {"children_failed": 1, "parent_errors": 3},
            "1 of 4 fail, 3 errors in the parent",
        ),
        ("orphaned_lock", {"broken": "no result after 61 s"}, "no result after 61 s"),
    ],
)
def test_any_harm_to_pidpool_makes_the_run_fail(name: str, change: dict[str, Any], said: str) -> None:
    results = unharmed()
    assert results.clean
    results.measured[name, "pidpool"] = {**results.measured[name, "pidpool"], **change}
    (failure,) = [each for each in FAILURES if each.name == name]
    assert results.verdict(failure, PIDPOOL) == verdicts.Verdict(True, said)
    assert not results.clean


def test_a_complaint_about_pidpool_makes_the_run_fail_unless_a_client_was_killed() -> None:
    results = unharmed()
    assert results.complaints is not None
    results.complaints["orphaned_lock", "pidpool"] = ["LOG:  connection to client lost"]
    assert results.clean
    results.complaints["forked_in_c", "queuepool"] = ["LOG:  invalid message format"]
    assert results.clean
    results.complaints["forked_in_c", "pidpool"] = ["LOG:  invalid message format"]
    assert not results.clean


def test_what_others_survive_is_told_and_no_failure_of_pidpools() -> None:
    results = unharmed()
    shown = {(failure.name, contender.key) for failure, contender in results.unexpected()}
    assert ("dropped_session", "events") in shown
    assert ("forked_with_threads", "queuepool") in shown
    assert ("forked_with_threads", "dispose") not in shown  # recreate() makes new locks
    assert results.clean


@pytest.mark.parametrize("json_wanted", [False, True])
def test_a_failure_of_pidpools_is_exit_status_1_and_named(
    json_wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = unharmed()
    results.measured["orphaned_lock", "pidpool"] = {"broken": "no result after 61 s", "stderr": ""}
    results.speed = {"broken": "no result after 61 s", "stderr": ""}
    monkeypatch.setattr(demo, "_measure", lambda *_: (results, {"version": "17.10", "embedded": True}))
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(demo.command, ["--json"] if json_wanted else [])
    assert done.exit_code == 1
    if json_wanted:
        document = json.loads(done.stdout)
        assert document["clean"] is False
        (lock,) = [each for each in document["failures"] if each["name"] == "orphaned_lock"]
        assert lock["contenders"]["pidpool"]["text"] == "no result after 61 s"
    else:
        assert "PidPool FAILED" in done.stdout
        assert "could not be measured: no result after 61 s" in done.stdout
        assert "QueuePool got through 'Child drops the" in " ".join(done.stdout.split())


def test_where_its_own_server_can_not_run_it_points_to_database(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SystemExit) as left, demo._embedded(demo._Progress(1)):
        pass
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "needs Linux" in said
    assert "--database" in said


def unharmed() -> measuring.Results:
    """Results of four iterations in which no contender failed."""
    commits = {"tls": False, "commits": 4, "commits_reported": 4, "rows_present": 4, "error": None}
    each: dict[str, dict[str, Any]] = {
        "replaced_session": {"tls": True, "iterations": 4, "done": 4, "error": None},
        "dropped_session": commits,
        "forked_in_c": {**commits, "children_failed": 0},
        "orphaned_lock": {"tls": True, "seconds": 0.01, "until_child_ended": False},
        "forked_with_threads": {
            "tls": True,
            "forks": 4,
            "children_hung": 0,
            "children_failed": 0,
            "hung_after_seconds": 4.0,
            "parent_errors": 0,
            "error": None,
        },
    }
    keys = [(failure.name, contender.key) for failure in FAILURES for contender in CONTENDERS]
    return measuring.Results(4, {key: each[key[0]] for key in keys}, {key: [] for key in keys})
