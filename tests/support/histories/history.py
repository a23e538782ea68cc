"""`History`: one history, step by step, with the model that says what each step may do.

Each public method is a step. It commands a process, and checks that the answer is one that the model
expects: what happened to the connection, which process sent how many bytes, how much is checked out.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from forking import How

from histories.proxy import Wire
from histories.stage import HistoryFailed, Line, Stage, pidfd_of

Outcome = str
"""ok; foreign (`ForeignConnectionError`); timeout (no connection was free); lost (the driver's error)."""

OK, FOREIGN, TIMEOUT, LOST = "ok", "foreign", "timeout", "lost"

_DRIVERS_ERRORS = {"OperationalError", "InterfaceError", "DatabaseError", "PendingRollbackError"}

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass
class Session:
    """A server's session, and the wire that leads to it."""

    wire: Wire
    owner: Process
    server_pid: int | None = None
    seen: int = 0
    """Bytes sent on it that are accounted for."""
    is_harmed: bool = False
    """The history has ended it on purpose: its owner gets errors, and the server may complain of it."""
    is_left_in_transaction: bool = False
    """It came back to its pool in a transaction, by ``pool_reset_on_return=None``."""
    may_be_complained_of: bool = False
    was_closed: bool = False
    """It had ended before the present step."""


@dataclass
class Slot:
    """A connection that a process has checked out, under a name."""

    name: str
    session: Session | None = None
    inherited: str | None = None
    """The state at the fork, of a connection not yet replaced; "any" if it is not certain."""
    is_detached: bool = False
    generation: int = 0
    tx: bool = False
    writes: list[int] = field(default_factory=list)
    savepoints: list[int] = field(default_factory=list)
    """How many writes there were at each."""
    next_row: int | None = None
    """Of a streamed result; 0 if it is inherited."""
    locks: list[int] = field(default_factory=list)
    is_suspect: bool = False
    """It has raised an expected error: the next operation may raise too."""
    thread: str | None = None
    """The thread that is in the middle of a statement on it."""
    is_in_a_frame: bool = False
    """It is in a frame of a thread that a fork has ended, for ever: it can be closed, but not collected."""

    @property
    def is_bound(self) -> bool:
        """Whether it holds a connection of the process's own."""
        return self.session is not None


@dataclass
class Thread:
    line: Line
    depth: int = 0
    """In how many calls that forked it is."""
    busy_with: tuple[str, str] | None = None
    """The command in flight, and its slot."""


@dataclass
class Process:
    name: str
    pid: int
    pidfd: int
    parent: Process | None
    threads: dict[str, Thread]
    slots: dict[str, Slot] = field(default_factory=dict)
    garbage: list[Slot] = field(default_factory=list)
    """What was dropped, and may not be collected yet."""
    generation: int = 0
    """How many pools it has had."""
    idle: int = 0
    """Connections in its pool."""
    is_refused: bool = False
    """Its checkouts are refused until it disposes."""
    may_have_dead_idle: bool = False
    has_noticed: bool = True
    is_in_a_call: bool = False
    """Whether it was forked in the middle of a call of the driver's."""
    keeps_former_pools: bool = False
    """Whether it was forked while another thread was in the middle of a statement. That thread's frames stay
    in it for ever, and with them a pool that it has disposed of, and what came back to that pool since."""
    may_hold: list[Session] = field(default_factory=list)
    """Sessions of others of whose sockets it may have a descriptor."""
    is_alive: bool = True

    def free_threads(self) -> list[str]:
        return [name for name, thread in self.threads.items() if thread.busy_with is None]

    def __repr__(self) -> str:
        return self.name


def _step(method: _F) -> _F:
    """Note the call, so that a failing history can be printed, and account for the bytes afterwards."""

    @functools.wraps(method)
    def call(self: History, *args: Any, **kwargs: Any) -> Any:
        arguments = [*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())]
        self.steps.append(f"history.{method.__name__}({', '.join(arguments)})")
        self._acting = self.processes.get(args[0]) if args and isinstance(args[0], str) else None
        result = method(self, *args, **kwargs)
        self._account()
        return result

    return cast(_F, call)


class History:
    """A context manager; at its end all processes are closed in order, and everything is checked.

    :param options: of the engine, and ``tls`` (whether there is TLS) and ``collect`` ("off": garbage is
        collected by steps only; "often": at any moment).
    """

    def __init__(self, stage: Stage, **options: Any) -> None:
        self.stage = stage
        self.options = {"pool_size": 2, "max_overflow": 1, "tls": True, "collect": "off", **options}
        self.steps: list[str] = []
        self.processes: dict[str, Process] = {}
        self.sessions: list[Session] = []
        self._acting: Process | None = None
        self._committed: set[int] = set()
        self._rolled_back: set[int] = set()
        self._next_value = 0
        self._next_lock = 0
        self._was_restarted = False
        self.has_listener = False
        self._is_limit_exact = True

    # -- its begin and its end

    def __enter__(self) -> History:
        options = dict(self.options)
        self._tls, self._collect = options.pop("tls"), options.pop("collect")
        self._is_stock = options.get("stock", False)
        self._size: int = options["pool_size"]
        self._overflow: int = options["max_overflow"]
        self._limit: int | None = options.get("family_limit")
        self._policy: str = options.setdefault("on_foreign", "replace")
        self._sockets: str = options.setdefault("inherited_sockets", "sever")
        self._pre_ping: bool = options.get("pool_pre_ping", False)
        self._reset: str | None = options.get("pool_reset_on_return", "rollback")
        options.setdefault("pool_timeout", 0.05 if self._limit is None else 2.0)
        self._log_mark = self.stage.postgres.log_mark()
        self.stage.forget_stderr()
        self.number, pid, line = self.stage.start_root(options, self._collect, self._tls)
        self._add(Process("p0", pid, pidfd_of(pid), None, {"main": Thread(line)}))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                self.finish()
        except BaseException as failure:
            self._abandon()
            raise self._failed(failure) from failure
        else:
            self._abandon()
            if error is not None:
                raise self._failed(error) from error

    def program(self) -> str:
        """Return this history as a program."""
        options = ", ".join(["stage", *(f"{key}={value!r}" for key, value in self.options.items())])
        return "\n".join(
            [
                '"""A random history. To run it in the root of a clone: .venv/bin/python <this file>"""',
                "import sys",
                'sys.path.insert(0, "tests/support")',
                "from histories import History, Stage",
                "",
                f"with Stage() as stage, History({options}) as history:",
                *(f"    {step}" for step in self.steps or ["pass"]),
                "",
            ]
        )

    def _failed(self, error: BaseException) -> BaseException:
        if not isinstance(error, Exception):
            return error
        log = self.stage.postgres.log_since(self._log_mark)[-3000:]
        return HistoryFailed(
            f"{error}\n\n# The processes' stderr:\n{self.stage.stderr()}\n# The server's log:\n{log}\n\n"
            f"# The history:\n{self.program()}"
        )

    def _abandon(self) -> None:
        for process in self.processes.values():
            if process.is_alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                self._died(process, "kill", check=False)
        self.stage.proxy.forget()
        with contextlib.suppress(AssertionError):
            self.stage.reap()
        # Or what the server says of a process that was killed above would be in the next history's log.
        with contextlib.suppress(HistoryFailed):
            self._wait_until_server_has_no_session()

    # -- which steps are possible

    def alive(self) -> list[Process]:
        return [each for each in self.processes.values() if each.is_alive]

    def slots(self) -> list[tuple[Process, Slot]]:
        """Return the slots on which a step can be made."""
        return [
            (process, slot)
            for process in self.alive()
            if process.free_threads()
            for slot in process.slots.values()
            if slot.thread is None
        ]

    def is_sound(self, process: Process, slot: Slot) -> bool:
        """Return whether a statement on the slot can only succeed, and has a connection."""
        session = slot.session
        return (
            session is not None
            and slot.inherited is None
            and not (session.is_harmed or slot.is_suspect)
            and slot.next_row is None
        )

    # -- steps: with a connection

    @_step
    def checkout(self, process: str, slot: str, thread: str = "main") -> None:
        p = self.processes[process]
        expected = self._expect_connection(p)
        answer = self._ask(p, thread, notices=True, do="checkout", slot=slot, **self._patience(expected))
        outcome = self._judge(answer, expected)
        if outcome == OK:
            new = p.slots[slot] = Slot(slot, generation=p.generation)
            self._bind(p, new, answer)

    @_step
    def begin(self, process: str, slot: str, thread: str = "main") -> None:
        self._use(process, slot, thread, do="begin")

    @_step
    def write(self, process: str, slot: str, thread: str = "main") -> None:
        value = self._value()
        if self._use(process, slot, thread, do="write", value=value) == OK:
            self.processes[process].slots[slot].writes.append(value)
        else:
            self._rolled_back.add(value)

    @_step
    def copy_out(self, process: str, slot: str, thread: str = "main") -> None:
        answer: dict[str, Any] = {}
        if self._use(process, slot, thread, answer, do="copy_out") == OK:
            self._check(answer["value"] == 3, f"COPY gave {answer['value']} rows of 3")

    @_step
    def copy_in(self, process: str, slot: str, thread: str = "main") -> None:
        values = [self._value(), self._value()]
        if self._use(process, slot, thread, do="copy_in", values=values) == OK:
            self.processes[process].slots[slot].writes.extend(values)
        else:
            self._rolled_back.update(values)

    @_step
    def commit(self, process: str, slot: str, thread: str = "main") -> None:
        p, s = self._slot(process, slot)
        if s.tx:
            writes = list(s.writes)
            session = s.session
            if self._use(process, slot, thread, ends_transaction=True, do="commit") == OK:
                self._committed.update(writes)
                s.writes = []
                if session is not None:
                    session.is_left_in_transaction = False
                self._end_transaction(s)
        else:
            # The parent's thread may have been about to begin a transaction, or to end one.
            expected = {OK, FOREIGN} if s.inherited == "any" else {OK}
            outcome = self._judge(answer := self._ask(p, thread, do="commit", slot=slot), expected)
            if outcome != OK:
                self._failed_use(s, answer, outcome)

    @_step
    def rollback(self, process: str, slot: str, thread: str = "main") -> None:
        p, s = self._slot(process, slot)
        session = s.session
        expected = {OK}
        if session is not None and s.tx and (session.is_harmed or s.is_suspect):
            expected = {OK, LOST}
        outcome = self._judge(answer := self._ask(p, thread, do="rollback", slot=slot), expected)
        if outcome == LOST:
            self._failed_use(s, answer, outcome)
        elif s.inherited is not None and s.tx and self._policy == "replace":
            s.inherited = "no transaction"
        if s.tx and session is not None:
            session.is_left_in_transaction = False
        self._end_transaction(s)

    @_step
    def savepoint(self, process: str, slot: str, thread: str = "main") -> None:
        if self._use(process, slot, thread, do="savepoint") == OK:
            s = self.processes[process].slots[slot]
            s.savepoints.append(len(s.writes))

    @_step
    def release(self, process: str, slot: str, thread: str = "main") -> None:
        if self._use(process, slot, thread, do="release") == OK:
            self.processes[process].slots[slot].savepoints.pop()

    @_step
    def roll_back_to_savepoint(self, process: str, slot: str, thread: str = "main") -> None:
        p, s = self._slot(process, slot)
        if s.inherited is not None:  # does nothing, so that leaving begin_nested() raises nothing
            self._judge(
                answer := self._ask(p, thread, do="roll_back_to_savepoint", slot=slot),
                {OK, FOREIGN, TIMEOUT},
            )
            if "error" in answer:
                self._failed_use(s, answer, _outcome(answer))
            else:
                s.savepoints.pop()
        elif self._use(process, slot, thread, do="roll_back_to_savepoint") == OK:
            length = s.savepoints.pop()
            self._rolled_back.update(s.writes[length:])
            del s.writes[length:]
            s.next_row = None

    @_step
    def lock(self, process: str, slot: str, thread: str = "main") -> None:
        """Take an advisory lock of the session."""
        self._next_lock += 1
        key = self.number * 100_000 + self._next_lock
        if self._use(process, slot, thread, do="lock", key=key) == OK:
            self.processes[process].slots[slot].locks.append(key)

    @_step
    def unlock(self, process: str, slot: str, thread: str = "main") -> None:
        """Give a lock back: the session must still have it."""
        s = self.processes[process].slots[slot]
        key, session = s.locks[-1], s.session
        answer: dict[str, Any] = {}
        if self._use(process, slot, thread, answer, do="unlock", key=key) == OK and s.session is session:
            self._check(answer["value"] is True, f"the session of {slot} has lost its lock")
            s.locks.pop()

    @_step
    def listen(self, process: str, slot: str, thread: str = "main") -> None:
        self._use(process, slot, thread, do="listen", channel="c")
        session = self.processes[process].slots[slot].session
        if session is not None:
            self.has_listener = True
            session.may_be_complained_of = True  # what it was notified of may be unread at its close

    @_step
    def stream(self, process: str, slot: str, thread: str = "main") -> None:
        """Open a cursor on the server."""
        s = self.processes[process].slots[slot]
        if self._use(process, slot, thread, do="stream") == OK:
            s.next_row = 1

    @_step
    def fetch(self, process: str, slot: str, thread: str = "main") -> None:
        """Fetch a row from the cursor on the server."""
        p, s = self._slot(process, slot)
        at = s.next_row
        session = s.session
        if s.inherited is not None or session is None:
            expected = {OK, FOREIGN, LOST}  # rows that were fetched before the fork are there
        elif session.is_harmed or s.is_suspect:
            expected = {OK, LOST}
        else:
            expected = {OK}
        answer = self._ask(p, thread, do="fetch", slot=slot)
        outcome = self._judge(answer, expected)
        if outcome != OK:
            self._failed_use(s, answer, outcome)
        elif at:
            row = at if at <= 9 else None
            self._check(answer["value"] == row, f"row {answer['value']} in the place of row {row}")
            s.next_row = at + 1 if row is not None else None

    @_step
    def close(self, process: str, slot: str, thread: str = "main") -> None:
        p, s = self._slot(process, slot)
        harmed = s.session is not None and (s.session.is_harmed or s.is_suspect)
        self._judge(self._ask(p, thread, do="close", slot=slot), {OK, LOST} if harmed else {OK})
        if s.tx and s.session is not None:
            s.session.is_left_in_transaction = False
        self._end_transaction(s)
        del p.slots[slot]

    @_step
    def drop(self, process: str, slot: str, cycle: bool = False, thread: str = "main") -> None:
        """Forget a connection without closing it."""
        p, s = self._slot(process, slot)
        self._judge(self._ask(p, thread, do="drop", slot=slot, cycle=cycle), {OK})
        del p.slots[slot]
        if s.is_bound:
            p.garbage.append(s)
            session = cast(Session, s.session)
            if s.tx and self._reset is None:
                session.is_left_in_transaction = True
            if session.is_harmed or s.is_detached or self._reset == "rollback":
                self._end_transaction(s)  # else it is decided when it is collected

    @_step
    def detach(self, process: str, slot: str, thread: str = "main") -> None:
        p, s = self._slot(process, slot)
        expected = {OK}
        is_replaced = s.inherited == "no transaction" and self._policy == "replace"
        if is_replaced:
            expected = self._expect_connection(p, generation=s.generation)
        elif s.inherited == "any":
            expected = {OK, TIMEOUT}
        answer = self._ask(p, thread, do="detach", slot=slot)
        outcome = self._judge(answer, expected)
        if outcome == OK:
            if is_replaced or (s.inherited == "any" and answer.get("owner") == p.pid):
                self._bind(p, s, answer)
            s.is_detached = True
        else:
            self._failed_use(s, answer, outcome)

    @_step
    def invalidate(self, process: str, slot: str, soft: bool = False, thread: str = "main") -> None:
        p, s = self._slot(process, slot)
        self._judge(self._ask(p, thread, do="invalidate", slot=slot, soft=soft), {OK})
        if not soft:
            if s.session is not None:
                s.session.is_left_in_transaction = False
            s.session = s.inherited = None
            s.is_detached = False
            self._end_transaction(s)

    # -- steps: in another thread, while the proxy is deaf

    @_step
    def begin_in_background(self, process: str, thread: str, slot: str, what: str) -> None:
        """Have a thread begin a write or a commit, and keep the bytes that it sends in the proxy."""
        p, s = self._slot(process, slot)
        session = cast(Session, s.session)
        self.stage.proxy.deafen(session.wire)
        command: dict[str, Any] = {"do": what, "slot": slot}
        if what == "write":
            command["value"] = value = self._value()
            s.writes.append(value)
        p.threads[thread].line.send(command)
        p.threads[thread].busy_with = what, slot
        s.thread = thread
        if not select.select([session.wire.client], [], [], 20)[0]:
            raise HistoryFailed(f"thread {thread} of {process} sends nothing")

    @_step
    def end_in_background(self, process: str, thread: str, how: str) -> None:
        """Pass on what the thread has sent, or reset its connection."""
        self._end_in_background(process, thread, how)

    def _end_in_background(self, process: str, thread: str, how: str) -> None:
        p = self.processes[process]
        what, slot = cast("tuple[str, str]", p.threads[thread].busy_with)
        s = p.slots[slot]
        session = cast(Session, s.session)
        if how == "reset":
            self._harm(session)
            self.stage.proxy.reset(session.wire)
        else:
            self.stage.proxy.hear(session.wire)
        p.threads[thread].busy_with = s.thread = None
        answer = self._receive(p, thread, what)
        outcome = self._judge(answer, {LOST} if session.is_harmed else {OK})
        if outcome == LOST:
            if what == "commit":
                s.writes = []  # nobody knows
            self._failed_use(s, answer, outcome)
            return
        s.tx = True
        if what == "commit":
            self._committed.update(s.writes)
            s.writes = []
            self._end_transaction(s)
            session.is_left_in_transaction = False

    # -- steps: with the pool

    @_step
    def collect(self, process: str, thread: str = "main") -> None:
        p = self.processes[process]
        self._judge(self._ask(p, thread, do="collect"), {OK})
        self._collected(p)

    @_step
    def dispose(self, process: str, close: bool = True, thread: str = "main") -> None:
        p = self.processes[process]
        self._judge(self._ask(p, thread, notices=True, do="dispose", close=close), {OK})
        self._has_new_pool(p, close)

    @_step
    def recreate(self, process: str, thread: str = "main") -> None:
        p = self.processes[process]
        self._judge(self._ask(p, thread, notices=True, do="recreate"), {OK})
        self._has_new_pool(p, False)

    @_step
    def look(self, process: str, thread: str = "main") -> None:
        """Compare what the pool counts with what it has logged, and with the model."""
        p = self.processes[process]
        found = self._ask(p, thread, notices=True, do="look")["value"]
        self._check(not found["differ"], f"counters and events of {process} differ: {found['differ']}")
        self._check(not found["foreign events"], f"{process} has logged events of {found['foreign events']}")
        low, high = self._used(p, any_generation=True)
        used = found["used"]
        self._check(low <= used <= high, f"{process}: stats().used is {used}, not {low} to {high}")
        low, high = self._used(p)
        self._check(
            low <= found["checkedout"] <= high,
            f"{process}: checkedout() {found['checkedout']}, not {low} to {high}",
        )
        self._check(found["waiting"] == 0, f"{process}: {found['waiting']} threads wait")

    # -- steps: processes and threads

    @_step
    def thread(self, process: str, thread: str) -> None:
        """Start a thread."""
        p = self.processes[process]
        free = p.free_threads()[0]
        self._judge(self._ask(p, free, do="thread", name=thread), {OK})
        _, line = self.stage.accept()
        p.threads[thread] = Thread(line)

    @_step
    def fork(
        self, process: str, how: How, inside: str | None = None, slot: str | None = None, thread: str = "main"
    ) -> None:
        """Fork a child; if `inside` is "copy_out" or "copy_in", in the middle of that on the slot."""
        p = self.processes[process]
        child_options = {"how": how}
        if inside is None:
            command: dict[str, Any] = {"do": "fork", **child_options}
        else:
            command = {"do": inside, "slot": slot, "child": child_options}
            if inside == "copy_in":
                command["values"] = [self._value(), self._value()]
        if how == "python":
            self._notice(p)
        if inside is not None:
            self._notice(p)
        p.threads[thread].line.send(command)
        pid, line, answer = self.stage.accept_child(p.threads[thread].line)
        threads = {"main": Thread(line, p.threads[thread].depth + 1)}
        child = Process(f"p{len(self.processes)}", pid, pidfd_of(pid), p, threads)
        child.is_in_a_call = inside is not None or (p.is_in_a_call and thread == "main")
        child.has_noticed = how == "python"
        self._inherit(p, child, slot)
        self._add(child)
        answer = answer or self._receive(p, thread, command["do"])
        self._judge(answer, {OK})
        if inside is not None:
            s = p.slots[cast(str, slot)]
            self._bind(p, s, answer)
            s.tx = True
            if inside == "copy_out":
                self._check(answer["value"] == 3, f"COPY gave {answer['value']} rows of 3")
            else:
                s.writes.extend(command["values"])

    @_step
    def unwind(self, process: str) -> None:
        """Have a child leave, by an exception, the call in which it was forked."""
        p = self.processes[process]
        self._notice_before_unwinding(p)
        self._ask(p, "main", do="unwind")  # whatever the driver makes of it
        p.threads["main"].depth -= 1

    @_step
    def end(self, process: str, way: str) -> None:
        """End a process: by ``_exit``, exit, exception, exec, or kill."""
        self._end(process, way)

    def _end(self, process: str, way: str) -> None:
        p = self.processes[process]
        if way in ("exit", "exception"):
            self._notice_before_unwinding(p)
        line = p.threads[p.free_threads()[0]].line
        line.send({"do": "end", "way": way})
        while not self.stage.wait_for_end(p.pid, p.pidfd, f"{process} ends by {way}", line):
            # A driver has made an error of its own of the exception.
            if line.receive() is None:
                continue
            line.send({"do": "end", "way": "_exit"})
        self._died(p, way)

    @_step
    def kill(self, process: str) -> None:
        """Kill a process from outside."""
        p = self.processes[process]
        os.kill(p.pid, signal.SIGKILL)
        self.stage.wait_for_end(p.pid, p.pidfd, f"{process} is killed")
        self._died(p, "kill")

    # -- steps: the server and the network

    @_step
    def terminate(self, session: int) -> None:
        """Have the server end a session."""
        s = self.sessions[session]
        if s.server_pid is not None and not s.wire.has_ended:
            self.stage.ask(f"select pg_terminate_backend({s.server_pid}, 5000)")
            self._harm(s)

    @_step
    def reset(self, session: int) -> None:
        """Have the network reset a connection."""
        self.stage.proxy.reset(self.sessions[session].wire)
        self._harm(self.sessions[session])

    @_step
    def notify(self) -> None:
        """Have the server send something to every session that listens."""
        self.stage.ask("notify c")

    @_step
    def restart(self) -> None:
        """Have the server end all sessions and start again."""
        for session in self.sessions:
            self._harm(session)
        self._was_restarted = True
        self.stage.restart()

    # -- the end

    def finish(self) -> None:
        """Close everything in order, and check what is left."""
        self.steps.append("# then everything is closed, and all is checked")
        for p in self.alive():
            self._acting = p
            for name, thread in p.threads.items():
                if thread.busy_with is not None:
                    self._end_in_background(p.name, name, "hear")
            while p.threads["main"].depth:
                History.unwind.__wrapped__(self, p.name)  # type: ignore[attr-defined]
            for slot in list(p.slots):
                History.close.__wrapped__(self, p.name, slot)  # type: ignore[attr-defined]
            self._judge(self._ask(p, "main", do="collect"), {OK})
            self._collected(p)
            self._account()
        for p in self.alive():
            self._acting = p
            self._finish(p)
            self._account()
        self.stage.reap()
        self._check_rows()
        self._check_log()

    def _finish(self, p: Process) -> None:
        if self._is_stock:
            self._ask(p, "main", do="dispose", close=True)
            self._end(p.name, "_exit")
            return
        look = functools.partial(History.look.__wrapped__, self, p.name)  # type: ignore[attr-defined]
        look()
        if p.is_refused or p.may_have_dead_idle or self._limit is not None:
            self._judge(self._ask(p, "main", do="dispose", close=True), {OK})
            self._has_new_pool(p, True)
        capacity = self._capacity()
        if capacity is not None:
            count, error = self._ask(p, "main", do="fill", capacity=capacity)["value"]
            self._check(
                count == capacity and error is not None and "TimeoutError" in error["names"],
                f"{p.name} can check out {count} connections, not {capacity}; then: {error}",
            )
        look()
        self._judge(self._ask(p, "main", do="dispose", close=True), {OK})
        self._judge(self._ask(p, "main", do="collect"), {OK})
        self._account()
        left = self._ask(p, "main", do="descriptors")["value"]
        kept = {each.wire.client_port for each in p.may_hold}
        if p.keeps_former_pools and p.generation > 0:
            kept.update(each.wire.client_port for each in self.sessions if each.owner is p)
        else:
            self._check_no_session(p)
        self._check(
            set(left["wires"]) <= kept, f"{p.name} still has connections: {left['wires']}, kept: {kept}"
        )
        more = [each for each in left["more"] if not each.endswith(" socket")]
        self._check(
            len(left["more"]) - len(more) <= 1 + len(p.threads) + len(left["wires"]) and not more,
            f"{p.name} has descriptors that it had not: {left['more']}",
        )
        self._end(p.name, "_exit")

    def _check_no_session(self, p: Process) -> None:
        # If a child has kept a descriptor of it, the server is the one that ends it.
        for _ in _bounded(f"{p} has closed everything, but still has sessions"):
            self.stage.proxy.settle()
            if all(session.wire.has_ended for session in self.sessions if session.owner is p):
                break

    def _check_rows(self) -> None:
        for session in self.sessions:
            self._check(session.wire.has_ended, f"session {session.server_pid} outlives all processes")
        self._wait_until_server_has_no_session()
        found = dict(self.stage.ask(f"select v, count(*) from kept where history = {self.number} group by v"))
        twice = {value: count for value, count in found.items() if count > 1}
        self._check(not twice, f"written twice: {twice}")
        lost = self._committed - set(found)
        self._check(not lost, f"reported committed, but not there: {sorted(lost)}")
        undead = self._rolled_back & set(found)
        self._check(not undead, f"rolled back, but there: {sorted(undead)}")

    def _wait_until_server_has_no_session(self) -> None:
        """A session's process has said all that it says when it is gone."""
        for _ in _bounded("the server still has sessions of this history"):
            if not self.stage.ask(_OTHER_CLIENTS):
                break

    def _check_log(self) -> None:
        allowed = [f"[{each.server_pid}]" for each in self.sessions if each.may_be_complained_of]
        for line in self.stage.postgres.complaints(self._log_mark):
            is_of_restart = self._was_restarted and any(word in line for word in _WORDS_OF_A_RESTART)
            self._check(
                is_of_restart or any(each in line for each in allowed), f"the server complains: {line}"
            )

    # -- the model

    def _check(self, is_right: bool, failure: str) -> None:
        if not is_right:
            raise HistoryFailed(failure)

    def _add(self, process: Process) -> None:
        self.processes[process.name] = process

    def _slot(self, process: str, slot: str) -> tuple[Process, Slot]:
        p = self.processes[process]
        return p, p.slots[slot]

    def _value(self) -> int:
        self._next_value += 1
        return self._next_value

    def _capacity(self) -> int | None:
        if self._size == 0 or self._overflow < 0:
            return self._limit
        capacity = self._size + self._overflow
        return capacity if self._limit is None else min(capacity, self._limit)

    def _used(
        self, p: Process, any_generation: bool = False, generation: int | None = None
    ) -> tuple[int, int]:
        """Return how many connections are checked out, at least and at most; from the present pool alone, or
        from a former one."""
        wanted = p.generation if generation is None else generation

        def count(slots: list[Slot]) -> int:
            return sum(
                each.is_bound and not each.is_detached and (any_generation or each.generation == wanted)
                for each in slots
            )

        low = count(list(p.slots.values()))
        return low, low + count(p.garbage)

    def _expect_connection(
        self, p: Process, then_used: bool = False, generation: int | None = None
    ) -> set[Outcome]:
        """Return what may come of a checkout, or of a use that first needs one."""
        if self._policy == "refuse" and p.is_refused:
            return {FOREIGN}
        low, high = self._used(p, generation=generation)
        capacity = None if self._size == 0 or self._overflow < 0 else self._size + self._overflow
        expected = {OK}
        if capacity is not None and low >= capacity:
            return {TIMEOUT}
        if capacity is not None and high >= capacity:
            expected.add(TIMEOUT)
        if self._limit is not None:
            # A dead connection has its permit until its process closes it.
            held = [slot for each in self.alive() for slot in (*each.slots.values(), *each.garbage)]
            open_ones = sum(each.is_bound for each in held)
            if open_ones >= self._limit or not self._is_limit_exact:
                expected.add(TIMEOUT)
        if then_used and p.may_have_dead_idle and not self._pre_ping:
            expected.add(LOST)
        return expected

    def _patience(self, expected: set[Outcome]) -> dict[str, float]:
        """Return for how many seconds the pool may wait: not for long where a timeout is expected."""
        if TIMEOUT not in expected:
            return {}
        return {"patience": 0.05 if expected == {TIMEOUT} else 0.3}

    def _expect(self, p: Process, slot: Slot) -> set[Outcome]:
        """Return what may come of a statement."""
        if slot.inherited == "any":
            return {OK, FOREIGN, TIMEOUT, LOST}
        if slot.inherited is not None:
            if self._policy == "refuse" or slot.inherited != "no transaction":
                return {FOREIGN}
            return self._expect_connection(p, then_used=True, generation=slot.generation)
        session = slot.session
        if session is None:
            return self._expect_connection(p, then_used=True) | ({LOST} if slot.is_suspect else set())
        if session.is_harmed or slot.is_suspect:
            return {LOST} if slot.tx and session.is_harmed else {OK, LOST}
        return {OK}

    def _use(
        self,
        process: str,
        slot: str,
        thread: str,
        answer: dict[str, Any] | None = None,
        ends_transaction: bool = False,
        **command: Any,
    ) -> Outcome:
        """Command a statement on a slot, and note what became of it."""
        p, s = self._slot(process, slot)
        expected = self._expect(p, s)
        given = self._ask(p, thread, notices=True, slot=slot, **command, **self._patience(expected))
        outcome = self._judge(given, expected)
        if outcome == OK:
            if not (ends_transaction and s.inherited is not None):
                self._bind(p, s, given)
            s.tx = not ends_transaction
            s.is_suspect = False
        else:
            self._failed_use(s, given, outcome)
        if answer is not None:
            answer.update(given)
        return outcome

    def _bind(self, p: Process, s: Slot, answer: dict[str, Any]) -> None:
        """Note with which session a slot was used."""
        if self._is_stock:
            return
        self._check(answer.get("invalidated") is False, f"{p}: {s.name} is invalidated")
        self._check(
            answer.get("owner") == p.pid, f"{p}: {s.name} belongs to pid {answer.get('owner')}, not {p.pid}"
        )
        self._find_sessions()
        port = answer["port"]
        found = [each for each in self.sessions if each.wire.client_port == port and each.owner is p]
        self._check(bool(found), f"{p}: {s.name} has a connection that {p} has not opened")
        session = found[-1]
        if s.session is not None and not (s.session.is_harmed or s.is_suspect):
            self._check(s.session is session, f"{p}: {s.name} has another session than before, for no reason")
        if session is not s.session:
            was_detached = s.inherited is not None and s.is_detached
            if s.inherited is None:  # otherwise its replacement is of the same pool
                s.generation = p.generation
            s.session, s.inherited = session, None
            s.is_detached = was_detached
            s.locks.clear()
            session.server_pid = session.server_pid or answer["server_pid"]

    def _failed_use(self, s: Slot, answer: dict[str, Any], outcome: Outcome) -> None:
        """Note what an error, and the rollback after it, have made of a slot."""
        if outcome == TIMEOUT and answer.get("tx") is s.tx is True:
            return
        if answer.get("invalidated"):
            s.session = s.inherited = None
            s.is_detached = False
            s.is_suspect = outcome == LOST
        elif s.inherited is not None:
            if self._policy == "replace" and s.inherited != "any":
                s.inherited = "no transaction"
        elif outcome == LOST:
            s.is_suspect = True
        self._end_transaction(s)

    def _end_transaction(self, s: Slot) -> None:
        """Note that what was written on a slot and not committed is not there."""
        self._rolled_back.update(s.writes)
        s.writes = []
        s.savepoints = []
        s.tx = False
        s.next_row = None

    def _collected(self, p: Process) -> None:
        for slot in p.garbage:
            if slot.writes and self._reset == "commit" and self._collect == "off":
                session = cast(Session, slot.session)
                if not session.is_harmed:
                    self._committed.update(slot.writes)
        p.garbage = []

    def _has_new_pool(self, p: Process, close: bool) -> None:
        p.generation += 1
        p.is_refused = False
        p.may_have_dead_idle = False
        if self._used(p, any_generation=True)[1] or not close:
            self._is_limit_exact = False

    def _harm(self, session: Session) -> None:
        session.is_harmed = session.may_be_complained_of = session.owner.may_have_dead_idle = True

    def _inherit(self, p: Process, child: Process, inside_slot: str | None) -> None:
        child.generation, child.idle = p.generation, p.idle
        child.is_refused = self._policy == "refuse" and (p.is_refused or p.idle > 0)
        # One that was ended on purpose has a descriptor until its owner notices.
        may_be_open = (each for each in self.sessions if each.is_harmed or not each.wire.has_ended)
        own = [each for each in may_be_open if each.owner is p]
        child.may_hold = [*own, *p.may_hold]
        in_flight = any(slot.thread is not None for slot in p.slots.values())
        child.keeps_former_pools = in_flight or p.keeps_former_pools
        if child.has_noticed and self._sockets == "sever":
            child.may_hold = []
        for slot in p.slots.values():
            state = slot.inherited
            session = slot.session
            if session is not None and slot.inherited is None:
                is_in_transaction = slot.tx or session.is_left_in_transaction
                state = "in transaction" if is_in_transaction else "no transaction"
                if slot.name == inside_slot:
                    state = "in transaction"
                if session.is_harmed or slot.is_suspect or slot.thread is not None:
                    state = "any"
            tx = slot.tx or slot.name == inside_slot
            inherited = Slot(slot.name, inherited=state, is_detached=slot.is_detached, tx=tx)
            inherited.generation = slot.generation
            if slot.thread is None or p.threads[slot.thread].busy_with != ("commit", slot.name):
                inherited.savepoints = [0] * len(slot.savepoints)  # a commit has left them
            inherited.next_row = None if slot.next_row is None else 0
            inherited.is_suspect = slot.is_suspect and state is None
            inherited.is_in_a_frame = slot.is_in_a_frame or slot.thread is not None
            child.slots[slot.name] = inherited

    def _notice_before_unwinding(self, p: Process) -> None:
        """Have a process use its pool before it unwinds a call of the driver's.

        A child that was forked in C, in the middle of that call, and has passed no door of the pool has the
        whole connection: what it does in the driver, it does on its parent's socket.
        """
        if p.is_in_a_call and not p.has_noticed:
            self._judge(self._ask(p, p.free_threads()[0], notices=True, do="look"), {OK})

    def _notice(self, p: Process) -> None:
        if not p.has_noticed:
            p.has_noticed = True
            if self._sockets == "sever":
                p.may_hold = []

    def _died(self, p: Process, way: str, check: bool = True) -> None:
        p.is_alive = False
        for thread in p.threads.values():
            thread.line.close()
        os.close(p.pidfd)
        may_commit = self._reset == "commit" and way in ("exit", "exception")
        # Not of what was dropped: it may have been collected, and committed by the pool or its next user.
        for slot in p.slots.values():
            in_flight = slot.thread is not None and p.threads[slot.thread].busy_with
            if not (in_flight and in_flight[0] == "commit") and not may_commit:
                self._end_transaction(slot)
        for session in self.sessions:
            if session.owner is p and not session.was_closed:
                session.may_be_complained_of = True  # of a transaction, or of bytes that it has not read
                self.stage.proxy.hear(session.wire)
        if not check:
            return
        self.stage.proxy.settle()
        held = [session for each in self.alive() for session in each.may_hold]
        for session in self.sessions:
            if session.owner is p and session not in held:
                self._check(
                    session.wire.has_ended, f"session {session.server_pid} outlives its owner {p} ({way})"
                )

    # -- what goes over the lines

    def _ask(self, p: Process, thread: str, notices: bool = False, **command: Any) -> dict[str, Any]:
        """Send a command and receive its answer.

        :param notices: whether the command passes a door of the pool for certain.
        """
        p.threads[thread].line.send(command)
        answer = self._receive(p, thread, command["do"])
        if notices:
            self._notice(p)
        return answer

    def _receive(self, p: Process, thread: str, what: str) -> dict[str, Any]:
        answer = self.stage.receive(p.threads[thread].line, p.pid, f"{what} in {p.name}")
        if answer is None:
            raise HistoryFailed(f"{p.name} ended in the middle of {what}")
        p.idle = answer.get("idle", p.idle)
        return answer

    def _judge(self, answer: dict[str, Any], expected: set[Outcome]) -> Outcome:
        outcome = _outcome(answer)
        said = answer["error"]["text"] if "error" in answer else "success"
        self._check(outcome in expected, f"{outcome}, not {' or '.join(sorted(expected))}: {said}")
        return outcome

    def _find_sessions(self) -> None:
        known = {id(each.wire) for each in self.sessions}
        new = [wire for wire in self.stage.proxy.settle() if id(wire) not in known]
        if not new:
            return
        pids = {}
        if any(not wire.has_ended for wire in new):
            pids = dict(
                self.stage.ask("select client_port, pid from pg_stat_activity where client_port is not null")
            )
        for wire in new:
            if self._acting is None:
                raise HistoryFailed("a connection was opened while no process had a command")
            self.sessions.append(Session(wire, self._acting, pids.get(wire.server_port)))

    def _account(self) -> None:
        """Check that no process but the one that has just acted has sent a byte."""
        self._find_sessions()
        for session in self.sessions:
            session.was_closed = session.wire.has_ended
            new, session.seen = session.wire.sent - session.seen, session.wire.sent
            if new and session.owner is not self._acting:
                # An idle thread gives connections back to its family whenever another process wants one.
                if self._limit is not None and session.wire.has_ended:
                    continue
                acting = "the test" if self._acting is None else self._acting
                raise HistoryFailed(
                    f"{new} bytes were sent on session {session.server_pid} of {session.owner}, by a command "
                    f"to {acting}"
                )


_OTHER_CLIENTS = """
    select pid from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()
"""

_WORDS_OF_A_RESTART = (
    "server process (PID",
    "terminating any other active server processes",
    "terminating connection because of",
    "all server processes terminated",
    "database system was interrupted",
)


def _outcome(answer: dict[str, Any]) -> Outcome:
    if "error" not in answer:
        return OK
    names = set(answer["error"]["names"])
    if "ForeignConnectionError" in names:
        return FOREIGN
    if "TimeoutError" in names:
        return TIMEOUT
    return LOST if names & _DRIVERS_ERRORS else "other"


def _bounded(failure: str) -> Iterator[None]:
    for _ in range(500):
        yield
        select.select([], [], [], 0.01)
    raise HistoryFailed(failure)
