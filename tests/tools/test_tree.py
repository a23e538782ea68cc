"""The order and the branches in which processes are drawn."""

from __future__ import annotations

from pidpool.tools.tree import branch, walk


def test_children_follow_their_parent_and_branches_end_at_the_last() -> None:
    children = {1: [2, 5], 2: [3, 4], 5: [6]}
    lines = [f"{branch(place)}{pid}" for place, pid in walk([1, 7], lambda pid: children.get(pid, []))]
    assert lines == ["1", "├─ 2", "│  ├─ 3", "│  └─ 4", "└─ 5", "   └─ 6", "7"]


def test_a_chain_of_forks_may_be_longer_than_the_recursion_limit() -> None:
    *_, (place, pid) = walk([0], lambda pid: [pid + 1] if pid < 2_000 else [])
    assert (len(place), pid) == (2_000, 2_000)
