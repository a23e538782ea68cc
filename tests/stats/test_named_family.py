"""Named families: one memory for processes that were not forked from one another."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from events import Events
from forking import run_in_child
from killing import trace_opcodes
from soak import SOAK
from sqlalchemy import exc
from waiting import until

from pidpool import PidPool
from pidpool.stats import family as family_module
from pidpool.stats import family_memory
from pidpool.stats.family import Family
from pidpool.stats.family_memory import FamilyRefused

PROGRAM = """
import json, sys
from pidpool import PidPool

class Connection:
    def rollback(self): ...
    def close(self): ...

pool = PidPool(Connection, family=sys.argv[1], pool_size=int(sys.argv[2]))
for _ in range(int(sys.argv[3])):
    pool.connect().close()
print(json.dumps([pool.family_stats().alive, pool.family_stats().counters.checkouts]), flush=True)
sys.stdin.read()
"""


class Connection:
    def rollback(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of this user in which the test's families have their files."""
    monkeypatch.setenv("PIDPOOL_FAMILY_DIR", str(tmp_path))
    return tmp_path / f"pidpool-{os.geteuid()}"


class Process:
    """A process of its own, started afresh; with the block it gives what it saw, and ends."""

    def __init__(self, family: str = "shop", pool_size: int = 5, checkouts: int = 1) -> None:
        command = [sys.executable, "-c", PROGRAM, family, str(pool_size), str(checkouts)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.alive, self.checkouts = json.loads(line)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def spawned(pool_size: int, reader: Any) -> None:
    pool = PidPool(Connection, family="shop", pool_size=pool_size)
    pool.connect().close()
    reader.recv()


def test_processes_that_were_not_forked_from_one_another_are_one_family() -> None:
    pool = PidPool(Connection, family="shop")
    pool.connect().close()
    with Process(pool_size=2, checkouts=3) as one, Process(checkouts=4) as other:
        assert (one.alive, one.checkouts) == (2, 1 + 3)
        assert (other.alive, other.checkouts) == (3, 1 + 3 + 4)
        run_in_child(lambda: pool.connect().close())
        stats = pool.family_stats()
        assert stats.pool == "shop"
        assert stats.counters.checkouts == 1 + 3 + 4 + 1
        alive = {each.pid: each for each in stats.processes if each.alive}
        assert alive.keys() == {os.getpid(), one.pid, other.pid}
        assert [alive[pid].size for pid in (os.getpid(), one.pid, other.pid)] == [5, 2, 5]
        assert {each.parent_pid for each in alive.values()} == {None}
        (child,) = [each for each in stats.processes if not each.alive]
        assert child.parent_pid == os.getpid()
        assert stats.maximum == 15 + 12 + 15
        os.kill(one.pid, signal.SIGKILL)
        one.process.wait(10)
        stats = pool.family_stats()
        assert stats.alive == 2 and stats.counters.checkouts == 9


def test_spawned_workers_of_multiprocessing_are_one_family() -> None:
    pool = PidPool(Connection, family="shop")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=spawned, args=(1, there))
    worker.start()
    try:
        until(lambda: pool.family_stats().counters.checkouts == 1, "the worker does not use its pool")
        assert {each.pid for each in pool.family_stats().processes} == {os.getpid(), worker.pid}
    finally:
        here.send(None)
        worker.join(30)
    assert worker.exitcode == 0


def test_other_families_and_nameless_ones_are_apart() -> None:
    pools = [PidPool(Connection, family=name) for name in ("shop", "shop2", None)]
    pools[0].connect().close()
    assert [pool.family_stats().counters.checkouts for pool in pools] == [1, 0, 0]


def test_a_pool_that_has_gone_counts_as_ended() -> None:
    kept, gone = (PidPool(Connection, family="shop") for _ in range(2))
    gone.connect().close()
    del gone
    gc.collect()
    stats = kept.family_stats()
    assert [each.alive for each in stats.processes] == [True, False]
    assert stats.counters.checkouts == 1


def test_dispose_stays_in_the_family_with_the_same_counts() -> None:
    pool = PidPool(Connection, family="shop")
    pool.connect().close()
    pool.dispose()
    again = pool.recreate()
    assert again.family_stats().alive == 1 and again.pool_events.family.name == "shop"
    assert again.stats().counters.checkouts == 1


@pytest.mark.parametrize(("limit", "other"), [(5, 3), (5, None), (None, 3)])
def test_a_process_with_another_limit_is_named(limit: int | None, other: int | None) -> None:
    events = Events()

    def join(limit: int | None) -> int | None:
        PidPool(Connection, family="shop", family_limit=limit, logger=events.logger).connect().close()
        return next((each["other_limit"] for each in events.of("family.limits_differ")), -1)

    pool = PidPool(Connection, family="shop", family_limit=other, logger=events.logger)
    assert run_in_child(join, other) == -1
    assert run_in_child(join, limit) == other
    pool.recreate().connect().close()
    assert events.of("family.limits_differ") == []
    PidPool(Connection, family="shop", family_limit=limit, logger=events.logger).connect().close()
    event = events.the("family.limits_differ")
    assert (event["family"], event["family_limit"], event["other_limit"]) == ("shop", limit, other)
    assert event["other_pid"] == os.getpid()


def test_processes_with_other_limits_keep_to_their_own_over_the_permits_of_all() -> None:
    pools = [PidPool(Connection, family="shop", family_limit=limit, timeout=0.1) for limit in (4, 2)]
    kept = [pools[0].connect() for _ in range(2)]
    with pytest.raises(exc.TimeoutError, match="family_limit of 2 reached"):
        pools[1].connect()
    kept += [pools[0].connect() for _ in range(2)]
    with pytest.raises(exc.TimeoutError, match="family_limit of 4 reached"):
        pools[0].connect()
    for each in kept:
        each.close()


def test_when_no_process_lives_the_family_starts_afresh() -> None:
    with Process(checkouts=5):
        pass
    with Process(checkouts=2) as process:
        assert (process.alive, process.checkouts) == (1, 2)


def test_the_file_is_for_this_user_alone(directory: Path) -> None:
    PidPool(Connection, family="shop")
    (file,) = directory.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert file.name.startswith("shop.") and file.stat().st_size < 100
    # Of this machine since its start: several may share the directory.
    assert f".{Path('/proc/sys/kernel/random/boot_id').read_text()[:8]}." in file.name


def test_a_file_that_is_truncated_deleted_or_overwritten_harms_no_process(directory: Path) -> None:
    pool = PidPool(Connection, family="shop")
    (file,) = directory.iterdir()
    for harm in (lambda: os.truncate(file, 0), lambda: file.write_bytes(b"\xff" * 10_000), file.unlink):
        harm()
        pool.connect().close()
        run_in_child(lambda: pool.connect().close())
    assert pool.family_stats().counters.checkouts == 6


def test_a_file_with_something_else_is_refused_and_left_alone(directory: Path) -> None:
    PidPool(Connection, family="shop")
    (file,) = directory.iterdir()
    file.write_bytes(b"the accounts of 2025")
    with pytest.raises(FamilyRefused, match="no file of pidpool's: it begins with b'the accounts of 2025'"):
        PidPool(Connection, family="shop")
    assert file.read_bytes() == b"the accounts of 2025"


def test_an_empty_file_is_taken_as_new(directory: Path) -> None:
    """Its maker may have been killed before it wrote."""
    with Process():
        pass
    (file,) = directory.iterdir()
    file.write_bytes(b"")
    with Process() as process:
        assert process.alive == 1


def test_a_number_of_a_segment_given_to_another_one_is_noticed(directory: Path) -> None:
    first = PidPool(Connection, family="shop")
    other = PidPool(Connection, family="other")
    first.connect().close()
    files = {file.name.partition(".")[0]: file for file in directory.iterdir()}
    segment = re.search(rb"segment (\d+)", files["other"].read_bytes())
    assert segment is not None
    stale = re.sub(rb"segment \d+", segment[0], files["shop"].read_bytes())
    files["shop"].write_bytes(stale)
    with Process() as process:
        assert process.alive == 1 and process.checkouts == 1
    assert other.family_stats().alive == 1
    # A process that has looked at the other family's segment does not keep it.
    program = """
import os, sys
from pidpool.stats.family import Family
Family(5, 10, name="shop").join()
print(open("/proc/self/maps").read().count("SYSV"))
"""
    files["shop"].write_bytes(stale)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize("what", ["file", "directory"])
@pytest.mark.parametrize("how", ["open to others", "a link", "another user's"])
def test_what_is_not_this_users_alone_is_refused(
    directory: Path, tmp_path: Path, what: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    PidPool(Connection, family="shop")
    (file,) = directory.iterdir()
    path = file if what == "file" else directory
    if how == "open to others":
        path.chmod(0o666 if what == "file" else 0o755)
    elif how == "a link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        real = os.fstat
        is_kind = stat.S_ISREG if what == "file" else stat.S_ISDIR

        def fstat(descriptor: int) -> Any:
            found = real(descriptor)
            if not is_kind(found.st_mode):
                return found
            return os.stat_result((*found[:4], found.st_uid + 1, *found[5:]))

        monkeypatch.setattr(family_memory.os, "fstat", fstat)
    with pytest.raises(FamilyRefused) as caught:
        PidPool(Connection, family="shop")
    assert isinstance(caught.value, PermissionError)
    assert str(path) in str(caught.value) and "remove it" in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "socket", "directory"])
def test_what_is_no_plain_file_is_refused(
    directory: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    PidPool(Connection, family="shop")
    (file,) = directory.iterdir()
    file.unlink()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        if kind == "pipe":
            os.mkfifo(file, 0o600)
        elif kind == "directory":
            file.mkdir()
        else:
            monkeypatch.chdir(directory)  # the whole path may be too long for a socket
            listener.bind(file.name)
        with pytest.raises(FamilyRefused, match=r"no plain file.*: remove it"):
            PidPool(Connection, family="shop")


NOBODY = 65534 if os.geteuid() != 65534 else 65533
"""Another user than the one who runs the tests."""


@pytest.fixture
def open_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory where every user may make files, as /dev/shm."""
    with tempfile.TemporaryDirectory(prefix="pidpool-users-") as made:
        os.chmod(made, 0o1777)
        monkeypatch.setenv("PIDPOOL_FAMILY_DIR", made)
        yield Path(made)


def as_another_user(function: Callable[[], Any]) -> Any:
    """Call it in a child that is another user; an ordinary user only takes itself for it."""

    def become() -> Any:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        else:
            os.geteuid = lambda: NOBODY
        return function()

    return run_in_child(become)


def count_one(pool: PidPool) -> tuple[int, int]:
    pool.connect().close()
    return pool.family_stats().alive, pool.family_stats().counters.checkouts


def test_two_users_have_a_family_each(open_directory: Path) -> None:
    pool = PidPool(Connection, family="shop")
    pool.connect().close()
    events = Events()

    def other() -> tuple[tuple[int, int], int]:
        counted = count_one(PidPool(Connection, family="shop", logger=events.logger))
        return counted, len(events.of("family.private"))

    if os.geteuid() == 0:
        assert as_another_user(other) == ((1, 1), 0)
        assert {path.name for path in open_directory.iterdir()} == {"pidpool-0", f"pidpool-{NOBODY}"}
    assert count_one(pool) == (1, 2)


def test_a_directory_that_another_user_has_made_in_its_place_is_refused(open_directory: Path) -> None:
    (open_directory / f"pidpool-{NOBODY}").mkdir(0o700)

    def other() -> str:
        with pytest.raises(FamilyRefused) as caught:
            PidPool(Connection, family="shop")
        return str(caught.value)

    said = as_another_user(other)
    assert said.startswith(f"{open_directory}/pidpool-{NOBODY} ") and "remove it" in said


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "x" * 65, "\0", "../up"])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="takes 1 to 64 letters"):
        PidPool(Connection, family=name)


def is_private(events: Events, reason: str) -> None:
    pool = PidPool(Connection, family="shop", logger=events.logger)
    pool.connect().close()
    run_in_child(lambda: pool.connect().close())
    assert pool.family_stats().counters.checkouts == 2
    (event,) = events.of("family.private")
    assert event["family"] == "shop" and reason in event["reason"] and event["level"] == "warning"


def test_a_directory_that_can_not_be_written_gives_a_private_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIDPOOL_FAMILY_DIR", "/proc/no/such")
    is_private(Events(), "/proc/no/such/pidpool-")


def test_a_full_file_system_gives_a_private_family() -> None:
    """As root in a mount namespace of its own: a real one that is full."""
    program = """
import os, subprocess, sys
sys.path.insert(0, "tests/support")
os.makedirs("/tmp/pidpool-full", exist_ok=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,mode=700", "none", "/tmp/pidpool-full"], check=True)
os.environ["PIDPOOL_FAMILY_DIR"] = "/tmp/pidpool-full"
from pidpool import PidPool
from events import Events

class Connection:
    def rollback(self): ...
    def close(self): ...

os.mkdir(f"/tmp/pidpool-full/pidpool-{os.geteuid()}", 0o700)
with open("/tmp/pidpool-full/filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(b"x" * 4096)
    except OSError:
        pass
events = Events()
pool = PidPool(Connection, family="shop", logger=events.logger)
pool.connect().close()
assert "No space left on device" in events.of("family.private")[0]["reason"], events.all
subprocess.run(["mount", "-o", "remount,bind,ro", "/tmp/pidpool-full"], check=True)
pool = PidPool(Connection, family="shop2", logger=events.logger)
pool.connect().close()
assert "Read-only file system" in events.of("family.private")[1]["reason"], events.all
"""
    command = ["unshare", "--mount", "--map-root-user", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "namespaces",
    [
        ("--pid", "--mount-proc"),
        ("--ipc",),
        ("--time",),
        ("--pid", "--ipc", "--mount", "--uts", "--mount-proc"),
    ],
    ids=lambda each: " ".join(each).replace("--", ""),
)
def test_another_container_with_the_same_directory_is_another_family(namespaces: tuple[str, ...]) -> None:
    """The pids, segments and clocks of the one mean nothing in the other."""
    pool = PidPool(Connection, family="shop")
    pool.connect().close()
    command = [sys.executable, "-c", PROGRAM, "shop", "5", "1"]
    isolated = ["unshare", "--map-root-user", *namespaces, "--fork", *command]
    done = subprocess.run(isolated, capture_output=True, text=True, timeout=60, input="")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1, 1]
    assert pool.family_stats().alive == 1


def named_memory(prepare: Callable[[memoryview, int], None]) -> memoryview:
    return family_memory.named("shop", "1x1", 4096, lambda memory: memory.cast("Q")[0], prepare)


def write_key(memory: memoryview, key: int) -> None:
    memory.cast("Q")[0] = key


def test_a_child_forked_while_another_thread_makes_the_family_locks_none_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The child has the locked file too, for all its life."""
    monkeypatch.setattr(family_memory, "_LOCK_WAIT", 0.5)
    pids: list[int] = []

    def prepare(memory: memoryview, key: int) -> None:
        pids.append(os.fork())
        if pids == [0]:
            signal.pause()
        write_key(memory, key)

    named_memory(prepare)
    try:
        named_memory(write_key)
    finally:
        os.kill(pids[0], signal.SIGKILL)
        os.waitpid(pids[0], 0)


def test_a_process_that_is_stopped_while_it_makes_the_family_is_waited_for_with_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(family_memory, "_LOCK_WAIT", 0.2)
    pid = os.fork()
    if pid == 0:
        try:
            named_memory(lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
        finally:
            os._exit(0)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    try:
        with pytest.raises(family_memory.NoSharedMemory, match="has been locked by another process"):
            named_memory(write_key)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    named_memory(write_key)


@pytest.mark.soak
def test_a_process_killed_at_any_instruction_of_making_a_family_blocks_none(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One child for each (in short: each twentieth) instruction, killed there while it makes or joins."""
    step = 1 if SOAK else 20
    codes = {family_module.__file__, family_memory.__file__}
    killed, instruction = True, 0
    while killed:
        pid = os.fork()
        if pid == 0:
            left = instruction

            def trace(frame: Any, event: str, argument: object) -> Any:
                nonlocal left
                if frame.f_code.co_filename in codes:
                    frame.f_trace = trace  # Python 3.13 and later look at it in the next line
                    frame.f_trace_opcodes = True
                    left -= event == "opcode"
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                return trace

            try:
                trace_opcodes(trace)
                Family(5, 10, name="shop").join()
            finally:
                os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        instruction += step

        def join() -> int:
            family = Family(5, 10, name="shop")
            family.join()
            return family.read("shop").alive

        assert run_in_child(join) == 1
    assert instruction > 200
