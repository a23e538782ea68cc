"""The process that keeps an embedded PostgreSQL: it makes the directory, runs the server, watches the
process that wanted it (the owner), and leaves nothing behind once that process is gone.

`postgres.py` runs this file by its path with ``python -I -S``, so it may import nothing but the
standard library. Why a process of its own, and not a pipe or a death signal in the owner: the
children that the owner forks keep a pipe's end open, the kernel's death signal (PR_SET_PDEATHSIG)
is tied to the thread that forked, and no handler runs on SIGKILL. Here the death signal is safe:
this process has one thread, which lives as long as the process does.

What holds in which case (each has its test in tests/tools/test_demo_postgres.py):

* the owner ends, however it does: noticed within `TICK` by its pid and start time;
* this process is killed: the kernel sends the server SIGQUIT; the directory goes with the owner's
  ``stop()``, or else with the next start, which sweeps (`sweep`);
* the server is killed: its orphans come to this process (PR_SET_CHILD_SUBREAPER), which kills them
  and removes the shared memory that the server could not.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import pwd
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PREFIX = "pidpool-postgres-"
SERVER_USER = "nobody"  # who runs the server where we are root: PostgreSQL refuses to run as root
SUPERUSER = "postgres"  # logs in over the unix socket only, which others can't reach
ROLE = "pidpool"  # anybody on this machine can log in as this one, so it is no superuser

TICK = 0.05
INITDB_SECONDS = 60.0
READY_SECONDS = 30.0
FAST_STOP_SECONDS = 5.0
IMMEDIATE_STOP_SECONDS = 8.0  # the server itself kills its processes after 5 s
PORT_TRIES = 10

_SOCKET_PATH_LIMIT = 107  # sizeof(sockaddr_un.sun_path) less its closing zero
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_IPC_RMID = 0

_libc = ctypes.CDLL(None, use_errno=True)

Identity = tuple[int, int]
"""A pid and its start time in clock ticks since boot: pids are reused, the pair is not."""


class StartFailed(Exception):
    """The server did not start; the text says why and goes to the owner."""


class Unwanted(Exception):
    """Nobody waits for this server any more: the owner is gone, or asked us to stop."""


# -- processes -----------------------------------------------------------------------------------


def _stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state (field 3) on, None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            # The command name before the last ")" may hold blanks and parentheses of its own.
            return stat.read().rpartition(")")[2].split()
    except OSError:
        return None


def identify(pid: int) -> Identity | None:
    """Return the identity of a living process; None where it has ended, or is a zombie."""
    fields = _stat_fields(pid)
    if not fields or fields[0] in "ZX":
        return None
    return pid, int(fields[19])


def alive(identity: Identity) -> bool:
    """Return whether exactly this process, not a later one of the same pid, still runs."""
    return identify(identity[0]) == identity


def _children() -> list[int]:
    me = str(os.getpid())
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = _stat_fields(int(entry))
            if fields and fields[1] == me:
                found.append(int(entry))
    return found


# -- directories ---------------------------------------------------------------------------------


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _open_directory(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None


def unused(path: str) -> bool:
    """Return whether no process of a server uses this directory.

    The supervisor holds a lock on the directory and the server's processes inherit it, so that it is
    free exactly when the last of them has ended. Unlike a pid, that holds across pid namespaces too.
    """
    descriptor = _open_directory(path)
    if descriptor is None:
        return True
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)


def remove(path: str) -> None:
    """Remove a server's directory, and the System V shared memory that a killed server left."""
    _remove_shared_memory(path)
    shutil.rmtree(path, ignore_errors=True)


def _remove_shared_memory(path: str) -> None:
    # Line 1 of the file is the server's pid, line 7 the key and the id of its segment. The file is
    # gone after an orderly stop. The segment must also name that pid as its creator: ids are reused.
    try:
        with open(os.path.join(path, "data", "postmaster.pid"), encoding="utf-8") as file:
            lines = file.read().splitlines()
        pid, segment = lines[0], lines[6].split()[1]
        with open("/proc/sysvipc/shm", encoding="utf-8") as file:
            rows = [line.split() for line in file]
    except (OSError, IndexError):
        return
    # Columns: key shmid perms size cpid ...
    if any(row[1] == segment and row[4] == pid for row in rows):
        _libc.shmctl(int(segment), _IPC_RMID, None)


def sweep(parent: str) -> None:
    """Remove what earlier servers of this user left in `parent`: only what is of no use to anybody.

    That is a directory of ours that no server's process uses and whose owner is gone. It comes to
    that only where the supervisor and the owner were both killed.
    """
    for path in glob.glob(os.path.join(glob.escape(parent), PREFIX + "*")):
        descriptor = _open_directory(path)
        if descriptor is None:
            continue
        try:
            if os.fstat(descriptor).st_uid == os.geteuid() and _lock(descriptor) and not _owned(path):
                remove(path)
        finally:
            os.close(descriptor)


def _owned(path: str) -> bool:
    try:
        with open(os.path.join(path, "owner"), encoding="utf-8") as file:
            pid, started = file.read().split()
    except (OSError, ValueError):
        return False
    return alive((int(pid), int(started)))


def _open_to_all(path: str) -> bool:
    """Return whether users other than the owner may pass through this directory and all above it."""
    path = os.path.abspath(path)
    while True:
        if not os.stat(path).st_mode & 0o001:
            return False
        if path == os.path.dirname(path):
            return True
        path = os.path.dirname(path)


def claim(parents: Sequence[str]) -> tuple[str, int]:
    """Make a directory for a server in the first of `parents` that will do; return it and its lock."""
    root = os.geteuid() == 0
    reasons = []
    for parent in dict.fromkeys(parents):
        path = os.path.join(parent, PREFIX + secrets.token_hex(4))
        socket_path = os.path.join(path, "socket", ".s.PGSQL.65535")
        if len(os.fsencode(socket_path)) > _SOCKET_PATH_LIMIT:
            reasons.append(
                f"{parent}: a socket's path would have {len(os.fsencode(socket_path))} bytes, "
                f"{_SOCKET_PATH_LIMIT} are allowed"
            )
            continue
        try:
            if root and not _open_to_all(parent):
                reasons.append(f"{parent}: user {SERVER_USER!r} can't reach it")
                continue
            sweep(parent)
            os.mkdir(path, 0o700)
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        # A sweep of another process may come between mkdir and lock, and take it for left behind.
        if not _lock(descriptor) or not os.path.exists(path):
            os.close(descriptor)
            return claim(parents)
        if root:
            os.chmod(path, 0o755)
        return path, descriptor
    raise StartFailed(
        "found no directory for a server: " + "; ".join(reasons) + ". Set TMPDIR to a short path of a "
        "directory that every user may pass through."
    )


# -- the server's binaries -----------------------------------------------------------------------


def _runs(command: str, **options: Any) -> bool:
    try:
        done = subprocess.run(
            [command, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            timeout=30,
            **options,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _copy_install(source: str, target: str) -> None:
    """Copy what a server needs of an installation, readable by all: 35 MB, about 0.15 s.

    PostgreSQL finds its libraries and its share relative to the binaries. Not cached between
    starts: a copy in the server's own directory goes when that goes, and can't be out of date.
    """
    os.makedirs(os.path.join(target, "bin"))
    for name in ("initdb", "postgres"):
        shutil.copy(os.path.join(source, "bin", name), os.path.join(target, "bin", name))
    for name in ("lib", "share"):
        shutil.copytree(
            os.path.join(source, name),
            os.path.join(target, name),
            ignore=shutil.ignore_patterns("*.a", "pgxs", "pkgconfig"),
            copy_function=shutil.copy,
        )
    for folder, _, files in os.walk(target):
        os.chmod(folder, 0o755)
        for file in files:
            path = os.path.join(folder, file)
            os.chmod(path, 0o755 if os.stat(path).st_mode & 0o100 else 0o644)


# -- the supervisor ------------------------------------------------------------------------------


def _setting(name: str, value: str) -> str:
    quoted = value.replace("\\", "\\\\").replace("'", "''")
    return f"{name} = '{quoted}'\n"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Supervisor:
    """Runs one server for one owner.

    :param spec: what `EmbeddedPostgres` sends: ``owner`` (its identity), ``binaries``, ``parents``
        (where to make the directory), ``settings``, ``files`` (certificate, key and CA as PEM) and
        ``port`` (tried first; None: any).
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.spec = spec
        self.owner: Identity = (spec["owner"][0], spec["owner"][1])
        self.directory = ""
        self.port = 0
        self._lock = -1
        self._server: subprocess.Popen[bytes] | None = None
        self._asked_to_stop = False
        self._run_as: dict[str, Any] = {}
        self._server_ids: tuple[int, int] | None = None
        if os.geteuid() == 0:
            user = pwd.getpwnam(SERVER_USER)
            self._server_ids = (user.pw_uid, user.pw_gid)
            self._run_as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._wakeup, wakeup_in = os.pipe()
        os.set_blocking(wakeup_in, False)
        signal.set_wakeup_fd(wakeup_in, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, _number: int, _frame: object) -> None:
        self._asked_to_stop = True

    def _wanted(self) -> bool:
        return not self._asked_to_stop and alive(self.owner)

    def _pause(self, seconds: float) -> None:
        """Sleep; a signal ends it at once."""
        if select.select([self._wakeup], [], [], seconds)[0]:
            os.read(self._wakeup, 64)

    def path(self, *names: str) -> str:
        return os.path.join(self.directory, *names)

    def log_tail(self, lines: int = 25) -> str:
        try:
            with open(self.path("server.log"), encoding="utf-8", errors="replace") as log:
                return "".join(log.readlines()[-lines:]).rstrip()
        except OSError:
            return ""

    def start(self) -> None:
        """Start the server; raise `StartFailed` or `Unwanted`. Whatever happens, call `stop`."""
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        os.umask(0o077)
        self.directory, self._lock = claim(self.spec["parents"])
        with open(self.path("owner"), "w", encoding="utf-8") as file:
            file.write(f"{self.owner[0]} {self.owner[1]}\n")
        binaries = self._usable_binaries()
        for name in ("data", "socket"):
            os.mkdir(self.path(name), 0o700)
            self._give_to_server(self.path(name))
        self._initdb(binaries)
        self._configure()
        for attempt in range(PORT_TRIES):
            self.port = (attempt == 0 and self.spec["port"]) or _free_port()
            if self._start_server(binaries):
                return
        raise StartFailed(
            f"{PORT_TRIES} free ports of 127.0.0.1, the last of them {self.port}, were taken by others "
            f"before the server could listen there; start it again. The server's log ends:\n{self.log_tail()}"
        )

    def _usable_binaries(self) -> str:
        binaries: str = self.spec["binaries"]
        postgres = os.path.join(binaries, "postgres")
        # PostgreSQL asks access() about its own files, which counts no capability of this process.
        readable = bool(self._run_as) or os.access(postgres, os.R_OK | os.X_OK)
        if readable and _runs(postgres, **self._run_as):
            return binaries
        if not _runs(postgres):
            raise StartFailed(f"{postgres} --version fails: it is no PostgreSQL server for this machine")
        install = os.path.dirname(binaries)
        if not all(os.path.isdir(os.path.join(install, name)) for name in ("lib", "share")):
            raise StartFailed(
                f"PostgreSQL refuses to run as root, and user {SERVER_USER!r} can't run {postgres}; it can't "
                f"be copied either, since {install} has no lib and share beside the binaries. Give that "
                "user access to it, or start as an ordinary user."
            )
        _copy_install(install, self.path("install"))
        copied = self.path("install", "bin")
        if not _runs(os.path.join(copied, "postgres"), **self._run_as):
            raise StartFailed(
                f"user {SERVER_USER!r} can run neither {postgres} nor the copy of it in {copied}; is that "
                "file system mounted noexec? Set TMPDIR to a directory of another."
            )
        return copied

    def _give_to_server(self, path: str) -> None:
        if self._server_ids is not None:
            os.chown(path, *self._server_ids)

    def _spawn(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PG", "LC_", "LANG", "PYTHON"))
        }
        supervisor = os.getpid()

        def die_with_the_supervisor() -> None:
            # Runs after the change of user, which would reset it.
            _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGQUIT), 0, 0, 0)
            if os.getppid() != supervisor:
                os._exit(1)

        with open(self.path("server.log"), "ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.path("data"),
                env=environment | {"LC_ALL": "C"},
                pass_fds=[self._lock],
                preexec_fn=die_with_the_supervisor,
                start_new_session=True,
                **self._run_as,
            )

    def _wait(self, process: subprocess.Popen[bytes], seconds: float, done: Callable[[], bool]) -> bool:
        """Wait until it is done or the process has ended; return whether it did either in time."""
        deadline = time.monotonic() + seconds
        while not done() and process.poll() is None:
            if not self._wanted():
                raise Unwanted
            if time.monotonic() > deadline:
                return False
            self._pause(0.01)
        return True

    def _initdb(self, binaries: str) -> None:
        options = (
            f"--auth=trust --username={SUPERUSER} --encoding=UTF8 --locale=C --no-sync --no-instructions"
        )
        command = [os.path.join(binaries, "initdb"), f"--pgdata={self.path('data')}", *options.split()]
        process = self._server = self._spawn(command)  # stop() ends it too, should we not come to its end
        if not self._wait(process, INITDB_SECONDS, lambda: False):
            raise StartFailed(
                f"initdb did not end within {INITDB_SECONDS:.0f} s; it wrote:\n{self.log_tail()}"
            )
        if process.returncode != 0:
            raise StartFailed(f"initdb failed with {process.returncode}; it wrote:\n{self.log_tail()}")
        os.truncate(self.path("server.log"), 0)

    def _configure(self) -> None:
        with open(self.path("data", "postgresql.conf"), "a", encoding="utf-8") as file:
            file.writelines(_setting(name, value) for name, value in self.spec["settings"].items())
            # Last, because the last line of a name counts. `settings` can't name these.
            file.write(_setting("unix_socket_directories", self.path("socket")))
        with open(self.path("data", "pg_hba.conf"), "w", encoding="utf-8") as file:
            file.write(f"local all all trust\nhost all {ROLE} 127.0.0.1/32 trust\n")
        for name, text in self.spec["files"].items():
            path = self.path(name)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            if name.startswith("data/"):
                self._give_to_server(path)
            else:
                os.chmod(path, 0o644)

    def _start_server(self, binaries: str) -> bool:
        """Return whether the server is ready; False where somebody else has the port."""
        process = self._server = self._spawn(
            [os.path.join(binaries, "postgres"), "-D", self.path("data"), "-p", str(self.port)]
        )
        if not self._wait(process, READY_SECONDS, self._ready):
            raise StartFailed(
                f"the server was not ready within {READY_SECONDS:.0f} s. Its log ends:\n{self.log_tail()}"
            )
        if process.poll() is None:
            return True
        if "could not bind IPv4 address" in self.log_tail():
            os.truncate(self.path("server.log"), 0)
            return False
        raise StartFailed(f"the server ended with {process.returncode}. Its log ends:\n{self.log_tail()}")

    def _ready(self) -> bool:
        # What pg_ctl waits for: line 8 of the file, written when connections are accepted.
        try:
            with open(self.path("data", "postmaster.pid"), encoding="utf-8") as file:
                lines = file.read().splitlines()
        except OSError:
            return False
        return len(lines) > 7 and lines[7].strip() == "ready"

    def answer(self) -> dict[str, Any]:
        assert self._server is not None
        return {
            "directory": self.directory,
            "port": self.port,
            "postmaster": identify(self._server.pid),
            "supervisor": identify(os.getpid()),
        }

    def watch(self) -> None:
        """Return when the server is wanted no more.

        A server that ended by itself is reaped, but its directory stays as long as it has an owner, who
        may want to read the log.
        """
        while self._wanted():
            if self._server is not None:
                self._server.poll()
            self._pause(TICK)

    def stop(self) -> None:
        """Stop the server, end its orphans, remove the directory. Bounded: 16 s at the worst."""
        if self._server is not None:
            for number, seconds in (
                (signal.SIGINT, FAST_STOP_SECONDS),
                (signal.SIGQUIT, IMMEDIATE_STOP_SECONDS),
                (signal.SIGKILL, 1.0),
            ):
                self._server.send_signal(number)  # does nothing once it has ended
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._server.wait(seconds)
                    break
        self._end_orphans()
        if self.directory:
            remove(self.directory)

    def _end_orphans(self) -> None:
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            for pid in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            self._pause(0.01)


def _answer(answer: Mapping[str, Any]) -> None:
    """Send the one line that the owner waits for, and let go of its pipes."""
    with contextlib.suppress(OSError):  # the owner is gone: `watch` sees to that
        os.write(1, json.dumps(answer).encode() + b"\n")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)


def main() -> None:
    """Read a specification from standard input, serve it, and end when its owner has no more use for it."""
    spec = json.loads(sys.stdin.readline())
    # The owner waits for this process and gets rid of it here: were the supervisor a child of the
    # owner's, an os.wait() of the application could wait for it.
    if os.fork():
        os._exit(0)
    os.chdir("/")
    supervisor = Supervisor(spec)
    failure = None
    try:
        supervisor.start()
        _answer(supervisor.answer())
        supervisor.watch()
    except StartFailed as error:
        failure = str(error)
    except Unwanted:
        failure = "asked to stop before the server was ready"
    except Exception:
        failure = traceback.format_exc()
    supervisor.stop()
    if failure is not None:
        _answer({"error": failure})  # after the stop, so that who reads it finds nothing left


if __name__ == "__main__":
    main()
