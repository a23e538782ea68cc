"""Question 4: how soon after a fork does a child have its first row?"""

from __future__ import annotations

from bench import contenders, forker
from bench.forker import Forked, alternate_forks, forkers
from bench.harness import Answer, Panel, Row, Scale, Spread, main, ratios
from pidpool.tools.demo.postgres import EmbeddedPostgres

QUESTION = "From the fork to the first row in the child"

READING = """\
The parent has five idle connections over TLS. The child does what SQLAlchemy documents,
`engine.dispose(close=False)` and then a checkout, or with PidPool just the checkout; either way it opens a
connection of its own over TLS and asks for a row. What is judged is the CPU time that the child has spent
when it has the row: the server's part, by the clock much the larger one, is the same for both. *By the
clock* counts from before `os.fork()` in the parent.

What is above 1 is the price of letting go: the documented way leaves the parent's sockets open in the child,
PidPool severs each of them, and takes the pool over at its first use. The code and the objects for that are
touched for the first time in the child, and each page is copied at the first write, reference counts
included. bench/README.md says which pages, and how many. A child whose parent had no connection open severs
nothing."""

# What is left between two processes of the same kind.
NO_MORE = 1.02


def _cpu(forks: list[Forked]) -> list[float]:
    return [each.child_cpu + each.use_cpu for each in forks]


def _clock(forks: list[Forked]) -> list[float]:
    return [each.child for each in forks]


def answer(scale: Scale) -> Answer:
    documented = "dispose(close=False)"
    names = {documented: (forker.QUEUE, 5), contenders.PID: (forker.PID, 5)}
    measured: dict[str, list[Forked]] = {name: [] for name in names}
    with EmbeddedPostgres() as server:
        url = server.url(tls=True)
        for _ in range(1 if scale.quick else 3):
            with forkers(names, url) as made:
                alternate_forks(made, "row", 1)
                for name, forks in alternate_forks(made, "row", scale.rounds(80)).items():
                    measured[name].extend(forks)
    cpu = ratios(_cpu(measured[contenders.PID]), _cpu(measured[documented]))
    clock = ratios(_clock(measured[contenders.PID]), _clock(measured[documented]))
    rows = [
        Row("PidPool against the documented way", cpu.text(" ×", digits=3), "no more", cpu.median <= NO_MORE),
        Row("PidPool against the documented way, by the clock", clock.text(" ×")),
    ]
    for name, forks in measured.items():
        hook = Spread.of([each.child_cpu for each in forks]).median * 1e3
        measured_cpu = (
            f"{Spread.of(_cpu(forks)).text(' ms', 1e3)}, {hook:.2f} of it before os.fork() returned"
        )
        rows.append(Row(f"{name}: CPU time of the child", measured_cpu))
        rows.append(Row(f"{name}: by the clock", Spread.of(_clock(forks)).text(" ms", 1e3)))
        hook_pages, use_pages = (
            Spread.of([float(number) for number in numbers])
            for numbers in ([each.child_faults for each in forks], [each.use_faults for each in forks])
        )
        rows.append(
            Row(
                f"{name}: pages",
                f"{hook_pages.text(digits=0)} before os.fork() returned, {use_pages.text(digits=0)} then",
            )
        )
    medians = [Spread.of(_cpu(forks)).median * 1e3 for forks in measured.values()]
    panel = Panel("Fork to first row", "ms of the child's CPU time", list(measured), {"": medians})
    return Answer(QUESTION, READING, rows, [panel])


if __name__ == "__main__":
    main(answer)
