"""Every host that forks, or starts, workers: the real program with connections opened before the fork, one of
them in a transaction. All rows that were reported are there, and the server's log is clean."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from forking import HOWS
from hosting import BIN, LOG_PREFIX, PROGRAMS, Host, Outcome, Run
from serving import celery, dramatiq, program, rq, web
from soak import SOAK

from pidpool.tools.demo.postgres import EmbeddedPostgres


def gunicorn(
    worker: str, *options: str, application: str = "wsgi:application", **environment: str
) -> Callable[[Run], None]:
    return web(
        *(
            sys.executable,
            "-m",
            "gunicorn",
            f"--worker-class={worker}",
            "--workers=2",
            "--bind=unix:{socket}",
        ),
        *("--no-control-socket", *options, application),
        **environment,
    )


def uwsgi(*options: str) -> Callable[[Run], None]:
    return web(
        *(str(BIN / "uwsgi"), "--processes=2", "--http-socket={socket}", "--module=wsgi:application"),
        *("--need-app", f"--virtualenv={BIN.parent}", *options),
    )


# By itself uWSGI ends a worker at once, and without exit handlers if it is in a request, as it may be after
# its answer has arrived. Its connections would be broken off. So it ends its request first.
GRACEFULLY = "--hook-master-start=unix_signal:15 gracefully_kill_them_all"


def uwsgi_master(*options: str) -> Callable[[Run], None]:
    # The master runs no exit handlers of Python's.
    commit = "--hook-as-user-atexit=call:PyRun_SimpleString import shop; shop.end()"
    return uwsgi("--master", GRACEFULLY, "--hook-as-user-atexit=call:PyGILState_Ensure", commit, *options)


def uvicorn(*options: str) -> Callable[[Run], None]:
    return web(sys.executable, "-m", "uvicorn", "--workers=2", "--uds={socket}", "asgi:application", *options)


def hypercorn(*options: str) -> Callable[[Run], None]:
    return web(
        sys.executable, "-m", "hypercorn", "--workers=2", "--bind=unix:{socket}", "asgi:application", *options
    )


def granian(interface: str) -> Callable[[Run], None]:
    return web(
        *(sys.executable, "-m", "granian", "--workers=2", "--uds={socket}"),
        *(f"--interface={interface}", f"{interface}:application"),
    )


DISPOSES = f"--config={PROGRAMS / 'gunicorn_that_disposes.py'}"

HOSTS = [
    Host("gunicorn sync", gunicorn("sync"), inherits=False),
    Host("gunicorn sync, preload", gunicorn("sync", "--preload")),
    Host("gunicorn sync, preload, max_requests", gunicorn("sync", "--preload", "--max-requests=4")),
    Host("gunicorn sync, preload, dispose", gunicorn("sync", "--preload", DISPOSES, CLOSE="yes")),
    Host("gunicorn sync, preload, dispose(close=False)", gunicorn("sync", "--preload", DISPOSES, CLOSE="no")),
    Host("gunicorn gthread", gunicorn("gthread", "--threads=3"), inherits=False),
    Host("gunicorn gthread, preload", gunicorn("gthread", "--threads=3", "--preload")),
    Host("gunicorn gevent", gunicorn("gevent"), inherits=False),
    Host("gunicorn gevent, preload", gunicorn("gevent", "--preload")),
    Host("uWSGI", uwsgi(), ends_by=signal.SIGHUP),
    Host("uWSGI, master", uwsgi_master()),
    Host("uWSGI, master, threads", uwsgi_master("--enable-threads", "--threads=3")),
    # PyOS_BeforeFork before fork(2), PyOS_AfterFork_Parent and PyOS_AfterFork_Child after it.
    Host("uWSGI, master, at-fork hooks", uwsgi_master("--enable-threads", "--py-call-uwsgi-fork-hooks")),
    Host(
        "uWSGI, master, max-requests",
        uwsgi_master("--max-requests=4", "--min-worker-lifetime=0"),
        starts_anew=True,
        workers_end_by=signal.SIGHUP,
    ),
    Host("uWSGI, lazy-apps", uwsgi("--master", GRACEFULLY, "--lazy-apps"), inherits=False),
    Host("uWSGI, gevent", uwsgi_master("--gevent=10", "--gevent-monkey-patch"), says_goodbye=False),
    Host(
        "gunicorn uvicorn-worker, preload",
        gunicorn("uvicorn_worker.UvicornWorker", "--preload", application="asgi:application"),
    ),
    Host("uvicorn", uvicorn(), inherits=False),
    Host("hypercorn", hypercorn(), inherits=False),
    Host("granian asgi", granian("asgi"), inherits=False),
    Host("granian wsgi", granian("wsgi"), inherits=False),
    Host("Celery prefork", celery("--pool=prefork"), workers=1),  # it may give all tasks to one worker
    Host(
        "Celery prefork, max-tasks-per-child",
        celery("--pool=prefork", "--max-tasks-per-child=3"),
        workers=4,
        starts_anew=True,
    ),
    Host("RQ", rq, workers=12, system=True),
    Host("dramatiq", dramatiq, inherits=False, workers=1, system=True),
    Host("multiprocessing.Pool, fork", program("pool, fork"), workers=3),
    Host("multiprocessing.Pool, forkserver", program("pool, forkserver"), workers=3, inherits=False),
    Host(
        "multiprocessing.Pool, forkserver that preloads", program("pool, forkserver that preloads"), workers=3
    ),
    Host("multiprocessing.Pool, spawn", program("pool, spawn"), workers=3, inherits=False),
    Host("multiprocessing.Process from threads", program("processes from threads"), workers=12),
    Host("ProcessPoolExecutor, fork", program("executor, fork"), workers=1),
    Host("ProcessPoolExecutor, forkserver", program("executor, forkserver"), workers=1, inherits=False),
    Host("ProcessPoolExecutor, spawn", program("executor, spawn"), workers=1, inherits=False),
    Host("joblib, multiprocessing", program("joblib, multiprocessing"), workers=1),
    Host("joblib, loky", program("joblib, loky"), workers=1, inherits=False),
    Host("subprocess with preexec_fn", program("preexec_fn"), workers=12),
    Host("daemons", program("daemons"), workers=6, tasks=6),
]

if "c with child hooks" in HOWS:
    HOSTS.append(Host("uWSGI, hooks of the child", uwsgi_master("--enable-threads", "--py-call-osafterfork")))


class Runs:
    """All runs that the chosen tests need: some at a time, since most of a run is waiting."""

    def __init__(self, wanted: list[tuple[Host, str]], directory: Path) -> None:
        self.postgres = EmbeddedPostgres(settings={"log_line_prefix": LOG_PREFIX})
        self.postgres.start()
        self.executor = ThreadPoolExecutor((os.cpu_count() or 1) + 1)
        self.futures: dict[tuple[Host, str], Future[Outcome]] = {}
        for number, (host, pool) in enumerate(dict.fromkeys(wanted)):
            place = directory / str(number)
            place.mkdir()
            self.futures[host, pool] = self.executor.submit(self.run, host, pool, f"run{number}", place)

    def run(self, host: Host, pool: str, name: str, directory: Path) -> Outcome:
        run = Run(host, pool, name, self.postgres, directory, host.tasks * (20 if SOAK else 1))
        try:
            host.serve(run)
        finally:
            outcome = run.outcome()
        return outcome

    def end(self) -> None:
        self.executor.shutdown(cancel_futures=True)
        self.postgres.stop()


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    chosen = [item for item in request.session.items if item.path == request.path]
    wanted = [(item.callspec.params["host"], item.callspec.params["pool"]) for item in chosen]  # type: ignore[attr-defined]
    runs = Runs(wanted, tmp_path_factory.mktemp("hosts"))
    try:
        yield runs
    finally:
        runs.end()


def each(hosts: list[Host]) -> pytest.MarkDecorator:
    marks = {False: (), True: pytest.mark.system}
    return pytest.mark.parametrize(
        "host", [pytest.param(host, id=host.name, marks=marks[host.system]) for host in hosts]
    )


@pytest.fixture
def outcome(runs: Runs, host: Host, pool: str, record_property: Callable[[str, object], None]) -> Outcome:
    outcome = runs.futures[host, pool].result()
    record_property("host", outcome.row(host.name, pool))
    return outcome


@pytest.mark.soak
@pytest.mark.parametrize("pool", ["pidpool"])
@each(HOSTS)
def test_all_rows_are_there(outcome: Outcome) -> None:
    assert outcome.problems == []


@pytest.mark.soak
@pytest.mark.parametrize("pool", ["queue"])
@each([host for host in HOSTS if host.inherits])
def test_queuepool_loses_rows(outcome: Outcome) -> None:
    assert outcome.found < outcome.expected or outcome.complaints
