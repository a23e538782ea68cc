"""A DAG of tasks that run side by side, which Airflow starts by itself once."""

from __future__ import annotations

import datetime

from airflow.sdk import dag, task

TASKS = 8


@dag(schedule="@once", start_date=datetime.datetime(2024, 1, 1), catchup=False, is_paused_upon_creation=False)
def shop() -> None:
    @task
    def sell(number: int) -> int:
        return number

    sell.expand(number=list(range(TASKS)))


shop()
