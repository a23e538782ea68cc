"""The shop's work as a dramatiq actor, over the Redis at the unix socket REDIS."""

from __future__ import annotations

import os

import dramatiq
import shop
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=f"unix://{os.environ['REDIS']}"))
shop.end_well()


@dramatiq.actor(actor_name="work", max_retries=0)
def work(number: int) -> None:
    shop.work(number)
