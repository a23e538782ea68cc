"""A Celery application that holds a transaction open in the process that imports it; its messages and
results are files in the directory CELERY_FILES."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Celery

files = Path(os.environ["CELERY_FILES"])
for name in ("messages", "control", "results"):
    (files / name).mkdir(exist_ok=True)
app = Celery("tasks", broker="filesystem://", backend=f"file://{files}/results")
app.conf.update(
    broker_transport_options={
        "data_folder_in": str(files / "messages"),
        "data_folder_out": str(files / "messages"),
        "polling_interval": 0.02,
        "control_folder": str(files / "control"),
    },
    broker_connection_retry_on_startup=False,
    worker_hijack_root_logger=False,
)


@app.task
def run(name: str) -> dict[str, Any]:
    import held

    return {"use_the_pool": held.use_the_pool, "use_what_is_held": held.use_what_is_held}[name]()


if os.environ.get("CELERY_HOLDS"):
    import held  # noqa: F401  # in the worker's parent, before it forks
