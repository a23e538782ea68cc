"""Question 5: what does a fork pay, in the parent and in the child, for the open connections?"""

from __future__ import annotations

from collections.abc import Callable

from bench import forker
from bench.forker import Forked, alternate_forks, forkers
from bench.harness import Answer, Panel, Row, Scale, Spread, at_most, differences, main, ratios

QUESTION = "What a fork pays"

READING = """\
Each contender is a process of its own, with the fake driver and a real socket per connection; all import
the same modules, pidpool excepted. CPU time. *The child's hook* is what the child spends until `os.fork()`
returns: severing what it inherited. *Its first use* is `pool.status()`, which also takes the pool over and
emits the events of it (here no log takes them). Both are differences to the same process with a QueuePool,
round by round. *The parent's `os.fork()`* is measured with a child that ends at once, so that it is the
parent's alone, in six processes of each kind. *Pages* are memory pages touched for the first time since the
fork, which the kernel has to copy (`ru_minflt`): nearly all of the constant part is their price. Their number
is the same on a busy machine. *Linear* compares the price per connection from 100 to 1,000 with that from 1
to 100."""

SIZES = (1, 10, 100, 1000)
# Forks of one and the same process differ by up to so many µs, for no known reason.
UNTOLD = 30e-6
PROCESSES = 6
"""How many processes of each kind the parent's `os.fork()` is measured in, one after the other: the memory of
two processes of one kind lies differently, and that makes up to 5% of a fork."""
LINEAR = (0.5, 1.5)
PARENT_TARGETS = {0: 1.10, 10: 1.15, 100: 1.30}
"""By connections: the parent's `os.fork()`, as a multiple of QueuePool's."""
HOOK_TARGET = 0.3e-3
"""Seconds of the child's hook with one connection."""

Measure = Callable[[Forked], float]


def answer(scale: Scale) -> Answer:
    kinds = (forker.QUEUE, forker.PID)
    names = {f"{kind} {size}": (kind, size) for size in (0, *SIZES) for kind in kinds}
    names[forker.NONE] = (forker.NONE, 0)
    with forkers(names) as made:
        alternate_forks(made, "look", 1)
        forks = alternate_forks(made, "look", scale.rounds(60))
    alone = {
        name: specification for name, specification in names.items() if specification[1] in PARENT_TARGETS
    }
    ends: dict[str, list[Forked]] = {}
    for _ in range(1 if scale.quick else PROCESSES):
        with forkers(alone) as made:
            alternate_forks(made, "end", scale.rounds(20))
            for name, more_forks in alternate_forks(made, "end", scale.rounds(50)).items():
                ends.setdefault(name, []).extend(more_forks)

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
    rows.append(
        Row(
            "the child's hook, 1 connection",
            f"{hook[1].text(' µs', 1e6, 0)}, {more(_hook_pages, 1).text(' pages', digits=0)}",
            f"at most {HOOK_TARGET * 1e6:g} µs",
            hook[1].median <= HOOK_TARGET,
        )
    )
    for size, target in PARENT_TARGETS.items():
        with_it, without = (ends[f"{kind} {size}"] for kind in (forker.PID, forker.QUEUE))
        cpu = ratios([_parent(each) for each in with_it], [_parent(each) for each in without])
        rows.append(at_most(f"the parent's os.fork(), {size} connections", cpu, target, "QueuePool"))
        pages = (Spread.of([each.parent_faults for each in forks_of]) for forks_of in (with_it, without))
        rows.append(
            Row(
                f"the parent's os.fork(), {size} connections, pages",
                " against ".join(spread.text(digits=0) for spread in pages),
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


def _hook_pages(forked: Forked) -> float:
    return forked.child_faults


def _use(forked: Forked) -> float:
    return forked.use_cpu


def _parent(forked: Forked) -> float:
    return forked.parent_cpu


if __name__ == "__main__":
    main(answer)
