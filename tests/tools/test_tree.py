"""The order and the branches in which processes are drawn, and which are if there are too many."""

from __future__ import annotations

from pidpool.tools.tree import branch, breadth_first, walk


def test_children_follow_their_parent_and_branches_end_at_the_last() -> None:
    children = {1: [2, 5], 2: [3, 4], 5: [6]}
    lines = [f"{branch(place)}{pid}" for place, pid in walk([1, 7], lambda pid: children.get(pid, []))]
    assert lines == ["1", "├─ 2", "│  ├─ 3", "│  └─ 4", "└─ 5", "   └─ 6", "7"]


def test_a_chain_of_forks_may_be_longer_than_the_recursion_limit() -> None:
    *_, (place, pid) = walk([0], lambda pid: [pid + 1] if pid < 2_000 else [])
    assert (len(place), pid) == (2_000, 2_000)


def test_a_choice_takes_each_level_before_the_next_and_each_parents_children_in_turn() -> None:
    children = {0: [2, 3, 4, 5], 1: [6], 2: [7, 8], 6: [9]}

    def children_of(pid: int) -> list[int]:
        return children.get(pid, [])

    assert breadth_first([0, 1], children_of, 100) == [0, 1, 2, 6, 3, 4, 5, 7, 9, 8]
    assert breadth_first([0, 1], children_of, 4) == [0, 1, 2, 6]
    assert breadth_first([0, 1], children_of, 1) == [0]
    assert breadth_first([0, 1], children_of, 2) == [0, 1]
