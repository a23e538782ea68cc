"""Reads the processes of this machine from /proc: the tree that they form, which sockets each one holds, and
how each came to be. Linux only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from pidpool.stats.process import PARENT, START_TIME, STATE, read_stat


@dataclass(frozen=True)
class Process:
    """A process at the time of the scan."""

    pid: int
    parent_pid: int
    name: str
    command: str
    """The command line, passwords masked; the name if the command line can't be read."""
    user: str
    started_at: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Entry:
    """A process as /proc/PID/stat describes it, which every user may read."""

    pid: int
    parent_pid: int
    name: str
    start: int
    """Clock ticks after the boot. A later process with the same pid has another value."""
    forked: bool
    """Whether it still runs the memory that it was forked with: it has not called exec itself."""


_FLAGS = 6
_FORKED_NO_EXEC = 0x40  # PF_FORKNOEXEC of linux/sched.h
_KERNEL_THREAD = 0x200000  # PF_KTHREAD


def read_entry(pid: int) -> Entry | None:
    """Return None for a process without descriptors: an ended one, or a thread of the kernel."""
    try:
        fields = read_stat(pid)
        flags = int(fields[_FLAGS])
        if fields[STATE] in (b"Z", b"X") or flags & _KERNEL_THREAD:
            return None
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").removesuffix("\n")
    except OSError:
        return None
    forked = bool(flags & _FORKED_NO_EXEC)
    return Entry(pid, int(fields[PARENT]), name, int(fields[START_TIME]), forked)


def read_tree() -> dict[int, Entry]:
    """Return all processes by pid."""
    entries = (read_entry(pid) for pid in psutil.pids())
    return {entry.pid: entry for entry in entries if entry is not None}


def ancestors(tree: Mapping[int, Entry], pid: int) -> Iterator[int]:
    """Yield parent, grandparent and so on; bounded, since a tree read bit by bit may have a circle."""
    for _ in range(len(tree)):
        entry = tree.get(pid)
        if entry is None or entry.parent_pid not in tree:
            return
        pid = entry.parent_pid
        yield pid


def forked_from(tree: Mapping[int, Entry], entry: Entry) -> Iterator[int]:
    """Yield the ancestors whose memory, and with it whose descriptors, a process still has from its forks."""
    for pid in ancestors(tree, entry.pid):
        # An orphan's new parent is, as a rule, another program: init, a container's shim.
        if not entry.forked or not _same_program(entry, tree[pid]):
            return
        entry = tree[pid]
        yield pid


def _same_program(one: Entry, other: Entry) -> bool:
    try:
        return os.readlink(f"/proc/{one.pid}/exe") == os.readlink(f"/proc/{other.pid}/exe")
    except OSError:
        return one.name == other.name


def read_descriptors(tree: Mapping[int, Entry]) -> tuple[dict[int, dict[int, list[int]]], set[int]]:
    """Return the sockets of all processes, and the pids of those that this user may not look into."""
    descriptors, unreadable = {}, set()
    for entry in tree.values():
        try:
            descriptors[entry.pid] = socket_descriptors(entry.pid)
        except PermissionError:
            unreadable.add(entry.pid)
        except OSError:
            pass  # it has ended
    return descriptors, unreadable


def socket_descriptors(pid: int) -> dict[int, list[int]]:
    """Return the descriptors of a process's sockets by inode."""
    found: dict[int, list[int]] = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue  # closed meanwhile
        if target.startswith("socket:["):
            found.setdefault(int(target[8:-1]), []).append(int(name))
    return found


def holders_by_inode(descriptors: Mapping[int, Mapping[int, list[int]]]) -> dict[int, list[int]]:
    """Return the pids that hold each socket."""
    holders: dict[int, list[int]] = {}
    for pid, sockets in descriptors.items():
        for inode in sockets:
            holders.setdefault(inode, []).append(pid)
    return holders


def still_holds(entry: Entry, inode: int) -> bool:
    """Return whether a process still runs and still has the socket."""
    now = read_entry(entry.pid)
    try:
        return now is not None and now.start == entry.start and inode in socket_descriptors(entry.pid)
    except OSError:
        return False


# The password of a URL, of a DSN, and of an option such as --password.
_SECRET = re.compile(r"(?<=://)([^\s:/@]*):[^\s@]+(?=@)|(?i:(pass(?:word|wd)?[ =]))\S+")


def _masked(command: str) -> str:
    return _SECRET.sub(lambda match: f"{match[1]}:***" if match[1] is not None else f"{match[2]}***", command)


def describe(entry: Entry) -> Process:
    """Return a process with its user, its start and its command line, as far as they can be read."""
    command, user = "", "?"
    try:
        process = psutil.Process(entry.pid)
        with process.oneshot():
            user = process.username()
            command = _masked(" ".join(process.cmdline()).strip())
    except (psutil.Error, OSError):
        pass
    started_at = psutil.boot_time() + entry.start / os.sysconf("SC_CLK_TCK")
    return Process(entry.pid, entry.parent_pid, entry.name, command or entry.name, user, started_at)
