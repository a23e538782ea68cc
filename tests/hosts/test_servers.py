"""Real servers that fork workers from a parent with a transaction open: gunicorn, uWSGI, Celery,
multiprocessing, and gevent. The workers use the pool, and the connection that the parent holds."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import multiprocessing.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engines import MakeEngine
from forking import HOWS
from parent import Parent, server_pid
from sqlalchemy import Engine, create_engine, text
from waiting import until

from pidpool.tools.demo.postgres import EmbeddedPostgres

PROGRAMS = Path(__file__).parent.parent / "programs"
BIN = Path(sys.executable).parent
START = 40.0


@contextmanager
def server(arguments: list[str], directory: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the body is over; what it wrote is in `directory`/log."""
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            arguments,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": str(PROGRAMS),
                "PYTHONDONTWRITEBYTECODE": "1",
                **environment,
            },
        )
        try:
            yield process
        except BaseException as error:
            log.flush()
            raise AssertionError(f"{error!r}; the server said:\n{(directory / 'log').read_text()}") from error
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its own group, since start_new_session
                process.wait()


class OverUnixSocket(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def get(path: Path, page: str) -> dict[str, Any]:
    connection = OverUnixSocket(path)
    try:
        connection.request("GET", page)
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        return dict(json.loads(body))
    finally:
        connection.close()


def wait_until_it_answers(process: subprocess.Popen[bytes], path: Path) -> None:
    def answers() -> bool:
        try:
            get(path, "/pool")
        except OSError:
            assert process.poll() is None
            return False
        return True

    until(answers, "the server does not answer", START)


class HeldSession:
    """The server's view of the session that a server's parent holds."""

    def __init__(self, engine: Engine, number: int) -> None:
        self.engine = engine
        self.number = number
        self.seen = self.look()
        assert self.seen is not None and self.seen[0] == "idle in transaction"

    def look(self) -> Any:
        with self.engine.connect() as connection:
            return connection.execute(
                text(
                    "select state, backend_start, xact_start, query_start, query, backend_xid "
                    "from pg_stat_activity where pid = :number"
                ),
                {"number": self.number},
            ).one_or_none()

    def has_heard_nothing(self) -> None:
        assert self.look() == self.seen


@pytest.fixture
def observer(postgres: EmbeddedPostgres) -> Iterator[Engine]:
    engine = create_engine(postgres.url(tls=False))
    yield engine
    engine.dispose()


def rows(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(text("select v from kept")))


def serve_and_check(
    ask: Callable[[str], dict[str, Any]],
    observer: Engine,
    postgres: EmbeddedPostgres,
    mark: int,
    workers: int = 2,
) -> None:
    """Have the workers use the pool and the parent's connection, until all have used both."""
    first = ask("pool")
    session = HeldSession(observer, first["held_server_pid"])
    used_held: set[int] = set()
    numbers: dict[int, set[int]] = {}

    def all_have_used_it() -> bool:
        answer = ask("held")
        assert answer["pid"] != answer["owner"]
        expected = "nothing" if answer["pid"] in used_held else f"{answer['owner']} {answer['pid']}"
        assert answer["befell"] == expected
        used_held.add(answer["pid"])
        for each in (answer, ask("pool")):
            assert each["server_pid"] != session.number
            numbers.setdefault(each["pid"], set()).add(each["server_pid"])
        return len(used_held) >= workers

    until(all_have_used_it, f"fewer than {workers} workers have answered", START)
    assert len(set.union(*numbers.values())) == sum(map(len, numbers.values()))  # nothing shared
    session.has_heard_nothing()
    assert rows(observer) == []
    assert postgres.complaints(mark) == []


@pytest.mark.usefixtures("table")
def test_gunicorn_preloaded(postgres: EmbeddedPostgres, observer: Engine, tmp_path: Path) -> None:
    path = tmp_path / "gunicorn"
    mark = postgres.log_mark()
    arguments = [
        *(sys.executable, "-m", "gunicorn", "--preload", "--workers=2", f"--bind=unix:{path}"),
        *("--no-control-socket", "wsgi:application"),
    ]
    if "--no-control-socket" not in gunicorn_help():
        arguments.remove("--no-control-socket")
    with server(arguments, tmp_path, DB_URL=postgres.url(tls=True)) as process:
        wait_until_it_answers(process, path)
        serve_and_check(lambda page: get(path, f"/{page}"), observer, postgres, mark)
    assert process.returncode == 0
    assert rows(observer) == ["parent"]  # it committed when it ended


def gunicorn_help() -> str:
    return subprocess.run(
        [sys.executable, "-m", "gunicorn", "--help"], capture_output=True, text=True, timeout=30
    ).stdout


# By default uWSGI calls fork(2) and nothing of Python's (core/utils.c, `uwsgi_fork`).
UWSGI_OPTIONS = {
    "no hooks": [],
    "threads": ["--enable-threads"],
    # PyOS_BeforeFork, PyOS_AfterFork_Parent and PyOS_AfterFork_Child around it, if there are threads.
    "hooks": ["--enable-threads", "--py-call-uwsgi-fork-hooks"],
}
if "c with child hooks" in HOWS:
    UWSGI_OPTIONS["child hooks"] = ["--enable-threads", "--py-call-osafterfork"]  # PyOS_AfterFork_Child alone


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("options", UWSGI_OPTIONS)
def test_uwsgi_which_forks_in_c(
    postgres: EmbeddedPostgres, observer: Engine, tmp_path: Path, options: str
) -> None:
    path = tmp_path / "uwsgi"
    mark = postgres.log_mark()
    arguments = [
        *(str(BIN / "uwsgi"), "--master", "--processes=2", f"--http-socket={path}"),
        *("--module=wsgi:application", "--need-app", "--die-on-term", f"--virtualenv={BIN.parent}"),
        *UWSGI_OPTIONS[options],
    ]
    with server(arguments, tmp_path, DB_URL=postgres.url(tls=True)) as process:
        wait_until_it_answers(process, path)
        serve_and_check(lambda page: get(path, f"/{page}"), observer, postgres, mark)


@pytest.mark.usefixtures("table")
def test_celery_prefork(
    postgres: EmbeddedPostgres, observer: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELERY_FILES", str(tmp_path))
    monkeypatch.syspath_prepend(PROGRAMS)
    import tasks

    mark = postgres.log_mark()
    names = {"pool": "use_the_pool", "held": "use_what_is_held"}

    def ask(page: str) -> dict[str, Any]:
        result = tasks.run.delay(names[page])
        until(result.ready, "the worker does not answer", START, interval=0.02)
        return dict(result.get())

    arguments = [
        *(sys.executable, "-m", "celery", "--app=tasks", "worker", "--pool=prefork", "--concurrency=2"),
        *("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=WARNING"),
    ]
    environment = {"DB_URL": postgres.url(tls=True), "CELERY_FILES": str(tmp_path), "CELERY_HOLDS": "1"}
    with server(arguments, tmp_path, **environment):
        # Celery may give all tasks to one worker.
        serve_and_check(ask, observer, postgres, mark, workers=1)
    assert rows(observer) == ["parent"]


_engine: Engine


def _end_well() -> None:
    # These workers end by os._exit(), after the finalizers that are registered here.
    multiprocessing.util.Finalize(None, _engine.dispose, exitpriority=10)


def _work(number: int) -> tuple[int, int]:
    with _engine.connect() as connection:
        return os.getpid(), server_pid(connection)


@pytest.mark.usefixtures("table", "clean_log")
@pytest.mark.parametrize("kind", ["Pool", "ProcessPoolExecutor"])
def test_the_standard_librarys_workers(tls_url: str, make_engine: MakeEngine, kind: str) -> None:
    global _engine
    _engine = make_engine(tls_url)
    parent = Parent(_engine, "in transaction")
    context = multiprocessing.get_context("fork")
    if kind == "Pool":
        with context.Pool(3, _end_well) as pool:
            seen = set(pool.map(_work, range(60), chunksize=1))
            pool.close()
            pool.join()
    else:
        with ProcessPoolExecutor(3, context, _end_well) as executor:
            seen = set(executor.map(_work, range(60)))
    numbers: dict[int, set[int]] = {}
    for pid, number in seen:
        assert number != parent.server_pid
        numbers.setdefault(pid, set()).add(number)
    assert all(len(each) == 1 for each in numbers.values())  # pooled
    assert len(set.union(*numbers.values())) == len(numbers)  # and shared with no other worker
    parent.notices_nothing()


@pytest.mark.usefixtures("clean_log")
def test_a_parent_of_gevents_greenlets(tls_url: str) -> None:
    ended = subprocess.run(
        [sys.executable, str(PROGRAMS / "greenlets.py"), tls_url, "10"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
