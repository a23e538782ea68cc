"""Where the platform lacks something: no pages that a fork wipes, no at-fork hooks, no fork at all."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, gc, logging, mmap, os, sys

url, missing, how = sys.argv[1:]
missing = missing.split()
if "register_at_fork" in missing:
    # The stdlib's own modules first: they take it for granted where there is a fork.
    import asyncio, concurrent.futures.thread, logging, random, threading
    del os.register_at_fork
if "fork" in missing:
    del os.fork
if "madvise" in missing:
    class Mapping(mmap.mmap):
        def madvise(self, option, *rest):
            raise OSError(22, "Invalid argument")  # Linux before 4.14
    mmap.mmap = Mapping
if "flags" in missing:
    del mmap.MAP_PRIVATE

logging.getLogger("pidpool").setLevel(logging.ERROR)
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from pidpool import ForeignConnectionError, PidPool, tag_of
from pidpool.forks import detection, gate

assert isinstance(detection.fork_state, detection._StateByPid) == ("madvise" in missing or "flags" in missing)
engine = create_engine(url, poolclass=PidPool)
engine.connect().close()
with engine.connect() as connection:
    number = connection.scalar(text("select pg_backend_pid()"))
with engine.connect() as connection:
    assert connection.scalar(text("select pg_backend_pid()")) == number
if how != "none":
    idle = engine.connect()
    held = engine.connect()
    number, transaction = held.execute(text("select pg_backend_pid(), txid_current()")).one()
    tag = tag_of(held)
    idle.close()
    for level in range(3):
        pid = os.fork() if how == "python" else ctypes.PyDLL(None).fork()
        if pid == 0:
            code = 1
            try:
                try:
                    held.execute(text("select 1"))
                except OperationalError as error:
                    assert isinstance(error.orig, ForeignConnectionError)
                    assert (error.orig.owner_pid, error.orig.pid) == (os.getppid(), os.getpid())
                else:
                    raise AssertionError("not refused")
                held.rollback()
                assert held.scalar(text("select pg_backend_pid()")) != number
                assert os.fstat(tag.fd).st_ino != tag.socket_inode
                held.close()
                engine.dispose()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
    assert held.execute(text("select pg_backend_pid(), txid_current()")).one() == (number, transaction)
    held.close()
engine.dispose()
print("done")
"""

CASES = {
    "no pages that a fork wipes": ("madvise", "python"),
    "no pages that a fork wipes, and a fork in C": ("madvise", "c"),
    "no flags for mmap": ("flags", "python"),
    "no hooks": ("register_at_fork", "python"),
    "neither": ("register_at_fork madvise", "python"),
    "no fork": ("register_at_fork fork flags", "none"),
}


@pytest.mark.usefixtures("clean_log")
@pytest.mark.parametrize("case", CASES)
def test_without(tls_url: str, case: str) -> None:
    missing, how = CASES[case]
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, tls_url, missing, how],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
