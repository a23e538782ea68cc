"""`?plugin=pidpool` in a database URL gives an application PidPool without a change of its code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from pidpool import AsyncPidPool, PidPool


def test_the_url_is_enough(tls_url: str) -> None:
    url = make_url(tls_url).update_query_dict(
        {"plugin": "pidpool", "on_foreign": "refuse", "inherited_sockets": "keep", "hold_warning": "30"}
    )
    engine = create_engine(url)
    pool = engine.pool
    assert type(pool) is PidPool
    assert (pool.on_foreign, pool.inherited_sockets, pool.hold_warning) == ("refuse", "keep", 30.0)
    with engine.connect() as connection:
        assert connection.scalar(text("select 1")) == 1
    engine.dispose()


def test_the_familys_options_in_the_url(
    tls_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIDPOOL_FAMILY_DIR", str(tmp_path))
    url = make_url(tls_url).update_query_dict(
        {
            "plugin": "pidpool",
            "family": "shop",
            "family_limit": "20",
            "max_idle": "60",
            "recycle_jitter": "0.5",
        }
    )
    pool = create_engine(url).pool
    assert isinstance(pool, PidPool)
    assert (pool.pool_events.family.name, pool.pool_events.family.limit) == ("shop", 20)
    assert (pool.max_idle, pool.recycle_jitter) == (60.0, 0.5)
    pool.connect().close()
    pool.dispose()


def test_an_async_engine_gets_the_async_pool(tls_url: str) -> None:
    url = make_url(tls_url).set(drivername="postgresql+psycopg").update_query_dict({"plugin": "pidpool"})
    assert type(create_async_engine(url).pool) is AsyncPidPool


@pytest.mark.parametrize(
    ("url", "options", "pool"),
    [
        ("sqlite:///a.db?plugin=pidpool", {}, PidPool),
        ("sqlite:///a.db?plugin=pidpool", {"poolclass": QueuePool}, PidPool),
        ("sqlite:///a.db?plugin=pidpool", {"poolclass": NullPool}, NullPool),
        ("sqlite://?plugin=pidpool", {"poolclass": StaticPool}, StaticPool),
    ],
)
def test_another_pool_stays(url: str, options: dict[str, type], pool: type) -> None:
    assert type(create_engine(url, **options).pool) is pool


def test_a_bad_option_is_reported() -> None:
    with pytest.raises(ValueError, match="hold_warning='soon' in the URL: takes a number"):
        create_engine("sqlite:///a.db?plugin=pidpool&hold_warning=soon")
    with pytest.raises(ValueError, match="on_foreign='ignore': takes one of 'replace', 'refuse'"):
        create_engine("sqlite:///a.db?plugin=pidpool&on_foreign=ignore")


def test_the_pools_usual_options_may_be_in_the_url(tls_url: str) -> None:
    options = {
        "pool_size": "3",
        "max_overflow": "2",
        "pool_timeout": "1.5",
        "pool_recycle": "60",
        "pool_pre_ping": "true",
        "pool_use_lifo": "Yes",
        "pool_name": "shop",
    }
    url = make_url(tls_url).update_query_dict({"plugin": "pidpool", **options})
    engine = create_engine(url, pool_size=9)
    pool = engine.pool
    assert isinstance(pool, PidPool)
    stats = pool.stats()
    assert (stats.size, stats.max_overflow, stats.pool) == (3, 2, "shop")
    assert pool.timeout() == 1.5
    assert (pool._recycle, pool._pre_ping, pool._pool.use_lifo) == (60, True, True)
    with engine.connect() as connection:
        assert connection.scalar(text("select 1")) == 1
    engine.dispose()


@pytest.mark.parametrize("word", ["false", "no", "off", "0"])
def test_a_flag_may_be_off(word: str) -> None:
    pool: Any = create_engine(f"sqlite:///a.db?plugin=pidpool&pool_pre_ping={word}").pool
    assert pool._pre_ping is False


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("pool_size=many", "pool_size='many' in the URL: takes a whole number"),
        ("pool_size=-1", "pool_size=-1: takes a whole number of 0 or more, 0 for no limit"),
        ("max_overflow=2.5", "max_overflow='2.5' in the URL: takes a whole number"),
        ("pool_timeout=long", "pool_timeout='long' in the URL: takes a number"),
        ("pool_timeout=nan", "timeout=nan: takes a number of 0 or more"),
        ("pool_recycle=1h", "pool_recycle='1h' in the URL: takes a whole number"),
        ("pool_pre_ping=maybe", "pool_pre_ping='maybe' in the URL: takes true or false"),
        ("pool_size=1&pool_size=2", "pool_size is in the URL 2 times; give it once"),
    ],
)
def test_a_bad_value_says_what_the_option_takes(query: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        create_engine(f"sqlite:///a.db?plugin=pidpool&{query}")


def test_a_plugin_that_changes_nothing_says_so_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level("INFO", "pidpool")
    engine = create_engine(f"sqlite:///{tmp_path}/a.db?plugin=pidpool&pool_size=3", poolclass=NullPool)
    engine.connect().close()
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage().startswith(
        "plugin=pidpool changes nothing: the engine asks for NullPool, and ignores pool_size in the URL; "
    )
    caplog.clear()
    create_engine("sqlite:///a.db?plugin=pidpool")
    assert caplog.records == []
