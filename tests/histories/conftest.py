"""The stage of this room's tests: a server of its own, since histories end sessions and restart it. It lasts
for a module: its threads would be one thing more in the processes whose forks other tests look at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from histories import Stage


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        yield stage
