"""A configuration of gunicorn's, as many people have it: each worker disposes of the engine at its start."""

from __future__ import annotations

import os
from typing import Any


def post_fork(server: Any, worker: Any) -> None:
    import shop

    shop.engine.dispose(close=os.environ["CLOSE"] == "yes")
