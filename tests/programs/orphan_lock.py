"""A parent is killed while it holds a row lock, and its child lives on: orphan_lock.py URL POOL

Prints whether another session gets the lock within 3 s, with the child alive."""

from __future__ import annotations

import os
import signal
import sys

from pools import make_engine
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

url, pool = sys.argv[1:]
engine = make_engine(url, pool)
with engine.begin() as connection:
    connection.execute(text("drop table if exists orphan_lock"))
    connection.execute(text("create table orphan_lock as select 1 as i"))
engine.dispose()
ready, tell_ready = os.pipe()
wait_for_end, end = os.pipe()
parent = os.fork()
if parent == 0:
    held = engine.connect()
    held.execute(text("select * from orphan_lock for update"))
    if os.fork() == 0:
        os.close(end)
        os.write(tell_ready, b".")
        os.read(wait_for_end, 1)  # lives until the program closes its end of the pipe
        os._exit(0)
    signal.pause()
os.close(tell_ready)
assert os.read(ready, 1) == b"."
os.kill(parent, signal.SIGKILL)
os.waitpid(parent, 0)
try:
    with engine.begin() as connection:
        connection.execute(text("set local lock_timeout = '3s'"))
        connection.execute(text("select * from orphan_lock for update"))
    print("free")
except OperationalError:
    print("held")
os.close(end)  # the parent's copy went with it: the child ends now
with engine.begin() as connection:
    connection.execute(text("set local lock_timeout = '10s'"))
    connection.execute(text("drop table orphan_lock"))
engine.dispose()
