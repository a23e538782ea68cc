"""The options of a pool as they may stand in a database URL with ``?plugin=pidpool``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("takes a number") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("takes a whole number") from None


_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def _flag(text: str) -> bool:
    try:
        return _WORDS[text.lower()]
    except KeyError:
        raise ValueError("takes true or false") from None


IN_URL: dict[str, tuple[str, Callable[[str], Any]]] = {
    "on_foreign": ("on_foreign", str),
    "inherited_sockets": ("inherited_sockets", str),
    "hold_warning": ("hold_warning", _number),
    "family": ("family", str),
    "family_limit": ("family_limit", _whole),
    "max_idle": ("max_idle", _number),
    "recycle_jitter": ("recycle_jitter", _number),
    "pool_size": ("pool_size", _whole),
    "max_overflow": ("max_overflow", _whole),
    "pool_timeout": ("pool_timeout", _number),
    "pool_recycle": ("pool_recycle", _whole),
    "pool_pre_ping": ("pool_pre_ping", _flag),
    "pool_use_lifo": ("pool_use_lifo", _flag),
    "pool_name": ("pool_logging_name", str),
}
"""Of each option in a URL: the keyword of `create_engine`, and what makes its value of the text."""
