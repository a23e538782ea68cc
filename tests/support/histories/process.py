"""What the processes of a history run. Each of its threads takes one command at a time from the test, over a
socket of its own, and answers it. ``python -m histories.process <socket>`` is the first process: it forks
the root of each history, and is the parent of all whose parent has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import io
import json
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

from events import Events
from forking import How, fork
from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import QueuePool

from pidpool import PidPool, tag_of

GC_OFTEN = 200
"""The threshold of the collector in a history that has garbage collected at any moment."""


class Ended(BaseException):
    """Ends a process by an exception that nothing catches."""


class Unwound(Exception):
    """Unwinds a driver's call in which a child was forked."""


class Channel:
    """A thread's line to the test."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self._file = self.socket.makefile("rb")

    def receive(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            os._exit(3)  # the test has gone
        return dict(json.loads(line))

    def send(self, message: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")


class Held:
    """A connection that a process has checked out, under a name."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.savepoints: list[Any] = []
        self.rows: Any = None
        self.me: Held | None = None


class HistoryProcess:
    """One process of a history, and in a forked child the child."""

    def __init__(self, path: str, number: int, url: str, options: dict[str, Any], collect: str) -> None:
        self.path = path
        self.number = number
        self.proxy_port = int(options.pop("proxy_port"))
        stock = options.pop("stock", False)
        self.events = Events()
        if stock:
            options = {k: v for k, v in options.items() if k not in ("on_foreign", "inherited_sockets")}
        else:
            options["logger"] = self.events.logger
        self.engine = create_engine(url, poolclass=QueuePool if stock else PidPool, **options)
        self.held: dict[str, Held] = {}
        self.channels: list[Channel] = []
        self.before: list[str] = []
        self.detached = 0
        self.is_unwinding = False
        self.is_ending = False
        if collect == "often":
            gc.set_threshold(GC_OFTEN, 5, 5)
            gc.enable()
        self.join("main")

    # -- its threads

    def join(self, thread: str) -> None:
        channel = Channel(self.path)
        self.channels.append(channel)
        if not self.before:
            self.before = self._descriptors()
        self.channel = threading.local() if thread == "main" else self.channel
        self.channel.mine = channel
        channel.send({"pid": os.getpid(), "thread": thread})

    def serve(self) -> None:
        """Do what the test commands, until one of the commands ends the process or unwinds a call."""
        while True:
            command = self.channel.mine.receive()
            answer = self._answer(command)
            self.channel.mine.send(answer)  # another one, if this is a child that unwound a call

    def _answer(self, command: dict[str, Any]) -> dict[str, Any]:
        name, slot = command.pop("do"), command.get("slot")
        try:
            with self._patient(command.pop("patience", None)):
                value = getattr(self, f"do_{name}")(**command)
        except Exception as error:
            if self.is_ending:
                raise Ended from error  # a driver's call on the way has made an error of its own of it
            if self.is_unwinding:
                if name == "unwind":
                    raise
                # In a child, which now leaves the call that forked it: the answer to the command `unwind`.
                self.is_unwinding = False
                return self._state(None)
            answer = {"error": _described(error), **self._give_up(slot)}
            del error
            gc.collect()
            return {**answer, **self._state(None)}
        return {"value": value, **self._state(slot)}

    @contextlib.contextmanager
    def _patient(self, seconds: float | None) -> Iterator[None]:
        """Have the pool wait for so long at most; None for as long as its options say."""
        if seconds is None:
            yield  # with no pool here: a fork in this thread, or in another, keeps the frame in the child
            return
        pool: Any = self.engine.pool
        timeout, pool._timeout = pool._timeout, seconds
        try:
            yield
        finally:
            pool._timeout = timeout

    def _give_up(self, slot: Any) -> dict[str, Any]:
        """Roll back after an error, as an application does."""
        held = self.held.get(slot)
        if held is None:
            return self._state(None)
        held.savepoints.clear()
        held.rows = None
        was_invalidated = held.connection.invalidated
        with contextlib.suppress(Exception):
            held.connection.rollback()
        return {**self._state(slot), "was_invalidated": was_invalidated}

    def _state(self, slot: Any) -> dict[str, Any]:
        # Read without a look at the process: that would be one more door.
        pool: Any = self.engine.pool
        idle = sum(entry.dbapi_connection is not None for entry in list(pool._pool.queue))
        held = self.held.get(slot)
        if held is None:
            return {"idle": idle}
        connection = held.connection
        state = {"idle": idle, "invalidated": connection.invalidated, "tx": connection.in_transaction()}
        if not connection.invalidated and isinstance(self.engine.pool, PidPool):
            tag = tag_of(connection)
            if tag is not None:
                state.update(owner=tag.owner_pid, server_pid=tag.server_pid, port=_local_port(tag.fd))
        return state

    # -- commands: with a connection

    def do_checkout(self, slot: str) -> None:
        self.held[slot] = Held(self.engine.connect())

    def do_begin(self, slot: str) -> None:
        assert self._one(slot, "select 1") == 1

    def do_write(self, slot: str, value: int) -> None:
        done = self.held[slot].connection.exec_driver_sql(f"insert into kept values ({self.number}, {value})")
        assert done.rowcount == 1

    def do_commit(self, slot: str) -> None:
        self._leave_savepoints(slot)
        self.held[slot].connection.commit()

    def do_rollback(self, slot: str) -> None:
        self._leave_savepoints(slot)
        self.held[slot].connection.rollback()

    def do_savepoint(self, slot: str) -> None:
        held = self.held[slot]
        held.savepoints.append(held.connection.begin_nested())

    def do_release(self, slot: str) -> None:
        self.held[slot].savepoints.pop().commit()

    def do_roll_back_to_savepoint(self, slot: str) -> None:
        self.held[slot].savepoints.pop().rollback()
        self.held[slot].rows = None  # the server closes a cursor that was opened since

    def do_lock(self, slot: str, key: int) -> None:
        self._one(slot, f"select pg_advisory_lock({key})")

    def do_unlock(self, slot: str, key: int) -> bool:
        return bool(self._one(slot, f"select pg_advisory_unlock({key})"))

    def do_listen(self, slot: str, channel: str) -> None:
        self.held[slot].connection.exec_driver_sql(f"listen {channel}")

    def do_stream(self, slot: str) -> None:
        held = self.held[slot]
        statement, options = "select generate_series(1, 9)", {"yield_per": 2}
        held.rows = held.connection.exec_driver_sql(statement, execution_options=options)

    def do_fetch(self, slot: str) -> int | None:
        row = self.held[slot].rows.fetchone()
        return None if row is None else int(row[0])

    def do_copy_out(self, slot: str, child: dict[str, Any] | None = None) -> int:
        lines = io.BytesIO()

        def write(data: bytes) -> None:
            lines.write(data)
            self._fork_once(child)

        writer = type("Writer", (), {"write": staticmethod(write)})
        self._copy(slot, "copy (select generate_series(1, 3)) to stdout", writer)
        return len(lines.getvalue().split())

    def do_copy_in(self, slot: str, values: list[int], child: dict[str, Any] | None = None) -> None:
        lines = [f"{self.number}\t{value}\n".encode() for value in values]

        def read(size: int) -> bytes:
            self._fork_once(child)
            return lines.pop(0) if lines else b""

        reader = type("Reader", (), {"read": staticmethod(read)})
        self._copy(slot, "copy kept from stdin", reader)

    def do_close(self, slot: str) -> None:
        held = self.held[slot]
        held.rows = None
        try:
            held.connection.close()
        except Exception:
            with contextlib.suppress(Exception):
                held.connection.rollback()
            held.connection.close()
            del self.held[slot]
            raise
        del self.held[slot]

    def do_drop(self, slot: str, cycle: bool) -> None:
        held = self.held.pop(slot)
        if cycle:
            held.me = held

    def do_detach(self, slot: str) -> None:
        self.held[slot].connection.detach()
        self.detached += 1

    def do_invalidate(self, slot: str, soft: bool) -> None:
        held = self.held[slot]
        if soft:
            held.connection.connection.invalidate(soft=True)
            return
        held.savepoints.clear()
        held.rows = None
        held.connection.invalidate()
        if held.connection.in_transaction():
            held.connection.rollback()

    # -- commands: with the pool

    def do_collect(self) -> None:
        gc.collect()

    def do_dispose(self, close: bool) -> None:
        self.engine.dispose(close=close)

    def do_recreate(self) -> None:
        self.engine.pool = self.engine.pool.recreate()

    def do_look(self) -> dict[str, Any]:
        """Return what the pool counts, and what it has logged."""
        pool = self.engine.pool
        assert isinstance(pool, PidPool)
        pool.status()
        stats = pool.stats()
        counters = stats.counters
        names = self.events.names
        reasons = [event["reason"] for event in self.events.of("connection.closed")]
        pairs = {
            "opened": (counters.opened, names.count("connection.opened")),
            "failed": (sum(counters.failed.values()), names.count("connection.failed")),
            "checkouts": (counters.checkouts, names.count("connection.checked_out")),
            "timeouts": (counters.timeouts, names.count("checkout.timed_out")),
            "invalidations": (counters.invalidations, names.count("connection.invalidated")),
            "inherited": (sum(counters.inherited.values()), names.count("connection.inherited")),
            "severed or kept": (counters.severed + counters.kept, names.count("connection.inherited")),
            "replaced": (counters.replaced, names.count("connection.replaced")),
            "refused": (counters.refused, names.count("connection.refused")),
            "adoptions": (sum(counters.adoptions.values()), names.count("pool.adopted")),
            # A fork with no connection open is counted only.
            "forks": (max(counters.forks, names.count("pool.forked")), counters.forks),
        }
        # A checkout that ends because its connection is detached or invalidated is counted only.
        hard = [event for event in self.events.of("connection.invalidated") if not event["soft"]]
        logged, counted = names.count("connection.checked_in"), counters.checkins
        is_right = logged <= counted <= logged + len(hard) + self.detached
        pairs["checkins"] = (counted, counted if is_right else logged)
        for reason, count in counters.closed.items():
            pairs[f"closed: {reason}"] = (count, reasons.count(reason))
        return {
            "differ": {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
            "used": stats.used,
            "idle": stats.idle,
            "waiting": stats.waiting,
            "checkedout": pool.checkedout(),
            "checkedin": pool.checkedin(),
            "opened": counters.opened,
            "closed": sum(counters.closed.values()),
            "foreign events": sorted({event["pid"] for event in self.events.all} - {os.getpid()}),
        }

    def do_fill(self, capacity: int) -> list[Any]:
        """Check out `capacity` connections and one more; return how many there were, and what the last one
        ended with."""
        found: list[Any] = []
        try:
            for _ in range(capacity):
                found.append(self.engine.connect())
                assert found[-1].exec_driver_sql("select 1").scalar() == 1
            with self._patient(0.05):
                found.append(self.engine.connect())
            return [len(found), None]
        except Exception as error:
            return [len(found), _described(error)]
        finally:
            while found:
                found.pop().close()

    def do_descriptors(self) -> dict[str, Any]:
        """Return the descriptors that this process has more than at its start, and its TCP connections."""
        now = self._descriptors()
        more = [each for each in now if each not in self.before]
        return {"more": more, "wires": [port for port in map(self._wire, now) if port is not None]}

    # -- commands: processes and threads

    def do_thread(self, name: str) -> None:
        pid = os.getpid()

        def run() -> None:
            try:
                with contextlib.suppress(Ended, SystemExit):
                    self.join(name)
                    self.serve()
            finally:
                if os.getpid() != pid:
                    os._exit(0)  # a child: if it has other threads it would not end with this one

        threading.Thread(target=run, name=name, daemon=True).start()

    def do_fork(self, how: How) -> None:
        self._fork_once({"how": how})

    def do_unwind(self) -> NoReturn:
        self.is_unwinding = True
        raise Unwound

    def do_end(self, way: str) -> NoReturn:
        sys.stderr.flush()
        if way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "exec":
            os.execv("/bin/true", ["true"])
        # What a driver makes of it on its way up ends the process too: another thread may use the connection.
        self.is_ending = True
        if way == "exit":
            raise SystemExit(0)
        if way == "exception":
            raise Ended("a process of a history ends by an exception")
        os._exit(0)

    # -- how

    def _fork_once(self, child: dict[str, Any] | None) -> None:
        """Fork if that was not done yet; in the child, do what the test commands it."""
        if not child or not child.get("how"):
            return
        if fork(child.pop("how")) == 0:
            # Closed by their numbers: the objects are other threads', who read from them.
            for channel in self.channels:
                os.close(channel.socket.fileno())
            _leaked.append(self.channels)
            self.channels = []
            self.before = []
            self.events.clear()
            self.join("main")
            self.serve()

    def _one(self, slot: str, statement: str) -> Any:
        return self.held[slot].connection.exec_driver_sql(statement).scalar()

    def _leave_savepoints(self, slot: str) -> None:
        self.held[slot].savepoints.clear()
        self.held[slot].rows = None

    def _copy(self, slot: str, statement: str, file: Any) -> None:
        if not self.held[slot].connection.in_transaction():
            self.held[slot].connection.begin()
        cursor = self.held[slot].connection.connection.cursor()
        cursor.copy_expert(statement, file)
        cursor.close()

    def _descriptors(self) -> list[str]:
        found = []
        channels = {str(each.socket.fileno()) for each in self.channels}
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                what = os.readlink(f"/proc/self/fd/{number}")
                if number not in channels:
                    found.append(f"{number} {what.partition(':')[0]}")
        return sorted(found)

    def _wire(self, descriptor: str) -> int | None:
        return _local_port(int(descriptor.partition(" ")[0]), self.proxy_port)


_leaked: list[Any] = []
"""Channels of the parent's: to destroy one would close a number that another file may have by then."""


def _local_port(fd: int | None, peer: int | None = None) -> int | None:
    """Return the local port of a TCP socket, if its peer has the port `peer`; None for another file."""
    if fd is None:
        return None
    try:
        with socket.socket(fileno=os.dup(fd)) as copy:
            if copy.family != socket.AF_INET or (peer is not None and copy.getpeername()[1] != peer):
                return None
            return int(copy.getsockname()[1])
    except OSError:
        return None


def _described(error: BaseException) -> dict[str, Any]:
    original = getattr(error, "orig", None)
    names = {each.__name__ for found in (error, original) for each in type(found).__mro__}
    return {"text": f"{type(error).__name__}: {error}", "names": sorted(names)}


def main(path: str) -> None:
    """Fork the root of each history that the test asks for; reap what ends."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    # No thread asks another for the GIL. A child forked in C would hand it over to a thread that it does not
    # have, and wait in CPython for ever.
    sys.setswitchinterval(3600)
    warnings.simplefilter("ignore")
    faulthandler.enable()
    gc.disable()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            left = 0
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
                left = 1
            print(left, flush=True)
        elif os.fork() == 0:
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), 0)
            HistoryProcess(path, **request).serve()


if __name__ == "__main__":
    main(sys.argv[1])
