"""The shop's work as Celery tasks. Messages are files in the directory QUEUE; there are no results, since the
shop reports what it did."""

from __future__ import annotations

import os
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
