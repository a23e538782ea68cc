"""`?plugin=pidpool` in a database URL gives an application PidPool without a change of its code."""

from __future__ import annotations

from pathlib import Path

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


def test_a_bad_option_is_told_of() -> None:
    with pytest.raises(ValueError, match="hold_warning='soon' in the URL: takes a number"):
        create_engine("sqlite:///a.db?plugin=pidpool&hold_warning=soon")
    with pytest.raises(ValueError, match="on_foreign='ignore': takes one of 'replace', 'refuse'"):
        create_engine("sqlite:///a.db?plugin=pidpool&on_foreign=ignore")
