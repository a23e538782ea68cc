"""The values that the cells of a slot can hold."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine

from pidpool import PidPool, tag_of
from pidpool.drivers import Driver
from pidpool.forks import ownership


@pytest.mark.parametrize("server_pid", [None, 0, 4711, (1 << 31) - 1, -(1 << 31), -2])
def test_any_server_pid_is_reported(monkeypatch: pytest.MonkeyPatch, server_pid: int | None) -> None:
    """PgBouncer gives out random ones, every second of which is negative."""

    class Random(Driver):
        def server_pid(self, connection: object) -> int | None:
            return server_pid

    monkeypatch.setattr(ownership, "driver_of", lambda connection: Random())
    engine = create_engine("sqlite://", poolclass=PidPool)
    with engine.connect() as connection:
        assert isinstance(engine.pool, PidPool)
        tag = tag_of(connection)
        (listed,) = engine.pool.stats().connections
        assert tag is not None and listed.tag.server_pid == tag.server_pid == server_pid
    engine.dispose()
