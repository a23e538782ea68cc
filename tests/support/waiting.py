"""Bounded waits for another thread or process: the condition is looked at again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 60.0


def until(
    condition: Callable[[], Any], what: str, patience: float = PATIENCE, interval: float = 0.005
) -> Any:
    """Return the first true value of `condition()`, called every `interval` seconds.

    Fail with `what` after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, what
        time.sleep(interval)
