"""The alert rules ask for what is exposed; promtool finds that each fires when it should, and not before."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from families import small_family

from pidpool.export.prometheus import expose

RULES = resources.files("pidpool.export.endpoint").joinpath("alerts.yml").read_text()

POOL = 'db_client_connection_pool_name="shop",job="shop",instance="a"'

SERIES = {
    "PidpoolTransactionLeaked": {
        f'pidpool_inherited_total{{{POOL},pidpool_state="in_transaction"}}': ("0x10 1x20", "4x30"),
        f'pidpool_inherited_total{{{POOL},pidpool_state="idle"}}': ("0x30", "0+1x30"),
    },
    "PidpoolCheckoutsTimeOut": {
        f"db_client_connection_timeouts_total{{{POOL}}}": ("0x10 3x20", "3x30"),
    },
    "PidpoolCheckoutsOverdue": {
        f"pidpool_overdue_checkouts{{{POOL}}}": ("0x10 2x20", "0x15 1 0x14"),
    },
    "PidpoolMayExceedServer": {
        f"pidpool_possible_maximum{{{POOL}}}": ("90x10 120x20", "100x30"),
        f"pidpool_server_max_connections{{{POOL}}}": ("100x30", "100x30"),
    },
    "PidpoolUsesRefused": {
        f"pidpool_refused_total{{{POOL}}}": ("0x10 1x20", "1x30"),
    },
    "PidpoolConnectsFail": {
        f'pidpool_connections_failed_total{{{POOL},error_type="OperationalError"}}': ("0+1x30", "7x30"),
    },
}
"""Of each alert its series, one value each half minute: such that it fires after 8 minutes, and such that it
does not."""


def test_every_alert_is_tested() -> None:
    assert re.findall(r"- alert: (\w+)", RULES) == list(SERIES)


def test_the_rules_ask_for_nothing_that_is_not_exposed() -> None:
    body, _ = expose([small_family()], "")
    exposed = set(re.findall(r"^(\w+)\{", body.decode(), re.MULTILINE))
    asked = set(re.findall(r"\b(?:pidpool_\w+|db_client_connection_timeouts_total)", RULES))
    labels = {"pidpool_state"}
    assert asked - labels <= exposed and len(asked) > 6
    states = set(re.findall(r'pidpool_state="(\w+)"', body.decode()))
    assert {"in_transaction", "unknown"} <= states


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    binary = shutil.which("promtool")
    assert binary is not None, "apt-get install prometheus"
    return subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True, timeout=60)


@pytest.mark.system
def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text(RULES)
    done = promtool("check", "rules", "--lint-fatal", tmp_path / "alerts.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SERIES)} rules found" in done.stdout


def rule_test(name: str, series: dict[str, str], firing: bool) -> dict[str, Any]:
    """Return a test of promtool's for the number of alerts of a name that fire after 8 minutes."""
    alerts = f'ALERTS{{alertname="{name}",alertstate="firing"}}'
    samples = [{"labels": "{}", "value": 1}] if firing else []
    return {
        "interval": "30s",
        "input_series": [{"series": each, "values": values} for each, values in series.items()],
        "promql_expr_test": [{"expr": f"count({alerts})", "eval_time": "8m", "exp_samples": samples}],
    }


@pytest.mark.system
@pytest.mark.parametrize("name", SERIES)
def test_an_alert_fires_when_it_should(name: str, tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text(RULES)
    tests = [
        rule_test(name, {each: values[quiet] for each, values in SERIES[name].items()}, firing=not quiet)
        for quiet in (False, True)
    ]
    (tmp_path / "tests.yml").write_text(
        json.dumps({"rule_files": ["alerts.yml"], "evaluation_interval": "30s", "tests": tests})
    )
    done = promtool("test", "rules", tmp_path / "tests.yml")
    assert done.returncode == 0, done.stdout + done.stderr
