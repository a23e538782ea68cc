"""Every state that a fork can find a connection in, under every policy, with everything that a child
can do: over TLS and without, forked through Python and in C. Each ends with the parent unharmed."""

from __future__ import annotations

from typing import Any

import pytest
from child import ACTIONS, POLICIES, STATES, Child, behave
from engines import MakeEngine
from forking import How, run_in_child
from parent import Parent

from pidpool.tools.demo.postgres import EmbeddedPostgres

OPTIONS: dict[str, dict[str, Any]] = {
    "check out": {},
    "pre-ping": {"pool_pre_ping": True},
    "recycle": {"pool_recycle": 0},
    "keep": {"inherited_sockets": "keep"},
}


@pytest.mark.usefixtures("table", "clean_log")
@pytest.mark.parametrize("how", ["python", "c"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("action", ACTIONS)
def test_the_parent_never_notices(
    url: str, make_engine: MakeEngine, state: str, policy: str, action: str, how: How
) -> None:
    parent = Parent(make_engine(url, on_foreign=policy), state)
    run_in_child(behave, ACTIONS[action], parent, policy, how=how)
    parent.notices_nothing()


@pytest.mark.usefixtures("table", "clean_log")
@pytest.mark.parametrize("how", ["python", "c"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("option", OPTIONS)
def test_the_parent_never_notices_whatever_the_pool_does_at_checkout(
    url: str, make_engine: MakeEngine, state: str, policy: str, option: str, how: How
) -> None:
    parent = Parent(make_engine(url, on_foreign=policy, **OPTIONS[option]), state)
    server_pid_before = parent.server_pid
    run_in_child(behave, _check_out_and_leave, parent, policy, how=how)
    if option == "recycle" and state == "idle":
        parent.engine.dispose()  # the parent's own next checkout would recycle it, as it should
        return
    parent.notices_nothing()
    assert parent.server_pid == server_pid_before


def _check_out_and_leave(child: Child) -> None:
    child.check_out()
    child.leave()


@pytest.mark.usefixtures("table", "clean_log")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("action", ACTIONS)
def test_psycopg_3_as_psycopg2(
    postgres: EmbeddedPostgres, make_engine: MakeEngine, state: str, action: str
) -> None:
    engine = make_engine(postgres.url(driver="postgresql+psycopg"))
    parent = Parent(engine, state)
    run_in_child(behave, ACTIONS[action], parent, "replace", how="c" if action == "use" else "python")
    parent.notices_nothing()
