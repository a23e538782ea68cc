"""Forks for tests: run a function in a real child, with a bound on its life, and get back what it
returned or the traceback of what it raised."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import ctypes
import faulthandler
import os
import pickle
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from waiting import until

How = Literal["python", "c", "c with child hooks"]

HOWS: list[How] = ["python", "c", "c with child hooks"]
"""The ways to fork that this Python has."""

if sys.version_info >= (3, 14):
    # From 3.14 on, PyOS_AfterFork_Child unlocks the import lock that PyOS_BeforeFork has taken. Without the
    # latter CPython ends the child of any application: "PyMutex_Unlock: unlocking mutex that is not locked".
    # uWSGI's workers end so with `--py-call-osafterfork`; `--py-call-uwsgi-fork-hooks` has it call both.
    HOWS.remove("c with child hooks")

LIFE = 30.0
"""Seconds after which a child counts as hung: its stacks are dumped, then it is killed."""

# Keeps the GIL over the call, so that the child has it too when other threads run (uWSGI's way).
_libc_with_gil = ctypes.PyDLL(None)


class ChildFailed(AssertionError):
    pass


def fork(how: How) -> int:
    """Fork through Python, with its at-fork hooks; in C, with none; or in C with the hooks of the child
    alone (uWSGI's ``py-call-osafterfork``)."""
    if how == "python":
        return os.fork()
    if how == "c":
        return _fork_in_c()
    pid: int = _libc_with_gil.fork()
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    return pid


def _fork_in_c() -> int:
    """Fork in C, again if the child can't give the GIL up.

    If another thread is being woken to take the GIL just then, the child waits for it for ever, when two
    threads of its own have handed the GIL to each other, in the C library's condition variable
    (``__condvar_quiesce_and_switch_g1`` under ``drop_gil``). It does so without any pool. Where CPython's own
    hook runs in the child, it makes the GIL anew.
    """
    with contextlib.suppress(OSError):  # a test may have taken away /proc, or the last descriptor
        for _ in range(10):
            if len(os.listdir("/proc/self/task")) == 1:
                break
            _let_threads_sleep()
            reader, writer = os.pipe()
            pid: int = _libc_with_gil.fork()
            if pid == 0:
                os.close(reader)
                _hand_the_gil_over()
                os.write(writer, b".")
                os.close(writer)
                return 0
            os.close(writer)
            is_well = select.select([reader], [], [], 5)[0]
            os.close(reader)
            if is_well:
                return pid
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    alone: int = _libc_with_gil.fork()
    return alone


def _hand_the_gil_over() -> None:
    def yield_it() -> None:
        for _ in range(20):
            time.sleep(0)

    def run() -> None:
        yield_it()
        done.release()

    for _ in range(10):
        done = _thread.allocate_lock()  # not threading's, which has locks of its own
        done.acquire()
        _thread.start_new_thread(run, ())
        yield_it()
        done.acquire()


def _let_threads_sleep() -> None:
    """Wait until all other threads of this process sleep: most forks in C need no second try then."""
    me = threading.get_native_id()

    def states() -> set[str]:
        found = set()
        time.sleep(0.001)  # without the GIL: whoever waits for it is awake now
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if int(thread) != me:
                    with open(f"/proc/self/task/{thread}/stat") as file:
                        found.add(file.read().rpartition(") ")[2][0])
        return found

    until(lambda: states() | states() <= {"S"}, "another thread runs", patience=10, interval=0)


def run_in_child(function: Callable[..., Any], *args: Any, how: How = "python", life: float = LIFE) -> Any:
    """Return what `function(*args)` returned in a forked child; its result has to be picklable."""
    with tempfile.TemporaryFile("w+") as stacks:
        reader, writer = os.pipe()
        pid = fork(how)
        if pid == 0:
            os.close(reader)
            # Dumps all stacks at SIGABRT. Not by a timer, since that is a thread, with a lock that a
            # grandchild would inherit locked.
            faulthandler.enable(file=stacks)
            code = 1
            try:
                try:
                    answer = pickle.dumps((True, function(*args)))
                    code = 0
                except BaseException:
                    answer = pickle.dumps((False, traceback.format_exc()))
                sys.stdout.flush()
                sys.stderr.flush()
                while answer:
                    answer = answer[os.write(writer, answer) :]
            finally:
                os._exit(code)
        os.close(writer)
        try:
            answer, hung = _read_all(reader, time.monotonic() + life)
        finally:
            os.close(reader)
        if hung:
            os.kill(pid, signal.SIGABRT)
            with contextlib.suppress(AssertionError):
                until(lambda: has_ended(pid), "", patience=2.0)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if hung or not answer:
            stacks.seek(0)
            what = f"hung for {life} s" if hung else f"ended with wait status {status} and no answer"
            raise ChildFailed(f"child {pid} {what}; its stacks:\n{stacks.read()}")
    succeeded, value = pickle.loads(answer)
    if not succeeded:
        raise ChildFailed(f"child {pid} raised:\n{value}")
    assert status == 0
    return value


def run_on_both_sides(
    function: Callable[[Callable[[], None]], Any], *, how: How = "python", life: float = LIFE
) -> tuple[Any, Any]:
    """Call `function(fork_once)`, which forks in its middle and goes on in both processes.

    Return what it returned in this process and in the child; the latter has to be picklable.
    """
    parent, pids = os.getpid(), []
    reader, writer = os.pipe()

    def fork_once() -> None:
        if not pids:
            pids.append(fork(how))

    try:
        answer = True, function(fork_once)
    except BaseException:
        if os.getpid() == parent:
            raise
        answer = False, traceback.format_exc()
    if os.getpid() != parent:
        try:
            os.write(writer, pickle.dumps(answer))
        finally:
            os._exit(0)
    os.close(writer)
    childs, hung = _read_all(reader, time.monotonic() + life)
    os.close(reader)
    if hung:
        os.kill(pids[0], signal.SIGKILL)
    os.waitpid(pids[0], 0)
    if hung or not childs:
        raise ChildFailed(f"child {pids[0]} gave no answer, hung: {hung}")
    succeeded, value = pickle.loads(childs)
    if not succeeded:
        raise ChildFailed(f"child {pids[0]} raised:\n{value}")
    return answer[1], value


def has_ended(pid: int) -> bool:
    """Return whether a child has ended; it is still to be reaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def run_in_child_of_loop(
    loop: asyncio.AbstractEventLoop, child: Callable[[], Coroutine[Any, Any, None]], how: How
) -> None:
    """Run a coroutine in a child, in a loop of its own. Fork in a task of `loop`, or in C between its runs.

    From 3.14 on, the loop and the task that run stand in the thread's state, and only PyOS_AfterFork_Child
    clears them: a child that is forked in C meanwhile can run no loop. Hosts that fork in C run none there:
    uWSGI's master has imported the application, and each worker runs a loop of its own.
    """

    async def task() -> None:
        run_in_child(lambda: asyncio.run(child()), how=how)

    if how == "python":
        loop.run_until_complete(task())
    else:
        run_in_child(lambda: asyncio.run(child()), how=how)


def _read_all(reader: int, deadline: float) -> tuple[bytes, bool]:
    chunks = []
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return b"", True
        chunk = os.read(reader, 65536)
        if not chunk:
            return b"".join(chunks), False
        chunks.append(chunk)
