"""The line of the user's code that checked a connection out, however deep in SQLAlchemy; it is not looked
up without `hold_warning`."""

from __future__ import annotations

import _thread
import asyncio
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from engines import MakeEngine
from events import Events
from forking import HOWS, run_in_child
from sqlalchemy import Engine, event, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from waiting import until

from pidpool import AsyncPidPool
from pidpool import pool as pool_module
from pidpool.events import pool_events, user_code
from pidpool.tools.demo.postgres import EmbeddedPostgres


def here(back: int = 0) -> str:
    """Describe the line of the caller, as an event's `where`."""
    frame = sys._getframe(1)
    return f"{frame.f_code.co_filename}:{frame.f_lineno + back} in {frame.f_code.co_name}"


def place_of(fairy: Any) -> str:
    return str(fairy._connection_record.watched.code_line)


def _connect(engine: Engine) -> tuple[str, str]:
    with engine.connect() as connection:
        return here(-1), place_of(connection.connection)


def _begin(engine: Engine) -> tuple[str, str]:
    with engine.begin() as connection:
        return here(-1), place_of(connection.connection)


def _raw_connection(engine: Engine) -> tuple[str, str]:
    fairy = engine.raw_connection()
    try:
        return here(-2), place_of(fairy)
    finally:
        fairy.close()


def _session(engine: Engine) -> tuple[str, str]:
    with Session(engine) as session:
        session.execute(text("select 1"))
        return here(-1), place_of(session.connection().connection)


def _sessionmaker(engine: Engine) -> tuple[str, str]:
    with sessionmaker(engine).begin() as session:
        session.scalar(text("select 1"))
        return here(-1), place_of(session.connection().connection)


@pytest.mark.parametrize("check_out", [_connect, _begin, _raw_connection, _session, _sessionmaker])
def test_it_is_the_users_line(
    tls_url: str, make_engine: MakeEngine, check_out: Callable[[Engine], tuple[str, str]]
) -> None:
    line, place = check_out(make_engine(tls_url, hold_warning=60))
    assert place == line


def test_it_is_the_users_line_when_an_event_listener_checks_out(
    tls_url: str, make_engine: MakeEngine
) -> None:
    engine, other = make_engine(tls_url, hold_warning=60), make_engine(tls_url, hold_warning=60)
    found = []

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        with other.connect() as nested:
            found.append((here(-1), place_of(nested.connection)))

    with engine.begin():
        pass
    ((line, place),) = found
    assert place == line


def test_it_is_the_coroutines_line(postgres: EmbeddedPostgres) -> None:
    url = postgres.url(tls=False).replace("+psycopg2", "+psycopg")

    async def check_out() -> tuple[str, str]:
        engine = create_async_engine(url, poolclass=AsyncPidPool, hold_warning=60)
        try:
            async with engine.connect() as connection:
                return here(-1), place_of(await connection.get_raw_connection())
        finally:
            await engine.dispose()

    line, place = asyncio.run(check_out())
    assert place == line


def test_nothing_is_looked_up_without_hold_warning(
    tls_url: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def caller() -> None:
        raise AssertionError("looked up")

    monkeypatch.setattr(pool_module, "calling_line", caller)
    fairy = make_engine(tls_url).raw_connection()
    assert fairy._connection_record.watched is None  # type: ignore[attr-defined]
    fairy.close()


def test_a_place_keeps_no_variable_alive(tls_url: str, make_engine: MakeEngine) -> None:
    class Variable:
        pass

    def check_out() -> tuple[Any, weakref.ref[Variable]]:
        variable = Variable()
        return make_engine(tls_url, hold_warning=60).raw_connection(), weakref.ref(variable)

    fairy, variable = check_out()
    gc.collect()
    assert variable() is None
    assert place_of(fairy).endswith("in check_out")
    fairy.close()


def test_there_may_be_no_user_code() -> None:
    """As in a thread that C code or SQLAlchemy itself has started."""
    found: list[object] = []
    names = {"__name__": "sqlalchemy.somewhere", "found": found, "calling_line": user_code.calling_line}
    code = compile("found.append(calling_line())", "<in sqlalchemy>", "exec")
    _thread.start_new_thread(exec, (code, names))  # no frame of threading's or of this module's below it
    until(lambda: found, "the thread has not run")
    assert found == [None]


# -- the line that forked


def test_the_line_that_forked_is_in_the_parents_events_and_the_childs(
    tls_url: str, make_engine: MakeEngine
) -> None:
    events = Events()
    engine = make_engine(tls_url, logger=events.logger)

    def child() -> list[dict[str, Any]]:
        events.clear()
        engine.connect().close()
        return events.all

    def third() -> Any:
        return fork_by_hand(child)

    def second() -> Any:
        return third()

    with engine.connect():
        line, logged = second()
        engine.connect().close()
    lines = events.the("pool.forked")["forked_at"].split(" < ")
    assert lines[0] == line
    assert [each.rpartition(" in ")[2] for each in lines] == [
        "fork_by_hand",
        "third",
        "second",
        here().rpartition(" in ")[2],
    ]
    for name in ("pool.adopted", "connection.inherited"):
        (event_,) = [each for each in logged if each["event"] == name]
        assert event_["forked_at"].split(" < ") == lines


def fork_by_hand(child: Callable[[], Any]) -> tuple[str, Any]:
    """Fork in a line of this file; return that line and what `child` returned there."""
    reader, writer = os.pipe()
    line, pid = here(), os.fork()
    if pid == 0:
        try:
            os.write(writer, pickle.dumps(child()))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        found = pickle.load(answer)
    os.waitpid(pid, 0)
    return line, found


def test_the_standard_librarys_lines_are_passed_over(tls_url: str, make_engine: MakeEngine) -> None:
    events = Events()
    engine = make_engine(tls_url, logger=events.logger)
    with engine.connect():
        process = multiprocessing.get_context("fork").Process(target=int)
        process.start()
        line = here(-1)
        process.join(30)
        engine.connect().close()
    assert events.the("pool.forked")["forked_at"].split(" < ")[0] == line


def test_an_installed_package_that_forks_by_itself_is_named() -> None:
    """As gunicorn's master does: none of the user's lines is running."""
    found: list[Any] = []
    names = {**vars(user_code), "__name__": "gunicorn.arbiter", "found": found}
    code = compile(
        "found.append(text_of(forking_lines()))", "/venv/lib/site-packages/gunicorn/arbiter.py", "exec"
    )
    _thread.start_new_thread(exec, (code, names))
    until(lambda: found, "the thread has not run")
    assert found == ["/venv/lib/site-packages/gunicorn/arbiter.py:1 in <module>"]


def test_a_fork_without_an_open_connection_looks_nothing_up(
    tls_url: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lookup() -> None:
        raise AssertionError("looked up")

    monkeypatch.setattr(pool_events, "forking_lines", lookup)
    events = Events()
    engine = make_engine(tls_url, logger=events.logger)

    def child() -> list[Any]:
        engine.connect().close()
        return [each["forked_at"] for each in events.of("pool.adopted")]

    assert run_in_child(child) == [None]
    assert engine.pool.stats().counters.forks == 1  # type: ignore[attr-defined]


def test_a_fork_that_is_noticed_later_has_no_line(tls_url: str, make_engine: MakeEngine) -> None:
    events = Events()
    engine = make_engine(tls_url, logger=events.logger)

    def child() -> list[Any]:
        engine.connect().close()
        return [each["forked_at"] for each in events.all if "forked_at" in each]

    with engine.connect():
        assert run_in_child(child, how="c") == [None, None]
        if "c with child hooks" in HOWS:
            with_hook = run_in_child(child, how="c with child hooks")
            assert [each.split(" < ")[0].rpartition(" in ")[2] for each in with_hook] == ["fork", "fork"]


def test_a_fork_may_have_no_python_code_at_all(tls_url: str) -> None:
    """As one in C that runs Python's hooks: uWSGI's, say. The hooks find no caller."""
    program = f"""
import _thread, os, sys, time
from sqlalchemy import create_engine, text
from pidpool import PidPool

engine = create_engine({tls_url!r}, poolclass=PidPool)
engine.connect().close()
sys.unraisablehook = lambda error: os.write(2, f"in a hook: {{error.exc_value!r}}\\n".encode())
_thread.start_new_thread(os.fork, ())
deadline = time.monotonic() + 30
while not engine.pool.stats().counters.forks and time.monotonic() < deadline:
    time.sleep(0.01)
os.waitpid(-1, 0)
with engine.connect() as connection:
    print(connection.scalar(text("select 1")))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "1\n"
    assert "in a hook" not in ended.stderr
