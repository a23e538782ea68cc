"""What the fixture `make_engine` is."""

from __future__ import annotations

from typing import Any, Protocol

from sqlalchemy import Engine


class MakeEngine(Protocol):
    def __call__(self, url: str, **options: Any) -> Engine: ...
