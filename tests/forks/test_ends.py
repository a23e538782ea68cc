"""The end of a child, and of the objects that it inherited: no connection of the parent's ends with them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from contextlib import closing
from typing import Any

import pytest
from engines import MakeEngine
from forking import How, run_in_child
from parent import bytes_on_the_wire

from pidpool import tag_of

pytestmark = pytest.mark.usefixtures("clean_log")
both_hows = pytest.mark.parametrize("how", ["python", "c"])


EXIT = """
import atexit, ctypes, logging, os, sys, weakref
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from pidpool import PidPool

logging.getLogger("pidpool").setLevel(logging.ERROR)  # it warns of what was in a transaction
url, how, use = sys.argv[1:]
engine = create_engine(url, poolclass=PidPool)
engine.connect().close()
connection, session, clean = engine.connect(), Session(engine), engine.connect()
connection.execute(text("create temp table t as select 1 as v"))
session.execute(text("create temp table t as select 2 as v"))
detached = engine.connect()
detached.detach()
detached.execute(text("create temp table t as select 3 as v"))
raw = engine.raw_connection()
cursor = raw.cursor()
cursor.execute("select 4 as v")
numbers = [c.scalar(text("select pg_backend_pid()")) for c in (connection, session, detached)]

class Late:
    pass

late = Late()
pid = os.fork() if how == "python" else ctypes.PyDLL(None).fork()
if pid == 0:
    weakref.finalize(late, print, "finalized", flush=True)
    if use == "at exit":
        atexit.register(lambda: print("used", clean.scalar(text("select 41")), flush=True))
        atexit.register(engine.dispose)
    elif use == "before":
        print("used", clean.scalar(text("select 41")), flush=True)
        clean.close()
        engine.dispose()
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert numbers == [c.scalar(text("select pg_backend_pid()")) for c in (connection, session, detached)]
assert [c.scalar(text("select v from t")) for c in (connection, session, detached)] == [1, 2, 3]
connection.commit()
session.commit()
detached.commit()
assert cursor.fetchall() == [(4,)]
detached.close()
raw.close()
connection.close()
session.close()
clean.close()
engine.dispose()
print("parent unharmed")
"""


@both_hows
@pytest.mark.parametrize("use", ["never", "before", "at exit"])
def test_a_child_that_ends_as_python_programs_end(tls_url: str, how: How, use: str) -> None:
    """With atexit, weakref.finalize and the interpreter's own clearing of modules."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXIT, tls_url, how, use],
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = ([] if use == "never" else ["used 41"]) + ["finalized", "parent unharmed"]
    assert (ended.returncode, sorted(ended.stdout.splitlines()), ended.stderr) == (0, sorted(said), "")


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("what", ["detached", "idle"])
def test_what_a_child_forked_in_c_collects_before_it_notices_is_severed(
    tls_url: str, make_engine: MakeEngine, what: str
) -> None:
    """Weak references go before the destructors: the takeover can't find such a connection, and its
    descriptor would keep the server's session when the parent is killed."""
    kept: list[Any] = [make_engine(tls_url).pool.recreate()]
    parent = kept[0].connect()
    tag = tag_of(parent)
    assert tag is not None and tag.fd is not None
    if what == "detached":
        parent.detach()
    else:
        parent.close()
    kept.append(parent)
    del parent
    before = bytes_on_the_wire(tag.fd)

    def collect() -> int:
        kept.append(kept)  # a cycle, as an application's objects are in
        holder = kept[:]
        holder.append(holder)
        kept.clear()
        del holder
        gc.collect()
        assert tag.fd is not None
        return os.fstat(tag.fd).st_ino

    assert run_in_child(collect, how="c") != tag.socket_inode
    assert bytes_on_the_wire(tag.fd) == before
    with closing(kept[1] if what == "detached" else kept[0].connect()) as connection:
        cursor = connection.cursor()
        cursor.execute("select pg_backend_pid()")
        assert cursor.fetchone() == (tag.server_pid,)
    kept[0].dispose()
