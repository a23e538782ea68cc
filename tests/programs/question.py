"""A parent with a session open starts child processes that make an engine of their own, in the two shapes
that people write it in: question.py URL POOL globals|context ITERATIONS"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator

from pools import make_engine
from sqlalchemy import Column, Engine, Integer
from sqlalchemy.orm import Session, declarative_base

url, pool, shape, iterations = sys.argv[1:]
Base = declarative_base()
processes = multiprocessing.get_context("fork")


class Counter(Base):
    __tablename__ = "question_counters"
    id = Column(Integer, primary_key=True)
    value = Column(Integer)


engine: Engine
session: Session


def open_globals() -> None:
    global engine, session
    # A child lets go of its parent's engine and session here, by giving the names to its own.
    engine = make_engine(url, pool)
    Base.metadata.create_all(engine)
    session = Session(engine)


def close_globals() -> None:
    session.close()
    engine.dispose()


def increment_globals(id: int) -> None:
    open_globals()
    increment(session, id)
    close_globals()


def with_globals() -> None:
    open_globals()
    counter = Counter(value=1)
    session.add(counter)
    session.commit()
    run_child(increment_globals, counter.id)
    session.refresh(counter)
    assert counter.value == 2
    close_globals()


@contextlib.contextmanager
def open_context() -> Iterator[Session]:
    engine = make_engine(url, pool)
    Base.metadata.create_all(engine)
    session = Session(engine)
    try:
        yield session
    finally:
        session.close()
        engine.dispose()


def increment_context(id: int) -> None:
    with open_context() as session:
        increment(session, id)


def with_context() -> None:
    with open_context() as session:
        counter = Counter(value=1)
        session.add(counter)
        session.commit()
        run_child(increment_context, counter.id)
        session.refresh(counter)
        assert counter.value == 2


def increment(session: Session, id: int) -> None:
    counter = session.get_one(Counter, id)
    counter.value += 1
    session.commit()


def run_child(target: Callable[[int], None], id: int) -> None:
    child = processes.Process(target=target, args=(id,))
    child.start()
    child.join(30)
    assert child.exitcode == 0


for _ in range(int(iterations)):
    {"globals": with_globals, "context": with_context}[shape]()
print("done")
