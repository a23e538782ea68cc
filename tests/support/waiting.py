"""Bounded waits for another thread or process: the condition is looked at again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 60.0


def until(
    condition: Callable[[], Any],
    failure: str | Callable[[], str],
    patience: float = PATIENCE,
    interval: float = 0.005,
) -> Any:
    """Return the first true value of `condition()`, called every `interval` seconds.

    Fail with `failure`, or with what it returns then, after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, failure if isinstance(failure, str) else failure()
        time.sleep(interval)
