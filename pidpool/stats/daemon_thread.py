"""Starts a daemon thread, and waits for a bounded time only until it runs.

If there is no memory left for it, a new thread may end before it runs any of Python's code. `Thread.start`
then waits for it for ever
(tests/forks/test_faults.py::test_a_child_at_its_limit_of_memory_does_its_parent_no_harm).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

START_WAIT = 5.0
"""Seconds that the start of a thread takes at most."""


class _BoundedEvent(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(START_WAIT if timeout is None else timeout)


def start(name: str, target: Callable[..., object], *arguments: Any) -> threading.Thread:
    """Start a daemon thread and return it.

    :raises RuntimeError: if there are no more threads to be had, or the interpreter is ending.
    """
    thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    if hasattr(thread, "_started"):  # an Event that `Thread.start` waits for
        thread._started = _BoundedEvent()
    thread.start()
    return thread
