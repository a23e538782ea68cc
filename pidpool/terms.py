"""The words with a fixed set of values, each set in one place: events, stats, metrics, logs and pages all
take theirs from here. Plain strings, since they are written to logs as they are; mypy checks them.
"""

from __future__ import annotations

from typing import Literal, get_args

ConnectionState = Literal["idle", "used"]
"""What a connection is doing now: in the pool, or checked out."""

StateAtFork = Literal["idle", "no transaction", "in transaction", "unknown"]
"""What an inherited connection was doing at the fork. Unknown: the driver can't say it without I/O."""

OPEN_STATES: tuple[StateAtFork, ...] = ("in transaction", "unknown")
"""States at the fork in which a connection has, or may have, an open transaction."""

SocketAction = Literal["severed", "kept"]
"""What became of an inherited descriptor: a dead socket stands over it, or it was left alone."""

Trigger = Literal["hook", "lazy"]
"""What noticed a fork: the at-fork hook of Python, or the first use of a pool."""

CloseReason = Literal[
    "recycled",
    "invalidated",
    "overflow",
    "disposed",
    "detached",
    "failed",
    "given back",
    "idle",
    "collected",
]
"""Why a process closed a connection that it owns. Collected: an async checkout was dropped, not closed,
or an interrupt has lost it."""

OnForeign = Literal["replace", "refuse"]
"""What a child does that uses an inherited connection."""

InheritedSockets = Literal["sever", "keep"]
"""What a child does with the descriptors that it inherits."""

CONNECTION_STATES: tuple[ConnectionState, ...] = get_args(ConnectionState)
STATES_AT_FORK: tuple[StateAtFork, ...] = get_args(StateAtFork)
SOCKET_ACTIONS: tuple[SocketAction, ...] = get_args(SocketAction)
TRIGGERS: tuple[Trigger, ...] = get_args(Trigger)
CLOSE_REASONS: tuple[CloseReason, ...] = get_args(CloseReason)
ON_FOREIGN: tuple[OnForeign, ...] = get_args(OnForeign)
INHERITED_SOCKETS: tuple[InheritedSockets, ...] = get_args(InheritedSockets)
