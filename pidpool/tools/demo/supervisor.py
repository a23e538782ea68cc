"""The process that runs an embedded PostgreSQL, and removes all of it when its owner ends.

`postgres.py` starts this file by its path with ``python -I -S``, so it imports only the standard
library. It is a process of its own for three reasons: no handler runs in an owner that gets SIGKILL,
the owner's forked children hold its pipes open, and a death signal (PR_SET_PDEATHSIG) comes when the
thread that forked ends. A supervisor has one thread, so its server can have a death signal.

Each case has its test in tests/tools/test_demo_postgres.py:

* The owner ends or asks for a stop: the supervisor stops the server and removes its directory.
* The supervisor is killed: the kernel sends the server SIGQUIT, and the owner removes the directory.
* The server is killed: its orphans become children of the supervisor (PR_SET_CHILD_SUBREAPER), which
  kills them and removes the shared memory that the server left.

If the owner and the supervisor get SIGKILL at the same moment, or the supervisor while it starts the
server, the server ends and its directory stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PREFIX = "pidpool-pg-"
SERVER_USER = "nobody"  # runs the server of an owner that is root: PostgreSQL refuses to run as root
SUPERUSER = "postgres"  # logs in over the unix socket only, which other users can't reach
ROLE = "pidpool"  # any user of this machine can log in with it, so it is no superuser

INITDB_SECONDS = 60.0
READY_SECONDS = 30.0
FAST_STOP_SECONDS = 5.0

# A socket's path may have 107 bytes: sizeof(sockaddr_un.sun_path) less its closing zero.
_PARENT_BYTES = 107 - len(f"/{PREFIX}8letters/socket/.s.PGSQL.65535")
_SYS_PIDFD_OPEN = 434
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_IPC_RMID = 0

_libc = ctypes.CDLL(None, use_errno=True)


class StartFailed(Exception):
    """The server did not start; the text is for the owner."""


def open_pidfd(pid: int) -> int:
    """Return a descriptor that becomes readable when the process ends, also if it stays a zombie.

    Not `os.pidfd_open`: Python lacks it if it was built for an old kernel.
    """
    descriptor: int = _libc.syscall(_SYS_PIDFD_OPEN, pid, 0)
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"pidfd_open({pid}), in Linux since 5.3: {os.strerror(number)}")
    return descriptor


def readable(*descriptors: int, seconds: float | None) -> bool:
    """Wait until one of the descriptors is readable; return whether one is."""
    poll = select.poll()  # unlike select(), for descriptors above 1023 too
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


class Supervisor:
    """Runs one server; `main` is its life.

    :param owner_ended: pidfd of the process that the server is for.
    :param binaries: directory with ``initdb`` and ``postgres``.
    """

    def __init__(self, owner_ended: int, binaries: str) -> None:
        self._owner_ended = owner_ended
        self._binaries = Path(binaries)
        self._directory = Path()
        self._server: subprocess.Popen[bytes] | None = None
        self._root = os.geteuid() == 0
        self._user: dict[str, Any] = {}
        if self._root:
            group = pwd.getpwnam(SERVER_USER).pw_gid
            self._user = {"user": SERVER_USER, "group": group, "extra_groups": []}
        self._stop_asked, signalled = os.pipe()
        os.set_blocking(signalled, False)
        signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def unwanted(self, seconds: float | None) -> bool:
        """Wait until the owner ends or asks for a stop; return whether it did."""
        return readable(self._owner_ended, self._stop_asked, seconds=seconds)

    def start(
        self, parents: list[str], settings: Mapping[str, str], files: Mapping[str, str], ports: list[int]
    ) -> dict[str, Any]:
        """Start the server and return its facts. Call `stop` afterwards, also if this raises.

        :param parents: where to make the server's directory; the first that will do.
        :param settings: names and values for ``postgres -c``.
        :param files: names in the server's directory and what to write there.
        :param ports: TCP ports to try.
        """
        self._directory = self._make_directory(parents)
        self._use_binaries()
        for name in ("data", "socket"):
            (self._directory / name).mkdir(mode=0o700)
            self._give_to_server(name)
        # stop() ends initdb too, so it counts as the server.
        options = f"--auth=trust --username={SUPERUSER} --encoding=UTF8 --locale=C --no-sync"
        self._server = self._spawn("initdb", "-D", "data", *options.split())
        self._wait("initdb", INITDB_SECONDS, lambda: False)
        if self._server.returncode != 0:
            raise StartFailed(f"initdb failed with {self._server.returncode}; it wrote:\n{self._log_tail()}")
        access = f"local all all trust\nhost all {ROLE} 127.0.0.1/32 trust\n"
        for name, text in {**files, "data/pg_hba.conf": access}.items():
            (self._directory / name).write_text(text, encoding="utf-8")
            self._give_to_server(name)
        (self._directory / "ca.pem").chmod(0o644)
        arguments = [f"-c{name}={value}" for name, value in settings.items()]
        arguments += ["-D", "data", "-k", str(self._directory / "socket")]
        for port in ports:
            os.truncate(self._directory / "server.log", 0)
            self._server = self._spawn("postgres", *arguments, "-p", str(port))
            self._wait("the server", READY_SECONDS, self._ready)
            if self._server.poll() is None:
                pids = {"supervisor": os.getpid(), "postmaster": self._server.pid}
                return {**pids, "directory": str(self._directory), "port": port}
            if "could not bind" not in self._log_tail():
                break
        raise StartFailed(
            f"the server ended with {self._server.returncode}. Its log ends:\n{self._log_tail()}"
        )

    def stop(self) -> None:
        """Stop the server, kill its orphans, and remove its shared memory and its directory."""
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)  # a fast shutdown
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(FAST_STOP_SECONDS)
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        with contextlib.suppress(ChildProcessError):
            while True:
                for pid in children.read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
                os.waitpid(-1, 0)
        if self._directory.name:
            remove(self._directory)

    # -- before the server starts ----------------------------------------------------------------

    def _within_reach(self, path: Path) -> bool:
        """Return whether the server's user may read this and pass through what is above it."""
        if self._root:
            return all(each.stat().st_mode & 0o5 == 0o5 for each in (path, *path.parents))
        # access() counts no capability of this process. PostgreSQL checks its own files with it.
        return os.access(path, os.R_OK | os.X_OK)

    def _make_directory(self, parents: list[str]) -> Path:
        for parent in map(Path, parents):
            with contextlib.suppress(OSError):
                if len(os.fsencode(parent)) <= _PARENT_BYTES and self._within_reach(parent):
                    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
                    directory.chmod(0o755 if self._root else 0o700)
                    return directory
        reach = f", that user {SERVER_USER!r} can read" if self._root else ""
        raise StartFailed(
            f"can't make a directory for a server in {', '.join(parents)}. Set TMPDIR to a writable "
            f"directory{reach}, with a path of at most {_PARENT_BYTES} bytes."
        )

    def _use_binaries(self) -> None:
        """Copy the binaries (40 MB, 0.2 s) if the server's user can't reach them."""
        if self._within_reach(self._binaries / "postgres"):
            return
        try:
            # PostgreSQL finds lib and share by their place beside its binaries.
            for name in (self._binaries.name, "lib", "share"):
                shutil.copytree(self._binaries.parent / name, self._directory / "install" / name)
            subprocess.run(["chmod", "-R", "a+rX", self._directory / "install"], check=True, timeout=30)
        except (OSError, subprocess.SubprocessError) as error:
            raise StartFailed(
                f"the server's user can't reach these binaries, and copying them failed: {error}. They are "
                "no PostgreSQL server for this machine, or other users need access to them."
            ) from error
        self._binaries = self._directory / "install" / self._binaries.name

    def _give_to_server(self, name: str) -> None:
        if self._root:
            shutil.chown(self._directory / name, SERVER_USER)

    # -- the server ------------------------------------------------------------------------------

    def _spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        supervisor = os.getpid()

        def die_with_the_supervisor() -> None:
            # Runs after the change of user, which would reset it.
            _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGQUIT), 0, 0, 0)
            if os.getppid() != supervisor:
                os._exit(1)

        try:
            with open(self._directory / "server.log", "ab") as log:
                return subprocess.Popen(
                    [str(self._binaries / program), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._directory,
                    env=environment | {"LC_ALL": "C"},
                    preexec_fn=die_with_the_supervisor,
                    start_new_session=True,
                    **self._user,
                )
        except OSError as error:
            raise StartFailed(
                f"{error}: this is no PostgreSQL server for this machine, or its file system is mounted "
                "noexec; then set TMPDIR to a directory of another one"
            ) from error

    def _wait(self, name: str, seconds: float, ready: Callable[[], bool]) -> None:
        """Wait until it is ready or has ended."""
        assert self._server is not None
        deadline = time.monotonic() + seconds
        while self._server.poll() is None and not ready():
            if self.unwanted(0.01):
                raise StartFailed("its owner ended, or asked it to stop, before the server was ready")
            if time.monotonic() > deadline:
                raise StartFailed(f"{name} took more than {seconds:.0f} s; it wrote:\n{self._log_tail()}")

    def _ready(self) -> bool:
        # pg_ctl waits for this too: the last line of the file, written when the server takes clients.
        with contextlib.suppress(OSError):
            status = (self._directory / "data" / "postmaster.pid").read_text(encoding="utf-8")
            return status.rstrip().endswith("\nready")
        return False

    def _log_tail(self) -> str:
        log = (self._directory / "server.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(log.splitlines()[-25:])


def remove(directory: Path) -> None:
    """Remove a server's directory and, if the server was killed, its System V shared memory."""
    # PostgreSQL always makes one segment, to see that a second server in the directory is refused.
    # Line 7 of the file holds its key and id; the file is gone after an orderly stop.
    with contextlib.suppress(OSError, IndexError):
        lines = (directory / "data" / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        _libc.shmctl(int(lines[6].split()[1]), _IPC_RMID, None)
    shutil.rmtree(directory, ignore_errors=True)


def _answer(answer: Mapping[str, Any]) -> None:
    """Write the one line that the owner waits for, and close the owner's pipes and terminal."""
    with contextlib.suppress(OSError):  # the owner has ended
        os.write(1, json.dumps(answer).encode() + b"\n")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)


def main() -> None:
    """Read what to run from standard input, run it, and remove it when its owner ends."""
    request = json.loads(sys.stdin.readline())
    owner = request.pop("owner")
    owner_ended = open_pidfd(owner)
    # The owner reaps this process at once. Otherwise its own os.wait() could meet the supervisor.
    if os.getppid() != owner or os.fork():
        os._exit(0)
    os.chdir("/")
    os.umask(0o077)
    supervisor = Supervisor(owner_ended, request.pop("binaries"))
    failure = None
    try:
        _answer(supervisor.start(**request))
        supervisor.unwanted(None)
    except Exception as error:
        failure = str(error) if isinstance(error, StartFailed) else traceback.format_exc()
    supervisor.stop()
    if failure is not None:
        _answer({"error": failure})  # after the stop, so that the owner finds nothing left


if __name__ == "__main__":
    main()
