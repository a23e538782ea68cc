"""The fields of pidpool's own events, and those that structlog adds to every line. Any other field was added
by the user's configuration.
"""

from __future__ import annotations

EVERY_LINE = frozenset(["event", "level", "timestamp", "logger", "logger_name"])
"""Fields that structlog's usual processors add."""

PIDPOOL = frozenset(
    [
        *("pool", "pid", "at"),
        *("connection_id", "owner_pid", "fd", "socket_inode", "server_pid", "opened_at"),
        *("create_time", "wait_time", "use_time", "reason", "soft", "error"),
        *("size", "overflow", "checked_out", "held", "hold_warning", "where", "forked_at"),
        *("idle", "in_transaction", "state", "action", "by", "by_server_pid"),
        *("parent_pid", "trigger", "connects_in_flight", "closed"),
        *("processes", "maximum", "server_max_connections", "family", "driver", "has_descriptor"),
        *("family_limit", "family_used", "family_idle", "family_wanting", "holders"),
        *("other_limit", "other_pid"),
    ]
)
"""The fields that the methods of `PoolEvents` write; tests/tools/test_logs.py compares the two."""
