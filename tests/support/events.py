"""Events as a test sees them: a structlog logger that keeps what pidpool logs."""

from __future__ import annotations

from typing import Any

import structlog

TAG = {"connection_id", "owner_pid", "fd", "socket_inode", "server_pid", "opened_at"}

COUNTS = {"idle", "checked_out", "in_transaction"}
FAMILY = {"family_limit", "family_used", "family_idle", "family_wanting", "holders"}
LEVELS_AND_FIELDS = {
    "connection.opened": ("info", TAG | {"create_time"}),
    "connection.failed": ("warning", {"error", "create_time"}),
    "connection.checked_out": ("debug", TAG | {"wait_time"}),
    "connection.checked_in": ("debug", TAG | {"use_time"}),
    "connection.invalidated": ("info", TAG | {"soft", "error"}),
    "connection.closed": ("info", TAG | {"reason"}),
    "connection.given_back": ("info", TAG | {"idle"}),
    "connection.inherited": ("warning", TAG | {"state", "action", "where", "forked_at"}),
    "connection.replaced": ("info", TAG | {"by", "by_server_pid"}),
    "connection.refused": ("warning", TAG | {"state"}),
    "checkout.timed_out": ("warning", {"wait_time", "size", "overflow", "checked_out", *FAMILY}),
    "checkout.overdue": ("warning", TAG | {"held", "hold_warning", "where"}),
    "checkout.returned_late": ("warning", TAG | {"use_time", "hold_warning", "where"}),
    "pool.forked": ("info", COUNTS | {"forked_at"}),
    "pool.adopted": ("info", COUNTS | {"parent_pid", "trigger", "connects_in_flight", "forked_at"}),
    "pool.disposed": ("info", {"closed", "checked_out"}),
    "family.private": ("warning", {"family", "reason"}),
    "family.limits_differ": ("warning", {"family", "family_limit", "other_limit", "other_pid"}),
    "driver.unknown": ("warning", {"driver", "has_descriptor"}),
    "pool.over_maximum": ("warning", {"processes", "maximum", "server_max_connections"}),
}


class Events:
    """All events logged through `logger` in this process; a child begins with a copy of its parent's."""

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
