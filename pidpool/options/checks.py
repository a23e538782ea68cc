"""Checks of a pool's options: a bad one fails when the pool is made, with what it takes instead."""

from __future__ import annotations

import math


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that an option has one of the values it takes.

    :raises ValueError: if not.
    """
    if value not in choices:
        raise ValueError(f"{option}={value!r}: takes one of {', '.join(map(repr, choices))}")


def check_number(
    option: str, value: object, least: int | None = None, *, whole: bool = False, remedy: str
) -> None:
    """Check that an option is a finite number, `least` or more.

    :param remedy: what the number means, for the message.
    :raises TypeError: if it is no number, or no whole one and `whole` is asked for.
    :raises ValueError: if it is too small or infinite.
    """
    kind = "a whole number" if whole else "a number"
    bound = "" if least is None else f" of {least} or more"
    takes = f"takes {kind}{bound}, {remedy}"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise TypeError(f"{option}={value!r}: {takes}")
    if not math.isfinite(value) or (least is not None and value < least):
        raise ValueError(f"{option}={value!r}: {takes}")
