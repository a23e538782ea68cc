"""The same random steps on QueuePool and on PidPool: whatever a driver, a listener or a caller can observe
is the same, in the same order."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event, exc
from sqlalchemy.pool import PoolProxiedConnection, PoolResetState, QueuePool

from pidpool import PidPool

STEPS = 80
EVENTS = {
    "first_connect": 2,
    "connect": 2,
    "checkout": 3,
    "checkin": 2,
    "reset": 3,
    "invalidate": 3,
    "soft_invalidate": 3,
    "close": 2,
    "detach": 2,
    "close_detached": 1,
}


class Failed(Exception):
    pass


class Connection:
    def __init__(self, number: int, run: Run) -> None:
        self.number = number
        self.run = run

    def rollback(self) -> None:
        self.run.note("rollback", self.number)

    def commit(self) -> None:
        self.run.note("commit", self.number)

    def close(self) -> None:
        self.run.note("close", self.number)


class Run:
    """One pool, driven by a seed; all that it does is noted."""

    def __init__(self, pool_class: type[QueuePool], seed: int) -> None:
        self.random = random.Random(seed)
        self.noted: list[Any] = []
        self.opened = 0
        self.to_fail: str | None = None
        self.error: BaseException | None = None
        choose = self.random.choice
        self.pool = pool_class(
            self.open,
            pool_size=choose((0, 1, 2, 3)),
            max_overflow=choose((-1, 0, 1, 2)),
            timeout=0,
            use_lifo=choose((False, True)),
            recycle=choose((-1, -1, 0)),
            reset_on_return=choose(("rollback", "rollback", "commit", None)),
        )
        for name, arguments in EVENTS.items():
            if self.random.random() < 0.3:
                event.listen(self.pool, name, self.listener(name, arguments))
        self.checkouts: list[PoolProxiedConnection] = []
        self.returned: list[PoolProxiedConnection] = []

    def note(self, *what: Any) -> None:
        self.noted.append(what)
        if what[0] == self.to_fail:
            self.to_fail = None
            raise exc.DisconnectionError if what[0] == "on checkout" and self.opened % 2 else Failed

    def open(self) -> Connection:
        self.note("open")
        self.opened += 1
        return Connection(self.opened, self)

    def listener(self, name: str, arguments: int) -> Any:
        def listener(connection: Any, *others: Any) -> None:
            states = [each for each in others if isinstance(each, PoolResetState)]
            self.note(f"on {name}", None if connection is None else connection.number, *states)

        return {
            1: lambda a: listener(a),
            2: lambda a, b: listener(a, b),
            3: lambda a, b, c: listener(a, b, c),
        }[arguments]

    def step(self) -> None:
        self.to_fail = self.random.choice(
            (None,) * 8 + ("open", "rollback", "commit", "close", "on checkout", "on connect", "on reset")
        )
        what = self.random.choice(
            ("checkout",) * 5
            + ("close",) * 3
            + ("drop", "drop", "detach", "invalidate", "soft", "twice", "again", "dispose", "all", "forget")
            + ("close reset", "undo")
        )
        pool, random = self.pool, self.random
        if what == "checkout":
            checkout = pool.connect()
            self.checkouts.append(checkout)
            self.note("got", checkout.dbapi_connection.number, sorted(checkout.info))  # type: ignore[attr-defined]
            checkout.info["number"] = self.opened
        elif what == "dispose":
            if pool.checkedout() == 0:  # type: ignore[attr-defined]
                # Otherwise QueuePool's count is too low from then on, by each that comes back.
                pool.dispose()
        elif what == "forget":
            self.error = None
        elif what == "twice":
            if self.returned:
                self.returned[-1].close()
        elif self.checkouts:
            number = random.randrange(len(self.checkouts))
            checkout = self.checkouts[number]
            if what == "detach":
                checkout.detach()
            elif what == "soft":
                checkout.invalidate(soft=True)
            elif what == "undo":  # as an engine's connection does with an isolation level of its own
                record: Any = checkout._connection_record  # type: ignore[attr-defined]
                if record is not None:
                    record.finalize_callback.append(lambda connection: self.note("undo", connection.number))
            elif what == "again":
                checkout._checkout_existing()  # type: ignore[attr-defined]
                checkout.close()
            elif what == "all":
                self.invalidate(checkout, lambda: pool._invalidate(checkout))
                self.checkouts.pop(number)
            else:
                self.checkouts.pop(number)
                if what in ("close", "close reset"):
                    if what == "close":
                        checkout.close()
                    else:  # as an engine's connection does that has rolled back
                        checkout._close_special(transaction_reset=True)  # type: ignore[attr-defined]
                    self.returned.append(checkout)
                elif what == "invalidate":
                    self.invalidate(checkout, checkout.invalidate)

    def invalidate(self, checkout: PoolProxiedConnection, invalidate: Callable[[], None]) -> None:
        connection = checkout.dbapi_connection
        was_detached = connection is not None and checkout.is_detached
        invalidate()
        if was_detached and not isinstance(self.pool, PidPool):
            # QueuePool leaves it to the collector, PidPool closes it.
            self.pool._close_connection(connection, terminate=True)  # type: ignore[arg-type]

    def all(self) -> list[Any]:
        for _ in range(STEPS):
            try:
                with warnings.catch_warnings(record=True) as warned:
                    warnings.simplefilter("always")
                    self.step()
            except Exception as error:
                self.error = error  # with its traceback, and what that keeps alive
                self.noted.append((type(error).__name__,))
            self.noted.extend(("warned", warning.category.__name__) for warning in warned)
            self.to_fail = None
            self.noted.append((self.pool.status(),))
        self.error = None
        self.checkouts.clear()
        gc.collect()
        self.pool.dispose()
        self.noted.append((self.pool.status(),))
        return self.noted


@pytest.mark.parametrize("seeds", [range(first, first + 20) for first in (0, 20, 40)])
def test_the_same_steps_have_the_same_effects(seeds: range) -> None:
    for seed in seeds:
        expected, found = Run(QueuePool, seed).all(), Run(PidPool, seed).all()
        assert found == expected, f"seed {seed}"
