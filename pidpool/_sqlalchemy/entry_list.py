"""`EntryList`: the entries of a pool that are alive. Their number is what the pool has of its capacity.

Nothing adds and subtracts by hand. An entry that was lost by an interrupt is collected, so it counts no more.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any, Protocol


class Member(Protocol):
    """An entry, as far as its list needs it."""

    members: EntryList | None
    fairy_ref: Any


class EntryList:
    """The entries of one pool in one process. A forked child's pool has a new one.

    Threads: any number may use it. There is no lock, which an interrupt could leave locked: each step is one
    call of C's own dict.
    """

    __slots__ = ("references",)

    def __init__(self) -> None:
        # Without callbacks: CPython has one such reference for each entry, however often it is asked for.
        self.references: dict[int, weakref.ref[Member]] = {}
        """By `id()`."""

    def add(self, entry: Member, limit: int | None) -> bool:
        """Add an entry, if there are fewer than `limit`; return whether it was added."""
        key = id(entry)
        self.references[key] = weakref.ref(entry)
        # Afterwards, and by their order: of two threads for one place only the first has it.
        if limit is not None and key not in list(self.references)[: max(limit, 0)]:
            self.references.pop(key, None)
            return False
        entry.members = self
        return True

    def remove(self, entry: Member) -> None:
        """Remove an entry, which is in no list from then on."""
        entry.members = None
        self.references.pop(id(entry), None)

    def forget_collected(self) -> None:
        """Forget the entries that are alive no more."""
        for key, reference in list(self.references.items()):
            if reference() is None and self.references.get(key) is reference:
                self.references.pop(key, None)

    def __len__(self) -> int:
        """Return how many there are, perhaps with some that are lost. Looks at no entry."""
        return len(self.references)

    def __contains__(self, entry: object) -> bool:
        reference = self.references.get(id(entry))
        return reference is not None and reference() is entry


def take_lost(entries: Iterable[Member]) -> list[Member]:
    """Return the entries whose checkouts have ended without them, which are in no list from then on."""
    found = []
    for entry in entries:
        members, key = entry.members, id(entry)
        if members is None or not _is_lost(entry):
            continue
        # For one thread only, and without a call in between: another thread could return the entry meanwhile,
        # and a third one check it out.
        if members.references.pop(key, None) is not None:
            entry.members = None
            found.append(entry)
    return found


def _is_lost(entry: Member) -> bool:
    """Return whether an entry's checkout was dropped, and interrupted before it began to return the entry."""
    reference = entry.fairy_ref
    if reference is None or reference is GONE:
        return False  # it is idle, or a thread has it that opens, returns or closes it
    checkout = reference()
    # The traceback of such an interrupt may keep both. Python finalizes no object twice.
    has_ended = checkout is None or gc.is_finalized(checkout)
    # Again, since another thread may have returned the entry meanwhile: then its checkout ended afterwards.
    return has_ended and entry.fairy_ref is reference


def _ended() -> weakref.ref[Any]:
    class Something: ...

    something = Something()
    reference = weakref.ref(something)
    hash(reference)  # while it can be; SQLAlchemy 2.0 looks it up in a dict
    return reference


GONE = _ended()
"""A weak reference to an object that has gone: to the checkout of an entry that a finalizer is returning."""
