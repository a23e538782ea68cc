"""Forks while OpenSSL's lock of its list of threads is locked: ``python openssl_locked.py <url> <what>``.

OpenSSL frees a thread's part of the list with the lock held. Its memory functions are Python's here, so a
thread stops in the middle of that for as long as it is wanted. Prints what was seen.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

url, what = sys.argv[1:]

libc = ctypes.PyDLL(None)
libc.malloc.restype = libc.realloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
is_to_stop, has_stopped, go_on = threading.Event(), threading.Event(), threading.Event()
without_gil: list[int] = []
"""The threads that left the list when Python had already forgotten them."""


def malloc(size: int, file: bytes, line: int) -> Any:
    return libc.malloc(size)


def realloc(address: int, size: int, file: bytes, line: int) -> Any:
    return libc.realloc(address, size)


def free(address: int, file: bytes, line: int) -> None:
    if file is not None and file.endswith(b"initthread.c") and sys._getframe().f_back is None:
        without_gil.append(threading.get_native_id())
        if is_to_stop.is_set():
            is_to_stop.clear()
            has_stopped.set()
            go_on.wait()
    libc.free(address)


functions = (
    ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int)(malloc),
    ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int)(
        realloc
    ),
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int)(free),
)
psycopg2 = importlib.util.find_spec("psycopg2")
assert psycopg2 is not None and psycopg2.origin is not None
(path,) = glob.glob(str(Path(psycopg2.origin).parents[1] / "psycopg2_binary.libs" / "libcrypto*"))
openssl = ctypes.CDLL(path)
assert openssl.CRYPTO_set_mem_functions(*functions) == 1

from sqlalchemy import create_engine, text  # noqa: E402  after OpenSSL has its functions

from pidpool import PidPool  # noqa: E402
from pidpool.forks import openssl as of_pidpool  # noqa: E402

of_pidpool.LOCK_WAIT = 1.0
engine = create_engine(url, poolclass=PidPool)


def in_thread(function: Any) -> Any:
    """Return what a function returned, or raised, in a thread of its own."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


def use() -> int:
    with engine.connect() as own:
        return int(own.scalar(text("select pg_backend_pid()")))


def stop_a_thread_in_the_middle() -> None:
    """Have a thread that is not Python's use OpenSSL and end."""
    is_to_stop.set()
    begin = ctypes.cast(openssl.ERR_clear_error, ctypes.c_void_p)
    assert libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, begin, None) == 0
    assert has_stopped.wait(20)


def fork(function: Any) -> str:
    """Return the first line of what a child said, within 20 seconds."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            said = str(function())
        except BaseException as error:
            said = "".join(traceback.format_exception_only(error))
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        said = answer.read().replace("\n", " ")
    os.waitpid(pid, 0)
    return said or "the child hung"


server_pid = use()


def use_and_leave() -> str:
    used = use()
    engine.dispose()
    return "used" if used != server_pid else "used its parent's"


def from_a_thread() -> str:
    fork(lambda: None)  # from here on it is on the list, as before every fork
    stop_a_thread_in_the_middle()
    try:
        return fork(use_and_leave if what == "forked thread" else lambda: in_thread(use_and_leave))
    finally:
        go_on.set()
        # It needs the GIL for that, as no other has to: this thread's own end would wait for it with the GIL.
        while Path(f"/proc/self/task/{without_gil[0]}").exists():
            time.sleep(0.001)


if what == "ends":
    tasks = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        assert in_thread(use) == server_pid  # the connection is idle again
    while len(os.listdir("/proc/self/task")) > tasks:  # they end in C later than in Python
        time.sleep(0.001)
    print(len(without_gil), "left the list without the GIL")
else:
    print(in_thread(from_a_thread))
    assert use() == server_pid
engine.dispose()
sys.stdout.flush()
os._exit(0)  # OpenSSL's own end would call Python's functions when there are none
