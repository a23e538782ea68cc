"""Question 5: what does a fork pay, in the parent and in the child, for the open connections?"""

from __future__ import annotations

from collections.abc import Callable

from bench import forker
from bench.forker import Forked, alternate_forks, forkers
from bench.harness import Answer, Panel, Row, Scale, Spread, differences, main

QUESTION = "What a fork pays"

READING = """\
Each contender is a process of its own, with the fake driver and a real socket per connection; all import
the same modules, pidpool excepted. CPU time. *The child's hook* is what the child spends until `os.fork()`
returns: disowning and severing what it inherited. *Its first use* is `pool.status()`, which also emits the
events of the takeover (here no log takes them). Both are differences to the same process with a QueuePool,
round by round. Nearly all of the constant part is the kernel's copying of the memory pages that the child
touches first. *Linear* compares the price per connection from 100 to 1,000 with that from 1 to 100."""

SIZES = (1, 10, 100, 1000)
# Forks of one and the same process differ by up to so many µs, for no known reason.
UNTOLD = 30e-6
LINEAR = (0.5, 1.5)

Measure = Callable[[Forked], float]


def answer(scale: Scale) -> Answer:
    kinds = (forker.QUEUE, forker.PID)
    names = {f"{kind} {size}": (kind, size) for size in (0, *SIZES) for kind in kinds}
    names[forker.NONE] = (forker.NONE, 0)
    with forkers(names) as made:
        alternate_forks(made, "look", 1)
        forks = alternate_forks(made, "look", scale.rounds(60))

    def more(measure: Measure, size: int, than: str | None = None) -> Spread:
        """What PidPool adds to a process with so many connections."""
        other = forks[f"{forker.QUEUE} {size}" if than is None else than]
        return differences(
            [measure(each) for each in forks[f"{forker.PID} {size}"]], [measure(each) for each in other]
        )

    hook = {size: more(_hook, size) for size in (0, *SIZES)}
    use = {size: more(_use, size) for size in (0, *SIZES)}
    both = {size: more(lambda each: _hook(each) + _use(each), size) for size in SIZES}
    rows = []
    for what, by_size in (("the child's hook", hook), ("hook and first use of the pool", both)):
        few = (by_size[100].median - by_size[1].median) / 99
        many = (by_size[1000].median - by_size[100].median) / 900
        low, high = LINEAR
        rows.append(Row(f"{what}, per inherited connection", f"{many * 1e6:.1f} µs"))
        rows.append(
            Row(
                f"{what}: linear from 1 to 1,000",
                f"{few * 1e6:.1f} µs each up to 100, {many * 1e6:.1f} from there",
                f"{low:g} to {high:g} × as much",
                low <= many / few <= high,
            )
        )
    none = more(_hook, 0, forker.NONE)
    rows.append(
        Row(
            "the child's hook, for a pool without connections",
            none.text(" µs", 1e6, 0),
            "nothing",
            none.median <= UNTOLD,
        )
    )
    rows += [
        Row(
            f"the child, {size} connections",
            f"hook {hook[size].text(' µs', 1e6, 0)}, first use {use[size].text(' µs', 1e6, 0)}",
        )
        for size in hook
    ]
    for size in (0, 10, 100):
        with_it = Spread.of([each.parent_cpu for each in forks[f"{forker.PID} {size}"]])
        without = Spread.of([each.parent_cpu for each in forks[f"{forker.QUEUE} {size}"]])
        rows.append(
            Row(
                f"the parent's os.fork(), {size} connections",
                f"{with_it.text(' µs', 1e6, 0)}; without pidpool {without.text(' µs', 1e6, 0)}",
            )
        )
    panel = Panel(
        "What a fork pays for inherited connections",
        "µs of CPU time",
        list(SIZES),
        {
            "the child's hook": [hook[size].median * 1e6 for size in SIZES],
            "its first use of the pool": [use[size].median * 1e6 for size in SIZES],
            "the parent's os.fork()": [more(_parent, size).median * 1e6 for size in SIZES],
        },
        "connections",
        True,
    )
    return Answer(QUESTION, READING, rows, [panel])


def _hook(forked: Forked) -> float:
    return forked.child_cpu


def _use(forked: Forked) -> float:
    return forked.use_cpu


def _parent(forked: Forked) -> float:
    return forked.parent_cpu


if __name__ == "__main__":
    main(answer)
