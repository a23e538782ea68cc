"""Events as a test sees them: a structlog logger that keeps what pidpool tells."""

from __future__ import annotations

from typing import Any

import structlog

TAG = {"connection_id", "owner_pid", "fd", "socket_inode", "server_pid", "opened_at"}


class Events:
    """All events told through `logger` in this process, a child's copy of the parent's included."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []
        self.logger = structlog.wrap_logger(
            structlog.ReturnLogger(),
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                self._keep,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(0),
        )

    def _keep(self, _: Any, __: str, event: Any) -> Any:
        self.all.append(dict(event))
        raise structlog.DropEvent

    @property
    def names(self) -> list[str]:
        return [event["event"] for event in self.all]

    def of(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.all if event["event"] == name]

    def the(self, name: str) -> dict[str, Any]:
        (event,) = self.of(name)
        return event

    def clear(self) -> None:
        self.all.clear()
