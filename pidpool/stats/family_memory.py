"""The memory of a family: pages that forked children inherit, or pages that any process of the same user can
find by the family's name.

A named family has a small file, which names a segment of shared memory (System V). The kernel frees the
segment with the last process that has it, however that ended. So nothing has to decide whether a family still
lives, nothing is left behind, and truncating, filling or deleting files can't take a page from a process.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LAYOUT = 2
"""Grows with every change of what the cells mean."""

DIRECTORY_VARIABLE = "PIDPOOL_FAMILY_DIR"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_TEXT = re.compile(rb"pidpool family: segment (\d{1,10}) key ([0-9a-f]{16})\n")
_PRIVATE_KEY, _CREATE, _REMOVE = 0, 0o1000, 0  # <sys/ipc.h>, <sys/shm.h>


class FamilyRefused(PermissionError):
    """The file of a family is not this user's own, or is none of pidpool's; the text names it."""


class NoSharedMemory(Exception):
    """A family can't be shared on this system at present; the text says why."""


def check_name(name: object) -> None:
    """Check the name of a family.

    :raises TypeError: if it is no string.
    :raises ValueError: if it can't be a file's name everywhere.
    """
    takes = (
        "takes 1 to 64 letters, digits, '_', '-' and '.' (not first), or None for this process and its forks"
    )
    if not isinstance(name, str):
        raise TypeError(f"family={name!r}: {takes}")
    if not _NAME.fullmatch(name):
        raise ValueError(f"family={name!r}: {takes}")


def anonymous(size: int) -> memoryview:
    """Return zeroed memory that children forked from now on share.

    :raises OSError: if there is none to be had.
    """
    return memoryview(mmap.mmap(-1, size))


_attached: dict[tuple[int, int], memoryview] = {}
"""The segments that this process has, by id and key. They stay for its life, as in a forked child."""


def named(
    name: str,
    shape: str,
    size: int,
    key_of: Callable[[memoryview], int],
    prepare: Callable[[memoryview, int], None],
) -> memoryview:
    """Return the memory of the family of this name, made afresh if no process has it.

    :param shape: the form of the memory; families of another form are kept apart by it.
    :param key_of: reads the key that `prepare` has written.
    :param prepare: called once for new memory, which is zeroed, with the key to write.
    :raises FamilyRefused: if the family's file is another user's, open to others, or no file of pidpool's.
    :raises NoSharedMemory: if the system gives none.
    """
    library = _library()
    with _locked_file(f"{name}.{_namespace('pid')}.{_namespace('ipc')}.{LAYOUT}-{shape}") as (file, path):
        text = os.pread(file, 100, 0)
        found = _TEXT.fullmatch(text)
        if text and not found:
            raise FamilyRefused(
                f"{path} is no file of pidpool's: it begins with {text[:20]!r}; remove it once no process of "
                f"the family {name!r} runs"
            )
        if found:
            segment, key = int(found[1]), int(found[2], 16)
            if (segment, key) in _attached:
                return _attached[segment, key]
            memory = _attach(library, segment, size)
            # A number of a segment may have been given to another one since.
            if memory is not None and key_of(memory) == key:
                return _attached.setdefault((segment, key), memory)
        segment, memory = _make(library, size)
        key = secrets.randbits(64) or 1
        prepare(memory, key)
        written = b"pidpool family: segment %d key %016x\n" % (segment, key)
        try:
            os.ftruncate(file, 0)
            if os.pwrite(file, written, 0) != len(written):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise NoSharedMemory(f"{path} can't be written: {error.strerror}") from None
        return _attached.setdefault((segment, key), memory)


# -- the file


@contextmanager
def _locked_file(name: str) -> Iterator[tuple[int, str]]:
    directory, path = _open_directory()
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            file = os.open(name, flags, 0o600, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EACCES):
                raise FamilyRefused(f"{path}/{name} is no plain file of this user's: remove it") from None
            raise NoSharedMemory(f"{path}/{name} can't be made: {error.strerror}") from None
    finally:
        os.close(directory)
    try:
        _check(os.fstat(file), stat.S_ISREG, 0o600, f"{path}/{name}")
        # A few system calls long, and let go by the kernel if its process is killed.
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file, f"{path}/{name}"
    finally:
        os.close(file)


def _open_directory() -> tuple[int, str]:
    """Open this user's own directory, made if it is not there."""
    parent = os.environ.get(DIRECTORY_VARIABLE) or ("/dev/shm" if os.path.isdir("/dev/shm") else None)
    path = os.path.join(parent or tempfile.gettempdir(), f"pidpool-{os.geteuid()}")
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise NoSharedMemory(f"{path} can't be made: {error.strerror}") from None
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise FamilyRefused(f"{path} is no directory of this user's: {error.strerror}; remove it") from None
    try:
        _check(os.fstat(directory), stat.S_ISDIR, 0o700, path)
    except BaseException:
        os.close(directory)
        raise
    return directory, path


def _check(found: os.stat_result, is_kind: Callable[[int], bool], most: int, path: str) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if not is_kind(found.st_mode) or found.st_uid != os.geteuid() or mode & ~most:
        raise FamilyRefused(
            f"{path} belongs to uid {found.st_uid} with mode {mode:04o}, not to uid {os.geteuid()} with mode "
            f"{most:04o}: remove it, or name another directory in {DIRECTORY_VARIABLE}"
        )


def _namespace(kind: str) -> int:
    """Return the number of this process's namespace: pids and segments mean nothing in another one."""
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:
        return 0


# -- the segment


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(None, use_errno=True)
        library.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
        library.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
        library.shmat.restype = ctypes.c_void_p
        library.shmctl.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    except (AttributeError, OSError, TypeError):
        raise NoSharedMemory("this system has no shared memory of System V") from None
    # Only Linux lets a process join a segment that is to be freed with the last one.
    if os.uname().sysname != "Linux" or fcntl is None:
        raise NoSharedMemory("named families need Linux")
    return library


def _attach(library: ctypes.CDLL, segment: int, size: int) -> memoryview | None:
    address = library.shmat(segment, None, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        return None  # it has gone with the last process that had it
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _make(library: ctypes.CDLL, size: int) -> tuple[int, memoryview]:
    segment = library.shmget(_PRIVATE_KEY, size, _CREATE | 0o600)
    if segment < 0:
        raise NoSharedMemory(f"the system gives no shared memory: {os.strerror(ctypes.get_errno())}")
    memory = _attach(library, segment, size)
    reason = os.strerror(ctypes.get_errno())
    library.shmctl(segment, _REMOVE, None)  # it lives as long as a process has it
    if memory is None:
        raise NoSharedMemory(f"the system gives no shared memory: {reason}")
    return segment, memory
