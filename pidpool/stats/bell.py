"""`Bell`: wakes sleeping threads of any process by a cell of memory that they share; a futex (futex(2)).

Where there is none, a sleeper looks at the cell each 50 ms: on other systems than Linux, on a processor whose
number of the call is not known here, and under gevent or eventlet, whose loop a sleep in C would stop.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import time

LOOK = 0.05
"""Seconds between two looks where there is no futex."""

_CALLS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "loongarch64": 98, "ppc64le": 221}
_WAIT, _WAKE = 0, 1
_ALL = (1 << 31) - 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _call_number() -> int | None:
    is_64 = ctypes.sizeof(ctypes.c_void_p) == 8 and sys.byteorder == "little"
    return _CALLS.get(platform.machine()) if sys.platform == "linux" and is_64 else None


_number = _call_number()
_c = ctypes.CDLL(None) if _number is not None else None


def _is_in_greenlets() -> bool:
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    return bool(
        (gevent is not None and gevent.is_module_patched("threading"))
        or (eventlet is not None and eventlet.is_monkey_patched("thread"))
    )


class Bell:
    """A bell in one cell of shared memory.

    :param cell: the cell, which counts how often it was rung.
    """

    def __init__(self, cell: memoryview) -> None:
        self._cell = cell
        self._word = ctypes.c_uint32.from_buffer(cell)

    def heard(self) -> int:
        """Return a number that is another one after the next ring."""
        return self._word.value

    def ring(self) -> None:
        """Wake all that sleep."""
        # Two rings at once may count as one: each sleeper still sees another number.
        self._word.value = (self._word.value + 1) & 0xFFFFFFFF
        if _c is not None and _number is not None:
            _c.syscall(_number, ctypes.byref(self._word), _WAKE, _ALL, None, None, 0)

    def sleep(self, heard: int, seconds: float) -> None:
        """Return after the bell was rung, counted from `heard`, or after so many seconds at most."""
        if _c is not None and _number is not None and not _is_in_greenlets():
            limit = _Timespec(int(seconds), int(seconds % 1 * 1e9))
            word = ctypes.byref(self._word)
            _c.syscall(_number, word, _WAIT, ctypes.c_uint32(heard), ctypes.byref(limit), None, 0)
            return
        deadline = time.monotonic() + seconds
        while self._word.value == heard and time.monotonic() < deadline:
            time.sleep(min(LOOK, max(0.0, deadline - time.monotonic())))
