"""How everything here is measured, and what an answer is made of.

The contenders take turns in short slices, and the slices of one round are compared with one another: what
slows the machine down for a while slows them all. Medians of many rounds do the rest.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy

RESULTS = Path(__file__).parent / "results"

Slice = Callable[[], float]
"""Runs a contender for a moment; returns seconds per operation, or whatever else is compared."""


@dataclass(frozen=True)
class Scale:
    """How thoroughly to measure: for numbers, or (`quick`) only to see that everything runs."""

    quick: bool = False

    def rounds(self, number: int) -> int:
        return max(2, number // 100) if self.quick else number

    def seconds(self, number: float) -> float:
        return number / 10 if self.quick else number


def machine() -> str:
    """Describe the machine, as far as the numbers depend on it."""
    python, toolkit = platform.python_version(), sqlalchemy.__version__
    return f"{os.cpu_count()} CPUs, Python {python}, SQLAlchemy {toolkit}"


# -- measuring


@dataclass(frozen=True)
class Spread:
    """The median of many values and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def text(self, unit: str = "", factor: float = 1.0, digits: int = 2) -> str:
        """Write it as ``median unit (lower–upper quartile)``."""
        median, low, high = (f"{value * factor:,.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{median}{unit} ({low}–{high})"


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Compare two contenders round by round."""
    return Spread.of([value / other for value, other in zip(values, base, strict=True)])


def differences(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Subtract a contender from another round by round."""
    return Spread.of([value - other for value, other in zip(values, base, strict=True)])


def undisturbed(values: Sequence[float]) -> float:
    """Return the middle of the fastest fifth: what it takes when nothing else gets in the way."""
    return statistics.quantiles(values, n=10, method="inclusive")[0]


def settle() -> None:
    """Take what exists out of the garbage collector's sight: it would go through it at some slices only."""
    gc.collect()
    gc.freeze()


def alternate(contenders: Mapping[str, Slice], rounds: int) -> dict[str, list[float]]:
    """Let the contenders take turns, each round in another order: the predecessor makes a difference."""
    names = list(contenders)
    for name in names:
        contenders[name]()  # what happens only once, such as connecting
    settle()
    results: dict[str, list[float]] = {name: [] for name in names}
    orders = random.Random(rounds)
    for _ in range(rounds):
        orders.shuffle(names)
        for name in names:
            results[name].append(contenders[name]())
    return results


def cpu_slice(operation: Callable[[], Any], times: int) -> Slice:
    """A slice of `times` operations in CPU time of this thread, which other processes don't add to."""
    return _timed(time.thread_time_ns, operation, times)


def wall_slice(operation: Callable[[], Any], times: int, first: int = 0) -> Slice:
    """A slice of `times` operations by the clock, for what has to wait for others; the `first` few before
    don't count: they find the processor's caches as another contender left them."""
    return _timed(time.perf_counter_ns, operation, times, first)


def _timed(now: Callable[[], int], operation: Callable[[], Any], times: int, first: int = 0) -> Slice:
    beforehand, turns = range(first), range(times)

    def run() -> float:
        for _ in beforehand:
            operation()
        started = now()
        for _ in turns:
            operation()
        return (now() - started) / times / 1e9

    return run


# -- answers


@dataclass(frozen=True)
class Row:
    """One line of the table; `met` is None where there is no target."""

    what: str
    measured: str
    target: str = ""
    met: bool | None = None


def at_most(what: str, measured: Spread, limit: float, of: str) -> Row:
    """A ratio with an upper limit, judged by its median."""
    return Row(what, measured.text(" ×", digits=3), f"at most {limit:g} × {of}", measured.median <= limit)


def at_least(what: str, measured: Spread, limit: float, of: str) -> Row:
    """A ratio with a lower limit, judged by its median."""
    return Row(what, measured.text(" ×"), f"at least {limit:g} × {of}", measured.median >= limit)


@dataclass(frozen=True)
class Panel:
    """One part of the plot: bars where `x` holds names, lines where it holds numbers."""

    title: str
    y_label: str
    x: list[Any]
    series: dict[str, list[float]]
    x_label: str = ""
    logarithmic: bool = False


@dataclass(frozen=True)
class Answer:
    """What came out for one question."""

    question: str
    reading: str
    """How to read the rows, in a paragraph of Markdown."""
    rows: list[Row]
    panels: list[Panel] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Answer:
        data = json.loads(text)
        data["rows"] = [Row(**row) for row in data["rows"]]
        data["panels"] = [Panel(**panel) for panel in data["panels"]]
        return cls(**data)


def argument(name: str, default: Any) -> Any:
    """Return what follows `name` on the command line."""
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def main(answer: Callable[[Scale], Answer]) -> None:
    """Run one question's module: ``python -m bench.<question> [--quick] [--json FILE]``."""
    result = answer(Scale(quick="--quick" in sys.argv))
    file = argument("--json", None)
    if file is not None:
        Path(file).write_text(result.to_json())
    else:
        from bench.report import print_answers

        print_answers([result])
