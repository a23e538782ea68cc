"""A gevent-patched parent that forks while its greenlets use the pool: greenlets.py URL CHILDREN"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import logging  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402

import gevent  # noqa: E402
from sqlalchemy import create_engine, text  # noqa: E402

from pidpool import PidPool, tag_of  # noqa: E402

logging.getLogger("pidpool").setLevel(logging.ERROR)
url, children = sys.argv[1:]
engine = create_engine(url, poolclass=PidPool, pool_size=2, max_overflow=0)
held = engine.connect()
number, transaction = held.execute(text("select pg_backend_pid(), txid_current()")).one()
owner = os.getpid()
stop = False
turns = 0


def work() -> None:
    global turns
    while not stop:
        assert os.getpid() == owner, "a greenlet of the parent runs in a child"
        with engine.connect() as connection:
            connection.scalar(text("select 1"))
            gevent.sleep(0)
        turns += 1


greenlets = [gevent.spawn(work) for _ in range(4)]
gevent.sleep(0)
for _ in range(int(children)):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with engine.connect() as connection:
                assert connection.scalar(text("select pg_backend_pid()")) != number
                tag = tag_of(connection)
                assert tag is not None and tag.owner_pid == os.getpid()
            engine.dispose()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    gevent.sleep(0)
stop = True
gevent.joinall(greenlets, timeout=30, raise_error=True)
assert turns
assert held.execute(text("select pg_backend_pid(), txid_current()")).one() == (number, transaction)
held.close()
engine.dispose()
print("done")
