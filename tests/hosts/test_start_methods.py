"""The ways in which `multiprocessing` starts a worker: fork, spawn, and forkserver, the default from Python
3.14 on. The fork server starts anew, but its workers inherit what a module that it preloads has opened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pidpool.tools.demo.postgres import EmbeddedPostgres

PROGRAMS = Path(__file__).parent.parent / "programs"


def start_workers(url: str, arguments: str, pool: str) -> dict[str, Any]:
    # Python 3.12 and later warn of forks of a process with threads.
    python = [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    ended = subprocess.run(
        [*python, str(PROGRAMS / "workers.py"), *arguments.split()],
        capture_output=True,
        text=True,
        timeout=100,
        env={
            **os.environ,
            "PYTHONPATH": str(PROGRAMS),  # for the fork server too
            "PYTHONDONTWRITEBYTECODE": "1",
            "DB_URL": url,
            "POOL": pool,
        },
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    return dict(json.loads(ended.stdout))


@pytest.mark.usefixtures("table", "clean_log")
@pytest.mark.parametrize("arguments", ["fork", "forkserver", "forkserver opened", "spawn"])
def test_workers_have_connections_of_their_own(tls_url: str, arguments: str) -> None:
    said = start_workers(tls_url, arguments, "pidpool")
    parent, kinds = said["parent"], said["workers"]
    assert set(kinds) == {"Process", "Process in a thread", "Pool", "ProcessPoolExecutor"}
    assert parent["rows"] == 1
    openers = set()
    for workers in kinds.values():
        numbers: dict[int, set[int]] = {}
        for worker in workers:
            assert worker["pid"] != parent["pid"] and worker["server_pid"] != parent["server_pid"]
            numbers.setdefault(worker["pid"], set()).add(worker["server_pid"])
            openers.add(worker["opener"])
            # A worker that inherits the transaction is refused at its first use; its own is there.
            assert worker["refused"] in (worker["opener"] is not None, None)
        assert any(worker["refused"] is not None for worker in workers)
        assert all(len(each) == 1 for each in numbers.values())  # pooled
        assert len(set.union(*numbers.values())) == len(numbers)  # and shared with no other worker
    if arguments == "fork":
        assert openers == {parent["pid"]}
    elif arguments == "forkserver opened":
        (fork_server,) = openers
        assert fork_server not in (parent["pid"], None)
    else:
        assert openers == {None}


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("arguments", ["fork", "forkserver opened"])
def test_workers_share_a_connection_with_queuepool(postgres: EmbeddedPostgres, arguments: str) -> None:
    said = start_workers(postgres.url(tls=False), arguments, "queue")
    assert len({worker["pid"] for worker in said["workers"]["Process"]}) == 2
    assert len({worker["server_pid"] for worker in said["workers"]["Process"]}) == 1
