"""Random histories of a family of processes, and a model that says what each step may do: a stateful test.

`make test` runs the histories of the seeds below, the same each time, and `make soak` thousands of new ones.
Their seed is printed if one fails: ``PIDPOOL_SEED=<seed>`` runs it again. A failing history is shrunk, and
printed as a program that can be run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any, ClassVar

import hypothesis
import pytest
from histories import History, HistoryFailed, Stage
from histories.history import Process, Slot
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from soak import SOAK

HISTORIES = 40  # of each seed
STEPS = 20
MOST_PROCESSES = 5

SEEDS: list[int | str]
"""Those that are new have no number in the test's name: pytest-xdist needs the same names in all workers."""
if "PIDPOOL_SEED" in os.environ:
    SEEDS = [int(os.environ["PIDPOOL_SEED"])]
elif SOAK:
    SEEDS = [f"new {number}" for number in range(125)]
else:
    SEEDS = [1, 2, 3, 4, 5]

OPTIONS = {
    "pool_size": st.sampled_from([2, 1, 3, 0]),
    "max_overflow": st.sampled_from([1, 0, 2, -1]),
    "pool_use_lifo": st.booleans(),
    "on_foreign": st.sampled_from(["replace", "replace", "refuse"]),
    "inherited_sockets": st.sampled_from(["sever", "sever", "keep"]),
    "pool_pre_ping": st.booleans(),
    "pool_recycle": st.sampled_from([-1, -1, 0]),
    "pool_reset_on_return": st.sampled_from(["rollback", "rollback", "commit", None]),
    "family_limit": st.sampled_from([None, None, None, 3, 4, 2]),
    "tls": st.sampled_from([True, True, False]),
    "collect": st.sampled_from(["off", "off", "often"]),
}
HOWS = st.sampled_from(["python", "c"])
WHICH = st.integers(0, 255)
"""Chooses one of what is possible."""


class Machine(RuleBasedStateMachine):
    """Chooses the steps; `History` makes and checks them."""

    stage: Stage
    failures: ClassVar[list[HistoryFailed]]

    @initialize(options=st.fixed_dictionaries(OPTIONS), slots=st.sampled_from(["ab", "a", "abc", ""]))
    def begin(self, options: dict[str, Any], slots: str) -> None:
        if options["pool_reset_on_return"] is None:
            options["pool_pre_ping"] = False  # psycopg2 can't ping in a transaction that was left open
        self.history = History(self.stage, **options)
        self.history.__enter__()
        self.is_over = False
        for slot in slots:
            self.do(self.history.checkout, "p0", slot)
        for slot in list(self.history.processes["p0"].slots)[1:]:
            self.do(self.history.write, "p0", slot)

    def teardown(self) -> None:
        if not getattr(self, "is_over", True):
            self.end_history()

    def end_history(self, error: BaseException | None = None) -> None:
        self.is_over = True
        try:
            self.history.__exit__(None if error is None else type(error), error, None)
        except HistoryFailed as failure:
            self.failures.append(failure)
            raise

    def do(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            step(*args, **kwargs)
        except BaseException as error:
            self.end_history(error)
            raise

    # -- what is possible

    def processes(self) -> list[Process]:
        return [each for each in self.history.alive() if each.free_threads()]

    def has_process(self) -> bool:
        return bool(self.processes())

    def has_slot(self) -> bool:
        return bool(self.history.slots())

    def has_several_processes(self) -> bool:
        return len(self.processes()) > 1

    def may_fork(self) -> bool:
        return self.has_process() and len(self.history.alive()) < MOST_PROCESSES

    def thread(self, process: Process, which: int) -> str:
        threads = process.free_threads()
        return threads[which % len(threads)]

    def is_possible(self, slot: Slot, what: str) -> bool:
        if what in ("commit", "rollback", "begin", "write", "lock", "listen", "close"):
            return True
        if what == "drop":
            return not slot.is_in_a_frame
        if what in ("release", "roll_back_to_savepoint"):
            return bool(slot.savepoints)
        if what == "unlock":
            return bool(slot.locks) and slot.is_bound
        if what == "fetch":
            return slot.next_row is not None
        if what in ("savepoint", "stream", "copy_out", "copy_in"):
            return slot.next_row is None
        assert what in ("detach", "invalidate")
        return slot.is_bound or slot.inherited is not None

    def on_a_slot(self, which: int, thread: int, *names: str, **options: Any) -> None:
        """Make a step on a slot: the first of these that is possible on one."""
        for name in names:
            found = [(p, slot) for p, slot in self.history.slots() if self.is_possible(slot, name)]
            if found:
                process, slot = found[which % len(found)]
                step = getattr(self.history, name)
                self.do(step, process.name, slot.name, **options, thread=self.thread(process, thread))
                if name == "drop" and self.history.options["collect"] == "often":
                    self.do(self.history.collect, process.name, thread=self.thread(process, thread))
                return

    # -- the rules

    @precondition(has_process)
    @rule(which=WHICH, thread=WHICH)
    def check_out(self, which: int, thread: int) -> None:
        free = [(p, name) for p in self.processes() for name in "abc" if name not in p.slots]
        if free:
            process, name = free[which % len(free)]
            self.do(self.history.checkout, process.name, name, thread=self.thread(process, thread))

    @precondition(has_slot)
    @rule(which=WHICH, what=st.sampled_from(["write", "write", "begin", "copy_in"]), thread=WHICH)
    def write(self, which: int, what: str, thread: int) -> None:
        self.on_a_slot(which, thread, what, "write")

    @precondition(has_slot)
    @rule(which=WHICH, what=st.sampled_from(["commit", "commit", "rollback"]), thread=WHICH)
    def end_a_transaction(self, which: int, what: str, thread: int) -> None:
        self.on_a_slot(which, thread, what)

    @precondition(has_slot)
    @rule(
        which=WHICH,
        what=st.sampled_from(["savepoint", "release", "roll_back_to_savepoint"]),
        thread=WHICH,
    )
    def nest(self, which: int, what: str, thread: int) -> None:
        self.on_a_slot(which, thread, what, "savepoint")

    @precondition(has_slot)
    @rule(
        which=WHICH,
        what=st.sampled_from(["stream", "fetch", "fetch", "lock", "unlock", "listen", "copy_out"]),
        thread=WHICH,
    )
    def use_the_server(self, which: int, what: str, thread: int) -> None:
        self.on_a_slot(which, thread, what, "stream", "begin")

    @precondition(has_slot)
    @rule(
        which=WHICH,
        what=st.sampled_from(
            [
                ("close", {}),
                ("close", {}),
                ("drop", {"cycle": False}),
                ("drop", {"cycle": True}),
                ("detach", {}),
                ("invalidate", {"soft": False}),
                ("invalidate", {"soft": True}),
            ]
        ),
        thread=WHICH,
    )
    def give_up(self, which: int, what: tuple[str, dict[str, Any]], thread: int) -> None:
        self.on_a_slot(which, thread, what[0], **what[1])

    @precondition(has_process)
    @rule(
        which=WHICH,
        what=st.sampled_from(
            [
                ("collect", {}),
                ("look", {}),
                ("dispose", {}),
                ("dispose", {"close": False}),
                ("recreate", {}),
            ]
        ),
        thread=WHICH,
    )
    def use_the_pool(self, which: int, what: tuple[str, dict[str, Any]], thread: int) -> None:
        process = self.processes()[which % len(self.processes())]
        step = getattr(self.history, what[0])
        self.do(step, process.name, **what[1], thread=self.thread(process, thread))

    @precondition(may_fork)
    @rule(which=WHICH, how=HOWS, thread=WHICH)
    def fork(self, which: int, how: Any, thread: int) -> None:
        process = self.processes()[which % len(self.processes())]
        self.do(self.history.fork, process.name, how, thread=self.thread(process, thread))

    @precondition(may_fork)
    @rule(which=WHICH, how=HOWS, inside=st.sampled_from(["copy_out", "copy_in"]), thread=WHICH)
    def fork_in_a_copy(self, which: int, how: Any, inside: str, thread: int) -> None:
        sound = [(p, slot) for p, slot in self.history.slots() if self.history.is_sound(p, slot)]
        if sound:
            process, slot = sound[which % len(sound)]
            options = {"inside": inside, "slot": slot.name, "thread": self.thread(process, thread)}
            self.do(self.history.fork, process.name, how, **options)

    @precondition(has_several_processes)
    @rule(
        which=WHICH,
        way=st.sampled_from(["_exit", "exit", "exception", "kill", "exec", "killed by the test"]),
    )
    def end(self, which: int, way: str) -> None:
        process = self.processes()[which % len(self.processes())]
        if way == "killed by the test":
            self.do(self.history.kill, process.name)
        else:
            self.do(self.history.end, process.name, way)

    @precondition(has_several_processes)
    @rule(which=WHICH)
    def unwind(self, which: int) -> None:
        nested = [
            each
            for each in self.processes()
            if each.threads["main"].depth and each.threads["main"].busy_with is None
        ]
        if nested:
            self.do(self.history.unwind, nested[which % len(nested)].name)

    @precondition(has_process)
    @rule(
        which=WHICH,
        what=st.sampled_from(["terminate", "reset", "notify", *["thread"] * 3, "restart"]),
        is_meant=st.booleans(),
    )
    def disturb(self, which: int, what: str, is_meant: bool) -> None:
        history = self.history
        process = self.processes()[which % len(self.processes())]
        found = [
            number
            for number, session in enumerate(history.sessions)
            if not session.wire.has_ended and not session.wire.is_deaf and session.owner.is_alive
        ]
        if what == "restart":
            if is_meant and which < 64:
                self.do(history.restart)
        elif what == "notify" and history.has_listener:
            self.do(history.notify)
        elif what in ("terminate", "reset") and found:
            self.do(getattr(history, what), found[which % len(found)])
        elif len(process.threads) < 3:
            self.do(history.thread, process.name, f"t{len(process.threads)}")

    @precondition(has_slot)
    @rule(which=WHICH, what=st.sampled_from(["write", "commit"]))
    def begin_in_background(self, which: int, what: str) -> None:
        found = [
            (process, slot)
            for process, slot in self.history.slots()
            if self.history.is_sound(process, slot) and (what == "write" or slot.writes)
        ]
        if found:
            process, slot = found[which % len(found)]
            threads = [each for each in process.free_threads() if each != "main"]
            if not threads and len(process.threads) < 3:
                threads = [f"t{len(process.threads)}"]
                self.do(self.history.thread, process.name, threads[0])
            if threads:
                self.do(self.history.begin_in_background, process.name, threads[0], slot.name, what)

    @rule(which=WHICH, how=st.sampled_from(["hear", "hear", "reset"]))
    def end_in_background(self, which: int, how: str) -> None:
        busy = [
            (process.name, name)
            for process in self.history.alive()
            for name, thread in process.threads.items()
            if thread.busy_with is not None
        ]
        if busy:
            self.do(self.history.end_in_background, *busy[which % len(busy)], how)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_many_histories(stage: Stage, seed: int | str) -> None:
    if isinstance(seed, str):
        seed = random.SystemRandom().randrange(1 << 32)
    print(f"PIDPOOL_SEED={seed}")

    class Seeded(Machine):
        failures: ClassVar[list[HistoryFailed]] = []

    Seeded.stage = stage
    settings = hypothesis.settings(
        max_examples=HISTORIES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        run_state_machine_as_test(hypothesis.seed(seed)(Seeded), settings=settings)
    except Exception:
        if not Seeded.failures:
            raise
        # With its program, also if it fails now and then. The shortest may have failed in another way.
        first, shortest = Seeded.failures[0], Seeded.failures[-1]
        print(f"As it failed first:\n{first}")
        raise shortest from None
