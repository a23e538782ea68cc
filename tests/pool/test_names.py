"""A pool without a name of its own is named after the address that it connects to."""

from __future__ import annotations

import gc
import socket
from typing import Any

import pytest
from engines import MakeEngine
from events import Events
from forking import run_in_child
from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from pidpool import AsyncPidPool, PidPool

SECRET = "hunter2"


def name_of(engine: Any) -> str:
    name: str = engine.pool.stats().pool
    return name


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("postgresql+psycopg2://app:hunter2@db.example:6432/shop", "db.example:6432/shop"),
        ("postgresql+psycopg2://app:hunter2@db.example/orders?sslmode=require", "db.example/orders"),
        ("postgresql+psycopg2://app@/local", "local"),
        ("postgresql+psycopg2://app@/local?host=/run/postgresql", "/run/postgresql/local"),
        ("postgresql+psycopg2://app@/two?host=a:1&host=b:2", "a,b:1,2/two"),
        ("postgresql+psycopg://app:hunter2@[::1]:5432/six", "[::1]:5432/six"),
        ("sqlite:////srv/app.db", "/srv/app.db"),
        ("sqlite:////srv/other.db?timeout=3", "/srv/other.db"),
    ],
)
def test_the_name_is_the_address(url: str, name: str) -> None:
    assert name_of(create_engine(url, poolclass=PidPool)) == name


def test_an_async_pool_has_it_too() -> None:
    url = "postgresql+asyncpg://app:hunter2@db.example:6432/async"
    assert name_of(create_async_engine(url, poolclass=AsyncPidPool)) == "db.example:6432/async"


def test_connect_args_are_part_of_the_address() -> None:
    engine = create_engine(
        "postgresql+psycopg2://db.example/args",
        poolclass=PidPool,
        connect_args={"port": 7, "password": SECRET},
    )
    assert name_of(engine) == "db.example:7/args"


@pytest.mark.parametrize("dsn", [f"postgresql://app:{SECRET}@db/x", f"host=db password={SECRET}"])
def test_a_dsn_in_the_place_of_a_database_is_no_part_of_a_name(dsn: str) -> None:
    engine = create_engine(
        "postgresql+psycopg2://db.example:1", poolclass=PidPool, connect_args={"dbname": dsn}
    )
    assert name_of(engine).partition("#")[0] == "db.example:1"  # the other one may still be alive


def test_pools_of_one_address_are_told_apart_as_long_as_they_live() -> None:
    def make() -> Any:
        return create_engine("postgresql+psycopg2://db.example:5/same", poolclass=PidPool)

    engines = [make(), make(), make()]
    names = ["db.example:5/same", "db.example:5/same#2", "db.example:5/same#3"]
    assert [name_of(engine) for engine in engines] == names
    engines[0].dispose()
    assert [name_of(engine) for engine in engines] == names
    del engines[1]
    gc.collect()
    assert name_of(make()) == names[1]


def test_a_name_that_is_given_wins() -> None:
    url = "postgresql+psycopg2://db.example:5/given"
    named = [create_engine(url, poolclass=PidPool, pool_logging_name="shop") for _ in range(2)]
    assert [name_of(engine) for engine in named] == ["shop", "shop"]
    assert name_of(create_engine(url, poolclass=PidPool)) == "db.example:5/given"


def test_a_pool_without_an_address_has_a_number() -> None:
    first, second = (PidPool(socket.socket).stats().pool for _ in range(2))
    numbers = [int(name.removeprefix("pool-")) for name in (first, second)]
    assert numbers[0] < numbers[1]
    own = create_engine("postgresql+psycopg2://", poolclass=PidPool, creator=socket.socket)
    assert name_of(own).startswith("pool-")


def test_it_is_the_same_in_a_child_and_after_dispose(tls_url: str, make_engine: MakeEngine) -> None:
    events = Events()
    engine = make_engine(tls_url, logger=events.logger)
    url = make_url(tls_url)

    def use() -> list[str]:
        engine.connect().close()
        engine.dispose()
        return [event["pool"] for event in events.all]

    name = name_of(engine)
    assert name.startswith(f"{url.host}:{url.port}/{url.database}")
    assert set(run_in_child(use)) == set(use()) == {name}
