"""The shop's work as Celery tasks. Messages are files in the directory QUEUE; there are no results, since the
shop reports what it did."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from celery import Celery, signals

app = Celery("celery_app", broker="filesystem://")
app.conf.update(
    broker_transport_options={
        "data_folder_in": os.environ["QUEUE"],
        "data_folder_out": os.environ["QUEUE"],
        "control_folder": os.environ["QUEUE"],
        "polling_interval": 0.02,
    },
    broker_connection_retry_on_startup=False,
    worker_hijack_root_logger=False,
    task_ignore_result=True,
)

import shop  # noqa: E402  # in the worker's parent, before it forks


@app.task(name="work")
def work(number: int) -> None:
    shop.work(number)


@signals.worker_process_shutdown.connect
def end(**_: Any) -> None:
    shop.end()


# The lock of the queue by which workers get their tasks. A worker that has ended may have kept it, and the
# first process waits for it at its exit, for ever (`_help_stuff_finish` in billiard/pool.py): 1 of 80 runs
# without any database ended so.
QUEUE_LOCK: list[Any] = []


@signals.worker_ready.connect
def remember_the_lock(sender: Any, **_: Any) -> None:
    QUEUE_LOCK.append(sender.pool._pool._inqueue._rlock)


@signals.worker_shutdown.connect
def free_the_lock(**_: Any) -> None:
    def free() -> None:
        time.sleep(10)  # it ends sooner, as a rule
        QUEUE_LOCK[0].acquire(block=False)
        QUEUE_LOCK[0].release()

    threading.Thread(target=free, daemon=True).start()
