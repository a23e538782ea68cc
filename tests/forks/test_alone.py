"""A fork of a process's only thread waits for nothing and holds nothing; with a second thread, started in
whatever way, it does."""

from __future__ import annotations

import _thread
import os
import sys
import threading
from typing import Any

import pytest
from forking import run_in_child

from pidpool.forks import detection, log_locks
from pidpool.forks.gate import Fork


def _holds_log_locks(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Fork, and return whether the log writers' locks were held."""
    held: list[None] = []
    hold = log_locks.hold

    def note_and_hold(fork: Fork) -> None:
        held.append(None)
        hold(fork)

    with monkeypatch.context() as patch:
        patch.setattr(log_locks, "hold", note_and_hold)
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    assert not log_locks._held and not detection._forks_alone
    return bool(held)


def _with_a_thread_of(start: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, bool]:
    """In a child, which has one thread: return whether locks are held without and with a second one."""
    alone = _holds_log_locks(monkeypatch)
    started, done = threading.Event(), threading.Event()

    def run() -> None:
        started.set()
        done.wait(30)

    start(run)
    assert started.wait(10)
    with_thread = _holds_log_locks(monkeypatch)
    done.set()
    return alone, with_thread


def _threading(run: Any) -> None:
    threading.Thread(target=run, daemon=True).start()


def _not_known_to_threading(run: Any) -> None:
    _thread.start_new_thread(run, ())


@pytest.mark.parametrize("start", [_threading, _not_known_to_threading])
def test_the_locks_are_held_if_another_thread_runs(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_in_child(_with_a_thread_of, start, monkeypatch) == (False, True)


@pytest.mark.parametrize("greenlets", ["gevent", "eventlet"])
def test_greenlets_count_as_threads(greenlets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, greenlets, threading)
    assert run_in_child(_holds_log_locks, monkeypatch)
