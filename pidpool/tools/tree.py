"""A tree of processes as lines: parents before children, the branches that are drawn before each name, and a
fair choice if there are too many. Used for the processes of a log and for those of a stats endpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, zip_longest
from typing import TypeVar

T = TypeVar("T")


def walk(roots: Sequence[T], children_of: Callable[[T], Sequence[T]]) -> Iterator[tuple[tuple[bool, ...], T]]:
    """Yield each item below its parent, in the given order of siblings.

    With each item comes one bool for it and for each ancestor below its root: whether it is the last of its
    siblings. Their number is the depth. The items must not form a circle.
    """
    pending: list[tuple[tuple[bool, ...], T]] = [((), root) for root in reversed(roots)]
    while pending:
        place, item = pending.pop()
        yield place, item
        children = children_of(item)
        last = len(children) - 1
        pending += [((*place, number == last), children[number]) for number in range(last, -1, -1)]


def breadth_first(roots: Sequence[T], children_of: Callable[[T], Sequence[T]], most: int) -> list[T]:
    """Return the first `most` items, each level before the next one.

    If a level has no room for all, each parent in turn gives one child: none is left out for another one's
    many. An item comes after its parent, so that the result is a tree as well.
    """
    found: list[T] = []
    siblings: list[Sequence[T]] = [roots]
    while siblings:
        turns = (item for turn in zip_longest(*siblings, fillvalue=None) for item in turn if item is not None)
        level = list(islice(turns, most - len(found)))
        found += level
        siblings = [children for item in level if (children := children_of(item))]
    return found


def branch(place: tuple[bool, ...]) -> str:
    """Return the lines that lead to an item of `walk`: nothing for a root."""
    if not place:
        return ""
    return "".join("   " if last else "│  " for last in place[:-1]) + ("└─ " if place[-1] else "├─ ")
